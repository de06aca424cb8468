//! Writing and reading audit records.

use evictd_core::ids::WorkspaceId;
use evictd_core::time::StoreTime;
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;

use super::lanes::{Lane, Statement};
use super::write::PostgresWrite;
use crate::audit::{AuditQuery, AuditRecord};
use crate::audit_entry::{AuditEntry, Author};
use crate::error::StoreError;
use crate::rows::{Columns, sql_limit};

const READ: &str = "read its audit log";

/// One statement writes at most so many records.
const BATCH: usize = 10_000;

/// Writes the audit record of a request's change.
pub(super) async fn record(
    write: &mut PostgresWrite,
    by: Author<'_>,
    entry: &AuditEntry,
) -> Result<(), StoreError> {
    let insert = sqlx::query(
        "INSERT INTO audit_log (workspace_id, event, description, actor_type, actor_id, actor_name,
                                remote_ip, user_agent, targets, correlation_id, peer_ip)
         VALUES ($1, $2, $3, $4, $5,
                 CASE WHEN $4 = 'rootkey'
                      THEN coalesce((SELECT name FROM ONLY root_keys WHERE id = $5), 'root key') ELSE $5 END,
                 $6, left($7, 1024), $8::jsonb, $9, $10)",
    )
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
    mut write: PostgresWrite,
    by: Author<'_>,
    entry: &AuditEntry,
) -> Result<(), StoreError> {
    record(&mut write, by, entry).await?;
    write.commit_change().await
}

/// Writes the records of log rows that no request wrote.
pub(super) async fn record_unrequested(
    write: &mut PostgresWrite,
    records: &[Value],
) -> Result<(), StoreError> {
    for records in records.chunks(BATCH) {
        let insert = sqlx::query(
            "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, targets)
             SELECT time, workspace_id, event, description, actor_type, actor_id, targets
             FROM jsonb_to_recordset($1::jsonb) AS record (time bigint, workspace_id text, event text,
                      description text, actor_type text, actor_id text, targets jsonb)",
        );
        write.run(insert.bind(json!(records).to_string())).await?;
    }
    Ok(())
}

/// A target with at most so many records is rare.
const FEW: i64 = 10_000;

/// The condition on a target that the index supports.
const HAS_TARGET: &str = "jsonb_path_query_array(targets, '$[*].id') @> jsonb_build_array($1::text)";

/// Returns the newest records that meet the query.
pub(super) async fn audit(records: &Lane, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
    let is_rare = match &query.target {
        None => false,
        Some(target) => is_rare(records, target).await?,
    };
    records.rows(READ, || statement(query, is_rare)).await?.iter().map(AuditRecord::read).collect()
}

async fn is_rare(records: &Lane, target: &str) -> Result<bool, StoreError> {
    let count = format!(
        "SELECT count(*) <= $2 AS is_rare FROM (SELECT FROM ONLY audit_log WHERE {HAS_TARGET} LIMIT $2 + 1) AS found"
    );
    let row = records.row(READ, || sqlx::query(AssertSqlSafe(count.clone())).bind(target).bind(FEW)).await?;
    row.map_or(Ok(false), |row| row.flag("is_rare"))
}

/// A rare target, such as a key, is found by the index and its records are sorted. A common one, such as an API with
/// millions of changes, is found soon by reading from the newest record on. The planner can't tell these apart, and takes
/// seconds where it guesses wrong.
fn statement(query: &AuditQuery, target_is_rare: bool) -> Statement {
    let records = if target_is_rare {
        format!("(SELECT * FROM ONLY audit_log WHERE {HAS_TARGET} OFFSET 0) AS found")
    } else {
        "ONLY audit_log".to_owned()
    };
    sqlx::query(AssertSqlSafe(format!(
        "SELECT event_id, time, workspace_id, event, description, actor_type, actor_id, actor_name,
                remote_ip, peer_ip, user_agent, targets::text AS targets, correlation_id
         FROM {records}
         WHERE ($1::text IS NULL OR targets @> jsonb_build_array(jsonb_build_object('id', $1)))
           AND ($2::text IS NULL OR workspace_id = $2)
           AND ($3::text IS NULL OR correlation_id = $3)
           AND ($4::bigint IS NULL OR time >= $4)
         ORDER BY time DESC, written DESC LIMIT $5"
    )))
    .bind(query.target.as_deref())
    .bind(query.workspace_id.as_ref().map(WorkspaceId::as_str))
    .bind(query.request_id.as_deref())
    .bind(query.since.map(StoreTime::as_millis))
    .bind(sql_limit(query.limit))
}
