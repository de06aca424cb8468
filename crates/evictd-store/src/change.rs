//! The changes of the control API, and why one is refused.

use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;

use crate::StoreError;

/// Who changes something, for the audit record.
#[derive(Clone, Debug)]
pub struct Actor {
    /// The root key that authorised the change.
    pub root_key_id: KeyId,
    /// The workspace it acts for.
    pub workspace_id: WorkspaceId,
    /// The request, `req_...`.
    pub request_id: String,
    /// Where the request came from.
    pub remote_ip: Option<String>,
    /// What the client calls itself.
    pub user_agent: Option<String>,
}

/// Asked inside the transaction, after existence and before the change: may the actor do this to a key
/// of this API?
pub type Authorize<'a> = &'a (dyn Fn(&ApiId) -> bool + Send + Sync);

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// No live key of the workspace has this id.
    #[error("the key doesn't exist or was deleted")]
    KeyNotFound,
    /// No live API of the workspace has this id.
    #[error("the API doesn't exist or was deleted")]
    ApiNotFound,
    /// The API is delete-protected.
    #[error("the API is protected from deletion")]
    Protected,
    /// A key with this hash exists already, perhaps soft-deleted.
    #[error("a key with the same text exists already")]
    KeyExists,
    /// The caller may not do this.
    #[error("the root key doesn't have the permission, needed for API {api}")]
    Forbidden {
        /// The API of the key.
        api: ApiId,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How much of a key remains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeleteMode {
    /// The row stays, marked: recoverable by direct SQL.
    Soft,
    /// The row goes, with hash, name and metadata; the opaque id remains, and the hash in the change's log row.
    Permanent,
}

/// An API to create.
#[derive(Clone, Debug)]
pub struct NewApi {
    /// Drawn by the caller.
    pub id: ApiId,
    /// For people; not unique.
    pub name: String,
}

/// An API as stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Api {
    /// Its id.
    pub id: ApiId,
    /// Its name.
    pub name: String,
}

/// A key to create.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Drawn by the caller.
    pub id: KeyId,
    /// Where it belongs.
    pub api_id: ApiId,
    /// SHA-256 of its text; the text itself never gets here.
    pub hash: KeyHash,
    /// What of its text may be shown: prefix and four characters.
    pub start: String,
    /// Its name.
    pub name: Option<String>,
    /// Its metadata: a JSON object as text.
    pub meta: Option<String>,
    /// Whether it grants anything from the start.
    pub enabled: bool,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
}

/// A key as stored, without its hash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyDetails {
    /// Its id.
    pub id: KeyId,
    /// Where it belongs.
    pub api_id: ApiId,
    /// What of its text may be shown.
    pub start: String,
    /// Its name.
    pub name: Option<String>,
    /// Its metadata: a JSON object as text.
    pub meta: Option<String>,
    /// Whether it grants anything.
    pub enabled: bool,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
    /// When it was created.
    pub created_at: StoreTime,
    /// When it last changed, if it has.
    pub updated_at: Option<StoreTime>,
}

/// A root key to store.
#[derive(Clone, Debug)]
pub struct NewRootKey {
    /// Drawn by the caller.
    pub id: KeyId,
    /// The workspace it acts for; created when new.
    pub workspace_id: WorkspaceId,
    /// SHA-256 of its text.
    pub hash: KeyHash,
    /// What of its text may be shown.
    pub start: String,
    /// For people.
    pub name: Option<String>,
    /// Literal permission strings.
    pub permissions: Vec<String>,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
}

/// A root key as listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RootKeyInfo {
    /// Its id.
    pub id: KeyId,
    /// The workspace it acts for.
    pub workspace_id: WorkspaceId,
    /// What of its text may be shown.
    pub start: String,
    /// For people.
    pub name: Option<String>,
    /// Literal permission strings.
    pub permissions: Vec<String>,
    /// When it was created.
    pub created_at: StoreTime,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
}
