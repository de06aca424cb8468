//! Replays and lookups: answered from the store, each kind within limits of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::follower::ReplayOutcome as Outcome;
use evictd_core::ids::Identity;
use evictd_core::limits::REPLAY_BATCH_MAX;
use evictd_store::log::Replay;
use evictd_store::{LogStore, RecordStore};
use evictd_wire::lookup::{LookupAnswer, LookupOutcome, LookupRequest};
use evictd_wire::replay::{ReplayAnswer, ReplayRequest};
use evictd_wire::subject::Speaker;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::authority::Serving;
use crate::bus::{Bus, Heard, Intake};
use crate::config::AuthorityConfig;
use crate::history::HomeHistory;
use crate::metrics::{LookupEnd, Metrics, Refusal};
use crate::receipts::Receipts;
use crate::rounds::{FENCE_AGE_MAX, Fence, RoundWish};
use crate::vouching::Vouching;

#[derive(Clone)]
pub(crate) struct Questions {
    log: Arc<dyn LogStore>,
    records: Arc<dyn RecordStore>,
    receipts: Arc<Receipts>,
    fence: Fence,
    rounds: RoundWish,
    history: Arc<HomeHistory>,
    vouching: Vouching,
    replay_bus: Bus,
    lookup_bus: Bus,
    metrics: Arc<Metrics>,
    replays: Arc<Semaphore>,
    /// Agents whose turn it is, each with the question that waits for it.
    replaying: Arc<Mutex<HashMap<Speaker, Option<Waiting>>>>,
    lookups: Arc<Semaphore>,
    /// Lookups under way, by asker: none may take more than half of what there is.
    by_speaker: Arc<Mutex<HashMap<Speaker, usize>>>,
    per_speaker_max: usize,
}

