//! Expires keys: each expiry becomes a change, so that all regions apply it alike.
//!
//! In a task of its own: a long lock on `keys`, by a migration for instance, must not delay ticks and numbering.

use std::sync::Arc;
use std::time::Duration;

use evictd_ops::time::every;
use evictd_store::{ChangeStore, StoreError};
use tokio_util::sync::CancellationToken;

use crate::metrics::PublisherMetrics;
use crate::wake::Wake;

/// Expiries in one transaction.
const BATCH: usize = 1024;

pub(crate) struct Expiry {
    pub(crate) interval: Duration,
    pub(crate) store: Arc<dyn ChangeStore>,
    pub(crate) metrics: Arc<PublisherMetrics>,
    pub(crate) wake: Wake,
}

impl Expiry {
    /// Looks for expiries that have come until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut interval = every(self.interval);
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
                tracing::info!("expiry works again");
            }
            failing = outcome.is_err();
        }
    }
}
