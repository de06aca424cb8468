//! Receipts, and the requests that still lack one (R12).

use std::collections::HashSet;

use async_trait::async_trait;
use evictd_core::ids::WorkspaceId;
use evictd_core::position::LogPosition;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::connections::failed;
use super::write::Write;
use super::{PostgresStore, log};
use crate::error::StoreError;
use crate::log::NumberedRequest;
use crate::receipt::{FinalReceipt, OpenRow, ReceiptStore, StoredOutcome};
use crate::rows::sql_limit;

#[async_trait]
impl ReceiptStore for PostgresStore {
    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError> {
        if receipts.is_empty() {
            return Ok(HashSet::new());
        }
        let mut write = self.log("record receipts").await?;
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
        let ask = || {
            // Of a change from before the purge of receipts nobody knows any more whether it had one.
            sqlx::query(
                "SELECT receipts.body, i.id, i.epoch, i.position, i.cause, i.committed_at,
                        EXISTS (SELECT FROM ONLY audit_log WHERE correlation_id = asked.request_id
                                AND workspace_id = asked.workspace_id AND time >= receipts_since_m) AS carried_out
                 FROM (SELECT $1::text AS request_id, $2::text AS workspace_id) AS asked
                 CROSS JOIN ONLY log_head
                 LEFT JOIN ONLY receipts USING (request_id, workspace_id)
                 LEFT JOIN ONLY invalidations AS i USING (request_id, workspace_id)
                 ORDER BY i.id",
            )
            .bind(request_id)
            .bind(workspace.as_str())
        };
        let rows = self.connections.records.rows(ACTION, ask).await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let read = || -> sqlx::Result<_> {
            let written = first.try_get::<Option<i64>, _>("id")?.is_some();
            Ok((first.try_get::<Option<String>, _>("body")?, written, first.try_get("carried_out")?))
        };
        Ok(match read().map_err(failed(ACTION))? {
            (Some(body), ..) => Some(StoredOutcome::Final { body }),
            (None, true, _) => {
                Some(StoredOutcome::Open(rows.iter().map(open_row).collect::<Result<_, _>>()?))
            }
            (None, false, true) => Some(StoredOutcome::Nothing),
            (None, false, false) => None,
        })
    }

    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError> {
        let limit = sql_limit(limit);
        let ask = || {
            sqlx::query(
                "SELECT epoch, position, request_id, workspace_id, cause, committed_at FROM ONLY invalidations
                 WHERE (epoch, position) > ($1, $2)
                   AND position IS NOT NULL AND request_id IS NOT NULL AND NOT receipted
                 ORDER BY epoch, position LIMIT $3",
            )
            .bind(after.epoch() as i32)
            .bind(after.position() as i64)
            .bind(limit)
        };
        let rows = self.connections.log.rows("look for requests without a receipt", ask).await?;
        let request = |row| log::request(row, log::numbered_position_of(row)?);
        rows.iter().filter_map(|row| request(row).transpose()).collect()
    }
}

/// Keeps the receipts of requests that have none, and takes their log rows off the open ones. In the order of
/// requests: publishers that finish the same ones at once wait for each other in one direction. Returns who had one, or is unknown.
pub(super) async fn record(
    write: &mut Write,
    receipts: &[FinalReceipt],
) -> Result<HashSet<String>, StoreError> {
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
    let mut had_one: HashSet<String> = requests.iter().map(ToString::to_string).collect();
    for row in write.rows(insert).await? {
        had_one.remove(row.try_get::<&str, _>("request_id").map_err(failed("record receipts"))?);
    }
    let mark = sqlx::query(
        "WITH open AS (
             SELECT id FROM ONLY invalidations WHERE request_id = ANY ($1) AND NOT receipted ORDER BY id FOR UPDATE
         )
         UPDATE ONLY invalidations AS i SET receipted = true FROM open WHERE i.id = open.id",
    );
    write.run(mark.bind(&requests)).await?;
    Ok(had_one)
}

fn open_row(row: &PgRow) -> Result<OpenRow, StoreError> {
    Ok(OpenRow {
        position: log::position_of(row)?,
        cause: log::cause_of(row)?,
        committed_at: log::committed_at_of(row)?,
    })
}
