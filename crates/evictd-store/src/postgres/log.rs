//! Numbering, rounds and replays.

use std::time::Duration;

use async_trait::async_trait;
use evictd_core::history::{BeginCause, History, LogToken, RoundToken};
use evictd_core::log;
use evictd_core::position::LogPosition;
use sqlx::postgres::PgRow;

use super::errors::failed;
use super::head::{LockedHead, lock_head};
use super::lanes::Lane;
use super::write::PostgresWrite;
use super::{PostgresStore, audit, rights, roster, triggers};
use crate::audit_entry::audit_records;
use crate::error::StoreError;
use crate::history::{VoucherKey, draw};
use crate::log::{Backlog, Head, LogStore, Numbered, Replay, Round, RoundRequest};
use crate::log_rows::{self, MERGE_ABOVE, no_head};
use crate::rows::{Columns, sql_limit};

/// The time limit of numbering when a bulk change by direct SQL waits for it.
const BULK_LIMIT: Duration = Duration::from_mins(1);

#[async_trait]
impl LogStore for PostgresStore {
    fn is_exclusive(&self) -> bool {
        false
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        triggers::check(&self.lanes.log).await?;
        rights::check(&self.lanes.log).await
    }

    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = head_if_idle(&self.lanes.log).await? {
            return Ok(Numbered::none(head));
        }
        let mut write = self.log("number its log").await?;
        let mut head = lock_head(&mut write).await?;
        head.begin_epoch_if_due(&mut write, 0).await?;
        let numbered = number(head, &mut write, sql_limit(limit)).await?;
        write.commit().await?;
        Ok(numbered)
    }

    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError> {
        let RoundRequest { instances, touched, seen_epoch } = request;
        let mut write = self.log("commit a probe round").await?;
        let mut head = lock_head(&mut write).await?;
        let clock = head.clock;
        roster::update(&mut write, instances, touched, clock.store_time).await?;
        head.compare_schema(&mut write).await?;
        let began = head.begin_epoch_if_due(&mut write, seen_epoch).await?;
        let schema_fault = head.schema_fault(&mut write).await?;
        head.draw_round_token(&mut write).await?;
        let numbered = number(head, &mut write, i64::MAX).await?;
        write.commit().await?;
        Ok(Round { numbered, clock, began, schema_fault })
    }

    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError> {
        let bound = |position: u64| i64::try_from(position).unwrap_or(i64::MAX);
        let Some(first) = LogPosition::new(epoch, from) else {
            return Ok(Replay::Refused { head: read_head(&self.lanes.replays).await? });
        };
        // One statement reads one snapshot, so that the head and the rows belong together.
        let read = || {
            sqlx::query(
                "SELECT log_head.epoch, head, incarnation, log_head.token, round, kept.token AS row_token,
                        position, scope, key_hash, key_id, api_id, workspace_id, cause, committed_at
                 FROM ONLY log_head LEFT JOIN
                      (SELECT * FROM ONLY invalidations WHERE epoch = $1 AND position BETWEEN $2 AND $3
                       ORDER BY position LIMIT $4) AS kept
                      ON kept.epoch = log_head.epoch
                 ORDER BY position",
            )
            .bind(epoch as i32)
            .bind(bound(from))
            .bind(bound(to))
            .bind(sql_limit(limit))
        };
        log_rows::replay(&self.lanes.replays.rows("replay its log", read).await?, first)
    }

    async fn head(&self) -> Result<Head, StoreError> {
        read_head(&self.lanes.log).await
    }

    async fn begin_incarnation(&self, cause: BeginCause, evidence: Option<&str>) -> Result<Head, StoreError> {
        let mut write = self.log("begin an incarnation").await?;
        let mut head = lock_head(&mut write).await?;
        let began = head.begin_epoch_if_due(&mut write, 0).await?;
        if began.is_none() || cause != BeginCause::Opened {
            head.begin_incarnation(&mut write, cause, evidence).await?;
        }
        write.commit().await?;
        Ok(head.head)
    }

    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = self.log("note a lost epoch").await?;
        let head = lock_head(&mut write).await?;
        head.note_lost_epoch(&mut write, epoch).await?;
        write.commit().await
    }

    async fn history(&self) -> Result<History, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT store_id, history.incarnation, after_epoch, after_position, history.epoch, position, cause, time,
                        evidence
                 FROM ONLY log_head, ONLY history ORDER BY place",
            )
        };
        log_rows::history(&self.lanes.log.rows("read its history", read).await?)
    }

    async fn voucher_key(&self) -> Result<VoucherKey, StoreError> {
        let read = || sqlx::query("SELECT key FROM ONLY voucher_key");
        VoucherKey::read(self.lanes.log.row("read its voucher key", read).await?.as_ref())
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT coalesce((SELECT token FROM ONLY invalidations WHERE position = $2 AND epoch = $1),
                                 (SELECT token FROM ONLY history WHERE position = $2 AND epoch = $1 LIMIT 1)) AS token",
            )
            .bind(at.epoch() as i32)
            .bind(at.position() as i64)
        };
        let row = self.lanes.log.row("read the token of a row", read).await?;
        let token = row.map_or(Ok(None), |row| row.optional_integer("token"))?;
        Ok(token.map(|token| LogToken(token.cast_unsigned())))
    }

    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError> {
        let find = || {
            sqlx::query("SELECT FROM ONLY round_tokens WHERE token = $1 LIMIT 1").bind(token.0.cast_signed())
        };
        Ok(self.lanes.log.row("look for a round's token", find).await?.is_some())
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let count = || {
            sqlx::query(
                "SELECT count(*) AS rows, coalesce(evictd_now() - min(committed_at), 0) AS age
                 FROM ONLY invalidations WHERE position IS NULL",
            )
        };
        let row = self.lanes.log.row("count unnumbered rows", count).await?.ok_or_else(no_head)?;
        Ok(Backlog::new(row.integer("rows")?, row.integer("age")?))
    }

    /// While rows wait for positions, changes with every commit. Otherwise the head's position is enough, and cheaper.
    async fn version(&self) -> Result<i64, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT CASE WHEN EXISTS (SELECT FROM ONLY invalidations WHERE position IS NULL)
                     THEN hashtextextended(pg_current_snapshot()::text, 0) ELSE head END AS version
                 FROM ONLY log_head",
            )
        };
        self.lanes.log.row("read its version", read).await?.ok_or_else(no_head)?.integer("version")
    }

    async fn change_notified(&self) {
        self.listener.notified(&self.options).await;
    }
}

