//! What operators do with the command line.

use async_trait::async_trait;
use evictd_core::history::BeginCause;
use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;
use serde_json::json;

use super::clock::now;
use super::write::{SqliteWrite, failed};
use super::{SqliteStore, audit, log};
use crate::audit::{AuditQuery, AuditRecord};
use crate::audit_entry::{AuditEntry, Author};
use crate::error::StoreError;
use crate::log::Head;
use crate::operator::{NewRootKey, Operator, OperatorStore, RootKeyInfo};
use crate::rows::sql_limit;

#[async_trait]
impl OperatorStore for SqliteStore {
    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError> {
        let mut write = SqliteWrite::begin(&self.pools.writer, "begin a new epoch").await?;
        let head = log::begin(&mut write, BeginCause::Declared, Some(&operator.name)).await?;
        let by = Author::operator(operator, None);
        audit::record(&mut write, by, &AuditEntry::epoch_begun(head.at)).await?;
        write.commit().await?;
        tracing::warn!(head = %head.at, "epoch begun by an operator; agents flush once");
        Ok(head)
    }

    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError> {
        let mut write = self.pools.change("store a root key").await?;
        let now = now().as_millis();
        let workspace = sqlx::query(
            "INSERT INTO workspaces (id, created_at_m) VALUES (?1, ?2) ON CONFLICT (id) DO NOTHING",
        );
        write.run(workspace.bind(root_key.workspace_id.as_str()).bind(now)).await?;
        let insert = sqlx::query(
            "INSERT INTO root_keys (id, workspace_id, hash, start, name, permissions, expires, created_at_m)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )
        .bind(root_key.id.as_str())
        .bind(root_key.workspace_id.as_str())
        .bind(&root_key.hash.0[..])
        .bind(&root_key.start)
        .bind(root_key.name.as_deref())
        .bind(json!(root_key.permissions).to_string())
        .bind(root_key.expires_at.map(StoreTime::as_millis))
        .bind(now);
        write.run_logged(insert).await?;
        let by = Author::operator(operator, Some(&root_key.workspace_id));
        audit::commit(write, by, &AuditEntry::root_key_created(&root_key.id)).await
    }

    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError> {
        let mut write = self.pools.change("revoke a root key").await?;
        let mark = sqlx::query(
            "UPDATE root_keys SET deleted_at_m = ?2 WHERE id = ?1 AND deleted_at_m IS NULL RETURNING workspace_id",
        );
        let workspace: Option<String> = write.value(mark.bind(id.as_str()).bind(now().as_millis())).await?;
        let Some(workspace) = workspace.map(WorkspaceId::new) else { return Ok(false) };
        write.expect_log_row();
        let by = Author::operator(operator, Some(&workspace));
        audit::commit(write, by, &AuditEntry::root_key_revoked(id)).await?;
        Ok(true)
    }

    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError> {
        let mut write = self.pools.change("protect an API").await?;
        let mark = sqlx::query(
            "UPDATE apis SET delete_protection = ?2 WHERE id = ?1 AND deleted_at_m IS NULL RETURNING workspace_id",
        );
        let workspace: Option<String> = write.value(mark.bind(api.as_str()).bind(protect)).await?;
        let Some(workspace) = workspace.map(WorkspaceId::new) else { return Ok(false) };
        let by = Author::operator(operator, Some(&workspace));
        audit::commit(write, by, &AuditEntry::api_protected(api, protect)).await?;
        Ok(true)
    }

    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, workspace_id, start, name, permissions, enabled, created_at_m, expires FROM root_keys
             WHERE deleted_at_m IS NULL ORDER BY created_at_m DESC, id DESC",
        )
        .fetch_all(&self.pools.records)
        .await
        .map_err(failed("list root keys"))?;
        rows.iter().map(RootKeyInfo::read).collect()
    }

    async fn has_root_keys(&self) -> Result<bool, StoreError> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM root_keys WHERE deleted_at_m IS NULL)")
            .fetch_one(&self.pools.records)
            .await
            .map_err(failed("look for root keys"))
    }

    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
        let rows = sqlx::query(
            "SELECT event_id, time, workspace_id, event, description, actor_type, actor_id, actor_name,
                    remote_ip, peer_ip, user_agent, targets, correlation_id
             FROM audit_log
             WHERE (?1 IS NULL OR workspace_id = ?1)
               AND (?2 IS NULL
                    -- The cheap test first: a million records then take one second instead of three.
                    OR (instr(targets, json_quote(?2)) > 0
                        AND EXISTS (SELECT 1 FROM json_each(targets) WHERE value ->> 'id' = ?2)))
               AND (?3 IS NULL OR correlation_id = ?3)
               AND (?4 IS NULL OR time >= ?4)
             ORDER BY time DESC, rowid DESC LIMIT ?5",
        )
        .bind(query.workspace_id.as_ref().map(WorkspaceId::as_str))
        .bind(query.target.as_deref())
        .bind(query.request_id.as_deref())
        .bind(query.since.map(StoreTime::as_millis))
        .bind(sql_limit(query.limit))
        .fetch_all(&self.pools.records)
        .await
        .map_err(failed("read its audit log"))?;
        rows.iter().map(AuditRecord::read).collect()
    }
}
