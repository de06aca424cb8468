//! Numbering, rounds, replays, epochs.

use std::time::Duration;

use evictd_core::authority::is_credible;
use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::write::{Write, failed};
use super::{audit, now};
use crate::StoreError;
use crate::log::{Backlog, Numbered, NumberedRequest, Replay};
use crate::rows::{self, MERGE_ABOVE, ScopeColumns, UnrequestedRow, audit_records, log_position};

/// The head, read alone.
pub(super) async fn head(readers: &SqlitePool) -> Result<LogPosition, StoreError> {
    let row = sqlx::query("SELECT epoch, head FROM log_head")
        .fetch_optional(readers)
        .await
        .map_err(failed("read its log's head"))?;
    head_of(row.as_ref())
}

/// The head, if no row waits for a position: most calls need no write lock.
pub(super) async fn head_if_idle(readers: &SqlitePool) -> Result<Option<LogPosition>, StoreError> {
    let row = sqlx::query(
        "SELECT epoch, head, EXISTS (SELECT 1 FROM invalidations WHERE position IS NULL) AS waiting
         FROM log_head",
    )
    .fetch_optional(readers)
    .await
    .map_err(failed("look for unnumbered rows"))?;
    let head = head_of(row.as_ref())?;
    let waiting = row.is_none_or(|row| row.get("waiting"));
    Ok((!waiting).then_some(head))
}

/// Reads the columns `epoch` and `head`.
pub(super) fn head_of(row: Option<&SqliteRow>) -> Result<LogPosition, StoreError> {
    let Some(row) = row else {
        return Err(StoreError::Corrupt { what: "log_head", value: "no row".to_owned() });
    };
    let read = |column| row.try_get::<i64, _>(column).map_err(failed("read its log's head"));
    log_position(read("epoch")?, read("head")?)
}

/// Gives waiting rows the positions after the head, in the order of their ids.
pub(super) async fn number(write: &mut Write, limit: i64) -> Result<Numbered, StoreError> {
    merge_crowds(write).await?;
    let row = write.row(sqlx::query("SELECT epoch, head FROM log_head")).await?;
    let before = head_of(row.as_ref())?;
    let numbering = sqlx::query(
        "UPDATE invalidations SET epoch = ?1, position = ?2 + waiting.place
         FROM (WITH oldest AS (SELECT id, request_id FROM invalidations
                               WHERE position IS NULL ORDER BY id LIMIT ?3)
               SELECT id AS row, row_number() OVER (ORDER BY id) AS place
               FROM (SELECT id FROM oldest UNION
                     -- The rows of one request stay together: it is settled with the last of them.
                     SELECT id FROM invalidations
                     WHERE position IS NULL AND request_id IN (SELECT request_id FROM oldest))) AS waiting
         WHERE id = waiting.row
         RETURNING epoch, position, scope, key_hash, key_id, api_id, workspace_id, cause, request_id, committed_at,
                   merged",
    )
    .bind(before.epoch())
    .bind(before.position() as i64)
    .bind(limit);
    let numbered = write.rows(numbering).await?;
    let mut rows = numbered.iter().map(invalidation).collect::<Result<Vec<_>, _>>()?;
    let requests = numbered.iter().filter_map(|row| request(row).transpose());
    let mut requests = requests.collect::<Result<Vec<_>, _>>()?;
    // RETURNING promises no order.
    rows.sort_unstable_by_key(|row| row.position);
    requests.sort_unstable_by_key(|request| request.position);
    let head = rows.last().map_or(before, |last| last.position);
    if head > before {
        write.run(sqlx::query("UPDATE log_head SET head = ?1").bind(head.position() as i64)).await?;
    }
    let unrequested = numbered.iter().filter_map(|row| unrequested(row).transpose());
    let records = audit_records(unrequested.collect::<Result<_, _>>()?);
    audit::record_unrequested(write, &records).await?;
    Ok(Numbered { head, rows, requests })
}

