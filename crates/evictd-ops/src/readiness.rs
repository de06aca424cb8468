//! What a process still waits for before it should get traffic, by name.
//!
//! What a daemon needs to begin and what it needs to go on differ: an agent that has lost NATS answers for as long as
//! its lease runs, and taking it out of service would make a region's outage of what its clients wouldn't notice. So
//! there are three kinds: needed always ([`Readiness::condition`]), needed until the daemon has settled
//! ([`Readiness::condition_at_start`]), and never needed, but remarked on ([`Readiness::remark`]).

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a daemon must have been ready at a stretch until it has settled: in this time it has done everything once
/// that it does every second, so that a permission which it lacks has shown.
pub const SETTLES_AFTER: Duration = Duration::from_secs(3);

/// The conditions of one daemon. It is ready when all of them are met that it needs; without any it is ready.
///
/// Clones share the conditions.
#[derive(Clone, Default, Debug)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

#[derive(Default, Debug)]
struct State {
    entries: Vec<Entry>,
    /// Since when all conditions are met.
    ready_since: Option<Instant>,
    /// For good: a daemon starts only once.
    settled: bool,
}

#[derive(Debug)]
struct Entry {
    name: &'static str,
    detail: String,
    met: bool,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Needed,
    NeededAtStart,
    Remark,
}

impl State {
    fn needs(&self, entry: &Entry) -> bool {
        match entry.kind {
            Kind::Needed => true,
            Kind::NeededAtStart => !self.settled,
            Kind::Remark => false,
        }
    }

    fn is_ready(&self) -> bool {
        self.entries.iter().all(|entry| entry.met || !self.needs(entry))
    }

    /// Changes a condition, and keeps the time of being ready. Returns whether it was met before.
    fn set(&mut self, index: usize, met: bool) -> bool {
        let now = Instant::now();
        // As it stood until now: who becomes unready at this very change may have settled before it.
        self.settled |= self.ready_since.is_some_and(|since| now.duration_since(since) >= SETTLES_AFTER);
        let was_met = std::mem::replace(&mut self.entries[index].met, met);
        self.ready_since = if self.is_ready() { self.ready_since.or(Some(now)) } else { None };
        was_met
    }
}

/// One condition, held by whoever can tell whether it is met. It starts unmet.
///
/// Dropping it changes nothing: a part that died without saying so must not turn the daemon ready.
#[derive(Clone, Debug)]
pub struct Condition {
    readiness: Readiness,
    index: usize,
}

/// A condition that isn't met, as `/readyz` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Waiting {
    /// Which condition.
    pub condition: &'static str,
    /// What it waits for, in words.
    pub detail: String,
}

impl Readiness {
    /// Nothing to wait for yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition that isn't met; `waiting_for` says in words what is missing.
    #[must_use = "a condition that nobody meets keeps the daemon unready for ever"]
    pub fn condition(&self, name: &'static str, waiting_for: impl Into<String>) -> Condition {
        self.add(Entry { name, detail: waiting_for.into(), met: false, kind: Kind::Needed })
    }

    /// As [`Readiness::condition`], until the daemon has been ready for [`SETTLES_AFTER`] at a stretch. From then on it
    /// is as [`Readiness::remark`] makes them: what is lost now is told, and the daemon goes on without it.
    #[must_use = "a condition that nobody meets keeps the daemon unready for ever"]
    pub fn condition_at_start(&self, name: &'static str, waiting_for: impl Into<String>) -> Condition {
        self.add(Entry { name, detail: waiting_for.into(), met: false, kind: Kind::NeededAtStart })
    }

    /// Adds a condition that should hold, but that no traffic has to wait for: when it isn't met, `/readyz`
    /// remarks on it. It starts met.
    pub fn remark(&self, name: &'static str) -> Condition {
        self.add(Entry { name, detail: String::new(), met: true, kind: Kind::Remark })
    }

    fn add(&self, entry: Entry) -> Condition {
        let mut state = self.state.lock();
        if !entry.met {
            state.ready_since = None;
        }
        state.entries.push(entry);
        Condition { readiness: self.clone(), index: state.entries.len() - 1 }
    }

    /// Whether all conditions are met that the daemon needs.
    pub fn is_ready(&self) -> bool {
        self.state.lock().is_ready()
    }

    /// Waits until all conditions are met at once.
    pub async fn ready(&self) {
        loop {
            // Listen before looking: a condition may be met in between.
            let changed = self.changed.notified();
            if self.is_ready() {
                return;
            }
            changed.await;
        }
    }

    /// Turns the daemon unready when `shutdown` is cancelled, so that it gets no new traffic while it drains.
    pub fn unready_at(&self, shutdown: CancellationToken) -> impl Future<Output = ()> + Send + 'static {
        let running = self.condition("running", "its start");
        running.met();
        async move {
            shutdown.cancelled().await;
            running.end("nothing any more: it is shutting down");
        }
    }

    /// The conditions that aren't met, in the order in which they were added.
    pub fn waiting_for(&self) -> Vec<Waiting> {
        self.unmet(true)
    }

    /// What isn't as it should be, though the daemon doesn't wait for it.
    pub fn remarks(&self) -> Vec<Waiting> {
        self.unmet(false)
    }

    fn unmet(&self, needed: bool) -> Vec<Waiting> {
        let state = self.state.lock();
        let unmet = state.entries.iter().filter(|entry| !entry.met && state.needs(entry) == needed);
        unmet.map(|entry| Waiting { condition: entry.name, detail: entry.detail.clone() }).collect()
    }
}