async fn read_head(log: &Lane) -> Result<Head, StoreError> {
    let read = || sqlx::query("SELECT epoch, head, incarnation, token, round FROM ONLY log_head");
    log_rows::head(log.row("read its log's head", read).await?.as_ref())
}

/// Returns the head if no row waits for a position. Most calls then need no lock.
async fn head_if_idle(log: &Lane) -> Result<Option<Head>, StoreError> {
    let read = || {
        sqlx::query(
            "SELECT epoch, head, incarnation, token, round,
                    EXISTS (SELECT FROM ONLY invalidations WHERE position IS NULL) AS waiting
             FROM ONLY log_head",
        )
    };
    let row = log.row("look for unnumbered rows", read).await?;
    let head = log_rows::head(row.as_ref())?;
    let waiting = row.map_or(Ok(true), |row| row.flag("waiting"))?;
    Ok((!waiting).then_some(head))
}

/// Gives waiting rows the positions after the head, in the order of their ids. These are all rows that were committed when
/// the lock was taken, because the statement's snapshot is younger (R1).
async fn number(locked: LockedHead, write: &mut PostgresWrite, limit: i64) -> Result<Numbered, StoreError> {
    if locked.has_many_waiting {
        write.allow(BULK_LIMIT).await?;
        merge_bulk_changes(write).await?;
    }
    let mut waiting = waiting_rows(write, limit).await?;
    if drop_false_tags(write, &waiting).await? {
        waiting = waiting_rows(write, limit).await?;
    }
    let rows = log::number(locked.head.at, &waiting).ok_or(StoreError::PositionsUsedUp)?;
    let Some((last, _)) = rows.last() else { return Ok(Numbered::none(locked.head)) };
    let head = Head { at: *last, token: LogToken(draw()?), ..locked.head };
    let ids = waiting.iter().map(|row| row.integer("id")).collect::<Result<Vec<_>, _>>()?;
    let positions: Vec<i64> = rows.iter().map(|(at, _)| at.position() as i64).collect();
    let give = sqlx::query(
        "WITH given AS (
             UPDATE ONLY invalidations AS waiting SET epoch = $1, position = given.position, token = $2
             FROM unnest($3, $4) AS given (id, position)
             -- The condition on the position selects the index of waiting rows, however long the log is.
             WHERE waiting.id = given.id AND waiting.position IS NULL
             RETURNING waiting.id
         )
         UPDATE ONLY log_head SET head = $5, token = $2 WHERE (SELECT count(*) FROM given) = $6",
    )
    .bind(head.at.epoch() as i32)
    .bind(head.token.0.cast_signed())
    .bind(ids)
    .bind(positions)
    .bind(head.at.position() as i64)
    .bind(rows.len() as i64);
    if write.run(give).await? == 0 {
        // Another transaction deleted a row in between, which would leave a gap. The next call doesn't find the row.
        return Err(failed("number its log")(sqlx::Error::RowNotFound));
    }
    audit::record_unrequested(write, &audit_records(&rows)?).await?;
    log_rows::numbered(head, &rows)
}

