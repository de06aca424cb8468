//! The roster: every agent process that may hold a lease (R11). Receipts wait for these (R12).

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use evictd_core::ids::{AgentName, Identity, InstanceId, Region};
use evictd_core::roster::{Instance, PartitionPolicy, RosterEntry};
use evictd_core::time::StoreTime;

use crate::error::StoreError;
use crate::log_rows::no_head;
use crate::rows::Columns;

/// The roster (R11). Rounds add instances to it, see [`LogStore::round`](crate::log::LogStore::round).
#[async_trait]
pub trait RosterStore: Debug + Send + Sync + 'static {
    /// Returns what the roster gained or changed after revision `since`, or all of it for 0. Removed instances aren't
    /// reported. Cheap if there is nothing.
    async fn roster(&self, since: u64) -> Result<Roster, StoreError>;

    /// Marks the roster as complete again: one bound has passed since `epoch` began.
    async fn mark_roster_complete(&self, epoch: u32) -> Result<(), StoreError>;

    /// Marks instances that sent a leave message, because other publishers may have missed it. The next probe of an instance
    /// clears the mark.
    async fn mark_departed(&self, departed: &[Identity]) -> Result<(), StoreError>;

    /// Deletes roster rows, each only if the instance was last seen at the time given with it. The roster's time may be
    /// a minute old: an instance that was seen less than its bound and a minute ago may still hold a lease.
    async fn remove_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError>;
}

/// What the roster has gained or changed since some revision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Roster {
    /// The current revision, for the next call. It grows with the commits of rounds.
    pub revision: u64,
    /// Whether it has every instance that may hold a lease. Not for a while after an epoch began: the store may have
    /// gone back, and its roster with it.
    pub is_complete: bool,
    /// The instances that are new, have changed, or have departed.
    pub entries: Vec<RosterEntry>,
}

impl Roster {
    /// Each row has the columns `roster_revision` and `roster_complete`. Without an entry, there is one row with these
    /// alone.
    pub(crate) fn read(rows: &[impl Columns]) -> Result<Self, StoreError> {
        let first = rows.first().ok_or_else(no_head)?;
        let revision = first.integer("roster_revision")?;
        let has_entries = first.optional_text("instance")?.is_some();
        Ok(Self {
            is_complete: first.flag("roster_complete")?,
            revision: u64::try_from(revision)
                .map_err(|_| StoreError::Corrupt { what: "roster revision", value: revision.to_string() })?,
            entries: rows.iter().filter(|_| has_entries).map(read_entry).collect::<Result<_, _>>()?,
        })
    }
}

/// Reads an instance. An invalid row is an error and not left out: receipts must not do without an instance that may
/// hold a lease (G4).
pub(crate) fn read_entry(row: &impl Columns) -> Result<RosterEntry, StoreError> {
    let instance = row.text("instance")?;
    let corrupt = || StoreError::Corrupt { what: "instance in its roster", value: instance.to_owned() };
    let policies = [PartitionPolicy::Deny, PartitionPolicy::ServeStale];
    let policy = row.text("policy")?;
    Ok(RosterEntry {
        instance: Instance {
            identity: Identity {
                region: Region::new(row.text("region")?),
                agent: AgentName::new(row.text("agent")?),
                instance: InstanceId(u64::from_str_radix(instance, 16).map_err(|_| corrupt())?),
            },
            policy: policies.into_iter().find(|known| known.label() == policy).ok_or_else(corrupt)?,
            bound: Duration::from_millis(u64::try_from(row.integer("bound_ms")?).map_err(|_| corrupt())?),
        },
        last_seen: row.time("last_seen")?,
        departed: row.flag("departed")?,
    })
}

/// A bound in the unit of its column.
pub(crate) fn bound_ms(entry: &RosterEntry) -> i64 {
    i64::try_from(entry.instance.bound.as_millis()).unwrap_or(i64::MAX)
}
