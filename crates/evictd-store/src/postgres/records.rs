//! What is read of keys, root keys and APIs.
//!
//! A record is live only while everything above it is: the API of a key, the workspace of both. Rows whose
//! API or workspace is gone (direct SQL in a session that checks no foreign keys) count as deleted.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::connections::{Lane, Statement, failed};
use super::{PostgresStore, head};
use crate::error::StoreError;
use crate::record::{Api, KeyDetails, KeyPage, KeyQuery, RecordStore};
use crate::rows::{permissions, record_state, sql_limit};

#[async_trait]
impl RecordStore for PostgresStore {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        let row = self.connections.lookups.row(LOOK_UP, || look_up(hash, false)).await?;
        read_lookup(row.as_ref())
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        let ask = || {
            sqlx::query(
                "SELECT evictd_now() AS now, r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                        coalesce(w.enabled, false) AS workspace_enabled,
                        (r.deleted_at_m IS NOT NULL OR w.id IS NULL) AS deleted
                 FROM ONLY root_keys r LEFT JOIN ONLY workspaces w ON w.id = r.workspace_id WHERE r.hash = $1",
            )
            .bind(&hash.0[..])
        };
        let row = self.connections.records.row("look up a root key", ask).await?;
        row.map_or(Ok(None), |row| root_key_record(&row))
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        live_api(&self.connections.records, workspace, api).await
    }

    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError> {
        let ask = || {
            sqlx::query(
                "SELECT k.id, k.api_id, k.start, k.name, k.meta, k.external_id, k.permissions, k.enabled,
                        k.expires, k.created_at_m, k.updated_at_m
                 FROM ONLY keys k
                 JOIN ONLY apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
                 JOIN ONLY workspaces w ON w.id = k.workspace_id
                 WHERE k.id = $1 AND k.workspace_id = $2 AND k.deleted_at_m IS NULL",
            )
            .bind(key.as_str())
            .bind(workspace.as_str())
        };
        self.connections.records.row("read a key", ask).await?.as_ref().map(key_details).transpose()
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
        let rows = self.connections.records.rows("list keys", || list_statement(workspace, list)).await?;
        let mut keys = rows.iter().map(key_details).collect::<Result<Vec<_>, _>>()?;
        let next = keys.get(list.limit).map(|key| key.id.clone());
        keys.truncate(list.limit);
        Ok(Some(KeyPage { keys, next }))
    }
}

const LOOK_UP: &str = "look up a key";

/// The same from the home database or a standby of it, and from nothing else: where something copies the tables
/// one by one, the head may come before what it vouches for. Such a copy shows itself as other histories do (R2).
pub(super) async fn lookup_in_replica(lookups: &Lane, hash: KeyHash) -> Result<Lookup, StoreError> {
    let row = lookups.row(LOOK_UP, || look_up(hash, true)).await?;
    let is_own = row.as_ref().map_or(Ok(true), |row| row.try_get("is_own")).map_err(failed(LOOK_UP))?;
    if is_own { read_lookup(row.as_ref()) } else { Err(StoreError::NotAReplica) }
}

/// Whether the log is this server's own is only looked at if that is asked.
fn look_up(hash: KeyHash, ask_whose: bool) -> Statement {
    sqlx::query(
        "SELECT log_head.epoch, log_head.head, log_head.incarnation, log_head.token, log_head.round, log_head.store_id,
                evictd_now() AS now,
                CASE WHEN $2 THEN log_head.is_original AND log_head.xmin = log_head.written_by
                    AND log_head.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND log_head.system_identifier = (SELECT system_identifier FROM pg_control_system())
                    -- A standby that was promoted may have been written to, by whoever takes it for home.
                    AND CASE WHEN pg_is_in_recovery() THEN true
                        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint = log_head.timeline
                        END
                END AS is_own,
                k.id AS key_id, k.api_id, k.workspace_id AS key_workspace_id, k.name, k.meta,
                k.external_id, k.permissions AS key_permissions,
                k.enabled AS key_enabled, k.expires AS key_expires, k.expired AS key_expired,
                coalesce(kw.enabled, false) AS key_workspace_enabled,
                (k.deleted_at_m IS NOT NULL OR a.id IS NULL OR a.deleted_at_m IS NOT NULL
                 OR kw.id IS NULL) AS key_deleted,
                r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                coalesce(rw.enabled, false) AS workspace_enabled,
                (r.deleted_at_m IS NOT NULL OR rw.id IS NULL) AS deleted
         FROM ONLY log_head
         LEFT JOIN ONLY keys k ON k.hash = $1
         LEFT JOIN ONLY apis a ON a.id = k.api_id
         LEFT JOIN ONLY workspaces kw ON kw.id = k.workspace_id
         LEFT JOIN ONLY root_keys r ON r.hash = $1
         LEFT JOIN ONLY workspaces rw ON rw.id = r.workspace_id",
    )
    .bind(&hash.0[..])
    .bind(ask_whose)
}

fn read_lookup(row: Option<&PgRow>) -> Result<Lookup, StoreError> {
    let head = head::head_of(row)?;
    let provenance = head::provenance_of(row)?;
    let mut record = Record::Absent;
    if let Some(row) = row {
        if let Some(key) = key_record(row)? {
            record = Record::Key(key);
        } else if let Some(root_key) = root_key_record(row)? {
            record = Record::RootKey(root_key);
        }
    }
    Ok(Lookup { as_of: head.at, provenance, token: head.token, record })
}

