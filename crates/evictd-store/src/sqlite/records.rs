//! Reading keys, root keys and APIs.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{Lookup, RootKeyRecord};

use super::SqliteStore;
use super::clock::now;
use super::write::failed;
use crate::error::StoreError;
use crate::log_rows::no_head;
use crate::record::{Api, KeyDetails, KeyPage, KeyQuery, RecordStore, read_lookup, read_root_key};
use crate::rows::sql_limit;

/// Lists the live keys of an API. The index has them in order, so a page costs no more than it has rows.
const LIST: &str = "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires, created_at_m, updated_at_m
     FROM keys INDEXED BY keys_listed
     WHERE api_id = ?1 AND workspace_id = ?2 AND deleted_at_m IS NULL AND id >= ?3
     ORDER BY id LIMIT ?4";

/// The same for one external id.
const LIST_BY_EXTERNAL_ID: &str = "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires, created_at_m, updated_at_m
     FROM keys INDEXED BY keys_external
     WHERE api_id = ?1 AND workspace_id = ?2 AND deleted_at_m IS NULL AND id >= ?3 AND external_id = ?5
     ORDER BY id LIMIT ?4";

#[async_trait]
impl RecordStore for SqliteStore {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
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
        .fetch_optional(&self.pools.lookups)
        .await
        .map_err(failed("look up a key"))?;
        read_lookup(&row.ok_or_else(no_head)?, now())
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        let row = sqlx::query(
            "SELECT r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                    w.enabled AS workspace_enabled, (r.deleted_at_m IS NOT NULL OR w.id IS NULL) AS deleted
             FROM root_keys r LEFT JOIN workspaces w ON w.id = r.workspace_id WHERE r.hash = ?1",
        )
        .bind(&hash.0[..])
        .fetch_optional(&self.pools.authentications)
        .await
        .map_err(failed("look up a root key"))?;
        row.map_or(Ok(None), |row| read_root_key(&row, now()))
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        let name: Option<String> = sqlx::query_scalar(
            "SELECT a.name FROM apis a JOIN workspaces w ON w.id = a.workspace_id
             WHERE a.id = ?1 AND a.workspace_id = ?2 AND a.deleted_at_m IS NULL",
        )
        .bind(api.as_str())
        .bind(workspace.as_str())
        .fetch_optional(&self.pools.records)
        .await
        .map_err(failed("read an API"))?;
        Ok(name.map(|name| Api { id: api.clone(), name }))
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
        .fetch_optional(&self.pools.records)
        .await
        .map_err(failed("read a key"))?;
        row.as_ref().map(KeyDetails::read).transpose()
    }

    async fn list_keys(
        &self,
        workspace: &WorkspaceId,
        query: KeyQuery,
    ) -> Result<Option<KeyPage>, StoreError> {
        if self.api(workspace, &query.api_id).await?.is_none() {
            return Ok(None);
        }
        let statement = if query.external_id.is_none() { LIST } else { LIST_BY_EXTERNAL_ID };
        let rows = sqlx::query(statement)
            .bind(query.api_id.as_str())
            .bind(workspace.as_str())
            .bind(query.from.as_ref().map_or("", KeyId::as_str))
            .bind(sql_limit(query.limit.saturating_add(1)))
            .bind(query.external_id.as_deref())
            .fetch_all(&self.pools.records)
            .await
            .map_err(failed("list keys"))?;
        KeyPage::read(&rows, query.limit).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Row;

    use super::*;

    /// Failure: one client's lists scan or sort all keys of its API, and delay other clients.
    #[tokio::test]
    async fn page_reads_no_other_rows_than_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("home.db")).await.unwrap();
        for (statement, index) in [
            (LIST, "keys_listed (api_id=? AND id>?)"),
            (LIST_BY_EXTERNAL_ID, "keys_external (api_id=? AND external_id=? AND id>?)"),
        ] {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            let plan = sqlx::query(explain).fetch_all(&store.pools.records).await.unwrap();
            let steps: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
            assert_eq!(steps, [format!("SEARCH keys USING INDEX {index}")]);
        }
        store.pools.close().await;
    }
}