/// Replaces more than [`MERGE_ABOVE`] waiting key rows of one API by one row for the API, as old as the
/// oldest of them.
///
/// Not those that a request waits for by id. New keys may be among them: a cached "not found" belongs to no
/// API and so outlives the merged row, for as long as "not found" is remembered; a key that was never
/// announced loses no right by that.
async fn merge_crowds(write: &mut Write) -> Result<(), StoreError> {
    let crowded = sqlx::query(
        "SELECT count(*) > ?1 FROM (SELECT 1 FROM invalidations WHERE position IS NULL LIMIT ?1 + 1)",
    );
    if write.value(crowded.bind(MERGE_ABOVE)).await? != Some(true) {
        return Ok(());
    }
    let widen = sqlx::query(
        "INSERT INTO invalidations (scope, api_id, workspace_id, cause, committed_at, merged)
         SELECT 'api', api_id, max(workspace_id),
                CASE WHEN min(cause) = max(cause) THEN min(cause) ELSE 'changed' END, min(committed_at), count(*)
         FROM invalidations
         WHERE position IS NULL AND scope = 'key' AND api_id IS NOT NULL AND request_id IS NULL
         GROUP BY api_id HAVING count(*) > ?1
         RETURNING CAST(api_id AS BLOB) AS api_id",
    );
    for row in write.rows(widen.bind(MERGE_ABOVE)).await? {
        // As bytes: direct SQL can store text that isn't UTF-8, and one such id must not stop the log.
        let api: &[u8] = row.try_get("api_id").map_err(failed("merge a bulk change"))?;
        let merged = sqlx::query(
            "DELETE FROM invalidations
             WHERE position IS NULL AND scope = 'key' AND api_id = CAST(?1 AS TEXT) AND request_id IS NULL",
        );
        let rows = write.run(merged.bind(api)).await?;
        tracing::info!(api = %String::from_utf8_lossy(api), rows, "merged a bulk change of keys into one change of their API");
    }
    Ok(())
}

/// Raises the fence, which makes a round a durable write (R7).
pub(super) async fn raise_fence(write: &mut Write) -> Result<(), StoreError> {
    write.run(sqlx::query("UPDATE log_head SET fence = fence + 1")).await?;
    Ok(())
}

/// Begins a new epoch if somebody has credibly seen more than the head: what this store doesn't have, so that
/// it went back (R2). Returns the new head if so.
pub(super) async fn begin_epoch_above(
    write: &mut Write,
    seen: &[LogPosition],
) -> Result<Option<LogPosition>, StoreError> {
    let row = write.row(sqlx::query("SELECT epoch, head FROM log_head")).await?;
    let head = head_of(row.as_ref())?;
    let (credible, incredible): (Vec<_>, Vec<_>) =
        seen.iter().copied().partition(|seen| is_credible(*seen, head));
    if let Some(seen) = incredible.iter().max() {
        tracing::warn!(%seen, %head, "an agent claims to have seen an epoch that can't be; it is not believed");
    }
    match credible.into_iter().filter(|seen| *seen > head).max() {
        Some(seen) => set_epoch(write, head, seen.epoch().max(head.epoch()) + 1).await,
        None => Ok(None),
    }
}

/// Begins a new epoch whatever anybody has seen. Returns the new head.
pub(super) async fn begin_epoch(write: &mut Write) -> Result<LogPosition, StoreError> {
    let row = write.row(sqlx::query("SELECT epoch, head FROM log_head")).await?;
    let head = head_of(row.as_ref())?;
    set_epoch(write, head, head.epoch() + 1).await?.ok_or(StoreError::EpochsUsedUp)
}

/// Positions go on from the head, and whatever changed unseen before is covered, so that the present schema is the one
/// to compare with (R3). `None` if there is no such epoch: the present one goes on as well.
async fn set_epoch(
    write: &mut Write,
    head: LogPosition,
    epoch: u32,
) -> Result<Option<LogPosition>, StoreError> {
    let Some(began) = LogPosition::new(epoch, head.position()) else { return Ok(None) };
    let begin = sqlx::query(
        "UPDATE log_head SET epoch = ?1, roster_complete = 0, schema_version = now.schema_version
         FROM pragma_schema_version AS now",
    );
    write.run(begin.bind(epoch)).await?;
    Ok(Some(began))
}

