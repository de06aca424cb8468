//! Receipts, and the requests without one (R12).

use std::collections::HashSet;

use async_trait::async_trait;
use evictd_core::ids::WorkspaceId;
use evictd_core::position::LogPosition;
use serde_json::json;

use super::SqliteStore;
use super::write::{SqliteWrite, failed};
use crate::error::StoreError;
use crate::log::NumberedRequest;
use crate::receipt::{FinalReceipt, ReceiptStore, StoredOutcome, read_open_requests};
use crate::rows::sql_limit;

#[async_trait]
impl ReceiptStore for SqliteStore {
    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError> {
        let mut refused = HashSet::new();
        if receipts.is_empty() {
            return Ok(refused);
        }
        let mut write = SqliteWrite::begin(&self.pools.writer, "record receipts").await?;
        for FinalReceipt { request_id, workspace_id, position, committed_at, final_at, body } in receipts {
            let insert = sqlx::query(
                "INSERT INTO receipts (request_id, workspace_id, epoch, position, committed_at, final_at, body)
                 SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7
                 -- An older copy of the store may have been put back, without the change.
                 WHERE EXISTS (SELECT 1 FROM invalidations WHERE position = ?4 AND epoch = ?3 AND request_id = ?1)
                 ON CONFLICT (request_id) DO NOTHING",
            )
            .bind(request_id)
            .bind(workspace_id.as_str())
            .bind(position.epoch())
            .bind(position.position() as i64)
            .bind(committed_at.0)
            .bind(final_at.0)
            .bind(body);
            if write.run(insert).await? == 0 {
                refused.insert(request_id.clone());
            }
        }
        let requests: Vec<&str> = receipts.iter().map(|receipt| receipt.request_id.as_str()).collect();
        let mark = sqlx::query(
            "UPDATE invalidations INDEXED BY invalidations_request SET receipted = 1
             WHERE request_id IN (SELECT value FROM json_each(?1)) AND receipted = 0",
        );
        write.run(mark.bind(json!(requests).to_string())).await?;
        write.commit().await?;
        Ok(refused)
    }

    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<StoredOutcome>, StoreError> {
        // One statement reads one snapshot. In two, a request could lose its open rows before its receipt is seen.
        // Whether a request from before the last purge had a receipt is unknown.
        let rows = sqlx::query(
            "SELECT receipts.body, i.id, i.epoch, i.position, i.cause, i.committed_at,
                    EXISTS (SELECT 1 FROM audit_log WHERE correlation_id = ?1 AND workspace_id = ?2
                            AND time >= receipts_since_m) AS carried_out
             FROM log_head
             LEFT JOIN receipts ON receipts.request_id = ?1 AND receipts.workspace_id = ?2
             LEFT JOIN invalidations AS i ON i.request_id = ?1 AND i.workspace_id = ?2
             ORDER BY i.id",
        )
        .bind(request_id)
        .bind(workspace.as_str())
        .fetch_all(&self.pools.records)
        .await
        .map_err(failed("read a receipt"))?;
        StoredOutcome::read(&rows)
    }

    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError> {
        let rows = sqlx::query(
            "SELECT epoch, position, request_id, workspace_id, cause, committed_at
             FROM invalidations INDEXED BY invalidations_open
             WHERE (epoch, position) > (?1, ?2)
               AND position IS NOT NULL AND request_id IS NOT NULL AND receipted = 0
             ORDER BY epoch, position LIMIT ?3",
        )
        .bind(after.epoch())
        .bind(after.position() as i64)
        .bind(sql_limit(limit))
        .fetch_all(&self.pools.log)
        .await
        .map_err(failed("look for requests without a receipt"))?;
        read_open_requests(&rows)
    }
}
