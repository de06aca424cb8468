//! The hot path: what a hash stands for, as of now.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::KeyHash;
use evictd_core::record::KeyRecord;
use evictd_core::roster::PartitionPolicy;
use evictd_core::serving::{HitVerdict, VerificationStart};
use evictd_core::time::StoreTime;

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
            Ok(entry) => Ok(Found { entry, stale: None }),
            Err(LoadError::Unreachable) => self.stale_fallback(&hash).ok_or(LoadError::Unreachable),
            Err(error) => Err(error),
        }
    }

    fn cached(&self, hash: &KeyHash, reading: VerificationStart) -> Option<Arc<Entry>> {
        let candidate = reading.find(&self.knowledge, &*self.cache, hash)?;
        match candidate.judge(&self.knowledge) {
            HitVerdict::Servable(hit) => Some(hit.answer(&self.knowledge)),
            HitVerdict::Stale { .. } | HitVerdict::Void => None,
        }
    }

    /// What is cached and old, if that is better than nothing for its API. What something is known to have
    /// changed is void, and never answered from (G2).
    fn stale_fallback(&self, hash: &KeyHash) -> Option<Found> {
        let candidate = self.knowledge.begin().find(&self.knowledge, &*self.cache, hash)?;
        let (hit, stale) = match candidate.judge(&self.knowledge) {
            // A publisher vouched for it while none answered.
            HitVerdict::Servable(hit) => (hit, None),
            HitVerdict::Stale { hit, unproven_for }
                if self.policies.of(&hit.entry().record) == PartitionPolicy::ServeStale =>
            {
                (hit, Some(unproven_for))
            }
            HitVerdict::Stale { .. } | HitVerdict::Void => return None,
        };
        Some(Found { entry: hit.answer(&self.knowledge), stale })
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
