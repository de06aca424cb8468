//! Copies of an agent's state, for model checking.

use super::AgentState;
use crate::entry::Validity;
use crate::floors::fork::ForkMap;
use crate::sync::{AtomicU64, Mutex};

impl AgentState {
    /// Copies the state, and returns the map that anchors copies of its entries.
    pub fn fork(&self) -> (Self, ForkMap) {
        let (follower, fork_map) = self.follower.lock().fork();
        let copy = Self {
            horizon: follower.floors().horizon().clone(),
            follower: Mutex::new(follower),
            bound: self.bound,
            applied: AtomicU64::new(self.applied().to_bits()),
            proven_at: AtomicU64::new(self.proven_at().0),
        };
        (copy, fork_map)
    }
}

impl Validity {
    /// Copies it, anchored to the copies of its floors.
    #[must_use]
    pub fn fork(&self, fork_map: &mut ForkMap) -> Self {
        let copy = Self::new(self.as_of(), self.read_at, fork_map.anchors(&self.anchors));
        if self.is_shown() {
            copy.show();
        }
        copy
    }
}
