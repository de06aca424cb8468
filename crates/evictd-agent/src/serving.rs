//! The follower's state, which the hot path reads without a lock.

use std::ops::Deref;
use std::sync::atomic::{AtomicI64, Ordering};

use evictd_core::follower::Follower;
use evictd_core::lease::Bound;
use evictd_core::serving::{AgentState, VerificationStart};
use evictd_core::time::StoreTime;
use evictd_ops::clock;

/// The core's [`AgentState`] on the real clocks. The follow task writes it; verifications read its atomics.
#[derive(Debug)]
pub(crate) struct ServingState {
    state: AgentState,
    /// Upper estimate of the store's clock less the lease clock, in microseconds.
    home_offset_high_us: AtomicI64,
}

impl Deref for ServingState {
    type Target = AgentState;

    fn deref(&self) -> &AgentState {
        &self.state
    }
}

/// The offset before the first measurement.
const UNMEASURED: i64 = i64::MIN;

impl ServingState {
    pub(crate) fn new(follower: Follower, bound: Bound) -> Self {
        Self { state: AgentState::new(follower, bound), home_offset_high_us: AtomicI64::new(UNMEASURED) }
    }

    pub(crate) fn begin(&self) -> VerificationStart {
        self.state.begin(clock::lease_now())
    }

    pub(crate) fn has_lease_now(&self) -> bool {
        self.state.has_lease(clock::lease_now())
    }

    /// Returns the highest possible time on the store's clock, as measured by probes; before the first one, this
    /// machine's own time.
    pub(crate) fn home_time_high(&self) -> StoreTime {
        match self.home_offset_high_us.load(Ordering::Relaxed) {
            UNMEASURED => clock::wall_now(),
            offset => StoreTime(offset.saturating_add(clock::lease_now().0 as i64)),
        }
    }

    /// Sets the highest possible difference of the store's clock less the lease clock.
    pub(crate) fn publish_home_offset_high(&self, micros: i64) {
        self.home_offset_high_us.store(micros.max(UNMEASURED + 1), Ordering::Relaxed);
    }
}
