//! Records by hash, in moka. The only place that names it.
//!
//! moka keeps what is worth keeping and bounds the memory; it decides nothing else. Whether an entry may
//! be served is decided at each hit, from the floors and the lease (R6, R8). In particular moka's own
//! invalidation does not stop a load in flight, so an entry is inserted hidden, and shown only after a
//! look at the floors that follows the insertion (R9): [`evictd_core::serving`] has these steps.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::entry::Validity;
use evictd_core::exposure::{Answers, ExposureLog};
use evictd_core::ids::KeyHash;
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_core::serving::{CacheEntry, EntryCache};
use evictd_core::time::LeaseTime;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::config::CacheConfig;
use crate::metrics::Metrics;

/// A record with what decides whether it may be answered from.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) record: Record,
    pub(crate) validity: Validity,
    /// When what was not found is asked for again, whatever vouches for it.
    pub(crate) expires_at: LeaseTime,
    /// When it was answered from.
    pub(crate) answers: Answers,
}

impl CacheEntry for Entry {
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

impl Entry {
    /// Whether it grants nothing by itself: such entries live briefly and in a cache of their own, so
    /// that guessing keys can't push out good ones.
    pub(crate) fn is_not_found(&self) -> bool {
        match &self.record {
            Record::Absent => true,
            Record::Key(key) => key.state == RecordState::Deleted,
            Record::RootKey(root) => root.state == RecordState::Deleted,
        }
    }

    /// Estimated memory, with what moka and the allocator add.
    fn weight(&self) -> u32 {
        const OVERHEAD: usize = 370;
        let variable = match &self.record {
            Record::Absent => 0,
            Record::Key(key) => {
                let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
                key.key_id.as_str().len() + text(&key.name) + text(&key.meta)
            }
            Record::RootKey(root) => root.permissions.iter().map(|permission| permission.len() + 16).sum(),
        };
        u32::try_from(OVERHEAD + variable).unwrap_or(u32::MAX)
    }
}

/// Found and not found, apart.
#[derive(Debug)]
pub(crate) struct Cache {
    found: moka::sync::Cache<KeyHash, Arc<Entry>>,
    not_found: moka::sync::Cache<KeyHash, Arc<Entry>>,
    not_found_ttl: Duration,
    /// The answers given from what is or was cached.
    pub(crate) exposure: Arc<ExposureLog>,
}

impl Cache {
    pub(crate) fn new(config: &CacheConfig) -> Self {
        let exposure = Arc::new(ExposureLog::default());
        // Under the key's lock: a removal that comes next finds what this one handed on.
        let hand_on = |exposure: &Arc<ExposureLog>| {
            let exposure = exposure.clone();
            move |hash: Arc<KeyHash>, entry: Arc<Entry>, _| {
                exposure.record_evicted(&hash, entry.validity.as_of(), &entry.answers);
            }
        };
        let found = moka::sync::Cache::builder()
            .name("found")
            .max_capacity(config.size.0)
            .weigher(|_, entry: &Arc<Entry>| entry.weight())
            .eviction_listener(hand_on(&exposure))
            .build();
        let not_found = moka::sync::Cache::builder()
            .name("not_found")
            .max_capacity(config.not_found_entries)
            .eviction_listener(hand_on(&exposure))
            .build();
        Self { found, not_found, not_found_ttl: config.not_found_ttl.into(), exposure }
    }

    /// An entry for a record that was asked for at `sent_at`.
    pub(crate) fn new_entry(&self, record: Record, validity: Validity, sent_at: LeaseTime) -> Entry {
        let answers = self.exposure.answers_of(&record);
        let mut entry = Entry { record, validity, expires_at: LeaseTime(u64::MAX), answers };
        if entry.is_not_found() {
            entry.expires_at = sent_at.after(self.not_found_ttl);
        }
        entry
    }

    #[cfg(test)]
    pub(crate) fn not_found_ttl(&self) -> Duration {
        self.not_found_ttl
    }

    pub(crate) fn run_pending_tasks(&self) {
        self.found.run_pending_tasks();
        self.not_found.run_pending_tasks();
    }

    /// Entries found, entries not found, estimated bytes; as of the last housekeeping.
    pub(crate) fn size(&self) -> (u64, u64, u64) {
        (self.found.entry_count(), self.not_found.entry_count(), self.found.weighted_size())
    }
}

impl EntryCache for Cache {
    type Entry = Entry;

    /// One look-up for what is found; two for what is not.
    fn get(&self, hash: &KeyHash) -> Option<Arc<Entry>> {
        self.found.get(hash).or_else(|| self.not_found.get(hash))
    }

    fn insert_hidden(&self, hash: KeyHash, entry: Arc<Entry>) {
        let (into, out_of) = if entry.is_not_found() {
            (&self.not_found, &self.found)
        } else {
            (&self.found, &self.not_found)
        };
        into.insert(hash, entry);
        out_of.invalidate(&hash);
    }

    fn evict(&self, hash: &KeyHash) -> Option<Arc<Entry>> {
        let (found, not_found) = (self.found.remove(hash), self.not_found.remove(hash));
        found.or(not_found)
    }

    fn clear(&self) {
        // moka removes them one by one, later.
        self.exposure.flushed();
        self.found.invalidate_all();
        self.not_found.invalidate_all();
    }
}

/// moka does its housekeeping on its callers; without traffic somebody must. Not the follow task: nothing
/// may hold up an invalidation.
pub(crate) async fn keep_house(cache: Arc<Cache>, metrics: Arc<Metrics>, shutdown: CancellationToken) {
    let mut every_second = tokio::time::interval(Duration::from_secs(1));
    every_second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(every_second.tick()).await.is_some() {
        cache.run_pending_tasks();
        let (found, not_found, bytes) = cache.size();
        metrics.cache(found, not_found, bytes);
    }
}

#[cfg(test)]
mod tests;
