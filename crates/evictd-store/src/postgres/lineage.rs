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
//! Which epoch that is [`evictd_core::epochs`] says. `docs/adr/0008` has the reasons.

use std::fmt;

use crate::error::StoreError;

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

    #[test]
    fn a_timeline_is_read_as_wal_files_are_named() {
        let read = Lineage::new("0000001A", 3, 4).unwrap();
        assert_eq!(read, Lineage { timeline: 26, system: 3, database: 4 });
        assert!(Lineage::new("nonsense", 3, 4).is_err());
    }
}
