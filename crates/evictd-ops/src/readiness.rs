//! The conditions under which a process should get traffic, by name.
//!
//! An agent that has lost NATS still answers while its lease runs. If it became unready then, a region would be out of
//! service although its clients would notice nothing. So there are three kinds of conditions: needed always
//! ([`Readiness::condition`]), needed until the daemon has settled ([`Readiness::condition_at_start`]), and never needed,
//! but worth a warning ([`Readiness::warning`]).

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::shutdown::Shutdown;

use crate::log_limit;

/// How long a daemon must have been ready without a break until it has settled: long enough that it has done once what
/// it does every second, so that a missing permission has shown.
pub const SETTLES_AFTER: Duration = Duration::from_secs(3);

/// The conditions of one daemon, which is ready when all that it needs are met.
///
/// Clones share the conditions.
#[derive(Clone, Default, Debug)]
pub struct Readiness {
    state: Arc<Mutex<ReadinessState>>,
    changed: Arc<Notify>,
}

#[derive(Default, Debug)]
struct ReadinessState {
    conditions: Vec<ConditionState>,
    /// Since when all conditions are met.
    ready_since: Option<Instant>,
    /// Never reset: a daemon starts only once.
    settled: bool,
}

#[derive(Debug)]
struct ConditionState {
    name: &'static str,
    detail: String,
    met: bool,
    requirement: Requirement,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Requirement {
    Always,
    AtStart,
    Never,
}

impl ReadinessState {
    fn needs(&self, entry: &ConditionState) -> bool {
        match entry.requirement {
            Requirement::Always => true,
            Requirement::AtStart => !self.settled,
            Requirement::Never => false,
        }
    }

    fn is_ready(&self) -> bool {
        self.conditions.iter().all(|entry| entry.met || !self.needs(entry))
    }

    /// Changes a condition, and updates since when all are met. Returns whether the condition was met before.
    fn set(&mut self, index: usize, met: bool) -> bool {
        let now = Instant::now();
        // Before the change: a daemon that becomes unready by it may have settled earlier.
        self.settled |= self.ready_since.is_some_and(|since| now.duration_since(since) >= SETTLES_AFTER);
        let was_met = std::mem::replace(&mut self.conditions[index].met, met);
        self.ready_since = if self.is_ready() { self.ready_since.or(Some(now)) } else { None };
        was_met
    }
}

/// The handle of one condition.
///
/// Dropping it changes nothing: a task that died must not make the daemon ready.
#[derive(Clone, Debug)]
pub struct Condition {
    readiness: Readiness,
    index: usize,
}

/// A condition that isn't met, as `/readyz` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct UnmetCondition {
    pub condition: &'static str,
    /// What is missing, in words.
    pub detail: String,
}

impl Readiness {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an unmet condition; `waiting_for` says in words what is missing.
    #[must_use = "a condition that is never met keeps the daemon unready for ever"]
    pub fn condition(&self, name: &'static str, waiting_for: impl Into<String>) -> Condition {
        self.add(name, waiting_for.into(), Requirement::Always)
    }

    /// As [`Readiness::condition`], until the daemon has been ready for [`SETTLES_AFTER`] without a break. From then on
    /// it is as of [`Readiness::warning`].
    #[must_use = "a condition that is never met keeps the daemon unready for ever"]
    pub fn condition_at_start(&self, name: &'static str, waiting_for: impl Into<String>) -> Condition {
        self.add(name, waiting_for.into(), Requirement::AtStart)
    }

    /// Adds a met condition that the daemon doesn't need: when it isn't met, `/readyz` shows a warning.
    pub fn warning(&self, name: &'static str) -> Condition {
        self.add(name, String::new(), Requirement::Never)
    }

    fn add(&self, name: &'static str, detail: String, requirement: Requirement) -> Condition {
        let mut state = self.state.lock();
        let met = requirement == Requirement::Never;
        if !met {
            state.ready_since = None;
        }
        state.conditions.push(ConditionState { name, detail, met, requirement });
        Condition { readiness: self.clone(), index: state.conditions.len() - 1 }
    }

    /// Whether all conditions that the daemon needs are met.
    pub fn is_ready(&self) -> bool {
        self.state.lock().is_ready()
    }

    /// Waits until all conditions are met at once.
    pub async fn ready(&self) {
        loop {
            // Subscribe before the check: a condition may be met in between.
            let changed = self.changed.notified();
            if self.is_ready() {
                return;
            }
            changed.await;
        }
    }

