//! Loads of records that the cache doesn't have: one at a time per hash, and few at once. If a database is
//! configured, it is read before the authority is queried.

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

use crate::cache::{CachedRecord, RecordCache};
use crate::config::LoadsConfig;
use crate::database::DatabaseReader;
use crate::metrics::{AgentMetrics, DatabaseOutcome, LoadOutcome};
use crate::origin::{LoadError, LoadedRecord, Origin};
use crate::serving::ServingState;

/// The result of a load, which all its waiters share.
type SettledLoad = Result<SettledEntry<CachedRecord>, LoadError>;

/// A load under way.
type InFlightLoad = watch::Receiver<Option<SettledLoad>>;

/// Loads records.
#[derive(Clone, Debug)]
pub(crate) struct Loads(Arc<Loader>);

#[derive(Debug)]
struct Loader {
    in_flight: Mutex<HashMap<KeyHash, InFlightLoad>>,
    permits: Arc<Semaphore>,
    /// Read first, while a lease runs.
    reader: Option<DatabaseReader>,
    origin: Arc<dyn Origin>,
    serving: Arc<ServingState>,
    cache: Arc<RecordCache>,
    metrics: Arc<AgentMetrics>,
}

impl Loads {
    pub(crate) fn new(
        config: &LoadsConfig,
        reader: Option<DatabaseReader>,
        origin: Arc<dyn Origin>,
        serving: Arc<ServingState>,
        cache: Arc<RecordCache>,
        metrics: Arc<AgentMetrics>,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(config.concurrent_max));
        let in_flight = Mutex::default();
        Self(Arc::new(Loader { in_flight, permits, reader, origin, serving, cache, metrics }))
    }

    /// Loads `hash` for a verification that `began` so. Shares a load that is under way. That load may have been sent
    /// before a change that this verification must include; then it is repeated, once (R10).
    pub(crate) async fn load(
        &self,
        hash: KeyHash,
        began: VerificationStart,
    ) -> Result<Arc<CachedRecord>, LoadError> {
        for _ in 0..2 {
            let settled = wait_for_result(self.in_flight(hash)?).await?;
            if let Some(entry) = settled.answer(&self.0.serving, began, clock::lease_now()) {
                return Ok(entry);
            }
        }
        Err(LoadError::Stale)
    }

    /// Returns the load of `hash` that is under way, or starts one.
    fn in_flight(&self, hash: KeyHash) -> Result<InFlightLoad, LoadError> {
        let mut in_flight = self.0.in_flight.lock();
        let vacant = match in_flight.entry(hash) {
            MapEntry::Occupied(load) => return Ok(load.get().clone()),
            MapEntry::Vacant(vacant) => vacant,
        };
        let Ok(permit) = self.0.permits.clone().try_acquire_owned() else {
            self.0.metrics.loaded(LoadOutcome::Shed);
            return Err(LoadError::Busy);
        };
        let (sender, load) = watch::channel(None);
        vacant.insert(load.clone());
        let loader = self.0.clone();
        // A task of its own: the first waiter may give up while others still wait.
        tokio::spawn(async move {
            let _permit = permit;
            let result = {
                let _guard = InFlightGuard { loader: &loader, hash };
                loader.fetch(hash).await
            };
            sender.send_replace(Some(result));
        });
        Ok(load)
    }
}

/// Removes a load from the map before its result is published, so that no later verification shares a finished load.
/// Also removes it if the load panics.
struct InFlightGuard<'a> {
    loader: &'a Loader,
    hash: KeyHash,
}

impl Drop for InFlightGuard<'_> {
    fn drop(&mut self) {
        self.loader.in_flight.lock().remove(&self.hash);
    }
}

async fn wait_for_result(mut load: InFlightLoad) -> SettledLoad {
    match load.wait_for(Option::is_some).await {
        Ok(result) => result.clone().unwrap_or(Err(LoadError::Unreachable)),
        // The task panicked, or the runtime shuts down.
        Err(_) => Err(LoadError::Unreachable),
    }
}

impl Loader {
    async fn fetch(&self, hash: KeyHash) -> SettledLoad {
        if let Some(settled) = self.fetch_from_database(hash).await {
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
        Ok(self.insert_checked(hash, loaded, sent_at))
    }

    /// Returns the database's record, if a lease runs and the record meets its floors. Otherwise the authority is
    /// queried (R10).
    async fn fetch_from_database(&self, hash: KeyHash) -> Option<SettledEntry<CachedRecord>> {
        let reader = self.reader.as_ref().filter(|_| self.serving.has_lease_now())?;
        let sent_at = clock::lease_now();
        let loaded = reader.lookup(hash).await?;
        let settled = self.insert_checked(hash, loaded, sent_at);
        let admitted = settled.is_admitted();
        let outcome = if admitted { DatabaseOutcome::Ok } else { DatabaseOutcome::TooOld };
        self.metrics.read_from_database(outcome);
        admitted.then_some(settled)
    }

    /// Caches a loaded record, if it meets its floors.
    fn insert_checked(
        &self,
        hash: KeyHash,
        loaded: LoadedRecord,
        sent_at: LeaseTime,
    ) -> SettledEntry<CachedRecord> {
        let LoadedRecord { lookup: Lookup { as_of, record, .. }, source, read_at } = loaded;
        let mut effects = Vec::new();
        let answer = LoadAnswer { hash, source, as_of, read_at, sent_at };
        let new_entry = |record, validity| self.cache.new_entry(record, validity, sent_at);
        let settled = LoadedEntry::new(&self.serving, answer, record, &mut effects, new_entry)
            .insert(&*self.cache)
            .settle(&self.serving, &*self.cache);
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
