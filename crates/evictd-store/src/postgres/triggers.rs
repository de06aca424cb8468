//! Checks that the triggers and functions that write the log are in place and unaltered (R3).
//!
//! The intended ones are those of the migrations, which are part of this program. A copy in the database could be altered
//! with them. The migrations write triggers as `pg_get_triggerdef` does, in one line, and PostgreSQL keeps function bodies
//! to the letter. So both compare as text.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use sqlx::postgres::PgRow;

use super::lanes::{Lane, Statement};
use super::migrations::MIGRATIONS;
use super::write::PostgresWrite;
use crate::error::StoreError;
use crate::rows::Columns;

/// The definitions of triggers and the bodies of functions by name, from the last migration that has them.
static INTENDED: LazyLock<BTreeMap<&str, &str>> =
    LazyLock::new(|| MIGRATIONS.iter().flat_map(|migration| intended(migration.sql.as_str())).collect());

fn intended(migration: &str) -> impl Iterator<Item = (&str, &str)> {
    let triggers = migration.lines().filter_map(|line| {
        let name = line.strip_prefix("CREATE TRIGGER ")?.split(' ').next()?;
        Some((name, line.trim_end_matches(';')))
    });
    let functions = migration.split("\nCREATE ").skip(1).filter_map(|function| {
        let function = function.trim_start_matches("OR REPLACE ").strip_prefix("FUNCTION ")?;
        let (head, rest) = function.split_once("$$")?;
        let (body, _) = rest.split_once("$$")?;
        Some((head.split('(').next()?, body))
    });
    triggers.chain(functions.filter(|(name, _)| *name != "evictd_now"))
}

/// Compares the database's triggers and functions with the intended ones.
///
/// * Triggers must be enabled always.
/// * Functions must have a fixed search path, and those of triggers must run with their owner's rights.
/// * Nothing may interfere: no other trigger on the log, no rule, and no child table, whose rows the parent's triggers
///   don't see.
pub(super) async fn check(log: &Lane) -> Result<(), StoreError> {
    judge(&log.rows("read its triggers", read).await?)
}

/// The same in a transaction. The inner error is what the check found.
pub(super) async fn check_within(write: &mut PostgresWrite) -> Result<Result<(), StoreError>, StoreError> {
    let rows = write.rows(read()).await?;
    match judge(&rows) {
        Err(error @ (StoreError::TriggerMissing { .. } | StoreError::ForeignObject { .. })) => Ok(Err(error)),
        outcome => outcome.map(Ok),
    }
}

fn read() -> Statement {
    sqlx::query(
        "WITH head AS (
             SELECT n.oid, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.oid = to_regclass('log_head')
         ), ours AS (
             SELECT c.oid, c.relname FROM pg_class c JOIN head ON c.relnamespace = head.oid
             WHERE c.relname IN ('workspaces', 'root_keys', 'apis', 'keys', 'log_head', 'invalidations')
         )
         SELECT t.tgname::text AS name, pg_get_triggerdef(t.oid, true) AS text, t.tgenabled = 'A' AS in_force,
                CASE WHEN c.relname IN ('log_head', 'invalidations')
                     THEN format('DROP TRIGGER %I ON %s', t.tgname, c.oid::regclass) END AS remedy
         FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN head ON c.relnamespace = head.oid
         WHERE NOT t.tgisinternal
         UNION ALL
         SELECT p.proname::text, p.prosrc,
                coalesce(p.proconfig = ARRAY [format('search_path=%I, pg_temp', head.nspname)], false)
                AND p.prosecdef = (p.prorettype = 'trigger'::regtype), NULL
         FROM pg_proc p JOIN head ON p.pronamespace = head.oid
         UNION ALL
         SELECT 'rule ' || r.rulename, '', false, format('DROP RULE %I ON %s', r.rulename, ours.oid::regclass)
         FROM pg_rewrite r JOIN ours ON ours.oid = r.ev_class
         UNION ALL
         SELECT 'child table ' || c.relname, '', false,
                format('ALTER TABLE %s NO INHERIT %s', c.oid::regclass, ours.oid::regclass)
         FROM pg_inherits i JOIN ours ON ours.oid = i.inhparent JOIN pg_class c ON c.oid = i.inhrelid",
    )
}

fn judge(rows: &[PgRow]) -> Result<(), StoreError> {
    let mut found = BTreeMap::new();
    for row in rows {
        let name = row.text("name")?;
        if let Some(remedy) = row.optional_string("remedy")? {
            return Err(StoreError::ForeignObject { name: name.to_owned(), remedy });
        }
        if row.flag("in_force")? {
            found.insert(name, row.text("text")?);
        }
    }
    match INTENDED.iter().find(|(name, text)| found.get(*name) != Some(*text)) {
        Some((name, _)) => Err(StoreError::TriggerMissing { name: (*name).to_owned() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intended_triggers_are_those_of_the_migrations() {
        let tables = ["apis", "keys", "root_keys", "workspaces"];
        let mut names: Vec<_> = tables.iter().map(|table| format!("{table}_changed")).collect();
        names.extend(tables.iter().map(|table| format!("{table}_truncated")));
        names.extend(tables.iter().map(|table| format!("evictd_{table}_changed")));
        names.extend(["evictd_log", "evictd_truncated"].map(str::to_owned));
        names.sort_unstable();
        assert_eq!(INTENDED.keys().copied().collect::<Vec<_>>(), names);
        assert!(INTENDED["keys_changed"].ends_with("FOR EACH ROW EXECUTE FUNCTION evictd_keys_changed()"));
        assert!(INTENDED["evictd_log"].contains("INSERT INTO invalidations"));
        assert!(INTENDED["evictd_log"].contains("IF NOT FOUND"), "not the first migration's");
    }
}
