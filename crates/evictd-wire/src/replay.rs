//! Replays: requests for missed rows, and their answers.

use bytes::Bytes;
use evictd_core::follower::ReplayOutcome as Outcome;
use evictd_core::history::Provenance;
use evictd_core::invalidation::Invalidation;
use evictd_core::limits::{INVALIDATION_BYTES_MAX, PAYLOAD_BYTES_MAX, POSITION_MAX, REPLAY_BATCH_MAX};
use prost::Message;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;
use crate::generated::replay_answer::Outcome as PbOutcome;

/// An agent's query for the rows `from..=to`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplayRequest {
    pub nonce: u64,
    pub epoch: u32,
    pub from: u64,
    pub to: u64,
}

/// The rows, or a refusal. On the wire it repeats the request's nonce and range start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplayAnswer {
    pub nonce: u64,
    pub provenance: Provenance,
    pub outcome: Outcome,
}

impl ReplayRequest {
    pub fn encode(&self) -> Bytes {
        codec::encode(&pb::ReplayRequest {
            nonce: self.nonce,
            epoch: self.epoch,
            from: self.from,
            to: self.to,
        })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let request: pb::ReplayRequest = codec::decode(payload)?;
        codec::position(request.epoch, request.to, "to")?;
        let span_fits = request.from >= 1
            && request.from <= request.to
            && request.to <= POSITION_MAX
            && request.to - request.from < REPLAY_BATCH_MAX as u64;
        if !span_fits {
            return Err(field("from..to"));
        }
        Ok(Self {
            nonce: codec::nonce(request.nonce)?,
            epoch: request.epoch,
            from: request.from,
            to: request.to,
        })
    }
}

impl ReplayAnswer {
    /// Leaves rows that would make the message too long for the next request.
    pub fn encode(&self, request: &ReplayRequest) -> Bytes {
        let outcome = match &self.outcome {
            Outcome::Rows(rows) => PbOutcome::Rows(pb::ReplayRows { invalidations: fitting(rows) }),
            Outcome::Refused { head } => {
                PbOutcome::Refused(pb::ReplayRefused { head: Some(codec::voucher_to(head)) })
            }
        };
        codec::encode(&pb::ReplayAnswer {
            nonce: self.nonce,
            epoch: request.epoch,
            from: request.from,
            outcome: Some(outcome),
            provenance: Some(codec::provenance_to(self.provenance)),
        })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let answer: pb::ReplayAnswer = codec::decode(payload)?;
        let outcome = match answer.outcome.ok_or(DecodeError::Unknown)? {
            PbOutcome::Rows(rows) => {
                let rows: Vec<Invalidation> = rows
                    .invalidations
                    .into_iter()
                    .map(|row| codec::invalidation_from(answer.epoch, row))
                    .collect::<Result<_, _>>()?;
                if rows.first().is_none_or(|row| row.position.position() != answer.from) {
                    return Err(field("invalidations"));
                }
                Outcome::Rows(rows)
            }
            PbOutcome::Refused(refused) => Outcome::Refused { head: codec::voucher_from(refused.head)? },
        };
        let provenance = codec::provenance_from(answer.provenance)?;
        Ok(Self { nonce: codec::nonce(answer.nonce)?, provenance, outcome })
    }
}

fn fitting(rows: &[Invalidation]) -> Vec<pb::Invalidation> {
    let mut budget = PAYLOAD_BYTES_MAX - INVALIDATION_BYTES_MAX;
    rows.iter()
        .map(codec::invalidation_to)
        .take_while(|row| {
            // Each row is preceded by a tag and a length.
            let length = row.encoded_len() + 8;
            let fits = length <= budget;
            budget = budget.saturating_sub(length);
            fits
        })
        .collect()
}
