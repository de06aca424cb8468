//! A load: its entry is inserted hidden, checked, then shown (R9). And which verifications it
//! answers (R10).
//!
//! An invalidation raises floors before it evicts. The check follows the insertion. So either the
//! check sees the floor, or the eviction finds the entry.

use std::sync::Arc;

use super::{AgentState, CacheEntry, EntryCache, VerificationStart};
use crate::entry::Validity;
use crate::follower::{Effect, LoadSource};
use crate::ids::KeyHash;
use crate::lease::Bound;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::record::Record;
use crate::time::LeaseTime;

/// What is known of a loaded record.
#[derive(Clone, Copy, Debug)]
pub struct LoadAnswer {
    pub hash: KeyHash,
    pub source: LoadSource,
    /// The record includes every change up to here.
    pub as_of: LogPosition,
    /// When the load was sent, less the age of the authority's last fence (R8).
    pub read_at: LeaseTime,
    /// When the load was sent, not later.
    pub sent_at: LeaseTime,
}

/// An entry that is anchored to its floors, and not cached yet.
#[derive(Debug)]
pub struct LoadedEntry<E> {
    answer: LoadAnswer,
    entry: Arc<E>,
    /// The result of a check before the insertion; only in a negative control.
    early: Option<bool>,
}

/// An entry that is cached and hidden.
#[derive(Debug)]
pub struct InsertedEntry<E>(LoadedEntry<E>);

/// An entry that was checked: cached and shown, or evicted again.
#[derive(Debug)]
pub struct SettledEntry<E> {
    answer: LoadAnswer,
    entry: Arc<E>,
    is_admitted: bool,
}

impl<E> Clone for SettledEntry<E> {
    fn clone(&self) -> Self {
        Self { answer: self.answer, entry: self.entry.clone(), is_admitted: self.is_admitted }
    }
}

impl<E: CacheEntry> LoadedEntry<E> {
    /// Anchors a record to its floors. `new_entry` turns it into an entry.
    pub fn new(
        state: &AgentState,
        answer: LoadAnswer,
        record: Record,
        effects: &mut Vec<Effect>,
        new_entry: impl FnOnce(Record, Validity) -> E,
    ) -> Self {
        let anchors = state.follower.lock().anchors(&record, effects);
        let entry = Arc::new(new_entry(record, Validity::new(answer.as_of, answer.read_at, anchors)));
        let mut loaded = Self { answer, entry, early: None };
        if !Protection::ChecksFollowInsertions.holds() {
            loaded.early = Some(loaded.meets_floors(state));
        }
        loaded
    }

    /// The entry, for a reader that answers no client.
    pub fn entry(&self) -> &Arc<E> {
        &self.entry
    }

    /// Inserts the entry into the cache. No verification is answered from it yet.
    pub fn insert(self, cache: &impl EntryCache<Entry = E>) -> InsertedEntry<E> {
        if !Protection::EntriesAppearChecked.holds() {
            self.entry.validity().show();
        }
        cache.insert_hidden(self.answer.hash, self.entry.clone());
        InsertedEntry(self)
    }

    fn meets_floors(&self, state: &AgentState) -> bool {
        let LoadAnswer { hash, source, as_of, .. } = self.answer;
        state.follower.lock().admits(&hash, &self.entry.validity().anchors, source, as_of)
    }
}

impl<E: CacheEntry> InsertedEntry<E> {
    /// Reads the floors, and shows the entry or evicts it.
    pub fn settle(self, state: &AgentState, cache: &impl EntryCache<Entry = E>) -> SettledEntry<E> {
        let Self(loaded) = self;
        let is_admitted = loaded.early.unwrap_or_else(|| loaded.meets_floors(state));
        let LoadedEntry { answer, entry, .. } = loaded;
        if is_admitted {
            entry.validity().show();
        } else {
            cache.evict(&answer.hash);
        }
        SettledEntry { answer, entry, is_admitted }
    }
}

