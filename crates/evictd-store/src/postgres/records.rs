//! Reading keys, root keys and APIs.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::record::{Lookup, RootKeyRecord};

use super::{PostgresStore, lookups};
use crate::error::StoreError;
use crate::record::{Api, KeyDetails, KeyPage, KeyQuery, RecordStore, read_root_key};
use crate::rows::{Columns, sql_limit};

/// Lists the live keys of an API. The index has them in order, so a page costs no more than it has rows.
const LIST: &str = "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires, created_at_m, updated_at_m
     FROM ONLY keys
     WHERE api_id = $1 AND workspace_id = $2 AND deleted_at_m IS NULL AND id >= $3
     ORDER BY api_id, id LIMIT $4";

/// The same for one external id.
const LIST_BY_EXTERNAL_ID: &str = "SELECT id, api_id, start, name, meta, external_id, permissions, enabled, expires, created_at_m, updated_at_m
     FROM ONLY keys
     WHERE api_id = $1 AND workspace_id = $2 AND deleted_at_m IS NULL AND id >= $3 AND external_id = $5
     ORDER BY api_id, external_id, id LIMIT $4";

#[async_trait]
impl RecordStore for PostgresStore {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        lookups::lookup(&self.lanes.lookups, hash).await
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
        let row = self.lanes.authentications.row("look up a root key", read).await?;
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
        let statement = if query.external_id.is_none() { LIST } else { LIST_BY_EXTERNAL_ID };
        let read = || {
            let read = sqlx::query(statement)
                .bind(query.api_id.as_str())
                .bind(workspace.as_str())
                .bind(query.from.as_ref().map_or("", KeyId::as_str))
                .bind(sql_limit(query.limit.saturating_add(1)));
            match &query.external_id {
                Some(external_id) => read.bind(external_id),
                None => read,
            }
        };
        KeyPage::read(&self.lanes.records.rows("list keys", read).await?, query.limit).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Row};

    use super::*;
    use crate::HomeStore;
    use crate::postgres::PostgresOptions;

    /// Failure: one client's lists scan or sort all keys of its API, and delay other clients.
    #[tokio::test]
    async fn page_reads_no_other_rows_than_its_own() {
        let server = evictd_postgres_server::shared().unwrap();
        let url = server.create_database("listing").unwrap();
        let store = PostgresStore::connect(PostgresOptions::new(&url).unwrap()).await.unwrap();
        for (statement, index) in [(LIST, "keys_listed"), (LIST_BY_EXTERNAL_ID, "keys_external")] {
            let values = [("$1", "'api_1'"), ("$2", "'ws_1'"), ("$3", "''"), ("$4", "10"), ("$5", "'user'")];
            let statement =
                values.iter().fold(statement.to_owned(), |text, (place, value)| text.replace(place, value));
            let explain = format!("EXPLAIN {statement}");
            let explain = || sqlx::query(AssertSqlSafe(explain.clone()));
            let plan = store.lanes.records.rows("explain", explain).await.unwrap();
            let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
            let plan = plan.join("\n");
            assert!(plan.contains(&format!("Index Scan using {index}")) && !plan.contains("Sort"), "{plan}");
        }
        store.close().await;
    }
}
