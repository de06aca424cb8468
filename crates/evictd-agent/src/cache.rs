//! Records by hash, in moka. No other module uses moka.
//!
//! moka selects the records to keep and bounds their memory. It doesn't decide whether an entry may be served: each hit
//! checks the floors and the lease (R6, R8). moka's own invalidation doesn't stop a load in flight, so an entry is
//! inserted hidden and shown only after a check of the floors that follows the insertion (R9). [`evictd_core::serving`]
//! has these steps.
//!
//! * [`weight`]: the memory of an entry.
//! * [`evict_void_entries`]: gives the room of entries that a wide change has voided to new ones.

mod weight;

use std::sync::Arc;
use std::time::Duration;

use evictd_core::entry::Validity;
use evictd_core::exposure::{Answers, ExposureLog};
use evictd_core::ids::KeyHash;
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_core::serving::{CacheEntry, EntryCache};
use evictd_core::time::LeaseTime;
use evictd_ops::time::every;
use moka::policy::EvictionPolicy;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::CacheConfig;
use crate::metrics::AgentMetrics;
use crate::serving::ServingState;

/// A record, and the state that decides whether it may be served.
#[derive(Debug)]
pub(crate) struct CachedRecord {
    pub(crate) record: Record,
    pub(crate) validity: Validity,
    /// When a "not found" is loaded again, whatever the lease.
    pub(crate) expires_at: LeaseTime,
    /// The times of answers from it.
    pub(crate) answers: Answers,
}

impl CacheEntry for CachedRecord {
    fn validity(&self) -> &Validity {
        &self.validity
    }

    fn is_expired(&self, now: LeaseTime) -> bool {
        now >= self.expires_at
    }

    fn note_answer(&self, now: LeaseTime, applied: LogPosition) {
        self.answers.note(now, self.validity.as_of(), applied);
    }
}

impl CachedRecord {
    /// Whether it is absent or deleted. Such entries expire soon and have a cache of their own, so that guessed keys
    /// can't displace valid ones.
    pub(crate) fn is_not_found(&self) -> bool {
        match &self.record {
            Record::Absent => true,
            Record::Key(key) => key.state == RecordState::Deleted,
            Record::RootKey(root) => root.state == RecordState::Deleted,
        }
    }
}

/// Two caches, for records and for "not found".
#[derive(Debug)]
pub(crate) struct RecordCache {
    found: moka::sync::Cache<KeyHash, Arc<CachedRecord>>,
    not_found: moka::sync::Cache<KeyHash, Arc<CachedRecord>>,
    not_found_ttl: Duration,
    /// The answers from present and evicted entries.
    pub(crate) exposure: Arc<ExposureLog>,
    /// A change may have voided many entries.
    many_void: Notify,
}

impl RecordCache {
    pub(crate) fn new(config: &CacheConfig) -> Self {
        let exposure = Arc::new(ExposureLog::default());
        // Runs under the key's lock, so that the next removal of the key finds these answers.
        let record_answers = |exposure: &Arc<ExposureLog>| {
            let exposure = exposure.clone();
            move |hash: Arc<KeyHash>, entry: Arc<CachedRecord>, _| {
                exposure.record_evicted(&hash, entry.validity.as_of(), &entry.answers);
            }
        };
        let found = moka::sync::Cache::builder()
            .name("found")
            .max_capacity(config.size.0)
            .weigher(|_, entry: &Arc<CachedRecord>| weight::weight(entry))
            .eviction_listener(record_answers(&exposure))
            .build();
        let not_found = moka::sync::Cache::builder()
            .name("not_found")
            .max_capacity(config.not_found_entries)
            // By default, moka would keep entries that have expired, and were popular before, and refuse new ones.
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(record_answers(&exposure))
            .build();
        let not_found_ttl = config.not_found_ttl.into();
        Self { found, not_found, not_found_ttl, exposure, many_void: Notify::new() }
    }

    /// Creates an entry for a record whose load was sent at `sent_at`.
    pub(crate) fn new_entry(&self, record: Record, validity: Validity, sent_at: LeaseTime) -> CachedRecord {
        let answers = self.exposure.answers_of(&record);
        let mut entry = CachedRecord { record, validity, expires_at: LeaseTime(u64::MAX), answers };
        if entry.is_not_found() {
            entry.expires_at = sent_at.after(self.not_found_ttl);
        }
        entry
    }

    /// A floor has risen that many entries may depend on.
    pub(crate) fn wide_floor_raised(&self) {
        self.many_void.notify_one();
    }

