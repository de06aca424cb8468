//! An agent: the real follower, and the real steps of hits, loads and evictions, around a cache of two places.
//!
//! The steps of one hit, load or input are one action here: what readers and writers see between them is the subject
//! of `evictd-core/tests/loom.rs`. Messages to an agent are never taken away, so each may arrive late, several
//! times, in any order or not at all.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use evictd_core::entry::Validity;
use evictd_core::follower::{Effect, Follower, LoadSource};
use evictd_core::ids::KeyHash;
use evictd_core::lease::Mode;
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::serving::{
    AgentState, CacheEntry, EntryCache, Hit, HitVerdict, LoadAnswer, LoadedEntry, VerificationStart,
};
use evictd_core::time::LeaseTime;

use crate::script::{ModelKey, View};
use crate::store::{Mark, ModelReplay};
use crate::world::{SmallWorld, Tick, WorldFlaw};

/// A cached record: what of the store's history is in it, and the core's validity.
#[derive(Debug)]
pub struct ModelEntry {
    /// The changes of its key that it includes.
    pub view: View,
    /// When it is servable.
    pub validity: Validity,
}

impl CacheEntry for ModelEntry {
    fn validity(&self) -> &Validity {
        &self.validity
    }
}

/// A place for each key. Only one thread works on it, but the checker's threads pass it on.
#[derive(Debug, Default)]
pub struct TwoKeyCache([Mutex<Option<Arc<ModelEntry>>>; 2]);

impl TwoKeyCache {
    pub fn is_empty(&self) -> bool {
        ModelKey::ALL.into_iter().all(|key| self.place(key).is_none())
    }

    fn place(&self, key: ModelKey) -> MutexGuard<'_, Option<Arc<ModelEntry>>> {
        self.0[key.index()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place_of(&self, hash: &KeyHash) -> Option<MutexGuard<'_, Option<Arc<ModelEntry>>>> {
        ModelKey::ALL.into_iter().find(|key| key.key_hash() == *hash).map(|key| self.place(key))
    }
}

impl EntryCache for TwoKeyCache {
    type Entry = ModelEntry;

    fn get(&self, hash: &KeyHash) -> Option<Arc<ModelEntry>> {
        self.place_of(hash)?.clone()
    }

    fn insert_hidden(&self, hash: KeyHash, entry: Arc<ModelEntry>) {
        if let Some(mut place) = self.place_of(&hash) {
            *place = Some(entry);
        }
    }

    fn evict(&self, hash: &KeyHash) -> Option<Arc<ModelEntry>> {
        self.place_of(hash)?.take()
    }

    fn clear(&self) {
        for key in ModelKey::ALL {
            *self.place(key) = None;
        }
    }
}

/// A verification: what it builds on, and the changes that its answer must include.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ModelVerification {
    pub at: Tick,
    pub reading: VerificationStart,
    /// The changes whose receipts were confirmed by all then (G4).
    pub confirmed: View,
    /// The changes that this agent had confirmed then (G2).
    pub owed: View,
}

/// What a load read from the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Read {
    pub view: View,
    pub as_of: Mark,
    /// How long the publisher's fence was old.
    pub fence_age: Tick,
    /// Whether the origin has a fence: a replica's reads prove nothing.
    pub vouched: bool,
}

/// A load under way, with one of the verifications that wait for it: the one that began last of those that
/// the checker chose to look at.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PendingLoad {
    pub sent_at: Tick,
    pub waiter: ModelVerification,
    /// What it read, once it was read.
    pub read: Option<Read>,
}

/// A replay that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Wanted {
    pub nonce: u64,
    pub epoch: u32,
    pub from: u64,
    pub to: u64,
}

#[derive(Debug)]
pub struct ModelAgent {
    /// Counts its restarts.
    pub process: u8,
    /// The protocol state. Every applied position counts as announced: no publisher can have received a later one.
    pub state: AgentState,
    pub cache: TwoKeyCache,
    pub loads: [Option<PendingLoad>; 2],
    /// Loads that it may still send.
    pub loads_left: u8,
    /// When a round last wrote it into the roster.
    pub rostered: Option<Tick>,
    /// Probes: number and what it had seen.
    pub asked: BTreeSet<(u64, Option<Mark>)>,
    /// Answers to probes: number and head.
    pub proofs: BTreeSet<(u64, Mark)>,
    pub wanted: BTreeSet<Wanted>,
    /// Answers to replays: number, the head of the store that gave it, and the answer.
    pub replays: BTreeSet<(u64, Mark, ModelReplay)>,
    /// A digest of the above: agents with the same digest behave alike.
    print: u64,
}

impl PartialEq for ModelAgent {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Hash for ModelAgent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

impl ModelAgent {
    /// A process with an empty memory. Its queries have numbers that no other process uses.
    pub fn new(world: &SmallWorld, process: u8) -> Self {
        let nonce = 1 + 1000 * u64::from(process);
        let mut agent = Self {
            process,
            state: AgentState::new(Follower::new(world.follower_config(), nonce), world.bound()),
            cache: TwoKeyCache::default(),
            loads: [None, None],
            loads_left: world.loads,
            rostered: None,
            asked: BTreeSet::new(),
            proofs: BTreeSet::new(),
            wanted: BTreeSet::new(),
            replays: BTreeSet::new(),
            print: 0,
        };
        agent.seal(world, Tick(0));
        agent
    }

    /// The print, to bring agents that are alike into one order.
    pub fn print(&self) -> u64 {
        self.print
    }

    /// This agent after `step`, whose effects were performed in their order.
    #[must_use]
    pub fn after(
        &self,
        world: &SmallWorld,
        now: Tick,
        step: impl FnOnce(&mut Self, &mut Vec<Effect>),
    ) -> Self {
        let mut agent = self.fork();
        let mut effects = Vec::new();
        step(&mut agent, &mut effects);
        for effect in effects {
            agent.perform(&effect);
        }
        agent.seal(world, now);
        agent
    }

