//! Gives committed rows their positions and sends them on the live feed; sends the end of the log once a second.
//!
//! One mechanism serves changes of the API, which wake the sequencer at once, and those made outside it, which the store
//! signals or polling finds (R1). What can't be sent is not kept here: agents request it, and the store has it.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::rules::Rule;
use evictd_ops::log_limit;
use evictd_ops::readiness::Condition;
use evictd_ops::time::every;
use evictd_store::log::StoreFiles;
use evictd_store::{LogStore, StoreError};
use tokio::time::{Instant, Interval};
use tokio_util::sync::CancellationToken;

use crate::bus::Bus;
use crate::config::SequencerConfig;
use crate::log_output::LogOutput;
use crate::metrics::PublisherMetrics;
use crate::shared::Shared;

/// Rows numbered in one transaction.
const BATCH: usize = 1024;

/// How often triggers and backlog are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// A larger write-ahead log causes a warning. With the store's own readers it stays below a quarter of this.
const WRITE_AHEAD_LOG_MAX: u64 = 64 << 20;

/// The triggers are checked at every 60th check (R3), and at each one while they aren't trusted.
const TRIGGER_CHECK_EVERY: u64 = 60;

pub(crate) struct Sequencer {
    pub(crate) config: SequencerConfig,
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) bus: Bus,
    pub(crate) output: LogOutput,
    pub(crate) condition: Condition,
    pub(crate) triggers: Condition,
    /// Met unless the store's write-ahead log grows.
    pub(crate) files: Condition,
    pub(crate) shared: Shared,
}

impl Sequencer {
    /// Numbers until `shutdown`, and once more then: what was committed before is sent.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut poll = every(self.config.poll_interval.into());
        let mut tick = every(self.config.tick_interval.into());
        let mut check = every(CHECK_INTERVAL);
        let mut checks = 0_u64;
        let mut version = None;
        let mut healthy = StoreCondition::default();
        let mut missing = false;
        let mut trusted = self.check_triggers(&mut missing).await;
        let mut notified = self.store.change_notified();
        loop {
            // Ticks and checks come before rows: a steady load of changes must not starve them.
            let (need, done) = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.shared.wake.tick.notified() => (StoreNeed::Reads, self.tick().await),
                () = self.shared.wake.unlogged.notified() => {
                    self.distrust_triggers();
                    (trusted, missing) = (false, true);
                    continue;
                }
                () = self.shared.wake.schema.notified() => {
                    trusted = self.check_triggers(&mut missing).await;
                    continue;
                }
                _ = tick.tick() => (StoreNeed::Reads, self.tick().await),
                _ = check.tick() => {
                    checks += 1;
                    if !trusted || checks.is_multiple_of(TRIGGER_CHECK_EVERY) {
                        trusted = self.check_triggers(&mut missing).await;
                    }
                    (StoreNeed::Reads, self.check().await)
                }
                _ = poll.tick() => (StoreNeed::Writes, self.number_if_changed(&mut version, &mut poll).await),
                () = self.shared.wake.rows.notified() => (StoreNeed::Writes, self.number().await),
                () = &mut notified => {
                    // Subscribed again before it numbers: a commit meanwhile is signaled.
                    notified = self.store.change_notified();
                    (StoreNeed::Writes, self.number().await)
                }
            };
            healthy.note(need, done, &self.condition, &self.shared.metrics);
        }
        healthy.note(StoreNeed::Writes, self.number().await, &self.condition, &self.shared.metrics);
        if self.store.is_exclusive() {
            self.output.end().await;
        }
        self.bus.flush().await;
    }

    async fn number(&self) -> Result<(), StoreError> {
        loop {
            let before = self.shared.head.current();
            let numbered = self.store.number(BATCH).await?;
            self.output.numbered(before, &numbered).await;
            if numbered.rows.len() < BATCH {
                return Ok(());
            }
        }
    }

    async fn number_if_changed(&self, last: &mut Option<i64>, poll: &mut Interval) -> Result<(), StoreError> {
        // While idle it writes nothing, and wouldn't notice that it can't.
        self.store.writable()?;
        let began = Instant::now();
        let version = self.store.version().await?;
        poll.reset_after(rest_after(began.elapsed(), self.config.poll_interval.into()));
        if *last != Some(version) {
            self.number().await?;
            // Only now: a failed attempt must be repeated. Numbering changes the version once more, which costs one
            // idle look.
            *last = Some(version);
        }
        Ok(())
    }

    async fn tick(&self) -> Result<(), StoreError> {
        let before = self.shared.head.current();
        self.output.tick(before, &self.store.head().await?).await;
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        let backlog = self.store.backlog().await?;
        self.shared.metrics.backlog(backlog);
        if let Some(files) = self.store.files() {
            self.shared.metrics.store_files(files);
            note_files(files, &self.files);
        }
        if self.store.writable().is_err() {
            // Only a write shows that it can be written to again, and there may be no other.
            self.shared.rounds.request();
        }
        Ok(())
    }

    /// Triggers that were off for a moment are in place again when they are checked. A change that they let through shows
    /// that they were off.
    fn distrust_triggers(&self) {
        self.shared.invariants.violated(Rule::R3, "a change got no row in the log, and was undone");
        self.triggers.unmet("another check of the home store's triggers, which left a change out of the log");
    }

    /// Returns whether the triggers are to be trusted. They have a condition of their own, because numbering succeeds
    /// without triggers. A trigger that goes `missing` is a violation; one that stays missing is no further one.
    async fn check_triggers(&self, missing: &mut bool) -> bool {
        let Err(error) = self.store.check_triggers().await else {
            *missing = false;
            self.triggers.met();
            return true;
        };
        let is_fault = matches!(error, StoreError::TriggerMissing { .. } | StoreError::ForeignObject { .. });
        if is_fault && !std::mem::replace(missing, true) {
            self.shared.invariants.violated(Rule::R3, &error);
        }
        self.shared.metrics.store_failed(&error);
        self.triggers.unmet(format!("the home store's triggers: {error}"));
        false
    }
}

