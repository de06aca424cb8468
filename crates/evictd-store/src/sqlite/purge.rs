//! Deleting old rows.

use evictd_core::time::StoreTime;

use super::write::SqliteWrite;
use crate::audit::{Purge, Purged, receipts_kept_since};
use crate::error::StoreError;
use crate::rows::sql_limit;

/// Deletes a prefix of the log, and receipts and audit records that are old at `now`.
pub(super) async fn purge(
    write: &mut SqliteWrite,
    purge: Purge,
    now: StoreTime,
) -> Result<Purged, StoreError> {
    let limit = sql_limit(purge.limit);
    let oldest = sqlx::query(
        "SELECT position, committed_at, request_id IS NOT NULL AND receipted = 0 AS awaits_receipt
         FROM invalidations WHERE position IS NOT NULL ORDER BY position LIMIT ?1",
    );
    let oldest = write.rows(oldest.bind(limit)).await?;
    let mut purged = Purged::default();
    if let Some(last) = purge.last_position(&oldest, now)? {
        let delete = sqlx::query("DELETE FROM invalidations WHERE position <= ?1");
        purged.log = write.run(delete.bind(last)).await?;
    }
    let receipts = sqlx::query(
        "DELETE FROM receipts WHERE request_id IN
             (SELECT request_id FROM receipts WHERE final_at <= ?1 ORDER BY final_at LIMIT ?2)
         RETURNING final_at",
    );
    let receipts = write.rows(receipts.bind(now.before(purge.receipts).0).bind(limit)).await?;
    purged.receipts = receipts.len() as u64;
    if let Some(since) = receipts_kept_since(&receipts)? {
        let note = sqlx::query("UPDATE log_head SET receipts_since_m = max(receipts_since_m, ?1)");
        write.run(note.bind(since)).await?;
    }
    if let Some(kept) = purge.audit {
        let audit = sqlx::query(
            "DELETE FROM audit_log WHERE event_id IN
                 (SELECT event_id FROM audit_log WHERE time <= ?1 ORDER BY time LIMIT ?2)",
        );
        purged.audit = write.run(audit.bind(now.before(kept).as_millis()).bind(limit)).await?;
    }
    Ok(purged)
}
