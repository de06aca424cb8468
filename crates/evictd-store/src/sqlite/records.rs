//! What is read of keys, root keys and APIs.
//!
//! A record is live only while everything above it is: the API of a key, the workspace of both. Rows whose
//! API or workspace is gone (direct SQL without foreign keys) count as deleted.

use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::write::failed;
use super::{log, now};
use crate::StoreError;
use crate::change::{Api, KeyDetails, RootKeyInfo};

/// What `hash` stands for, and the head: one statement, so one snapshot (R6).
pub(super) async fn lookup(readers: &SqlitePool, hash: KeyHash) -> Result<Lookup, StoreError> {
    const ACTION: &str = "look up a key";
    let row = sqlx::query(
        "SELECT log_head.epoch, log_head.head,
                k.id AS key_id, k.api_id, k.workspace_id AS key_workspace_id, k.name, k.meta,
                k.enabled AS key_enabled, k.expires AS key_expires, k.expired AS key_expired,
                (k.deleted_at_m IS NOT NULL OR a.id IS NULL OR a.deleted_at_m IS NOT NULL
                 OR kw.id IS NULL) AS key_deleted,
                r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                (r.deleted_at_m IS NOT NULL OR rw.id IS NULL) AS deleted
         FROM log_head
         LEFT JOIN keys k ON k.hash = ?1
         LEFT JOIN apis a ON a.id = k.api_id
         LEFT JOIN workspaces kw ON kw.id = k.workspace_id
         LEFT JOIN root_keys r ON r.hash = ?1
         LEFT JOIN workspaces rw ON rw.id = r.workspace_id",
    )
    .bind(&hash.0[..])
    .fetch_optional(readers)
    .await
    .map_err(failed(ACTION))?;
    let as_of = log::head_of(row.as_ref())?;
    let mut record = Record::Absent;
    if let Some(row) = row {
        let now = now();
        if let Some(key) = key_record(&row, now).map_err(failed(ACTION))? {
            record = Record::Key(key);
        } else if let Some(root_key) = root_key_record(&row, now)? {
            record = Record::RootKey(root_key);
        }
    }
    Ok(Lookup { as_of, record })
}

fn key_record(row: &SqliteRow, now: StoreTime) -> sqlx::Result<Option<KeyRecord>> {
    let Some(key_id) = row.try_get::<Option<&str>, _>("key_id")? else {
        return Ok(None);
    };
    let expires: Option<i64> = row.try_get("key_expires")?;
    let deleted: bool = row.try_get("key_deleted")?;
    let state = state(deleted, row.try_get("key_enabled")?, row.try_get("key_expired")?, expires, now);
    let text = |column| -> sqlx::Result<Option<Box<str>>> {
        // What was deleted is nobody's business any more; ids remain so that floors reach the answer.
        Ok(row.try_get::<Option<&str>, _>(column)?.filter(|_| !deleted).map(Box::from))
    };
    Ok(Some(KeyRecord {
        key_id: KeyId::new(key_id),
        api_id: ApiId::new(row.try_get::<&str, _>("api_id")?),
        workspace_id: WorkspaceId::new(row.try_get::<&str, _>("key_workspace_id")?),
        state,
        name: text("name")?,
        meta: text("meta")?,
        expires_at: expires.map(StoreTime::from_millis),
    }))
}

/// Reads the columns of a root key that [`lookup`] and [`root_key`] have in common.
fn root_key_record(row: &SqliteRow, now: StoreTime) -> Result<Option<RootKeyRecord>, StoreError> {
    let read = || -> sqlx::Result<_> {
        let Some(id) = row.try_get::<Option<&str>, _>("id")? else {
            return Ok(None);
        };
        let expires: Option<i64> = row.try_get("expires")?;
        let state =
            state(row.try_get("deleted")?, row.try_get("enabled")?, row.try_get("expired")?, expires, now);
        Ok(Some((id, row.try_get::<&str, _>("workspace_id")?, state, row.try_get("permissions")?, expires)))
    };
    let Some((id, workspace, state, permissions, expires)) = read().map_err(failed("read a root key"))?
    else {
        return Ok(None);
    };
    Ok(Some(RootKeyRecord {
        root_key_id: KeyId::new(id),
        workspace_id: WorkspaceId::new(workspace),
        state,
        permissions: parse_permissions(id, permissions)?,
        expires_at: expires.map(StoreTime::from_millis),
    }))
}

