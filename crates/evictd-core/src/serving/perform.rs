//! What the follower's effects do to the cache and to what verifications read (R9).
//!
//! The follower gives them in their order: floors were raised already, then come evictions, `applied`, the
//! deadline, the announcement. The shell performs one after the other, and adds its messages and metrics.

use std::sync::Arc;

use super::{AgentState, EntryCache};
use crate::follower::{Effect, evicted_key};
use crate::sync::Ordering;

impl AgentState {
    /// Performs one effect, and returns what it evicted.
    pub fn perform<C: EntryCache>(&self, effect: &Effect, cache: &C) -> Option<Arc<C::Entry>> {
        match effect {
            Effect::Applied { invalidation, .. } => {
                return evicted_key(&invalidation.scope).and_then(|hash| cache.evict(hash));
            }
            Effect::Flush(_) => cache.clear(),
            Effect::Progress { applied, .. } => self.applied.store(applied.to_bits(), Ordering::Release),
            Effect::Proven(at) => {
                self.proven_at.fetch_max(at.0, Ordering::AcqRel);
            }
            // An announcement is of what was published, so of nothing that isn't evicted yet.
            Effect::FloorsMerged(_)
            | Effect::Rival(_)
            | Effect::Announce
            | Effect::SendProbe { .. }
            | Effect::SendReplay { .. } => {}
        }
        None
    }
}
