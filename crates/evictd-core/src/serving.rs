//! What an agent serves from, and the steps in which it is read and written without a lock (R9, R10).
//!
//! [`AgentState`] is what the follow task publishes. Three parties meet at it and at the cached entries:
//!
//! * a verification: [`VerificationStart`] -> [`Candidate`] -> [`HitVerdict`], see [`hit`];
//! * a load: [`LoadedEntry`] -> [`InsertedEntry`] -> [`SettledEntry`], see [`load`];
//! * the follow task, which performs the follower's effects in their order, see [`perform`].
//!
//! Each step is a value that only the step before it gives, so the order can't be got wrong: an entry can't be
//! shown before it was checked, nor looked for before the deadline was read. The product runs the steps straight
//! through. The simulator keeps what lies between them and runs something else meanwhile, and loom runs every
//! interleaving.

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
    /// What decides whether it may be answered from.
    fn validity(&self) -> &Validity;

    /// Whether it is too old by a rule of the cache's own.
    fn is_expired(&self, _now: LeaseTime) -> bool {
        false
    }

    /// It is answered from, at `now`, by a verification that read `applied` before.
    fn note_answer(&self, _now: LeaseTime, _applied: LogPosition) {}
}

/// Entries by hash. For each hash, these are linearizable.
pub trait EntryCache {
    /// What is cached.
    type Entry: CacheEntry;

    /// What is cached under `hash`, hidden or shown.
    fn get(&self, hash: &KeyHash) -> Option<Arc<Self::Entry>>;

    /// Puts an entry in, in the place of another one. It is hidden, but as a negative control.
    fn insert_hidden(&self, hash: KeyHash, entry: Arc<Self::Entry>);

    /// Removes what is cached under `hash`. When this returns, no `get` that starts later returns it.
    fn evict(&self, hash: &KeyHash) -> Option<Arc<Self::Entry>>;

    /// Removes everything, to save memory: the horizon protects already.
    fn clear(&self);
}

/// The protocol state of an agent, and what of it the hot path reads without a lock.
#[derive(Debug)]
pub struct AgentState {
    /// Loads lock it to anchor and to check what they bring; hits never do.
    pub follower: Mutex<Follower>,
    /// The promise.
    pub bound: Bound,
    horizon: Arc<FloorCell>,
    applied: AtomicU64,
    /// Microseconds on the lease clock; 0 before the first proof.
    proven_at: AtomicU64,
}

impl AgentState {
    /// The state around a follower that knows nothing yet.
    pub fn new(follower: Follower, bound: Bound) -> Self {
        Self {
            horizon: follower.floors().horizon().clone(),
            follower: Mutex::new(follower),
            bound,
            applied: AtomicU64::new(LogPosition::ZERO.to_bits()),
            proven_at: AtomicU64::new(0),
        }
    }

    /// Contiguously applied, as verifications may rely on it; `ZERO` before the base is known. This is what is
    /// announced: floors rise and entries are evicted before it does (R9).
    pub fn applied(&self) -> LogPosition {
        LogPosition::from_bits(self.applied.load(Ordering::Acquire))
    }

    /// Since when nothing can have been missed; the clock's start before the first proof.
    pub fn proven_at(&self) -> LeaseTime {
        LeaseTime(self.proven_at.load(Ordering::Acquire))
    }

    /// Whether a lease runs at `now`, so that what meets the floors may be answered from, whoever read it.
    pub fn has_lease(&self, now: LeaseTime) -> bool {
        let proven_at = self.proven_at();
        proven_at != LeaseTime::default() && !self.bound.remaining(now, proven_at).is_zero()
    }

    /// Ends it for good: the machine stood still without its clock knowing (R8). What is cached is void, and
    /// loads answer no verification. Only a new process starts over.
    pub fn end(&self) {
        self.horizon.raise(LogPosition::NEVER);
        self.proven_at.store(0, Ordering::Release);
    }

    /// Whether [`Self::end`] was called.
    pub fn has_ended(&self) -> bool {
        self.horizon.get() == LogPosition::NEVER
    }

    /// The mode at `now`; `follower` is this state's own.
    pub fn mode(&self, follower: &Follower, now: LeaseTime) -> Mode {
        if self.has_ended() { Mode::Expired } else { follower.mode(now) }
    }

    /// What is left of the lease at `now`.
    pub fn remaining(&self, follower: &Follower, now: LeaseTime) -> Duration {
        let proven_at = follower.proven_at().filter(|_| !self.has_ended());
        proven_at.map_or(Duration::ZERO, |at| self.bound.remaining(now, at))
    }
}