fn state(deleted: bool, enabled: bool, expired: bool, expires: Option<i64>, now: StoreTime) -> RecordState {
    if deleted {
        RecordState::Deleted
    } else if !enabled {
        RecordState::Disabled
    } else if expired || expires.is_some_and(|expires| StoreTime::from_millis(expires) <= now) {
        RecordState::Expired
    } else {
        RecordState::Active
    }
}

fn parse_permissions(root_key: &str, permissions: &str) -> Result<Vec<Box<str>>, StoreError> {
    serde_json::from_str(permissions).map_err(|_| StoreError::Corrupt {
        what: "permission list of a root key",
        value: root_key.to_owned(),
    })
}

/// The root key with this hash, whatever its state.
pub(super) async fn root_key(
    readers: &SqlitePool,
    hash: KeyHash,
) -> Result<Option<RootKeyRecord>, StoreError> {
    let row = sqlx::query(
        "SELECT r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                (r.deleted_at_m IS NOT NULL OR w.id IS NULL) AS deleted
         FROM root_keys r LEFT JOIN workspaces w ON w.id = r.workspace_id WHERE r.hash = ?1",
    )
    .bind(&hash.0[..])
    .fetch_optional(readers)
    .await
    .map_err(failed("look up a root key"))?;
    row.map_or(Ok(None), |row| root_key_record(&row, now()))
}

/// Whether there is a root key that wasn't revoked.
pub(super) async fn has_root_keys(readers: &SqlitePool) -> Result<bool, StoreError> {
    sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM root_keys WHERE deleted_at_m IS NULL)")
        .fetch_one(readers)
        .await
        .map_err(failed("look for root keys"))
}

/// Root keys that weren't deleted, newest first.
pub(super) async fn root_keys(readers: &SqlitePool) -> Result<Vec<RootKeyInfo>, StoreError> {
    const ACTION: &str = "list root keys";
    let rows = sqlx::query(
        "SELECT id, workspace_id, start, name, permissions, created_at_m, expires FROM root_keys
         WHERE deleted_at_m IS NULL ORDER BY created_at_m DESC, id DESC",
    )
    .fetch_all(readers)
    .await
    .map_err(failed(ACTION))?;
    let info = |row: &SqliteRow| -> Result<RootKeyInfo, StoreError> {
        let failed = failed(ACTION);
        let id: &str = row.try_get("id").map_err(&failed)?;
        Ok(RootKeyInfo {
            id: KeyId::new(id),
            workspace_id: WorkspaceId::new(row.try_get::<&str, _>("workspace_id").map_err(&failed)?),
            start: row.try_get("start").map_err(&failed)?,
            name: row.try_get("name").map_err(&failed)?,
            permissions: parse_permissions(id, row.try_get("permissions").map_err(&failed)?)?
                .into_iter()
                .map(String::from)
                .collect(),
            created_at: StoreTime::from_millis(row.try_get("created_at_m").map_err(&failed)?),
            expires_at: row
                .try_get::<Option<i64>, _>("expires")
                .map_err(&failed)?
                .map(StoreTime::from_millis),
        })
    };
    rows.iter().map(info).collect()
}

/// A live API of this workspace.
pub(super) async fn api(
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

/// A live key of this workspace, in a live API.
pub(super) async fn key(
    readers: &SqlitePool,
    workspace: &WorkspaceId,
    key: &KeyId,
) -> Result<Option<KeyDetails>, StoreError> {
    const ACTION: &str = "read a key";
    let row = sqlx::query(
        "SELECT k.api_id, k.start, k.name, k.meta, k.enabled, k.expires, k.created_at_m, k.updated_at_m
         FROM keys k
         JOIN apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
         JOIN workspaces w ON w.id = k.workspace_id
         WHERE k.id = ?1 AND k.workspace_id = ?2 AND k.deleted_at_m IS NULL",
    )
    .bind(key.as_str())
    .bind(workspace.as_str())
    .fetch_optional(readers)
    .await
    .map_err(failed(ACTION))?;
    let details = |row: &SqliteRow| -> sqlx::Result<KeyDetails> {
        Ok(KeyDetails {
            id: key.clone(),
            api_id: ApiId::new(row.try_get::<&str, _>("api_id")?),
            start: row.try_get("start")?,
            name: row.try_get("name")?,
            meta: row.try_get("meta")?,
            enabled: row.try_get("enabled")?,
            expires_at: row.try_get::<Option<i64>, _>("expires")?.map(StoreTime::from_millis),
            created_at: StoreTime::from_millis(row.try_get("created_at_m")?),
            updated_at: row.try_get::<Option<i64>, _>("updated_at_m")?.map(StoreTime::from_millis),
        })
    };
    row.as_ref().map(details).transpose().map_err(failed(ACTION))
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
