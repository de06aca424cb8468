//! The live feed.

use bytes::Bytes;
use evictd_core::history::{RoundToken, Voucher};
use evictd_core::invalidation::Invalidation;
use evictd_core::limits::LIVE_BATCH_MAX;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;
use crate::generated::live::Event as PbEvent;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Live {
    /// The history of the sender, and the end of its log.
    pub voucher: Voucher,
    pub event: LiveEvent,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LiveEvent {
    /// Newly numbered rows of the voucher's epoch, at most [`LIVE_BATCH_MAX`]. The last one is at its position.
    Invalidations(Vec<Invalidation>),
    /// The head alone, with the token of the publisher's last round, if there was one.
    Tick(Option<RoundToken>),
    /// The incarnation has ended.
    Ended,
}

impl Live {
    pub fn encode(&self) -> Bytes {
        let event = match &self.event {
            LiveEvent::Invalidations(rows) => {
                let invalidations = rows.iter().map(codec::invalidation_to).collect();
                PbEvent::Invalidations(pb::Invalidations { invalidations })
            }
            LiveEvent::Tick(round) => PbEvent::Tick(pb::Tick { round: round.map_or(0, |round| round.0) }),
            LiveEvent::Ended => PbEvent::Ended(pb::Ended {}),
        };
        codec::encode(&pb::Live { voucher: Some(codec::voucher_to(&self.voucher)), event: Some(event) })
    }

    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let live: pb::Live = codec::decode(payload)?;
        let voucher = codec::voucher_from(live.voucher)?;
        let event = match live.event.ok_or(DecodeError::Unknown)? {
            PbEvent::Invalidations(batch) => {
                if !(1..=LIVE_BATCH_MAX).contains(&batch.invalidations.len()) {
                    return Err(field("invalidations"));
                }
                let epoch = voucher.milestone.at.epoch();
                let rows = batch.invalidations.into_iter().map(|row| codec::invalidation_from(epoch, row));
                let rows = rows.collect::<Result<Vec<_>, _>>()?;
                if rows.last().map(|last| last.position) != Some(voucher.milestone.at) {
                    return Err(field("voucher"));
                }
                LiveEvent::Invalidations(rows)
            }
            PbEvent::Tick(tick) => LiveEvent::Tick(codec::round(tick.round)),
            PbEvent::Ended(pb::Ended {}) => LiveEvent::Ended,
        };
        Ok(Self { voucher, event })
    }
}
