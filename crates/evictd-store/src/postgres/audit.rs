//! Writing and reading audit records, and deleting what is old enough to go.

use evictd_core::ids::WorkspaceId;
use evictd_core::log::{self, LoggedRow};
use evictd_core::time::StoreTime;
use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row};

use super::connections::{Lane, Statement, failed};
use super::write::Write;
use crate::audit::{AuditQuery, AuditRecord, Purge, Purged};
use crate::error::StoreError;
use crate::rows::{AuditEntry, Author, micros, parse_audit_targets, sql_limit};

const READ: &str = "read its audit log";
const PURGE: &str = "purge old rows";

/// Records of so many rows are written in one statement.
const BATCH: usize = 10_000;

/// Writes a request's audit record.
pub(super) async fn record(write: &mut Write, by: Author<'_>, entry: &AuditEntry) -> Result<(), StoreError> {
    let insert = sqlx::query(
        "INSERT INTO audit_log (workspace_id, event, description, actor_type, actor_id, actor_name,
                                remote_ip, user_agent, targets, correlation_id)
         VALUES ($1, $2, $3, $4, $5,
                 CASE WHEN $4 = 'rootkey'
                      THEN coalesce((SELECT name FROM ONLY root_keys WHERE id = $5), 'root key') ELSE $5 END,
                 $6, left($7, 1024), $8::jsonb, $9)",
    )
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

/// A target with no more records than this is rare.
const FEW: i64 = 10_000;

/// What the index finds by a target.
const HAS_TARGET: &str = "jsonb_path_query_array(targets, '$[*].id') @> jsonb_build_array($1::text)";

/// The newest records that meet the query.
pub(super) async fn audit(records: &Lane, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
    let is_rare = match &query.target {
        None => false,
        Some(target) => is_rare(records, target).await?,
    };
    records.rows(READ, || statement(query, is_rare)).await?.iter().map(read).collect()
}

async fn is_rare(records: &Lane, target: &str) -> Result<bool, StoreError> {
    let count = format!(
        "SELECT count(*) <= $2 FROM (SELECT FROM ONLY audit_log WHERE {HAS_TARGET} LIMIT $2 + 1) AS found"
    );
    let row = records.row(READ, || sqlx::query(AssertSqlSafe(count.clone())).bind(target).bind(FEW)).await?;
    row.map_or(Ok(false), |row| row.try_get(0)).map_err(failed(READ))
}

/// A key's few records are found by the index, and sorted then; those of an API with millions of changes are met soon by
/// reading from the newest on. The planner can't know which is which, and may take seconds where it guesses wrong.
fn statement(query: &AuditQuery, target_is_rare: bool) -> Statement {
    let records = if target_is_rare {
        format!("(SELECT * FROM ONLY audit_log WHERE {HAS_TARGET} OFFSET 0) AS found")
    } else {
        "ONLY audit_log".to_owned()
    };
    sqlx::query(AssertSqlSafe(format!(
        "SELECT event_id, time, workspace_id, event, description, actor_type, actor_id, actor_name,
                remote_ip, user_agent, targets::text AS targets, correlation_id
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

fn read(row: &PgRow) -> Result<AuditRecord, StoreError> {
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
    let (record, targets) = columns().map_err(failed(READ))?;
    Ok(AuditRecord { targets: parse_audit_targets(&record.event_id, targets)?, ..record })
}

/// Deletes a prefix of the log, and what else is old on the server's clock.
pub(super) async fn purge(write: &mut Write, purge: Purge) -> Result<Purged, StoreError> {
    let limit = sql_limit(purge.limit);
    let oldest = sqlx::query(
        "SELECT position, committed_at, request_id IS NOT NULL AND NOT receipted AS awaits_receipt,
                (SELECT evictd_now()) AS now
         FROM ONLY invalidations WHERE position IS NOT NULL ORDER BY position LIMIT $1",
    );
    let oldest = write.rows(oldest.bind(limit)).await?;
    let logged = |row: &PgRow| -> sqlx::Result<_> {
        let committed_at = StoreTime(row.try_get("committed_at")?);
        Ok(LoggedRow { committed_at, awaits_receipt: row.try_get("awaits_receipt")? })
    };
    let logged = oldest.iter().map(logged).collect::<sqlx::Result<Vec<_>>>().map_err(failed(PURGE))?;
    let now = oldest.first().map(|row| row.try_get("now")).transpose().map_err(failed(PURGE))?;
    let now = now.map_or(StoreTime(0), StoreTime);
    let log = match oldest[..log::purgeable(logged, now, purge.log)].last() {
        None => 0,
        Some(last) => {
            let last: i64 = last.try_get("position").map_err(failed(PURGE))?;
            write.run(sqlx::query("DELETE FROM ONLY invalidations WHERE position <= $1").bind(last)).await?
        }
    };
    let receipts = sqlx::query(
        "DELETE FROM ONLY receipts WHERE request_id IN
             (SELECT request_id FROM ONLY receipts WHERE final_at <= (SELECT evictd_now()) - $1
              ORDER BY final_at LIMIT $2)
         RETURNING final_at",
    );
    let receipts = write.rows(receipts.bind(micros(purge.receipts)).bind(limit)).await?;
    let audit = match purge.audit {
        None => 0,
        Some(kept) => {
            let audit = sqlx::query(
                "DELETE FROM ONLY audit_log WHERE event_id IN
                     (SELECT event_id FROM ONLY audit_log WHERE time <= (SELECT evictd_now() - $1) / 1000
                      ORDER BY time LIMIT $2)",
            );
            write.run(audit.bind(micros(kept)).bind(limit)).await?
        }
    };
    let final_at = |row: &PgRow| row.try_get("final_at").map(StoreTime).map_err(failed(PURGE));
    let newest = receipts.iter().map(final_at).collect::<Result<Vec<_>, _>>()?.into_iter().max();
    if let Some(newest) = newest {
        // Last, because rounds wait for this lock.
        let since = sqlx::query(
            "UPDATE ONLY log_head SET receipts_since_m = $1,
                    is_original = is_original AND xmin = written_by, written_by = pg_current_xact_id()::xid
             WHERE receipts_since_m < $1",
        );
        write.run(since.bind(newest.as_millis() + 1)).await?;
    }
    Ok(Purged { log, receipts: receipts.len() as u64, audit })
}
