//! Other publishers on the bus, and the histories that they serve (R15).
//!
//! The rules are [`evictd_core::service`]. They are fed with a regular beat, the queries and answers of other publishers,
//! and the live feed. A query is answered after a durable round that began after it had arrived.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message, StatusCode};
use evictd_core::history::{Incarnation, Provenance, RoundToken};
use evictd_core::service::{Connectivity, Peer, Query, Service, Standing};
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::log_limit;
use evictd_ops::readiness::Condition;
use evictd_ops::time::every;
use evictd_store::{LogStore, StoreError};
use evictd_wire::live::{Live, LiveEvent};
use evictd_wire::publisher::{PublisherAnswer, PublisherInfo, PublisherQuery};
use evictd_wire::subject::{LIVE, PUBLISHERS, answered_nonce, publisher_answer, publisher_answers};
use futures_util::StreamExt;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::bus::{Bus, PublisherMessages};
use crate::shared::Shared;

/// How often the standing is updated: several times in what counts as an absence.
const BEAT: Duration = Duration::from_millis(250);

/// How often a publisher whose store lacks a past checks whether that was resolved.
const REREAD_EVERY: Duration = Duration::from_secs(1);

/// Queries that wait for a round; there are few publishers.
const QUERIES_WAITING_MAX: usize = 64;

/// Checks in the store that run at once.
const CHECKS_MAX: usize = 64;

/// Keeps this publisher's standing.
pub(crate) struct Rivals {
    pub(crate) id: u64,
    pub(crate) name: Box<str>,
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) bus: Bus,
    /// Met while this publisher serves.
    pub(crate) condition: Condition,
    /// Unmet while a publisher of another history is silent for this one.
    pub(crate) silent_rival: Condition,
    /// Whether rounds succeed.
    pub(crate) succeeding: watch::Receiver<bool>,
    /// Notified at each connection to NATS.
    pub(crate) connected: Arc<Notify>,
    pub(crate) shared: Shared,
}

/// What a check in this publisher's store showed of another publisher.
enum PeerFinding {
    /// It answered a query.
    Answer { nonce: u64, peer: Peer, is_same_store: bool },
    /// Its tick names a round that this store lacks.
    UnknownRound,
    /// Its tick names a round of this store.
    KnownRound,
}

struct RivalsTask {
    rivals: Arc<Rivals>,
    /// Queries of others, and when they arrived.
    waiting: Vec<(PublisherQuery, LeaseTime)>,
    checks: JoinSet<Result<PeerFinding, StoreError>>,
    reported: Option<Standing>,
    /// The store's incarnation when it was last read while yielding.
    incarnation: Option<Incarnation>,
    reread_at: LeaseTime,
}

impl Rivals {
    /// Runs until `shutdown`. This publisher vouches for nothing after that.
    pub(crate) async fn run(self, mut publishers: PublisherMessages, shutdown: CancellationToken) {
        let mut beat = every(BEAT);
        let mut fence = self.shared.fence.watch();
        let rivals = Arc::new(self);
        let mut task = RivalsTask {
            rivals: rivals.clone(),
            waiting: Vec::new(),
            checks: JoinSet::new(),
            reported: None,
            incarnation: None,
            reread_at: LeaseTime::default(),
        };
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = beat.tick() => task.beat().await,
                () = rivals.connected.notified() => {
                    rivals.shared.vouching.away();
                    task.beat().await;
                }
                Some(message) = publishers.queries.next() => task.on_query(&message).await,
                Some(message) = publishers.answers.next() => task.on_answer(&message),
                Some(message) = publishers.live.next() => task.on_live(&message).await,
                Ok(()) = fence.changed() => task.answer_waiting().await,
                Some(Ok(found)) = task.checks.join_next() => task.on_finding(found).await,
            }
            task.begin_alone().await;
            task.report();
        }
    }

    fn introduction(&self, round: Option<RoundToken>) -> PublisherInfo {
        let history = self.shared.history.history();
        let peer = Peer {
            publisher: self.name.clone(),
            provenance: history.provenance(),
            since: history.current().time,
            standing: self.shared.vouching.standing(),
        };
        PublisherInfo { id: self.id, peer, round }
    }

    async fn send(&self, query: Query) {
        let round = self.shared.fence.last().map(|(_, token)| token);
        let query = PublisherQuery::new(query, self.introduction(round));
        let reply = publisher_answer(self.id, query.nonce);
        self.bus.query(PUBLISHERS.to_owned(), reply, query.encode()).await;
    }

    /// Returns whether another publisher uses the same store: it serves the same history, and this publisher's own
    /// connection to the store shows its rounds.
    async fn is_same_store(
        &self,
        provenance: Provenance,
        round: Option<RoundToken>,
    ) -> Result<bool, StoreError> {
        // It may have begun an incarnation that this publisher hasn't read yet.
        self.shared.history.reread().await?;
        if provenance != self.shared.history.history().provenance() {
            return Ok(false);
        }
        match round {
            Some(round) => self.store.has_round_token(round).await,
            None => Ok(true),
        }
    }
}

