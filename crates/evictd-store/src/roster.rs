//! The roster: every agent process that may hold a lease (R11), as receipts need it (R12).

use async_trait::async_trait;
use evictd_core::ids::Identity;
use evictd_core::roster::RosterEntry;
use evictd_core::time::StoreTime;

use crate::error::StoreError;

/// Which agent processes may hold a lease (R11).
#[async_trait]
pub trait RosterStore: std::fmt::Debug + Send + Sync + 'static {
    /// What the roster gained or changed after revision `since`; all of it for 0. Cheap when that is nothing.
    /// Who was forgotten isn't told.
    async fn roster(&self, since: u64) -> Result<Roster, StoreError>;

    /// A bound has passed since `epoch` began, so the roster is complete again.
    async fn mark_roster_complete(&self, epoch: u32) -> Result<(), StoreError>;

    /// Notes that instances said goodbye, for other publishers to read: they may have missed it. One that asks for a
    /// proof again is there again.
    async fn mark_departed(&self, departed: &[Identity]) -> Result<(), StoreError>;

    /// Deletes roster rows, each only if it was last seen when `gone` says: whoever was heard meanwhile stays.
    /// The roster's time may be a minute old, so an instance that was seen less than its bound and a minute
    /// ago may still hold a lease.
    async fn remove_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError>;
}

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
