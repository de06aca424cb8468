//! Audit records: who changed what, and when. And how long old rows are kept.
//!
//! The record of a request is written in the transaction of its change, so that neither exists without the other. Direct
//! SQL and expiries write only the log; the transaction that numbers their rows writes their records. A record has ids
//! and no names of keys, because it outlives a permanent deletion. Its form is that of Unkey's audit log.

use std::time::Duration;

use evictd_core::ids::WorkspaceId;
use evictd_core::log::{self, LoggedRow};
use evictd_core::time::StoreTime;
use serde::Deserialize;

use crate::error::StoreError;
use crate::rows::Columns;

/// Which records to read. All conditions must hold.
#[derive(Clone, Default, Debug)]
pub struct AuditQuery {
    pub workspace_id: Option<WorkspaceId>,
    /// The id of a key, an API or a root key.
    pub target: Option<String>,
    pub request_id: Option<String>,
    /// Only from this time on.
    pub since: Option<StoreTime>,
    /// At most so many: the newest.
    pub limit: usize,
}

/// The record of one change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuditRecord {
    /// `log_...`.
    pub event_id: String,
    /// On the store's clock.
    pub time: StoreTime,
    /// `None` if the change concerns the whole store.
    pub workspace_id: Option<WorkspaceId>,
    /// `key.delete` and the like.
    pub event: String,
    pub description: String,
    /// `rootkey`; `system` for an operator with the command line and for expiries; `database` for direct SQL.
    pub actor_type: String,
    /// The root key's id, the operator's name, `expiry`, or `sql`: the database doesn't report its user.
    pub actor_id: String,
    /// The root key's name at the time of the change.
    pub actor_name: Option<String>,
    /// The client, as trusted proxies reported it.
    pub remote_ip: Option<String>,
    /// The other end of the connection.
    pub peer_ip: Option<String>,
    pub user_agent: Option<String>,
    pub targets: Vec<AuditTarget>,
    /// The request, `req_...`.
    pub request_id: Option<String>,
}

/// Something that was changed.
#[derive(Clone, PartialEq, Eq, Deserialize, Debug)]
pub struct AuditTarget {
    /// `key`, `api`, `rootkey` or `workspace`.
    #[serde(rename = "type")]
    pub kind: String,
    pub id: String,
}

impl AuditRecord {
    pub(crate) fn read(row: &impl Columns) -> Result<Self, StoreError> {
        let event_id = row.text("event_id")?;
        Ok(Self {
            event_id: event_id.to_owned(),
            time: row.millis("time")?,
            workspace_id: row.optional_text("workspace_id")?.map(WorkspaceId::new),
            event: row.string("event")?,
            description: row.string("description")?,
            actor_type: row.string("actor_type")?,
            actor_id: row.string("actor_id")?,
            actor_name: row.optional_string("actor_name")?,
            remote_ip: row.optional_string("remote_ip")?,
            peer_ip: row.optional_string("peer_ip")?,
            user_agent: row.optional_string("user_agent")?,
            targets: row.list("targets", event_id)?,
            request_id: row.optional_string("correlation_id")?,
        })
    }
}

/// How long rows are kept, by the store's clock: a publisher's may be years ahead.
#[derive(Clone, Copy, Debug)]
pub struct Purge {
    /// For numbered log rows whose request, if they have one, has its receipt. The hash of a permanently deleted key
    /// goes with its log row. An agent that asks for a purged row is refused, and flushes (R5).
    pub log: Duration,
    /// For final receipts.
    pub receipts: Duration,
    /// For audit records; `None` keeps them all.
    pub audit: Option<Duration>,
    /// At most so many rows of each kind, so that a round never waits long.
    pub limit: usize,
}

impl Purge {
    /// The last position whose log row may go. `oldest` are the oldest numbered rows, in the order of positions.
    pub(crate) fn last_position<R: Columns>(
        &self,
        oldest: &[R],
        now: StoreTime,
    ) -> Result<Option<i64>, StoreError> {
        let read = |row: &R| -> Result<LoggedRow, StoreError> {
            Ok(LoggedRow {
                committed_at: row.time("committed_at")?,
                awaits_receipt: row.flag("awaits_receipt")?,
            })
        };
        let rows = oldest.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        oldest[..log::purgeable(rows, now, self.log)].last().map(|row| row.integer("position")).transpose()
    }
}

/// From when on every receipt is still there, in milliseconds, after these were purged; `None` if none was.
pub(crate) fn receipts_kept_since(purged: &[impl Columns]) -> Result<Option<i64>, StoreError> {
    let times = purged.iter().map(|row| row.time("final_at")).collect::<Result<Vec<_>, _>>()?;
    Ok(times.into_iter().max().map(|newest| newest.as_millis() + 1))
}

/// How many rows were purged.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Purged {
    pub log: u64,
    pub receipts: u64,
    pub audit: u64,
}
