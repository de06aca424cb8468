//! Reading keys, root keys and APIs.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{Lookup, RootKeyRecord};

use super::PostgresStore;
use super::lanes::{Lane, Statement};
use crate::error::StoreError;
use crate::log_rows::no_head;
use crate::record::{Api, KeyDetails, KeyPage, KeyQuery, RecordStore, read_lookup, read_root_key};
use crate::rows::{Columns, sql_limit};

const LOOK_UP: &str = "look up a key";

#[async_trait]
impl RecordStore for PostgresStore {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        let row = self.lanes.lookups.row(LOOK_UP, || look_up(hash, false)).await?.ok_or_else(no_head)?;
        read_lookup(&row, row.time("now")?)
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT evictd_now() AS now, r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                        coalesce(w.enabled, false) AS workspace_enabled,
                        (r.deleted_at_m IS NOT NULL OR w.id IS NULL) AS deleted
                 FROM ONLY root_keys r LEFT JOIN ONLY workspaces w ON w.id = r.workspace_id WHERE r.hash = $1",
            )
            .bind(&hash.0[..])
        };
        let row = self.lanes.records.row("look up a root key", read).await?;
        row.map_or(Ok(None), |row| read_root_key(&row, row.time("now")?))
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT a.name FROM ONLY apis a JOIN ONLY workspaces w ON w.id = a.workspace_id
                 WHERE a.id = $1 AND a.workspace_id = $2 AND a.deleted_at_m IS NULL",
            )
            .bind(api.as_str())
            .bind(workspace.as_str())
        };
        let Some(row) = self.lanes.records.row("read an API", read).await? else { return Ok(None) };
        Ok(Some(Api { id: api.clone(), name: row.string("name")? }))
    }

    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError> {
        let read = || {
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
        self.lanes.records.row("read a key", read).await?.as_ref().map(KeyDetails::read).transpose()
    }

    async fn list_keys(
        &self,
        workspace: &WorkspaceId,
        query: KeyQuery,
    ) -> Result<Option<KeyPage>, StoreError> {
        if self.api(workspace, &query.api_id).await?.is_none() {
            return Ok(None);
        }
        let read = || {
            sqlx::query(
                "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires,
                        created_at_m, updated_at_m
                 FROM ONLY keys
                 WHERE api_id = $1 AND workspace_id = $2 AND deleted_at_m IS NULL AND id >= $3
                   AND ($4::text IS NULL OR external_id = $4)
                 ORDER BY id LIMIT $5",
            )
            .bind(query.api_id.as_str())
            .bind(workspace.as_str())
            .bind(query.from.as_ref().map_or("", KeyId::as_str))
            .bind(query.external_id.as_deref())
            .bind(sql_limit(query.limit.saturating_add(1)))
        };
        KeyPage::read(&self.lanes.records.rows("list keys", read).await?, query.limit).map(Some)
    }
}

/// A lookup in the home database or a physical standby of it. Any other copy is refused: where tables are copied one by
/// one, the head may arrive before the records that it covers. Such a copy differs from home as other histories do (R2).
pub(super) async fn lookup_in_replica(lookups: &Lane, hash: KeyHash) -> Result<Lookup, StoreError> {
    let row = lookups.row(LOOK_UP, || look_up(hash, true)).await?.ok_or_else(no_head)?;
    if row.flag("is_own")? { read_lookup(&row, row.time("now")?) } else { Err(StoreError::NotAReplica) }
}

/// `asks_owner` adds the check whether the log is this server's own.
fn look_up(hash: KeyHash, asks_owner: bool) -> Statement {
    sqlx::query(
        "SELECT log_head.epoch, log_head.head, log_head.incarnation, log_head.token, log_head.round, log_head.store_id,
                evictd_now() AS now,
                CASE WHEN $2 THEN log_head.is_original AND log_head.xmin = log_head.written_by
                    AND log_head.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND log_head.system_identifier = (SELECT system_identifier FROM pg_control_system())
                    -- Clients may have taken a promoted standby for home, and written to it.
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
    .bind(asks_owner)
}
