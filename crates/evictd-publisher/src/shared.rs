//! What the parts of a publisher share: handles of its state.

use std::sync::Arc;
use std::time::Duration;

use evictd_ops::invariants::Invariants;
use evictd_ops::metrics::Registry;

use crate::history::HomeHistory;
use crate::log_head::LogHead;
use crate::metrics::PublisherMetrics;
use crate::rounds::{Fence, FreshnessGuard, RoundTrigger};
use crate::vouching::Vouching;
use crate::wake::Wake;

#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) head: LogHead,
    pub(crate) history: Arc<HomeHistory>,
    pub(crate) vouching: Vouching,
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundTrigger,
    pub(crate) wake: Wake,
    pub(crate) metrics: Arc<PublisherMetrics>,
    pub(crate) invariants: Invariants,
}

impl Shared {
    pub(crate) fn new(
        history: Arc<HomeHistory>,
        vouching: Vouching,
        wake: Wake,
        metrics: Arc<PublisherMetrics>,
        registry: &Registry,
    ) -> Self {
        Self {
            head: LogHead::new(history.head().at),
            history,
            vouching,
            fence: Fence::default(),
            rounds: RoundTrigger::default(),
            wake,
            metrics,
            invariants: Invariants::new(registry),
        }
    }

    /// Of a publisher that serves.
    #[cfg(test)]
    pub(crate) fn serving(history: Arc<HomeHistory>, registry: &Registry) -> Self {
        let metrics = Arc::new(PublisherMetrics::new(registry));
        Self::new(history, Vouching::serving(), Wake::default(), metrics, registry)
    }

    /// Returns a guard for reads that need a round no older than `trust`.
    pub(crate) fn freshness_guard(&self, trust: Duration) -> FreshnessGuard {
        let Self { fence, rounds, vouching, .. } = self.clone();
        FreshnessGuard { fence, rounds, vouching, trust }
    }
}