impl RivalsTask {
    async fn beat(&mut self) {
        let Rivals { bus, succeeding, shared: Shared { vouching, .. }, .. } = &*self.rivals;
        let connectivity = match (bus.is_up(), *succeeding.borrow()) {
            (_, false) => Connectivity::Stalled,
            (false, true) => Connectivity::Disconnected,
            (true, true) => Connectivity::Connected,
        };
        if let Some(query) = vouching.with(|service, now| service.poll(connectivity, now)) {
            self.rivals.send(query).await;
        }
        self.check_awaited_past().await;
        self.note_yielding().await;
        self.report_silent_rival();
    }

    /// After this publisher has yielded for a bound, its store needs an operator's declaration before it may replace
    /// what agents have seen.
    async fn note_yielding(&mut self) {
        let now = clock::lease_now();
        let is_due = now.since(self.reread_at) >= REREAD_EVERY;
        if self.rivals.shared.vouching.standing() != Standing::Yielding || !is_due {
            return;
        }
        self.reread_at = now;
        if let Err(error) = self.try_note_yielding().await {
            self.rivals.shared.metrics.store_failed(&error);
        }
    }

    async fn try_note_yielding(&mut self) -> Result<(), StoreError> {
        let Shared { history, vouching, .. } = &self.rivals.shared;
        history.reread().await?;
        let current = history.history();
        let incarnation = current.provenance().incarnation;
        if self.incarnation.replace(incarnation) != Some(incarnation) {
            // Perhaps an operator has declared it, and has a bound to stop the rival.
            vouching.with(Service::restart_yielding);
        }
        let Some(rival) = vouching.with(|service, _| service.yielded_to().cloned()) else { return Ok(()) };
        if !current.supersedes() {
            return Ok(());
        }
        history.note_yielding(&rival).await?;
        tracing::warn!(
            rival = %rival.publisher,
            "yielded for a bound; stop the rival and run `evictd new-epoch` if this home store shall replace the other one"
        );
        Ok(())
    }

    /// Begins an incarnation if this publisher serves as soon as one has begun.
    async fn begin_alone(&self) {
        let Shared { history, vouching, metrics, .. } = &self.rivals.shared;
        if !vouching.with(|service, _| service.wants_incarnation()) {
            return;
        }
        match history.begin_incarnation().await {
            Ok(()) => vouching.with(|service, _| service.on_incarnation_begun()),
            Err(error) => metrics.store_failed(&error),
        }
    }

    /// An operator may have declared that this store replaces the one whose past it lacks.
    async fn check_awaited_past(&mut self) {
        let Some(awaited) = self.rivals.shared.vouching.awaited_past() else { return };
        let now = clock::lease_now();
        if now.since(self.reread_at) < REREAD_EVERY {
            return;
        }
        self.reread_at = now;
        let Shared { history, vouching, metrics, .. } = &self.rivals.shared;
        match history.is_settled(&awaited).await {
            Ok(true) => vouching.with(|service, _| service.on_past_resolved()),
            Ok(false) => {}
            Err(error) => metrics.store_failed(&error),
        }
    }

    async fn on_query(&mut self, message: &Message) {
        let Ok(query) = PublisherQuery::decode(&message.payload) else { return };
        if query.from.id == self.rivals.id || self.waiting.len() >= QUERIES_WAITING_MAX {
            return;
        }
        let peer = &query.from.peer;
        if peer.standing != Standing::Asking {
            self.compare(peer.provenance, query.from.round).await;
        }
        self.waiting.push((query, clock::lease_now()));
        self.rivals.shared.rounds.request();
    }

    /// A round that began after a query had arrived shows that this publisher's store is still the primary.
    async fn answer_waiting(&mut self) {
        let Some((began, token)) = self.rivals.shared.fence.last() else { return };
        let (due, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(_, came)| *came <= began);
        self.waiting = waiting;
        for (PublisherQuery { nonce, from }, _) in due {
            let answer = PublisherAnswer { nonce, from: self.rivals.introduction(Some(token)) };
            self.rivals.bus.send(publisher_answer(from.id, nonce), answer.encode()).await;
        }
    }

