//! Gives committed rows their positions and sends them on the live feed; tells the head once a second.
//!
//! One mechanism for changes of the API, which wake it at once, and for those made past it, which the store
//! tells of or polling finds (R1). What can't be sent is not kept here: the log is in the store, and agents
//! ask.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::rules::Rule;
use evictd_ops::invariants::Invariants;
use evictd_ops::readiness::Condition;
use evictd_store::{LogStore, StoreError};
use tokio::sync::Notify;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::config::SequencerConfig;
use crate::live_feed::LiveFeed;
use crate::metrics::Metrics;
use crate::rounds::RoundWish;

/// Rows numbered in one transaction.
const BATCH: usize = 1024;

/// How often triggers and backlog are looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The triggers are checked every so many checks (R3), and at each one while they aren't to be trusted.
const TRIGGER_CHECK_EVERY: u64 = 60;

/// Tells the sequencer that there is work.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wake {
    rows: Arc<Notify>,
    tick: Arc<Notify>,
    unlogged: Arc<Notify>,
    schema: Arc<Notify>,
}

impl Wake {
    /// Something was committed.
    pub(crate) fn now(&self) {
        self.rows.notify_one();
    }

    /// The connection is back: tell the head without waiting for the second.
    pub(crate) fn tick(&self) {
        self.tick.notify_one();
    }

    /// A change got no row in the log, and was undone ([`StoreError::Unlogged`]).
    pub(crate) fn unlogged(&self) {
        self.unlogged.notify_one();
    }

    /// A round found another schema, or one that lets changes go past the log: the triggers are checked at once.
    pub(crate) fn schema_suspect(&self) {
        self.schema.notify_one();
    }
}

pub(crate) struct Sequencer {
    pub(crate) config: SequencerConfig,
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) feed: LiveFeed,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) wake: Wake,
    pub(crate) condition: Condition,
    pub(crate) triggers: Condition,
    pub(crate) rounds: RoundWish,
    pub(crate) invariants: Invariants,
}

impl Sequencer {
    /// Numbers until `shutdown`, and once more then: what was committed before is sent.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut poll = every(self.config.poll_interval.into());
        let mut tick = every(self.config.tick_interval.into());
        let mut check = every(CHECK_INTERVAL);
        let mut checks = 0_u64;
        let mut version = None;
        let mut healthy = Health::default();
        let mut missing = false;
        let mut trusted = self.check_triggers(&mut missing).await;
        let mut told = self.store.change_notified();
        loop {
            // What the clock asks for comes before the rows: a steady load of changes must not starve it.
            let (need, done) = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.wake.tick.notified() => (Need::Reads, self.tick().await),
                () = self.wake.unlogged.notified() => {
                    self.distrust_triggers();
                    (trusted, missing) = (false, true);
                    continue;
                }
                () = self.wake.schema.notified() => {
                    trusted = self.check_triggers(&mut missing).await;
                    continue;
                }
                _ = tick.tick() => (Need::Reads, self.tick().await),
                _ = check.tick() => {
                    checks += 1;
                    if !trusted || checks.is_multiple_of(TRIGGER_CHECK_EVERY) {
                        trusted = self.check_triggers(&mut missing).await;
                    }
                    (Need::Reads, self.check().await)
                }
                _ = poll.tick() => (Need::Writes, self.number_if_changed(&mut version, &mut poll).await),
                () = self.wake.rows.notified() => (Need::Writes, self.number().await),
                () = &mut told => {
                    // Listening again before looking: what is said meanwhile is heard.
                    told = self.store.change_notified();
                    (Need::Writes, self.number().await)
                }
            };
            healthy.note(need, done, &self.condition, &self.metrics);
        }
        healthy.note(Need::Writes, self.number().await, &self.condition, &self.metrics);
        if self.store.is_exclusive() {
            self.feed.end().await;
        }
        self.feed.bus.flush().await;
    }

    async fn number(&self) -> Result<(), StoreError> {
        loop {
            let known = self.feed.receipts.log_head();
            let numbered = self.store.number(BATCH).await?;
            self.feed.send(known, &numbered).await;
            if numbered.rows.len() < BATCH {
                return Ok(());
            }
        }
    }

    async fn number_if_changed(&self, last: &mut Option<i64>, poll: &mut Interval) -> Result<(), StoreError> {
        // Idle, it writes nothing, and wouldn't notice that it can't.
        self.store.writable()?;
        let began = Instant::now();
        let version = self.store.version().await?;
        poll.reset_after(rest_after(began.elapsed(), self.config.poll_interval.into()));
        if *last != Some(version) {
            self.number().await?;
            // Only now: a failed attempt must be repeated. Numbering changes the version once more, and
            // costs one idle look.
            *last = Some(version);
        }
        Ok(())
    }

    async fn tick(&self) -> Result<(), StoreError> {
        let known = self.feed.receipts.log_head();
        let head = self.store.head().await?;
        if head.at < known {
            tracing::warn!(head = %head.at, %known, "the home store is behind what it was");
            // Its server's history may tell why, and a round looks at it.
            self.rounds.want();
        }
        self.feed.tick(&head).await;
        Ok(())
    }

    async fn check(&self) -> Result<(), StoreError> {
        let backlog = self.store.backlog().await?;
        self.metrics.backlog(backlog);
        if self.store.writable().is_err() {
            // Only a write shows that it can be written to again, and perhaps nobody else tries.
            self.rounds.want();
        }
        Ok(())
    }

    /// Triggers that were off for a moment are in place again when they are looked at. What they let through then
    /// shows that they were.
    fn distrust_triggers(&self) {
        self.invariants.violated(Rule::R3, "a change got no row in the log, and was undone");
        self.triggers
            .unmet("the home store's triggers, which left a change out of the log: they are checked again");
    }

    /// Keeps a condition of its own: numbering goes on well without triggers, and must not hide it. Returns whether they
    /// are to be trusted; one that goes `missing` is a violation, and one that stays missing no further one.
    async fn check_triggers(&self, missing: &mut bool) -> bool {
        let Err(error) = self.store.check_triggers().await else {
            *missing = false;
            self.triggers.met();
            return true;
        };
        let is_fault = matches!(error, StoreError::TriggerMissing { .. } | StoreError::ForeignObject { .. });
        if is_fault && !std::mem::replace(missing, true) {
            self.invariants.violated(Rule::R3, &error);
        }
        self.metrics.store_failed(&error);
        self.triggers.unmet(format!("the home store's triggers: {error}"));
        false
    }
}

/// What a duty needs of the store. They fail apart: a full disk still reads well, and must not look well.
#[derive(Clone, Copy)]
enum Need {
    Reads = 0,
    Writes = 1,
}

/// Tells of failures and their end, and keeps readiness.
#[derive(Default)]
struct Health {
    failing: [bool; 2],
}

impl Health {
    fn note(&mut self, need: Need, done: Result<(), StoreError>, condition: &Condition, metrics: &Metrics) {
        let was_failing = std::mem::replace(&mut self.failing[need as usize], done.is_err());
        match done {
            Ok(()) if self.failing == [false, false] => {
                if was_failing {
                    tracing::info!(left_out = metrics.store_works_again(), "the home store works again");
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

/// How long to wait until the next look. One costs next to nothing, unless somebody holds an old snapshot of the
/// database; then looking takes a twentieth of the time and no more. Five seconds are the most: it also finds out that a
/// store that failed works again.
fn rest_after(took: Duration, interval: Duration) -> Duration {
    (took * 20).min(Duration::from_secs(5)).max(interval)
}

fn every(interval: Duration) -> Interval {
    let mut interval = tokio::time::interval(interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
