//! The hot path: the record behind a hash.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::KeyHash;
use evictd_core::record::KeyRecord;
use evictd_core::roster::PartitionPolicy;
use evictd_core::serving::{HitVerdict, VerificationStart};
use evictd_core::time::StoreTime;

use crate::cache::{CachedRecord, RecordCache};
use crate::loads::Loads;
use crate::metrics::AgentMetrics;
use crate::origin::LoadError;
use crate::policy::Policies;
use crate::serving::ServingState;

/// A record for an answer.
#[derive(Clone, Debug)]
pub(crate) struct FoundRecord {
    pub(crate) entry: Arc<CachedRecord>,
    /// The time since its last proof, if that is too long and policy permits the answer.
    pub(crate) stale: Option<Duration>,
}

/// Finds records in the cache, and loads missing ones.
#[derive(Clone, Debug)]
pub(crate) struct Verifier {
    serving: Arc<ServingState>,
    cache: Arc<RecordCache>,
    loads: Loads,
    policies: Arc<Policies>,
    pub(crate) metrics: Arc<AgentMetrics>,
}

impl Verifier {
    pub(crate) fn new(
        serving: Arc<ServingState>,
        cache: Arc<RecordCache>,
        loads: Loads,
        policies: Arc<Policies>,
        metrics: Arc<AgentMetrics>,
    ) -> Self {
        Self { serving, cache, loads, policies, metrics }
    }

    /// Returns a record for an answer: cached, or loaded now. If no publisher answers, it may be stale where policy
    /// permits that.
    pub(crate) async fn entry(&self, hash: KeyHash) -> Result<FoundRecord, LoadError> {
        let began = self.serving.begin();
        if let Some(entry) = self.cached(&hash, began) {
            self.metrics.hits.increment(1);
            return Ok(FoundRecord { entry, stale: None });
        }
        self.metrics.misses.increment(1);
        match self.loads.load(hash, began).await {
            Ok(entry) => Ok(FoundRecord { entry, stale: None }),
            Err(LoadError::Unreachable) => self.stale_fallback(&hash).ok_or(LoadError::Unreachable),
            Err(error) => Err(error),
        }
    }

    fn cached(&self, hash: &KeyHash, reading: VerificationStart) -> Option<Arc<CachedRecord>> {
        let candidate = reading.find(&self.serving, &*self.cache, hash)?;
        match candidate.judge(&self.serving) {
            HitVerdict::Servable(hit) => Some(hit.answer(&self.serving)),
            HitVerdict::Stale { .. } | HitVerdict::Void => None,
        }
    }

    /// Returns the cached record although its proof is too old, if policy permits that. A record below a floor is
    /// void, and never returned (G2).
    fn stale_fallback(&self, hash: &KeyHash) -> Option<FoundRecord> {
        let candidate = self.serving.begin().find(&self.serving, &*self.cache, hash)?;
        let (hit, stale) = match candidate.judge(&self.serving) {
            // A proof arrived while the load failed.
            HitVerdict::Servable(hit) => (hit, None),
            HitVerdict::Stale { hit, unproven_for }
                if self.policies.of(&hit.entry().record) == PartitionPolicy::ServeStale =>
            {
                (hit, Some(unproven_for))
            }
            HitVerdict::Stale { .. } | HitVerdict::Void => return None,
        };
        Some(FoundRecord { entry: hit.answer(&self.serving), stale })
    }

    /// Whether policy permits stale answers about this key.
    pub(crate) fn may_be_stale(&self, key: &KeyRecord) -> bool {
        self.policies.of_api(&key.api_id) == PartitionPolicy::ServeStale
    }

    /// Returns the highest possible time on the store's clock, so that a key expires early rather than late.
    pub(crate) fn home_time(&self) -> StoreTime {
        self.serving.home_time_high()
    }
}

#[cfg(test)]
mod tests;
