//! What is read of keys, root keys and APIs.
//!
//! A record is live only while everything above it is: the API of a key, the workspace of both. Rows whose
//! API or workspace is gone (direct SQL without foreign keys) count as deleted.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::clock::now;
use super::write::failed;
use super::{SqliteStore, log};
use crate::error::StoreError;
use crate::record::{Api, KeyDetails, KeyPage, KeyQuery, RecordStore};
use crate::rows::{self, record_state, sql_limit};

#[async_trait]
impl RecordStore for SqliteStore {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        const ACTION: &str = "look up a key";
        let row = sqlx::query(
            "SELECT log_head.epoch, log_head.head, log_head.incarnation, log_head.token, log_head.round, log_head.store_id,
                    k.id AS key_id, k.api_id, k.workspace_id AS key_workspace_id, k.name, k.meta,
                    k.external_id, k.permissions AS key_permissions,
                    k.enabled AS key_enabled, k.expires AS key_expires, k.expired AS key_expired,
                    kw.enabled AS key_workspace_enabled,
                    (k.deleted_at_m IS NOT NULL OR a.id IS NULL OR a.deleted_at_m IS NOT NULL
                     OR kw.id IS NULL) AS key_deleted,
                    r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                    rw.enabled AS workspace_enabled,
                    (r.deleted_at_m IS NOT NULL OR rw.id IS NULL) AS deleted
             FROM log_head
             LEFT JOIN keys k ON k.hash = ?1
             LEFT JOIN apis a ON a.id = k.api_id
             LEFT JOIN workspaces kw ON kw.id = k.workspace_id
             LEFT JOIN root_keys r ON r.hash = ?1
             LEFT JOIN workspaces rw ON rw.id = r.workspace_id",
        )
        .bind(&hash.0[..])
        .fetch_optional(&self.connections.lookups)
        .await
        .map_err(failed(ACTION))?;
        let head = log::head_of(row.as_ref())?;
        let provenance = log::provenance_of(row.as_ref())?;
        let mut record = Record::Absent;
        if let Some(row) = row {
            let now = now();
            if let Some(key) = key_record(&row, now)? {
                record = Record::Key(key);
            } else if let Some(root_key) = root_key_record(&row, now)? {
                record = Record::RootKey(root_key);
            }
        }
        Ok(Lookup { as_of: head.at, provenance, token: head.token, record })
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        let row = sqlx::query(
            "SELECT r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                    w.enabled AS workspace_enabled, (r.deleted_at_m IS NOT NULL OR w.id IS NULL) AS deleted
             FROM root_keys r LEFT JOIN workspaces w ON w.id = r.workspace_id WHERE r.hash = ?1",
        )
        .bind(&hash.0[..])
        .fetch_optional(&self.connections.records)
        .await
        .map_err(failed("look up a root key"))?;
        row.map_or(Ok(None), |row| root_key_record(&row, now()))
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        live_api(&self.connections.records, workspace, api).await
    }

    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError> {
        let row = sqlx::query(
            "SELECT k.id, k.api_id, k.start, k.name, k.meta, k.external_id, k.permissions, k.enabled, k.expires,
                    k.created_at_m, k.updated_at_m
             FROM keys k
             JOIN apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
             JOIN workspaces w ON w.id = k.workspace_id
             WHERE k.id = ?1 AND k.workspace_id = ?2 AND k.deleted_at_m IS NULL",
        )
        .bind(key.as_str())
        .bind(workspace.as_str())
        .fetch_optional(&self.connections.records)
        .await
        .map_err(failed("read a key"))?;
        row.as_ref().map(key_details).transpose()
    }

    async fn list_keys(
        &self,
        workspace: &WorkspaceId,
        list: KeyQuery,
    ) -> Result<Option<KeyPage>, StoreError> {
        let list = &list;
        if live_api(&self.connections.records, workspace, &list.api_id).await?.is_none() {
            return Ok(None);
        }
        let rows = sqlx::query(
            "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires,
                    created_at_m, updated_at_m
             FROM keys
             WHERE api_id = ?1 AND workspace_id = ?2 AND deleted_at_m IS NULL AND id >= ?3
               AND (?4 IS NULL OR external_id = ?4)
             ORDER BY id LIMIT ?5",
        )
        .bind(list.api_id.as_str())
        .bind(workspace.as_str())
        .bind(list.from.as_ref().map_or("", KeyId::as_str))
        .bind(list.external_id.as_deref())
        .bind(sql_limit(list.limit.saturating_add(1)))
        .fetch_all(&self.connections.records)
        .await
        .map_err(failed("list keys"))?;
        let mut keys = rows.iter().map(key_details).collect::<Result<Vec<_>, _>>()?;
        let next = keys.get(list.limit).map(|key| key.id.clone());
        keys.truncate(list.limit);
        Ok(Some(KeyPage { keys, next }))
    }
}