    /// Makes the daemon unready when its end is requested, and closes it `delay` later.
    pub fn lame_duck(
        &self,
        shutdown: Shutdown,
        delay: Duration,
    ) -> impl Future<Output = ()> + Send + 'static {
        let running = self.condition("running", "its start");
        running.met();
        async move {
            shutdown.requested.cancelled().await;
            running.end("nothing any more: it is draining, and shutting down");
            let lame_duck = shutdown.closing.run_until_cancelled(tokio::time::sleep(delay));
            if !delay.is_zero() && !shutdown.closing.is_cancelled() {
                tracing::info!(?delay, "draining: not ready, and still serving");
            }
            lame_duck.await;
            shutdown.closing.cancel();
        }
    }

    /// Returns the unmet conditions that the daemon needs, in the order in which they were added.
    pub fn waiting_for(&self) -> Vec<UnmetCondition> {
        self.unmet(true)
    }

    /// Returns the unmet conditions that the daemon doesn't need.
    pub fn warnings(&self) -> Vec<UnmetCondition> {
        self.unmet(false)
    }

    fn unmet(&self, needed: bool) -> Vec<UnmetCondition> {
        let state = self.state.lock();
        let unmet = state.conditions.iter().filter(|entry| !entry.met && state.needs(entry) == needed);
        unmet.map(|entry| UnmetCondition { condition: entry.name, detail: entry.detail.clone() }).collect()
    }
}

impl Condition {
    /// Marks the condition as met. Cheap enough for every heartbeat.
    pub fn met(&self) {
        if let Some(condition) = self.begin()
            && let Some(unlogged) = log_limit!(10, condition)
        {
            tracing::info!(condition, unlogged = unlogged.field(), "condition met");
        }
    }

    /// Marks the condition as met without logging it: it can't be judged now, so there is nothing to warn of.
    pub fn not_applicable(&self) {
        self.begin();
    }

    /// Marks the condition as unmet; `detail` says why, in words.
    pub fn unmet(&self, detail: impl Into<String>) {
        let detail = detail.into();
        if self.end(&detail) {
            let state = self.readiness.state.lock();
            let effect = if state.is_ready() { "still ready" } else { "not ready" };
            let condition = state.conditions[self.index].name;
            if let Some(unlogged) = log_limit!(10, condition) {
                tracing::warn!(condition, detail, unlogged = unlogged.field(), "condition lost: {effect}");
            }
        }
    }

    /// Changes whether the daemon needs the condition always, or only until it has settled.
    pub fn set_always_needed(&self, always: bool) {
        let mut state = self.readiness.state.lock();
        let requirement = if always { Requirement::Always } else { Requirement::AtStart };
        state.conditions[self.index].requirement = requirement;
        let met = state.conditions[self.index].met;
        state.set(self.index, met);
        drop(state);
        self.readiness.changed.notify_waiters();
    }

