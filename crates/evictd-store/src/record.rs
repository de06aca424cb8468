//! Reading keys, root keys and APIs.
//!
//! A record is live only while everything above it is: the API of a key, the workspace of both. A record whose API or
//! workspace is missing counts as deleted: direct SQL may check no foreign keys.

use std::fmt::Debug;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::time::StoreTime;

use crate::error::StoreError;
use crate::log_rows::{head, provenance};
use crate::rows::Columns;

/// Reading keys, root keys and APIs.
#[async_trait]
pub trait RecordStore: Debug + Send + Sync + 'static {
    /// Returns the record with this hash, and the head from the same snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError>;

    /// Returns the root key with this hash, in whatever state.
    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError>;

    /// Returns a live API of this workspace.
    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError>;

    /// Returns a live key of this workspace, in a live API.
    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError>;

    /// Returns live keys of a live API of this workspace; `None` if there is no such API.
    async fn list_keys(
        &self,
        workspace: &WorkspaceId,
        query: KeyQuery,
    ) -> Result<Option<KeyPage>, StoreError>;
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Api {
    pub id: ApiId,
    pub name: String,
}

/// Which keys of an API to list.
#[derive(Clone, Debug)]
pub struct KeyQuery {
    pub api_id: ApiId,
    /// Only keys with this external id.
    pub external_id: Option<String>,
    /// From this id on, in ascending order of the ids' bytes.
    pub from: Option<KeyId>,
    pub limit: usize,
}

/// A part of a list of keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyPage {
    /// In ascending order of ids.
    pub keys: Vec<KeyDetails>,
    /// The first key of the next page; `None` on the last page.
    pub next: Option<KeyId>,
}

impl KeyPage {
    /// Reads rows, of which there may be one more than `limit`.
    pub(crate) fn read(rows: &[impl Columns], limit: usize) -> Result<Self, StoreError> {
        let mut keys = rows.iter().map(KeyDetails::read).collect::<Result<Vec<_>, _>>()?;
        let next = keys.get(limit).map(|key| key.id.clone());
        keys.truncate(limit);
        Ok(Self { keys, next })
    }
}

/// A key as stored, without its hash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyDetails {
    pub id: KeyId,
    pub api_id: ApiId,
    /// The part of the key's text that may be shown.
    pub start: String,
    pub name: Option<String>,
    /// A JSON object as text.
    pub meta: Option<String>,
    pub external_id: Option<String>,
    /// Sorted, without duplicates.
    pub permissions: Vec<String>,
    pub enabled: bool,
    pub expires_at: Option<StoreTime>,
    pub created_at: StoreTime,
    pub updated_at: Option<StoreTime>,
}

impl KeyDetails {
    pub(crate) fn read(row: &impl Columns) -> Result<Self, StoreError> {
        let id = row.text("id")?;
        Ok(Self {
            id: KeyId::new(id),
            api_id: ApiId::new(row.text("api_id")?),
            start: row.string("start")?,
            name: row.optional_string("name")?,
            meta: row.optional_string("meta")?,
            external_id: row.optional_string("external_id")?,
            permissions: row.list("permissions", id)?,
            enabled: row.flag("enabled")?,
            expires_at: row.optional_millis("expires")?,
            created_at: row.millis("created_at_m")?,
            updated_at: row.optional_millis("updated_at_m")?,
        })
    }
}

/// Reads a lookup: the columns of the head, of a key (`key_...` where a root key has the same) and of a root key.
pub(crate) fn read_lookup(row: &impl Columns, now: StoreTime) -> Result<Lookup, StoreError> {
    let head = head(Some(row))?;
    let record = if let Some(key) = read_key(row, now)? {
        Record::Key(key)
    } else {
        read_root_key(row, now)?.map_or(Record::Absent, Record::RootKey)
    };
    Ok(Lookup { as_of: head.at, provenance: provenance(row)?, token: head.token, record })
}

fn read_key(row: &impl Columns, now: StoreTime) -> Result<Option<KeyRecord>, StoreError> {
    let Some(key_id) = row.optional_text("key_id")? else { return Ok(None) };
    let expires_at = row.optional_millis("key_expires")?;
    let flags = ["key_deleted", "key_workspace_enabled", "key_enabled", "key_expired"];
    let state = record_state(row, flags, expires_at, now)?;
    // Of a deleted key only the ids are given out, so that floors apply to the answer.
    let is_deleted = state == RecordState::Deleted;
    let text = |column| -> Result<Option<Box<str>>, StoreError> {
        Ok(row.optional_text(column)?.filter(|_| !is_deleted).map(Box::from))
    };
    Ok(Some(KeyRecord {
        key_id: KeyId::new(key_id),
        api_id: ApiId::new(row.text("api_id")?),
        workspace_id: WorkspaceId::new(row.text("key_workspace_id")?),
        state,
        name: text("name")?,
        meta: text("meta")?,
        external_id: text("external_id")?,
        permissions: if is_deleted { Vec::new() } else { row.list("key_permissions", key_id)? },
        expires_at,
    }))
}

/// Reads a root key; `None` if the row has none.
pub(crate) fn read_root_key(row: &impl Columns, now: StoreTime) -> Result<Option<RootKeyRecord>, StoreError> {
    let Some(id) = row.optional_text("id")? else { return Ok(None) };
    let expires_at = row.optional_millis("expires")?;
    let flags = ["deleted", "workspace_enabled", "enabled", "expired"];
    Ok(Some(RootKeyRecord {
        root_key_id: KeyId::new(id),
        workspace_id: WorkspaceId::new(row.text("workspace_id")?),
        state: record_state(row, flags, expires_at, now)?,
        permissions: row.list("permissions", id)?,
        expires_at,
    }))
}

/// A record's state on the store's clock, from four columns: whether it or its parent is deleted or missing; whether its
/// workspace is enabled; whether it is; whether it was marked as expired. The first one that applies counts.
fn record_state(
    row: &impl Columns,
    [deleted, workspace_enabled, enabled, expired]: [&'static str; 4],
    expires_at: Option<StoreTime>,
    now: StoreTime,
) -> Result<RecordState, StoreError> {
    Ok(if row.flag(deleted)? {
        RecordState::Deleted
    } else if !row.flag(workspace_enabled)? {
        RecordState::WorkspaceDisabled
    } else if !row.flag(enabled)? {
        RecordState::Disabled
    } else if row.flag(expired)? || expires_at.is_some_and(|end| end <= now) {
        RecordState::Expired
    } else {
        RecordState::Active
    })
}
