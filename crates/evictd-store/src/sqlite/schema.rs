//! Detects changes of the schema (R3).
//!
//! Triggers write the log, and a user who may write to the file can bypass them: drop a trigger, delete a row, create the
//! trigger again; or rename a table and put another one in its place. SQLite counts each such statement in
//! `PRAGMA schema_version`, and each round compares it with the one in `log_head`. If they differ, any row may have
//! changed unseen: an epoch begins, and agents flush.
//!
//! One step between two intact schemas is harmless, because bypassing a trigger takes two: one to remove it, one to put
//! it back. Such a step is a VACUUM, a first ANALYZE, or an index.
//!
//! Not detected: `PRAGMA writable_schema`, and a schema version that was set by hand.

use std::collections::{BTreeMap, HashMap};

use evictd_core::protection::Protection;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::write::{SqliteWrite, failed};
use crate::error::StoreError;
use crate::rows::Columns;

const READ_TRIGGERS: &str = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'";
const ACTION: &str = "read its triggers";

/// Tables with no other triggers than evictd's: another one could keep rows out.
const LOG: [&str; 2] = ["log_head", "invalidations"];

/// The texts of triggers by name.
pub(super) type Triggers = BTreeMap<String, String>;

/// Returns the triggers of a database that the migrations have just made.
pub(super) async fn intended(scratch: &mut SqliteConnection) -> Result<Triggers, StoreError> {
    let rows = sqlx::query(READ_TRIGGERS).fetch_all(scratch).await.map_err(failed(ACTION))?;
    rows.iter().map(|row| Ok((row.string("name")?, row.string("sql")?))).collect()
}

/// Compares the database's triggers with the intended ones.
pub(super) async fn check(reader: &mut SqliteConnection, intended: &Triggers) -> Result<(), StoreError> {
    let rows = sqlx::query(READ_TRIGGERS).fetch_all(reader).await.map_err(failed(ACTION))?;
    judge(&rows, intended)
}

fn judge(rows: &[SqliteRow], intended: &Triggers) -> Result<(), StoreError> {
    let mut found = HashMap::new();
    for row in rows {
        let (name, table, text) = (row.text("name")?, row.text("tbl_name")?, row.text("sql")?);
        if LOG.iter().any(|log| table.eq_ignore_ascii_case(log)) && !intended.contains_key(name) {
            let remedy = format!("DROP TRIGGER \"{}\"", name.replace('"', "\"\""));
            return Err(StoreError::ForeignObject { name: name.to_owned(), remedy });
        }
        found.insert(name, text);
    }
    let missing = intended.iter().filter(|(name, text)| found.get(name.as_str()) != Some(&text.as_str()));
    let missing: Vec<&str> = missing.map(|(name, _)| name.as_str()).collect();
    if missing.is_empty() { Ok(()) } else { Err(StoreError::TriggerMissing { name: missing.join(", ") }) }
}

pub(super) struct SchemaCheck {
    /// Whether rows may have changed unseen since the last round.
    pub(super) changed: bool,
    /// Why changes may miss the log at present; `None` if none can.
    pub(super) fault: Option<String>,
}

/// Compares the schema with the one that the head holds, and notes it there. If the head holds none, the schema is taken
/// as it is.
pub(super) async fn compare(write: &mut SqliteWrite, intended: &Triggers) -> Result<SchemaCheck, StoreError> {
    let fault = judge(&write.rows(sqlx::query(READ_TRIGGERS)).await?, intended).err();
    let (is_intact, fault) = (fault.is_none(), fault.map(|fault| fault.to_string()));
    let noted = "SELECT log_head.schema_version AS noted, schema_intact, now.schema_version AS found
                 FROM log_head, pragma_schema_version AS now";
    let Some(row) = write.row(sqlx::query(noted)).await? else {
        return Ok(SchemaCheck { changed: false, fault });
    };
    let (noted, was_intact, found) =
        (row.optional_integer("noted")?, row.flag("schema_intact")?, row.integer("found")?);
    if noted == Some(found) && was_intact == is_intact {
        return Ok(SchemaCheck { changed: false, fault });
    }
    let harmless =
        noted.is_none_or(|noted| was_intact && (noted == found || is_intact && found == noted + 1));
    let note = sqlx::query("UPDATE log_head SET schema_version = ?1, schema_intact = ?2");
    write.run(note.bind(found).bind(is_intact)).await?;
    let changed = !harmless && Protection::SchemaChangesBeginAnEpoch.holds();
    if changed {
        tracing::warn!(
            noted,
            found,
            "tables or triggers were altered since the last round, so rows may have changed unseen; \
             beginning an epoch, agents flush once"
        );
    }
    Ok(SchemaCheck { changed, fault })
}

/// Whether the schema before a migration is the one that rounds noted. True if they noted none.
pub(super) async fn is_known(connection: &mut SqliteConnection) -> sqlx::Result<bool> {
    let column = "SELECT count(*) > 0 FROM pragma_table_info('log_head') WHERE name = 'schema_version'";
    if !sqlx::query_scalar(column).fetch_one(&mut *connection).await? {
        return Ok(true);
    }
    let known = "SELECT coalesce(log_head.schema_version = now.schema_version, true)
                 FROM log_head, pragma_schema_version AS now";
    sqlx::query_scalar(known).fetch_one(connection).await
}

/// Notes the schema that a migration made.
pub(super) async fn note(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    let note = "UPDATE log_head SET schema_version = now.schema_version FROM pragma_schema_version AS now
                WHERE log_head.schema_version IS NOT now.schema_version";
    sqlx::query(note).execute(connection).await.map(drop)
}
