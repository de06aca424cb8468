//! What operators do with the command line: root keys, delete protection, epochs, audit records.

use std::fmt::Debug;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;

use crate::audit::{AuditQuery, AuditRecord};
use crate::error::StoreError;
use crate::log::Head;
use crate::rows::Columns;

/// What operators do with the command line.
#[async_trait]
pub trait OperatorStore: Debug + Send + Sync + 'static {
    /// Begins an incarnation and an epoch: the operator declares that agents are to follow this store, which may have
    /// gone back (R2, R15). All agents flush once. Returns the new head; positions go on from the old one.
    /// [`StoreError::EpochsUsedUp`] after the last epoch.
    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError>;

    /// Stores a root key, and its workspace if that is new.
    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError>;

    /// Marks a root key as deleted; agents receive that like any other deletion. Returns whether there was such a
    /// root key that wasn't deleted.
    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError>;

    /// Protects a live API from deletion, or lifts the protection. Returns whether there is such an API.
    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError>;

    /// Returns all root keys that aren't deleted, newest first, without their hashes.
    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError>;

    /// Whether there is a root key: without one, no client can call the control API.
    async fn has_root_keys(&self) -> Result<bool, StoreError>;

    /// Returns audit records, newest first.
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError>;
}

/// The author of a change made with the command line, for the audit record.
#[derive(Clone, Debug)]
pub struct Operator {
    /// The name of the system's user.
    pub name: String,
    /// Drawn for this change, `req_...`: clients can ask for its receipt.
    pub request_id: String,
}

/// A root key to store.
#[derive(Clone, Debug)]
pub struct NewRootKey {
    pub id: KeyId,
    pub workspace_id: WorkspaceId,
    /// SHA-256 of its text.
    pub hash: KeyHash,
    /// The part of its text that may be shown.
    pub start: String,
    pub name: Option<String>,
    pub permissions: Vec<String>,
    pub expires_at: Option<StoreTime>,
}

/// A root key as listed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RootKeyInfo {
    pub id: KeyId,
    pub workspace_id: WorkspaceId,
    /// The part of its text that may be shown.
    pub start: String,
    pub name: Option<String>,
    pub permissions: Vec<String>,
    /// Only direct SQL disables a root key.
    pub enabled: bool,
    pub created_at: StoreTime,
    pub expires_at: Option<StoreTime>,
}

impl RootKeyInfo {
    pub(crate) fn read(row: &impl Columns) -> Result<Self, StoreError> {
        let id = row.text("id")?;
        Ok(Self {
            id: KeyId::new(id),
            workspace_id: WorkspaceId::new(row.text("workspace_id")?),
            start: row.string("start")?,
            name: row.optional_string("name")?,
            permissions: row.list("permissions", id)?,
            enabled: row.flag("enabled")?,
            created_at: row.millis("created_at_m")?,
            expires_at: row.optional_millis("expires")?,
        })
    }
}