impl Condition {
    /// The condition holds. Cheap: may be called at every heartbeat.
    pub fn met(&self) {
        if let Some(condition) = self.begin() {
            tracing::info!(condition, "condition met");
        }
    }

    /// There is nothing to remark on, for whoever would know can't tell. As [`Condition::met`], without a word.
    pub fn moot(&self) {
        self.begin();
    }

    /// The condition doesn't hold (any more); `detail` says why, in words.
    pub fn unmet(&self, detail: impl Into<String>) {
        let detail = detail.into();
        if self.end(&detail) {
            let state = self.readiness.state.lock();
            let effect = if state.is_ready() { "still ready" } else { "not ready" };
            tracing::warn!(condition = state.entries[self.index].name, detail, "condition lost: {effect}");
        }
    }

    /// The condition's name, if it didn't hold before.
    fn begin(&self) -> Option<&'static str> {
        let mut state = self.readiness.state.lock();
        if state.set(self.index, true) {
            return None;
        }
        self.readiness.changed.notify_waiters();
        Some(state.entries[self.index].name)
    }

    /// As [`Condition::unmet`] without a word: it was asked for. Tells whether the condition held before.
    fn end(&self, detail: impl Into<String>) -> bool {
        let mut state = self.readiness.state.lock();
        state.entries[self.index].detail = detail.into();
        state.set(self.index, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_ready_when_every_condition_is_met() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let bus = readiness.condition("bus", "a connection to NATS");
        let lease = readiness.condition("lease", "the first proof");
        bus.met();
        assert!(!readiness.is_ready());
        assert_eq!(
            readiness.waiting_for(),
            [Waiting { condition: "lease", detail: "the first proof".to_owned() }]
        );
        lease.met();
        assert!(readiness.is_ready());
        assert_eq!(readiness.waiting_for(), []);
    }

    #[test]
    fn a_condition_can_be_lost_and_says_why() {
        let readiness = Readiness::new();
        let bus = readiness.condition("bus", "a connection to NATS");
        bus.met();
        bus.unmet("disconnected");
        assert_eq!(
            readiness.waiting_for(),
            [Waiting { condition: "bus", detail: "disconnected".to_owned() }]
        );
    }

    #[test]
    fn a_remark_is_told_and_nobody_waits_for_it() {
        let readiness = Readiness::new();
        let feed = readiness.remark("feed");
        assert_eq!(readiness.remarks(), []);
        feed.unmet("silent");
        assert!(readiness.is_ready());
        assert_eq!(readiness.waiting_for(), []);
        assert_eq!(readiness.remarks(), [Waiting { condition: "feed", detail: "silent".to_owned() }]);
        feed.met();
        assert_eq!(readiness.remarks(), []);
    }

    /// Waits until the daemon has settled, if nothing happens meanwhile.
    async fn settle() {
        tokio::time::advance(SETTLES_AFTER).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_needed_at_the_start_is_only_remarked_on_later() {
        let readiness = Readiness::new();
        let nats = readiness.condition_at_start("nats", "a connection");
        let lease = readiness.condition("lease", "a proof");
        assert_eq!(readiness.waiting_for()[0].condition, "nats");
        nats.met();
        lease.met();
        settle().await;
        nats.unmet("lost");
        assert!(readiness.is_ready());
        assert_eq!(readiness.remarks(), [Waiting { condition: "nats", detail: "lost".to_owned() }]);
        lease.unmet("too old");
        assert_eq!(readiness.waiting_for(), [Waiting { condition: "lease", detail: "too old".to_owned() }]);
        lease.met();
        assert!(readiness.is_ready(), "it starts only once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_was_not_ready_for_long_enough_has_not_settled() {
        let readiness = Readiness::new();
        let nats = readiness.condition_at_start("nats", "a connection");
        let lease = readiness.condition("lease", "a proof");
        // Long, but not ready.
        nats.met();
        settle().await;
        lease.met();
        for _ in 0..5 {
            // It seems well after each connection, until what is forbidden is tried.
            tokio::time::advance(SETTLES_AFTER / 2).await;
            nats.unmet("permissions");
            assert!(!readiness.is_ready());
            tokio::time::advance(SETTLES_AFTER / 2).await;
            nats.met();
            assert!(readiness.is_ready());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_whose_conditions_are_not_all_known_yet_does_not_settle() {
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
    fn what_is_moot_is_not_remarked_on() {
        let readiness = Readiness::new();
        let feed = readiness.remark("feed");
        feed.unmet("silent");
        feed.moot();
        assert_eq!(readiness.remarks(), []);
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

    #[tokio::test]
    async fn a_shutdown_turns_it_unready() {
        let (readiness, shutdown) = (Readiness::new(), CancellationToken::new());
        let unready = readiness.unready_at(shutdown.clone());
        assert!(readiness.is_ready());
        shutdown.cancel();
        unready.await;
        assert_eq!(readiness.waiting_for()[0].condition, "running");
    }

    #[test]
    fn a_dropped_condition_stays_as_it_was() {
        let readiness = Readiness::new();
        drop(readiness.condition("triggers", "the check of the store's triggers"));
        assert!(!readiness.is_ready());
    }
}
