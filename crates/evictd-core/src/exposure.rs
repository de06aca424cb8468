//! Until when the old state was answered from after a change was committed (G5).
//!
//! Every entry has the time of its last answer ([`Answers`]). When a change is applied, the entry that it evicts
//! gives that time. But what was answered from may be gone by then: replaced by a load, pushed out by others,
//! flushed. So whatever leaves the cache hands its time on ([`ExposureLog::record_evicted`]), until a proof shows that
//! every change of before that time has been applied here. Of an API or a workspace, whose entries aren't looked at
//! one by one, a [`Ring`] has the times; entries hold it like their floors, so a hit looks nothing up and writes
//! a few words of memory.
//!
//! Told is an upper estimate, never less than what was answered ([`AnswersAfter::at_least`] alone is a lower one).
//! Memory is bounded: where single keys are too many to remember, or all are flushed, the last answer of any
//! stands in for that of each. What is missed are answers that are on their way in the very moment of the
//! application or of a flush, and what a flush covers, since no change below its position is looked at any more.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::ids::{ApiId, KeyHash, WorkspaceId};
use crate::invalidation::Scope;
use crate::limits::PAST_ANSWERS_MAX;
use crate::offset::{CommitWindow, DurationRange};
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::record::Record;
use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::time::LeaseTime;

/// Seconds of which a ring tells apart what was answered from.
const SLOTS: usize = 32;

/// A ring's unit of time, in microseconds.
const SLOT_US: u64 = 1_000_000;

/// The unit in which last answers are remembered, in microseconds: an entry is written once in it, however
/// often it is answered from.
const TICK_US: u64 = 1_000;

/// Rings that are kept before unused ones are dropped.
const RINGS_KEPT: usize = 1_024;

/// Past entries of one key that are told apart.
const PAST_OF_A_KEY: usize = 4;

/// Above all ticks: nothing is noted there any more.
const CLOSED: u64 = 1 << 63;

/// When something was last answered from: the end of the tick, so it was before.
#[derive(Debug)]
struct LastAnswer(AtomicU64);

impl LastAnswer {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Returns whether it is noted: not after [`Self::close`].
    fn note(&self, now: LeaseTime) -> bool {
        let tick = now.0 / TICK_US + 1;
        let noted = self.0.load(Ordering::Relaxed);
        if noted >= tick {
            return noted < CLOSED;
        }
        self.0.fetch_max(tick, Ordering::AcqRel) < CLOSED
    }

    /// Ends it, and returns what was noted, or `None` if it was ended before.
    fn close(&self) -> Option<LeaseTime> {
        let noted = self.0.fetch_or(CLOSED, Ordering::AcqRel);
        (noted < CLOSED).then(|| LeaseTime(noted * TICK_US))
    }

    /// Not later than this; the clock's start if never.
    fn before(&self) -> LeaseTime {
        LeaseTime((self.0.load(Ordering::Acquire) & !CLOSED) * TICK_US)
    }
}

/// How long the old state was answered from after the change was committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Exposure {
    /// So long after the commit, at most, the last of them was given; zero if there was none.
    pub last_after: Duration,
}

/// What an agent saw of one change, by its own clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApplyReport {
    /// Which change.
    pub position: LogPosition,
    /// From its commit to its application.
    pub lag: DurationRange,
    /// What was answered meanwhile.
    pub exposure: Exposure,
}

/// How long after a commit the last answer was given from before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AnswersAfter {
    /// At most; zero if there was none.
    pub at_most: Duration,
    /// At least, of what is known to be this change's.
    pub at_least: Duration,
}

impl AnswersAfter {
    /// The last answer was given in the tick that ends then; if that is known of this very key or scope.
    fn of_tick(before: LeaseTime, commit: CommitWindow, is_exact: bool) -> Self {
        let earliest = if is_exact { before.before(Duration::from_micros(TICK_US)) } else { LeaseTime(0) };
        Self { at_most: before.since(commit.earliest), at_least: earliest.since(commit.latest) }
    }

    fn max(self, other: Self) -> Self {
        Self { at_most: self.at_most.max(other.at_most), at_least: self.at_least.max(other.at_least) }
    }
}

/// The answers of one second from states that were ahead of what was applied.
#[derive(Debug)]
struct RingSlot {
    /// Which second.
    second: AtomicU64,
    /// The oldest state that was answered from.
    oldest: AtomicU64,
}

/// The answers of an API, or of a workspace's own records.
#[derive(Debug)]
struct Ring {
    /// From states of what was applied, or older: they lack whatever is applied later.
    applied: LastAnswer,
    /// From states ahead of that: a load brings changes that haven't arrived here.
    ahead: LastAnswer,
    /// That of its log.
    late: Arc<LastAnswer>,
    slots: [RingSlot; SLOTS],
    /// The end of the last slot that was written over.
    forgotten: AtomicU64,
}

