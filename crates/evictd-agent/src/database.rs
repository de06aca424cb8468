//! Records read from the home database or a replica of it, beside the authority (R8, R10).
//!
//! A database's own read proves nothing: it may be a replica that lags, or a primary that was demoted and
//! doesn't know. So what it says counts only while the lease vouches for it, and only where it meets the floors;
//! the lease is always the authority's. Whatever fails here is asked of the authority instead.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;
use evictd_core::time::LeaseTime;
use evictd_ops::readiness::Condition;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::metrics::{DatabaseOutcome, Metrics};
use crate::origin::Loaded;

/// A database that holds the records, primary or replica.
#[async_trait]
pub trait Database: Debug + Send + Sync {
    /// What `hash` stands for and how new that is, both read in one snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, Box<dyn std::error::Error + Send + Sync>>;
}

/// After a failure the database is asked again no more often than this, and nobody waits for its answer: a database
/// that is silent would cost each load its time-out, and many loads at once all their places.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// A [`Database`] that may fail.
#[derive(Clone, Debug)]
pub(crate) struct Replica(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    database: Arc<dyn Database>,
    /// After which silence the authority is asked instead.
    timeout: Duration,
    metrics: Arc<Metrics>,
    remark: Condition,
    /// While it fails: when it may be asked again.
    retry_at: Mutex<Option<Instant>>,
}

impl Replica {
    pub(crate) fn new(
        database: Arc<dyn Database>,
        timeout: Duration,
        metrics: Arc<Metrics>,
        remark: Condition,
    ) -> Self {
        Self(Arc::new(Shared { database, timeout, metrics, remark, retry_at: Mutex::default() }))
    }

    /// What the database says of `hash`, if it says anything. It vouches for nothing: the record is as old as the
    /// lease is.
    pub(crate) async fn lookup(&self, hash: KeyHash) -> Option<Loaded> {
        if self.0.fails() {
            if self.0.may_retry() {
                let shared = self.0.clone();
                tokio::spawn(async move { drop(shared.ask(hash).await) });
            }
            return None;
        }
        let lookup = self.0.ask(hash).await?;
        Some(Loaded { lookup, read_at: LeaseTime::default() })
    }

    /// As if the pause after a failure were over.
    #[cfg(test)]
    pub(crate) fn be_due(&self) {
        *self.0.retry_at.lock() = Some(Instant::now());
    }
}

impl Shared {
    fn fails(&self) -> bool {
        self.retry_at.lock().is_some()
    }

    /// Whether it is time, for one load.
    fn may_retry(&self) -> bool {
        let (now, mut retry_at) = (Instant::now(), self.retry_at.lock());
        let due = retry_at.is_some_and(|due| due <= now);
        if due {
            *retry_at = Some(now + self.timeout + RETRY_EVERY);
        }
        due
    }

    async fn ask(&self, hash: KeyHash) -> Option<Lookup> {
        let failure = match tokio::time::timeout(self.timeout, self.database.lookup(hash)).await {
            Ok(Ok(lookup)) => {
                if self.retry_at.lock().take().is_some() {
                    tracing::info!("the database answers again");
                    self.remark.met();
                }
                return Some(lookup);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.timeout),
        };
        self.metrics.read_from_database(DatabaseOutcome::Failed);
        if self.retry_at.lock().replace(Instant::now() + RETRY_EVERY).is_none() {
            tracing::warn!(error = failure, "the database failed; records are asked of the authority");
            self.remark
                .unmet(format!("the database failed, so records are asked of the authority: {failure}"));
        }
        None
    }
}
