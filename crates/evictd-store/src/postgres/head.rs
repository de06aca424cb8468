//! The head of the log, and the lock on it: epochs, incarnations and round tokens.

use std::time::Instant;

use evictd_core::epochs;
use evictd_core::history::{BeginCause, RoundToken};
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use sqlx::Row;
use sqlx::postgres::types::Oid;

use super::errors::failed;
use super::lineage::Lineage;
use super::write::PostgresWrite;
use super::{schema, triggers};
use crate::error::StoreError;
use crate::history::{ROUND_TOKENS_KEPT, draw};
use crate::log::{ClockReading, Head};
use crate::log_rows::{self, MERGE_ABOVE, no_head};
use crate::rows::Columns;

/// How far above the head an epoch after a fail-over may begin. Two standbys promoted from the same primary have the same
/// timeline and would begin the same epoch, so they begin it at different positions. An agent of the one then finds nothing
/// of its history in the other's log, and flushes. The range is so large that two logs of a million rows overlap in one of
/// ten thousand such accidents, and leaves room for two thousand fail-overs.
const BRANCH_LEAP: i64 = 1 << 34;

/// The head of the log, locked until the transaction ends.
pub(super) struct LockedHead {
    pub(super) head: Head,
    /// The history in which the head's position was given.
    noted: Lineage,
    /// The history that the server writes.
    server: Lineage,
    /// Whether the head was written here, and isn't a copy, for example from a dump.
    is_original: bool,
    /// The schema when the last epoch began, or at the first round.
    schema: NotedSchema,
    /// Whether more than [`MERGE_ABOVE`] rows wait for positions.
    pub(super) has_many_waiting: bool,
    /// The store's clock, read under the lock.
    pub(super) clock: ClockReading,
}

/// What the head holds about the schema (R3).
struct NotedSchema {
    /// `None` before the first round.
    fingerprint: Option<Vec<u8>>,
    /// Whether a check has found that no change can miss the log.
    is_intact: bool,
    /// Whether this transaction found another schema, so that rows may have changed unseen.
    is_altered: bool,
}

/// Locks the head by writing it, which a demoted primary and a standby can't do (R7), and reads it under this lock.
pub(super) async fn lock_head(write: &mut PostgresWrite) -> Result<LockedHead, StoreError> {
    // SET computes from the row as it was before.
    let lock = sqlx::query(
        "UPDATE ONLY log_head SET is_original = is_original AND xmin = written_by, written_by = pg_current_xact_id()::xid
         RETURNING epoch, head, incarnation, token, round, evictd_now() AS now,
                   timeline, system_identifier, database, is_original, schema_fingerprint, schema_intact,
                   left(pg_walfile_name(pg_current_wal_lsn()), 8) AS server_timeline,
                   (SELECT system_identifier FROM pg_control_system()) AS server_system_identifier,
                   (SELECT oid FROM pg_database WHERE datname = current_database()) AS server_database,
                   (SELECT count(*) > $1 FROM
                       (SELECT FROM ONLY invalidations WHERE position IS NULL LIMIT $1 + 1) AS waiting) AS has_many_waiting",
    );
    let before = Instant::now();
    let row = write.row(lock.bind(MERGE_ABOVE)).await?.ok_or_else(no_head)?;
    let read_by = Instant::now();
    let oid = |name| row.try_get::<Oid, _>(name).map(|oid| oid.0).map_err(failed("lock its log's head"));
    let timeline = row.integer("timeline")?;
    let corrupt = |_| StoreError::Corrupt { what: "timeline", value: timeline.to_string() };
    Ok(LockedHead {
        head: log_rows::head(Some(&row))?,
        noted: Lineage {
            timeline: u32::try_from(timeline).map_err(corrupt)?,
            system: row.integer("system_identifier")?,
            database: oid("database")?,
        },
        server: Lineage::new(
            row.text("server_timeline")?,
            row.integer("server_system_identifier")?,
            oid("server_database")?,
        )?,
        is_original: row.flag("is_original")?,
        schema: NotedSchema {
            fingerprint: row.optional_bytes("schema_fingerprint")?.map(<[u8]>::to_vec),
            is_intact: row.flag("schema_intact")?,
            is_altered: false,
        },
        has_many_waiting: row.flag("has_many_waiting")?,
        clock: ClockReading { store_time: row.time("now")?, read_by, within: read_by.duration_since(before) },
    })
}

