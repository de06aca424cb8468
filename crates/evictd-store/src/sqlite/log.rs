//! Numbering, rounds, replays, epochs.

use std::time::Duration;

use async_trait::async_trait;
use evictd_core::history::{BeginCause, History, Incarnation, LogToken, Provenance, RoundToken, StoreId};
use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use evictd_core::{epochs, log};
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::clock::{now, read_clock};
use super::schema::{self, Look};
use super::write::{Write, failed};
use super::{SqliteStore, audit, roster};
use crate::error::StoreError;
use crate::history::{ROUND_TOKENS_KEPT, VoucherKey, draw};
use crate::log::{Backlog, Head, LogStore, Numbered, NumberedRequest, Replay, Round, RoundRequest};
use crate::rows::{
    self, BeginColumns, MERGE_ABOVE, ScopeColumns, UnrequestedRow, audit_records, log_position, sql_limit,
};

#[async_trait]
impl LogStore for SqliteStore {
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = head_if_idle(&self.connections.log).await? {
            return Ok(Numbered { head, rows: Vec::new(), requests: Vec::new() });
        }
        let mut write = Write::begin(&self.connections.writer, "number its log").await?;
        let numbered = number(&mut write, sql_limit(limit)).await?;
        write.commit().await?;
        Ok(numbered)
    }

    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError> {
        // An epoch that begins by itself would begin above it; here none does.
        let RoundRequest { instances, touched, seen_epoch: _ } = request;
        let mut write = Write::begin(&self.connections.writer, "commit a probe round").await?;
        let clock = read_clock();
        roster::update(&mut write, instances, touched, clock.store_time).await?;
        draw_round_token(&mut write).await?;
        let Look { changed, fault: schema_fault } = schema::compare(&mut write, &self.triggers).await?;
        let began = changed.then_some(BeginCause::SchemaChanged);
        if let Some(cause) = began {
            begin(&mut write, cause, Some("tables or triggers were altered")).await?;
        }
        let numbered = number(&mut write, i64::MAX).await?;
        write.commit().await?;
        Ok(Round { numbered, clock, began, schema_fault })
    }

    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError> {
        let limit = sql_limit(limit);
        const ACTION: &str = "replay its log";
        let bound = |position: u64| i64::try_from(position).unwrap_or(i64::MAX);
        let Some(first) = LogPosition::new(epoch, from) else {
            return read_head(&self.connections.replays).await.map(refused);
        };
        // One statement, one snapshot: the head and the rows belong together.
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
        .bind(limit)
        .fetch_all(&self.connections.replays)
        .await
        .map_err(failed(ACTION))?;
        let head = head_of(found.first())?;
        // Without any row there is the head alone.
        let places = found.iter().map_while(|row| position_of(row).transpose());
        let places = places.collect::<Result<Vec<_>, _>>()?;
        let covered = log::covered(head.at, first, places.iter().copied());
        let Some(last) = found[..covered].last() else { return Ok(refused(head)) };
        let token: i64 = last.try_get("row_token").map_err(failed(ACTION))?;
        let rows = places[..covered].iter().zip(&found).map(|(at, row)| invalidation(row, *at));
        Ok(Replay::Rows { rows: rows.collect::<Result<_, _>>()?, token: LogToken(token.cast_unsigned()) })
    }

    async fn head(&self) -> Result<Head, StoreError> {
        read_head(&self.connections.log).await
    }

    async fn begin_incarnation(&self) -> Result<Head, StoreError> {
        let mut write = Write::begin(&self.connections.writer, "begin an incarnation").await?;
        let head = begin(&mut write, BeginCause::Opened, None).await?;
        write.commit().await?;
        Ok(head)
    }

    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = Write::begin(&self.connections.writer, "note a lost epoch").await?;
        note_lost_epoch(&mut write, epoch).await?;
        write.commit().await
    }

    async fn history(&self) -> Result<History, StoreError> {
        const ACTION: &str = "read its history";
        let rows = sqlx::query(
            "SELECT store_id, history.incarnation, after_epoch, after_position, history.epoch, position, cause, time, evidence
             FROM log_head, history ORDER BY place",
        )
        .fetch_all(&self.connections.log)
        .await
        .map_err(failed(ACTION))?;
        let begin = |row: &SqliteRow| -> Result<_, StoreError> {
            let columns = || -> sqlx::Result<_> {
                Ok(BeginColumns {
                    incarnation: row.try_get("incarnation")?,
                    after: (row.try_get("after_epoch")?, row.try_get("after_position")?),
                    at: (row.try_get("epoch")?, row.try_get("position")?),
                    cause: row.try_get("cause")?,
                    time: row.try_get("time")?,
                    evidence: row.try_get("evidence")?,
                })
            };
            columns().map_err(failed(ACTION))?.read()
        };
        let store = rows.first().map(|row| row.try_get("store_id")).transpose().map_err(failed(ACTION))?;
        rows::history(store, rows.iter().map(begin).collect::<Result<_, _>>()?)
    }

    async fn voucher_key(&self) -> Result<VoucherKey, StoreError> {
        let key: Option<Vec<u8>> = sqlx::query_scalar("SELECT key FROM voucher_key")
            .fetch_optional(&self.connections.log)
            .await
            .map_err(failed("read its voucher key"))?;
        rows::voucher_key(key.as_deref())
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        let token: Option<i64> = sqlx::query_scalar(
            "SELECT coalesce((SELECT token FROM invalidations WHERE position = ?2 AND epoch = ?1),
                             (SELECT token FROM history WHERE position = ?2 AND epoch = ?1 LIMIT 1))",
        )
        .bind(at.epoch())
        .bind(at.position() as i64)
        .fetch_one(&self.connections.log)
        .await
        .map_err(failed("read the token of a row"))?;
        Ok(token.map(|token| LogToken(token.cast_unsigned())))
    }

    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM round_tokens WHERE token = ?1)")
            .bind(token.0.cast_signed())
            .fetch_one(&self.connections.log)
            .await
            .map_err(failed("look for a round's token"))
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let (rows, oldest): (i64, Option<i64>) =
            sqlx::query_as("SELECT count(*), min(committed_at) FROM invalidations WHERE position IS NULL")
                .fetch_one(&self.connections.log)
                .await
                .map_err(failed("count unnumbered rows"))?;
        let age = oldest.map_or(0, |oldest| now().0.saturating_sub(oldest));
        Ok(Backlog {
            rows: u64::try_from(rows).unwrap_or(0),
            oldest: Duration::from_micros(u64::try_from(age).unwrap_or(0)),
        })
    }

    async fn version(&self) -> Result<i64, StoreError> {
        sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&self.connections.watcher)
            .await
            .map_err(failed("tell whether it changed"))
    }

    async fn change_notified(&self) {
        std::future::pending::<()>().await;
    }

    fn is_exclusive(&self) -> bool {
        self.exclusive.is_some()
    }

    fn writable(&self) -> Result<(), StoreError> {
        self.connections.writer.check()
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        let mut reader = self.connections.log.acquire().await.map_err(failed("read its triggers"))?;
        schema::check(&mut reader, &self.triggers).await
    }
}