fn key_record(row: &SqliteRow, now: StoreTime) -> Result<Option<KeyRecord>, StoreError> {
    let failed = failed("look up a key");
    let Some(key_id) = row.try_get::<Option<&str>, _>("key_id").map_err(&failed)? else {
        return Ok(None);
    };
    let read = || -> sqlx::Result<_> {
        let expires_at = time(row, "key_expires")?;
        let flags = ["key_deleted", "key_workspace_enabled", "key_enabled", "key_expired"];
        let state = record_state(|column| row.try_get(column), flags, expires_at, now)?;
        // What was deleted is nobody's business any more; ids remain so that floors reach the answer.
        let told = |column| -> sqlx::Result<Option<Box<str>>> {
            Ok(row
                .try_get::<Option<&str>, _>(column)?
                .filter(|_| state != RecordState::Deleted)
                .map(Box::from))
        };
        let (api_id, workspace_id) =
            (row.try_get::<&str, _>("api_id")?, row.try_get::<&str, _>("key_workspace_id")?);
        let record = KeyRecord {
            key_id: KeyId::new(key_id),
            api_id: ApiId::new(api_id),
            workspace_id: WorkspaceId::new(workspace_id),
            state,
            name: told("name")?,
            meta: told("meta")?,
            external_id: told("external_id")?,
            permissions: Vec::new(),
            expires_at,
        };
        Ok((record, told("key_permissions")?))
    };
    let (record, permissions) = read().map_err(&failed)?;
    let permissions = permissions.map_or(Ok(Vec::new()), |list| rows::permissions(key_id, &list))?;
    Ok(Some(KeyRecord { permissions, ..record }))
}

/// Reads the columns of a root key that [`lookup`] and [`root_key`] have in common.
fn root_key_record(row: &SqliteRow, now: StoreTime) -> Result<Option<RootKeyRecord>, StoreError> {
    let read = || -> sqlx::Result<_> {
        let Some(id) = row.try_get::<Option<&str>, _>("id")? else {
            return Ok(None);
        };
        let expires_at = time(row, "expires")?;
        let flags = ["deleted", "workspace_enabled", "enabled", "expired"];
        let state = record_state(|column| row.try_get(column), flags, expires_at, now)?;
        Ok(Some((
            id,
            row.try_get::<&str, _>("workspace_id")?,
            state,
            expires_at,
            row.try_get("permissions")?,
        )))
    };
    let Some((id, workspace, state, expires_at, permissions)) = read().map_err(failed("read a root key"))?
    else {
        return Ok(None);
    };
    Ok(Some(RootKeyRecord {
        root_key_id: KeyId::new(id),
        workspace_id: WorkspaceId::new(workspace),
        state,
        permissions: rows::permissions(id, permissions)?,
        expires_at,
    }))
}

/// A column of milliseconds.
pub(super) fn time(row: &SqliteRow, column: &str) -> sqlx::Result<Option<StoreTime>> {
    Ok(row.try_get::<Option<i64>, _>(column)?.map(StoreTime::from_millis))
}

/// A live API of this workspace.
async fn live_api(
    readers: &SqlitePool,
    workspace: &WorkspaceId,
    api: &ApiId,
) -> Result<Option<Api>, StoreError> {
    let name: Option<String> = sqlx::query_scalar(
        "SELECT a.name FROM apis a JOIN workspaces w ON w.id = a.workspace_id
         WHERE a.id = ?1 AND a.workspace_id = ?2 AND a.deleted_at_m IS NULL",
    )
    .bind(api.as_str())
    .bind(workspace.as_str())
    .fetch_optional(readers)
    .await
    .map_err(failed("read an API"))?;
    Ok(name.map(|name| Api { id: api.clone(), name }))
}

fn key_details(row: &SqliteRow) -> Result<KeyDetails, StoreError> {
    let read = || -> sqlx::Result<_> {
        let details = KeyDetails {
            id: KeyId::new(row.try_get::<&str, _>("id")?),
            api_id: ApiId::new(row.try_get::<&str, _>("api_id")?),
            start: row.try_get("start")?,
            name: row.try_get("name")?,
            meta: row.try_get("meta")?,
            external_id: row.try_get("external_id")?,
            permissions: Vec::new(),
            enabled: row.try_get("enabled")?,
            expires_at: time(row, "expires")?,
            created_at: StoreTime::from_millis(row.try_get("created_at_m")?),
            updated_at: time(row, "updated_at_m")?,
        };
        Ok((details, row.try_get::<&str, _>("permissions")?))
    };
    let (details, permissions) = read().map_err(failed("read a key"))?;
    Ok(KeyDetails { permissions: rows::permissions(details.id.as_str(), permissions)?, ..details })
}

/// Whether a key or root key has come to its end and isn't marked yet.
pub(super) async fn any_to_expire(readers: &SqlitePool, now: StoreTime) -> Result<bool, StoreError> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM keys WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL)
             OR EXISTS (SELECT 1 FROM root_keys
                        WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL)",
    )
    .bind(now.as_millis())
    .fetch_one(readers)
    .await
    .map_err(failed("look for keys to expire"))
}
