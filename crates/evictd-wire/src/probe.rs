//! Probes and their answers.

use std::time::Duration;

use bytes::Bytes;
use evictd_core::history::Voucher;
use evictd_core::ids::InstanceId;
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
    /// The furthest that it received of the history that it follows; `None` if it follows none yet.
    pub seen: Option<Voucher>,
}

/// The log's length, as of the question.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeAnswer {
    /// Which probe this answers.
    pub nonce: u64,
    /// Everything committed before the probe was sent lies at or below.
    pub head: Voucher,
    /// The store's clock when the answer left.
    pub store_time: StoreTime,
    /// How long the authority held the probe until then.
    pub held: Duration,
    /// Whether nothing committed before the probe can be missing from the log. If not, the answer only names the history
    /// and its head.
    pub is_proof: bool,
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
            seen: self.seen.as_ref().map(codec::voucher_to),
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
        let seen = request.seen.map(|seen| codec::voucher_from(Some(seen))).transpose()?;
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
            head: Some(codec::voucher_to(&self.head)),
            store_time_unix_us: self.store_time.0,
            held_us: u64::try_from(self.held.as_micros()).unwrap_or(u64::MAX),
            proves_nothing: !self.is_proof,
        })
    }

    /// From bytes.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: pb::ProbeAnswer = codec::decode(payload)?;
        Ok(Self {
            nonce: codec::nonce(answer.nonce)?,
            head: codec::voucher_from(answer.head)?,
            store_time: StoreTime(answer.store_time_unix_us),
            held: Duration::from_micros(answer.held_us),
            is_proof: !answer.proves_nothing,
        })
    }
}