    fn on_answer(&mut self, message: &Message) {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            let Some(nonce) = answered_nonce(&message.subject) else { return };
            return self.rivals.shared.vouching.with(|service, now| service.on_no_responders(nonce, now));
        }
        let Ok(PublisherAnswer { nonce, from }) = PublisherAnswer::decode(&message.payload) else { return };
        if self.checks.len() >= CHECKS_MAX {
            return;
        }
        let rivals = self.rivals.clone();
        self.checks.spawn(async move {
            let is_same_store = rivals.is_same_store(from.peer.provenance, from.round).await?;
            Ok(PeerFinding::Answer { nonce, peer: from.peer, is_same_store })
        });
    }

    async fn on_live(&mut self, message: &Message) {
        let Ok(Live { voucher, event }) = Live::decode(&message.payload) else { return };
        let round = match event {
            LiveEvent::Ended => return,
            LiveEvent::Tick(round) => round,
            LiveEvent::Invalidations(_) => None,
        };
        self.compare(voucher.milestone.provenance, round).await;
    }

    /// Queries the others if a message is of another history, or of a round that this store lacks.
    async fn compare(&mut self, provenance: Provenance, round: Option<RoundToken>) {
        if provenance != self.rivals.shared.history.history().provenance() {
            return self.query_others().await;
        }
        if round.is_some() && self.checks.len() < CHECKS_MAX {
            let rivals = self.rivals.clone();
            self.checks.spawn(async move {
                let is_same_store = rivals.is_same_store(provenance, round).await?;
                Ok(if is_same_store { PeerFinding::KnownRound } else { PeerFinding::UnknownRound })
            });
        }
    }

    async fn on_finding(&mut self, found: Result<PeerFinding, StoreError>) {
        let vouching = &self.rivals.shared.vouching;
        match found {
            Ok(PeerFinding::Answer { nonce, peer, is_same_store: true }) => {
                vouching.with(|service, now| service.on_same_history(nonce, peer.standing, now));
            }
            Ok(PeerFinding::Answer { nonce, peer, is_same_store: false }) => {
                vouching.with(|service, now| service.on_rival(nonce, peer, now));
            }
            Ok(PeerFinding::UnknownRound) => self.query_others().await,
            Ok(PeerFinding::KnownRound) => {}
            Err(error) => self.rivals.shared.metrics.store_failed(&error),
        }
    }

    async fn query_others(&self) {
        if let Some(query) = self.rivals.shared.vouching.foreign() {
            self.rivals.send(query).await;
        }
    }

    /// Reports a rival that is silent for this publisher.
    fn report_silent_rival(&self) {
        let Rivals { silent_rival, shared: Shared { vouching, metrics, .. }, .. } = &*self.rivals;
        let rival = vouching.silent_rival();
        metrics.silent_rivals(rival.is_some());
        match rival {
            Some(rival) => silent_rival.unmet(rival),
            None => silent_rival.met(),
        }
    }

    /// Reports the standing when it has changed.
    fn report(&mut self) {
        let Rivals { condition, shared: Shared { vouching, metrics, .. }, .. } = &*self.rivals;
        let standing = vouching.standing();
        if self.reported.replace(standing) == Some(standing) {
            return;
        }
        metrics.standing(standing);
        // Rivals that come and go must not fill the log.
        let unlogged = log_limit!(5, standing.label());
        match vouching.refusal() {
            Some(reason) => {
                if let Some(unlogged) = unlogged {
                    let (standing, unlogged) = (standing.label(), unlogged.field());
                    tracing::error!(standing, unlogged, "publisher fell silent: {reason}");
                }
                condition.unmet(reason);
            }
            None if standing == Standing::Serving => {
                if let Some(unlogged) = unlogged {
                    tracing::info!(unlogged = unlogged.field(), "publisher serves its home store");
                }
                condition.met();
            }
            None => {
                if let Some(unlogged) = unlogged {
                    tracing::info!(unlogged = unlogged.field(), "querying other publishers on the bus");
                }
            }
        }
    }
}

/// Subscribes to what other publishers send.
pub(crate) async fn subscribe(bus: &Bus, id: u64) -> Result<PublisherMessages, async_nats::SubscribeError> {
    Ok(PublisherMessages {
        queries: bus.subscribe(PUBLISHERS.to_owned()).await?,
        answers: bus.subscribe(publisher_answers(id)).await?,
        live: bus.subscribe(LIVE.to_owned()).await?,
    })
}
