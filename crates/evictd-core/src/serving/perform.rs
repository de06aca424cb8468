//! What the follower's effects do to the cache and to the state that verifications read (R9).
//!
//! The follower returns them in their order: floors are raised already, then come evictions,
//! `applied`, the deadline, and the announcement. The agent performs one after another, and adds
//! its messages and metrics.

use std::sync::Arc;

use super::{AgentState, EntryCache};
use crate::follower::Effect;
use crate::sync::Ordering;

impl AgentState {
    /// Performs one effect, and returns what it evicted.
    pub fn perform<C: EntryCache>(&self, effect: &Effect, cache: &C) -> Option<Arc<C::Entry>> {
        match effect {
            Effect::Applied { invalidation, .. } => {
                return invalidation.scope.evicted_key().and_then(|hash| cache.evict(hash));
            }
            Effect::Flush(_) => cache.clear(),
            Effect::Progress { applied, .. } => self.applied.store(applied.to_bits(), Ordering::Release),
            Effect::Proven(at) => {
                self.proven_at.fetch_max(at.0, Ordering::AcqRel);
            }
            // The agent performs these, or counts them.
            Effect::FloorsMerged(_)
            | Effect::Rival(_)
            | Effect::Announce
            | Effect::SendProbe { .. }
            | Effect::SendReplay { .. } => {}
        }
        None
    }
}
