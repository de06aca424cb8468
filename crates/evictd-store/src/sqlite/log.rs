//! Numbering, rounds, replays, incarnations and epochs.

use async_trait::async_trait;
use evictd_core::history::{BeginCause, History, Incarnation, LogToken, RoundToken};
use evictd_core::position::LogPosition;
use evictd_core::{epochs, log};
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::clock::{now, read_clock};
use super::schema::{self, SchemaCheck};
use super::write::{SqliteWrite, failed};
use super::{SqliteStore, audit, roster};
use crate::audit_entry::audit_records;
use crate::error::StoreError;
use crate::history::{ROUND_TOKENS_KEPT, VoucherKey, draw};
use crate::log::{Backlog, Head, LogStore, Numbered, Replay, Round, RoundRequest, StoreFiles};
use crate::log_rows::{self, MERGE_ABOVE};
use crate::rows::{Columns, sql_limit};

/// A file has no branches.
const TIMELINE: u32 = 1;

const READ_HEAD: &str = "SELECT epoch, head, incarnation, token, round FROM log_head";

#[async_trait]
impl LogStore for SqliteStore {
    fn is_exclusive(&self) -> bool {
        self.exclusive.is_some()
    }

    fn writable(&self) -> Result<(), StoreError> {
        self.pools.writer.check()
    }

    fn files(&self) -> Option<StoreFiles> {
        self.pools.writer.location.as_ref()?.sizes()
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        let mut reader = self.pools.log.acquire().await.map_err(failed("read its triggers"))?;
        schema::check(&mut reader, &self.triggers).await
    }

    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = head_if_idle(&self.pools.log).await? {
            return Ok(Numbered::none(head));
        }
        let mut write = SqliteWrite::begin(&self.pools.writer, "number its log").await?;
        let numbered = number(&mut write, sql_limit(limit)).await?;
        write.commit().await?;
        Ok(numbered)
    }

    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError> {
        // No round here begins an epoch that would have to lie above the one that agents have seen.
        let RoundRequest { instances, touched, seen_epoch: _ } = request;
        let mut write = SqliteWrite::begin(&self.pools.writer, "commit a probe round").await?;
        let clock = read_clock();
        roster::update(&mut write, instances, touched, clock.store_time).await?;
        draw_round_token(&mut write).await?;
        let SchemaCheck { changed, fault: schema_fault } =
            schema::compare(&mut write, &self.triggers).await?;
        let began = changed.then_some(BeginCause::SchemaChanged);
        if let Some(cause) = began {
            begin(&mut write, cause, Some("tables or triggers were altered")).await?;
        }
        let numbered = number(&mut write, i64::MAX).await?;
        write.commit().await?;
        Ok(Round { numbered, clock, began, schema_fault })
    }

    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError> {
        let bound = |position: u64| i64::try_from(position).unwrap_or(i64::MAX);
        let Some(first) = LogPosition::new(epoch, from) else {
            return Ok(Replay::Refused { head: read_head(&self.pools.replays).await? });
        };
        // One statement reads one snapshot, so that the head and the rows belong together.
        let found = sqlx::query(
            "SELECT log_head.epoch, head, incarnation, log_head.token, round, kept.token AS row_token,
                    position, scope, key_hash, key_id, api_id, workspace_id, cause, committed_at
             FROM log_head LEFT JOIN
                  (SELECT * FROM invalidations WHERE epoch = ?1 AND position BETWEEN ?2 AND ?3
                   ORDER BY position LIMIT ?4) AS kept
                  ON kept.epoch = log_head.epoch
             ORDER BY position",
        )
        .bind(epoch)
        .bind(bound(from))
        .bind(bound(to))
        .bind(sql_limit(limit))
        .fetch_all(&self.pools.replays)
        .await
        .map_err(failed("replay its log"))?;
        log_rows::replay(&found, first)
    }

    async fn head(&self) -> Result<Head, StoreError> {
        read_head(&self.pools.log).await
    }

    async fn begin_incarnation(&self, cause: BeginCause, evidence: Option<&str>) -> Result<Head, StoreError> {
        let mut write = SqliteWrite::begin(&self.pools.writer, "begin an incarnation").await?;
        let head = begin(&mut write, cause, evidence).await?;
        write.commit().await?;
        Ok(head)
    }

    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = SqliteWrite::begin(&self.pools.writer, "note a lost epoch").await?;
        let note = sqlx::query("UPDATE log_head SET lost_epoch = ?1 WHERE lost_epoch < ?1");
        write.run(note.bind(epoch)).await?;
        write.commit().await
    }

    async fn history(&self) -> Result<History, StoreError> {
        let rows = sqlx::query(
            "SELECT store_id, history.incarnation, after_epoch, after_position, history.epoch, position, cause, time,
                    evidence
             FROM log_head, history ORDER BY place",
        )
        .fetch_all(&self.pools.log)
        .await
        .map_err(failed("read its history"))?;
        log_rows::history(&rows)
    }

    async fn voucher_key(&self) -> Result<VoucherKey, StoreError> {
        let row = sqlx::query("SELECT key FROM voucher_key").fetch_optional(&self.pools.log).await;
        VoucherKey::read(row.map_err(failed("read its voucher key"))?.as_ref())
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        let token: Option<i64> = sqlx::query_scalar(
            "SELECT coalesce((SELECT token FROM invalidations WHERE position = ?2 AND epoch = ?1),
                             (SELECT token FROM history WHERE position = ?2 AND epoch = ?1 LIMIT 1))",
        )
        .bind(at.epoch())
        .bind(at.position() as i64)
        .fetch_one(&self.pools.log)
        .await
        .map_err(failed("read the token of a row"))?;
        Ok(token.map(|token| LogToken(token.cast_unsigned())))
    }

    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM round_tokens WHERE token = ?1)")
            .bind(token.0.cast_signed())
            .fetch_one(&self.pools.log)
            .await
            .map_err(failed("look for a round's token"))
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let (rows, oldest): (i64, Option<i64>) =
            sqlx::query_as("SELECT count(*), min(committed_at) FROM invalidations WHERE position IS NULL")
                .fetch_one(&self.pools.log)
                .await
                .map_err(failed("count unnumbered rows"))?;
        Ok(Backlog::new(rows, oldest.map_or(0, |oldest| now().0.saturating_sub(oldest))))
    }

    async fn version(&self) -> Result<i64, StoreError> {
        sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&self.pools.watcher)
            .await
            .map_err(failed("read its version"))
    }

    async fn change_notified(&self) {
        std::future::pending::<()>().await;
    }
}