impl Questions {
    pub(crate) fn new(
        config: &AuthorityConfig,
        (log, records): (Arc<dyn LogStore>, Arc<dyn RecordStore>),
        receipts: Arc<Receipts>,
        (fence, rounds): (Fence, RoundWish),
        (history, vouching): (Arc<HomeHistory>, Vouching),
        [replay_bus, lookup_bus]: [Bus; 2],
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            log,
            records,
            receipts,
            fence,
            rounds,
            history,
            vouching,
            replay_bus,
            lookup_bus,
            metrics,
            replays: Arc::new(Semaphore::new(config.replays_max)),
            replaying: Arc::default(),
            lookups: Arc::new(Semaphore::new(config.lookups_max)),
            by_speaker: Arc::default(),
            per_speaker_max: config.lookups_max.div_ceil(2),
        }
    }

    /// Answers replays until `shutdown`. They wait for their turn instead of being shed: whoever asks is
    /// about to lose its lease. Each agent has one turn at a time, and its newest question replaces an
    /// older one that still waits: nobody is interested in that any more.
    pub(crate) async fn serve_replays(
        self,
        mut intake: Intake,
        mut serving: Serving,
        shutdown: CancellationToken,
    ) {
        while let Some(Some(heard)) = shutdown.run_until_cancelled(serving.next(&mut intake)).await {
            let Ok(request) = ReplayRequest::decode(&heard.payload) else {
                intake.refuse(Refusal::Malformed);
                continue;
            };
            let speaker = heard.speaker.clone();
            let waiting = self.replaying.lock().insert(speaker.clone(), Some((heard, request)));
            if waiting.is_none() {
                let this = self.clone();
                tokio::spawn(async move { this.take_turns(speaker).await });
            }
        }
    }

    /// Answers what waits for `speaker` until nothing does.
    async fn take_turns(&self, speaker: Speaker) {
        // Should an answer panic, the next question must still find somebody.
        let mut turn = Turn { replaying: &self.replaying, speaker: Some(&speaker) };
        loop {
            let Ok(_permit) = self.replays.acquire().await else { return };
            let next = {
                let mut replaying = self.replaying.lock();
                let next = replaying.get_mut(&speaker).and_then(Option::take);
                if next.is_none() {
                    replaying.remove(&speaker);
                    turn.speaker = None;
                }
                next
            };
            match next {
                Some((heard, request)) => self.replay(heard, request).await,
                None => return,
            }
        }
    }

    async fn replay(&self, heard: Heard, request: ReplayRequest) {
        let replay = self.log.replay(request.epoch, request.from, request.to, REPLAY_BATCH_MAX).await;
        let outcome = match replay {
            Ok(Replay::Rows { rows, .. }) => Outcome::Rows(rows),
            Ok(Replay::Refused { head }) => {
                tracing::warn!(speaker = %heard.speaker, from = request.from, "refused a replay that the store can't cover");
                Outcome::Refused { head: self.history.voucher(&head, head.at) }
            }
            // No answer: the agent asks again.
            Err(error) => return self.metrics.store_failed(&error),
        };
        if !self.vouching.is_allowed() {
            return;
        }
        self.metrics.replayed(&outcome);
        let provenance = self.history.history().provenance();
        let answer = ReplayAnswer { nonce: request.nonce, provenance, outcome };
        self.replay_bus.answer(heard.reply, answer.encode(&request)).await;
    }

    /// Answers lookups until `shutdown`; over the limits with "busy" at once.
    pub(crate) async fn serve_lookups(
        self,
        mut intake: Intake,
        mut serving: Serving,
        shutdown: CancellationToken,
    ) {
        while let Some(Some(heard)) = shutdown.run_until_cancelled(serving.next(&mut intake)).await {
            let Ok(request) = LookupRequest::decode(&heard.payload) else {
                intake.refuse(Refusal::Malformed);
                continue;
            };
            let permit = self.lookups.clone().try_acquire_owned().ok();
            let Some(place) = permit.and_then(|permit| Some((permit, self.take_place(&heard.speaker)?)))
            else {
                self.answer_lookup(heard.reply, request, LookupOutcome::Busy).await;
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                this.lookup(heard, request).await;
                drop(place);
            });
        }
    }

    fn take_place(&self, speaker: &Speaker) -> Option<Place> {
        let mut places = self.by_speaker.lock();
        let taken = places.entry(speaker.clone()).or_default();
        if *taken >= self.per_speaker_max {
            return None;
        }
        *taken += 1;
        Some(Place { by_speaker: self.by_speaker.clone(), speaker: speaker.clone() })
    }

    async fn lookup(&self, heard: Heard, request: LookupRequest) {
        let identity = Identity {
            region: heard.speaker.region.clone(),
            agent: heard.speaker.agent.clone(),
            instance: request.instance,
        };
        // Whoever loads may answer from what it loaded. So it is kept in the roster; and one that the roster has
        // forgotten gets nothing vouched for until it has probed, or receipts would not wait for it (R11).
        let is_waited_for = self.receipts.waits_for(&identity).await;
        self.receipts.heard(&identity);
        // Before the read: the fence may rise meanwhile, but this read is no newer for it.
        let fence_age = if is_waited_for { self.fence.age() } else { Duration::MAX };
        if self.fence.age() > FENCE_AGE_MAX {
            // Probes may all go to other publishers, and then nothing else raises this one's fence (R8).
            self.rounds.want();
        }
        match self.records.lookup(request.hash).await {
            // No answer: what another history says of it may count.
            Ok(_) if !self.vouching.is_allowed() => {}
            Ok(lookup) => {
                let outcome = LookupOutcome::Found { lookup, fence_age };
                self.answer_lookup(heard.reply, request, outcome).await;
            }
            Err(error) => {
                self.metrics.store_failed(&error);
                self.metrics.looked_up(LookupEnd::Failed);
            }
        }
    }

    async fn answer_lookup(&self, reply: String, request: LookupRequest, outcome: LookupOutcome) {
        self.metrics.looked_up(match outcome {
            LookupOutcome::Found { .. } => LookupEnd::Answered,
            LookupOutcome::Busy => LookupEnd::Busy,
        });
        let answer = LookupAnswer { nonce: request.nonce, hash: request.hash, outcome };
        self.lookup_bus.answer(reply, answer.encode()).await;
    }
}

/// A replay that waits for its agent's turn.
type Waiting = (Heard, ReplayRequest);

/// An agent's turn, until it is taken off the list.
struct Turn<'a> {
    replaying: &'a Mutex<HashMap<Speaker, Option<Waiting>>>,
    speaker: Option<&'a Speaker>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(speaker) = self.speaker {
            self.replaying.lock().remove(speaker);
        }
    }
}

struct Place {
    by_speaker: Arc<Mutex<HashMap<Speaker, usize>>>,
    speaker: Speaker,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.by_speaker.lock();
        if let Some(taken) = places.get_mut(&self.speaker) {
            *taken -= 1;
            if *taken == 0 {
                places.remove(&self.speaker);
            }
        }
    }
}
