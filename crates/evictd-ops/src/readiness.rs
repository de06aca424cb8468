//! What a process still waits for before it should get traffic, by name.

use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The conditions of one daemon. It is ready when all of them are met; without any it is ready.
///
/// Clones share the conditions.
#[derive(Clone, Default, Debug)]
pub struct Readiness {
    entries: Arc<Mutex<Vec<Entry>>>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Entry {
    name: &'static str,
    detail: String,
    met: bool,
    /// Not a remark: the daemon waits for it.
    needed: bool,
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
        self.add(Entry { name, detail: waiting_for.into(), met: false, needed: true })
    }

    /// Adds a condition that should hold, but that no traffic has to wait for: when it isn't met, `/readyz`
    /// remarks on it. It starts met.
    pub fn remark(&self, name: &'static str) -> Condition {
        self.add(Entry { name, detail: String::new(), met: true, needed: false })
    }

    fn add(&self, entry: Entry) -> Condition {
        let mut entries = self.entries.lock();
        entries.push(entry);
        Condition { readiness: self.clone(), index: entries.len() - 1 }
    }

    /// Whether all conditions are met.
    pub fn is_ready(&self) -> bool {
        self.entries.lock().iter().all(|entry| entry.met || !entry.needed)
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
        let entries = self.entries.lock();
        let unmet = entries.iter().filter(|entry| !entry.met && entry.needed == needed);
        unmet.map(|entry| Waiting { condition: entry.name, detail: entry.detail.clone() }).collect()
    }
}

impl Condition {
    /// The condition holds. Cheap: may be called at every heartbeat.
    pub fn met(&self) {
        let mut entries = self.readiness.entries.lock();
        let entry = &mut entries[self.index];
        if !std::mem::replace(&mut entry.met, true) {
            tracing::info!(condition = entry.name, "condition met");
            self.readiness.changed.notify_waiters();
        }
    }

    /// The condition doesn't hold (any more); `detail` says why, in words.
    pub fn unmet(&self, detail: impl Into<String>) {
        let detail = detail.into();
        if self.end(&detail) {
            let entries = self.readiness.entries.lock();
            let Entry { name, needed, .. } = &entries[self.index];
            let effect = if *needed { "not ready" } else { "still ready" };
            tracing::warn!(condition = *name, detail, "condition lost: {effect}");
        }
    }

    /// As [`Condition::unmet`] without a word: it was asked for. Tells whether the condition held before.
    fn end(&self, detail: impl Into<String>) -> bool {
        let mut entries = self.readiness.entries.lock();
        let entry = &mut entries[self.index];
        entry.detail = detail.into();
        std::mem::replace(&mut entry.met, false)
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
