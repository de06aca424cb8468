//! Whether this publisher may vouch for its store now, as all see it who vouch (R15).

use std::sync::Arc;
use std::time::Duration;

use evictd_core::history::Milestone;
use evictd_core::receipts::ReceiptTracker;
#[cfg(test)]
use evictd_core::service::Connectivity;
use evictd_core::service::{Query, Service, Standing};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Shared by those who ask, and by [`crate::rivals`], which keeps it.
#[derive(Clone, Debug)]
pub(crate) struct Vouching {
    state: Arc<Mutex<State>>,
    standing: watch::Sender<Standing>,
}

#[derive(Debug)]
struct State {
    service: Service,
    /// Who presented the past that this store doesn't know.
    presented_by: Option<Box<str>>,
}

impl Vouching {
    /// A newcomer; a rival is gone when it didn't answer for `bound`.
    pub(crate) fn new(bound: Duration, is_shared: bool, nonce: u64) -> Self {
        let service = Service::new(bound, is_shared, nonce, clock::lease_now());
        let standing = watch::Sender::new(service.standing());
        Self { state: Arc::new(Mutex::new(State { service, presented_by: None })), standing }
    }

    /// The number of the first question of [`Vouching::serving`].
    #[cfg(test)]
    pub(crate) const FIRST_QUERY: u64 = 1;

    /// One that vouches for as long as its runtime lives.
    #[cfg(test)]
    pub(crate) fn serving() -> Self {
        let vouching = Self::new(Duration::from_secs(30), false, Self::FIRST_QUERY);
        if let Some(query) = vouching.with(|service, now| service.poll(Connectivity::Connected, now)) {
            vouching.with(|service, now| service.on_no_responders(query.nonce, now));
        }
        let beating = vouching.clone();
        tokio::spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_millis(100));
            loop {
                beat.tick().await;
                beating.with(|service, now| service.poll(Connectivity::Connected, now));
            }
        });
        vouching
    }

    /// Whether messages that vouch for something may be sent now.
    pub(crate) fn is_allowed(&self) -> bool {
        self.state.lock().service.may_vouch(clock::lease_now())
    }

    /// Holds receipts unless they may become final at `now`.
    pub(crate) fn rule(&self, tracker: &mut ReceiptTracker, now: LeaseTime) {
        tracker.apply_service(&self.state.lock().service, now);
    }

    /// Whether receipts may become final at `now`.
    pub(crate) fn may_finalize(&self, now: LeaseTime) -> bool {
        self.state.lock().service.may_finalize(now)
    }

    /// How this publisher stands.
    pub(crate) fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Tells when that changes.
    pub(crate) fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Why nothing is to be changed here, and no receipt final, if so: agents follow another history.
    pub(crate) fn refusal(&self) -> Option<String> {
        let state = self.state.lock();
        if let Some(rival) = state.service.rival() {
            let since = when(rival.since);
            return Some(format!(
                "another home store is active on this bus: store {}, incarnation {}, publisher {}, since {since}; stop \
                 one of them, or give each its own NATS account",
                rival.provenance.store, rival.provenance.incarnation, rival.publisher,
            ));
        }
        let seen = state.service.unknown_past()?;
        let agent = state.presented_by.as_deref().unwrap_or("an agent");
        Some(format!(
            "this home store is an older copy: {agent} has proved to have seen position {} of incarnation {}, which it \
             doesn't hold; put the newer store back, or run `evictd new-epoch` on this one to declare that it replaces \
             the other",
            seen.at, seen.provenance.incarnation,
        ))
    }

    /// An agent has proved a past that the store doesn't know.
    pub(crate) fn unknown_past(&self, seen: Milestone, agent: &str) {
        self.with(|service, _| service.on_unknown_past(seen));
        self.state.lock().presented_by = Some(agent.into());
    }

    /// The past that the store doesn't know.
    pub(crate) fn awaited_past(&self) -> Option<Milestone> {
        self.state.lock().service.unknown_past().copied()
    }

    /// It was cut off: whoever else came meanwhile must be asked.
    pub(crate) fn away(&self) {
        self.with(|service, _| service.mark_absent());
    }

    /// Changes the standing, or asks for something.
    pub(crate) fn with<T>(&self, step: impl FnOnce(&mut Service, LeaseTime) -> T) -> T {
        let mut state = self.state.lock();
        let done = step(&mut state.service, clock::lease_now());
        let now = state.service.standing();
        self.standing.send_if_modified(|standing| std::mem::replace(standing, now) != now);
        done
    }

    /// A question that something from another history gives reason for.
    pub(crate) fn foreign(&self) -> Option<Query> {
        self.with(Service::on_foreign)
    }
}

/// As people read it; microseconds if it is out of this world.
fn when(time: StoreTime) -> String {
    Timestamp::from_microsecond(time.0).map_or_else(|_| time.0.to_string(), |time| format!("{time:.0}"))
}
