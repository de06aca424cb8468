//! Whether a cached record may be answered from (R6, R8, R9).
//!
//! A cache keeps each record with a [`Validity`]. Three parties meet at it without a lock: the loader that
//! inserts it, the follower that raises floors, and the verification that reads; [`crate::serving`] has their
//! steps.

use crate::floors::{Anchors, FloorCell};
use crate::lease::Bound;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use crate::time::LeaseTime;

/// How an entry stands towards a verification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EntryState {
    /// It may be answered from.
    Servable,
    /// It meets every floor that is known, but neither its read nor the lease vouches for it any more.
    Stale,
    /// Something that it depends on has changed since, or it isn't shown yet.
    Void,
}

/// How new a cached record is, and what it depends on.
#[derive(Debug)]
pub struct Validity {
    /// When the load was sent, less the age of the authority's last fence (R8).
    pub read_at: LeaseTime,
    /// The shared floors that it must meet.
    pub anchors: Anchors,
    as_of: AtomicU64,
    shown: AtomicBool,
}

impl Validity {
    /// A validity that is hidden until [`Validity::show`].
    pub(crate) fn new(as_of: LogPosition, read_at: LeaseTime, anchors: Anchors) -> Self {
        let as_of = AtomicU64::new(as_of.to_bits());
        Self { read_at, anchors, as_of, shown: AtomicBool::new(false) }
    }

    /// The record includes every change up to here.
    pub fn as_of(&self) -> LogPosition {
        LogPosition::from_bits(self.as_of.load(Ordering::Acquire))
    }

    /// To be called after a look at the floors that followed the insertion.
    pub(crate) fn show(&self) {
        self.shown.store(true, Ordering::Release);
    }

    /// Whether hits may see it.
    pub fn is_shown(&self) -> bool {
        self.shown.load(Ordering::Acquire)
    }

    /// Judges the entry for a verification that read `now` and `proven_at` before it found the entry.
    pub(crate) fn state(
        &self,
        now: LeaseTime,
        proven_at: LeaseTime,
        horizon: &FloorCell,
        bound: Bound,
    ) -> EntryState {
        let floor = self.anchors.floor().max(horizon.get());
        if !self.is_shown() || (self.as_of() < floor && Protection::HitsMeetFloors.holds()) {
            EntryState::Void
        } else if bound.allows(now, self.read_at, proven_at) {
            EntryState::Servable
        } else {
            EntryState::Stale
        }
    }

    /// After a hit that passed: what was applied before the floors were read is in this entry too (R6).
    /// So entries in use outlive the horizon.
    pub(crate) fn advance(&self, applied: LogPosition) {
        if self.as_of() < applied {
            self.as_of.fetch_max(applied.to_bits(), Ordering::AcqRel);
        }
    }
}
