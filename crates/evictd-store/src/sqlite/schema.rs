//! Whether the schema is still the one that it was (R3).
//!
//! Triggers write the log, and whoever may write to the file can go past them: drop one, delete a row, create it again;
//! rename a table and put another one in its place. SQLite counts each such statement in `PRAGMA schema_version`. So each
//! round compares it with what `log_head` holds. Where it is another one, any row may have changed unseen: an epoch
//! begins, and agents flush.
//!
//! A single step from a schema that was as it should be to one that is so as well is none of that: what goes past a trigger
//! takes one step to remove it, and one to put it back. It is a VACUUM, a first ANALYZE, or an index.
//!
//! Out of reach is what says nothing: `PRAGMA writable_schema`, and a version that was set by hand.

use std::collections::{BTreeMap, HashMap};

use evictd_core::protection::Protection;
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::write::{Write, failed};
use crate::error::StoreError;

/// All triggers, by name, with their tables and texts.
const TRIGGERS: &str = "SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'";

/// Tables on which nothing but evictd's triggers may be: another one could keep rows out.
const LOG: [&str; 2] = ["log_head", "invalidations"];

/// Triggers by name, with their texts.
pub(super) type Triggers = BTreeMap<String, String>;

/// Those of a database as the migrations make it.
pub(super) async fn intended(scratch: &mut SqliteConnection) -> Result<Triggers, StoreError> {
    let rows = sqlx::query(TRIGGERS).fetch_all(scratch).await.map_err(failed(ACTION))?;
    rows.iter()
        .map(|row| Ok((row.try_get("name")?, row.try_get("sql")?)))
        .collect::<sqlx::Result<_>>()
        .map_err(failed(ACTION))
}

/// Compares the database's with the intended ones.
pub(super) async fn check(reader: &mut SqliteConnection, intended: &Triggers) -> Result<(), StoreError> {
    let rows = sqlx::query(TRIGGERS).fetch_all(reader).await.map_err(failed(ACTION))?;
    judge(&rows, intended)
}

const ACTION: &str = "read its triggers";

fn judge(rows: &[SqliteRow], intended: &Triggers) -> Result<(), StoreError> {
    let mut found = HashMap::new();
    for row in rows {
        let read = || Ok((row.try_get("name")?, row.try_get("tbl_name")?, row.try_get("sql")?));
        let (name, table, text): (&str, &str, &str) = read().map_err(failed(ACTION))?;
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

/// What a round finds.
pub(super) struct Look {
    /// Whether rows may have changed unseen since the last one.
    pub(super) changed: bool,
    /// What lets changes go past the log at present, if anything does.
    pub(super) fault: Option<String>,
}

/// Looks whether the schema is the one that the head knows. One that it knows nothing of is taken as it is.
pub(super) async fn compare(write: &mut Write, intended: &Triggers) -> Result<Look, StoreError> {
    let fault = match judge(&write.rows(sqlx::query(TRIGGERS)).await?, intended) {
        Ok(()) => None,
        Err(fault) => Some(fault.to_string()),
    };
    let known = "SELECT log_head.schema_version AS noted, schema_intact, now.schema_version AS found
                 FROM log_head, pragma_schema_version AS now";
    let row = write.row(sqlx::query(known)).await?;
    let read =
        |row: SqliteRow| Ok((row.try_get("noted")?, row.try_get("schema_intact")?, row.try_get("found")?));
    let known: Option<(Option<i64>, bool, i64)> =
        row.map(read).transpose().map_err(failed("look at its schema"))?;
    let Some((noted, was_intact, found)) = known else { return Ok(Look { changed: false, fault }) };
    let is_intact = fault.is_none();
    if noted == Some(found) && was_intact == is_intact {
        return Ok(Look { changed: false, fault });
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
            "the home store's tables or triggers were altered since the last round, so that rows may have changed \
             unseen. A new epoch begins, agents flush once"
        );
    }
    Ok(Look { changed, fault })
}

/// Whether the schema that is about to be migrated is the one that rounds know, or none knows any.
pub(super) async fn is_known(connection: &mut SqliteConnection) -> sqlx::Result<bool> {
    let column = "SELECT count(*) > 0 FROM pragma_table_info('log_head') WHERE name = 'schema_version'";
    if !sqlx::query_scalar(column).fetch_one(&mut *connection).await? {
        return Ok(true);
    }
    let known = "SELECT coalesce(log_head.schema_version = now.schema_version, true)
                 FROM log_head, pragma_schema_version AS now";
    sqlx::query_scalar(known).fetch_one(connection).await
}

/// What a migration made is what rounds know from now on.
pub(super) async fn note(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    let note = "UPDATE log_head SET schema_version = now.schema_version FROM pragma_schema_version AS now
                WHERE log_head.schema_version IS NOT now.schema_version";
    sqlx::query(note).execute(connection).await.map(drop)
}
