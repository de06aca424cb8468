//! Whether a cached record may be served (R6, R8, R9).
//!
//! A cache keeps each record with its [`Validity`]. Three parties use it without a lock: the load
//! that inserts the record, the follower that raises floors, and the verification that reads.
//! [`crate::serving`] has their steps.

use crate::floors::{Anchors, FloorCell};
use crate::lease::Bound;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::sync::{AtomicBool, AtomicU64, Ordering};
use crate::time::LeaseTime;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EntryState {
    Servable,
    /// It meets its floors, but both its read and the lease are too old.
    Stale,
    /// It is below a floor, or not shown yet.
    Void,
}

/// How new a cached record is, and what it depends on.
#[derive(Debug)]
pub struct Validity {
    /// When the load was sent, less the age of the authority's last fence (R8).
    pub read_at: LeaseTime,
    pub anchors: Anchors,
    as_of: AtomicU64,
    shown: AtomicBool,
}

impl Validity {
    /// Of an entry that is hidden until [`Validity::show`].
    pub(crate) fn new(as_of: LogPosition, read_at: LeaseTime, anchors: Anchors) -> Self {
        let as_of = AtomicU64::new(as_of.to_bits());
        Self { read_at, anchors, as_of, shown: AtomicBool::new(false) }
    }

    /// The record includes every change up to here.
    pub fn as_of(&self) -> LogPosition {
        LogPosition::from_bits(self.as_of.load(Ordering::Acquire))
    }

    /// Call it after the check of the floors that follows the insertion.
    pub(crate) fn show(&self) {
        self.shown.store(true, Ordering::Release);
    }

    /// Whether hits may see it.
    pub fn is_shown(&self) -> bool {
        self.shown.load(Ordering::Acquire)
    }

    /// Judges the entry for a verification that read `now` and `proven_at` before it looked the
    /// entry up.
    pub(crate) fn state(
        &self,
        now: LeaseTime,
        proven_at: LeaseTime,
        horizon: &FloorCell,
        bound: Bound,
    ) -> EntryState {
        if !self.is_shown() || (self.is_below_floor(horizon) && Protection::HitsMeetFloors.holds()) {
            EntryState::Void
        } else if bound.allows(now, self.read_at, proven_at) {
            EntryState::Servable
        } else {
            EntryState::Stale
        }
    }

    /// Whether one of its shared floors is above it.
    pub(crate) fn is_below_floor(&self, horizon: &FloorCell) -> bool {
        let floor = self.anchors.floor().max(horizon.get());
        self.as_of() < floor
    }

    /// Raises `as_of` after a hit: the entry met floors that were read after `applied`, so it
    /// includes all changes up to there (R6). Without it, a rising horizon would void entries that
    /// are in use.
    pub(crate) fn advance(&self, applied: LogPosition) {
        if self.as_of() < applied {
            self.as_of.fetch_max(applied.to_bits(), Ordering::AcqRel);
        }
    }
}
