//! Whether what feeds the log is in place and unaltered (R3).
//!
//! What is intended stands in the migrations, which are part of this program: a copy of it in the database could be
//! altered along with what it should vouch for, or be taken from a database that was altered already. Triggers are
//! written there as PostgreSQL itself tells them (`pg_get_triggerdef`), in one line; function bodies are kept by
//! PostgreSQL to the letter. So both compare as text.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::MIGRATIONS;
use super::connections::{Lane, Statement, failed};
use super::write::Write;
use crate::error::StoreError;

/// Triggers by name, with their definitions; functions by name, with their bodies, as the last migration has them.
static INTENDED: LazyLock<BTreeMap<&str, &str>> =
    LazyLock::new(|| MIGRATIONS.iter().flat_map(|migration| intended(migration.sql.as_str())).collect());

/// Reads a migration.
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

const ACTION: &str = "read its triggers";

/// Compares the database's with the intended ones. Triggers must be enabled always; functions must be found by
/// nobody else's search path, and a trigger's must act with the rights of its owner. And nothing may stand in their way:
/// a trigger of somebody else's on the log, a rule, a child table whose rows no trigger of its parent sees.
pub(super) async fn check(log: &Lane) -> Result<(), StoreError> {
    judge(&log.rows(ACTION, look).await?)
}

/// The same in a transaction. What is found wrong is the inner error.
pub(super) async fn check_within(write: &mut Write) -> Result<Result<(), StoreError>, StoreError> {
    let rows = write.rows(look()).await?;
    match judge(&rows) {
        Err(error @ (StoreError::TriggerMissing { .. } | StoreError::ForeignObject { .. })) => Ok(Err(error)),
        outcome => outcome.map(Ok),
    }
}

fn look() -> Statement {
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
                p.proconfig = ARRAY [format('search_path=%I, pg_temp', head.nspname)]
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
        let read = || -> sqlx::Result<(&str, &str, Option<bool>, Option<&str>)> {
            Ok((row.try_get("name")?, row.try_get("text")?, row.try_get("in_force")?, row.try_get("remedy")?))
        };
        let (name, text, in_force, remedy) = read().map_err(failed(ACTION))?;
        if let Some(remedy) = remedy {
            return Err(StoreError::ForeignObject { name: name.to_owned(), remedy: remedy.to_owned() });
        }
        if in_force == Some(true) {
            found.insert(name, text);
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
    fn the_migrations_say_what_is_intended() {
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
