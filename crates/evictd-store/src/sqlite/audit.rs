//! Writing audit records.

use evictd_core::ids::WorkspaceId;
use serde_json::{Value, json};

use super::clock::now;
use super::write::SqliteWrite;
use crate::audit_entry::{AuditEntry, Author};
use crate::error::StoreError;

/// Writes the audit record of a request's change.
pub(super) async fn record(
    write: &mut SqliteWrite,
    by: Author<'_>,
    entry: &AuditEntry,
) -> Result<(), StoreError> {
    let insert = sqlx::query(
        "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, actor_name,
                                remote_ip, user_agent, targets, correlation_id, peer_ip)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6,
                 CASE WHEN ?5 = 'rootkey'
                      THEN coalesce((SELECT name FROM root_keys WHERE id = ?6), 'root key') ELSE ?6 END,
                 ?7, substr(?8, 1, 1024), ?9, ?10, ?11)",
    )
    .bind(now().as_millis())
    .bind(by.workspace.map(WorkspaceId::as_str))
    .bind(&entry.event)
    .bind(&entry.description)
    .bind(by.actor_type)
    .bind(by.actor_id)
    .bind(by.remote_ip)
    .bind(by.user_agent)
    .bind(entry.targets().to_string())
    .bind(by.request_id)
    .bind(by.peer_ip);
    write.run(insert).await.map(drop)
}

/// Writes the audit record of a request's change, and commits both.
pub(super) async fn commit(
    mut write: SqliteWrite,
    by: Author<'_>,
    entry: &AuditEntry,
) -> Result<(), StoreError> {
    record(&mut write, by, entry).await?;
    write.commit_change(Some(by.request_id)).await
}

/// Writes the records of log rows that no request wrote.
pub(super) async fn record_unrequested(write: &mut SqliteWrite, records: &[Value]) -> Result<(), StoreError> {
    if records.is_empty() {
        return Ok(());
    }
    let insert = sqlx::query(
        "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, targets)
         SELECT value ->> 'time', value ->> 'workspace_id', value ->> 'event', value ->> 'description',
                value ->> 'actor_type', value ->> 'actor_id', value -> 'targets'
         FROM json_each(?1)",
    );
    write.run(insert.bind(json!(records).to_string())).await.map(drop)
}