/// A file doesn't branch.
const TIMELINE: u32 = 1;

/// What [`head_of`] reads, of the table `log_head` alone.
const READ_HEAD: &str = "SELECT epoch, head, incarnation, token, round FROM log_head";

async fn read_head(readers: &SqlitePool) -> Result<Head, StoreError> {
    let row = sqlx::query(READ_HEAD).fetch_optional(readers).await.map_err(failed("read its log's head"))?;
    head_of(row.as_ref())
}

/// The head, if no row waits for a position: most calls need no write lock.
pub(super) async fn head_if_idle(readers: &SqlitePool) -> Result<Option<Head>, StoreError> {
    let row = sqlx::query(
        "SELECT epoch, head, incarnation, token, round,
                EXISTS (SELECT 1 FROM invalidations WHERE position IS NULL) AS waiting
         FROM log_head",
    )
    .fetch_optional(readers)
    .await
    .map_err(failed("look for unnumbered rows"))?;
    let head = head_of(row.as_ref())?;
    let waiting = row.is_none_or(|row| row.get("waiting"));
    Ok((!waiting).then_some(head))
}

/// Reads the columns of the head.
pub(super) fn head_of(row: Option<&SqliteRow>) -> Result<Head, StoreError> {
    let row = row.ok_or_else(no_head)?;
    let read = |column| row.try_get::<i64, _>(column).map_err(failed("read its log's head"));
    Ok(Head {
        at: log_position(read("epoch")?, read("head")?)?,
        incarnation: Incarnation(read("incarnation")?.cast_unsigned()),
        token: LogToken(read("token")?.cast_unsigned()),
        round: RoundToken(read("round")?.cast_unsigned()),
    })
}

