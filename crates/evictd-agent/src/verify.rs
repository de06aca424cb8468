//! The hot path: what a hash stands for, as of now.

use std::sync::Arc;

use evictd_core::ids::KeyHash;
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Verdict};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;

use crate::cache::{Cache, Entry};
use crate::knowledge::Knowledge;
use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::origin::LoadError;

/// Answers from the cache, and loads what it doesn't have.
#[derive(Clone, Debug)]
pub(crate) struct Verifier {
    knowledge: Arc<Knowledge>,
    cache: Arc<Cache>,
    loads: Loads,
    pub(crate) metrics: Arc<Metrics>,
}

impl Verifier {
    pub(crate) fn new(
        knowledge: Arc<Knowledge>,
        cache: Arc<Cache>,
        loads: Loads,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { knowledge, cache, loads, metrics }
    }

    /// An entry that may be answered from: cached, or loaded now.
    pub(crate) async fn entry(&self, hash: KeyHash) -> Result<Arc<Entry>, LoadError> {
        let began = self.knowledge.begin();
        if let Some(entry) = self.cached(&hash, began.applied) {
            self.metrics.hits.increment(1);
            return Ok(entry);
        }
        self.metrics.misses.increment(1);
        self.loads.load(hash, began).await
    }

    /// Reads clock, deadline, entry and floors, in this order (R9); the follow task writes floors,
    /// eviction, `applied` and deadline in that one. So whoever sees an extended deadline sees the floors
    /// that were raised before it.
    fn cached(&self, hash: &KeyHash, applied: LogPosition) -> Option<Arc<Entry>> {
        let now = clock::lease_now();
        let proven_at = self.knowledge.proven_at();
        let entry = self.cache.get(hash)?;
        let floor = entry.anchors.floor().max(self.knowledge.horizon.get());
        if entry.as_of() < floor {
            return None;
        }
        let in_time = self.knowledge.bound.allows(now, entry.read_at, proven_at);
        if !in_time || self.is_worn(&entry, now) {
            return None;
        }
        entry.lift(applied);
        Some(entry)
    }

    fn is_worn(&self, entry: &Entry, now: LeaseTime) -> bool {
        entry.is_not_found() && now.since(entry.read_at) >= self.cache.not_found_ttl
    }

    /// The verdict on a key, counted.
    pub(crate) fn judge(&self, key: &KeyRecord) -> Verdict {
        let verdict = key.verdict(self.home_time());
        self.metrics.verified(verdict);
        verdict
    }

    /// The store's clock, as high as it may be: whatever ends, ends early rather than late.
    pub(crate) fn home_time(&self) -> StoreTime {
        self.knowledge.home_time_high()
    }
}

#[cfg(test)]
mod tests;
