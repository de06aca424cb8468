//! The cache of an agent.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::entry::Validity;
use evictd_core::exposure::{Answers, ExposureLog};
use evictd_core::ids::KeyHash;
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_core::serving::{CacheEntry, EntryCache};
use evictd_core::time::LeaseTime;

use crate::rows::{KeyNumber, ReadPlace, hash, key_of};

#[derive(Debug)]
pub struct SimEntry {
    pub record: Record,
    pub validity: Validity,
    pub sent_at: LeaseTime,
    pub not_found_ttl: Duration,
    pub place: ReadPlace,
    /// Whether its end was counted.
    pub counted: Cell<bool>,
    pub answers: Answers,
}

impl SimEntry {
    pub fn is_not_found(&self) -> bool {
        match &self.record {
            Record::Absent => true,
            Record::Key(key) => key.state == RecordState::Deleted,
            Record::RootKey(root) => root.state == RecordState::Deleted,
        }
    }
}

impl CacheEntry for SimEntry {
    fn validity(&self) -> &Validity {
        &self.validity
    }

    fn is_expired(&self, now: LeaseTime) -> bool {
        self.is_not_found() && now.since(self.sent_at) >= self.not_found_ttl
    }

    fn note_answer(&self, now: LeaseTime, applied: LogPosition) {
        self.answers.note(now, self.validity.as_of(), applied);
    }
}

/// One slot per key. A removed entry's answers are recorded, as by moka's listener.
#[derive(Debug)]
pub struct SimCache {
    pub places: RefCell<Vec<Option<Arc<SimEntry>>>>,
    pub exposure: ExposureLog,
}

impl SimCache {
    pub fn new(keys: usize) -> Self {
        Self { places: RefCell::new(vec![None; keys]), exposure: ExposureLog::default() }
    }

    pub fn put(&self, hash: &KeyHash, entry: Option<Arc<SimEntry>>) -> Option<Arc<SimEntry>> {
        let gone = std::mem::replace(&mut self.places.borrow_mut()[key_of(hash).0], entry);
        if let Some(gone) = &gone {
            self.exposure.record_evicted(hash, gone.validity.as_of(), &gone.answers);
        }
        gone
    }
}

impl EntryCache for SimCache {
    type Entry = SimEntry;

    fn get(&self, hash: &KeyHash) -> Option<Arc<SimEntry>> {
        self.places.borrow()[key_of(hash).0].clone()
    }

    fn insert_hidden(&self, hash: KeyHash, entry: Arc<SimEntry>) {
        self.put(&hash, Some(entry));
    }

    fn evict(&self, hash: &KeyHash) -> Option<Arc<SimEntry>> {
        self.put(hash, None)
    }

    fn clear(&self) {
        self.exposure.flushed();
        // moka does so a little later.
        let keys = self.places.borrow().len();
        for key in 0..keys {
            self.put(&hash(KeyNumber(key)), None);
        }
    }
}
