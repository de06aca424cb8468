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

/// What a publisher returns to a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProbeReply {
    Answer(ProbeAnswer),
    /// The agent gets no lease from this publisher.
    Refused {
        nonce: u64,
        refusal: ProbeRefusal,
    },
}

/// Why an agent gets no lease from a publisher.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProbeRefusal {
    /// Its bound is longer than the publisher admits.
    Bound { limit: Duration },
    /// Too many processes run under its name.
    Crowded,
    /// The publisher's store did not issue what the agent claims to have seen.
    Unproved,
    /// A reason of a later version.
    Other,
}

impl ProbeReply {
    pub fn encode(&self) -> Bytes {
        let (nonce, refusal) = match self {
            Self::Answer(answer) => return answer.encode(),
            Self::Refused { nonce, refusal } => (*nonce, refusal),
        };
        let (reason, bound_max_ms) = match refusal {
            ProbeRefusal::Bound { limit } => {
                (pb::ProbeRefusalReason::Bound, u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))
            }
            ProbeRefusal::Crowded => (pb::ProbeRefusalReason::Crowded, 0),
            ProbeRefusal::Unproved => (pb::ProbeRefusalReason::Unproved, 0),
            ProbeRefusal::Other => (pb::ProbeRefusalReason::Unspecified, 0),
        };
        let refusal = Some(pb::ProbeRefusal { reason: reason.into(), bound_max_ms });
        codec::encode(&pb::ProbeAnswer { nonce, refusal, ..pb::ProbeAnswer::default() })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: pb::ProbeAnswer = codec::decode(payload)?;
        let Some(refusal) = answer.refusal else {
            return ProbeAnswer::from_message(answer).map(Self::Answer);
        };
        let refusal = match refusal.reason() {
            pb::ProbeRefusalReason::Bound => {
                ProbeRefusal::Bound { limit: Duration::from_millis(refusal.bound_max_ms) }
            }
            pb::ProbeRefusalReason::Crowded => ProbeRefusal::Crowded,
            pb::ProbeRefusalReason::Unproved => ProbeRefusal::Unproved,
            pb::ProbeRefusalReason::Unspecified => ProbeRefusal::Other,
        };
        Ok(Self::Refused { nonce: codec::nonce(answer.nonce)?, refusal })
    }
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
            refusal: None,
        })
    }

    fn from_message(answer: pb::ProbeAnswer) -> Result<Self, DecodeError> {
        Ok(Self {
            nonce: codec::nonce(answer.nonce)?,
            head: codec::voucher_from(answer.head)?,
            store_time: StoreTime(answer.store_time_unix_us),
            held: Duration::from_micros(answer.held_us),
            is_proof: !answer.proves_nothing,
        })
    }
}
