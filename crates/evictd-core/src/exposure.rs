//! How long the old state was served after a change was committed (G5).
//!
//! Each entry keeps the time of its last answer ([`Answers`]). When a change is applied, the entry
//! that it evicts gives that time. But the entry that was served may be gone by then: replaced by a
//! load, evicted for room, or flushed. So each entry that leaves the cache hands its time on
//! ([`ExposureLog::record_evicted`]), and it is kept until a proof shows that every change from
//! before that time was applied.
//!
//! The entries of an API or a workspace are not looked at one by one. A [`Ring`] has their times.
//! Entries hold it as they hold their floors, so a hit looks nothing up, and writes a few words of
//! memory.
//!
//! The estimate is an upper one: the last answer is never later ([`AnswersAfter::at_least`] is the
//! lower one). Memory is bounded: when single keys are too many, or after a flush, the last answer
//! of any entry stands in for each.
//!
//! Two kinds of answers are missed: those that are given in the moment of the application or of a
//! flush, and those that lack a change below the position of a flush, because such changes are no
//! longer looked at.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::floors::ScopeId;
use crate::ids::{KeyHash, WorkspaceId};
use crate::invalidation::Scope;
use crate::limits::PAST_ANSWERS_MAX;
use crate::offset::{CommitWindow, DurationRange};
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::record::Record;
use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::time::LeaseTime;

/// How many seconds a ring distinguishes.
const SLOTS: usize = 32;

/// A ring's unit of time, in microseconds.
const SLOT_US: u64 = 1_000_000;

/// The unit of last answers, in microseconds. In each, an entry is written at most once.
const TICK_US: u64 = 1_000;

/// At so many rings, unused ones are dropped.
const RINGS_KEPT: usize = 1_024;

/// How many evicted entries of one key are distinguished.
const PAST_OF_A_KEY: usize = 4;

/// The bit that closes a [`LastAnswer`]; above all ticks.
const CLOSED: u64 = 1 << 63;

/// The end of the tick of the last answer.
#[derive(Debug)]
struct LastAnswer(AtomicU64);

impl LastAnswer {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Notes an answer, unless it is closed. Returns whether it did.
    fn note(&self, now: LeaseTime) -> bool {
        let tick = now.0 / TICK_US + 1;
        let noted = self.0.load(Ordering::Relaxed);
        if noted >= tick {
            return noted < CLOSED;
        }
        self.0.fetch_max(tick, Ordering::AcqRel) < CLOSED
    }

    /// Closes it, and returns the last answer, or `None` if it was closed before.
    fn close(&self) -> Option<LeaseTime> {
        let noted = self.0.fetch_or(CLOSED, Ordering::AcqRel);
        (noted < CLOSED).then(|| LeaseTime(noted * TICK_US))
    }

    /// The last answer came before this; the clock's start if there was none.
    fn before(&self) -> LeaseTime {
        LeaseTime((self.0.load(Ordering::Acquire) & !CLOSED) * TICK_US)
    }
}

/// How long the old state was served after the change was committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exposure {
    /// The last answer came at most so long after the commit; zero if there was none.
    pub last_after: Duration,
}

/// What an agent measured of one change, by its own clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApplyReport {
    pub position: LogPosition,
    /// From the commit to the application.
    pub lag: DurationRange,
    pub exposure: Exposure,
}

/// How long after a commit the last answer from the old state was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AnswersAfter {
    /// Zero if there was none.
    pub at_most: Duration,
    /// Of answers that are known to be of this change's key or scope.
    pub at_least: Duration,
}

impl AnswersAfter {
    /// Of a last answer in the tick that ends at `before`. `is_exact`: it was of this very key or
    /// scope.
    fn of_tick(before: LeaseTime, commit: CommitWindow, is_exact: bool) -> Self {
        let earliest = if is_exact { before.before(Duration::from_micros(TICK_US)) } else { LeaseTime(0) };
        Self { at_most: before.since(commit.earliest), at_least: earliest.since(commit.latest) }
    }

    fn max(self, other: Self) -> Self {
        Self { at_most: self.at_most.max(other.at_most), at_least: self.at_least.max(other.at_least) }
    }
}

/// The answers of one second from states ahead of `applied`.
#[derive(Debug)]
struct RingSlot {
    second: AtomicU64,
    /// The oldest state that was served.
    oldest: AtomicU64,
}

/// The answers of an API, or of a workspace's own records.
#[derive(Debug)]
struct Ring {
    /// From states at or below `applied`: they lack all changes that are applied later.
    applied: LastAnswer,
    /// From states ahead of `applied`: a load brings changes that haven't arrived here.
    ahead: LastAnswer,
    /// The log's.
    late: Arc<LastAnswer>,
    slots: [RingSlot; SLOTS],
    /// The end of the last slot that was overwritten.
    overwritten: AtomicU64,
}

impl Ring {
    fn new(late: Arc<LastAnswer>) -> Self {
        let slot = |_| RingSlot { second: AtomicU64::new(0), oldest: AtomicU64::new(u64::MAX) };
        Self {
            applied: LastAnswer::new(),
            ahead: LastAnswer::new(),
            late,
            slots: std::array::from_fn(slot),
            overwritten: AtomicU64::new(0),
        }
    }

