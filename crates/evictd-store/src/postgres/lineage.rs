//! Which history a server writes, so that a branch of it is detected (R2).
//!
//! A promoted standby may lack the last commits of the primary that it replaces, and would give their positions out again.
//! PostgreSQL writes a new timeline from then on. The head of the log keeps the timeline, the system identifier and the
//! database in which its last position was given. A transaction that finds others begins an epoch before it numbers.
//!
//! A dump that is loaded where it came from changes none of these. So the head also keeps the transaction that wrote it,
//! and PostgreSQL has that of the row (`xmin`): for a copy, it is a later one. Whatever keeps a row as it is (physical
//! replication, VACUUM FULL, `pg_upgrade`) keeps `xmin` too.
//!
//! [`evictd_core::epochs`] decides which epoch begins. `docs/adr/0008` has the reasons.

use std::fmt;

use crate::error::StoreError;

/// The history that a server writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lineage {
    /// A promotion begins one.
    pub(super) timeline: u32,
    /// The identifier of the cluster, which `initdb` draws.
    pub(super) system: i64,
    /// The database's oid. A database created from another one as its template differs only in this.
    pub(super) database: u32,
}

impl Lineage {
    /// `timeline` is written as in the name of a WAL file.
    pub(super) fn new(timeline: &str, system: i64, database: u32) -> Result<Self, StoreError> {
        let corrupt = |_| StoreError::Corrupt { what: "timeline", value: timeline.to_owned() };
        Ok(Self { timeline: u32::from_str_radix(timeline, 16).map_err(corrupt)?, system, database })
    }
}

/// For the history's evidence.
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
    fn timeline_is_parsed_from_the_name_of_a_wal_file() {
        let read = Lineage::new("0000001A", 3, 4).unwrap();
        assert_eq!(read, Lineage { timeline: 26, system: 3, database: 4 });
        assert!(Lineage::new("nonsense", 3, 4).is_err());
    }
}
