//! One row of the log, as it travels.

use crate::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use crate::position::LogPosition;
use crate::time::StoreTime;

/// What an invalidation makes forgotten.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Scope {
    /// One key or root key, by hash: "not found" and re-created keys are covered too.
    Key {
        /// The hash under which agents cache it.
        hash: KeyHash,
        /// Its id, for people; absent for hashes that never had a row.
        key_id: Option<KeyId>,
        /// Its API; absent for root keys.
        api_id: Option<ApiId>,
    },
    /// Every key of an API: one floor, however many keys are cached.
    Api(ApiId),
    /// Everything of a workspace.
    Workspace(WorkspaceId),
    /// Everything. Also what a reader makes of a scope it doesn't know.
    All,
}

impl Scope {
    /// The metric label: `key`, `api`, `workspace` or `all`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Key { .. } => "key",
            Self::Api(_) => "api",
            Self::Workspace(_) => "workspace",
            Self::All => "all",
        }
    }
}

/// Why a row was written. It informs people and paces announcements; it never decides what is
/// forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cause {
    /// A key appeared: a cached "not found" must go.
    Created,
    /// A record changed in some other way.
    Changed,
    /// Soft deletion.
    Deleted,
    /// Permanent deletion.
    Erased,
    /// A soft-deleted record came back.
    Restored,
    /// Its expiry has come.
    Expired,
}

impl Cause {
    /// The name in logs, answers and the store.
    pub fn label(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Changed => "changed",
            Self::Deleted => "deleted",
            Self::Erased => "erased",
            Self::Restored => "restored",
            Self::Expired => "expired",
        }
    }

    /// The inverse of [`Cause::label`].
    pub fn from_label(label: &str) -> Option<Self> {
        [Self::Created, Self::Changed, Self::Deleted, Self::Erased, Self::Restored, Self::Expired]
            .into_iter()
            .find(|cause| cause.label() == label)
    }

    /// Whether somebody waits to hear that it was applied (R12: announced at once).
    pub fn is_deletion(self) -> bool {
        matches!(self, Self::Deleted | Self::Erased)
    }
}

/// A numbered row of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Invalidation {
    /// Its place in the log.
    pub position: LogPosition,
    /// What it makes forgotten.
    pub scope: Scope,
    /// Why it was written.
    pub cause: Cause,
    /// When it was committed, on the store's clock.
    pub committed_at: StoreTime,
}
