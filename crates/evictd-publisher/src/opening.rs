//! Opens the home store, and waits for it. Until then the publisher isn't ready and says why, as when the store fails later.

use std::sync::Arc;
use std::time::Duration;

use evictd_ops::logging::with_causes;
use evictd_ops::readiness::Condition;
use evictd_ops::time::Backoff;
use evictd_store::{HomeStore, StoreError};
use tokio_util::sync::CancellationToken;

use crate::history::HomeHistory;
use crate::metrics::PublisherMetrics;

/// The pauses between attempts. A server that comes back is used soon, and one that is away isn't pressed.
const RETRY: Backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(2) };

/// A home store that a publisher can work with.
pub(crate) struct OpenStore {
    pub(crate) store: Arc<dyn HomeStore>,
    pub(crate) history: Arc<HomeHistory>,
    /// Whether any client can call the control API.
    pub(crate) has_root_keys: bool,
}

impl OpenStore {
    async fn check(store: Arc<dyn HomeStore>) -> Result<Self, StoreError> {
        store.check_triggers().await?;
        let has_root_keys = store.has_root_keys().await?;
        let history = Arc::new(HomeHistory::read(store.clone()).await?);
        Ok(Self { store, history, has_root_keys })
    }
}

/// Opens and checks the store, again and again until that succeeds. Returns only errors that need another configuration.
/// Cancels `tried` when an attempt has failed.
pub(crate) async fn open_store(
    open: impl AsyncFn() -> Result<Arc<dyn HomeStore>, StoreError>,
    condition: &Condition,
    metrics: &PublisherMetrics,
    tried: &CancellationToken,
) -> Result<OpenStore, StoreError> {
    // Kept between attempts: each opening of an SQLite file begins an incarnation.
    let mut opened = None;
    let mut failures = 0;
    loop {
        let attempt = async {
            let store = match &opened {
                Some(store) => Arc::clone(store),
                None => opened.insert(open().await?).clone(),
            };
            OpenStore::check(store).await
        };
        match attempt.await {
            Ok(open) => {
                if failures > 0 {
                    let unlogged_failures = metrics.store_works_again().field();
                    tracing::info!(unlogged_failures, attempts = failures + 1, "home store is open");
                }
                condition.unmet("the home store to number what was committed");
                return Ok(open);
            }
            Err(error) if error.is_permanent() => return Err(error),
            Err(error) => {
                metrics.store_failed(&error);
                tried.cancel();
                if failures == 0 {
                    tracing::warn!("waiting for the home store");
                }
                condition.unmet(with_causes(&error));
                tokio::time::sleep(RETRY.spread_pause(failures)).await;
                failures = failures.saturating_add(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    use evictd_ops::metrics::Registry;
    use evictd_ops::readiness::Readiness;
    use evictd_store::sqlite::SqliteStore;

    use super::*;
    use crate::metrics::SPECS;

    fn in_use() -> StoreError {
        StoreError::InUse { path: PathBuf::from("/srv/evictd.db") }
    }

    #[tokio::test]
    async fn store_that_cannot_be_opened_yet_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn HomeStore> =
            Arc::new(SqliteStore::open_exclusively(&directory.path().join("home.db")).await.unwrap());
        let (registry, readiness) = (Registry::new(SPECS, &[]).unwrap(), Readiness::new());
        let (metrics, attempts) = (PublisherMetrics::new(&registry), AtomicU32::new(0));
        let condition = readiness.condition("store", "the home store to open");
        let open = async || {
            if attempts.fetch_add(1, Ordering::Relaxed) < 3 {
                return Err(in_use());
            }
            let waiting = readiness.waiting_for();
            assert!(waiting[0].detail.contains("another publisher uses"), "{waiting:?}");
            Ok(store.clone())
        };
        let tried = CancellationToken::new();
        let opened = open_store(open, &condition, &metrics, &tried).await.unwrap();
        assert!(tried.is_cancelled(), "clients get 503 meanwhile");
        assert!(!opened.has_root_keys);
        assert_eq!(attempts.into_inner(), 4);
        assert!(registry.render().contains("evictd_publisher_store_failures_total 3"));
        assert!(!readiness.is_ready(), "it has numbered nothing yet");
    }

    #[tokio::test]
    async fn path_that_cannot_be_used_is_not_waited_for() {
        let (registry, readiness) = (Registry::new(SPECS, &[]).unwrap(), Readiness::new());
        let condition = readiness.condition("store", "the home store to open");
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("no/such/directory/home.db");
        let open = async || {
            let store = SqliteStore::open_exclusively(&missing).await?;
            Ok(Arc::new(store) as Arc<dyn HomeStore>)
        };
        let (metrics, tried) = (PublisherMetrics::new(&registry), CancellationToken::new());
        let error = open_store(open, &condition, &metrics, &tried).await.err().unwrap();
        assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
    }
}
