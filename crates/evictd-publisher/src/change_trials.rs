//! Whether the store carries out changes.
//!
//! A store that answers reads and rounds may still fail every change: a sequence is exhausted, a right was taken away, row
//! level security was switched on. A publisher that fails changes must get no requests, and then no request shows that the
//! store has recovered. So it tries.

use std::sync::Arc;
use std::time::Duration;

use evictd_ops::logging::with_causes;
use evictd_ops::readiness::Condition;
use evictd_store::{ChangeStore, StoreError};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The pause between two trials.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// The outcomes of changes.
#[derive(Clone, Debug)]
pub(crate) struct ChangeTrials {
    condition: Condition,
    failed: Arc<Notify>,
}

impl ChangeTrials {
    /// Changes work until one fails.
    pub(crate) fn new(condition: Condition) -> Self {
        condition.met();
        Self { condition, failed: Arc::default() }
    }

    pub(crate) fn succeeded(&self) {
        self.condition.met();
    }

    /// A change failed for a reason of the store's.
    pub(crate) fn failed(&self, error: &StoreError) {
        self.show(error);
        self.failed.notify_one();
    }

    fn show(&self, error: &StoreError) {
        self.condition.unmet(format!("changes that succeed; the last one failed: {}", with_causes(error)));
    }

    /// Tries changes after a failure, until one succeeds. Runs until `shutdown`.
    pub(crate) async fn run(self, store: Arc<dyn ChangeStore>, shutdown: CancellationToken) {
        let trials = async {
            loop {
                self.failed.notified().await;
                loop {
                    tokio::time::sleep(TRY_EVERY).await;
                    match store.try_change().await {
                        Ok(()) => break self.succeeded(),
                        Err(error) => self.show(&error),
                    }
                }
            }
        };
        shutdown.run_until_cancelled(trials).await;
    }
}
