//! What the store says of a hash, and the verdict that follows from it.

use crate::history::{LogToken, Provenance};
use crate::ids::{ApiId, KeyId, WorkspaceId};
use crate::position::LogPosition;
use crate::time::StoreTime;

/// Whether a record grants anything.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RecordState {
    /// It does.
    Active,
    /// Switched off by its owner.
    Disabled,
    /// Its end has come.
    Expired,
    /// It, or the API it belongs to, was deleted; the ids remain so that floors reach the answer.
    Deleted,
    /// Its workspace was switched off.
    WorkspaceDisabled,
}

/// A key, as far as a verification needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRecord {
    /// Its id.
    pub key_id: KeyId,
    /// Its API.
    pub api_id: ApiId,
    /// Its tenant.
    pub workspace_id: WorkspaceId,
    /// Whether it grants anything.
    pub state: RecordState,
    /// Its name, if it has one.
    pub name: Option<Box<str>>,
    /// Its metadata as JSON text, an object, if it has any.
    pub meta: Option<Box<str>>,
    /// Whom it belongs to in the words of its owner, if that was said.
    pub external_id: Option<Box<str>>,
    /// What it may do, in the words of its owner: literal strings, sorted.
    pub permissions: Vec<Box<str>>,
    /// When it ends, if it does.
    pub expires_at: Option<StoreTime>,
}

/// A root key: it authorises calls instead of being verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RootKeyRecord {
    /// Its id.
    pub root_key_id: KeyId,
    /// The tenant it acts for.
    pub workspace_id: WorkspaceId,
    /// Whether it grants anything.
    pub state: RecordState,
    /// Its permissions, literal strings such as `api.*.verify_key`.
    pub permissions: Vec<Box<str>>,
    /// When it ends, if it does.
    pub expires_at: Option<StoreTime>,
}

impl RootKeyRecord {
    /// Whether it may do `action` on `api`: `api.*.<action>` or `api.<id>.<action>`, matched literally.
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

/// What a hash stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record {
    /// Nothing.
    Absent,
    /// A key.
    Key(KeyRecord),
    /// A root key.
    RootKey(RootKeyRecord),
}

/// A record and how new it is (R6): both were read in one snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lookup {
    /// Everything up to here is in the record.
    pub as_of: LogPosition,
    /// Whose log that is.
    pub provenance: Provenance,
    /// Of the row at `as_of`.
    pub token: LogToken,
    /// What was found.
    pub record: Record,
}

/// The outcome of a verification, in Unkey's words.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// The key may be used.
    Valid,
    /// There is no such key, or no longer.
    NotFound,
    /// Its owner switched it off.
    Disabled,
    /// Its end has come.
    Expired,
    /// Its workspace is switched off.
    Forbidden,
    /// It lacks a permission that the caller asked for.
    InsufficientPermissions,
}

impl Verdict {
    /// All verdicts, for tables and metrics.
    pub const ALL: [Self; 6] = [
        Self::Valid,
        Self::NotFound,
        Self::Disabled,
        Self::Expired,
        Self::Forbidden,
        Self::InsufficientPermissions,
    ];

    /// The `code` on the wire.
    pub fn code(self) -> &'static str {
        match self {
            Self::Valid => "VALID",
            Self::NotFound => "NOT_FOUND",
            Self::Disabled => "DISABLED",
            Self::Expired => "EXPIRED",
            Self::Forbidden => "FORBIDDEN",
            Self::InsufficientPermissions => "INSUFFICIENT_PERMISSIONS",
        }
    }
}

impl KeyRecord {
    /// The verdict on the key alone at `home_time`; which permissions are asked for is the caller's business.
    /// `home_time` is the agent's best upper estimate of the store's clock. The estimate
    /// can only end a key early; the store ends it for good (the state becomes `Expired`).
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
    fn each_state_has_its_verdict() {
        let now = StoreTime(1_000);
        assert_eq!(key(RecordState::Active, None).verdict(now), Verdict::Valid);
        assert_eq!(key(RecordState::Deleted, None).verdict(now), Verdict::NotFound);
        assert_eq!(key(RecordState::Disabled, Some(1)).verdict(now), Verdict::Disabled);
        assert_eq!(key(RecordState::Expired, Some(9_999)).verdict(now), Verdict::Expired);
    }

    #[test]
    fn an_end_that_has_come_needs_no_message() {
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
