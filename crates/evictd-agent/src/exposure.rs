//! What was answered from the old state after a change was committed, and before it was applied here.
//!
//! Every entry remembers when it was last answered from, and the APIs (for what has none: the workspace)
//! count their answers in a short ring of seconds, which entries hold like their floors: a hit looks nothing
//! up, and writes a few words of memory. When a change is applied, the entry that it evicts, or the rings of
//! the scope whose floor it raises, tell how long and how often the old state was still in use.
//!
//! Everything here informs. Times are upper estimates ([`Seen::surely_after`] alone is a lower one), and
//! answers are lower ones: of a key one, if it was certainly answered from after the commit; of an API those of
//! whole seconds after it, or one for each second in which new records were answered from, too. What is missed
//! are answers that are on their way in the very moment of the eviction, and those from entries that the cache
//! pushed out.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use evictd_core::ids::{ApiId, WorkspaceId};
use evictd_core::invalidation::Scope;
use evictd_core::offset::Commit;
use evictd_core::position::LogPosition;
use evictd_core::receipts::Exposure;
use evictd_core::record::Record;
use evictd_core::time::LeaseTime;
use parking_lot::Mutex;

use crate::cache::Entry;

/// Seconds that a ring remembers.
const SLOTS: usize = 32;

/// A ring's unit of time, in microseconds.
const SLOT_US: u64 = 1_000_000;

/// The unit in which last answers are remembered, in microseconds: an entry is written once in it, however
/// often it is answered from.
const TICK_US: u64 = 1_000;

/// Rings that are kept before unused ones are dropped.
const RINGS_KEPT: usize = 1_024;

/// When something was last answered from: the end of the tick, so it was before.
#[derive(Debug, Default)]
pub(crate) struct LastAnswer(AtomicU64);

impl LastAnswer {
    pub(crate) fn note(&self, now: LeaseTime) {
        let tick = now.0 / TICK_US + 1;
        if self.0.load(Ordering::Relaxed) < tick {
            self.0.store(tick, Ordering::Relaxed);
        }
    }

    /// Not later than this; the clock's start if never.
    fn before(&self) -> LeaseTime {
        LeaseTime(self.0.load(Ordering::Relaxed) * TICK_US)
    }
}

/// The answers of one second.
#[derive(Debug)]
struct Slot {
    /// Which second, above how many answers it had.
    count: AtomicU64,
    /// The oldest state that was answered from,
    oldest: AtomicU64,
    /// and the newest.
    newest: AtomicU64,
}

const COUNT_BITS: u32 = 24;
const COUNT_MAX: u64 = (1 << COUNT_BITS) - 1;

/// The answers of an API, or of a workspace's own records, in the last [`SLOTS`] seconds.
#[derive(Debug)]
pub(crate) struct Ring {
    slots: [Slot; SLOTS],
    last: LastAnswer,
}

impl Ring {
    fn new() -> Self {
        let slot = |_| Slot {
            count: AtomicU64::new(0),
            oldest: AtomicU64::new(u64::MAX),
            newest: AtomicU64::new(0),
        };
        Self { slots: std::array::from_fn(slot), last: LastAnswer::default() }
    }

