//! One row of the log.

use crate::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use crate::position::LogPosition;
use crate::time::StoreTime;

/// Which entries an invalidation evicts.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Scope {
    /// One key or root key. By hash, so that it covers "not found" and re-created keys.
    Key {
        hash: KeyHash,
        /// For people; absent for hashes that never had a record.
        key_id: Option<KeyId>,
        /// Absent for root keys.
        api_id: Option<ApiId>,
    },
    /// Every key of an API: one floor, however many keys are cached.
    Api(ApiId),
    Workspace(WorkspaceId),
    /// Everything. A reader takes an unknown scope for this.
    All,
}

impl Scope {
    /// The key whose entry is evicted, for a scope of one key. Entries of wider scopes are void by
    /// their floor.
    pub fn evicted_key(&self) -> Option<&KeyHash> {
        match self {
            Self::Key { hash, .. } => Some(hash),
            Self::Api(_) | Self::Workspace(_) | Self::All => None,
        }
    }

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

/// Why a row was written. It informs people and paces announcements. It never decides what is
/// evicted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cause {
    /// A key was created: a cached "not found" must be evicted.
    Created,
    /// Any other change of a record.
    Changed,
    /// Soft deletion.
    Deleted,
    /// Permanent deletion.
    Erased,
    /// A soft-deleted record was restored.
    Restored,
    Expired,
}

labels!(Cause {
    Created = "created",
    Changed = "changed",
    Deleted = "deleted",
    Erased = "erased",
    Restored = "restored",
    Expired = "expired",
});

impl Cause {
    /// Whether agents announce at once that they applied it (R12).
    pub fn is_deletion(self) -> bool {
        matches!(self, Self::Deleted | Self::Erased)
    }
}

/// A numbered row of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Invalidation {
    pub position: LogPosition,
    pub scope: Scope,
    pub cause: Cause,
    pub committed_at: StoreTime,
}
