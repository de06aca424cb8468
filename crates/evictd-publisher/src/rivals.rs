//! Other publishers on the bus: who else is there, and for which history they speak (R15).
//!
//! The rules are [`evictd_core::service`]. Here is who feeds them: a beat, the questions and answers of others, and
//! what comes on the live feed. Answers are given after a durable round that began when the question was here.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message, StatusCode};
use evictd_core::history::{Provenance, RoundToken};
use evictd_core::service::{Connectivity, Peer, Query, Standing};
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::readiness::Condition;
use evictd_store::{LogStore, StoreError};
use evictd_wire::live::{Event, Live};
use evictd_wire::publisher::{Introduction, PublisherAnswer, PublisherQuery};
use evictd_wire::subject::{LIVE, PUBLISHERS, answered_nonce, publisher_answer, publisher_answers};
use futures_util::StreamExt;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::bus::{Bus, Publishers};
use crate::history::HomeHistory;
use crate::metrics::Metrics;
use crate::rounds::{Fence, RoundWish};
use crate::vouching::Vouching;

/// How often the standing is looked at: several times in what counts as an absence.
const BEAT: Duration = Duration::from_millis(250);

/// How often a publisher whose store doesn't know a past looks whether that was settled.
const REREAD_EVERY: Duration = Duration::from_secs(1);

/// Questions that wait for a round; there are few publishers.
const QUERIES_WAITING_MAX: usize = 64;

/// Tokens of colleagues that are looked for in the store at once.
const CHECKS_MAX: usize = 64;

/// Keeps this publisher's standing.
pub(crate) struct Rivals {
    pub(crate) id: u64,
    pub(crate) name: Box<str>,
    pub(crate) vouching: Vouching,
    pub(crate) history: Arc<HomeHistory>,
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) fence: Fence,
    pub(crate) rounds: RoundWish,
    pub(crate) bus: Bus,
    pub(crate) metrics: Arc<Metrics>,
    /// Met while this publisher may vouch, or asks whether it may.
    pub(crate) condition: Condition,
    /// Whether rounds succeed.
    pub(crate) succeeding: watch::Receiver<bool>,
    /// Told at each connection to NATS.
    pub(crate) connected: Arc<Notify>,
}

/// What a look into the own store showed of another publisher.
enum Finding {
    /// It answered a question.
    Answer { nonce: u64, peer: Peer, is_colleague: bool },
    /// Its tick names a round that this store doesn't have.
    Stranger,
    /// Nothing worth mentioning.
    Colleague,
}

struct Task {
    rivals: Arc<Rivals>,
    /// Questions of others, and when they came.
    waiting: Vec<(PublisherQuery, LeaseTime)>,
    checks: JoinSet<Result<Finding, StoreError>>,
    told: Option<Standing>,
    reread_at: LeaseTime,
}

impl Rivals {
    /// Until `shutdown`. When it ends, so does what this publisher vouches for.
    pub(crate) async fn run(self, mut publishers: Publishers, shutdown: CancellationToken) {
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut fence = self.fence.watch();
        let rivals = Arc::new(self);
        let mut task = Task {
            rivals: rivals.clone(),
            waiting: Vec::new(),
            checks: JoinSet::new(),
            told: None,
            reread_at: LeaseTime::default(),
        };
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                _ = beat.tick() => task.beat().await,
                () = rivals.connected.notified() => {
                    rivals.vouching.away();
                    task.beat().await;
                }
                Some(message) = publishers.queries.next() => task.on_query(&message).await,
                Some(message) = publishers.answers.next() => task.on_answer(&message),
                Some(message) = publishers.live.next() => task.on_live(&message).await,
                Ok(()) = fence.changed() => task.answer_waiting().await,
                Some(Ok(found)) = task.checks.join_next() => task.on_finding(found).await,
            }
            task.begin_alone().await;
            task.tell();
        }
    }

    fn introduction(&self, round: Option<RoundToken>) -> Introduction {
        let history = self.history.history();
        let peer = Peer {
            publisher: self.name.clone(),
            provenance: history.provenance(),
            since: history.current().time,
            standing: self.vouching.standing(),
        };
        Introduction { id: self.id, peer, round }
    }

    async fn send(&self, query: Query) {
        let query = PublisherQuery::new(query, self.introduction(self.fence.round()));
        let reply = publisher_answer(self.id, query.nonce);
        self.bus.ask(PUBLISHERS.to_owned(), reply, query.encode()).await;
    }

    /// Whether another publisher works on the same store: it speaks for the same history, and this publisher's own
    /// connection to the store shows its rounds.
    async fn is_colleague(
        &self,
        provenance: Provenance,
        round: Option<RoundToken>,
    ) -> Result<bool, StoreError> {
        // It may have begun an incarnation that this publisher hasn't heard of yet.
        self.history.reread().await?;
        if provenance != self.history.history().provenance() {
            return Ok(false);
        }
        match round {
            Some(round) => self.store.has_round_token(round).await,
            None => Ok(true),
        }
    }
}

