//! Receipts, and the requests that still lack one (R12).

use std::collections::HashSet;

use async_trait::async_trait;
use evictd_core::ids::WorkspaceId;
use evictd_core::position::LogPosition;
use serde_json::json;
use sqlx::sqlite::SqliteRow;

use super::write::{Write, failed};
use super::{SqliteStore, log};
use crate::error::StoreError;
use crate::log::NumberedRequest;
use crate::receipt::{FinalReceipt, OpenRow, ReceiptStore, StoredOutcome};
use crate::rows::sql_limit;

#[async_trait]
impl ReceiptStore for SqliteStore {
    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError> {
        if receipts.is_empty() {
            return Ok(HashSet::new());
        }
        let mut write = Write::begin(&self.connections.writer, "record receipts").await?;
        let had_one = record(&mut write, receipts).await?;
        write.commit().await?;
        Ok(had_one)
    }

    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<StoredOutcome>, StoreError> {
        const ACTION: &str = "read a receipt";
        // One snapshot, or a request that is receipted meanwhile might be found in no state at all.
        let mut snapshot = self.connections.records.begin().await.map_err(failed(ACTION))?;
        let body: Option<String> =
            sqlx::query_scalar("SELECT body FROM receipts WHERE request_id = ?1 AND workspace_id = ?2")
                .bind(request_id)
                .bind(workspace.as_str())
                .fetch_optional(&mut *snapshot)
                .await
                .map_err(failed(ACTION))?;
        if let Some(body) = body {
            return Ok(Some(StoredOutcome::Final { body }));
        }
        let rows = sqlx::query(
            "SELECT epoch, position, cause, committed_at FROM invalidations
             WHERE request_id = ?1 AND workspace_id = ?2 ORDER BY id",
        )
        .bind(request_id)
        .bind(workspace.as_str())
        .fetch_all(&mut *snapshot)
        .await
        .map_err(failed(ACTION))?;
        if !rows.is_empty() {
            return Ok(Some(StoredOutcome::Open(rows.iter().map(open_row).collect::<Result<_, _>>()?)));
        }
        // Of a change from before the purge of receipts nobody knows any more whether it had one.
        let carried_out: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM audit_log JOIN log_head ON time >= receipts_since_m
                            WHERE correlation_id = ?1 AND workspace_id = ?2)",
        )
        .bind(request_id)
        .bind(workspace.as_str())
        .fetch_one(&mut *snapshot)
        .await
        .map_err(failed(ACTION))?;
        Ok(carried_out.then_some(StoredOutcome::Nothing))
    }

    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError> {
        let limit = sql_limit(limit);
        let rows = sqlx::query(
            "SELECT epoch, position, request_id, workspace_id, cause, committed_at
             FROM invalidations INDEXED BY invalidations_open
             WHERE (epoch, position) > (?1, ?2)
               AND position IS NOT NULL AND request_id IS NOT NULL AND receipted = 0
             ORDER BY epoch, position LIMIT ?3",
        )
        .bind(after.epoch())
        .bind(after.position() as i64)
        .bind(limit)
        .fetch_all(&self.connections.log)
        .await
        .map_err(failed("look for requests without a receipt"))?;
        let request = |row| log::request(row, log::numbered_position_of(row)?);
        rows.iter().filter_map(|row| request(row).transpose()).collect()
    }
}

/// Keeps the receipts of requests that have none, and takes their log rows off the open ones. Returns who had one, or is unknown.
pub(super) async fn record(
    write: &mut Write,
    receipts: &[FinalReceipt],
) -> Result<HashSet<String>, StoreError> {
    let mut had_one = HashSet::new();
    for FinalReceipt { request_id, workspace_id, position, committed_at, final_at, body } in receipts {
        let insert = sqlx::query(
            "INSERT INTO receipts (request_id, workspace_id, epoch, position, committed_at, final_at, body)
             SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7
             -- The store may have been put back, and have lost the change.
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
            had_one.insert(request_id.clone());
        }
    }
    let requests: Vec<&str> = receipts.iter().map(|receipt| receipt.request_id.as_str()).collect();
    let mark = sqlx::query(
        "UPDATE invalidations INDEXED BY invalidations_request SET receipted = 1
         WHERE request_id IN (SELECT value FROM json_each(?1)) AND receipted = 0",
    );
    write.run(mark.bind(json!(requests).to_string())).await?;
    Ok(had_one)
}

fn open_row(row: &SqliteRow) -> Result<OpenRow, StoreError> {
    Ok(OpenRow {
        position: log::position_of(row)?,
        cause: log::cause_of(row),
        committed_at: log::committed_at_of(row)?,
    })
}