async fn read_head(readers: &SqlitePool) -> Result<Head, StoreError> {
    let row = sqlx::query(READ_HEAD).fetch_optional(readers).await;
    log_rows::head(row.map_err(failed("read its log's head"))?.as_ref())
}

/// Returns the head if no row waits for a position. Most calls then need no write lock.
async fn head_if_idle(readers: &SqlitePool) -> Result<Option<Head>, StoreError> {
    let row = sqlx::query(
        "SELECT epoch, head, incarnation, token, round,
                EXISTS (SELECT 1 FROM invalidations WHERE position IS NULL) AS waiting
         FROM log_head",
    )
    .fetch_optional(readers)
    .await
    .map_err(failed("look for unnumbered rows"))?;
    let head = log_rows::head(row.as_ref())?;
    let waiting = row.map_or(Ok(true), |row| row.flag("waiting"))?;
    Ok((!waiting).then_some(head))
}

async fn lock_head(write: &mut SqliteWrite) -> Result<Head, StoreError> {
    log_rows::head(write.row(sqlx::query(READ_HEAD)).await?.as_ref())
}

/// Gives waiting rows the positions after the head, in the order of their ids.
async fn number(write: &mut SqliteWrite, limit: i64) -> Result<Numbered, StoreError> {
    merge_bulk_changes(write).await?;
    let head = lock_head(write).await?;
    let waiting = sqlx::query(
        "WITH oldest AS (SELECT id, request_id FROM invalidations WHERE position IS NULL ORDER BY id LIMIT ?1)
         SELECT id, scope, key_hash, key_id, api_id, workspace_id, cause, request_id, committed_at, merged
         FROM invalidations
         WHERE id IN (SELECT id FROM oldest UNION
                      -- The rows of one request stay together: its receipt needs all of them.
                      SELECT id FROM invalidations
                      WHERE position IS NULL AND request_id IN (SELECT request_id FROM oldest))
         ORDER BY id",
    );
    let waiting = write.rows(waiting.bind(limit)).await?;
    let rows = log::number(head.at, &waiting).ok_or(StoreError::PositionsUsedUp)?;
    let Some((last, _)) = rows.last() else { return Ok(Numbered::none(head)) };
    let head = Head { at: *last, token: LogToken(draw()?), ..head };
    let place = |(position, row): &(LogPosition, &SqliteRow)| -> Result<Value, StoreError> {
        Ok(json!([row.integer("id")?, position.position()]))
    };
    let places: Value = rows.iter().map(place).collect::<Result<_, _>>()?;
    let give = sqlx::query(
        "UPDATE invalidations SET epoch = ?1, token = ?2, position = given.value ->> 1
         FROM json_each(?3) AS given WHERE invalidations.id = given.value ->> 0",
    );
    let token = head.token.0.cast_signed();
    write.run(give.bind(head.at.epoch()).bind(token).bind(places.to_string())).await?;
    let advance = sqlx::query("UPDATE log_head SET head = ?1, token = ?2");
    write.run(advance.bind(head.at.position() as i64).bind(token)).await?;
    audit::record_unrequested(write, &audit_records(&rows)?).await?;
    log_rows::numbered(head, &rows)
}