/// Reads the columns `store_id` and `incarnation`.
pub(super) fn provenance_of(row: Option<&SqliteRow>) -> Result<Provenance, StoreError> {
    let row = row.ok_or_else(no_head)?;
    let read = |column| row.try_get::<i64, _>(column).map_err(failed("read which store it is"));
    Ok(Provenance {
        store: StoreId(read("store_id")?.cast_unsigned()),
        incarnation: Incarnation(read("incarnation")?.cast_unsigned()),
    })
}

fn no_head() -> StoreError {
    StoreError::Corrupt { what: "log_head", value: "no row".to_owned() }
}

/// Gives waiting rows the positions after the head, in the order of their ids.
pub(super) async fn number(write: &mut Write, limit: i64) -> Result<Numbered, StoreError> {
    merge_crowds(write).await?;
    let mut head = head_of(write.row(sqlx::query(READ_HEAD)).await?.as_ref())?;
    let waiting = sqlx::query(
        "WITH oldest AS (SELECT id, request_id FROM invalidations WHERE position IS NULL ORDER BY id LIMIT ?1)
         SELECT id, scope, key_hash, key_id, api_id, workspace_id, cause, request_id, committed_at, merged
         FROM invalidations
         WHERE id IN (SELECT id FROM oldest UNION
                      -- The rows of one request stay together: it is settled with the last of them.
                      SELECT id FROM invalidations
                      WHERE position IS NULL AND request_id IN (SELECT request_id FROM oldest))
         ORDER BY id",
    );
    let waiting = write.rows(waiting.bind(limit)).await?;
    let numbered = log::number(head.at, &waiting).ok_or(StoreError::PositionsUsedUp)?;
    let Some((last, _)) = numbered.last() else {
        return Ok(Numbered { head, rows: Vec::new(), requests: Vec::new() });
    };
    head = Head { at: *last, token: LogToken(draw()?), ..head };
    let place = |(position, row): &(LogPosition, &SqliteRow)| -> Result<Value, StoreError> {
        let id: i64 = row.try_get("id").map_err(failed("read a row of its log"))?;
        Ok(json!([id, position.position()]))
    };
    let places: Value = numbered.iter().map(place).collect::<Result<_, _>>()?;
    let give = sqlx::query(
        "UPDATE invalidations SET epoch = ?1, token = ?2, position = given.value ->> 1
         FROM json_each(?3) AS given WHERE invalidations.id = given.value ->> 0",
    );
    let token = head.token.0.cast_signed();
    write.run(give.bind(head.at.epoch()).bind(token).bind(places.to_string())).await?;
    let advance = sqlx::query("UPDATE log_head SET head = ?1, token = ?2");
    write.run(advance.bind(head.at.position() as i64).bind(token)).await?;
    let unrequested = numbered.iter().filter_map(|(at, row)| unrequested(row, *at).transpose());
    let records = audit_records(unrequested.collect::<Result<_, _>>()?);
    audit::record_unrequested(write, &records).await?;
    let requests = numbered.iter().filter_map(|(at, row)| request(row, *at).transpose());
    Ok(Numbered {
        head,
        rows: numbered.iter().map(|(at, row)| invalidation(row, *at)).collect::<Result<_, _>>()?,
        requests: requests.collect::<Result<_, _>>()?,
    })
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

/// Draws the token of a round, which makes it a durable write (R7).
pub(super) async fn draw_round_token(write: &mut Write) -> Result<(), StoreError> {
    let token = draw()?.cast_signed();
    write.run(sqlx::query("UPDATE log_head SET round = ?1, rounds = rounds + 1").bind(token)).await?;
    let keep = sqlx::query(
        "INSERT INTO round_tokens (place, token) SELECT rounds % ?1, round FROM log_head WHERE true
         ON CONFLICT (place) DO UPDATE SET token = excluded.token",
    );
    write.run(keep.bind(ROUND_TOKENS_KEPT)).await?;
    Ok(())
}

/// Begins an incarnation, and with it an epoch if `cause` says so (R2, R15). Positions go on from the head.
pub(super) async fn begin(
    write: &mut Write,
    cause: BeginCause,
    evidence: Option<&str>,
) -> Result<Head, StoreError> {
    let before = head_of(write.row(sqlx::query(READ_HEAD)).await?.as_ref())?;
    let mut head = Head { incarnation: Incarnation(draw()?), ..before };
    if cause.begins_epoch() {
        let lost = write.value::<i64>(sqlx::query("SELECT lost_epoch FROM log_head")).await?.unwrap_or(0);
        let lost = u32::try_from(lost).unwrap_or(0);
        let at =
            LogPosition::new(epochs::next_epoch(TIMELINE, before.at.epoch(), lost), before.at.position());
        (head.at, head.token) = (at.ok_or(StoreError::EpochsUsedUp)?, LogToken(draw()?));
        // Whatever changed unseen before is covered, so that the present schema is the one to compare with (R3).
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

/// Notes an epoch that an agent has proved to have seen of another history.
pub(super) async fn note_lost_epoch(write: &mut Write, epoch: u32) -> Result<(), StoreError> {
    let note = sqlx::query("UPDATE log_head SET lost_epoch = ?1 WHERE lost_epoch < ?1");
    write.run(note.bind(epoch)).await.map(drop)
}

fn refused(head: Head) -> Replay {
    Replay::Refused { head }
}

/// Reads a row that has this position.
fn invalidation(row: &SqliteRow, position: LogPosition) -> Result<Invalidation, StoreError> {
    Ok(Invalidation {
        position,
        scope: scope_columns(row).read(),
        cause: cause_of(row),
        committed_at: committed_at_of(row)?,
    })
}

/// Reads a row that no request wrote and has this position; `None` if one did.
fn unrequested(row: &SqliteRow, position: LogPosition) -> Result<Option<UnrequestedRow<'_>>, StoreError> {
    if text(row, "request_id").is_some() {
        return Ok(None);
    }
    Ok(Some(UnrequestedRow {
        position,
        columns: scope_columns(row),
        cause: cause_of(row),
        committed_at: committed_at_of(row)?,
        merged: row.try_get("merged").map_err(failed("read a row of its log"))?,
    }))
}

/// Reads which request wrote a row that has this position; `None` if none did.
pub(super) fn request(row: &SqliteRow, position: LogPosition) -> Result<Option<NumberedRequest>, StoreError> {
    let (Some(request_id), Some(workspace_id)) = (text(row, "request_id"), text(row, "workspace_id")) else {
        return Ok(None);
    };
    Ok(Some(NumberedRequest {
        request_id: request_id.to_owned(),
        workspace_id: WorkspaceId::new(workspace_id),
        position,
        cause: cause_of(row),
        committed_at: committed_at_of(row)?,
    }))
}

/// Reads the place of a row that has one.
pub(super) fn numbered_position_of(row: &SqliteRow) -> Result<LogPosition, StoreError> {
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