impl Ring {
    fn new(late: Arc<LastAnswer>) -> Self {
        let slot = |_| RingSlot { second: AtomicU64::new(0), oldest: AtomicU64::new(u64::MAX) };
        Self {
            applied: LastAnswer::new(),
            ahead: LastAnswer::new(),
            late,
            slots: std::array::from_fn(slot),
            forgotten: AtomicU64::new(0),
        }
    }

    /// An answer at `now` from a state as of `as_of`, when `applied` was applied.
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
            self.forgotten.fetch_max((seen + 1) * SLOT_US, Ordering::AcqRel);
            // Of several that begin it at once, all but one add themselves below.
            slot.oldest.store(as_of.to_bits(), Ordering::Release);
            if slot.second.compare_exchange(seen, second, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
        if slot.oldest.load(Ordering::Relaxed) > as_of.to_bits() {
            slot.oldest.fetch_min(as_of.to_bits(), Ordering::AcqRel);
        }
    }

    /// Not later than this.
    fn last(&self) -> LeaseTime {
        self.applied.before().max(self.ahead.before())
    }

    /// What was answered from before `position` since its commit.
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
        let forgotten = LeaseTime(self.forgotten.load(Ordering::Acquire));
        after.max(AnswersAfter::of_tick(forgotten, commit, false))
    }
}

/// An entry's part: when it was answered from, and where else that is noted.
#[derive(Debug)]
pub struct Answers {
    last: LastAnswer,
    ring: Arc<Ring>,
}

impl Answers {
    /// An answer at `now` from a state as of `as_of`, by a verification that read `applied` before. No lock, no
    /// allocation.
    pub fn note(&self, now: LeaseTime, as_of: LogPosition, applied: LogPosition) {
        if !self.last.note(now) {
            self.ring.late.note(now);
        }
        self.ring.note(now, as_of, applied);
    }
}

/// An entry that is gone, or several.
#[derive(Clone, Copy, Debug)]
struct EvictedEntry {
    /// Of several, the oldest.
    as_of: LogPosition,
    /// Of several, the last.
    before: LeaseTime,
    is_exact: bool,
}

/// The answers from everything that is or was cached.
#[derive(Debug)]
pub struct ExposureLog {
    kept: Mutex<ExposureState>,
    /// From entries that had left the cache: by verifications on their way, and by loads that weren't cached.
    late: Arc<LastAnswer>,
    /// Of what was not found, which belongs to nobody.
    absent: Arc<Ring>,
}

#[derive(Debug)]
struct ExposureState {
    apis: HashMap<ApiId, (WorkspaceId, Arc<Ring>)>,
    /// Of root keys.
    workspaces: HashMap<WorkspaceId, Arc<Ring>>,
    /// At so many, unused ones are dropped.
    rings_full_at: usize,
    /// The last answer of rings that were dropped.
    dropped: LeaseTime,
    /// By key, the entries that are gone.
    past: HashMap<KeyHash, Vec<EvictedEntry>>,
    /// Until then, any key may have been answered from entries that are not in `past`.
    given_up: LeaseTime,
    proven_at: LeaseTime,
}

impl Default for ExposureLog {
    fn default() -> Self {
        let kept = ExposureState {
            apis: HashMap::new(),
            workspaces: HashMap::new(),
            rings_full_at: RINGS_KEPT,
            dropped: LeaseTime(0),
            past: HashMap::new(),
            given_up: LeaseTime(0),
            proven_at: LeaseTime(0),
        };
        let late = Arc::new(LastAnswer::new());
        Self { kept: Mutex::new(kept), absent: Arc::new(Ring::new(late.clone())), late }
    }
}

impl ExposureLog {
    /// The part of a new entry for `record`.
    pub fn answers_of(&self, record: &Record) -> Answers {
        let ring = match record {
            Record::Absent => self.absent.clone(),
            Record::Key(key) => self.kept.lock().of_api(&key.api_id, &key.workspace_id, &self.late),
            Record::RootKey(root) => self.kept.lock().of_workspace(&root.workspace_id, &self.late),
        };
        Answers { last: LastAnswer::new(), ring }
    }

    /// An entry as of `as_of` has left the cache, for whatever reason.
    pub fn record_evicted(&self, hash: &KeyHash, as_of: LogPosition, answers: &Answers) {
        if !Protection::AnswersAreHandedOn.holds() {
            return;
        }
        // Answers that are given from it all the same are late.
        if let Some(before) = answers.last.close() {
            self.kept.lock().record_evicted(hash, EvictedEntry { as_of, before, is_exact: true });
        }
    }

    /// Everything is about to leave the cache, unseen.
    pub fn flushed(&self) {
        let mut kept = self.kept.lock();
        let rings = kept.apis.values().map(|(_, ring)| ring).chain(kept.workspaces.values());
        let last = rings.map(|ring| ring.last()).fold(self.absent.last(), LeaseTime::max);
        kept.given_up = kept.given_up.max(kept.dropped).max(last);
    }

