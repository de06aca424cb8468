//! Who changed what, and when.
//!
//! The record of a request is written in the transaction of its change, so that neither is there without the other.
//! Direct SQL, and ends that come by themselves, write only the log; their record is written in the transaction that
//! numbers that. A record has ids and no names of keys: it outlives a permanent deletion. Its form is that of Unkey's
//! audit log.

use std::time::Duration;

use evictd_core::ids::WorkspaceId;
use evictd_core::time::StoreTime;

/// Which records to read.
#[derive(Clone, Default, Debug)]
pub struct AuditQuery {
    /// Only those of this workspace.
    pub workspace_id: Option<WorkspaceId>,
    /// Only those that have this among their targets: a key, an API or a root key.
    pub target: Option<String>,
    /// Only those of this request.
    pub request_id: Option<String>,
    /// Only from this time on.
    pub since: Option<StoreTime>,
    /// How many at most: the newest.
    pub limit: usize,
}

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuditRecord {
    /// `log_...`.
    pub event_id: String,
    /// On the store's clock.
    pub time: StoreTime,
    /// Whose it is; `None` if it is about the whole store.
    pub workspace_id: Option<WorkspaceId>,
    /// `key.delete` and the like.
    pub event: String,
    /// For people.
    pub description: String,
    /// `rootkey`; `system` for an operator with the command line and for ends that came by themselves; `database` for
    /// direct SQL.
    pub actor_type: String,
    /// The root key's id, the operator's name, `expiry`, or `sql`: the database doesn't know who that was.
    pub actor_id: String,
    /// The root key's name when it made the change.
    pub actor_name: Option<String>,
    /// Where the request came from.
    pub remote_ip: Option<String>,
    /// What the client called itself.
    pub user_agent: Option<String>,
    /// What was changed.
    pub targets: Vec<AuditTarget>,
    /// The request, `req_...`.
    pub request_id: Option<String>,
}

/// Something that was changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuditTarget {
    /// `key`, `api`, `rootkey` or `workspace`.
    pub kind: String,
    /// Its id.
    pub id: String,
}

/// What is old enough to go, by the store's own clock: a publisher's may be years ahead.
#[derive(Clone, Copy, Debug)]
pub struct Purge {
    /// How long numbered log rows are kept whose request, if they have one, has its receipt. What was the hash of a
    /// permanently deleted key goes with them. An agent that asks for a row that is gone is refused, and flushes (R5).
    pub log: Duration,
    /// How long receipts are kept that are final.
    pub receipts: Duration,
    /// How long audit records are kept; `None` keeps them all.
    pub audit: Option<Duration>,
    /// At most so many of each, so that a round never waits long.
    pub limit: usize,
}

/// How much went.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Purged {
    /// Log rows.
    pub log: u64,
    /// Receipts.
    pub receipts: u64,
    /// Audit records.
    pub audit: u64,
}