    /// An answer at `now` from a state as of `as_of`.
    fn note(&self, now: LeaseTime, as_of: LogPosition) {
        self.last.note(now);
        let second = now.0 / SLOT_US;
        let slot = &self.slots[second as usize % SLOTS];
        let seen = slot.count.load(Ordering::Acquire);
        if seen >> COUNT_BITS != second {
            // Whoever sees the new second sees this, too. Of several that begin it at once, all but one add
            // themselves below; a state older than the last of them may get lost among them.
            slot.oldest.store(as_of.to_bits(), Ordering::Release);
            slot.newest.store(as_of.to_bits(), Ordering::Release);
            let first = (second << COUNT_BITS) | 1;
            if slot.count.compare_exchange(seen, first, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
        if slot.oldest.load(Ordering::Relaxed) > as_of.to_bits() {
            slot.oldest.fetch_min(as_of.to_bits(), Ordering::AcqRel);
        }
        if slot.newest.load(Ordering::Relaxed) < as_of.to_bits() {
            slot.newest.fetch_max(as_of.to_bits(), Ordering::AcqRel);
        }
        if seen & COUNT_MAX < COUNT_MAX {
            slot.count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// What was answered from before `position` since its commit.
    fn exposure(&self, position: LogPosition, commit: Commit) -> Seen {
        let last = self.last.before();
        let mut seen = Seen::default();
        for slot in &self.slots {
            let word = slot.count.load(Ordering::Acquire);
            let begins = LeaseTime((word >> COUNT_BITS) * SLOT_US);
            let ends = begins.after(Duration::from_micros(SLOT_US)).min(last);
            if slot.oldest.load(Ordering::Acquire) >= position.to_bits() || ends <= commit.earliest {
                continue;
            }
            let all_old = slot.newest.load(Ordering::Acquire) < position.to_bits();
            let answers = match (begins >= commit.latest, all_old) {
                (true, true) => word & COUNT_MAX,
                (true, false) => 1,
                (false, _) => 0,
            };
            seen.add(Seen {
                exposure: Exposure { answers, last_after: ends.since(commit.earliest) },
                surely_after: begins.since(commit.latest),
            });
        }
        seen
    }
}

/// What was seen of a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) exposure: Exposure,
    /// The last answer was given at least so long after the commit.
    pub(crate) surely_after: Duration,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.exposure.answers = self.exposure.answers.saturating_add(other.exposure.answers);
        self.exposure.last_after = self.exposure.last_after.max(other.exposure.last_after);
        self.surely_after = self.surely_after.max(other.surely_after);
    }

    /// What the entry tells that the change at `position` evicted.
    pub(crate) fn of_entry(entry: &Entry, position: LogPosition, commit: Commit) -> Self {
        let before = entry.answers.last.before();
        // An entry that was loaded since the commit has the change in it.
        if entry.stamp.as_of() >= position || before <= commit.earliest {
            return Self::default();
        }
        let last_after = before.since(commit.earliest);
        let surely_after = before.before(Duration::from_micros(TICK_US)).since(commit.latest);
        let answers = u64::from(!surely_after.is_zero());
        Self { exposure: Exposure { answers, last_after }, surely_after }
    }
}

/// An entry's part: when it was answered from, and where its answers are counted.
#[derive(Debug)]
pub(crate) struct Answers {
    last: LastAnswer,
    ring: Arc<Ring>,
}

impl Answers {
    /// An answer at `now` from a state as of `as_of`. No lock, no allocation.
    pub(crate) fn note(&self, now: LeaseTime, as_of: LogPosition) {
        self.last.note(now);
        self.ring.note(now, as_of);
    }
}

/// The rings of everything that is cached.
#[derive(Debug)]
pub(crate) struct Rings {
    kept: Mutex<Kept>,
    /// Of what was not found, which belongs to nobody.
    absent: Arc<Ring>,
}

#[derive(Debug)]
struct Kept {
    apis: HashMap<ApiId, (WorkspaceId, Arc<Ring>)>,
    /// Of root keys.
    workspaces: HashMap<WorkspaceId, Arc<Ring>>,
    /// At so many, unused ones are dropped.
    full_at: usize,
}

impl Rings {
    pub(crate) fn new() -> Self {
        let kept = Kept { apis: HashMap::new(), workspaces: HashMap::new(), full_at: RINGS_KEPT };
        Self { kept: Mutex::new(kept), absent: Arc::new(Ring::new()) }
    }

    /// The part of a new entry for `record`.
    pub(crate) fn answers_of(&self, record: &Record) -> Answers {
        let ring = match record {
            Record::Absent => self.absent.clone(),
            Record::Key(key) => self.kept.lock().of_api(&key.api_id, &key.workspace_id),
            Record::RootKey(root) => self.kept.lock().of_workspace(&root.workspace_id),
        };
        Answers { last: LastAnswer::default(), ring }
    }

    /// What was answered below the floor of `scope` that rose to `position`. A key's scope has no ring; its
    /// entry tells ([`Seen::of_entry`]). The work is bounded by the number of APIs, and doesn't grow with the
    /// entries.
    pub(crate) fn exposure(&self, scope: &Scope, position: LogPosition, commit: Commit) -> Seen {
        let kept = self.kept.lock();
        let mut seen = Seen::default();
        let mut add = |ring: &Ring| seen.add(ring.exposure(position, commit));
        match scope {
            Scope::Key { .. } => {}
            Scope::Api(id) => kept.apis.get(id).iter().for_each(|(_, ring)| add(ring)),
            Scope::Workspace(id) => {
                kept.apis.values().filter(|(owner, _)| owner == id).for_each(|(_, ring)| add(ring));
                kept.workspaces.get(id).iter().for_each(|ring| add(ring));
            }
            Scope::All => {
                kept.apis.values().for_each(|(_, ring)| add(ring));
                kept.workspaces.values().for_each(|ring| add(ring));
                add(&self.absent);
            }
        }
        seen
    }
}

impl Kept {
    fn of_api(&mut self, api: &ApiId, workspace: &WorkspaceId) -> Arc<Ring> {
        self.make_room();
        let new = || (workspace.clone(), Arc::new(Ring::new()));
        self.apis.entry(api.clone()).or_insert_with(new).1.clone()
    }

    fn of_workspace(&mut self, workspace: &WorkspaceId) -> Arc<Ring> {
        self.make_room();
        self.workspaces.entry(workspace.clone()).or_insert_with(|| Arc::new(Ring::new())).clone()
    }

    /// Drops rings that no entry holds, now and then: there are never many more than twice as many as are in use.
    fn make_room(&mut self) {
        if self.apis.len() + self.workspaces.len() < self.full_at {
            return;
        }
        self.apis.retain(|_, (_, ring)| Arc::strong_count(ring) > 1);
        self.workspaces.retain(|_, ring| Arc::strong_count(ring) > 1);
        self.full_at = RINGS_KEPT.max(2 * (self.apis.len() + self.workspaces.len()));
    }
}

#[cfg(test)]
mod tests;
