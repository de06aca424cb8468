//! Changes: those of the control API, and those that time makes.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;

use crate::audit::{Purge, Purged};
use crate::error::StoreError;

/// Changes of records. A key's existence is checked before the permission: a foreign or deleted key is
/// [`ChangeError::KeyNotFound`] even for a root key that may not change it, as with Unkey.
#[async_trait]
pub trait ChangeStore: Debug + Send + Sync + 'static {
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError>;

    /// Creates a key in a live API of the actor's workspace.
    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError>;

    /// Changes a live key.
    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Replaces a live key by a new one with its settings.
    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Deletes a live key.
    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Deletes a live API: one row of the log, however many keys it has.
    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError>;

    /// Makes a change of each kind of row that a change writes, and rolls it back. Does nothing in a store without an API.
    async fn try_change(&self) -> Result<(), StoreError>;

    /// Marks keys and root keys whose expiry has passed on the store's clock, at most `limit`. Each becomes a row of the
    /// log. Returns how many.
    async fn expire(&self, limit: usize) -> Result<u64, StoreError>;

    /// Deletes old rows: a prefix of the log, never a row from its middle, and old receipts and audit records. Called
    /// again until it finds none.
    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError>;
}

/// The author of a change through the control API, for the audit record.
#[derive(Clone, Debug)]
pub struct Actor {
    pub root_key_id: KeyId,
    pub workspace_id: WorkspaceId,
    /// The request, `req_...`.
    pub request_id: String,
    /// The client, as trusted proxies report it.
    pub remote_ip: Option<String>,
    /// The other end of the connection.
    pub peer_ip: Option<String>,
    pub user_agent: Option<String>,
}

/// Decides whether the actor may change a key of this API. Called in the transaction, after the key was found and
/// before it is changed.
pub type Authorize<'a> = &'a (dyn Fn(&ApiId) -> bool + Send + Sync);

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("the key doesn't exist or was deleted")]
    KeyNotFound,
    #[error("the API doesn't exist or was deleted")]
    ApiNotFound,
    #[error("the API is protected from deletion")]
    Protected,
    /// Soft-deleted keys count.
    #[error("a key with the same text exists already")]
    KeyExists,
    #[error("the root key doesn't have the permission, needed for API {api}")]
    Forbidden { api: ApiId },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How much of a deleted key remains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeleteMode {
    /// The row stays, marked as deleted. Direct SQL can restore it.
    Soft,
    /// The row is deleted, with hash, name and metadata. The opaque id remains, and the hash in the change's log row.
    Permanent,
}

#[derive(Clone, Debug)]
pub struct NewApi {
    pub id: ApiId,
    /// Not unique.
    pub name: String,
}

#[derive(Clone, Debug)]
pub struct NewKey {
    pub id: KeyId,
    pub api_id: ApiId,
    /// SHA-256 of its text. The text itself never reaches the store.
    pub hash: KeyHash,
    /// The part of its text that may be shown: the prefix and four characters.
    pub start: String,
    pub name: Option<String>,
    /// A JSON object as text.
    pub meta: Option<String>,
    pub external_id: Option<String>,
    /// Sorted, without duplicates.
    pub permissions: Vec<String>,
    pub enabled: bool,
    pub expires_at: Option<StoreTime>,
}

/// The change of an optional property.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub enum Edit<T> {
    #[default]
    Keep,
    Clear,
    Set(T),
}

impl<T> Edit<T> {
    /// Whether the property is to be set, and to what.
    pub(crate) fn columns(&self) -> (bool, Option<&T>) {
        match self {
            Self::Keep => (false, None),
            Self::Clear => (true, None),
            Self::Set(value) => (true, Some(value)),
        }
    }
}

/// Changes to a key.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct KeyUpdate {
    pub name: Edit<String>,
    /// A JSON object as text.
    pub meta: Edit<String>,
    pub external_id: Edit<String>,
    /// An expiry in the future makes an expired key active again.
    pub expires_at: Edit<StoreTime>,
    /// `None` leaves it as it is.
    pub enabled: Option<bool>,
    /// All of them, sorted, without duplicates; `None` leaves them as they are.
    pub permissions: Option<Vec<String>>,
}

/// A key that replaces another one.
#[derive(Clone, Debug)]
pub struct Reroll {
    /// The key that is replaced. The new one gets its settings.
    pub key: KeyId,
    /// How long the old key stays valid, by the store's clock: up to the end of that minute, unless it expires earlier.
    /// With zero it expires at once.
    pub grace: Duration,
    pub new_id: KeyId,
    /// SHA-256 of the new key's text.
    pub hash: KeyHash,
    /// The part of the new key's text that may be shown.
    pub start: String,
}

impl Reroll {
    /// When the old key expires if it is replaced at `now`.
    pub(crate) fn end_of_grace(&self, now: StoreTime) -> StoreTime {
        const MINUTE_MS: i64 = 60_000;
        if self.grace.is_zero() {
            return now;
        }
        let grace_ms = i64::try_from(self.grace.as_millis()).unwrap_or(i64::MAX);
        let over = now.as_millis().saturating_add(grace_ms);
        StoreTime::from_millis(over.saturating_add(MINUTE_MS - 1) / MINUTE_MS * MINUTE_MS)
    }
}
