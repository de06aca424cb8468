//! Notices that the server's history branched off (R2), and numbers epochs so that no two histories share one.
//!
//! A standby that is promoted may lack the last commits of the primary that it replaces, and would give their
//! positions out again. PostgreSQL numbers what it writes from then on as a new timeline. The head of the log
//! keeps the timeline, the system identifier and the database that its last position was given in; a transaction
//! that finds another one begins a new epoch before it numbers anything.
//!
//! A dump that is loaded where it came from changes none of these. So the head says, too, which transaction wrote
//! it, and PostgreSQL knows which one did (`xmin`): for a copy, another and later one. What keeps a row as it is
//! (replication of the server's files, VACUUM FULL, `pg_upgrade`) keeps that as well.
//!
//! It isn't enough to count epochs up: the commit that began one may be among the lost ones. So each timeline has
//! [`EPOCHS_PER_TIMELINE`] of its own, and an epoch's number tells its timeline. `docs/adr/0008` has the reasons.

use std::fmt;

use evictd_core::limits::{EPOCH_MAX, EPOCHS_PER_TIMELINE};

use crate::StoreError;

/// The history that a server writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lineage {
    /// Which branch: a promotion begins one.
    pub(super) timeline: u32,
    /// Which cluster: `initdb` draws one.
    pub(super) system: i64,
    /// Which of its databases: one that was made of another as its template has all else in common with it.
    pub(super) database: u32,
}

impl Lineage {
    /// Of a timeline as in the name of a WAL file, a system identifier, and a database's oid.
    pub(super) fn new(timeline: &str, system: i64, database: u32) -> Result<Self, StoreError> {
        let corrupt = |_| StoreError::Corrupt { what: "timeline", value: timeline.to_owned() };
        Ok(Self { timeline: u32::from_str_radix(timeline, 16).map_err(corrupt)?, system, database })
    }

    /// The first epoch of this timeline. None is kept for those beyond the 4096th, which count on.
    pub(super) fn first_epoch(self) -> u32 {
        let first = self.timeline.saturating_sub(1).saturating_mul(EPOCHS_PER_TIMELINE).saturating_add(1);
        if first <= EPOCH_MAX { first } else { 1 }
    }

    /// The epoch that follows the store's own and the highest that somebody has proved to have seen.
    pub(super) fn epoch_after(self, own: u32, seen: u32) -> u32 {
        self.first_epoch().max(own.max(seen).saturating_add(1))
    }
}

/// As evidence for people.
impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { timeline, system, database } = self;
        write!(f, "timeline {timeline}, system {system}, database {database}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(timeline: u32) -> Lineage {
        Lineage { timeline, system: 1, database: 2 }
    }

    #[test]
    fn an_epoch_follows_the_stores_own_and_any_that_was_seen() {
        assert_eq!(on(1).epoch_after(1, 0), 2);
        assert_eq!(on(1).epoch_after(1, 5), 6);
        assert_eq!(on(1).epoch_after(5, 1), 6);
    }

    #[test]
    fn timelines_share_no_epoch() {
        assert_eq!(on(2).epoch_after(1, 0), 257);
        assert_eq!(on(2).epoch_after(300, 0), 301);
        assert_eq!(on(3).epoch_after(300, 301), 513);
        // An operator's epochs on the first timeline, of which the standby heard nothing.
        let (lost, begun) = (on(1).epoch_after(255, 0), on(2).epoch_after(1, 0));
        assert!(lost < begun);
    }

    #[test]
    fn a_timeline_without_epochs_of_its_own_counts_on() {
        assert_eq!(on(4096).epoch_after(1, 0), 4095 * 256 + 1);
        assert_eq!(on(4097).epoch_after(9, 0), 10);
        assert_eq!(on(u32::MAX).epoch_after(9, 0), 10);
    }

    #[test]
    fn a_timeline_is_read_as_wal_files_are_named() {
        let read = Lineage::new("0000001A", 3, 4).unwrap();
        assert_eq!(read, Lineage { timeline: 26, system: 3, database: 4 });
        assert!(Lineage::new("nonsense", 3, 4).is_err());
    }
}
