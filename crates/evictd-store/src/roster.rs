//! The roster: every agent process that may hold a lease (R11), as receipts need it (R12).

use evictd_core::roster::RosterEntry;

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
