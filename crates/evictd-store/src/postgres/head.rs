//! The head of the log, and the lock on it: what begins epochs and incarnations, and what rounds draw.

use std::time::Instant;

use evictd_core::epochs;
use evictd_core::history::{BeginCause, Incarnation, LogToken, Provenance, RoundToken, StoreId};
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::postgres::types::Oid;

use super::connections::failed;
use super::lineage::Lineage;
use super::write::Write;
use super::{schema, triggers};
use crate::error::StoreError;
use crate::history::{ROUND_TOKENS_KEPT, draw};
use crate::log::{ClockReading, Head};
use crate::rows::{MERGE_ABOVE, log_position};

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

pub(super) fn no_head() -> StoreError {
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
    pub(super) crowded: bool,
    /// The store's clock, read under the lock.
    pub(super) clock: ClockReading,
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
        let clock = ClockReading {
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
