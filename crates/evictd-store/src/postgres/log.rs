//! Numbering, rounds, replays, epochs.

use std::time::Duration;

use async_trait::async_trait;
use evictd_core::history::{History, LogToken, RoundToken};
use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::log;
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::connections::{Lane, failed};
use super::head::{LockedHead, head_of, lock_head, no_head};
use super::write::Write;
use super::{PostgresStore, audit, rights, roster, triggers};
use crate::error::StoreError;
use crate::history::{VoucherKey, draw};
use crate::log::{Backlog, Head, LogStore, Numbered, NumberedRequest, Replay, Round, RoundRequest};
use crate::rows::{
    self, BeginColumns, MERGE_ABOVE, ScopeColumns, UnrequestedRow, audit_records, log_position, sql_limit,
};

#[async_trait]
impl LogStore for PostgresStore {
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = head_if_idle(&self.connections.log).await? {
            return Ok(Numbered { head, rows: Vec::new(), requests: Vec::new() });
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
        let limit = sql_limit(limit);
        const ACTION: &str = "replay its log";
        let bound = |position: u64| i64::try_from(position).unwrap_or(i64::MAX);
        let Some(first) = LogPosition::new(epoch, from) else {
            return read_head(&self.connections.replays).await.map(refused);
        };
        // One statement, one snapshot: the head and the rows belong together.
        let ask = || {
            sqlx::query(
                "SELECT log_head.epoch, head, incarnation, log_head.token, round, kept.token AS row_token,
                        position, scope, key_hash, key_id, api_id, workspace_id, cause, committed_at
                 FROM ONLY log_head LEFT JOIN
                      (SELECT * FROM ONLY invalidations WHERE epoch = $1 AND position BETWEEN $2 AND $3
                       ORDER BY position LIMIT $4) AS kept
                      ON kept.epoch = log_head.epoch
                 ORDER BY position",
            )
            .bind(i32::try_from(epoch).unwrap_or(i32::MAX))
            .bind(bound(from))
            .bind(bound(to))
            .bind(limit)
        };
        let found = self.connections.replays.rows(ACTION, ask).await?;
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
        let mut write = self.log("begin an incarnation").await?;
        let mut head = lock_head(&mut write).await?;
        if head.begin_epoch_if_due(&mut write, 0).await?.is_none() {
            head.begin_incarnation(&mut write).await?;
        }
        write.commit().await?;
        Ok(head.head)
    }

    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = self.log("note a lost epoch").await?;
        let mut head = lock_head(&mut write).await?;
        head.note_lost_epoch(&mut write, epoch).await?;
        write.commit().await
    }

    async fn history(&self) -> Result<History, StoreError> {
        const ACTION: &str = "read its history";
        let ask = || {
            sqlx::query(
                "SELECT store_id, history.incarnation, after_epoch::bigint, after_position, history.epoch::bigint, position,
                        cause, time, evidence
                 FROM ONLY log_head, ONLY history ORDER BY place",
            )
        };
        let rows = self.connections.log.rows(ACTION, ask).await?;
        let begin = |row: &PgRow| -> Result<_, StoreError> {
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
        const ACTION: &str = "read its voucher key";
        let row =
            self.connections.log.row(ACTION, || sqlx::query("SELECT key FROM ONLY voucher_key")).await?;
        let key = row.as_ref().map(|row| row.try_get("key")).transpose().map_err(failed(ACTION))?;
        rows::voucher_key(key)
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        const ACTION: &str = "read the token of a row";
        let ask = || {
            sqlx::query(
                "SELECT coalesce((SELECT token FROM ONLY invalidations WHERE position = $2 AND epoch = $1),
                                 (SELECT token FROM ONLY history WHERE position = $2 AND epoch = $1 LIMIT 1)) AS token",
            )
            .bind(at.epoch() as i32)
            .bind(at.position() as i64)
        };
        let row = self.connections.log.row(ACTION, ask).await?;
        let token =
            row.map_or(Ok(None), |row| row.try_get::<Option<i64>, _>("token")).map_err(failed(ACTION))?;
        Ok(token.map(|token| LogToken(token.cast_unsigned())))
    }

    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError> {
        const ACTION: &str = "look for a round's token";
        let ask = || {
            sqlx::query("SELECT EXISTS (SELECT FROM ONLY round_tokens WHERE token = $1) AS has")
                .bind(token.0.cast_signed())
        };
        self.connections
            .log
            .row(ACTION, ask)
            .await?
            .map_or(Ok(false), |row| row.try_get("has"))
            .map_err(failed(ACTION))
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        const ACTION: &str = "count unnumbered rows";
        let count = || {
            sqlx::query(
                "SELECT count(*) AS rows, coalesce(evictd_now() - min(committed_at), 0) AS age
                 FROM ONLY invalidations WHERE position IS NULL",
            )
        };
        let row = self.connections.log.row(ACTION, count).await?;
        let read = |column| -> Result<u64, StoreError> {
            let number = row.as_ref().map_or(Ok(0), |row| row.try_get::<i64, _>(column));
            Ok(u64::try_from(number.map_err(failed(ACTION))?).unwrap_or(0))
        };
        Ok(Backlog { rows: read("rows")?, oldest: Duration::from_micros(read("age")?) })
    }

    async fn version(&self) -> Result<i64, StoreError> {
        const ACTION: &str = "tell whether it changed";
        let look = || {
            sqlx::query(
                "SELECT CASE WHEN EXISTS (SELECT FROM ONLY invalidations WHERE position IS NULL)
                     THEN hashtextextended(pg_current_snapshot()::text, 0) ELSE head END AS version
                 FROM ONLY log_head",
            )
        };
        let row = self.connections.log.row(ACTION, look).await?.ok_or_else(no_head)?;
        row.try_get("version").map_err(failed(ACTION))
    }

    async fn change_notified(&self) {
        self.listener.told(&self.options).await;
    }

    fn is_exclusive(&self) -> bool {
        false
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        triggers::check(&self.connections.log).await?;
        rights::check(&self.connections.log).await
    }
}

