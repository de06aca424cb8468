//! The live feed.

use bytes::Bytes;
use evictd_core::invalidation::Invalidation;
use evictd_core::limits::LIVE_BATCH_MAX;
use evictd_core::position::LogPosition;

use crate::codec::{self, DecodeError, field};
use crate::generated as pb;
use crate::generated::live::Event;

/// A message of the live feed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Live {
    /// Rows of one epoch that were just numbered.
    Invalidations(Vec<Invalidation>),
    /// How long the log is.
    Tick(LogPosition),
}

/// Rows as live messages, in order, each within the limits. Rows of different epochs part ways.
pub fn encode_invalidations(rows: &[Invalidation]) -> impl Iterator<Item = Bytes> {
    rows.chunk_by(|one, next| one.position.epoch() == next.position.epoch())
        .flat_map(|epoch| epoch.chunks(LIVE_BATCH_MAX))
        .map(|batch| {
            let invalidations = batch.iter().map(codec::invalidation_to).collect();
            let event = Event::Invalidations(pb::Invalidations { invalidations });
            codec::encode(&pb::Live { epoch: batch[0].position.epoch(), event: Some(event) })
        })
}

/// A tick.
pub fn encode_tick(head: LogPosition) -> Bytes {
    let event = Event::Tick(pb::Tick { head: head.position() });
    codec::encode(&pb::Live { epoch: head.epoch(), event: Some(event) })
}

/// Reads a live message.
pub fn decode(payload: &[u8]) -> Result<Live, DecodeError> {
    let live: pb::Live = codec::decode(payload)?;
    match live.event.ok_or(DecodeError::Unknown)? {
        Event::Invalidations(batch) if !(1..=LIVE_BATCH_MAX).contains(&batch.invalidations.len()) => {
            Err(field("invalidations"))
        }
        Event::Invalidations(batch) => batch
            .invalidations
            .into_iter()
            .map(|row| codec::invalidation_from(live.epoch, row))
            .collect::<Result<_, _>>()
            .map(Live::Invalidations),
        Event::Tick(tick) => Ok(Live::Tick(codec::position(live.epoch, tick.head, "head")?)),
    }
}