    /// Notes an answer at `now` from a state as of `as_of`.
    fn note(&self, now: LeaseTime, as_of: LogPosition, applied: LogPosition) {
        if as_of <= applied {
            self.applied.note(now);
            return;
        }
        self.ahead.note(now);
        let second = now.0 / SLOT_US;
        let slot = &self.slots[second as usize % SLOTS];
        let seen = slot.second.load(Ordering::Acquire);
        if seen < second {
            self.overwritten.fetch_max((seen + 1) * SLOT_US, Ordering::AcqRel);
            // Of several threads that begin the slot at once, all but one go on below.
            slot.oldest.store(as_of.to_bits(), Ordering::Release);
            if slot.second.compare_exchange(seen, second, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
        if slot.oldest.load(Ordering::Relaxed) > as_of.to_bits() {
            slot.oldest.fetch_min(as_of.to_bits(), Ordering::AcqRel);
        }
    }

    /// The last answer came before this.
    fn last(&self) -> LeaseTime {
        self.applied.before().max(self.ahead.before())
    }

    /// The answers from before `position` since its commit.
    fn exposure(&self, position: LogPosition, commit: CommitWindow) -> AnswersAfter {
        let mut after = AnswersAfter::of_tick(self.applied.before(), commit, true);
        let last = self.ahead.before();
        for slot in &self.slots {
            let begins = LeaseTime(slot.second.load(Ordering::Acquire) * SLOT_US);
            if slot.oldest.load(Ordering::Acquire) < position.to_bits() {
                let ends = begins.after(Duration::from_micros(SLOT_US)).min(last);
                let at_most = ends.since(commit.earliest);
                after = after.max(AnswersAfter { at_most, at_least: begins.since(commit.latest) });
            }
        }
        let overwritten = LeaseTime(self.overwritten.load(Ordering::Acquire));
        after.max(AnswersAfter::of_tick(overwritten, commit, false))
    }
}

/// The answers of one entry.
#[derive(Debug)]
pub struct Answers {
    last: LastAnswer,
    ring: Arc<Ring>,
}

impl Answers {
    /// Notes an answer at `now` from a state as of `as_of`, by a verification that read `applied`
    /// before. Takes no lock, and allocates nothing.
    pub fn note(&self, now: LeaseTime, as_of: LogPosition, applied: LogPosition) {
        if !self.last.note(now) {
            self.ring.late.note(now);
        }
        self.ring.note(now, as_of, applied);
    }
}

/// One or several entries that left the cache.
#[derive(Clone, Copy, Debug)]
struct EvictedEntry {
    /// Of several, the oldest.
    as_of: LogPosition,
    /// Of several, the last.
    before: LeaseTime,
    is_exact: bool,
}

/// The answers from all entries that are or were cached.
#[derive(Debug)]
pub struct ExposureLog {
    state: Mutex<ExposureState>,
    /// From entries that had left the cache: by verifications that had found them, and by loads
    /// that weren't cached.
    late: Arc<LastAnswer>,
    /// Of "not found", which belongs to no API or workspace.
    absent: Arc<Ring>,
}

#[derive(Debug)]
struct ExposureState {
    /// Of the keys of each API, and of the root keys of each workspace; with the workspace.
    rings: HashMap<ScopeId, (WorkspaceId, Arc<Ring>)>,
    /// At so many, unused rings are dropped.
    rings_full_at: usize,
    /// The last answer of rings that were dropped.
    dropped: LeaseTime,
    /// The entries that left the cache, by key.
    past: HashMap<KeyHash, Vec<EvictedEntry>>,
    /// Before this, entries of any key may have been served that are not in `past`.
    any_key_before: LeaseTime,
    proven_at: LeaseTime,
}

impl Default for ExposureLog {
    fn default() -> Self {
        let state = ExposureState {
            rings: HashMap::new(),
            rings_full_at: RINGS_KEPT,
            dropped: LeaseTime(0),
            past: HashMap::new(),
            any_key_before: LeaseTime(0),
            proven_at: LeaseTime(0),
        };
        let late = Arc::new(LastAnswer::new());
        Self { state: Mutex::new(state), absent: Arc::new(Ring::new(late.clone())), late }
    }
}

impl ExposureLog {
    /// Returns the answers of a new entry for `record`.
    pub fn answers_of(&self, record: &Record) -> Answers {
        let ring = match record {
            Record::Absent => self.absent.clone(),
            Record::Key(key) => self.ring(ScopeId::Api(key.api_id.clone()), &key.workspace_id),
            Record::RootKey(root) => {
                self.ring(ScopeId::Workspace(root.workspace_id.clone()), &root.workspace_id)
            }
        };
        Answers { last: LastAnswer::new(), ring }
    }

    fn ring(&self, id: ScopeId, workspace: &WorkspaceId) -> Arc<Ring> {
        self.state.lock().ring(id, workspace, &self.late)
    }

    /// An entry as of `as_of` has left the cache.
    pub fn record_evicted(&self, hash: &KeyHash, as_of: LogPosition, answers: &Answers) {
        if !Protection::AnswersAreHandedOn.holds() {
            return;
        }
        // Later answers from it go to `late`.
        if let Some(before) = answers.last.close() {
            self.state.lock().record_evicted(hash, EvictedEntry { as_of, before, is_exact: true });
        }
    }

    /// The cache is about to be cleared, without a call of [`Self::record_evicted`] for each entry.
    pub fn flushed(&self) {
        let mut state = self.state.lock();
        let last = state.rings.values().map(|(_, ring)| ring.last()).fold(self.absent.last(), LeaseTime::max);
        state.any_key_before = state.any_key_before.max(state.dropped).max(last);
    }

    /// The agent is proven complete as of `at`: every change that was committed before is applied.
    pub fn proven(&self, at: LeaseTime) {
        let mut state = self.state.lock();
        state.proven_at = state.proven_at.max(at);
        state.drop_proven();
    }

    /// Returns the answers that lacked a change that is applied now. `evicted` is the entry that it
    /// evicted, and its `as_of`. The work grows with the number of APIs, not with that of entries.
    pub fn exposure(
        &self,
        scope: &Scope,
        position: LogPosition,
        commit: CommitWindow,
        evicted: Option<(&Answers, LogPosition)>,
    ) -> AnswersAfter {
        let state = self.state.lock();
        match scope {
            Scope::Key { hash, .. } => {
                let evicted = evicted.map(|(answers, as_of)| {
                    let before = answers.last.before();
                    EvictedEntry { as_of, before, is_exact: true }
                });
                let past = state.past.get(hash).into_iter().flatten().copied();
                // An entry that was loaded since the commit includes the change.
                past.chain(evicted)
                    .filter(|past| past.as_of < position)
                    .map(|past| AnswersAfter::of_tick(past.before, commit, past.is_exact))
                    .fold(
                        AnswersAfter::of_tick(state.any_key_before.max(self.late.before()), commit, false),
                        AnswersAfter::max,
                    )
            }
            Scope::Api(id) => {
                let scope = ScopeId::Api(id.clone());
                state.of_rings(|id, _| *id == scope, position, commit)
            }
            Scope::Workspace(id) => state.of_rings(|_, workspace| workspace == id, position, commit),
            Scope::All => {
                let all = state.of_rings(|_, _| true, position, commit);
                all.max(self.absent.exposure(position, commit))
            }
        }
    }
}

impl ExposureState {
    fn ring(&mut self, id: ScopeId, workspace: &WorkspaceId, late: &Arc<LastAnswer>) -> Arc<Ring> {
        self.make_room_for_rings();
        let new = || (workspace.clone(), Arc::new(Ring::new(late.clone())));
        self.rings.entry(id).or_insert_with(new).1.clone()
    }

    /// Now and then, drops rings that no entry holds, so that there are at most about twice as many
    /// as are in use.
    fn make_room_for_rings(&mut self) {
        if self.rings.len() < self.rings_full_at {
            return;
        }
        self.rings.retain(|_, (_, ring)| {
            let is_held = Arc::strong_count(ring) > 1;
            if !is_held {
                self.dropped = self.dropped.max(ring.last());
            }
            is_held
        });
        self.rings_full_at = RINGS_KEPT.max(2 * self.rings.len());
    }

    fn of_rings(
        &self,
        is_in_scope: impl Fn(&ScopeId, &WorkspaceId) -> bool,
        position: LogPosition,
        commit: CommitWindow,
    ) -> AnswersAfter {
        let rings = self.rings.iter().filter(|(id, (workspace, _))| is_in_scope(id, workspace));
        let dropped = AnswersAfter::of_tick(self.dropped, commit, false);
        rings.map(|(_, (_, ring))| ring.exposure(position, commit)).fold(dropped, AnswersAfter::max)
    }

    fn record_evicted(&mut self, hash: &KeyHash, new: EvictedEntry) {
        if new.before <= self.proven_at {
            return;
        }
        if self.past.len() >= PAST_ANSWERS_MAX && !self.past.contains_key(hash) {
            self.drop_proven();
            if self.past.len() * 2 > PAST_ANSWERS_MAX {
                let all = self.past.drain().flat_map(|(_, past)| past).map(|past| past.before);
                self.any_key_before = all.fold(self.any_key_before, LeaseTime::max);
            }
        }
        let past = self.past.entry(*hash).or_default();
        if past.len() < PAST_OF_A_KEY {
            past.push(new);
        } else if let Some(last) = past.last_mut() {
            *last = EvictedEntry {
                as_of: last.as_of.min(new.as_of),
                before: last.before.max(new.before),
                is_exact: false,
            };
        }
    }

    /// Drops answers from before the proof: every change that they lacked is applied.
    fn drop_proven(&mut self) {
        let proven_at = self.proven_at;
        self.past.retain(|_, past| {
            past.retain(|past| past.before > proven_at);
            !past.is_empty()
        });
    }
}

#[cfg(test)]
mod tests;
