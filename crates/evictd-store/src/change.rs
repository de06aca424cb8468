//! The changes of the control API, and why one is refused.

use std::time::Duration;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;

use crate::audit::{Purge, Purged};
use crate::error::StoreError;

/// What the control API changes, and what time does.
#[async_trait]
pub trait ChangeStore: std::fmt::Debug + Send + Sync + 'static {
    /// Creates an API.
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError>;

    /// Creates a key in a live API of the actor's workspace.
    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError>;

    /// Changes a live key. Existence is judged before permission.
    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Replaces a live key by a new one with its settings. Existence is judged before permission.
    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Deletes a live key. Existence is judged before permission: a foreign or deleted key is
    /// [`ChangeError::KeyNotFound`] even to those who may not delete (unkey-wire contract).
    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Deletes a live API: one row of the log, however many keys it has.
    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError>;

    /// Turns keys and root keys whose expiry has passed on the store's clock into expired ones, at most
    /// `limit`; each becomes a row of the log. Returns how many.
    async fn expire(&self, limit: usize) -> Result<u64, StoreError>;

    /// Deletes what is old enough to go. A prefix of the log in the order of positions: never a row from its
    /// middle. Called again until it finds nothing.
    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError>;
}

/// Who changes something through the control API, for the audit record.
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
    /// Whom it belongs to, in the words of its owner.
    pub external_id: Option<String>,
    /// What it may do, in the words of its owner: sorted, none twice.
    pub permissions: Vec<String>,
    /// Whether it grants anything from the start.
    pub enabled: bool,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
}

/// What becomes of an optional property.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum Edit<T> {
    /// It stays as it is.
    #[default]
    Keep,
    /// It is taken away.
    Clear,
    /// It becomes this.
    Set(T),
}

/// Changes to a key. What isn't said stays.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct KeyUpdate {
    /// Its name.
    pub name: Edit<String>,
    /// Its metadata: a JSON object as text.
    pub meta: Edit<String>,
    /// Whom it belongs to, in the words of its owner.
    pub external_id: Edit<String>,
    /// When it ends. An end in the future makes an expired key live again.
    pub expires_at: Edit<StoreTime>,
    /// Whether it grants anything.
    pub enabled: Option<bool>,
    /// What it may do, all of it: sorted, none twice.
    pub permissions: Option<Vec<String>>,
}

/// A key that takes another one's place.
#[derive(Clone, Debug)]
pub struct Reroll {
    /// The one that is replaced. Its settings go over to the new one.
    pub key: KeyId,
    /// How long the old one goes on, by the store's clock: to the end of the minute in which that is over, unless
    /// it ends earlier by itself. Zero: it has expired at once.
    pub grace: Duration,
    /// The new one's id, drawn by the caller.
    pub new_id: KeyId,
    /// SHA-256 of the new one's text.
    pub hash: KeyHash,
    /// What of the new one's text may be shown.
    pub start: String,
}

/// When a key ends that is replaced at `now`: at once without grace, else with the minute in which it is over.
pub(crate) fn end_of_grace(now: StoreTime, grace: Duration) -> StoreTime {
    const MINUTE_MS: i64 = 60_000;
    if grace.is_zero() {
        return now;
    }
    let grace_ms = i64::try_from(grace.as_millis()).unwrap_or(i64::MAX);
    let over = now.as_millis().saturating_add(grace_ms);
    StoreTime::from_millis(over.saturating_add(MINUTE_MS - 1) / MINUTE_MS * MINUTE_MS)
}