/// The rows `from..=to` of `epoch`, as many from the first on as there are without a hole, at most `limit`.
/// Refused when that is none: `epoch` isn't the present one, `from` lies beyond the head, or its row was
/// purged.
pub(super) async fn replay(
    readers: &SqlitePool,
    epoch: u32,
    from: u64,
    to: u64,
    limit: i64,
) -> Result<Replay, StoreError> {
    const ACTION: &str = "replay its log";
    let bound = |position: u64| i64::try_from(position).unwrap_or(i64::MAX);
    // One statement, one snapshot: the head and the rows belong together.
    let found = sqlx::query(
        "SELECT log_head.epoch, head,
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
    .bind(limit)
    .fetch_all(readers)
    .await
    .map_err(failed(ACTION))?;
    let head = head_of(found.first())?;
    let mut rows = Vec::with_capacity(found.len());
    for (expected, row) in (from..=to).zip(&found) {
        if row.try_get::<Option<i64>, _>("position").map_err(failed(ACTION))? != Some(bound(expected)) {
            break; // Absent never means nothing (R5).
        }
        rows.push(invalidation(row)?);
    }
    Ok(if rows.is_empty() { Replay::Refused { head } } else { Replay::Rows(rows) })
}

/// What waits for a position.
pub(super) async fn backlog(readers: &SqlitePool) -> Result<Backlog, StoreError> {
    let (rows, oldest): (i64, Option<i64>) =
        sqlx::query_as("SELECT count(*), min(committed_at) FROM invalidations WHERE position IS NULL")
            .fetch_one(readers)
            .await
            .map_err(failed("count unnumbered rows"))?;
    let age = oldest.map_or(0, |oldest| now().0.saturating_sub(oldest));
    Ok(Backlog {
        rows: u64::try_from(rows).unwrap_or(0),
        oldest: Duration::from_micros(u64::try_from(age).unwrap_or(0)),
    })
}

/// Reads a numbered row.
fn invalidation(row: &SqliteRow) -> Result<Invalidation, StoreError> {
    Ok(Invalidation {
        position: numbered_position_of(row)?,
        scope: scope_columns(row).read(),
        cause: cause_of(row),
        committed_at: committed_at_of(row)?,
    })
}

/// Reads a numbered row that no request wrote; `None` if one did.
fn unrequested(row: &SqliteRow) -> Result<Option<UnrequestedRow<'_>>, StoreError> {
    if text(row, "request_id").is_some() {
        return Ok(None);
    }
    Ok(Some(UnrequestedRow {
        position: numbered_position_of(row)?,
        columns: scope_columns(row),
        cause: cause_of(row),
        committed_at: committed_at_of(row)?,
        merged: row.try_get("merged").map_err(failed("read a row of its log"))?,
    }))
}

/// Reads which request wrote a numbered row; `None` if none did.
pub(super) fn request(row: &SqliteRow) -> Result<Option<NumberedRequest>, StoreError> {
    let (Some(request_id), Some(workspace_id)) = (text(row, "request_id"), text(row, "workspace_id")) else {
        return Ok(None);
    };
    Ok(Some(NumberedRequest {
        request_id: request_id.to_owned(),
        workspace_id: WorkspaceId::new(workspace_id),
        position: numbered_position_of(row)?,
        cause: cause_of(row),
        committed_at: committed_at_of(row)?,
    }))
}

fn numbered_position_of(row: &SqliteRow) -> Result<LogPosition, StoreError> {
    let number = |column| row.try_get::<i64, _>(column).map_err(failed("read a row of its log"));
    log_position(number("epoch")?, number("position")?)
}

/// Reads the place of a row; `None` if it waits for one.
pub(super) fn position_of(row: &SqliteRow) -> Result<Option<LogPosition>, StoreError> {
    let waits = row.try_get::<Option<i64>, _>("position").map_err(failed("read a row of its log"))?.is_none();
    if waits { Ok(None) } else { numbered_position_of(row).map(Some) }
}

pub(super) fn cause_of(row: &SqliteRow) -> Cause {
    rows::cause(text(row, "cause"))
}

pub(super) fn committed_at_of(row: &SqliteRow) -> Result<StoreTime, StoreError> {
    row.try_get("committed_at").map(StoreTime).map_err(failed("read a row of its log"))
}

/// Text, unless it is absent or isn't any.
fn text<'r>(row: &'r SqliteRow, column: &str) -> Option<&'r str> {
    row.try_get::<Option<&str>, _>(column).ok().flatten()
}

/// What a row makes forgotten. Direct SQL can store text that isn't UTF-8; such a column says nothing.
fn scope_columns(row: &SqliteRow) -> ScopeColumns<'_> {
    ScopeColumns {
        scope: text(row, "scope"),
        key_hash: row.try_get::<Option<&[u8]>, _>("key_hash").ok().flatten(),
        key_id: text(row, "key_id"),
        api_id: text(row, "api_id"),
        workspace_id: text(row, "workspace_id"),
    }
}