impl LockedHead {
    /// Compares the schema with the one that the head holds. If the head holds none, the schema is taken as it is.
    pub(super) async fn compare_schema(&mut self, write: &mut PostgresWrite) -> Result<(), StoreError> {
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
            "tables, triggers or functions were altered since the last round, so rows may have changed unseen; \
             beginning an epoch, agents flush once"
        );
        self.schema.is_altered = true;
        Ok(())
    }

    /// Returns why changes may miss the log; `None` if none can. Costs nothing once a check has found no fault.
    pub(super) async fn schema_fault(
        &mut self,
        write: &mut PostgresWrite,
    ) -> Result<Option<String>, StoreError> {
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

    /// Begins an epoch if the store may have gone back (R2), because the server's history isn't the head's, or if rows may
    /// have changed unseen (R3). The epoch lies above `seen_epoch`. Returns why it began.
    pub(super) async fn begin_epoch_if_due(
        &mut self,
        write: &mut PostgresWrite,
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
            "the server writes another history than before, after a fail-over or a restore; \
             beginning an epoch, agents flush once"
        );
        let copied = if self.is_original { "" } else { ", copied by a dump or by logical replication" };
        let evidence = format!("{}{copied}", self.server);
        self.set_epoch(write, seen_epoch, BeginCause::Branched, &evidence).await?;
        Ok(Some(BeginCause::Branched))
    }

    /// Whether the head is of another history than the one that the server writes.
    fn is_branched(&self) -> bool {
        !self.is_original || epochs::is_branched(&self.noted, &self.server)
    }

    /// Begins an epoch that an operator declares.
    pub(super) async fn begin_epoch(
        &mut self,
        write: &mut PostgresWrite,
        operator: &str,
    ) -> Result<(), StoreError> {
        let lost: i32 =
            write.value(sqlx::query("SELECT lost_epoch FROM ONLY log_head")).await?.unwrap_or_default();
        self.set_epoch(write, u32::try_from(lost).unwrap_or(0), BeginCause::Declared, operator).await
    }

    /// Notes an epoch of another history that an agent has proved to have seen.
    pub(super) async fn note_lost_epoch(
        &self,
        write: &mut PostgresWrite,
        epoch: u32,
    ) -> Result<(), StoreError> {
        let note = sqlx::query("UPDATE ONLY log_head SET lost_epoch = $1 WHERE lost_epoch < $1");
        write.run(note.bind(i32::try_from(epoch).unwrap_or(i32::MAX))).await.map(drop)
    }

    /// Begins an incarnation and an epoch above `seen_epoch`. Positions go on from the head, or from somewhere above it if
    /// the server's history is another one. The epoch covers whatever changed unseen before, so later rounds compare with
    /// the present schema.
    async fn set_epoch(
        &mut self,
        write: &mut PostgresWrite,
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
        self.head = log_rows::head(write.row(set).await?.as_ref())?;
        (self.noted, self.is_original) = (self.server, true);
        self.schema = NotedSchema { fingerprint: Some(fingerprint), is_intact: false, is_altered: false };
        append_history(write, after, cause, Some(evidence)).await
    }

    /// Begins an incarnation in the present epoch.
    pub(super) async fn begin_incarnation(
        &mut self,
        write: &mut PostgresWrite,
        cause: BeginCause,
        evidence: Option<&str>,
    ) -> Result<(), StoreError> {
        let set = sqlx::query(
            "UPDATE ONLY log_head SET incarnation = $1 RETURNING epoch, head, incarnation, token, round",
        );
        self.head = log_rows::head(write.row(set.bind(draw()?.cast_signed())).await?.as_ref())?;
        append_history(write, self.head.at, cause, evidence).await
    }

    /// Draws the token of a round. It shows whether a copy of the store works at the same time (R15).
    pub(super) async fn draw_round_token(&mut self, write: &mut PostgresWrite) -> Result<(), StoreError> {
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

/// Appends the head's incarnation to the history. The one before ended at `after`.
async fn append_history(
    write: &mut PostgresWrite,
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
