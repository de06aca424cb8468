//! Whether this publisher may vouch for its store now (R15).

use std::sync::Arc;
use std::time::Duration;

use evictd_core::history::{Milestone, Provenance};
use evictd_core::receipts::ReceiptTracker;
#[cfg(test)]
use evictd_core::service::Connectivity;
use evictd_core::service::{Peer, Query, Service, Standing};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Kept by [`crate::rivals`], and shared by all parts that vouch.
#[derive(Clone, Debug)]
pub(crate) struct Vouching {
    state: Arc<Mutex<VouchingState>>,
    standing: watch::Sender<Standing>,
}

#[derive(Debug)]
struct VouchingState {
    service: Service,
    /// The agent that presented the past that this store lacks.
    presented_by: Option<Box<str>>,
}

impl Vouching {
    /// Makes a newcomer. A rival is gone when it hasn't answered for `bound`.
    pub(crate) fn new(bound: Duration, is_shared: bool, nonce: u64) -> Self {
        let service = Service::new(bound, is_shared, nonce, clock::lease_now());
        let standing = watch::Sender::new(service.standing());
        Self { state: Arc::new(Mutex::new(VouchingState { service, presented_by: None })), standing }
    }

    /// The number of the first query of [`Vouching::serving`].
    #[cfg(test)]
    pub(crate) const FIRST_QUERY: u64 = 1;

    /// Makes one that serves for as long as its runtime lives.
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

    /// Returns whether messages that vouch for something may be sent now.
    pub(crate) fn is_allowed(&self) -> bool {
        self.state.lock().service.may_vouch(clock::lease_now())
    }

    /// Holds receipts unless they may become final at `now`.
    pub(crate) fn apply_to(&self, tracker: &mut ReceiptTracker, now: LeaseTime) {
        tracker.apply_service(&self.state.lock().service, now);
    }

    /// Returns whether receipts may become final at `now`.
    pub(crate) fn may_finalize(&self, now: LeaseTime) -> bool {
        self.state.lock().service.may_finalize(now)
    }

    pub(crate) fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Signals each change of the standing.
    pub(crate) fn watch(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Returns why changes are refused here and no receipt becomes final, if that is so: agents follow another history.
    pub(crate) fn refusal(&self) -> Option<String> {
        let state = self.state.lock();
        if let Some(rival) = state.service.rival() {
            return Some(another_store("active", rival));
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

    /// Describes the rival that is silent for this publisher.
    pub(crate) fn silent_rival(&self) -> Option<String> {
        self.with(|service, now| {
            service.silent_rival(now).map(|rival| another_store(rival.standing.label(), rival))
        })
    }

    /// Notes that an agent has proved a past that the store lacks.
    pub(crate) fn unknown_past(&self, seen: Milestone, agent: &str) {
        self.with(|service, _| service.on_unknown_past(seen));
        self.state.lock().presented_by = Some(agent.into());
    }

    /// Returns the past that the store lacks.
    pub(crate) fn awaited_past(&self) -> Option<Milestone> {
        self.state.lock().service.unknown_past().copied()
    }

    /// Notes that the publisher was disconnected: others may have come meanwhile, and must be queried.
    pub(crate) fn away(&self) {
        self.with(|service, _| service.mark_absent());
    }

    /// Changes the standing, or makes a query.
    pub(crate) fn with<T>(&self, step: impl FnOnce(&mut Service, LeaseTime) -> T) -> T {
        let mut state = self.state.lock();
        let done = step(&mut state.service, clock::lease_now());
        let now = state.service.standing();
        self.standing.send_if_modified(|standing| std::mem::replace(standing, now) != now);
        done
    }

    /// Returns the query that a message of another history gives reason for.
    pub(crate) fn foreign(&self) -> Option<Query> {
        self.with(Service::on_foreign)
    }
}

/// Says what the operator has to do about `rival`.
fn another_store(state: &str, rival: &Peer) -> String {
    let Peer { publisher, provenance: Provenance { store, incarnation }, since, .. } = rival;
    format!(
        "another home store is {state} on this bus: store {store}, incarnation {incarnation}, publisher {publisher}, since \
         {}; stop one of them, or give each its own NATS account",
        when(*since),
    )
}

/// Formats a time for the operator, or in microseconds if the calendar doesn't reach so far.
fn when(time: StoreTime) -> String {
    Timestamp::from_microsecond(time.0).map_or_else(|_| time.0.to_string(), |time| format!("{time:.0}"))
}