    /// Every change that was committed before `at` has been applied.
    pub fn proven(&self, at: LeaseTime) {
        let mut kept = self.kept.lock();
        kept.proven_at = kept.proven_at.max(at);
        kept.drop_settled();
    }

    /// How long after its commit a change that is applied now was not in what was answered. `evicted` is what it
    /// evicted, and as of when that was. The work is bounded by the number of APIs, and doesn't grow with the
    /// entries.
    pub fn exposure(
        &self,
        scope: &Scope,
        position: LogPosition,
        commit: CommitWindow,
        evicted: Option<(&Answers, LogPosition)>,
    ) -> AnswersAfter {
        let kept = self.kept.lock();
        match scope {
            Scope::Key { hash, .. } => {
                let evicted = evicted.map(|(answers, as_of)| {
                    let before = answers.last.before();
                    EvictedEntry { as_of, before, is_exact: true }
                });
                let past = kept.past.get(hash).into_iter().flatten().copied();
                // An entry that was loaded since the commit has the change in it.
                past.chain(evicted)
                    .filter(|past| past.as_of < position)
                    .map(|past| AnswersAfter::of_tick(past.before, commit, past.is_exact))
                    .fold(
                        AnswersAfter::of_tick(kept.given_up.max(self.late.before()), commit, false),
                        AnswersAfter::max,
                    )
            }
            Scope::Api(id) => kept.of_rings(|_, api| api == id, |_| false, position, commit),
            Scope::Workspace(id) => {
                kept.of_rings(|owner, _| owner == id, |workspace| workspace == id, position, commit)
            }
            Scope::All => {
                let all = kept.of_rings(|_, _| true, |_| true, position, commit);
                all.max(self.absent.exposure(position, commit))
            }
        }
    }
}

impl ExposureState {
    fn of_api(&mut self, api: &ApiId, workspace: &WorkspaceId, late: &Arc<LastAnswer>) -> Arc<Ring> {
        self.make_room_for_rings();
        let new = || (workspace.clone(), Arc::new(Ring::new(late.clone())));
        self.apis.entry(api.clone()).or_insert_with(new).1.clone()
    }

    fn of_workspace(&mut self, workspace: &WorkspaceId, late: &Arc<LastAnswer>) -> Arc<Ring> {
        self.make_room_for_rings();
        let new = || Arc::new(Ring::new(late.clone()));
        self.workspaces.entry(workspace.clone()).or_insert_with(new).clone()
    }

    /// Drops rings that no entry holds, now and then: there are never many more than twice as many as are in use.
    fn make_room_for_rings(&mut self) {
        if self.apis.len() + self.workspaces.len() < self.rings_full_at {
            return;
        }
        let mut dropped = self.dropped;
        let mut is_held = |ring: &Arc<Ring>| {
            let is_held = Arc::strong_count(ring) > 1;
            if !is_held {
                dropped = dropped.max(ring.last());
            }
            is_held
        };
        self.apis.retain(|_, (_, ring)| is_held(ring));
        self.workspaces.retain(|_, ring| is_held(ring));
        self.dropped = dropped;
        self.rings_full_at = RINGS_KEPT.max(2 * (self.apis.len() + self.workspaces.len()));
    }

    fn of_rings(
        &self,
        of_api: impl Fn(&WorkspaceId, &ApiId) -> bool,
        of_workspace: impl Fn(&WorkspaceId) -> bool,
        position: LogPosition,
        commit: CommitWindow,
    ) -> AnswersAfter {
        let apis = self.apis.iter().filter(|(api, (owner, _))| of_api(owner, api)).map(|(_, (_, ring))| ring);
        let workspaces =
            self.workspaces.iter().filter(|(workspace, _)| of_workspace(workspace)).map(|(_, ring)| ring);
        let dropped = AnswersAfter::of_tick(self.dropped, commit, false);
        let rings = apis.chain(workspaces).map(|ring| ring.exposure(position, commit));
        rings.fold(dropped, AnswersAfter::max)
    }

    fn record_evicted(&mut self, hash: &KeyHash, new: EvictedEntry) {
        if new.before <= self.proven_at {
            return;
        }
        if self.past.len() >= PAST_ANSWERS_MAX && !self.past.contains_key(hash) {
            self.drop_settled();
            if self.past.len() * 2 > PAST_ANSWERS_MAX {
                let all = self.past.drain().flat_map(|(_, past)| past).map(|past| past.before);
                self.given_up = all.fold(self.given_up, LeaseTime::max);
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

    /// Every change of before those answers has been applied: they are of no use any more.
    fn drop_settled(&mut self) {
        let proven_at = self.proven_at;
        self.past.retain(|_, past| {
            past.retain(|past| past.before > proven_at);
            !past.is_empty()
        });
    }
}

#[cfg(test)]
mod tests;
