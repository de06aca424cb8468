//! Copies and digests of a follower, for model checking.

use std::hash::{Hash, Hasher};

use super::Follower;
use crate::floors::fork::ForkMap;
use crate::time::LeaseTime;

impl Follower {
    /// Copies the follower, and returns the map that anchors copies of its entries.
    pub fn fork(&self) -> (Self, ForkMap) {
        let (floors, fork_map) = self.floors.fork();
        let follower = Self {
            config: self.config,
            followed_history: self.followed_history.clone(),
            tokens: self.tokens.clone(),
            floors,
            applied: self.applied,
            head: self.head,
            pending: self.pending.clone(),
            hole: self.hole,
            repairs: self.repairs.clone(),
            probes: self.probes.clone(),
            probe_due: self.probe_due,
            unanswered: self.unanswered,
            unproven: self.unproven.clone(),
            proven_at: self.proven_at,
            next_nonce: self.next_nonce,
        };
        (follower, fork_map)
    }

    /// Whether an answer to the request with this number counts.
    pub fn awaits(&self, nonce: u64) -> bool {
        self.open_requests().any(|open| open == nonce)
    }

    /// What the number of a request means: its rank among the open ones; otherwise how many were
    /// sent since.
    pub fn request_rank(&self, nonce: u64) -> (bool, u64) {
        if !self.awaits(nonce) {
            return (false, self.next_nonce.wrapping_sub(nonce));
        }
        (true, self.open_requests().filter(|open| *open > nonce).count() as u64)
    }

    fn open_requests(&self) -> impl Iterator<Item = u64> {
        self.probes.iter().map(|probe| probe.nonce).chain(self.repairs.iter().map(|repair| repair.nonce))
    }

    /// Hashes all that decides its behavior from `now` on, except its configuration, the numbers of
    /// its requests, the causes of its repairs, and whether the next request goes to all. Tokens of
    /// the log matter only to an agent that reads databases.
    pub fn digest(&self, now: LeaseTime, reads_databases: bool, state: &mut impl Hasher) {
        self.followed_history.clone().rebased(now).hash(state);
        if reads_databases {
            self.tokens.hash(state);
        }
        (&self.floors, self.applied, self.head, &self.pending).hash(state);
        // How long a request has been due doesn't matter.
        let hole = self.repair_due().map(|due| due.max(now));
        (hole, self.probe_due.max(now)).hash(state);
        for repair in &self.repairs {
            (self.request_rank(repair.nonce), repair.sent_at, repair.epoch, repair.from, repair.to)
                .hash(state);
        }
        for probe in &self.probes {
            (self.request_rank(probe.nonce), probe.sent_at, probe.seen).hash(state);
        }
        (self.repairs.len(), &self.unproven, self.proven_at).hash(state);
    }
}
