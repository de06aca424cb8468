//! The roster: every agent process that may hold a lease (R11), as receipts need it (R12).

use evictd_core::roster::Instance;
use evictd_core::time::StoreTime;

/// What the roster has gained or changed since some revision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Roster {
    /// The revision that this is; to be asked for next time. It grows with the commits of rounds.
    pub revision: u64,
    /// Whether everybody who may hold a lease stands in it. Not so for a while after an epoch began: the store
    /// may have gone back, and its roster with it.
    pub is_complete: bool,
    /// The instances that are new, present themselves differently, or have departed.
    pub entries: Vec<RosterEntry>,
}

/// An instance in the roster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RosterEntry {
    /// Who, with which policy and bound.
    pub instance: Instance,
    /// When it was last heard, on the store's clock: up to a minute too early, because it isn't written at
    /// every sign of life.
    pub last_seen: StoreTime,
    /// It said goodbye to some publisher: it holds no lease, and answers nothing any more.
    pub departed: bool,
}
