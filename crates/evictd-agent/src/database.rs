//! Records read from the home database or a replica of it, before the authority (R8, R10).
//!
//! A database's own read proves nothing: a replica may lag, and a primary may have been demoted without noticing. So a
//! read counts only during a lease, which always comes from the authority, and only if it meets the floors. The database
//! may also be another store: a standby promoted by mistake, or a copy with a publisher of its own. So a read counts
//! only if its log ends with a position and a token that this agent received from home (R15). Every other read is
//! repeated at the authority.

use std::error::Error;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use evictd_core::follower::LoadSource;
use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;
use evictd_core::time::LeaseTime;
use evictd_ops::logging::with_causes;
use evictd_ops::readiness::Condition;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics::{AgentMetrics, DatabaseOutcome};
use crate::origin::LoadedRecord;

/// A database that holds the records, primary or replica.
#[async_trait]
pub trait Database: Debug + Send + Sync {
    /// Returns the record behind `hash` and its position, both read in one snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, DatabaseError>;
}

/// The reason that a database returned no record.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// No record can be read now.
    #[error(transparent)]
    Unusable(Box<dyn Error + Send + Sync>),
    /// This record is invalid; others may be valid.
    #[error(transparent)]
    Record(Box<dyn Error + Send + Sync>),
}

/// The pause before a failed database is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// The hash of no key, for tries.
const NO_KEY: KeyHash = KeyHash([0; 32]);

/// Reads from a [`Database`] while it works.
///
/// After a failure no load queries it: a silent database would cost each load its timeout, and many loads at once all
/// their permits. [`DatabaseReader::retry_failures`] finds out when it works again.
#[derive(Clone, Debug)]
pub(crate) struct DatabaseReader(Arc<ReaderState>);

#[derive(Debug)]
struct ReaderState {
    database: Arc<dyn Database>,
    /// After this silence the authority is queried instead.
    timeout: Duration,
    metrics: Arc<AgentMetrics>,
    warning: Condition,
    has_failed: watch::Sender<bool>,
}

impl DatabaseReader {
    pub(crate) fn new(
        database: Arc<dyn Database>,
        timeout: Duration,
        metrics: Arc<AgentMetrics>,
        warning: Condition,
    ) -> Self {
        let has_failed = watch::Sender::new(false);
        Self(Arc::new(ReaderState { database, timeout, metrics, warning, has_failed }))
    }

    /// Returns the database's record for `hash`, if it works. The record is as fresh as the lease: the read itself
    /// proves nothing.
    pub(crate) async fn lookup(&self, hash: KeyHash) -> Option<LoadedRecord> {
        if *self.0.has_failed.borrow() {
            return None;
        }
        let lookup = self.0.query(hash).await?;
        let source = LoadSource::Database(lookup.token);
        Some(LoadedRecord { lookup, source, read_at: LeaseTime::default() })
    }

    /// Queries the database at once, so that a wrong password or a missing privilege shows before the first load, and
    /// repeatedly after a failure, also without loads. Runs until `shutdown`.
    pub(crate) async fn retry_failures(self, shutdown: CancellationToken) {
        let mut has_failed = self.0.has_failed.subscribe();
        let retries = async {
            loop {
                while self.0.query(NO_KEY).await.is_none() {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                // Never an error: this task holds the sender.
                drop(has_failed.wait_for(|failed| *failed).await);
                tokio::time::sleep(RETRY_EVERY).await;
            }
        };
        shutdown.run_until_cancelled(retries).await;
    }
}

impl ReaderState {
    async fn query(&self, hash: KeyHash) -> Option<Lookup> {
        let failure = match tokio::time::timeout(self.timeout, self.database.lookup(hash)).await {
            Ok(Ok(lookup)) => {
                if self.has_failed.send_replace(false) {
                    tracing::info!("database works again");
                }
                // Every time: a concurrent failure may have set the warning after the last one.
                self.warning.met();
                return Some(lookup);
            }
            Ok(Err(DatabaseError::Record(error))) => {
                // One invalid record must not send all loads to the authority.
                self.metrics.read_from_database(DatabaseOutcome::Failed);
                tracing::debug!(error, "invalid record in the database");
                return None;
            }
            Ok(Err(DatabaseError::Unusable(error))) => with_causes(&*error),
            Err(_) => format!("no answer within {:?}", self.timeout),
        };
        self.metrics.read_from_database(DatabaseOutcome::Failed);
        if !self.has_failed.send_replace(true) {
            tracing::warn!(error = failure, "database failed; loading records from the authority");
        }
        self.warning
            .unmet(format!("the database failed, so records are loaded from the authority: {failure}"));
        None
    }
}
