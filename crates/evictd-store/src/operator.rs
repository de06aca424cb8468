//! What operators do and look at.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;

use crate::audit::{AuditQuery, AuditRecord};
use crate::error::StoreError;
use crate::log::Head;

/// What operators do and look at.
#[async_trait]
pub trait OperatorStore: std::fmt::Debug + Send + Sync + 'static {
    /// Begins an incarnation and an epoch because an operator says that this store is the one to follow, and may have
    /// gone back (R2, R15). All agents flush once. Returns the new head: its position goes on.
    /// [`StoreError::EpochsUsedUp`] after the last one.
    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError>;

    /// Stores a root key, and the workspace if it is new.
    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError>;

    /// Marks a root key as deleted, which every agent learns like any other deletion. False if there is no
    /// such root key, or it was deleted before.
    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError>;

    /// Protects a live API from deletion, or lifts that. False if there is no such API.
    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError>;

    /// All root keys, newest first, without their hashes.
    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError>;

    /// Whether anybody can call the control API.
    async fn has_root_keys(&self) -> Result<bool, StoreError>;

    /// Audit records, newest first.
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError>;
}

/// Who changes something with the command line on the store itself, for the audit record.
#[derive(Clone, Debug)]
pub struct Operator {
    /// The user that the system knows.
    pub name: String,
    /// Drawn for this change, `req_...`: its receipt can be asked for.
    pub request_id: String,
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
    /// Whether it may be used; only direct SQL switches one off.
    pub enabled: bool,
    /// When it was created.
    pub created_at: StoreTime,
    /// When it ends.
    pub expires_at: Option<StoreTime>,
}
