//! Writing and reading audit records, and deleting what is old enough to go.

use evictd_core::ids::WorkspaceId;
use evictd_core::log::{self, LoggedRow};
use evictd_core::time::StoreTime;
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::clock::now;
use super::write::{Write, failed};
use crate::audit::{AuditQuery, AuditRecord, Purge, Purged};
use crate::error::StoreError;
use crate::rows::{AuditEntry, Author, parse_audit_targets, sql_limit};

const PURGE: &str = "purge old rows";

/// Writes a request's audit record.
pub(super) async fn record(write: &mut Write, by: Author<'_>, entry: &AuditEntry) -> Result<(), StoreError> {
    let insert = sqlx::query(
        "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, actor_name,
                                remote_ip, user_agent, targets, correlation_id)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6,
                 CASE WHEN ?5 = 'rootkey'
                      THEN coalesce((SELECT name FROM root_keys WHERE id = ?6), 'root key') ELSE ?6 END,
                 ?7, substr(?8, 1, 1024), ?9, ?10)",
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
    .bind(by.request_id);
    write.run(insert).await?;
    Ok(())
}

/// Writes the records of log rows that no request wrote.
pub(super) async fn record_unrequested(write: &mut Write, records: &[Value]) -> Result<(), StoreError> {
    if records.is_empty() {
        return Ok(());
    }
    let insert = sqlx::query(
        "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, targets)
         SELECT value ->> 'time', value ->> 'workspace_id', value ->> 'event', value ->> 'description',
                value ->> 'actor_type', value ->> 'actor_id', value -> 'targets'
         FROM json_each(?1)",
    );
    write.run(insert.bind(json!(records).to_string())).await?;
    Ok(())
}

/// The newest records that meet the query.
pub(super) async fn audit(readers: &SqlitePool, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
    let rows = sqlx::query(
        "SELECT event_id, time, workspace_id, event, description, actor_type, actor_id, actor_name,
                remote_ip, user_agent, targets, correlation_id
         FROM audit_log
         WHERE (?1 IS NULL OR workspace_id = ?1)
           AND (?2 IS NULL
                -- Few records are worth a closer look: a million take a second, a third of what it took without.
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
    .fetch_all(readers)
    .await
    .map_err(failed("read its audit log"))?;
    rows.iter().map(read).collect()
}

fn read(row: &SqliteRow) -> Result<AuditRecord, StoreError> {
    let columns = || -> sqlx::Result<_> {
        let record = AuditRecord {
            event_id: row.try_get("event_id")?,
            time: StoreTime::from_millis(row.try_get("time")?),
            workspace_id: row.try_get::<Option<&str>, _>("workspace_id")?.map(WorkspaceId::new),
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
    let (record, targets) = columns().map_err(failed("read its audit log"))?;
    Ok(AuditRecord { targets: parse_audit_targets(&record.event_id, targets)?, ..record })
}

/// Deletes a prefix of the log, and what else is old at `now`.
pub(super) async fn purge(write: &mut Write, purge: Purge, now: StoreTime) -> Result<Purged, StoreError> {
    let limit = sql_limit(purge.limit);
    let oldest = sqlx::query(
        "SELECT position, committed_at, request_id IS NOT NULL AND receipted = 0 AS awaits_receipt
         FROM invalidations WHERE position IS NOT NULL ORDER BY position LIMIT ?1",
    );
    let oldest = write.rows(oldest.bind(limit)).await?;
    let logged = |row: &SqliteRow| -> sqlx::Result<_> {
        let committed_at = StoreTime(row.try_get("committed_at")?);
        Ok(LoggedRow { committed_at, awaits_receipt: row.try_get("awaits_receipt")? })
    };
    let logged = oldest.iter().map(logged).collect::<sqlx::Result<Vec<_>>>().map_err(failed(PURGE))?;
    let log = match oldest[..log::purgeable(logged, now, purge.log)].last() {
        None => 0,
        Some(last) => {
            let last: i64 = last.try_get("position").map_err(failed(PURGE))?;
            write.run(sqlx::query("DELETE FROM invalidations WHERE position <= ?1").bind(last)).await?
        }
    };
    let receipts = sqlx::query(
        "DELETE FROM receipts WHERE request_id IN
             (SELECT request_id FROM receipts WHERE final_at <= ?1 ORDER BY final_at LIMIT ?2)
         RETURNING final_at",
    );
    let receipts = write.rows(receipts.bind(now.before(purge.receipts).0).bind(limit)).await?;
    let final_at = |row: &SqliteRow| row.try_get("final_at").map(StoreTime).map_err(failed(PURGE));
    let newest = receipts.iter().map(final_at).collect::<Result<Vec<_>, _>>()?.into_iter().max();
    if let Some(newest) = newest {
        let since = sqlx::query("UPDATE log_head SET receipts_since_m = max(receipts_since_m, ?1)");
        write.run(since.bind(newest.as_millis() + 1)).await?;
    }
    let audit = match purge.audit {
        None => 0,
        Some(kept) => {
            let audit = sqlx::query(
                "DELETE FROM audit_log WHERE event_id IN
                     (SELECT event_id FROM audit_log WHERE time <= ?1 ORDER BY time LIMIT ?2)",
            );
            write.run(audit.bind(now.before(kept).as_millis()).bind(limit)).await?
        }
    };
    Ok(Purged { log, receipts: receipts.len() as u64, audit })
}
