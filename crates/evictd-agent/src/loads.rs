//! What the cache doesn't have is asked of the origin: one question per hash at a time, few at once. Where the
//! agent may read a database, that one is asked first.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::sync::Arc;

use evictd_core::follower::Effect;
use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;
use evictd_core::serving::{LoadAnswer, LoadedEntry, SettledEntry, VerificationStart};
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use crate::cache::{Cache, Entry};
use crate::config::LoadsConfig;
use crate::database::Replica;
use crate::knowledge::Knowledge;
use crate::metrics::{DatabaseOutcome, LoadOutcome, Metrics};
use crate::origin::{LoadError, Loaded, Origin};

/// The end of a load is shared by all that wait for it.
type Flight = watch::Receiver<Option<Result<SettledEntry<Entry>, LoadError>>>;

/// Loads under way.
#[derive(Clone, Debug)]
pub(crate) struct Loads {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    flights: Mutex<HashMap<KeyHash, Flight>>,
    permits: Arc<Semaphore>,
    /// Asked first, while a lease runs.
    replica: Option<Replica>,
    origin: Arc<dyn Origin>,
    knowledge: Arc<Knowledge>,
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
}

impl Loads {
    pub(crate) fn new(
        config: &LoadsConfig,
        replica: Option<Replica>,
        origin: Arc<dyn Origin>,
        knowledge: Arc<Knowledge>,
        cache: Arc<Cache>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(config.concurrent_max));
        let flights = Mutex::default();
        Self { shared: Arc::new(Shared { flights, permits, replica, origin, knowledge, cache, metrics }) }
    }

    /// Loads `hash` for a verification that `began` so, joining a load that is under way already. Such a
    /// load may have been sent before something that this verification must know; then it is repeated,
    /// once (R10).
    pub(crate) async fn load(
        &self,
        hash: KeyHash,
        began: VerificationStart,
    ) -> Result<Arc<Entry>, LoadError> {
        for _ in 0..2 {
            let settled = self.join(hash)?.await_landing().await?;
            if let Some(entry) = settled.answer(&self.shared.knowledge, began, clock::lease_now()) {
                return Ok(entry);
            }
        }
        Err(LoadError::Stale)
    }

    /// The flight for `hash`: the one under way, or a new one.
    fn join(&self, hash: KeyHash) -> Result<Waiting, LoadError> {
        let mut flights = self.shared.flights.lock();
        match flights.entry(hash) {
            MapEntry::Occupied(flight) => Ok(Waiting(flight.get().clone())),
            MapEntry::Vacant(vacant) => {
                let Ok(permit) = self.shared.permits.clone().try_acquire_owned() else {
                    self.shared.metrics.loaded(LoadOutcome::Shed);
                    return Err(LoadError::Busy);
                };
                let (landing, flight) = watch::channel(None);
                vacant.insert(flight.clone());
                let shared = self.shared.clone();
                // A task of its own: whoever asked first may give up, the others still want the answer.
                tokio::spawn(async move {
                    let _permit = permit;
                    let result = {
                        let _listed = Listed { shared: &shared, hash };
                        shared.fly(hash).await
                    };
                    landing.send_replace(Some(result));
                });
                Ok(Waiting(flight))
            }
        }
    }
}

/// A flight's place on the list. It ends before the flight lands: who comes later must not join what is
/// already over. And it ends whatever happens to the flight.
struct Listed<'a> {
    shared: &'a Shared,
    hash: KeyHash,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.shared.flights.lock().remove(&self.hash);
    }
}

struct Waiting(Flight);

impl Waiting {
    async fn await_landing(mut self) -> Result<SettledEntry<Entry>, LoadError> {
        match self.0.wait_for(Option::is_some).await {
            Ok(settled) => settled.clone().unwrap_or(Err(LoadError::Unreachable)),
            // The task was dropped with the runtime: the process ends.
            Err(_) => Err(LoadError::Unreachable),
        }
    }
}

impl Shared {
    async fn fly(&self, hash: KeyHash) -> Result<SettledEntry<Entry>, LoadError> {
        if let Some(settled) = self.fly_to_the_replica(hash).await {
            return Ok(settled);
        }
        let sent_at = clock::lease_now();
        let loaded = match self.origin.lookup(hash).await {
            Ok(loaded) => loaded,
            Err((outcome, error)) => {
                self.metrics.loaded(outcome);
                return Err(error);
            }
        };
        self.metrics.loaded(LoadOutcome::Ok);
        self.metrics.load_took(clock::lease_now().since(sent_at));
        Ok(self.land(hash, loaded, sent_at))
    }

    /// What the replica says, if that may be cached: what is too old is asked of the authority (R10), and so is
    /// everything when no lease vouches for it.
    async fn fly_to_the_replica(&self, hash: KeyHash) -> Option<SettledEntry<Entry>> {
        let replica = self.replica.as_ref().filter(|_| self.knowledge.lease_runs())?;
        let sent_at = clock::lease_now();
        let loaded = replica.lookup(hash).await?;
        let settled = self.land(hash, loaded, sent_at);
        let admitted = settled.is_admitted();
        let outcome = if admitted { DatabaseOutcome::Ok } else { DatabaseOutcome::TooOld };
        self.metrics.read_from_database(outcome);
        admitted.then_some(settled)
    }

    /// Caches what was loaded, if it meets its floors.
    fn land(&self, hash: KeyHash, loaded: Loaded, sent_at: LeaseTime) -> SettledEntry<Entry> {
        let Loaded { lookup: Lookup { as_of, record, .. }, source, read_at } = loaded;
        let mut effects = Vec::new();
        let answer = LoadAnswer { hash, source, as_of, read_at, sent_at };
        let new_entry = |record, validity| self.cache.new_entry(record, validity, sent_at);
        let settled = LoadedEntry::new(&self.knowledge, answer, record, &mut effects, new_entry)
            .insert(&*self.cache)
            .settle(&self.knowledge, &*self.cache);
        for effect in &effects {
            if let Effect::FloorsMerged(merged) = effect {
                self.metrics.floors_merged(merged.floors());
            }
        }
        if !settled.is_admitted() {
            self.metrics.stale_loads.increment(1);
        }
        settled
    }
}

#[cfg(test)]
mod tests;