/// Returns the oldest rows without a position.
///
/// Any user who may change keys can tag the log row with a request, and a tagged row gets a receipt and no further audit
/// record. A request's own transaction writes its audit record too, so a tag without one is false.
async fn waiting_rows(write: &mut PostgresWrite, limit: i64) -> Result<Vec<PgRow>, StoreError> {
    let waiting = sqlx::query(
        "WITH oldest AS (
             SELECT id, request_id FROM ONLY invalidations WHERE position IS NULL ORDER BY id LIMIT $1
         ), together AS (
             SELECT id FROM oldest UNION
             -- The rows of one request stay together: its receipt needs all of them.
             SELECT id FROM ONLY invalidations
             WHERE position IS NULL AND request_id IN (SELECT request_id FROM oldest)
         )
         SELECT id, scope, key_hash, key_id, api_id, workspace_id, cause, request_id, committed_at, merged,
                request_id IS NOT NULL AND NOT EXISTS (
                    SELECT FROM ONLY audit_log AS record
                    WHERE record.correlation_id = invalidations.request_id AND record.xmin = invalidations.xact::xid
                ) AS has_false_tag
         FROM ONLY invalidations WHERE id IN (SELECT id FROM together) ORDER BY id",
    );
    write.rows(waiting.bind(limit)).await
}

/// Drops the tags of rows that no request wrote. Returns whether there were any.
async fn drop_false_tags(write: &mut PostgresWrite, waiting: &[PgRow]) -> Result<bool, StoreError> {
    let mut false_tags = Vec::new();
    for row in waiting {
        if row.flag("has_false_tag")? {
            false_tags.push(row.integer("id")?);
        }
    }
    if false_tags.is_empty() {
        return Ok(false);
    }
    tracing::warn!(
        rows = false_tags.len(),
        "changes by SQL named a request that did not make them; recorded as changes by SQL"
    );
    let drop_tags = sqlx::query(
        "UPDATE ONLY invalidations SET request_id = NULL WHERE id = ANY ($1) AND position IS NULL",
    );
    write.run(drop_tags.bind(false_tags)).await?;
    Ok(true)
}

/// Replaces more than [`MERGE_ABOVE`] waiting key rows of one API by one row for the API, as old as the oldest of them.
/// Rows of requests stay, because their receipts name positions.
///
/// New keys may be among them. A cached "not found" belongs to no API, so the merged row doesn't evict it: it stays
/// until it times out. A key that was never announced loses no right by that.
async fn merge_bulk_changes(write: &mut PostgresWrite) -> Result<(), StoreError> {
    // One statement reads one snapshot, so that exactly the counted rows are deleted.
    let merge = sqlx::query(
        "WITH bulk AS (
             SELECT api_id, max(workspace_id) AS workspace_id, min(committed_at) AS committed_at, count(*) AS keys,
                    CASE WHEN min(cause) = max(cause) THEN min(cause) ELSE 'changed' END AS cause
             FROM ONLY invalidations
             WHERE position IS NULL AND scope = 'key' AND api_id IS NOT NULL AND request_id IS NULL
             GROUP BY api_id HAVING count(*) > $1
         ), gone AS (
             DELETE FROM ONLY invalidations AS i USING bulk
             WHERE i.position IS NULL AND i.scope = 'key' AND i.api_id = bulk.api_id AND i.request_id IS NULL
         ), merged AS (
             INSERT INTO invalidations (scope, api_id, workspace_id, cause, request_id, committed_at, merged)
             SELECT 'api', api_id, workspace_id, cause, NULL, committed_at, keys FROM bulk
         )
         SELECT api_id, keys FROM bulk",
    );
    for row in write.rows(merge.bind(MERGE_ABOVE)).await? {
        let (api, rows) = (row.text("api_id")?, row.integer("keys")?);
        tracing::info!(%api, rows, "bulk change of keys merged into one of their API");
    }
    Ok(())
}
