//! What is read of keys, root keys and APIs.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{Lookup, RootKeyRecord};
use evictd_core::time::StoreTime;

use crate::error::StoreError;

/// What is read of keys, root keys and APIs.
#[async_trait]
pub trait RecordStore: std::fmt::Debug + Send + Sync + 'static {
    /// What `hash` stands for, with the head read in the same snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError>;

    /// The root key with this hash, whatever its state.
    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError>;

    /// A live API of this workspace.
    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError>;

    /// A live key of this workspace, in a live API.
    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError>;

    /// Live keys of a live API of this workspace; `None` if there is no such API.
    async fn list_keys(&self, workspace: &WorkspaceId, list: KeyQuery)
    -> Result<Option<KeyPage>, StoreError>;
}

/// An API as stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Api {
    /// Its id.
    pub id: ApiId,
    /// Its name.
    pub name: String,
}

/// Which keys of an API to list.
#[derive(Clone, Debug)]
pub struct KeyQuery {
    /// The API.
    pub api_id: ApiId,
    /// Only those that belong to this external id.
    pub external_id: Option<String>,
    /// From this id on, in ascending order of their bytes.
    pub from: Option<KeyId>,
    /// How many at most.
    pub limit: usize,
}

/// A part of a list of keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyPage {
    /// In ascending order of ids.
    pub keys: Vec<KeyDetails>,
    /// The first one of the next page, if there is one.
    pub next: Option<KeyId>,
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
    /// Whom it belongs to, in the words of its owner.
    pub external_id: Option<String>,
    /// What it may do, in the words of its owner: sorted, none twice.
    pub permissions: Vec<String>,
    /// Whether it grants anything.
    pub enabled: bool,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
    /// When it was created.
    pub created_at: StoreTime,
    /// When it last changed, if it has.
    pub updated_at: Option<StoreTime>,
}
