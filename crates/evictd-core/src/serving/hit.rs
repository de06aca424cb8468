//! A verification that is answered from the cache: clock, deadline, entry, floors, in this order (R9).
//!
//! The follow task writes floors, eviction, `applied` and deadline in that one. So a verification that reads an
//! extended deadline reads the floors that were raised before it, and doesn't find what was evicted before it.

use std::sync::Arc;
use std::time::Duration;

use super::{AgentState, CacheEntry, EntryCache};
use crate::entry::EntryState;
use crate::ids::KeyHash;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::LeaseTime;

/// What a verification reads before it looks for an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VerificationStart {
    /// The lease clock.
    now: LeaseTime,
    /// Since when nothing could have been missed.
    proven_at: LeaseTime,
    /// What was applied; so it is in what passes the floors that are read later.
    applied: LogPosition,
}

impl VerificationStart {
    /// The lease clock when the verification began.
    pub fn now(self) -> LeaseTime {
        self.now
    }

    /// Since when nothing could have been missed.
    pub fn proven_at(self) -> LeaseTime {
        self.proven_at
    }

    /// What was applied.
    pub fn applied(self) -> LogPosition {
        self.applied
    }

    /// Looks for the entry of `hash`.
    pub fn find<C: EntryCache>(
        self,
        state: &AgentState,
        cache: &C,
        hash: &KeyHash,
    ) -> Option<Candidate<C::Entry>> {
        let entry = cache.get(hash)?;
        let early = (!Protection::DeadlinePrecedesFloors.holds())
            .then(|| entry.validity().state(self.now, self.now, &state.horizon, state.bound));
        Some(Candidate { reading: self, entry, early })
    }
}

/// An entry that was found after the deadline was read, and is still to be judged.
#[derive(Debug)]
pub struct Candidate<E> {
    reading: VerificationStart,
    entry: Arc<E>,
    /// How the floors stood when it was found; only as a negative control.
    early: Option<EntryState>,
}

impl<E> Clone for Candidate<E> {
    fn clone(&self) -> Self {
        Self { reading: self.reading, entry: self.entry.clone(), early: self.early }
    }
}

/// Whether an entry may be answered from.
#[derive(Debug)]
pub enum HitVerdict<E> {
    /// It may.
    Servable(Hit<E>),
    /// It meets every floor that is known, but nothing vouches for it any more.
    Stale {
        /// It may be answered from where policy prefers old answers to none.
        hit: Hit<E>,
        /// How long ago something vouched for it.
        unproven_for: Duration,
    },
    /// Something that it depends on has changed since, or it isn't shown yet, or the cache's own rule ends it.
    Void,
}

impl<E: CacheEntry> Candidate<E> {
    /// Looks at the floors, and judges.
    pub fn judge(self, state: &AgentState) -> HitVerdict<E> {
        let Self { reading, entry, early } = self;
        let validity = entry.validity();
        let (now, read_at) = (reading.now, validity.read_at);
        let entry_state = match early {
            None => validity.state(now, reading.proven_at, &state.horizon, state.bound),
            Some(EntryState::Servable) if !state.bound.allows(now, read_at, state.proven_at()) => {
                EntryState::Stale
            }
            Some(early) => early,
        };
        let is_expired = entry.is_expired(now);
        let hit = Hit { reading, entry };
        match entry_state {
            EntryState::Servable if is_expired => HitVerdict::Void,
            EntryState::Servable => HitVerdict::Servable(hit),
            EntryState::Stale => {
                HitVerdict::Stale { unproven_for: now.since(read_at.max(reading.proven_at)), hit }
            }
            EntryState::Void => HitVerdict::Void,
        }
    }
}

/// An entry that meets all its floors.
#[derive(Debug)]
pub struct Hit<E> {
    reading: VerificationStart,
    entry: Arc<E>,
}

impl<E: CacheEntry> Hit<E> {
    /// The entry, for a look that answers no client.
    pub fn entry(&self) -> &E {
        &self.entry
    }

    /// The entry, to answer from. What was applied before the floors were read is in it too (R6), so entries in
    /// use outlive the horizon.
    pub fn answer(self, state: &AgentState) -> Arc<E> {
        let Self { reading, entry } = self;
        entry.note_answer(reading.now, reading.applied);
        let applied =
            if Protection::AdvancesRestOnTheReading.holds() { reading.applied } else { state.applied() };
        entry.validity().advance(applied);
        entry
    }
}

impl AgentState {
    /// What a verification that begins at `now` builds on.
    ///
    /// The proof is read before `applied`: the other way round, a proof could be read whose head isn't in that
    /// `applied`, and a load below it would pass for proven.
    pub fn begin(&self, now: LeaseTime) -> VerificationStart {
        if !Protection::ProofsPrecedeApplied.holds() {
            let applied = self.applied();
            return VerificationStart { now, proven_at: self.proven_at(), applied };
        }
        let proven_at = self.proven_at();
        VerificationStart { now, proven_at, applied: self.applied() }
    }
}
