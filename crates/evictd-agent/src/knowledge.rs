//! What the follower knows, where the hot path can read it without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use evictd_core::entry::Reading;
use evictd_core::floors::FloorCell;
use evictd_core::follower::Follower;
use evictd_core::lease::{Bound, Mode};
use evictd_core::position::LogPosition;
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use parking_lot::Mutex;

/// Shared by the follow task, which writes it, and verifications, which read the atomics only.
#[derive(Debug)]
pub(crate) struct Knowledge {
    /// The protocol state. Loads lock it to anchor what they bring; hits never do.
    pub(crate) follower: Mutex<Follower>,
    pub(crate) bound: Bound,
    pub(crate) horizon: Arc<FloorCell>,
    applied: AtomicU64,
    /// Microseconds on the lease clock; 0 before the first proof.
    proven_at: AtomicU64,
    /// Upper estimate of the store's clock less the lease clock, in microseconds.
    home_offset_high_us: AtomicI64,
}

/// Before the first measurement.
const UNMEASURED: i64 = i64::MIN;

impl Knowledge {
    pub(crate) fn new(follower: Follower, bound: Bound) -> Self {
        let horizon = follower.floors().horizon().clone();
        Self {
            follower: Mutex::new(follower),
            bound,
            horizon,
            applied: AtomicU64::new(LogPosition::ZERO.to_bits()),
            proven_at: AtomicU64::new(0),
            home_offset_high_us: AtomicI64::new(UNMEASURED),
        }
    }

    /// Contiguously applied, as announced; `ZERO` before the base is known.
    pub(crate) fn applied(&self) -> LogPosition {
        LogPosition::from_bits(self.applied.load(Ordering::Acquire))
    }

    /// Since when nothing can have been missed; the clock's start before the first proof.
    pub(crate) fn proven_at(&self) -> LeaseTime {
        LeaseTime(self.proven_at.load(Ordering::Acquire))
    }

    /// What a verification that begins now may build on.
    ///
    /// The proof is read before `applied`: the other way round, a proof could be seen whose head isn't in that
    /// `applied`, and a load below it would pass for proven.
    pub(crate) fn begin(&self) -> Reading {
        let now = clock::lease_now();
        let proven_at = self.proven_at();
        Reading { now, proven_at, applied: self.applied() }
    }

    /// The highest that the store's clock can show now, as far as probes have measured it; before the first
    /// one, this machine's own.
    pub(crate) fn home_time_high(&self) -> StoreTime {
        match self.home_offset_high_us.load(Ordering::Relaxed) {
            UNMEASURED => clock::wall_now(),
            offset => StoreTime(offset.saturating_add(clock::lease_now().0 as i64)),
        }
    }

    /// Whether a lease runs, so that what meets the floors may be answered from whoever read it.
    pub(crate) fn lease_runs(&self) -> bool {
        let proven_at = self.proven_at();
        proven_at != LeaseTime::default() && !self.bound.remaining(clock::lease_now(), proven_at).is_zero()
    }

    /// Nothing that was known counts any more, and never will again: the machine stood still without its clock
    /// knowing (R8). What is cached is void, and loads answer nobody. Only a new process starts over.
    pub(crate) fn end(&self) {
        self.horizon.raise(LogPosition::NEVER);
        self.proven_at.store(0, Ordering::Release);
    }

    /// Whether [`Self::end`] was called.
    pub(crate) fn has_ended(&self) -> bool {
        self.horizon.get() == LogPosition::NEVER
    }

    /// The mode at `now`; `follower` is this knowledge's own.
    pub(crate) fn mode(&self, follower: &Follower, now: LeaseTime) -> Mode {
        if self.has_ended() { Mode::Expired } else { follower.mode(now) }
    }

    /// What is left of the lease at `now`.
    pub(crate) fn remaining(&self, follower: &Follower, now: LeaseTime) -> Duration {
        let proven_at = follower.proven_at().filter(|_| !self.has_ended());
        proven_at.map_or(Duration::ZERO, |at| self.bound.remaining(now, at))
    }

    /// To be called after the floors were raised and entries evicted (R9).
    pub(crate) fn publish_applied(&self, applied: LogPosition) {
        self.applied.store(applied.to_bits(), Ordering::Release);
    }

    /// To be called after `applied` was published (R9).
    pub(crate) fn publish_proven(&self, proven_at: LeaseTime) {
        self.proven_at.fetch_max(proven_at.0, Ordering::AcqRel);
    }

    /// The highest that the store's clock less the lease clock can be.
    pub(crate) fn publish_home_offset_high(&self, micros: i64) {
        self.home_offset_high_us.store(micros.max(UNMEASURED + 1), Ordering::Relaxed);
    }
}
