//! Copies of an agent's state, for checkers that follow one history into several futures.

use super::AgentState;
use crate::entry::Stamp;
use crate::floors::fork::Crossing;
use crate::sync::{AtomicU64, Mutex};

impl AgentState {
    /// A copy that shares nothing with the original, and the way over for its entries.
    pub fn fork(&self) -> (Self, Crossing) {
        let (follower, crossing) = self.follower.lock().fork();
        let copy = Self {
            horizon: follower.floors().horizon().clone(),
            follower: Mutex::new(follower),
            bound: self.bound,
            applied: AtomicU64::new(self.applied().to_bits()),
            proven_at: AtomicU64::new(self.proven_at().0),
        };
        (copy, crossing)
    }
}

impl Stamp {
    /// A copy that is anchored where `crossing` leads.
    #[must_use]
    pub fn fork(&self, crossing: &mut Crossing) -> Self {
        let copy = Self::new(self.as_of(), self.read_at, crossing.anchors(&self.anchors));
        if self.is_shown() {
            copy.show();
        }
        copy
    }
}
