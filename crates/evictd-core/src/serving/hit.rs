//! A verification that is answered from the cache: it reads clock, deadline, entry and floors, in
//! this order (R9).
//!
//! The follow task writes floors, evictions, `applied` and deadline, in that order. So a
//! verification that reads an extended deadline also sees the floors that were raised before it,
//! and doesn't find entries that were evicted before it.

use std::sync::Arc;
use std::time::Duration;

use super::{AgentState, CacheEntry, EntryCache};
use crate::entry::EntryState;
use crate::ids::KeyHash;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::LeaseTime;

/// What a verification reads before it looks up an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VerificationStart {
    pub(super) now: LeaseTime,
    pub(super) proven_at: LeaseTime,
    /// An entry that passes floors that are read later includes everything up to here.
    pub(super) applied: LogPosition,
}

impl VerificationStart {
    pub fn now(self) -> LeaseTime {
        self.now
    }

    pub fn proven_at(self) -> LeaseTime {
        self.proven_at
    }

    pub fn applied(self) -> LogPosition {
        self.applied
    }

    /// Looks up the entry of `hash`.
    pub fn find<C: EntryCache>(
        self,
        state: &AgentState,
        cache: &C,
        hash: &KeyHash,
    ) -> Option<Candidate<C::Entry>> {
        let entry = cache.get(hash)?;
        let early = (!Protection::DeadlinePrecedesFloors.holds())
            .then(|| entry.validity().state(self.now, self.now, &state.horizon, state.bound));
        Some(Candidate { start: self, entry, early })
    }
}

/// An entry that was found after the deadline was read, and is not judged yet.
#[derive(Debug)]
pub struct Candidate<E> {
    start: VerificationStart,
    entry: Arc<E>,
    /// The state when it was found; only in a negative control.
    early: Option<EntryState>,
}

impl<E> Clone for Candidate<E> {
    fn clone(&self) -> Self {
        Self { start: self.start, entry: self.entry.clone(), early: self.early }
    }
}

/// Whether an entry may be served.
#[derive(Debug)]
pub enum HitVerdict<E> {
    Servable(Hit<E>),
    /// It meets its floors, but both its read and the lease are too old.
    Stale {
        /// The policy `serve_stale` serves it all the same.
        hit: Hit<E>,
        /// The age of the newer one of read and proof.
        unproven_for: Duration,
    },
    /// It is below a floor, not shown yet, or expired by the cache's own rule.
    Void,
}

impl<E: CacheEntry> Candidate<E> {
    /// Reads the floors, and judges the entry by them.
    pub fn judge(self, state: &AgentState) -> HitVerdict<E> {
        let Self { start, entry, early } = self;
        let validity = entry.validity();
        let (now, read_at) = (start.now, validity.read_at);
        let entry_state = match early {
            None => validity.state(now, start.proven_at, &state.horizon, state.bound),
            Some(EntryState::Servable) if !state.bound.allows(now, read_at, state.proven_at()) => {
                EntryState::Stale
            }
            Some(early) => early,
        };
        let is_expired = entry.is_expired(now);
        let hit = Hit { start, entry };
        match entry_state {
            EntryState::Servable if is_expired => HitVerdict::Void,
            EntryState::Servable => HitVerdict::Servable(hit),
            EntryState::Stale => {
                HitVerdict::Stale { unproven_for: now.since(read_at.max(start.proven_at)), hit }
            }
            EntryState::Void => HitVerdict::Void,
        }
    }
}

/// An entry that meets its floors.
#[derive(Debug)]
pub struct Hit<E> {
    start: VerificationStart,
    entry: Arc<E>,
}

impl<E: CacheEntry> Hit<E> {
    /// The entry, for a reader that answers no client.
    pub fn entry(&self) -> &E {
        &self.entry
    }

    /// Notes the answer, advances the entry's validity, and returns the entry to answer from.
    pub fn answer(self, state: &AgentState) -> Arc<E> {
        let Self { start, entry } = self;
        entry.note_answer(start.now, start.applied);
        let applied =
            if Protection::AdvancesRestOnTheReading.holds() { start.applied } else { state.applied() };
        entry.validity().advance(applied);
        entry
    }
}

impl AgentState {
    /// Begins a verification at `now`.
    ///
    /// It reads the proof before `applied`. In the other order, it could read a proof whose head
    /// lies above that `applied`, and a load below the head would count as proven.
    pub fn begin(&self, now: LeaseTime) -> VerificationStart {
        if !Protection::ProofsPrecedeApplied.holds() {
            let applied = self.applied();
            return VerificationStart { now, proven_at: self.proven_at(), applied };
        }
        let proven_at = self.proven_at();
        VerificationStart { now, proven_at, applied: self.applied() }
    }
}