    fn fork(&self) -> Self {
        let (state, mut fork_map) = self.state.fork();
        let cache = TwoKeyCache::default();
        for key in ModelKey::ALL {
            let copy = |entry: &Arc<ModelEntry>| {
                Arc::new(ModelEntry { view: entry.view, validity: entry.validity.fork(&mut fork_map) })
            };
            *cache.place(key) = self.cache.place(key).as_ref().map(copy);
        }
        Self {
            state,
            cache,
            loads: self.loads.clone(),
            asked: self.asked.clone(),
            proofs: self.proofs.clone(),
            wanted: self.wanted.clone(),
            replays: self.replays.clone(),
            ..*self
        }
    }

    fn perform(&mut self, effect: &Effect) {
        self.state.perform(effect, &self.cache);
        match *effect {
            Effect::SendProbe { nonce, seen, .. } => {
                self.asked.insert((nonce, seen.as_ref().map(Mark::of)));
            }
            Effect::SendReplay { nonce, epoch, from, to, .. } => {
                self.wanted.insert(Wanted { nonce, epoch, from, to });
            }
            _ => {}
        }
    }

    /// Drops what can have no effect any more, and takes the print.
    fn seal(&mut self, world: &SmallWorld, now: Tick) {
        if world.answers_are_matched() {
            let follower = self.state.follower.lock();
            let open = |nonce: &u64| follower.awaits(*nonce);
            self.asked.retain(|(nonce, _)| open(nonce));
            self.proofs.retain(|(nonce, _)| open(nonce));
            self.wanted.retain(|wanted| open(&wanted.nonce));
            self.replays.retain(|(nonce, ..)| open(nonce));
        }
        if world.missing != Some(Protection::HitsMeetFloors) {
            let horizon = self.state.follower.lock().floors().horizon().get();
            for key in ModelKey::ALL {
                // Floors never sink.
                let is_void = |validity: &Validity| validity.as_of() < validity.anchors.floor().max(horizon);
                self.cache.place(key).take_if(|entry| is_void(&entry.validity));
            }
        }
        self.print = self.digest(world, now);
    }

    fn digest(&self, world: &SmallWorld, now: Tick) -> u64 {
        let mut hasher = DefaultHasher::new();
        let follower = self.state.follower.lock();
        let (applied, proven_at) = (self.applied(), self.state.proven_at());
        follower.digest(now.lease_time(), world.replica, &mut hasher);
        (self.process, applied, proven_at).hash(&mut hasher);
        for key in ModelKey::ALL {
            let place = self.cache.place(key);
            let entry = place.as_deref().map(|ModelEntry { view, validity }| {
                // It lives by the later of the two, and `proven_at` never goes back.
                let lives_by = validity.read_at.max(proven_at);
                (view, validity.as_of(), lives_by, validity.anchors.floor(), validity.is_shown())
            });
            entry.hash(&mut hasher);
        }
        (&self.loads, self.loads_left, self.rostered).hash(&mut hasher);
        for (nonce, seen) in &self.asked {
            (0, follower.request_rank(*nonce), seen).hash(&mut hasher);
        }
        for (nonce, head) in &self.proofs {
            (1, follower.request_rank(*nonce), head).hash(&mut hasher);
        }
        for Wanted { nonce, .. } in &self.wanted {
            (2, follower.request_rank(*nonce)).hash(&mut hasher);
        }
        for (nonce, head, replay) in &self.replays {
            (3, follower.request_rank(*nonce), head, replay).hash(&mut hasher);
        }
        hasher.finish()
    }

    pub fn applied(&self) -> LogPosition {
        self.state.applied()
    }

    pub fn mode(&self, now: Tick) -> Mode {
        self.state.follower.lock().mode(now.lease_time())
    }

    /// The entry that a verification at `now` is answered from at once, if there is one.
    pub fn hit(&self, key: ModelKey, now: Tick) -> Option<Hit<ModelEntry>> {
        let reading = self.state.begin(now.lease_time());
        match reading.find(&self.state, &self.cache, &key.key_hash())?.judge(&self.state) {
            HitVerdict::Servable(hit) => Some(hit),
            HitVerdict::Stale { .. } | HitVerdict::Void => None,
        }
    }

    /// Caches a loaded record if it may be cached. Returns the answer to its waiter, if it may be answered.
    pub fn complete_load(
        &mut self,
        world: &SmallWorld,
        key: ModelKey,
        now: Tick,
        effects: &mut Vec<Effect>,
    ) -> Option<LoadResult> {
        let PendingLoad { sent_at, waiter, read } = self.loads[key.index()].take()?;
        let Read { view, as_of, fence_age, vouched } = read?;
        let dated = if world.flaw == Some(WorldFlaw::LoadsDateFromTheirArrival) { now } else { sent_at };
        let read_at = if vouched || world.flaw == Some(WorldFlaw::ReplicasVouchForTheirReads) {
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
        let answer = LoadAnswer { hash: key.key_hash(), source, as_of: as_of.at, read_at, sent_at };
        let record = world.script.record(key, view);
        let new_entry = |_, validity| ModelEntry { view, validity };
        let settled = LoadedEntry::new(&self.state, answer, record, effects, new_entry)
            .insert(&self.cache)
            .settle(&self.state, &self.cache);
        settled.answer(&self.state, waiter.reading, now.lease_time()).map(|_| LoadResult { view, waiter })
    }
}

#[derive(Clone, Copy, Debug)]
pub struct LoadResult {
    pub view: View,
    pub waiter: ModelVerification,
}