fn key_record(row: &PgRow) -> Result<Option<KeyRecord>, StoreError> {
    let read = || -> sqlx::Result<_> {
        let Some(key_id) = row.try_get::<Option<&str>, _>("key_id")? else {
            return Ok(None);
        };
        let expires_at = time(row, "key_expires")?;
        let flags = ["key_deleted", "key_workspace_enabled", "key_enabled", "key_expired"];
        let now = StoreTime(row.try_get("now")?);
        let state = record_state(|column| row.try_get(column), flags, expires_at, now)?;
        // What was deleted is nobody's business any more; ids remain so that floors reach the answer.
        let told = |column| -> sqlx::Result<Option<Box<str>>> {
            let text = row.try_get::<Option<&str>, _>(column)?;
            Ok(text.filter(|_| state != RecordState::Deleted).map(Box::from))
        };
        let record = KeyRecord {
            key_id: KeyId::new(key_id),
            api_id: ApiId::new(row.try_get::<&str, _>("api_id")?),
            workspace_id: WorkspaceId::new(row.try_get::<&str, _>("key_workspace_id")?),
            state,
            name: told("name")?,
            meta: told("meta")?,
            external_id: told("external_id")?,
            permissions: Vec::new(),
            expires_at,
        };
        Ok(Some((record, told("key_permissions")?)))
    };
    let Some((record, list)) = read().map_err(failed(LOOK_UP))? else { return Ok(None) };
    let permissions = list.map_or(Ok(Vec::new()), |list| permissions(record.key_id.as_str(), &list))?;
    Ok(Some(KeyRecord { permissions, ..record }))
}

/// Reads the columns of a root key that [`lookup`] and [`root_key`] have in common.
fn root_key_record(row: &PgRow) -> Result<Option<RootKeyRecord>, StoreError> {
    let read = || -> sqlx::Result<_> {
        let Some(id) = row.try_get::<Option<&str>, _>("id")? else {
            return Ok(None);
        };
        let expires_at = time(row, "expires")?;
        let flags = ["deleted", "workspace_enabled", "enabled", "expired"];
        let now = StoreTime(row.try_get("now")?);
        let record = RootKeyRecord {
            root_key_id: KeyId::new(id),
            workspace_id: WorkspaceId::new(row.try_get::<&str, _>("workspace_id")?),
            state: record_state(|column| row.try_get(column), flags, expires_at, now)?,
            permissions: Vec::new(),
            expires_at,
        };
        Ok(Some((record, row.try_get::<&str, _>("permissions")?)))
    };
    let Some((record, list)) = read().map_err(failed("read a root key"))? else { return Ok(None) };
    let permissions = permissions(record.root_key_id.as_str(), list)?;
    Ok(Some(RootKeyRecord { permissions, ..record }))
}

/// A column of milliseconds.
pub(super) fn time(row: &PgRow, column: &str) -> sqlx::Result<Option<StoreTime>> {
    Ok(row.try_get::<Option<i64>, _>(column)?.map(StoreTime::from_millis))
}

/// A live API of this workspace.
async fn live_api(records: &Lane, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
    const ACTION: &str = "read an API";
    let ask = || {
        sqlx::query(
            "SELECT a.name FROM ONLY apis a JOIN ONLY workspaces w ON w.id = a.workspace_id
             WHERE a.id = $1 AND a.workspace_id = $2 AND a.deleted_at_m IS NULL",
        )
        .bind(api.as_str())
        .bind(workspace.as_str())
    };
    let Some(row) = records.row(ACTION, ask).await? else { return Ok(None) };
    Ok(Some(Api { id: api.clone(), name: row.try_get("name").map_err(failed(ACTION))? }))
}

fn list_statement(workspace: &WorkspaceId, list: &KeyQuery) -> Statement {
    sqlx::query(
        "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires,
                created_at_m, updated_at_m
         FROM ONLY keys
         WHERE api_id = $1 AND workspace_id = $2 AND deleted_at_m IS NULL AND id >= $3
           AND ($4::text IS NULL OR external_id = $4)
         ORDER BY id LIMIT $5",
    )
    .bind(list.api_id.as_str())
    .bind(workspace.as_str())
    .bind(list.from.as_ref().map_or("", KeyId::as_str))
    .bind(list.external_id.as_deref())
    .bind(sql_limit(list.limit.saturating_add(1)))
}

fn key_details(row: &PgRow) -> Result<KeyDetails, StoreError> {
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
    let (details, list) = read().map_err(failed("read a key"))?;
    Ok(KeyDetails { permissions: permissions(details.id.as_str(), list)?, ..details })
}

/// Whether a key or root key has come to its end and isn't marked yet.
pub(super) async fn any_to_expire(log: &Lane) -> Result<bool, StoreError> {
    const ACTION: &str = "look for keys to expire";
    let ask = || {
        sqlx::query(
            "SELECT EXISTS (SELECT FROM ONLY keys
                            WHERE expires <= now / 1000 AND NOT expired AND deleted_at_m IS NULL)
                 OR EXISTS (SELECT FROM ONLY root_keys
                            WHERE expires <= now / 1000 AND NOT expired AND deleted_at_m IS NULL) AS any
             FROM (SELECT evictd_now() AS now OFFSET 0) AS clock",
        )
    };
    let row = log.row(ACTION, ask).await?;
    row.map_or(Ok(false), |row| row.try_get("any")).map_err(failed(ACTION))
}