/// Replaces more than [`MERGE_ABOVE`] waiting key rows of one API by one row for the API, as old as the oldest of them.
/// Rows of requests stay, because their receipts name positions.
///
/// New keys may be among them. A cached "not found" belongs to no API, so the merged row doesn't evict it: it stays
/// until it times out. A key that was never announced loses no right by that.
async fn merge_bulk_changes(write: &mut SqliteWrite) -> Result<(), StoreError> {
    let has_many = sqlx::query(
        "SELECT count(*) > ?1 FROM (SELECT 1 FROM invalidations WHERE position IS NULL LIMIT ?1 + 1)",
    );
    if write.value(has_many.bind(MERGE_ABOVE)).await? != Some(true) {
        return Ok(());
    }
    let merge = sqlx::query(
        "INSERT INTO invalidations (scope, api_id, workspace_id, cause, committed_at, merged)
         SELECT 'api', api_id, max(workspace_id),
                CASE WHEN min(cause) = max(cause) THEN min(cause) ELSE 'changed' END, min(committed_at), count(*)
         FROM invalidations
         WHERE position IS NULL AND scope = 'key' AND api_id IS NOT NULL AND request_id IS NULL
         GROUP BY api_id HAVING count(*) > ?1
         RETURNING CAST(api_id AS BLOB) AS api_id",
    );
    for row in write.rows(merge.bind(MERGE_ABOVE)).await? {
        // As bytes: direct SQL can store text that isn't UTF-8, and one such id must not stop the log.
        let api: &[u8] = row.try_get("api_id").map_err(failed("merge a bulk change"))?;
        let merged = sqlx::query(
            "DELETE FROM invalidations
             WHERE position IS NULL AND scope = 'key' AND api_id = CAST(?1 AS TEXT) AND request_id IS NULL",
        );
        let rows = write.run(merged.bind(api)).await?;
        tracing::info!(api = %String::from_utf8_lossy(api), rows, "bulk change of keys merged into one of their API");
    }
    Ok(())
}

/// Draws the token of a round. That makes every round a durable write (R7).
async fn draw_round_token(write: &mut SqliteWrite) -> Result<(), StoreError> {
    let token = draw()?.cast_signed();
    write.run(sqlx::query("UPDATE log_head SET round = ?1, rounds = rounds + 1").bind(token)).await?;
    let keep = sqlx::query(
        "INSERT INTO round_tokens (place, token) SELECT rounds % ?1, round FROM log_head WHERE true
         ON CONFLICT (place) DO UPDATE SET token = excluded.token",
    );
    write.run(keep.bind(ROUND_TOKENS_KEPT)).await.map(drop)
}

/// Begins an incarnation, and an epoch if `cause` says so (R2, R15). Positions go on from the head.
pub(super) async fn begin(
    write: &mut SqliteWrite,
    cause: BeginCause,
    evidence: Option<&str>,
) -> Result<Head, StoreError> {
    let before = lock_head(write).await?;
    let mut head = Head { incarnation: Incarnation(draw()?), ..before };
    if cause.begins_epoch() {
        let lost = write.value::<i64>(sqlx::query("SELECT lost_epoch FROM log_head")).await?.unwrap_or(0);
        let epoch = epochs::next_epoch(TIMELINE, before.at.epoch(), u32::try_from(lost).unwrap_or(0));
        let at = LogPosition::new(epoch, before.at.position()).ok_or(StoreError::EpochsUsedUp)?;
        (head.at, head.token) = (at, LogToken(draw()?));
        // The epoch covers whatever changed unseen before, so later rounds compare with the present schema (R3).
        let covered = sqlx::query(
            "UPDATE log_head SET roster_complete = 0, schema_version = now.schema_version
             FROM pragma_schema_version AS now",
        );
        write.run(covered).await?;
    }
    let set = sqlx::query("UPDATE log_head SET epoch = ?1, incarnation = ?2, token = ?3")
        .bind(head.at.epoch())
        .bind(head.incarnation.0.cast_signed())
        .bind(head.token.0.cast_signed());
    write.run(set).await?;
    let append = sqlx::query(
        "INSERT INTO history (incarnation, after_epoch, after_position, epoch, position, token, cause, time, evidence)
         SELECT incarnation, ?1, ?2, epoch, head, token, ?3, ?4, ?5 FROM log_head",
    )
    .bind(before.at.epoch())
    .bind(before.at.position() as i64)
    .bind(cause.label())
    .bind(now().0)
    .bind(evidence);
    write.run(append).await?;
    Ok(head)
}