/// How long numbering may take when a bulk change by direct SQL waits for it.
const CROWD_LIMIT: Duration = Duration::from_mins(1);

async fn read_head(log: &Lane) -> Result<Head, StoreError> {
    let read = || sqlx::query("SELECT epoch, head, incarnation, token, round FROM ONLY log_head");
    head_of(log.row("read its log's head", read).await?.as_ref())
}

/// The head, if no row waits for a position: most calls need no lock.
pub(super) async fn head_if_idle(log: &Lane) -> Result<Option<Head>, StoreError> {
    const ACTION: &str = "look for unnumbered rows";
    let look = || {
        sqlx::query(
            "SELECT epoch, head, incarnation, token, round,
                    EXISTS (SELECT FROM ONLY invalidations WHERE position IS NULL) AS waiting
             FROM ONLY log_head",
        )
    };
    let row = log.row(ACTION, look).await?;
    let head = head_of(row.as_ref())?;
    let waiting = row.map_or(Ok(true), |row| row.try_get("waiting")).map_err(failed(ACTION))?;
    Ok((!waiting).then_some(head))
}

/// Gives waiting rows the positions after the head, in the order of their ids: all that were committed when
/// the lock was had, because this statement's snapshot is younger than that (R1).
async fn number(locked: LockedHead, write: &mut Write, limit: i64) -> Result<Numbered, StoreError> {
    if locked.crowded {
        write.take_time(CROWD_LIMIT).await?;
        merge_crowds(write).await?;
    }
    let waiting = sqlx::query(
        "WITH oldest AS (
             SELECT id, request_id FROM ONLY invalidations WHERE position IS NULL ORDER BY id LIMIT $1
         ), together AS (
             SELECT id FROM oldest UNION
             -- The rows of one request stay together: it is settled with the last of them.
             SELECT id FROM ONLY invalidations
             WHERE position IS NULL AND request_id IN (SELECT request_id FROM oldest)
         )
         SELECT id, scope, key_hash, key_id, api_id, workspace_id, cause, request_id, committed_at, merged
         FROM ONLY invalidations WHERE id IN (SELECT id FROM together) ORDER BY id",
    );
    let waiting = write.rows(waiting.bind(limit)).await?;
    let numbered = log::number(locked.head.at, &waiting).ok_or(StoreError::PositionsUsedUp)?;
    let Some((last, _)) = numbered.last() else {
        return Ok(Numbered { head: locked.head, rows: Vec::new(), requests: Vec::new() });
    };
    let head = Head { at: *last, token: LogToken(draw()?), ..locked.head };
    let ids = waiting.iter().map(|row| row.try_get::<i64, _>("id").map_err(failed(READ_ROW)));
    let ids = ids.collect::<Result<Vec<_>, _>>()?;
    let positions: Vec<i64> = numbered.iter().map(|(at, _)| at.position() as i64).collect();
    let give = sqlx::query(
        "WITH given AS (
             UPDATE ONLY invalidations AS waiting SET epoch = $1, position = given.position, token = $2
             FROM unnest($3, $4) AS given (id, position)
             -- That it has none leads to the index of those that wait, however long the log is.
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
    .bind(numbered.len() as i64);
    if write.run(give).await? == 0 {
        // Somebody deleted a row in between. Without it there would be a gap below the head; the next call finds none.
        return Err(failed("number its log")(sqlx::Error::RowNotFound));
    }
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
    // One statement, one snapshot: exactly the rows that are counted go.
    let merge = sqlx::query(
        "WITH crowds AS (
             SELECT api_id, max(workspace_id) AS workspace_id, min(committed_at) AS committed_at, count(*) AS keys,
                    CASE WHEN min(cause) = max(cause) THEN min(cause) ELSE 'changed' END AS cause
             FROM ONLY invalidations
             WHERE position IS NULL AND scope = 'key' AND api_id IS NOT NULL AND request_id IS NULL
             GROUP BY api_id HAVING count(*) > $1
         ), gone AS (
             DELETE FROM ONLY invalidations AS i USING crowds
             WHERE i.position IS NULL AND i.scope = 'key' AND i.api_id = crowds.api_id AND i.request_id IS NULL
         ), merged AS (
             INSERT INTO invalidations (scope, api_id, workspace_id, cause, request_id, committed_at, merged)
             SELECT 'api', api_id, workspace_id, cause, NULL, committed_at, keys FROM crowds
         )
         SELECT api_id, keys FROM crowds",
    );
    for crowd in write.rows(merge.bind(MERGE_ABOVE)).await? {
        let read = || Ok((crowd.try_get::<&str, _>("api_id")?, crowd.try_get::<i64, _>("keys")?));
        let (api, rows) = read().map_err(failed("merge a bulk change"))?;
        tracing::info!(%api, rows, "merged a bulk change of keys into one change of their API");
    }
    Ok(())
}

