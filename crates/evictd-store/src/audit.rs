//! Who changed what, and when.
//!
//! A record is written in the transaction of its change, so that neither is there without the other. It has ids
//! and no names of keys: it outlives a permanent deletion. Its form is that of Unkey's audit log.

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
    /// Whose it is.
    pub workspace_id: WorkspaceId,
    /// `key.delete` and the like.
    pub event: String,
    /// For people.
    pub description: String,
    /// `rootkey`, or `system` for an operator with the command line.
    pub actor_type: String,
    /// The root key's id, or the operator's name.
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
    /// `key`, `api` or `rootkey`.
    pub kind: String,
    /// Its id.
    pub id: String,
}

/// What is old enough to go.
#[derive(Clone, Copy, Debug)]
pub struct Purge {
    /// Numbered log rows committed before this time whose request, if they have one, has its receipt. What was
    /// the hash of a permanently deleted key goes with them. An agent that asks for a row that is gone is
    /// refused, and flushes (R5).
    pub log_before: StoreTime,
    /// Receipts that were final before this time.
    pub receipts_before: StoreTime,
    /// Audit records older than this; `None` keeps them all.
    pub audit_before: Option<StoreTime>,
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