/// Warns of a write-ahead log that an old reader keeps from being used again.
fn note_files(files: StoreFiles, condition: &Condition) {
    if files.write_ahead_log <= WRITE_AHEAD_LOG_MAX {
        return condition.met();
    }
    let size = files.write_ahead_log >> 20;
    condition.unmet(format!(
        "the home store's write-ahead log to shrink from {size} MiB: a transaction of another process has been open for \
         long, or a bulk change was made at once; end that transaction (fuser lists the processes that have the file open)"
    ));
}

/// What a step needs of the store. Reads and writes fail separately: a full disk can be read.
#[derive(Clone, Copy)]
enum StoreNeed {
    Reads = 0,
    Writes = 1,
}

/// Logs failures and their end, and keeps readiness.
#[derive(Default)]
struct StoreCondition {
    failing: [bool; 2],
}

impl StoreCondition {
    fn note(
        &mut self,
        need: StoreNeed,
        done: Result<(), StoreError>,
        condition: &Condition,
        metrics: &PublisherMetrics,
    ) {
        let was_failing = std::mem::replace(&mut self.failing[need as usize], done.is_err());
        match done {
            Ok(()) if self.failing == [false, false] => {
                if was_failing && log_limit!(5, "").is_some() {
                    let unlogged_failures = metrics.store_works_again().field();
                    tracing::info!(unlogged_failures, "home store works again");
                }
                condition.met();
            }
            Ok(()) => {}
            Err(error) => {
                metrics.store_failed(&error);
                condition.unmet(format!("the home store: {error}"));
            }
        }
    }
}

/// Returns how long to wait until the next look. A look is cheap, unless a transaction holds an old snapshot of the
/// database; then looking takes a twentieth of the time at most. It waits for five seconds at most, because a look also
/// finds that a store that failed works again.
fn rest_after(took: Duration, interval: Duration) -> Duration {
    (took * 20).min(Duration::from_secs(5)).max(interval)
}

#[cfg(test)]
mod tests {
    use evictd_ops::readiness::Readiness;

    use super::*;

    #[test]
    fn large_write_ahead_log_is_a_warning() {
        let readiness = Readiness::new();
        let condition = readiness.warning("store_files");
        let files = |mib: u64| StoreFiles { database: 1 << 30, write_ahead_log: mib << 20 };
        for (mib, warnings) in [(16, 0), (64, 0), (206, 1), (3, 0)] {
            note_files(files(mib), &condition);
            let shown = readiness.warnings();
            assert_eq!(shown.len(), warnings, "{shown:?}");
            assert!(shown.iter().all(|warning| warning.detail.contains("206 MiB")), "{shown:?}");
        }
        assert!(readiness.is_ready());
    }
}