impl<E: CacheEntry> SettledEntry<E> {
    pub fn is_admitted(&self) -> bool {
        self.is_admitted
    }

    /// The entry, for a reader that answers no client.
    pub fn entry(&self) -> &Arc<E> {
        &self.entry
    }

    /// Returns the entry if it may answer, at `now`, a verification that waited for it (R8, R10).
    pub fn answer(&self, state: &AgentState, began: VerificationStart, now: LeaseTime) -> Option<Arc<E>> {
        let LoadAnswer { hash, source, as_of, sent_at, .. } = self.answer;
        let look = || {
            let follower = state.follower.lock();
            (follower.floor(&hash, &self.entry.validity().anchors), follower.accepts(source, as_of))
        };
        // The proof before the floors, as everywhere (R9). And the floors of now, not of the check:
        // a floor that rose in between may belong to a change that was confirmed before this
        // verification began, if it joined last.
        let (proven_at, (floor, is_accepted)) = if Protection::DeadlinePrecedesFloors.holds() {
            let proven_at = state.proven_at();
            (proven_at, look())
        } else {
            let seen = look();
            (state.proven_at(), seen)
        };
        // The present proof doesn't cover a load that is older than a floor.
        let proof = if as_of >= floor { proven_at } else { began.proven_at };
        let may_answer = is_accepted
            && state.may_share(sent_at, began)
            && answers(as_of, floor, began.applied)
            && !state.has_ended()
            && state.bound.allows(now, self.entry.validity().read_at, proof);
        may_answer.then(|| {
            self.entry.note_answer(now, began.applied);
            self.entry.clone()
        })
    }
}

impl AgentState {
    /// Whether a verification may share a load that was sent at `sent_at` (R10).
    pub fn may_share(&self, sent_at: LeaseTime, began: VerificationStart) -> bool {
        may_share(self.bound, sent_at, began)
    }
}

/// Whether a load answers a verification that joined it when `joined` was applied here (R10).
///
/// `floor` is the highest floor of its scopes now. The load need not meet floors that rose after
/// the verification began, because the answer could as well have come before. It must include what
/// was confirmed before.
fn answers(as_of: LogPosition, floor: LogPosition, joined: LogPosition) -> bool {
    as_of >= floor.min(joined) || !Protection::AnswersMeetWhatWasApplied.holds()
}

/// Whether a verification may share a load that was sent at `sent_at` (R10, R12).
///
/// A verification that began after the load was sent may share it only while a lease runs. Receipts
/// don't wait for an agent without a lease, so a read from before the verification may be older
/// than a final receipt allows.
fn may_share(bound: Bound, sent_at: LeaseTime, began: VerificationStart) -> bool {
    sent_at >= began.now
        || !bound.remaining(began.now, began.proven_at).is_zero()
        || !Protection::LoadsAreSharedUnderALease.holds()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SECOND: u64 = 1_000_000;

    #[test]
    fn load_is_shared_with_later_verifications_under_a_lease() {
        let joins = |sent, began, proven| {
            let at = |second| LeaseTime(second * SECOND);
            let (now, proven_at) = (at(began), at(proven));
            let start = VerificationStart { now, proven_at, applied: LogPosition::ZERO };
            let bound = Bound::new(Duration::from_secs(30), Duration::from_secs(3)).unwrap();
            may_share(bound, at(sent), start)
        };
        assert!(joins(100, 101, 90), "a lease runs");
        assert!(!joins(100, 101, 0), "receipts don't wait for this agent");
        assert!(joins(101, 101, 0), "sent after the verification began");
    }

    #[test]
    fn load_answers_verifications_from_before_the_floor_rose() {
        let at = |position| LogPosition::new(1, position).unwrap();
        assert!(answers(at(4), at(5), at(4)), "the floor rose to 5 after the verification began");
        assert!(!answers(at(4), at(5), at(5)), "5 was confirmed before the verification began");
        assert!(answers(at(5), at(5), at(9)));
    }
}
