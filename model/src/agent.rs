//! An agent of a small world: the core's, and the messages that are under way to it.
//!
//! Messages to an agent are never taken away, so each may arrive late, several times, in any order or not at all.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use evictd_core::entry::Validity;
use evictd_core::follower::{Effect, LoadSource};
use evictd_core::lease::Mode;
use evictd_core::protection::Protection;
use evictd_core::serving::{LoadAnswer, VerificationStart};
use evictd_core::time::LeaseTime;

use crate::core_agent::{CoreAgent, ModelEntry};
use crate::defect::Flaw;
use crate::script::{ModelKey, View};
use crate::store::{Mark, ModelReplay};
use crate::world::{SmallWorld, Tick};

/// A verification: what it builds on, and the changes that its answer must include.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ModelVerification {
    pub at: Tick,
    pub reading: VerificationStart,
    /// The changes whose receipts were confirmed by all agents then (G4).
    pub confirmed: View,
    /// The changes that this agent had confirmed then (G2).
    pub owed: View,
}

/// What a load read from the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Read {
    pub view: View,
    pub as_of: Mark,
    /// The age of the publisher's fence.
    pub fence_age: Tick,
    /// Whether the origin has a fence: a replica's reads prove nothing.
    pub vouched: bool,
}

/// A load under way, with one of the verifications that wait for it: the one that began last of those that
/// the checker chose.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PendingLoad {
    pub sent_at: Tick,
    pub waiter: ModelVerification,
    /// What it read, once it was read.
    pub read: Option<Read>,
}

/// A query for the missing rows `from..=to`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReplayQuery {
    pub nonce: u64,
    pub epoch: u32,
    pub from: u64,
    pub to: u64,
}

#[derive(Clone, Debug)]
pub struct ModelAgent {
    /// Counts its restarts.
    pub process: u8,
    /// Every applied position counts as announced: no publisher can have received a later one.
    pub core: CoreAgent,
    pub load: Option<PendingLoad>,
    /// Loads that it may still send.
    pub loads_left: u8,
    /// When a round last wrote it into the roster.
    pub rostered: Option<Tick>,
    /// Probes: number and what it had seen.
    pub probes: BTreeSet<(u64, Option<Mark>)>,
    /// Answers to probes: number and head.
    pub proofs: BTreeSet<(u64, Mark)>,
    pub replay_queries: BTreeSet<ReplayQuery>,
    /// Answers to replays: number, the head of the store that gave it, and the answer.
    pub replays: BTreeSet<(u64, Mark, ModelReplay)>,
    /// Agents with the same digest behave alike.
    pub(crate) digest: u64,
}

impl PartialEq for ModelAgent {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Hash for ModelAgent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl ModelAgent {
    pub fn new(world: &SmallWorld, process: u8) -> Self {
        let mut agent = Self {
            process,
            core: CoreAgent::new(world.bound(), world.floors, process),
            load: None,
            loads_left: world.loads,
            rostered: None,
            probes: BTreeSet::new(),
            proofs: BTreeSet::new(),
            replay_queries: BTreeSet::new(),
            replays: BTreeSet::new(),
            digest: 0,
        };
        agent.settle(world, Tick(0), &[]);
        agent
    }

    /// Ends a step: performs its effects in their order, drops what can have no effect anymore, and takes the digest.
    pub fn settle(&mut self, world: &SmallWorld, now: Tick, effects: &[Effect]) {
        for effect in effects {
            self.core.perform(effect);
            match *effect {
                Effect::SendProbe { nonce, seen, .. } => {
                    self.probes.insert((nonce, seen.as_ref().map(Mark::of)));
                }
                Effect::SendReplay { nonce, epoch, from, to, .. } => {
                    self.replay_queries.insert(ReplayQuery { nonce, epoch, from, to });
                }
                _ => {}
            }
        }
        let follower = self.core.follower();
        if !world.is_without(Protection::AnswersMatchQuestions) {
            let is_open = |nonce: &u64| follower.awaits(*nonce);
            self.probes.retain(|(nonce, _)| is_open(nonce));
            self.proofs.retain(|(nonce, _)| is_open(nonce));
            self.replay_queries.retain(|query| is_open(&query.nonce));
            self.replays.retain(|(nonce, ..)| is_open(nonce));
        }
        if !world.is_without(Protection::HitsMeetFloors) {
            let horizon = follower.floors().horizon().get();
            // Floors never sink.
            let is_void = |validity: &Validity| validity.as_of() < validity.anchors.floor().max(horizon);
            self.core.cache.place().take_if(|entry| is_void(&entry.validity));
        }
        drop(follower);
        self.digest = self.take_digest(world, now);
    }

    fn take_digest(&self, world: &SmallWorld, now: Tick) -> u64 {
        let mut hasher = DefaultHasher::new();
        let follower = self.core.follower();
        let proven_at = self.core.state.proven_at();
        follower.digest(now.lease_time(), world.replica, &mut hasher);
        (self.process, self.core.applied(), proven_at).hash(&mut hasher);
        let entry = |ModelEntry { view, validity }: &ModelEntry| {
            // The later of the two decides how long it is served, and `proven_at` never goes back.
            let proven_at = validity.read_at.max(proven_at);
            (*view, validity.as_of(), proven_at, validity.anchors.floor(), validity.is_shown())
        };
        self.core.cache.place().as_deref().map(entry).hash(&mut hasher);
        (&self.load, self.loads_left, self.rostered).hash(&mut hasher);
        let rank = |nonce: &u64| follower.request_rank(*nonce);
        for (nonce, seen) in &self.probes {
            (0, rank(nonce), seen).hash(&mut hasher);
        }
        for (nonce, head) in &self.proofs {
            (1, rank(nonce), head).hash(&mut hasher);
        }
        for query in &self.replay_queries {
            (2, rank(&query.nonce)).hash(&mut hasher);
        }
        for (nonce, head, replay) in &self.replays {
            (3, rank(nonce), head, replay).hash(&mut hasher);
        }
        hasher.finish()
    }

    pub fn mode(&self, now: Tick) -> Mode {
        self.core.follower().mode(now.lease_time())
    }

    /// Caches a loaded record if it may be cached. Returns what was answered to its waiter, if it may be answered.
    pub fn complete_load(
        &mut self,
        world: &SmallWorld,
        now: Tick,
        effects: &mut Vec<Effect>,
    ) -> Option<(View, ModelVerification)> {
        let PendingLoad { sent_at, waiter, read } = self.load.take()?;
        let Read { view, as_of, fence_age, vouched } = read?;
        let dated = if world.has(Flaw::LoadsDateFromTheirArrival) { now } else { sent_at };
        let read_at = if vouched || world.has(Flaw::ReplicasVouchForTheirReads) {
            dated.lease_time().before(fence_age.duration())
        } else {
            LeaseTime(0)
        };
        let source = if vouched {
            LoadSource::Authority(as_of.provenance())
        } else {
            LoadSource::Database(as_of.token())
        };
        let sent_at = sent_at.lease_time();
        let answer = LoadAnswer { hash: ModelKey::A.key_hash(), source, as_of: as_of.at, read_at, sent_at };
        let settled = self.core.load(answer, world.script.record(view), view, effects);
        settled.answer(&self.core.state, waiter.reading, now.lease_time()).map(|_| (view, waiter))
    }
}
