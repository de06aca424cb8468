//! Reading audit records, and deleting what is old enough to go.

use evictd_core::ids::WorkspaceId;
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::write::{Write, failed};
use crate::StoreError;
use crate::audit::{AuditQuery, AuditRecord, Purge, Purged};
use crate::rows::{parse_audit_targets, sql_limit};

/// The newest records that meet the query.
pub(super) async fn audit(readers: &SqlitePool, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
    let rows = sqlx::query(
        "SELECT event_id, time, workspace_id, event, description, actor_type, actor_id, actor_name,
                remote_ip, user_agent, targets, correlation_id
         FROM audit_log
         WHERE (?1 IS NULL OR workspace_id = ?1)
           AND (?2 IS NULL OR EXISTS (SELECT 1 FROM json_each(targets) WHERE value ->> 'id' = ?2))
           AND (?3 IS NULL OR correlation_id = ?3)
           AND (?4 IS NULL OR time >= ?4)
         ORDER BY time DESC, rowid DESC LIMIT ?5",
    )
    .bind(query.workspace_id.as_ref().map(WorkspaceId::as_str))
    .bind(query.target.as_deref())
    .bind(query.request_id.as_deref())
    .bind(query.since.map(StoreTime::as_millis))
    .bind(sql_limit(query.limit))
    .fetch_all(readers)
    .await
    .map_err(failed("read its audit log"))?;
    rows.iter().map(record).collect()
}

fn record(row: &SqliteRow) -> Result<AuditRecord, StoreError> {
    let read = || -> sqlx::Result<_> {
        let record = AuditRecord {
            event_id: row.try_get("event_id")?,
            time: StoreTime::from_millis(row.try_get("time")?),
            workspace_id: WorkspaceId::new(row.try_get::<&str, _>("workspace_id")?),
            event: row.try_get("event")?,
            description: row.try_get("description")?,
            actor_type: row.try_get("actor_type")?,
            actor_id: row.try_get("actor_id")?,
            actor_name: row.try_get("actor_name")?,
            remote_ip: row.try_get("remote_ip")?,
            user_agent: row.try_get("user_agent")?,
            targets: Vec::new(),
            request_id: row.try_get("correlation_id")?,
        };
        Ok((record, row.try_get::<&str, _>("targets")?))
    };
    let (record, targets) = read().map_err(failed("read its audit log"))?;
    Ok(AuditRecord { targets: parse_audit_targets(&record.event_id, targets)?, ..record })
}

/// Deletes a prefix of the log, and what else is old.
pub(super) async fn purge(write: &mut Write, purge: Purge) -> Result<Purged, StoreError> {
    let limit = sql_limit(purge.limit);
    // The oldest positions up to the first row that must stay: what is gone is a prefix.
    let log = sqlx::query(
        "WITH oldest AS (
             SELECT id, max(committed_at >= ?1 OR (request_id IS NOT NULL AND receipted = 0))
                            OVER (ORDER BY position) AS stays
             FROM (SELECT * FROM invalidations WHERE position IS NOT NULL ORDER BY position LIMIT ?2))
         DELETE FROM invalidations WHERE id IN (SELECT id FROM oldest WHERE NOT stays)",
    );
    let log = write.run(log.bind(purge.log_before.0).bind(limit)).await?;
    let receipts = sqlx::query(
        "DELETE FROM receipts WHERE request_id IN
             (SELECT request_id FROM receipts WHERE final_at < ?1 ORDER BY final_at LIMIT ?2)",
    );
    let receipts = write.run(receipts.bind(purge.receipts_before.0).bind(limit)).await?;
    let since = sqlx::query("UPDATE log_head SET receipts_since_m = max(receipts_since_m, ?1)");
    write.run(since.bind(purge.receipts_before.as_millis())).await?;
    let audit = match purge.audit_before {
        None => 0,
        Some(before) => {
            let audit = sqlx::query(
                "DELETE FROM audit_log WHERE event_id IN
                     (SELECT event_id FROM audit_log WHERE time < ?1 ORDER BY time LIMIT ?2)",
            );
            write.run(audit.bind(before.as_millis()).bind(limit)).await?
        }
    };
    Ok(Purged { log, receipts, audit })
}
