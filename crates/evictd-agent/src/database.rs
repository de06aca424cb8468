//! Records read from the home database or a replica of it, beside the authority (R8, R10).
//!
//! A database's own read proves nothing: it may be a replica that lags, or a primary that was demoted and
//! doesn't know. So what it says counts only while the lease vouches for it, and only where it meets the floors;
//! the lease is always the authority's. Whatever fails here is asked of the authority instead.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;
use evictd_core::time::LeaseTime;
use evictd_ops::readiness::Condition;

use crate::metrics::{DatabaseOutcome, Metrics};
use crate::origin::Loaded;

/// A database that holds the records, primary or replica.
#[async_trait]
pub trait Database: Debug + Send + Sync {
    /// What `hash` stands for and how new that is, both read in one snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, Box<dyn std::error::Error + Send + Sync>>;
}

/// A [`Database`] that may fail.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) database: Arc<dyn Database>,
    /// After which silence the authority is asked instead.
    pub(crate) timeout: Duration,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) remark: Condition,
    pub(crate) failing: AtomicBool,
}

impl Replica {
    /// What the database says of `hash`, if it says anything. It vouches for nothing: the record is as old as the
    /// lease is.
    pub(crate) async fn lookup(&self, hash: KeyHash) -> Option<Loaded> {
        let answer = tokio::time::timeout(self.timeout, self.database.lookup(hash)).await;
        let failure = match answer {
            Ok(Ok(lookup)) => {
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("the database answers again");
                    self.remark.met();
                }
                return Some(Loaded { lookup, read_at: LeaseTime::default() });
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {:?}", self.timeout),
        };
        self.metrics.read_from_database(DatabaseOutcome::Failed);
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(error = failure, "the database failed; records are asked of the authority");
            self.remark
                .unmet(format!("the database failed, so records are asked of the authority: {failure}"));
        }
        None
    }
}
