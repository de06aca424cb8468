//! Numbering, rounds, replays, epochs.

use std::time::{Duration, Instant};

use evictd_core::history::{BeginCause, History, Incarnation, LogToken, Provenance, RoundToken, StoreId};
use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::time::StoreTime;
use evictd_core::{epochs, log};
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::postgres::types::Oid;

use super::connections::{Lane, failed};
use super::lineage::Lineage;
use super::write::Write;
use super::{audit, schema, triggers};
use crate::StoreError;
use crate::history::{ROUND_TOKENS_KEPT, VoucherKey, draw};
use crate::log::{Backlog, Head, Numbered, NumberedRequest, Reading, Replay};
use crate::rows::{
    self, BeginColumns, MERGE_ABOVE, ScopeColumns, UnrequestedRow, audit_records, log_position,
};

/// How long numbering may take when a bulk change by direct SQL waits for it.
const CROWD_LIMIT: Duration = Duration::from_mins(1);

/// The head, read alone.
pub(super) async fn head(log: &Lane) -> Result<Head, StoreError> {
    let read = || sqlx::query("SELECT epoch, head, incarnation, token, round FROM ONLY log_head");
    let row = log.row("read its log's head", read).await?;
    head_of(row.as_ref())
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

/// Changes with everything that may have to be numbered: while rows wait, it is drawn from the transactions that a
/// snapshot sees, and else it is the head.
pub(super) async fn version(log: &Lane) -> Result<i64, StoreError> {
    const ACTION: &str = "tell whether it changed";
    let look = || {
        sqlx::query(
            "SELECT CASE WHEN EXISTS (SELECT FROM ONLY invalidations WHERE position IS NULL)
                 THEN hashtextextended(pg_current_snapshot()::text, 0) ELSE head END AS version
             FROM ONLY log_head",
        )
    };
    let row = log.row(ACTION, look).await?.ok_or_else(no_head)?;
    row.try_get("version").map_err(failed(ACTION))
}

/// Reads the columns of the head.
pub(super) fn head_of(row: Option<&PgRow>) -> Result<Head, StoreError> {
    let row = row.ok_or_else(no_head)?;
    let failed = failed("read its log's head");
    let epoch: i32 = row.try_get("epoch").map_err(&failed)?;
    let read = |column| row.try_get::<i64, _>(column).map_err(&failed);
    Ok(Head {
        at: log_position(epoch.into(), read("head")?)?,
        incarnation: Incarnation(read("incarnation")?.cast_unsigned()),
        token: LogToken(read("token")?.cast_unsigned()),
        round: RoundToken(read("round")?.cast_unsigned()),
    })
}

/// Reads the columns `store_id` and `incarnation`.
pub(super) fn provenance_of(row: Option<&PgRow>) -> Result<Provenance, StoreError> {
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

/// How far above the head an epoch may begin that a fail-over is the cause of. Two standbys that were promoted
/// from the same primary have the same timeline and would begin the same epoch: what differs is where. So an agent
/// of the one finds nothing of its own history in the other's log, and flushes, instead of going on in the middle.
/// It is drawn from so many that two logs of a million rows overlap once in ten thousand such accidents, and there
/// is room for two thousand fail-overs.
const BRANCH_LEAP: i64 = 1 << 34;

/// The head of the log, locked until the transaction ends.
pub(super) struct LockedHead {
    /// Where the log ends.
    pub(super) head: Head,
    /// The history that this position was given in, and the server's.
    noted: Lineage,
    server: Lineage,
    /// Whether that position was given here, and no copy of it was put here: by a dump, say.
    is_original: bool,
    /// The schema as it was when an epoch began last, or a round looked first.
    schema: NotedSchema,
    /// Whether so many rows wait that some may be merged.
    crowded: bool,
    /// The store's clock, read under the lock.
    pub(super) clock: Reading,
}

/// What the head knows of the schema (R3).
struct NotedSchema {
    /// `None` if nothing yet.
    fingerprint: Option<Vec<u8>>,
    /// Whether nothing in it lets changes go past the log, as far as was looked.
    is_intact: bool,
    /// Whether this transaction found another one, so that rows may have changed unseen.
    is_altered: bool,
}

/// Locks the head by writing it, which a demoted primary and a standby can't do (R7), and reads under this lock what
/// all else depends on.
pub(super) async fn lock_head(write: &mut Write) -> Result<LockedHead, StoreError> {
    // What SET computes, it computes from the row as it was.
    let lock = sqlx::query(
        "UPDATE ONLY log_head SET is_original = is_original AND xmin = written_by, written_by = pg_current_xact_id()::xid
         RETURNING epoch, head, incarnation, token, round, evictd_now() AS now,
                   timeline, system_identifier, database, is_original, schema_fingerprint, schema_intact,
                   left(pg_walfile_name(pg_current_wal_lsn()), 8) AS server_timeline,
                   (SELECT system_identifier FROM pg_control_system()) AS server_system_identifier,
                   (SELECT oid FROM pg_database WHERE datname = current_database()) AS server_database,
                   (SELECT count(*) > $1 FROM
                       (SELECT FROM ONLY invalidations WHERE position IS NULL LIMIT $1 + 1) AS waiting) AS crowded",
    );
    let asked = Instant::now();
    let row = write.row(lock.bind(MERGE_ABOVE)).await?.ok_or_else(no_head)?;
    let answered = Instant::now();
    let head = head_of(Some(&row))?;
    let read = || -> sqlx::Result<_> {
        let noted: (i64, i64, Oid) =
            (row.try_get("timeline")?, row.try_get("system_identifier")?, row.try_get("database")?);
        let server: (&str, i64, Oid) = (
            row.try_get("server_timeline")?,
            row.try_get("server_system_identifier")?,
            row.try_get("server_database")?,
        );
        let clock = Reading {
            store_time: StoreTime(row.try_get("now")?),
            read_by: answered,
            within: answered.duration_since(asked),
        };
        let schema = NotedSchema {
            fingerprint: row.try_get("schema_fingerprint")?,
            is_intact: row.try_get("schema_intact")?,
            is_altered: false,
        };
        Ok((noted, server, row.try_get("is_original")?, schema, row.try_get("crowded")?, clock))
    };
    let ((timeline, system, database), server, is_original, schema, crowded, clock) =
        read().map_err(failed("lock its log's head"))?;
    let corrupt = |_| StoreError::Corrupt { what: "timeline", value: timeline.to_string() };
    let noted = Lineage { timeline: u32::try_from(timeline).map_err(corrupt)?, system, database: database.0 };
    let server = Lineage::new(server.0, server.1, server.2.0)?;
    Ok(LockedHead { head, noted, server, is_original, schema, crowded, clock })
}

impl LockedHead {
    /// Looks whether the schema is the one that the head knows. One that it knows nothing of is taken as it is.
    pub(super) async fn compare_schema(&mut self, write: &mut Write) -> Result<(), StoreError> {
        let found = Some(schema::fingerprint(write).await?);
        if self.schema.fingerprint == found || !Protection::SchemaChangesBeginAnEpoch.holds() {
            return Ok(());
        }
        if self.schema.fingerprint.is_none() {
            let note = sqlx::query("UPDATE ONLY log_head SET schema_fingerprint = $1, schema_intact = false");
            write.run(note.bind(found.clone())).await?;
            self.schema = NotedSchema { fingerprint: found, is_intact: false, is_altered: false };
            return Ok(());
        }
        tracing::warn!(
            head = %self.head.at,
            "the home store's tables, triggers or functions were altered since the last round, so that rows may have \
             changed unseen. A new epoch begins, agents flush once"
        );
        self.schema.is_altered = true;
        Ok(())
    }

    /// What lets changes go past the log, if anything does. Costs nothing once nothing did.
    pub(super) async fn schema_fault(&mut self, write: &mut Write) -> Result<Option<String>, StoreError> {
        if self.schema.is_intact {
            return Ok(None);
        }
        if let Err(fault) = triggers::check_within(write).await? {
            return Ok(Some(fault.to_string()));
        }
        write.run(sqlx::query("UPDATE ONLY log_head SET schema_intact = true")).await?;
        self.schema.is_intact = true;
        Ok(None)
    }

    /// Begins a new epoch if the store may have gone back (R2): the server's history is another one than that of the
    /// head; or if rows may have changed unseen (R3). It lies above `seen_epoch`. Returns why it did.
    pub(super) async fn begin_epoch_if_due(
        &mut self,
        write: &mut Write,
        seen_epoch: u32,
    ) -> Result<Option<BeginCause>, StoreError> {
        if !self.is_branched() {
            if self.schema.is_altered {
                let evidence = "tables, triggers or functions were altered";
                self.set_epoch(write, seen_epoch, BeginCause::SchemaChanged, evidence).await?;
                return Ok(Some(BeginCause::SchemaChanged));
            }
            return Ok(None);
        }
        tracing::warn!(
            head = %self.head.at, before = %self.noted, now = %self.server, is_original = self.is_original,
            "the home store's server writes another history than before: a fail-over or a restore. \
             A new epoch begins, agents flush once"
        );
        let copied = if self.is_original { "" } else { ", copied by a dump or by logical replication" };
        let evidence = format!("{}{copied}", self.server);
        self.set_epoch(write, seen_epoch, BeginCause::Branched, &evidence).await?;
        Ok(Some(BeginCause::Branched))
    }

    /// Whether the head comes from another history than the one that is written here now.
    fn is_branched(&self) -> bool {
        !self.is_original || epochs::is_branched(&self.noted, &self.server)
    }

    /// Begins a new epoch whatever happened, on an operator's word.
    pub(super) async fn begin_epoch(&mut self, write: &mut Write, operator: &str) -> Result<(), StoreError> {
        let lost: i32 =
            write.value(sqlx::query("SELECT lost_epoch FROM ONLY log_head")).await?.unwrap_or_default();
        self.set_epoch(write, u32::try_from(lost).unwrap_or(0), BeginCause::Declared, operator).await
    }

    /// Notes an epoch that an agent has proved to have seen of another history.
    pub(super) async fn note_lost_epoch(&mut self, write: &mut Write, epoch: u32) -> Result<(), StoreError> {
        let note = sqlx::query("UPDATE ONLY log_head SET lost_epoch = $1 WHERE lost_epoch < $1");
        write.run(note.bind(i32::try_from(epoch).unwrap_or(i32::MAX))).await.map(drop)
    }

    /// Begins an incarnation and an epoch above `seen_epoch`. Positions go on from the head; if the server's history is
    /// another one, from somewhere above it. Whatever changed unseen before is covered by that, so the present schema is
    /// the one to compare with.
    async fn set_epoch(
        &mut self,
        write: &mut Write,
        seen_epoch: u32,
        cause: BeginCause,
        evidence: &str,
    ) -> Result<(), StoreError> {
        let leap = if self.is_branched() { BRANCH_LEAP } else { 0 };
        let epoch = epochs::next_epoch(self.server.timeline, self.head.at.epoch(), seen_epoch);
        LogPosition::new(epoch, self.head.at.position().saturating_add_signed(leap))
            .ok_or(StoreError::EpochsUsedUp)?;
        let after = self.head.at;
        let Lineage { timeline, system, database } = self.server;
        let fingerprint = schema::fingerprint(write).await?;
        let set = sqlx::query(
            "UPDATE ONLY log_head SET epoch = $1, roster_complete = false, timeline = $2, system_identifier = $3,
                                 database = $4, is_original = true, head = head + floor(random() * $5)::bigint,
                                 incarnation = $6, token = $7, schema_fingerprint = $8, schema_intact = false
             RETURNING epoch, head, incarnation, token, round",
        )
        .bind(epoch as i32)
        .bind(i64::from(timeline))
        .bind(system)
        .bind(Oid(database))
        .bind(leap as f64)
        .bind(draw()?.cast_signed())
        .bind(draw()?.cast_signed())
        .bind(fingerprint.clone());
        self.head = head_of(write.row(set).await?.as_ref())?;
        (self.noted, self.is_original) = (self.server, true);
        self.schema = NotedSchema { fingerprint: Some(fingerprint), is_intact: false, is_altered: false };
        append_history(write, after, cause, Some(evidence)).await
    }

    /// Begins an incarnation in the present epoch.
    pub(super) async fn begin_incarnation(&mut self, write: &mut Write) -> Result<(), StoreError> {
        let set = sqlx::query(
            "UPDATE ONLY log_head SET incarnation = $1 RETURNING epoch, head, incarnation, token, round",
        );
        self.head = head_of(write.row(set.bind(draw()?.cast_signed())).await?.as_ref())?;
        append_history(write, self.head.at, BeginCause::Opened, None).await
    }

    /// Draws the token of a round, which shows a copy of the store that works at the same time (R15).
    pub(super) async fn draw_round_token(&mut self, write: &mut Write) -> Result<(), StoreError> {
        let token = draw()?;
        let keep = sqlx::query(
            "WITH drawn AS (UPDATE ONLY log_head SET round = $1, rounds = rounds + 1 RETURNING rounds)
             INSERT INTO round_tokens (place, token) SELECT rounds % $2, $1 FROM drawn
             ON CONFLICT (place) DO UPDATE SET token = excluded.token",
        );
        write.run(keep.bind(token.cast_signed()).bind(i64::from(ROUND_TOKENS_KEPT))).await?;
        self.head.round = RoundToken(token);
        Ok(())
    }

    /// Gives waiting rows the positions after the head, in the order of their ids: all that were committed when
    /// the lock was had, because this statement's snapshot is younger than that (R1).
    pub(super) async fn number(self, write: &mut Write, limit: i64) -> Result<Numbered, StoreError> {
        if self.crowded {
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
        let numbered = log::number(self.head.at, &waiting).ok_or(StoreError::PositionsUsedUp)?;
        let Some((last, _)) = numbered.last() else {
            return Ok(Numbered { head: self.head, rows: Vec::new(), requests: Vec::new() });
        };
        let head = Head { at: *last, token: LogToken(draw()?), ..self.head };
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
}

/// The incarnation that the head names has begun, after the one that ended at `after`.
async fn append_history(
    write: &mut Write,
    after: LogPosition,
    cause: BeginCause,
    evidence: Option<&str>,
) -> Result<(), StoreError> {
    let append = sqlx::query(
        "INSERT INTO history (incarnation, after_epoch, after_position, epoch, position, token, cause, evidence)
         SELECT incarnation, $1, $2, epoch, head, token, $3, $4 FROM ONLY log_head",
    )
    .bind(after.epoch() as i32)
    .bind(after.position() as i64)
    .bind(cause.label())
    .bind(evidence.map(str::to_owned));
    write.run(append).await.map(drop)
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

/// The rows `from..=to` of `epoch`, as many from the first on as there are without a hole, at most `limit`.
/// Refused when that is none: `epoch` isn't the present one, `from` lies beyond the head, or its row was
/// purged.
pub(super) async fn replay(
    replays: &Lane,
    epoch: u32,
    from: u64,
    to: u64,
    limit: i64,
) -> Result<Replay, StoreError> {
    const ACTION: &str = "replay its log";
    let bound = |position: u64| i64::try_from(position).unwrap_or(i64::MAX);
    let Some(first) = LogPosition::new(epoch, from) else { return head(replays).await.map(refused) };
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
    let found = replays.rows(ACTION, ask).await?;
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

fn refused(head: Head) -> Replay {
    Replay::Refused { head }
}

/// All incarnations, and whose they are, in one snapshot.
pub(super) async fn history(log: &Lane) -> Result<History, StoreError> {
    const ACTION: &str = "read its history";
    let ask = || {
        sqlx::query(
            "SELECT store_id, history.incarnation, after_epoch::bigint, after_position, history.epoch::bigint, position,
                    cause, time, evidence
             FROM ONLY log_head, ONLY history ORDER BY place",
        )
    };
    let rows = log.rows(ACTION, ask).await?;
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

/// The key of the store's vouchers.
pub(super) async fn voucher_key(log: &Lane) -> Result<VoucherKey, StoreError> {
    const ACTION: &str = "read its voucher key";
    let row = log.row(ACTION, || sqlx::query("SELECT key FROM ONLY voucher_key")).await?;
    let key = row.as_ref().map(|row| row.try_get("key")).transpose().map_err(failed(ACTION))?;
    rows::voucher_key(key)
}

/// The token of the row at `at`, or of the incarnation that began there.
pub(super) async fn row_token(log: &Lane, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
    const ACTION: &str = "read the token of a row";
    let ask = || {
        sqlx::query(
            "SELECT coalesce((SELECT token FROM ONLY invalidations WHERE position = $2 AND epoch = $1),
                             (SELECT token FROM ONLY history WHERE position = $2 AND epoch = $1 LIMIT 1)) AS token",
        )
        .bind(at.epoch() as i32)
        .bind(at.position() as i64)
    };
    let row = log.row(ACTION, ask).await?;
    let token = row.map_or(Ok(None), |row| row.try_get::<Option<i64>, _>("token")).map_err(failed(ACTION))?;
    Ok(token.map(|token| LogToken(token.cast_unsigned())))
}

/// Whether one of the last rounds drew `token`.
pub(super) async fn has_round_token(log: &Lane, token: RoundToken) -> Result<bool, StoreError> {
    const ACTION: &str = "look for a round's token";
    let ask = || {
        sqlx::query("SELECT EXISTS (SELECT FROM ONLY round_tokens WHERE token = $1) AS has")
            .bind(token.0.cast_signed())
    };
    log.row(ACTION, ask).await?.map_or(Ok(false), |row| row.try_get("has")).map_err(failed(ACTION))
}

/// What waits for a position.
pub(super) async fn backlog(log: &Lane) -> Result<Backlog, StoreError> {
    const ACTION: &str = "count unnumbered rows";
    let count = || {
        sqlx::query(
            "SELECT count(*) AS rows, coalesce(evictd_now() - min(committed_at), 0) AS age
             FROM ONLY invalidations WHERE position IS NULL",
        )
    };
    let row = log.row(ACTION, count).await?;
    let read = |column| -> Result<u64, StoreError> {
        let number = row.as_ref().map_or(Ok(0), |row| row.try_get::<i64, _>(column));
        Ok(u64::try_from(number.map_err(failed(ACTION))?).unwrap_or(0))
    };
    Ok(Backlog { rows: read("rows")?, oldest: Duration::from_micros(read("age")?) })
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