    /// Evicts the entries that are below a floor, in small steps, until all were looked at or `is_over`. Returns how many it
    /// evicted. A newer entry of the same key that is loaded in this moment may be evicted too, and is loaded again.
    fn evict_void(&self, is_void: impl Fn(&CachedRecord) -> bool, is_over: impl Fn() -> bool) -> usize {
        let mut evicted = 0;
        for cache in [&self.found, &self.not_found] {
            for (looked_at, (hash, entry)) in cache.iter().enumerate() {
                if is_void(&entry) {
                    cache.invalidate(&*hash);
                    evicted += 1;
                }
                if looked_at % SWEEP_STEP == 0 {
                    if is_over() {
                        return evicted;
                    }
                    // Gives the room of this step to new entries.
                    cache.run_pending_tasks();
                    std::thread::yield_now();
                }
            }
            cache.run_pending_tasks();
        }
        evicted
    }

    #[cfg(test)]
    pub(crate) fn not_found_ttl(&self) -> Duration {
        self.not_found_ttl
    }

    pub(crate) fn run_pending_tasks(&self) {
        self.found.run_pending_tasks();
        self.not_found.run_pending_tasks();
    }

    /// Returns the number of entries, of "not found" entries, and the estimated bytes, as of the last maintenance.
    pub(crate) fn size(&self) -> (u64, u64, u64) {
        (self.found.entry_count(), self.not_found.entry_count(), self.found.weighted_size())
    }
}

impl EntryCache for RecordCache {
    type Entry = CachedRecord;

    /// A record takes one look-up, a "not found" two.
    fn get(&self, hash: &KeyHash) -> Option<Arc<CachedRecord>> {
        self.found.get(hash).or_else(|| self.not_found.get(hash))
    }

    fn insert_hidden(&self, hash: KeyHash, entry: Arc<CachedRecord>) {
        let (into, out_of) = if entry.is_not_found() {
            (&self.not_found, &self.found)
        } else {
            (&self.found, &self.not_found)
        };
        into.insert(hash, entry);
        out_of.invalidate(&hash);
    }

    fn evict(&self, hash: &KeyHash) -> Option<Arc<CachedRecord>> {
        let (found, not_found) = (self.found.remove(hash), self.not_found.remove(hash));
        found.or(not_found)
    }

    fn clear(&self) {
        // moka removes entries one by one, later.
        self.exposure.flushed();
        self.found.invalidate_all();
        self.not_found.invalidate_all();
    }
}

/// Runs moka's maintenance every second, until `shutdown`. moka runs it during calls, which stop without traffic. It
/// must not run in the follow task, where it would delay invalidations.
pub(crate) async fn run_maintenance(
    cache: Arc<RecordCache>,
    metrics: Arc<AgentMetrics>,
    shutdown: CancellationToken,
) {
    let mut every_second = every(Duration::from_secs(1));
    while shutdown.run_until_cancelled(every_second.tick()).await.is_some() {
        cache.run_pending_tasks();
        let (found, not_found, bytes) = cache.size();
        metrics.cache(found, not_found, bytes);
    }
}

/// Entries that are looked at between two pauses of [`RecordCache::evict_void`].
const SWEEP_STEP: usize = 512;

/// Sweeps take at most a tenth of a core.
const SWEEP_REST: u32 = 9;

/// Evicts what wide changes have voided, such as the deletion of an API: its entries. They would be void without it. But
/// their memory and their places would stay taken until a verification looks at each, and moka, which prefers entries that
/// were popular, would refuse new ones meanwhile.
pub(crate) async fn evict_void_entries(
    cache: Arc<RecordCache>,
    serving: Arc<ServingState>,
    shutdown: CancellationToken,
) {
    while shutdown.run_until_cancelled(cache.many_void.notified()).await.is_some() {
        let (began, over) = (Instant::now(), shutdown.clone());
        let (cache, serving) = (cache.clone(), serving.clone());
        let sweep = move || cache.evict_void(|entry| serving.is_void(entry), || over.is_cancelled());
        // It may take seconds, and would delay what shares its thread.
        let Ok(evicted) = tokio::task::spawn_blocking(sweep).await else { return };
        let took = began.elapsed();
        tracing::debug!(evicted, ?took, "evicted entries below their floors");
        shutdown.run_until_cancelled(tokio::time::sleep(took * SWEEP_REST)).await;
    }
}

#[cfg(test)]
mod tests;