fn refused(head: Head) -> Replay {
    Replay::Refused { head }
}

/// Reads a row that has this position.
fn invalidation(row: &PgRow, position: LogPosition) -> Result<Invalidation, StoreError> {
    Ok(Invalidation {
        position,
        scope: scope_columns(row)?.read(),
        cause: cause_of(row)?,
        committed_at: committed_at_of(row)?,
    })
}

/// Reads a row that no request wrote and has this position; `None` if one did.
fn unrequested(row: &PgRow, position: LogPosition) -> Result<Option<UnrequestedRow<'_>>, StoreError> {
    if row.try_get::<Option<&str>, _>("request_id").map_err(failed(READ_ROW))?.is_some() {
        return Ok(None);
    }
    Ok(Some(UnrequestedRow {
        position,
        columns: scope_columns(row)?,
        cause: cause_of(row)?,
        committed_at: committed_at_of(row)?,
        merged: row.try_get("merged").map_err(failed(READ_ROW))?,
    }))
}

fn scope_columns(row: &PgRow) -> Result<ScopeColumns<'_>, StoreError> {
    let read = || -> sqlx::Result<_> {
        Ok(ScopeColumns {
            scope: row.try_get("scope")?,
            key_hash: row.try_get("key_hash")?,
            key_id: row.try_get("key_id")?,
            api_id: row.try_get("api_id")?,
            workspace_id: row.try_get("workspace_id")?,
        })
    };
    read().map_err(failed(READ_ROW))
}

const READ_ROW: &str = "read a row of its log";

/// Reads which request wrote a row that has this position; `None` if none did.
pub(super) fn request(row: &PgRow, position: LogPosition) -> Result<Option<NumberedRequest>, StoreError> {
    let text = |column| row.try_get::<Option<&str>, _>(column).map_err(failed(READ_ROW));
    let (Some(request_id), Some(workspace_id)) = (text("request_id")?, text("workspace_id")?) else {
        return Ok(None);
    };
    Ok(Some(NumberedRequest {
        request_id: request_id.to_owned(),
        workspace_id: WorkspaceId::new(workspace_id),
        position,
        cause: cause_of(row)?,
        committed_at: committed_at_of(row)?,
    }))
}

/// Reads the place of a row that has one.
pub(super) fn numbered_position_of(row: &PgRow) -> Result<LogPosition, StoreError> {
    let failed = failed(READ_ROW);
    let epoch: i32 = row.try_get("epoch").map_err(&failed)?;
    log_position(epoch.into(), row.try_get("position").map_err(&failed)?)
}

/// Reads the place of a row; `None` if it waits for one.
pub(super) fn position_of(row: &PgRow) -> Result<Option<LogPosition>, StoreError> {
    let waits = row.try_get::<Option<i64>, _>("position").map_err(failed(READ_ROW))?.is_none();
    if waits { Ok(None) } else { numbered_position_of(row).map(Some) }
}

pub(super) fn cause_of(row: &PgRow) -> Result<Cause, StoreError> {
    row.try_get("cause").map(rows::cause).map_err(failed(READ_ROW))
}

pub(super) fn committed_at_of(row: &PgRow) -> Result<StoreTime, StoreError> {
    row.try_get("committed_at").map(StoreTime).map_err(failed(READ_ROW))
}
