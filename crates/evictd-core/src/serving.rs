//! The steps of a hit, a load and an invalidation, which share state without a lock (R9, R10).
//!
//! [`AgentState`] is what the follow task publishes. Three parties use it and the cached entries:
//!
//! * a verification: [`VerificationStart`] -> [`Candidate`] -> [`HitVerdict`], see [`hit`];
//! * a load: [`LoadedEntry`] -> [`InsertedEntry`] -> [`SettledEntry`], see [`load`];
//! * the follow task, which performs the follower's effects in their order, see [`perform`].
//!
//! Each step is a value that only the step before it returns. So the compiler keeps their order: an
//! entry can't be shown before it was checked, nor looked up before the deadline was read. The
//! agent runs the steps one after another, the simulator runs other events between them, and loom
//! runs every interleaving.

#[cfg(any(test, feature = "fork"))]
pub mod fork;
pub mod hit;
pub mod load;
pub mod perform;

use std::sync::Arc;
use std::time::Duration;

pub use self::hit::{Candidate, Hit, HitVerdict, VerificationStart};
pub use self::load::{InsertedEntry, LoadAnswer, LoadedEntry, SettledEntry};
use crate::entry::Validity;
use crate::floors::FloorCell;
use crate::follower::Follower;
use crate::ids::KeyHash;
use crate::lease::{Bound, Mode};
use crate::position::LogPosition;
use crate::sync::{AtomicU64, Mutex, Ordering};
use crate::time::LeaseTime;

/// A cached record.
pub trait CacheEntry {
    /// Decides whether the entry may be served.
    fn validity(&self) -> &Validity;

    /// Whether the entry is too old by a rule of the cache itself.
    fn is_expired(&self, _now: LeaseTime) -> bool {
        false
    }

    /// Notes an answer at `now`, by a verification that read `applied` before.
    fn note_answer(&self, _now: LeaseTime, _applied: LogPosition) {}
}

/// Entries by hash. The operations on one hash must be linearizable.
pub trait EntryCache {
    type Entry: CacheEntry;

    /// Returns the entry, hidden or shown.
    fn get(&self, hash: &KeyHash) -> Option<Arc<Self::Entry>>;

    /// Inserts or replaces an entry. It is hidden, except in a negative control.
    fn insert_hidden(&self, hash: KeyHash, entry: Arc<Self::Entry>);

    /// Removes and returns the entry. No `get` that starts after this returns it.
    fn evict(&self, hash: &KeyHash) -> Option<Arc<Self::Entry>>;

    /// Removes all entries. Only to save memory: the horizon voids them already.
    fn clear(&self);
}

/// The protocol state of an agent, and what of it the hot path reads without a lock.
#[derive(Debug)]
pub struct AgentState {
    /// Loads lock it to anchor and to check their entries. Hits never do.
    pub follower: Mutex<Follower>,
    pub bound: Bound,
    horizon: Arc<FloorCell>,
    applied: AtomicU64,
    /// Microseconds on the lease clock; 0 before the first proof.
    proven_at: AtomicU64,
}

impl AgentState {
    /// The state around a new follower.
    pub fn new(follower: Follower, bound: Bound) -> Self {
        Self {
            horizon: follower.floors().horizon().clone(),
            follower: Mutex::new(follower),
            bound,
            applied: AtomicU64::new(LogPosition::ZERO.to_bits()),
            proven_at: AtomicU64::new(0),
        }
    }

    /// Contiguously applied; `ZERO` before the base is known. Floors rise and entries are evicted
    /// before it is published, and it is published before it is announced (R9).
    pub fn applied(&self) -> LogPosition {
        LogPosition::from_bits(self.applied.load(Ordering::Acquire))
    }

    /// The time as of which the agent was proven complete; the clock's start before the first
    /// proof.
    pub fn proven_at(&self) -> LeaseTime {
        LeaseTime(self.proven_at.load(Ordering::Acquire))
    }

    /// Whether a lease runs at `now`, so that entries that meet their floors may be served.
    pub fn has_lease(&self, now: LeaseTime) -> bool {
        let proven_at = self.proven_at();
        proven_at != LeaseTime::default() && !self.bound.remaining(now, proven_at).is_zero()
    }

    /// Whether an entry is below a floor, so that no verification will be answered from it.
    pub fn is_void(&self, entry: &impl CacheEntry) -> bool {
        entry.validity().is_below_floor(&self.horizon)
    }

    /// Ends serving for good: the machine was frozen while its clock stood still (R8). Voids all
    /// entries, and loads answer no verification. Only a new process serves again.
    pub fn end(&self) {
        self.horizon.raise(LogPosition::NEVER);
        self.proven_at.store(0, Ordering::Release);
    }

    /// Whether [`Self::end`] was called.
    pub fn has_ended(&self) -> bool {
        self.horizon.get() == LogPosition::NEVER
    }

    /// `follower` is this state's own, already locked.
    pub fn mode(&self, follower: &Follower, now: LeaseTime) -> Mode {
        if self.has_ended() { Mode::Expired } else { follower.mode(now) }
    }

    /// Returns what is left of the lease at `now`.
    pub fn remaining(&self, follower: &Follower, now: LeaseTime) -> Duration {
        let proven_at = follower.proven_at().filter(|_| !self.has_ended());
        proven_at.map_or(Duration::ZERO, |at| self.bound.remaining(now, at))
    }
}
