//! What the cache doesn't have is asked of the origin: one question per hash at a time, few at once. Where the
//! agent may read a database, that one is asked first.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::sync::Arc;

use evictd_core::entry::{Reading, Stamp};
use evictd_core::follower::Effect;
use evictd_core::ids::KeyHash;
use evictd_core::lease::{answers, may_join};
use evictd_core::position::LogPosition;
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

/// The end of a load, shared by everybody who waited for it.
#[derive(Clone, Debug)]
struct Landed {
    entry: Arc<Entry>,
    /// How new the load was when it arrived.
    as_of: LogPosition,
    /// When it was sent, not later.
    sent_at: LeaseTime,
}

type Flight = watch::Receiver<Option<Result<Landed, LoadError>>>;

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
    pub(crate) async fn load(&self, hash: KeyHash, began: Reading) -> Result<Arc<Entry>, LoadError> {
        for _ in 0..2 {
            let landed = self.join(hash)?.await_landing().await?;
            if self.shared.answers(hash, &landed, began) {
                return Ok(landed.entry);
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
    async fn await_landing(mut self) -> Result<Landed, LoadError> {
        match self.0.wait_for(Option::is_some).await {
            Ok(landed) => landed.clone().unwrap_or(Err(LoadError::Unreachable)),
            // The task was dropped with the runtime: the process ends.
            Err(_) => Err(LoadError::Unreachable),
        }
    }
}

impl Shared {
    /// Whether what landed answers a verification that `began` so (R8, R10).
    fn answers(&self, hash: KeyHash, landed: &Landed, began: Reading) -> bool {
        let now = clock::lease_now();
        // The proof before the floors, as everywhere (R9). And the floors of now, not of the landing: what
        // rose in between may have been confirmed before this verification began, if it was the last to join.
        let proven_at = self.knowledge.proven_at();
        let floor = self.knowledge.follower.lock().floor(&hash, &landed.entry.stamp.anchors);
        // A load that is older than a floor is not what the present proof vouches for.
        let proof = if landed.as_of >= floor { proven_at } else { began.proven_at };
        may_join(self.knowledge.bound, landed.sent_at, began.now, began.proven_at)
            && answers(landed.as_of, floor, began.applied)
            && !self.knowledge.has_ended()
            && self.knowledge.bound.allows(now, landed.entry.stamp.read_at, proof)
    }

    async fn fly(&self, hash: KeyHash) -> Result<Landed, LoadError> {
        if let Some(landed) = self.fly_to_the_replica(hash).await {
            return Ok(landed);
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
        Ok(self.land(hash, loaded, sent_at).0)
    }

    /// What the replica says, if that may be cached: what is too old is asked of the authority (R10), and so is
    /// everything when no lease vouches for it.
    async fn fly_to_the_replica(&self, hash: KeyHash) -> Option<Landed> {
        let replica = self.replica.as_ref().filter(|_| self.knowledge.lease_runs())?;
        let sent_at = clock::lease_now();
        let loaded = replica.lookup(hash).await?;
        let (landed, admitted) = self.land(hash, loaded, sent_at);
        let outcome = if admitted { DatabaseOutcome::Ok } else { DatabaseOutcome::TooOld };
        self.metrics.read_from_database(outcome);
        admitted.then_some(landed)
    }

    /// Inserts hidden, looks at the floors, then shows (R9). An invalidation raises floors before it
    /// evicts: either this look sees its floor, or its eviction sees this entry. Tells whether it was shown.
    fn land(&self, hash: KeyHash, loaded: Loaded, sent_at: LeaseTime) -> (Landed, bool) {
        let Loaded { lookup, read_at } = loaded;
        let mut effects = Vec::new();
        let anchors = self.knowledge.follower.lock().anchors(&lookup.record, &mut effects);
        for effect in &effects {
            if let Effect::Widened(widened) = effect {
                self.metrics.floors_merged(widened.floors());
            }
        }
        let as_of = lookup.as_of;
        let stamp = Stamp::new(as_of, read_at, anchors);
        let answers = self.cache.rings.answers_of(&lookup.record);
        let entry = Arc::new(Entry { record: lookup.record, stamp, loaded_at: sent_at, answers });
        self.cache.insert_hidden(hash, entry.clone());
        let admitted = self.knowledge.follower.lock().admits(&hash, &entry.stamp.anchors, as_of);
        if admitted {
            entry.stamp.show();
        } else {
            self.cache.evict(&hash);
            self.metrics.stale_loads.increment(1);
        }
        (Landed { entry, as_of, sent_at }, admitted)
    }
}

#[cfg(test)]
mod tests;
