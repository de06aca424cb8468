//! Deletes old rows of the log, receipts and audit records.
//!
//! A little at a time and with pauses, in a task of its own: a probe round and numbering wait for one small transaction at
//! most. The store decides how old a row is, by the clock that dated it: a publisher's own may be years ahead. No guarantee
//! rests on deleted rows. An agent that requests one is refused, and flushes (R5). So a store's clock that is wrong deletes
//! too early or too late, and breaks neither G1 nor G2.

use std::sync::Arc;
use std::time::Duration;

use evictd_ops::time::every;
use evictd_store::audit::{Purge, Purged};
use evictd_store::{ChangeStore, StoreError};
use tokio_util::sync::CancellationToken;

use crate::config::{Keep, RetentionConfig};
use crate::metrics::PublisherMetrics;

/// How often old rows are looked for.
const SWEEP_EVERY: Duration = Duration::from_mins(5);

/// Rows of each kind that are deleted in one transaction: some milliseconds of the store's time.
const BATCH: usize = 512;

/// The pause between two transactions. Together they delete more than a store of one writer takes in.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) struct Retention {
    pub(crate) config: RetentionConfig,
    pub(crate) store: Arc<dyn ChangeStore>,
    pub(crate) metrics: Arc<PublisherMetrics>,
}

impl Retention {
    /// Sweeps until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut sweep = every(SWEEP_EVERY);
        let sweeps = async {
            loop {
                sweep.tick().await;
                if let Err(error) = self.sweep().await {
                    // The next sweep goes on from here.
                    self.metrics.store_failed(&error);
                }
            }
        };
        // The store finishes or undoes a transaction that is under way.
        shutdown.run_until_cancelled(sweeps).await;
    }

    /// Deletes all rows that are old enough.
    async fn sweep(&self) -> Result<(), StoreError> {
        let RetentionConfig { log, receipts, audit } = &self.config;
        let purge = Purge {
            log: **log,
            receipts: **receipts,
            audit: match audit {
                Keep::Forever => None,
                Keep::For(time) => Some(**time),
            },
            limit: BATCH,
        };
        let mut whole = Purged::default();
        loop {
            let purged = self.store.purge(purge).await?;
            self.metrics.purged(purged);
            whole.log += purged.log;
            whole.receipts += purged.receipts;
            whole.audit += purged.audit;
            if [purged.log, purged.receipts, purged.audit].into_iter().all(|rows| rows < BATCH as u64) {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        if whole != Purged::default() {
            tracing::info!(
                log = whole.log,
                receipts = whole.receipts,
                audit = whole.audit,
                "deleted old rows"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
