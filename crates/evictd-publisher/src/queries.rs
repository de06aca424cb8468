//! Replays and lookups: answered from the store, each kind within limits of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::follower::ReplayOutcome;
use evictd_core::limits::REPLAY_BATCH_MAX;
use evictd_store::log::Replay;
use evictd_store::{LogStore, RecordStore};
use evictd_wire::lookup::{LookupAnswer, LookupOutcome, LookupRequest};
use evictd_wire::replay::{ReplayAnswer, ReplayRequest};
use evictd_wire::subject::Requester;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::bus::{Bus, Envelope, Subscription};
use crate::metrics::{LookupEnd, Refusal};
use crate::receipts::Membership;
use crate::rounds::FENCE_AGE_MAX;
use crate::shared::Shared;

/// Answers replays.
pub(crate) struct Replays {
    pub(crate) store: Arc<dyn LogStore>,
    pub(crate) bus: Bus,
    /// Replays at once.
    pub(crate) permits: Semaphore,
    /// Agents that are being answered, each with the newest request that waits for it.
    pub(crate) waiting: Mutex<HashMap<Requester, Option<PendingReplay>>>,
    pub(crate) shared: Shared,
}

/// A replay that waits until its agent's last one is answered.
type PendingReplay = (Envelope, ReplayRequest);

/// Answers lookups.
pub(crate) struct Lookups {
    pub(crate) store: Arc<dyn RecordStore>,
    pub(crate) bus: Bus,
    pub(crate) membership: Membership,
    /// Lookups at once.
    pub(crate) permits: Arc<Semaphore>,
    /// Lookups in progress, by requester.
    pub(crate) by_requester: Mutex<HashMap<Requester, usize>>,
    pub(crate) per_requester_max: usize,
    pub(crate) shared: Shared,
}

impl Replays {
    /// Answers replays until `shutdown`. They wait for their turn instead of being shed: the agent is about to lose its
    /// lease. Each agent has one turn at a time. Its newest request replaces an older one that still waits.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut requests: Subscription,
        mut serving: watch::Receiver<bool>,
        shutdown: CancellationToken,
    ) {
        while let Some(Some(envelope)) = shutdown.run_until_cancelled(requests.next_while(&mut serving)).await
        {
            let Ok(request) = ReplayRequest::decode(&envelope.payload) else {
                requests.refuse(Refusal::Malformed);
                continue;
            };
            let requester = envelope.requester.clone();
            let in_turn = self.waiting.lock().insert(requester.clone(), Some((envelope, request)));
            if in_turn.is_none() {
                let this = self.clone();
                tokio::spawn(async move { this.take_turns(requester).await });
            }
        }
    }

    /// Answers what waits for `requester` until nothing does.
    async fn take_turns(&self, requester: Requester) {
        // Should an answer panic, the next request must begin a turn.
        let mut turn = ReplayTurn { waiting: &self.waiting, requester: Some(&requester) };
        loop {
            let Ok(_permit) = self.permits.acquire().await else { return };
            let next = {
                let mut waiting = self.waiting.lock();
                let next = waiting.get_mut(&requester).and_then(Option::take);
                if next.is_none() {
                    waiting.remove(&requester);
                    turn.requester = None;
                }
                next
            };
            match next {
                Some((envelope, request)) => self.answer(envelope, request).await,
                None => return,
            }
        }
    }

    async fn answer(&self, envelope: Envelope, request: ReplayRequest) {
        let replay = self.store.replay(request.epoch, request.from, request.to, REPLAY_BATCH_MAX).await;
        let outcome = match replay {
            Ok(Replay::Rows { rows, .. }) => ReplayOutcome::Rows(rows),
            Ok(Replay::Refused { head }) => {
                tracing::warn!(
                    requester = %envelope.requester, from = request.from,
                    "refused a replay: the store doesn't hold its first row"
                );
                ReplayOutcome::Refused { head: self.shared.history.voucher(&head, head.at) }
            }
            // No answer: the agent repeats its request.
            Err(error) => return self.shared.metrics.store_failed(&error),
        };
        if !self.shared.vouching.is_allowed() {
            return;
        }
        self.shared.metrics.replayed(&outcome);
        let provenance = self.shared.history.history().provenance();
        let answer = ReplayAnswer { nonce: request.nonce, provenance, outcome };
        self.bus.answer(envelope.reply, answer.encode(&request)).await;
    }
}

