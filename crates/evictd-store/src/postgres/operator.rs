//! What operators do with the command line.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;
use serde_json::json;

use super::head::lock_head;
use super::{PostgresStore, audit};
use crate::audit::{AuditQuery, AuditRecord};
use crate::audit_entry::{AuditEntry, Author};
use crate::error::StoreError;
use crate::log::Head;
use crate::operator::{NewRootKey, Operator, OperatorStore, RootKeyInfo};

#[async_trait]
impl OperatorStore for PostgresStore {
    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError> {
        let mut write = self.log("begin a new epoch").await?;
        let mut head = lock_head(&mut write).await?;
        head.begin_epoch(&mut write, &operator.name).await?;
        let head = head.head;
        let by = Author::operator(operator, None);
        audit::record(&mut write, by, &AuditEntry::epoch_begun(head.at)).await?;
        write.commit().await?;
        tracing::warn!(head = %head.at, "epoch begun by an operator; agents flush once");
        Ok(head)
    }

    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError> {
        let mut write = self.command("store a root key", operator).await?;
        let workspace = sqlx::query("INSERT INTO workspaces (id) VALUES ($1) ON CONFLICT (id) DO NOTHING");
        write.run(workspace.bind(root_key.workspace_id.as_str())).await?;
        let insert = sqlx::query(
            "INSERT INTO root_keys (id, workspace_id, hash, start, name, permissions, expires)
             VALUES ($1, $2, $3, $4, $5, $6, $7)",
        )
        .bind(root_key.id.as_str())
        .bind(root_key.workspace_id.as_str())
        .bind(&root_key.hash.0[..])
        .bind(&root_key.start)
        .bind(root_key.name.as_deref())
        .bind(json!(root_key.permissions).to_string())
        .bind(root_key.expires_at.map(StoreTime::as_millis));
        write.run_logged(insert).await?;
        let by = Author::operator(operator, Some(&root_key.workspace_id));
        audit::commit(write, by, &AuditEntry::root_key_created(&root_key.id)).await
    }

    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError> {
        let mut write = self.command("revoke a root key", operator).await?;
        let mark = sqlx::query(
            "UPDATE ONLY root_keys SET deleted_at_m = evictd_now() / 1000 WHERE id = $1 AND deleted_at_m IS NULL
             RETURNING workspace_id",
        );
        let workspace: Option<String> = write.value(mark.bind(id.as_str())).await?;
        let Some(workspace) = workspace.map(WorkspaceId::new) else { return Ok(false) };
        write.expect_log_row();
        let by = Author::operator(operator, Some(&workspace));
        audit::commit(write, by, &AuditEntry::root_key_revoked(id)).await?;
        Ok(true)
    }

    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError> {
        let mut write = self.command("protect an API", operator).await?;
        let mark = sqlx::query(
            "UPDATE ONLY apis SET delete_protection = $2 WHERE id = $1 AND deleted_at_m IS NULL
             RETURNING workspace_id",
        );
        let workspace: Option<String> = write.value(mark.bind(api.as_str()).bind(protect)).await?;
        let Some(workspace) = workspace.map(WorkspaceId::new) else { return Ok(false) };
        let by = Author::operator(operator, Some(&workspace));
        audit::commit(write, by, &AuditEntry::api_protected(api, protect)).await?;
        Ok(true)
    }

    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT id, workspace_id, start, name, permissions, enabled, created_at_m, expires FROM ONLY root_keys
                 WHERE deleted_at_m IS NULL ORDER BY created_at_m DESC, id DESC",
            )
        };
        let rows = self.lanes.records.rows("list root keys", read).await?;
        rows.iter().map(RootKeyInfo::read).collect()
    }

    async fn has_root_keys(&self) -> Result<bool, StoreError> {
        let find = || sqlx::query("SELECT FROM ONLY root_keys WHERE deleted_at_m IS NULL LIMIT 1");
        Ok(self.lanes.records.row("look for root keys", find).await?.is_some())
    }

    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
        audit::audit(&self.lanes.records, query).await
    }
}
