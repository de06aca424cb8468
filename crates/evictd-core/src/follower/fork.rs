//! Copies of a follower, for checkers that follow one history into several futures.

use std::hash::{Hash, Hasher};

use super::Follower;
use crate::floors::fork::ForkMap;
use crate::time::LeaseTime;

impl Follower {
    /// A copy that shares nothing with the original, and the way over for the entries that are anchored to
    /// its floors.
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

    /// Whether an answer to the question with this number is still accepted.
    pub fn awaits(&self, nonce: u64) -> bool {
        self.open_questions().any(|open| open == nonce)
    }

    /// What the number of a question means: its place among those that an answer is still accepted to. Otherwise how many
    /// were asked since.
    pub fn question(&self, nonce: u64) -> (bool, u64) {
        if !self.awaits(nonce) {
            return (false, self.next_nonce.wrapping_sub(nonce));
        }
        (true, self.open_questions().filter(|open| *open > nonce).count() as u64)
    }

    fn open_questions(&self) -> impl Iterator<Item = u64> {
        self.probes.iter().map(|probe| probe.nonce).chain(self.repairs.iter().map(|repair| repair.nonce))
    }

    /// Hashes everything that decides what it will do from `now` on, but for its configuration, the numbers
    /// of its questions, the causes of its repairs, and whom it asks next. Tokens of the log decide only about what is
    /// read from a database.
    pub fn digest(&self, now: LeaseTime, reads_databases: bool, state: &mut impl Hasher) {
        self.followed_history.clone().rebased(now).hash(state);
        if reads_databases {
            self.tokens.hash(state);
        }
        (&self.floors, self.applied, self.head, &self.pending).hash(state);
        // What is due already is due at any later time.
        let hole = self.repair_due().map(|due| due.max(now));
        (hole, self.probe_due.max(now)).hash(state);
        for repair in &self.repairs {
            (self.question(repair.nonce), repair.sent_at, repair.epoch, repair.from, repair.to).hash(state);
        }
        for probe in &self.probes {
            (self.question(probe.nonce), probe.sent_at, probe.seen).hash(state);
        }
        (self.repairs.len(), &self.unproven, self.proven_at).hash(state);
    }
}