impl Lookups {
    /// Answers lookups until `shutdown`; those over the limits with "busy", at once.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut requests: Subscription,
        mut serving: watch::Receiver<bool>,
        shutdown: CancellationToken,
    ) {
        while let Some(Some(envelope)) = shutdown.run_until_cancelled(requests.next_while(&mut serving)).await
        {
            let Ok(request) = LookupRequest::decode(&envelope.payload) else {
                requests.refuse(Refusal::Malformed);
                continue;
            };
            if let Some(slot) = self.begin(&envelope.requester) {
                tokio::spawn(async move { slot.lookups.look_up(envelope, request).await });
            } else {
                self.answer(envelope.reply, request, LookupOutcome::Busy).await;
            }
        }
    }

    /// Counts a lookup, unless too many are in progress. One requester gets at most half of what there is.
    fn begin(self: &Arc<Self>, requester: &Requester) -> Option<LookupSlot> {
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        let mut by_requester = self.by_requester.lock();
        let own = by_requester.entry(requester.clone()).or_default();
        if *own >= self.per_requester_max {
            return None;
        }
        *own += 1;
        Some(LookupSlot { lookups: self.clone(), requester: requester.clone(), _permit: permit })
    }

    async fn look_up(&self, envelope: Envelope, request: LookupRequest) {
        // The process may serve what it loads, so its row in the roster is refreshed. One that the roster lacks gets no
        // proof until it has probed: receipts don't wait for it (R11).
        let is_member = self.membership.looked_up(&envelope.identity(request.instance)).await;
        // Before the read: the fence may rise meanwhile, but this read is no newer for it.
        let fence_age = if is_member { self.shared.fence.age() } else { Duration::MAX };
        if self.shared.fence.age() > FENCE_AGE_MAX {
            // Probes may all go to other publishers, and then nothing else raises this one's fence (R8).
            self.shared.rounds.request();
        }
        match self.store.lookup(request.hash).await {
            // No answer: agents may follow another history.
            Ok(_) if !self.shared.vouching.is_allowed() => {}
            Ok(lookup) => {
                let outcome = LookupOutcome::Found { lookup, fence_age };
                self.answer(envelope.reply, request, outcome).await;
            }
            Err(error) => {
                self.shared.metrics.store_failed(&error);
                self.shared.metrics.looked_up(LookupEnd::Failed);
            }
        }
    }

    async fn answer(&self, reply: String, request: LookupRequest, outcome: LookupOutcome) {
        self.shared.metrics.looked_up(match outcome {
            LookupOutcome::Found { .. } => LookupEnd::Answered,
            LookupOutcome::Busy => LookupEnd::Busy,
        });
        let answer = LookupAnswer { nonce: request.nonce, hash: request.hash, outcome };
        self.bus.answer(reply, answer.encode()).await;
    }
}

/// An agent's turn, until it has ended in order.
struct ReplayTurn<'a> {
    waiting: &'a Mutex<HashMap<Requester, Option<PendingReplay>>>,
    requester: Option<&'a Requester>,
}

impl Drop for ReplayTurn<'_> {
    fn drop(&mut self) {
        if let Some(requester) = self.requester {
            self.waiting.lock().remove(requester);
        }
    }
}

/// A lookup in progress.
struct LookupSlot {
    lookups: Arc<Lookups>,
    requester: Requester,
    _permit: OwnedSemaphorePermit,
}

impl Drop for LookupSlot {
    fn drop(&mut self) {
        let mut by_requester = self.lookups.by_requester.lock();
        if let Some(own) = by_requester.get_mut(&self.requester) {
            *own -= 1;
            if *own == 0 {
                by_requester.remove(&self.requester);
            }
        }
    }
}
