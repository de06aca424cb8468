//! Deleting old rows.

use evictd_core::time::{StoreTime, signed_micros};

use super::write::PostgresWrite;
use crate::audit::{Purge, Purged, receipts_kept_since};
use crate::error::StoreError;
use crate::rows::{Columns, sql_limit};

/// Deletes a prefix of the log, and receipts and audit records that are old by the server's clock.
pub(super) async fn purge(write: &mut PostgresWrite, purge: Purge) -> Result<Purged, StoreError> {
    let limit = sql_limit(purge.limit);
    let oldest = sqlx::query(
        "SELECT position, committed_at, request_id IS NOT NULL AND NOT receipted AS awaits_receipt,
                (SELECT evictd_now()) AS now
         FROM ONLY invalidations WHERE position IS NOT NULL ORDER BY position LIMIT $1",
    );
    let oldest = write.rows(oldest.bind(limit)).await?;
    let now = oldest.first().map_or(Ok(StoreTime(0)), |row| row.time("now"))?;
    let mut purged = Purged::default();
    if let Some(last) = purge.last_position(&oldest, now)? {
        let delete = sqlx::query("DELETE FROM ONLY invalidations WHERE position <= $1");
        purged.log = write.run(delete.bind(last)).await?;
    }
    let receipts = sqlx::query(
        "DELETE FROM ONLY receipts WHERE request_id IN
             (SELECT request_id FROM ONLY receipts WHERE final_at <= (SELECT evictd_now()) - $1
              ORDER BY final_at LIMIT $2)
         RETURNING final_at",
    );
    let receipts = write.rows(receipts.bind(signed_micros(purge.receipts)).bind(limit)).await?;
    purged.receipts = receipts.len() as u64;
    if let Some(kept) = purge.audit {
        let audit = sqlx::query(
            "DELETE FROM ONLY audit_log WHERE event_id IN
                 (SELECT event_id FROM ONLY audit_log WHERE time <= (SELECT evictd_now() - $1) / 1000
                  ORDER BY time LIMIT $2)",
        );
        purged.audit = write.run(audit.bind(signed_micros(kept)).bind(limit)).await?;
    }
    if let Some(since) = receipts_kept_since(&receipts)? {
        // Last, because rounds wait for this lock.
        let note = sqlx::query(
            "UPDATE ONLY log_head SET receipts_since_m = $1,
                    is_original = is_original AND xmin = written_by, written_by = pg_current_xact_id()::xid
             WHERE receipts_since_m < $1",
        );
        write.run(note.bind(since)).await?;
    }
    Ok(purged)
}
