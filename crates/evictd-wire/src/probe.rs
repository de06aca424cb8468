//! Probes and their answers.

use std::time::Duration;

use bytes::Bytes;
use evictd_core::history::Voucher;
use evictd_core::ids::InstanceId;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::{StoreTime, micros};

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;

/// An agent's query for the head of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeRequest {
    pub nonce: u64,
    pub instance: InstanceId,
    /// The agent's policy without a lease.
    pub policy: PartitionPolicy,
    pub bound: Duration,
    /// The furthest voucher received of the history that the agent follows; `None` if it follows none yet.
    pub seen: Option<Voucher>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProbeAnswer {
    pub nonce: u64,
    /// Every change committed before the probe was sent is at or below this head.
    pub head: Voucher,
    /// The store's clock when the answer left.
    pub store_time: StoreTime,
    /// The time from the probe's arrival at the authority to the answer.
    pub held: Duration,
    /// Whether the log holds every change committed before the probe. If not, the answer only names the history and
    /// its head.
    pub is_proof: bool,
}

impl ProbeRequest {
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

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let request: pb::ProbeRequest = codec::decode(payload)?;
        let policy = match request.policy() {
            pb::PartitionPolicy::Deny => PartitionPolicy::Deny,
            // An agent that may serve stale records must not count as one that denies: a receipt would promise
            // too much.
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
    pub fn encode(&self) -> Bytes {
        codec::encode(&pb::ProbeAnswer {
            nonce: self.nonce,
            head: Some(codec::voucher_to(&self.head)),
            store_time_unix_us: self.store_time.0,
            held_us: micros(self.held),
            proves_nothing: !self.is_proof,
        })
    }

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
