//! What the follower knows, where the hot path can read it without a lock.

use std::ops::Deref;
use std::sync::atomic::{AtomicI64, Ordering};

use evictd_core::follower::Follower;
use evictd_core::lease::Bound;
use evictd_core::serving::{AgentState, VerificationStart};
use evictd_core::time::StoreTime;
use evictd_ops::clock;

/// Shared by the follow task, which writes it, and verifications, which read the atomics only.
#[derive(Debug)]
pub(crate) struct Knowledge {
    state: AgentState,
    /// Upper estimate of the store's clock less the lease clock, in microseconds.
    home_offset_high_us: AtomicI64,
}

impl Deref for Knowledge {
    type Target = AgentState;

    fn deref(&self) -> &AgentState {
        &self.state
    }
}

/// Before the first measurement.
const UNMEASURED: i64 = i64::MIN;

impl Knowledge {
    pub(crate) fn new(follower: Follower, bound: Bound) -> Self {
        Self { state: AgentState::new(follower, bound), home_offset_high_us: AtomicI64::new(UNMEASURED) }
    }

    /// What a verification that begins now builds on.
    pub(crate) fn begin(&self) -> VerificationStart {
        self.state.begin(clock::lease_now())
    }

    /// Whether a lease runs.
    pub(crate) fn lease_runs(&self) -> bool {
        self.state.has_lease(clock::lease_now())
    }

    /// The highest that the store's clock can show now, as far as probes have measured it; before the first
    /// one, this machine's own.
    pub(crate) fn home_time_high(&self) -> StoreTime {
        match self.home_offset_high_us.load(Ordering::Relaxed) {
            UNMEASURED => clock::wall_now(),
            offset => StoreTime(offset.saturating_add(clock::lease_now().0 as i64)),
        }
    }

    /// The highest that the store's clock less the lease clock can be.
    pub(crate) fn publish_home_offset_high(&self, micros: i64) {
        self.home_offset_high_us.store(micros.max(UNMEASURED + 1), Ordering::Relaxed);
    }
}
