//! Receipts, and the requests without one (R12).

use std::collections::HashSet;

use async_trait::async_trait;
use evictd_core::ids::WorkspaceId;
use evictd_core::position::LogPosition;

use super::PostgresStore;
use crate::error::StoreError;
use crate::log::NumberedRequest;
use crate::receipt::{FinalReceipt, ReceiptStore, StoredOutcome, read_open_requests};
use crate::rows::{Columns, sql_limit};

#[async_trait]
impl ReceiptStore for PostgresStore {
    /// In the order of requests, so that publishers that finish the same ones at once wait for each other in one direction.
    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError> {
        if receipts.is_empty() {
            return Ok(HashSet::new());
        }
        let mut receipts: Vec<&FinalReceipt> = receipts.iter().collect();
        receipts.sort_unstable_by_key(|receipt| &receipt.request_id);
        let requests: Vec<&str> = receipts.iter().map(|receipt| receipt.request_id.as_str()).collect();
        let numbers = |number: fn(&FinalReceipt) -> i64| -> Vec<i64> {
            receipts.iter().map(|receipt| number(receipt)).collect()
        };
        let insert = sqlx::query(
            "INSERT INTO receipts (request_id, workspace_id, epoch, position, committed_at, final_at, body)
             SELECT final.* FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[])
                        AS final (request_id, workspace_id, epoch, position, committed_at, final_at, body)
             -- A fail-over may have lost the change.
             WHERE EXISTS (SELECT FROM ONLY invalidations AS changed
                           WHERE changed.position = final.position AND changed.epoch = final.epoch
                             AND changed.request_id = final.request_id)
             ON CONFLICT (request_id) DO NOTHING RETURNING request_id",
        )
        .bind(&requests)
        .bind(receipts.iter().map(|receipt| receipt.workspace_id.as_str()).collect::<Vec<_>>())
        .bind(receipts.iter().map(|receipt| receipt.position.epoch() as i32).collect::<Vec<_>>())
        .bind(numbers(|receipt| receipt.position.position() as i64))
        .bind(numbers(|receipt| receipt.committed_at.0))
        .bind(numbers(|receipt| receipt.final_at.0))
        .bind(receipts.iter().map(|receipt| receipt.body.as_str()).collect::<Vec<_>>());
        let mut write = self.log("record receipts").await?;
        let mut refused: HashSet<String> = requests.iter().map(ToString::to_string).collect();
        for row in write.rows(insert).await? {
            refused.remove(row.text("request_id")?);
        }
        let mark = sqlx::query(
            "WITH open AS (
                 SELECT id FROM ONLY invalidations WHERE request_id = ANY ($1) AND NOT receipted ORDER BY id FOR UPDATE
             )
             UPDATE ONLY invalidations AS i SET receipted = true FROM open WHERE i.id = open.id",
        );
        write.run(mark.bind(&requests)).await?;
        write.commit().await?;
        Ok(refused)
    }

    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<StoredOutcome>, StoreError> {
        // Whether a request from before the last purge had a receipt is unknown.
        let read = || {
            sqlx::query(
                "SELECT receipts.body, i.id, i.epoch, i.position, i.cause, i.committed_at,
                        EXISTS (SELECT FROM ONLY audit_log WHERE correlation_id = $1 AND workspace_id = $2
                                AND time >= receipts_since_m) AS carried_out
                 FROM ONLY log_head
                 LEFT JOIN ONLY receipts ON receipts.request_id = $1 AND receipts.workspace_id = $2
                 LEFT JOIN ONLY invalidations AS i ON i.request_id = $1 AND i.workspace_id = $2
                 ORDER BY i.id",
            )
            .bind(request_id)
            .bind(workspace.as_str())
        };
        StoredOutcome::read(&self.lanes.records.rows("read a receipt", read).await?)
    }

    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT epoch, position, request_id, workspace_id, cause, committed_at FROM ONLY invalidations
                 WHERE (epoch, position) > ($1, $2)
                   AND position IS NOT NULL AND request_id IS NOT NULL AND NOT receipted
                 ORDER BY epoch, position LIMIT $3",
            )
            .bind(after.epoch() as i32)
            .bind(after.position() as i64)
            .bind(sql_limit(limit))
        };
        read_open_requests(&self.lanes.log.rows("look for requests without a receipt", read).await?)
    }
}
