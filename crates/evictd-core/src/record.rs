//! What the store holds for a hash, and the verdict that follows from it.

use crate::history::{LogToken, Provenance};
use crate::ids::{ApiId, KeyId, WorkspaceId};
use crate::position::LogPosition;
use crate::time::StoreTime;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RecordState {
    Active,
    Disabled,
    Expired,
    /// The record or its API was deleted. The ids remain, so that floors reach the answer.
    Deleted,
    WorkspaceDisabled,
}

/// A key, as far as a verification needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRecord {
    pub key_id: KeyId,
    pub api_id: ApiId,
    pub workspace_id: WorkspaceId,
    pub state: RecordState,
    pub name: Option<Box<str>>,
    /// A JSON object as text.
    pub meta: Option<Box<str>>,
    /// The owner's id of the user that the key belongs to.
    pub external_id: Option<Box<str>>,
    /// Literal strings of the owner's, sorted.
    pub permissions: Vec<Box<str>>,
    pub expires_at: Option<StoreTime>,
}

/// A root key: it authorizes calls instead of being verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RootKeyRecord {
    pub root_key_id: KeyId,
    pub workspace_id: WorkspaceId,
    pub state: RecordState,
    /// Literal strings such as `api.*.verify_key`.
    pub permissions: Vec<Box<str>>,
    pub expires_at: Option<StoreTime>,
}

impl RootKeyRecord {
    /// Whether it may do `action` on `api`: `api.*.<action>` or `api.<id>.<action>`, matched
    /// literally.
    pub fn allows(&self, api: &str, action: &str) -> bool {
        self.permissions.iter().any(|permission| permission_matches(permission, api, action))
    }
}

/// Whether `permission` is `api.*.<action>` or `api.<api>.<action>`.
pub fn permission_matches(permission: &str, api: &str, action: &str) -> bool {
    permission
        .strip_prefix("api.")
        .and_then(|rest| rest.strip_suffix(action))
        .and_then(|rest| rest.strip_suffix('.'))
        .is_some_and(|target| target == "*" || target == api)
}

/// What the store has under a hash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    Absent,
    Key(KeyRecord),
    RootKey(RootKeyRecord),
}

/// A record and how new it is (R6), read in one snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lookup {
    /// The record includes every change up to here.
    pub as_of: LogPosition,
    pub provenance: Provenance,
    /// The token of the row at `as_of`.
    pub token: LogToken,
    pub record: Record,
}

/// The outcome of a verification, as Unkey names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    Valid,
    NotFound,
    Disabled,
    Expired,
    /// The workspace is disabled.
    Forbidden,
    /// The key lacks a permission that the request requires.
    InsufficientPermissions,
}

labels!(Verdict {
    Valid = "VALID",
    NotFound = "NOT_FOUND",
    Disabled = "DISABLED",
    Expired = "EXPIRED",
    Forbidden = "FORBIDDEN",
    InsufficientPermissions = "INSUFFICIENT_PERMISSIONS",
});

impl Verdict {
    /// The `code` on the wire.
    pub fn code(self) -> &'static str {
        self.label()
    }
}

impl KeyRecord {
    /// Returns the verdict on the key alone; the caller checks the required permissions.
    ///
    /// `home_time` is an upper estimate of the store's clock, so it can only end a key early. The
    /// store ends the key for good: its state becomes `Expired`.
    pub fn verdict(&self, home_time: StoreTime) -> Verdict {
        match self.state {
            RecordState::Deleted => Verdict::NotFound,
            RecordState::Disabled => Verdict::Disabled,
            RecordState::Expired => Verdict::Expired,
            RecordState::WorkspaceDisabled => Verdict::Forbidden,
            RecordState::Active if self.expires_at.is_some_and(|end| end <= home_time) => Verdict::Expired,
            RecordState::Active => Verdict::Valid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(state: RecordState, expires_at: Option<i64>) -> KeyRecord {
        KeyRecord {
            key_id: KeyId::new("key_1"),
            api_id: ApiId::new("api_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            state,
            name: None,
            meta: None,
            external_id: None,
            permissions: Vec::new(),
            expires_at: expires_at.map(StoreTime),
        }
    }

    #[test]
    fn verdict_follows_from_the_state() {
        let now = StoreTime(1_000);
        assert_eq!(key(RecordState::Active, None).verdict(now), Verdict::Valid);
        assert_eq!(key(RecordState::Deleted, None).verdict(now), Verdict::NotFound);
        assert_eq!(key(RecordState::Disabled, Some(1)).verdict(now), Verdict::Disabled);
        assert_eq!(key(RecordState::Expired, Some(9_999)).verdict(now), Verdict::Expired);
    }

    #[test]
    fn key_expires_without_an_invalidation() {
        let record = key(RecordState::Active, Some(1_000));
        assert_eq!(record.verdict(StoreTime(999)), Verdict::Valid);
        assert_eq!(record.verdict(StoreTime(1_000)), Verdict::Expired);
    }

    #[test]
    fn permissions_match_literally() {
        assert!(permission_matches("api.*.verify_key", "api_1", "verify_key"));
        assert!(permission_matches("api.api_1.verify_key", "api_1", "verify_key"));
        assert!(!permission_matches("api.api_2.verify_key", "api_1", "verify_key"));
        assert!(!permission_matches("api.*.*", "api_1", "verify_key"));
        assert!(!permission_matches("api.*.xverify_key", "api_1", "verify_key"));
        assert!(!permission_matches("verify_key", "api_1", "verify_key"));
    }
}
