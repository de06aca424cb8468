//! The hot path: what a hash stands for, as of now.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::entry::{Reading, Standing};
use evictd_core::ids::KeyHash;
use evictd_core::record::KeyRecord;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;

use crate::cache::{Cache, Entry};
use crate::knowledge::Knowledge;
use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::origin::LoadError;
use crate::policy::Policies;

/// An entry that is to be answered from.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) entry: Arc<Entry>,
    /// How long ago somebody vouched for it, if that is too long and policy answers all the same.
    pub(crate) stale: Option<Duration>,
}

/// Answers from the cache, and loads what it doesn't have.
#[derive(Clone, Debug)]
pub(crate) struct Verifier {
    knowledge: Arc<Knowledge>,
    cache: Arc<Cache>,
    loads: Loads,
    policies: Arc<Policies>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Verifier {
    pub(crate) fn new(
        knowledge: Arc<Knowledge>,
        cache: Arc<Cache>,
        loads: Loads,
        policies: Arc<Policies>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { knowledge, cache, loads, policies, metrics }
    }

    /// An entry that may be answered from: cached, or loaded now; an old one, if policy wants that and nobody
    /// can be reached.
    pub(crate) async fn entry(&self, hash: KeyHash) -> Result<Found, LoadError> {
        let began = self.knowledge.begin();
        if let Some(entry) = self.cached(&hash, began) {
            self.metrics.hits.increment(1);
            return Ok(Found { entry, stale: None });
        }
        self.metrics.misses.increment(1);
        match self.loads.load(hash, began).await {
            Ok(entry) => {
                entry.answers.note(clock::lease_now(), entry.stamp.as_of());
                Ok(Found { entry, stale: None })
            }
            Err(LoadError::Unreachable) => self.out_of_time(&hash).ok_or(LoadError::Unreachable),
            Err(error) => Err(error),
        }
    }

    /// After clock and deadline, which `reading` is, come entry and floors (R9); the follow task writes floors,
    /// eviction, `applied` and deadline in that one. So whoever sees an extended deadline sees the floors
    /// that were raised before it.
    fn cached(&self, hash: &KeyHash, reading: Reading) -> Option<Arc<Entry>> {
        let entry = self.cache.get(hash)?;
        let standing = entry.stamp.standing(reading, &self.knowledge.horizon, self.knowledge.bound);
        if standing != Standing::Servable || self.is_worn(&entry, reading.now) {
            return None;
        }
        entry.answers.note(reading.now, entry.stamp.as_of());
        entry.stamp.lift(reading.applied);
        Some(entry)
    }

    /// What is cached and old, if that is better than nothing for its API. What something is known to have
    /// changed is void, and never answered from (G2).
    fn out_of_time(&self, hash: &KeyHash) -> Option<Found> {
        let reading = self.knowledge.begin();
        let entry = self.cache.get(hash)?;
        let stale = match entry.stamp.standing(reading, &self.knowledge.horizon, self.knowledge.bound) {
            // Somebody vouched for it while nobody answered.
            Standing::Servable => None,
            Standing::OutOfTime if self.policies.of(&entry.record) == PartitionPolicy::ServeStale => {
                Some(reading.now.since(entry.stamp.read_at.max(reading.proven_at)))
            }
            Standing::OutOfTime | Standing::Void => return None,
        };
        if stale.is_none() && self.is_worn(&entry, reading.now) {
            return None;
        }
        entry.answers.note(reading.now, entry.stamp.as_of());
        Some(Found { entry, stale })
    }

    fn is_worn(&self, entry: &Entry, now: LeaseTime) -> bool {
        entry.is_not_found() && now.since(entry.loaded_at) >= self.cache.not_found_ttl
    }

    /// Whether policy allows old answers about this key.
    pub(crate) fn may_be_stale(&self, key: &KeyRecord) -> bool {
        self.policies.of_api(&key.api_id) == PartitionPolicy::ServeStale
    }

    /// The store's clock, as high as it may be: whatever ends, ends early rather than late.
    pub(crate) fn home_time(&self) -> StoreTime {
        self.knowledge.home_time_high()
    }
}

#[cfg(test)]
mod tests;
