//! The core's agent around a cache of one place.
//!
//! The steps of one hit, load or input are one action here: what readers and writers see between them is the subject
//! of `evictd-core/tests/loom.rs`.

use std::ops::DerefMut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evictd_core::entry::Validity;
use evictd_core::floors::FloorLimits;
use evictd_core::follower::{Effect, Follower, FollowerConfig};
use evictd_core::ids::KeyHash;
use evictd_core::lease::Bound;
use evictd_core::position::LogPosition;
use evictd_core::record::Record;
use evictd_core::serving::{
    AgentState, CacheEntry, EntryCache, Hit, HitVerdict, LoadAnswer, LoadedEntry, SettledEntry,
};
use evictd_core::time::LeaseTime;

use crate::script::{ModelKey, View};
use crate::world::Tick;

/// A cached record: what of the store's history is in it, and the core's validity.
#[derive(Debug)]
pub struct ModelEntry {
    /// The changes that it includes, of those that a verification reads.
    pub view: View,
    /// When it is servable.
    pub validity: Validity,
}

impl CacheEntry for ModelEntry {
    fn validity(&self) -> &Validity {
        &self.validity
    }
}

/// A place for the verified key. Only one thread works on it, but the checker's threads pass it on.
#[derive(Debug, Default)]
pub struct OneKeyCache(Mutex<Option<Arc<ModelEntry>>>);

impl OneKeyCache {
    pub fn place(&self) -> MutexGuard<'_, Option<Arc<ModelEntry>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EntryCache for OneKeyCache {
    type Entry = ModelEntry;

    fn get(&self, hash: &KeyHash) -> Option<Arc<ModelEntry>> {
        self.place().clone().filter(|_| *hash == ModelKey::A.key_hash())
    }

    fn insert_hidden(&self, _: KeyHash, entry: Arc<ModelEntry>) {
        *self.place() = Some(entry);
    }

    fn evict(&self, hash: &KeyHash) -> Option<Arc<ModelEntry>> {
        self.place().take_if(|_| *hash == ModelKey::A.key_hash())
    }

    fn clear(&self) {
        *self.place() = None;
    }
}

#[derive(Debug)]
pub struct CoreAgent {
    pub state: AgentState,
    pub cache: OneKeyCache,
}

impl Clone for CoreAgent {
    fn clone(&self) -> Self {
        let (state, mut fork_map) = self.state.fork();
        let copy = |entry: &Arc<ModelEntry>| {
            Arc::new(ModelEntry { view: entry.view, validity: entry.validity.fork(&mut fork_map) })
        };
        let place = self.cache.place().as_ref().map(copy);
        Self { state, cache: OneKeyCache(Mutex::new(place)) }
    }
}

impl CoreAgent {
    /// The agent of a process that has received nothing. Its queries have numbers that no other process uses.
    ///
    /// It probes once per tick, and repairs at once: everything else is a matter of which action comes first.
    pub fn new(bound: Bound, floors: FloorLimits, process: u8) -> Self {
        let config = FollowerConfig {
            bound,
            probe_interval: Tick::LENGTH,
            request_timeout: Tick::LENGTH,
            gap_patience: Duration::ZERO,
            floors,
            home_store: None,
        };
        let follower = Follower::new(config, 1 + 1000 * u64::from(process));
        Self { state: AgentState::new(follower, bound), cache: OneKeyCache::default() }
    }

    pub fn follower(&self) -> impl DerefMut<Target = Follower> + '_ {
        self.state.follower.lock()
    }

    pub fn applied(&self) -> LogPosition {
        self.state.applied()
    }

    pub fn perform(&self, effect: &Effect) {
        self.state.perform(effect, &self.cache);
    }

    /// The entry that a verification at `now` is answered from at once, if there is one.
    pub fn hit(&self, now: LeaseTime) -> Option<Hit<ModelEntry>> {
        match self
            .state
            .begin(now)
            .find(&self.state, &self.cache, &ModelKey::A.key_hash())?
            .judge(&self.state)
        {
            HitVerdict::Servable(hit) => Some(hit),
            HitVerdict::Stale { .. } | HitVerdict::Void => None,
        }
    }

    /// Caches a loaded record if it may be cached.
    pub fn load(
        &self,
        answer: LoadAnswer,
        record: Record,
        view: View,
        effects: &mut Vec<Effect>,
    ) -> SettledEntry<ModelEntry> {
        let new_entry = |_, validity| ModelEntry { view, validity };
        let loaded = LoadedEntry::new(&self.state, answer, record, effects, new_entry);
        loaded.insert(&self.cache).settle(&self.state, &self.cache)
    }
}
