//! Probes and their answers.

use std::time::Duration;

use bytes::Bytes;
use evictd_core::ids::InstanceId;
use evictd_core::position::LogPosition;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::StoreTime;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;

/// An agent asks how long the log is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeRequest {
    /// Repeated by the answer.
    pub nonce: u64,
    /// The asking process.
    pub instance: InstanceId,
    /// What it does without a lease.
    pub policy: PartitionPolicy,
    /// The bound it keeps.
    pub bound: Duration,
    /// The furthest it has heard of.
    pub seen: LogPosition,
}

/// The log's length, as of the question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeAnswer {
    /// Which probe this answers.
    pub nonce: u64,
    /// Everything committed before the probe was sent lies at or below.
    pub head: LogPosition,
    /// The store's clock when the answer left.
    pub store_time: StoreTime,
    /// How long the authority held the probe until then.
    pub held: Duration,
}

impl ProbeRequest {
    /// As bytes.
    pub fn encode(&self) -> Bytes {
        let policy = match self.policy {
            PartitionPolicy::Deny => pb::PartitionPolicy::Deny,
            PartitionPolicy::ServeStale => pb::PartitionPolicy::ServeStale,
        };
        codec::encode(&pb::ProbeRequest {
            nonce: self.nonce,
            instance: self.instance.0,
            policy: policy.into(),
            bound_ms: u64::try_from(self.bound.as_millis()).unwrap_or(u64::MAX),
            seen_epoch: self.seen.epoch(),
            seen_position: self.seen.position(),
        })
    }

    /// From bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let request: pb::ProbeRequest = codec::decode(payload)?;
        let policy = match request.policy() {
            pb::PartitionPolicy::Deny => PartitionPolicy::Deny,
            // Not known to deny: a receipt must not promise too much.
            pb::PartitionPolicy::ServeStale | pb::PartitionPolicy::Unspecified => PartitionPolicy::ServeStale,
        };
        if request.instance == 0 {
            return Err(field("instance"));
        }
        let seen = LogPosition::new(request.seen_epoch, request.seen_position).ok_or(field("seen"))?;
        Ok(Self {
            nonce: codec::nonce(request.nonce)?,
            instance: InstanceId(request.instance),
            policy,
            bound: Duration::from_millis(request.bound_ms),
            seen,
        })
    }
}

impl ProbeAnswer {
    /// As bytes.
    pub fn encode(&self) -> Bytes {
        codec::encode(&pb::ProbeAnswer {
            nonce: self.nonce,
            epoch: self.head.epoch(),
            head: self.head.position(),
            store_time_unix_us: self.store_time.0,
            held_us: u64::try_from(self.held.as_micros()).unwrap_or(u64::MAX),
        })
    }

    /// From bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: pb::ProbeAnswer = codec::decode(payload)?;
        Ok(Self {
            nonce: codec::nonce(answer.nonce)?,
            head: codec::position(answer.epoch, answer.head, "head")?,
            store_time: StoreTime(answer.store_time_unix_us),
            held: Duration::from_micros(answer.held_us),
        })
    }
}
