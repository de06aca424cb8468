//! Ends what has expired: each end becomes a change, so that it comes in every region alike.
//!
//! In a task of its own. Whoever locks the keys for long, a migration for instance, holds this up, and must hold up
//! neither ticks nor numbering (R10).

use std::sync::Arc;
use std::time::Duration;

use evictd_store::{ChangeStore, StoreError};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::sequencer::Wake;

/// Ends in one transaction.
const BATCH: usize = 1024;

pub(crate) struct Expiry {
    pub(crate) interval: Duration,
    pub(crate) store: Arc<dyn ChangeStore>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) wake: Wake,
}

impl Expiry {
    /// Looks for ends that have come until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut interval = tokio::time::interval(self.interval);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        while shutdown.run_until_cancelled(interval.tick()).await.is_some() {
            let outcome = self.store.expire(BATCH).await;
            match &outcome {
                Ok(0) => {}
                Ok(expired) => {
                    self.wake.now();
                    if *expired >= BATCH as u64 {
                        interval.reset_immediately();
                    }
                }
                Err(error) => {
                    if matches!(error, StoreError::Unlogged { .. }) {
                        self.wake.unlogged();
                    }
                    self.metrics.store_failed(error);
                }
            }
            if failing && outcome.is_ok() {
                tracing::info!("what has expired is ended again");
            }
            failing = outcome.is_err();
        }
    }
}