    /// Returns the condition's name if it was unmet before.
    fn begin(&self) -> Option<&'static str> {
        let mut state = self.readiness.state.lock();
        if state.set(self.index, true) {
            return None;
        }
        self.readiness.changed.notify_waiters();
        Some(state.conditions[self.index].name)
    }

    /// As [`Condition::unmet`], without logging it. Returns whether the condition was met before.
    fn end(&self, detail: impl Into<String>) -> bool {
        let mut state = self.readiness.state.lock();
        state.conditions[self.index].detail = detail.into();
        state.set(self.index, false)
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinHandle;
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[test]
    fn ready_when_every_condition_is_met() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let bus = readiness.condition("bus", "a connection to NATS");
        let lease = readiness.condition("lease", "the first proof");
        bus.met();
        assert!(!readiness.is_ready());
        assert_eq!(
            readiness.waiting_for(),
            [UnmetCondition { condition: "lease", detail: "the first proof".to_owned() }]
        );
        lease.met();
        assert!(readiness.is_ready());
        assert_eq!(readiness.waiting_for(), []);
    }

    #[test]
    fn lost_condition_says_why() {
        let readiness = Readiness::new();
        let bus = readiness.condition("bus", "a connection to NATS");
        bus.met();
        bus.unmet("disconnected");
        assert_eq!(
            readiness.waiting_for(),
            [UnmetCondition { condition: "bus", detail: "disconnected".to_owned() }]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn condition_can_become_one_of_the_start() {
        let readiness = Readiness::new();
        let lease = readiness.condition("lease", "the first proof");
        lease.met();
        tokio::time::advance(SETTLES_AFTER).await;
        lease.unmet("too old");
        assert!(!readiness.is_ready());
        lease.set_always_needed(false);
        assert!(readiness.is_ready());
        lease.set_always_needed(true);
        assert!(!readiness.is_ready());
    }

    #[test]
    fn warning_is_shown_and_keeps_ready() {
        let readiness = Readiness::new();
        let feed = readiness.warning("feed");
        assert_eq!(readiness.warnings(), []);
        feed.unmet("silent");
        assert!(readiness.is_ready());
        assert_eq!(readiness.waiting_for(), []);
        assert_eq!(readiness.warnings(), [UnmetCondition { condition: "feed", detail: "silent".to_owned() }]);
        feed.met();
        assert_eq!(readiness.warnings(), []);
    }

    /// Lets the time pass after which a daemon has settled.
    async fn settle() {
        tokio::time::advance(SETTLES_AFTER).await;
    }

    #[tokio::test(start_paused = true)]
    async fn condition_of_the_start_is_only_a_warning_later() {
        let readiness = Readiness::new();
        let nats = readiness.condition_at_start("nats", "a connection");
        let lease = readiness.condition("lease", "a proof");
        assert_eq!(readiness.waiting_for()[0].condition, "nats");
        nats.met();
        lease.met();
        settle().await;
        nats.unmet("lost");
        assert!(readiness.is_ready());
        assert_eq!(readiness.warnings(), [UnmetCondition { condition: "nats", detail: "lost".to_owned() }]);
        lease.unmet("too old");
        assert_eq!(
            readiness.waiting_for(),
            [UnmetCondition { condition: "lease", detail: "too old".to_owned() }]
        );
        lease.met();
        assert!(readiness.is_ready(), "it starts only once");
    }

    #[tokio::test(start_paused = true)]
    async fn daemon_that_was_ready_too_shortly_has_not_settled() {
        let readiness = Readiness::new();
        let nats = readiness.condition_at_start("nats", "a connection");
        let lease = readiness.condition("lease", "a proof");
        // Long enough, but not ready.
        nats.met();
        settle().await;
        lease.met();
        for _ in 0..5 {
            // It is ready after each connect, until a request lacks its permission.
            tokio::time::advance(SETTLES_AFTER / 2).await;
            nats.unmet("permissions");
            assert!(!readiness.is_ready());
            tokio::time::advance(SETTLES_AFTER / 2).await;
            nats.met();
            assert!(readiness.is_ready());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn late_condition_starts_the_settling_time_anew() {
        let readiness = Readiness::new();
        let nats = readiness.condition_at_start("nats", "a connection");
        nats.met();
        let lease = readiness.condition("lease", "a proof");
        settle().await;
        lease.met();
        nats.unmet("lost");
        assert!(!readiness.is_ready());
    }

    #[test]
    fn condition_that_isnt_applicable_is_no_warning() {
        let readiness = Readiness::new();
        let feed = readiness.warning("feed");
        feed.unmet("silent");
        feed.not_applicable();
        assert_eq!(readiness.warnings(), []);
    }

    #[tokio::test]
    async fn waiting_ends_when_the_last_condition_is_met() {
        let readiness = Readiness::new();
        let (bus, lease) = (readiness.condition("bus", "NATS"), readiness.condition("lease", "a proof"));
        bus.met();
        let waiting = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        lease.met();
        waiting.await.unwrap();
    }

    /// Spawns the lame-duck time, requests the end, and waits until the daemon is unready.
    async fn request_end(readiness: &Readiness, shutdown: &Shutdown, delay: u64) -> JoinHandle<()> {
        let lame_duck = tokio::spawn(readiness.lame_duck(shutdown.clone(), Duration::from_secs(delay)));
        assert!(readiness.is_ready());
        shutdown.requested.cancel();
        while readiness.is_ready() {
            tokio::task::yield_now().await;
        }
        assert!(readiness.waiting_for()[0].detail.contains("draining"), "{:?}", readiness.waiting_for());
        lame_duck
    }

    #[tokio::test(start_paused = true)]
    async fn lame_duck_is_unready_and_closes_after_the_delay() {
        for delay in [0, 5] {
            let (readiness, shutdown) = (Readiness::new(), Shutdown::after(CancellationToken::new()));
            let began = Instant::now();
            let lame_duck = request_end(&readiness, &shutdown, delay).await;
            shutdown.closing.cancelled().await;
            assert_eq!(began.elapsed().as_secs(), delay);
            lame_duck.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn failed_daemon_has_no_lame_duck_time() {
        let (readiness, shutdown) = (Readiness::new(), Shutdown::after(CancellationToken::new()));
        let began = Instant::now();
        let lame_duck = request_end(&readiness, &shutdown, 5).await;
        shutdown.close();
        lame_duck.await.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[test]
    fn dropped_condition_stays_unmet() {
        let readiness = Readiness::new();
        drop(readiness.condition("triggers", "the check of the store's triggers"));
        assert!(!readiness.is_ready());
    }
}
