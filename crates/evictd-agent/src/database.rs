//! Records read from the home database or a replica of it, beside the authority (R8, R10).
//!
//! A database's own read proves nothing: it may be a replica that lags, or a primary that was demoted and
//! doesn't know. So what it says counts only while the lease vouches for it, and only where it meets the floors;
//! the lease is always the authority's. It may also be another store: a standby promoted by mistake, or a copy with a
//! publisher of its own. So a read counts only if its log ends with a position and a token that this agent got from
//! home (R15). Whatever fails here is asked of the authority instead.

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

use crate::metrics::{DatabaseOutcome, Metrics};
use crate::origin::Loaded;

/// A database that holds the records, primary or replica.
#[async_trait]
pub trait Database: Debug + Send + Sync {
    /// What `hash` stands for and how new that is, both read in one snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, DatabaseError>;
}

/// Why a database didn't tell.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// It can't be used now, for whatever record.
    #[error(transparent)]
    Unusable(Box<dyn Error + Send + Sync>),
    /// This record makes no sense; others may.
    #[error(transparent)]
    Record(Box<dyn Error + Send + Sync>),
}

/// The pause before a database that failed is asked again.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// What a trial asks for: nobody's key.
const NOBODY: KeyHash = KeyHash([0; 32]);

/// A [`Database`] that may fail.
///
/// While it does, no load asks it: one that is silent would cost each load its time-out, and many loads at once all
/// their places. [`Replica::keep_trying`] finds out when it works again.
#[derive(Clone, Debug)]
pub(crate) struct Replica(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    database: Arc<dyn Database>,
    /// After which silence the authority is asked instead.
    timeout: Duration,
    metrics: Arc<Metrics>,
    remark: Condition,
    fails: watch::Sender<bool>,
}

impl Replica {
    pub(crate) fn new(
        database: Arc<dyn Database>,
        timeout: Duration,
        metrics: Arc<Metrics>,
        remark: Condition,
    ) -> Self {
        Self(Arc::new(Shared { database, timeout, metrics, remark, fails: watch::Sender::new(false) }))
    }

    /// What the database says of `hash`, if it says anything. It vouches for nothing: the record is as old as the
    /// lease is.
    pub(crate) async fn lookup(&self, hash: KeyHash) -> Option<Loaded> {
        if *self.0.fails.borrow() {
            return None;
        }
        let lookup = self.0.ask(hash).await?;
        let source = LoadSource::Database(lookup.token);
        Some(Loaded { lookup, source, read_at: LeaseTime::default() })
    }

    /// Asks the database at once, so that a wrong password or a missing right shows before anybody needs it, and again
    /// and again while it fails, whether there are loads or not. Until `shutdown`.
    pub(crate) async fn keep_trying(self, shutdown: CancellationToken) {
        let mut fails = self.0.fails.subscribe();
        let trying = async {
            loop {
                while self.0.ask(NOBODY).await.is_none() {
                    tokio::time::sleep(RETRY_EVERY).await;
                }
                // Never the end: this task holds the sender.
                drop(fails.wait_for(|fails| *fails).await);
                tokio::time::sleep(RETRY_EVERY).await;
            }
        };
        shutdown.run_until_cancelled(trying).await;
    }
}

impl Shared {
    async fn ask(&self, hash: KeyHash) -> Option<Lookup> {
        let failure = match tokio::time::timeout(self.timeout, self.database.lookup(hash)).await {
            Ok(Ok(lookup)) => {
                if self.fails.send_replace(false) {
                    tracing::info!("the database answers again");
                }
                // Each time: a failure that was noticed beside it may have made its remark only now.
                self.remark.met();
                return Some(lookup);
            }
            Ok(Err(DatabaseError::Record(error))) => {
                // One key that somebody has written nonsense for doesn't send all loads home.
                self.metrics.read_from_database(DatabaseOutcome::Failed);
                tracing::debug!(error, "the database has a record that can't be read");
                return None;
            }
            Ok(Err(DatabaseError::Unusable(error))) => with_causes(&*error),
            Err(_) => format!("no answer within {:?}", self.timeout),
        };
        self.metrics.read_from_database(DatabaseOutcome::Failed);
        if !self.fails.send_replace(true) {
            tracing::warn!(error = failure, "the database failed; records are asked of the authority");
        }
        self.remark.unmet(format!("the database failed, so records are asked of the authority: {failure}"));
        None
    }
}