impl Task {
    async fn beat(&mut self) {
        let Rivals { vouching, bus, succeeding, .. } = &*self.rivals;
        let connectivity = match (bus.is_up(), *succeeding.borrow()) {
            (_, false) => Connectivity::Stalled,
            (false, true) => Connectivity::Disconnected,
            (true, true) => Connectivity::Connected,
        };
        if let Some(query) = vouching.with(|service, now| service.poll(connectivity, now)) {
            self.rivals.send(query).await;
        }
        self.look_for_awaited_past().await;
    }

    /// Begins an incarnation if this publisher serves as soon as one has begun.
    async fn begin_alone(&self) {
        let Rivals { history, vouching, metrics, .. } = &*self.rivals;
        if !vouching.with(|service, _| service.wants_incarnation()) {
            return;
        }
        match history.begin_incarnation().await {
            Ok(()) => vouching.with(|service, _| service.on_incarnation_begun()),
            Err(error) => metrics.store_failed(&error),
        }
    }

    /// An operator may have declared that this store replaces the one whose past it doesn't know.
    async fn look_for_awaited_past(&mut self) {
        let Some(awaited) = self.rivals.vouching.awaited_past() else { return };
        let now = clock::lease_now();
        if now.since(self.reread_at) < REREAD_EVERY {
            return;
        }
        self.reread_at = now;
        let Rivals { history, vouching, metrics, .. } = &*self.rivals;
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
        let is_foreign = peer.provenance != self.rivals.history.history().provenance();
        if is_foreign && peer.standing != Standing::Asking {
            self.question().await;
        }
        self.waiting.push((query, clock::lease_now()));
        self.rivals.rounds.want();
    }

    /// A round that began after a question came shows that this publisher's store is still the primary.
    async fn answer_waiting(&mut self) {
        let Some((began, token)) = self.rivals.fence.last() else { return };
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
            return self.rivals.vouching.with(|service, now| service.on_no_responders(nonce, now));
        }
        let Ok(PublisherAnswer { nonce, from }) = PublisherAnswer::decode(&message.payload) else { return };
        if self.checks.len() >= CHECKS_MAX {
            return;
        }
        let rivals = self.rivals.clone();
        self.checks.spawn(async move {
            let is_colleague = rivals.is_colleague(from.peer.provenance, from.round).await?;
            Ok(Finding::Answer { nonce, peer: from.peer, is_colleague })
        });
    }

    async fn on_live(&mut self, message: &Message) {
        let Ok(Live { voucher, event }) = Live::decode(&message.payload) else { return };
        let provenance = voucher.milestone.provenance;
        if event == Event::Ended {
            return;
        }
        if provenance != self.rivals.history.history().provenance() {
            return self.question().await;
        }
        let Event::Tick(round @ Some(_)) = event else { return };
        if self.checks.len() < CHECKS_MAX {
            let rivals = self.rivals.clone();
            self.checks.spawn(async move {
                let is_colleague = rivals.is_colleague(provenance, round).await?;
                Ok(if is_colleague { Finding::Colleague } else { Finding::Stranger })
            });
        }
    }

    async fn on_finding(&mut self, found: Result<Finding, StoreError>) {
        let vouching = &self.rivals.vouching;
        match found {
            Ok(Finding::Answer { nonce, peer, is_colleague: true }) => {
                vouching.with(|service, now| service.on_same_history(nonce, peer.standing, now));
            }
            Ok(Finding::Answer { nonce, peer, is_colleague: false }) => {
                vouching.with(|service, now| service.on_rival(nonce, peer, now));
            }
            Ok(Finding::Stranger) => self.question().await,
            Ok(Finding::Colleague) => {}
            Err(error) => self.rivals.metrics.store_failed(&error),
        }
    }

    async fn question(&self) {
        if let Some(query) = self.rivals.vouching.foreign() {
            self.rivals.send(query).await;
        }
    }

    /// Says how this publisher stands, when that has changed.
    fn tell(&mut self) {
        let Rivals { vouching, condition, metrics, .. } = &*self.rivals;
        let standing = vouching.standing();
        if self.told.replace(standing) == Some(standing) {
            return;
        }
        metrics.standing(standing);
        match vouching.refusal() {
            Some(reason) => {
                tracing::error!(standing = standing.label(), "publisher fell silent: {reason}");
                condition.unmet(reason);
            }
            None if standing == Standing::Serving => {
                tracing::info!("publisher vouches for its home store");
                condition.met();
            }
            None => tracing::info!("asking which other publishers are on the bus"),
        }
    }
}

/// Subscribes to what other publishers send.
pub(crate) async fn publishers(bus: &Bus, id: u64) -> Result<Publishers, async_nats::SubscribeError> {
    Ok(Publishers {
        queries: bus.subscribe(PUBLISHERS.to_owned()).await?,
        answers: bus.subscribe(publisher_answers(id)).await?,
        live: bus.subscribe(LIVE.to_owned()).await?,
    })
}
