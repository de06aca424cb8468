//! What operators do and look at: root keys, protection, epochs, audit records.

use async_trait::async_trait;
use evictd_core::history::BeginCause;
use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;
use serde_json::json;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::clock::now;
use super::records::time;
use super::write::{Write, failed};
use super::{SqliteStore, audit, log};
use crate::audit::{AuditQuery, AuditRecord};
use crate::error::StoreError;
use crate::log::Head;
use crate::operator::{NewRootKey, Operator, OperatorStore, RootKeyInfo};
use crate::rows::{AuditEntry, Author, permissions};

#[async_trait]
impl OperatorStore for SqliteStore {
    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError> {
        let mut write = Write::begin(&self.connections.writer, "begin a new epoch").await?;
        let head = log::begin(&mut write, BeginCause::Declared, Some(&operator.name)).await?;
        let by = Author::operator(operator, None);
        audit::record(&mut write, by, &AuditEntry::epoch_begun(head.at)).await?;
        write.commit().await?;
        tracing::warn!(head = %head.at, "a new epoch begins because an operator said so; agents flush once");
        Ok(head)
    }

    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError> {
        let (mut write, _turn) = self.connections.change("store a root key").await?;
        create_root_key(&mut write, operator, &root_key).await?;
        write.commit_change(Some(&operator.request_id)).await
    }

    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError> {
        let (mut write, _turn) = self.connections.change("revoke a root key").await?;
        let revoked = revoke_root_key(&mut write, operator, id).await?;
        write.commit_change(Some(&operator.request_id)).await?;
        Ok(revoked)
    }

    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError> {
        let (mut write, _turn) = self.connections.change("protect an API").await?;
        let found = protect_api(&mut write, operator, api, protect).await?;
        write.commit_change(Some(&operator.request_id)).await?;
        Ok(found)
    }

    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError> {
        const ACTION: &str = "list root keys";
        let rows = sqlx::query(
            "SELECT id, workspace_id, start, name, permissions, enabled, created_at_m, expires FROM root_keys
             WHERE deleted_at_m IS NULL ORDER BY created_at_m DESC, id DESC",
        )
        .fetch_all(&self.connections.records)
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
                permissions: permissions(id, row.try_get("permissions").map_err(&failed)?)?,
                enabled: row.try_get("enabled").map_err(&failed)?,
                created_at: StoreTime::from_millis(row.try_get("created_at_m").map_err(&failed)?),
                expires_at: time(row, "expires").map_err(&failed)?,
            })
        };
        rows.iter().map(info).collect()
    }

    async fn has_root_keys(&self) -> Result<bool, StoreError> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM root_keys WHERE deleted_at_m IS NULL)")
            .fetch_one(&self.connections.records)
            .await
            .map_err(failed("look for root keys"))
    }

    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
        audit::audit(&self.connections.records, query).await
    }
}

pub(super) async fn create_root_key(
    write: &mut Write,
    operator: &Operator,
    root_key: &NewRootKey,
) -> Result<(), StoreError> {
    let now = now().as_millis();
    let workspace =
        sqlx::query("INSERT INTO workspaces (id, created_at_m) VALUES (?1, ?2) ON CONFLICT (id) DO NOTHING");
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
    write.run(insert).await?;
    write.expect_news();
    let by = Author::operator(operator, Some(&root_key.workspace_id));
    audit::record(write, by, &AuditEntry::root_key_created(&root_key.id)).await
}

pub(super) async fn revoke_root_key(
    write: &mut Write,
    operator: &Operator,
    id: &KeyId,
) -> Result<bool, StoreError> {
    let mark = sqlx::query(
        "UPDATE root_keys SET deleted_at_m = ?2 WHERE id = ?1 AND deleted_at_m IS NULL RETURNING workspace_id",
    );
    let workspace: Option<String> = write.value(mark.bind(id.as_str()).bind(now().as_millis())).await?;
    let Some(workspace) = workspace.map(WorkspaceId::new) else { return Ok(false) };
    write.expect_news();
    let by = Author::operator(operator, Some(&workspace));
    audit::record(write, by, &AuditEntry::root_key_revoked(id)).await?;
    Ok(true)
}

pub(super) async fn protect_api(
    write: &mut Write,
    operator: &Operator,
    api: &ApiId,
    protect: bool,
) -> Result<bool, StoreError> {
    let mark = sqlx::query(
        "UPDATE apis SET delete_protection = ?2 WHERE id = ?1 AND deleted_at_m IS NULL RETURNING workspace_id",
    );
    let workspace: Option<String> = write.value(mark.bind(api.as_str()).bind(protect)).await?;
    let Some(workspace) = workspace.map(WorkspaceId::new) else { return Ok(false) };
    let by = Author::operator(operator, Some(&workspace));
    audit::record(write, by, &AuditEntry::api_protected(api, protect)).await?;
    Ok(true)
}
