//! Direct access to the home store, and its invariants after any failure.
//!
//! The log has every committed change exactly once, in dense positions, and nothing else. So has the audit log. Each
//! deletion has its receipt.
//!
//! The checks take a function that runs one statement and returns the first value of its result as text, or an empty
//! string. [`HomeStoreAddress::read`] is one that can't write; tests that also change the store have their own.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use toml::Table;

use crate::sql::Session;
use crate::wait::try_eventually;

/// Where the home store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HomeStoreAddress {
    /// In this file.
    Sqlite(PathBuf),
    /// In the database at this URL.
    Postgres(String),
}

impl HomeStoreAddress {
    /// Returns the store of the publisher with this configuration file.
    pub fn of(config: &Path) -> Result<Self> {
        let text = fs::read_to_string(config).with_context(|| format!("reading {}", config.display()))?;
        let config: Table = text.parse()?;
        let store = |key: &str| config.get("store")?.get(key)?.as_str();
        match (store("path"), store("url")) {
            (Some(path), _) => Ok(Self::Sqlite(path.into())),
            (None, Some(url)) => Ok(Self::Postgres(url.to_owned())),
            (None, None) => bail!("the configuration names no store"),
        }
    }

    /// Returns the first value of a statement's result as text, or an empty string. The statement can't write.
    pub fn read(&self, statement: &str) -> Result<String> {
        const SCRIPT: &str = "import sqlite3, sys\n\
            store = sqlite3.connect(sys.argv[1], timeout=20)\n\
            store.execute('PRAGMA query_only = ON')\n\
            row = store.execute(sys.argv[2]).fetchone()\n\
            print('' if row is None else row[0])";
        match self {
            Self::Postgres(url) => {
                let mut session = Session::connect(url)?;
                session.query("SET default_transaction_read_only = on")?;
                session.query(statement)
            }
            Self::Sqlite(path) => python(SCRIPT, path, statement),
        }
    }
}

/// Returns the paths of an SQLite store's files, of which only the first must exist.
fn sqlite_files(store: &Path) -> [PathBuf; 3] {
    ["", "-wal", "-shm"].map(|suffix| PathBuf::from(format!("{}{suffix}", store.display())))
}

/// A copy of an SQLite store's files, like a storage snapshot.
pub struct SqliteBackup([Option<Vec<u8>>; 3]);

impl SqliteBackup {
    /// Copies the store while no process writes to it.
    pub fn take(store: &Path) -> Result<Self> {
        let copy = |path: PathBuf| match fs::read(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("copying {}", path.display()))
            }
            read => Ok(read.ok()),
        };
        let [file, log, shared] = sqlite_files(store).map(copy);
        let backup = Self([file?, log?, shared?]);
        ensure!(backup.0[0].is_some(), "there is no store {}", store.display());
        Ok(backup)
    }

    /// Overwrites `store` with it, including the write-ahead log: the current one would replay what must be undone.
    pub fn put(&self, store: &Path) -> Result<()> {
        for (path, bytes) in sqlite_files(store).iter().zip(&self.0) {
            let done = match bytes {
                Some(bytes) => fs::write(path, bytes),
                None if path.exists() => fs::remove_file(path),
                None => Ok(()),
            };
            done.with_context(|| format!("restoring {}", path.display()))?;
        }
        Ok(())
    }
}

/// Runs `script` with the SQLite file `store` and one more argument, and returns what it prints. Python shares no code
/// with the publisher.
fn python(script: &str, store: &Path, argument: &str) -> Result<String> {
    let output = Command::new("python3").args(["-c", script]).arg(store).arg(argument).output();
    let output = output.context("running python3")?;
    ensure!(output.status.success(), "{argument}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// The name of a flaw, and the statement that counts it.
type LogFlaw = (&'static str, &'static str);

/// Flaws of any log.
const OF_ANY_LOG: [LogFlaw; 9] = [
    ("rows without a position", "SELECT count(*) FROM invalidations WHERE position IS NULL"),
    (
        // Each epoch has its own first position.
        "positions without a row",
        "SELECT count(*) FROM (SELECT max(position) - min(position) + 1 - count(*) AS holes FROM invalidations
            GROUP BY epoch) AS epochs WHERE holes <> 0",
    ),
    ("positions before the first row", "SELECT min(position) - 1 FROM invalidations"),
    ("positions after the last row", "SELECT head - (SELECT max(position) FROM invalidations) FROM log_head"),
    (
        "deleted keys without exactly one row",
        "SELECT count(*) FROM keys LEFT JOIN (SELECT key_id, count(*) AS n FROM invalidations
            WHERE cause = 'deleted' AND scope = 'key' GROUP BY key_id) AS logged ON key_id = id
         WHERE deleted_at_m IS NOT NULL AND coalesce(n, 0) <> 1",
    ),
    (
        "rows of keys that aren't deleted",
        "SELECT count(*) FROM invalidations JOIN keys ON keys.id = key_id
         WHERE cause = 'deleted' AND scope = 'key' AND deleted_at_m IS NULL",
    ),
    (
        "deletions without exactly one audit record",
        "SELECT count(*) FROM invalidations LEFT JOIN (SELECT correlation_id, count(*) AS n FROM audit_log
            WHERE event IN ('key.delete', 'api.delete') GROUP BY correlation_id) AS audited
            ON correlation_id = request_id
         WHERE cause = 'deleted' AND request_id IS NOT NULL AND coalesce(n, 0) <> 1",
    ),
    (
        "keys deleted past the API without exactly one audit record",
        "SELECT abs((SELECT count(*) FROM audit_log WHERE actor_type = 'database' AND event = 'key.delete')
                  - (SELECT count(*) FROM invalidations WHERE request_id IS NULL AND scope = 'key'
                     AND cause IN ('deleted', 'erased')))",
    ),
    (
        "audit records without a change",
        "SELECT count(*) FROM audit_log WHERE event IN ('key.delete', 'api.delete') AND actor_type <> 'database'
         AND NOT EXISTS (SELECT 1 FROM invalidations WHERE request_id = correlation_id)",
    ),
];

/// Flaws of a log where each request makes one change, only requests make changes, and the store was never restored
/// from a copy.
const OF_A_PLAIN_LOG: [LogFlaw; 4] = [
    (
        "deletions that no request asked for",
        "SELECT count(*) FROM invalidations WHERE cause = 'deleted' AND request_id IS NULL",
    ),
    (
        "requests with more than one row",
        "SELECT count(*) FROM (SELECT request_id FROM invalidations WHERE request_id IS NOT NULL
            GROUP BY request_id HAVING count(*) > 1) AS requests",
    ),
    (
        "rows of a later epoch",
        "SELECT count(*) FROM invalidations WHERE epoch > (SELECT min(epoch) FROM invalidations)",
    ),
    (
        "deletions whose receipt doesn't have their position",
        "SELECT count(*) FROM invalidations LEFT JOIN receipts ON receipts.request_id = invalidations.request_id
         WHERE cause = 'deleted'
           AND (receipts.position IS NULL OR receipts.position <> invalidations.position
                OR receipts.epoch <> invalidations.epoch)",
    ),
];

/// Checks all flaws in one statement, so that all are seen at the same moment.
fn ensure_none(flaws: &[LogFlaw], sql: impl Fn(&str) -> Result<String>) -> Result<()> {
    let each = flaws.iter().enumerate().map(|(place, (what, count))| {
        let what = what.replace('\'', "''");
        format!("SELECT {place} AS place, '{what}' AS what, coalesce(({count}), -1) AS found")
    });
    let all = each.collect::<Vec<_>>().join(" UNION ALL ");
    let first = sql(&format!(
        "SELECT what || ': ' || found FROM ({all}) AS flaws WHERE found <> 0 ORDER BY place LIMIT 1"
    ))?;
    ensure!(first.is_empty(), "{first}");
    Ok(())
}

/// Checks that the log holds every committed change exactly once, in dense positions, and nothing else, and that the
/// audit log does as well. Every committed row must already have its position.
pub fn check_log(sql: impl Fn(&str) -> Result<String>) -> Result<()> {
    ensure_none(&OF_ANY_LOG, sql)
}

/// As [`check_log`], for a store that only requests of the control API with one change each have changed. Each request
/// has one row, and each deletion a stored receipt with that row's position.
pub fn check_plain_log(sql: impl Fn(&str) -> Result<String>) -> Result<()> {
    check_log(&sql)?;
    ensure_none(&OF_A_PLAIN_LOG, sql)
}

/// Waits until each deletion by a request has its final receipt in the store.
pub fn wait_for_receipts(deadline: Duration, sql: impl Fn(&str) -> Result<String>) -> Result<()> {
    const OPEN: &str = "SELECT count(*) FROM invalidations
        WHERE request_id IS NOT NULL AND cause = 'deleted' AND NOT receipted";
    try_eventually("every deletion's receipt to be stored", deadline, || {
        let open = sql(OPEN)?;
        Ok((open == "0").then_some(()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three keys of one API, of which two were deleted by a request each.
    const SOUND: &str = "
        INSERT INTO workspaces (id) VALUES ('ws');
        INSERT INTO apis (id, workspace_id, name) VALUES ('api', 'ws', 'payments');
        INSERT INTO keys (id, api_id, workspace_id, hash, start)
            SELECT id, 'api', 'ws', CAST(id || zeroblob(31) AS BLOB), 'k'
            FROM (SELECT 'a' AS id UNION ALL SELECT 'b' UNION ALL SELECT 'c');
        UPDATE keys SET deleted_at_m = 1 WHERE id IN ('a', 'b');
        UPDATE invalidations SET request_id = 'req_' || key_id, receipted = 1 WHERE cause = 'deleted';
        UPDATE invalidations SET epoch = 1, position = id;
        UPDATE log_head SET head = (SELECT max(position) FROM invalidations);
        INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, targets, correlation_id)
            SELECT 1, 'ws', 'key.delete', '', 'key', 'root', '[]', request_id
            FROM invalidations WHERE cause = 'deleted';
        INSERT INTO receipts (request_id, workspace_id, epoch, position, committed_at, final_at, body)
            SELECT request_id, 'ws', epoch, position, 1, 1, '{}' FROM invalidations WHERE cause = 'deleted';";

    /// Creates a store with [`SOUND`] in it, and applies `damage`.
    fn store_with(dir: &Path, damage: &str) -> Result<HomeStoreAddress> {
        const SCRIPT: &str = "import sqlite3, sys\n\
            sqlite3.connect(sys.argv[1]).executescript(sys.argv[2])";
        const SCHEMA: &str = include_str!("../../crates/evictd-store/migrations/sqlite/0001_home_store.sql");
        let path = dir.join("home.db");
        python(SCRIPT, &path, &["BEGIN;", SCHEMA, SOUND, damage, "; COMMIT"].concat())?;
        Ok(HomeStoreAddress::Sqlite(path))
    }

    /// Returns the checks' error for a store with such damage, or "sound".
    fn verdict(damage: &str) -> Result<String> {
        let dir = tempfile::tempdir()?;
        let store = store_with(dir.path(), damage)?;
        let checked = check_plain_log(|statement| store.read(statement));
        Ok(checked.map_or_else(|flaw| format!("{flaw:#}"), |()| "sound".to_owned()))
    }

    /// Negative controls: without them, a check that counts nothing would pass as well.
    #[test]
    fn every_flaw_of_a_log_is_found() -> Result<()> {
        const AT_THE_END: &str = "UPDATE invalidations SET epoch = 1, position = id WHERE position IS NULL;
            UPDATE log_head SET head = (SELECT max(position) FROM invalidations);";
        let again = |columns: &str| {
            format!(
                "INSERT INTO invalidations (scope, key_hash, key_id, api_id, workspace_id, request_id, cause)
                 SELECT scope, key_hash, key_id, api_id, workspace_id, {columns}
                 FROM invalidations WHERE request_id = 'req_a'; {AT_THE_END}"
            )
        };
        let last = "WHERE position = (SELECT max(position) FROM invalidations)";
        let damages = [
            (String::new(), "sound"),
            (format!("UPDATE invalidations SET epoch = NULL, position = NULL {last}"), "rows without a position: 1"),
            ("DELETE FROM invalidations WHERE position = 3".to_owned(), "positions without a row: 1"),
            ("DELETE FROM invalidations WHERE position = 1".to_owned(), "positions before the first row: 1"),
            ("UPDATE log_head SET head = head + 2".to_owned(), "positions after the last row: 2"),
            (again("request_id, cause"), "deleted keys without exactly one row: 1"),
            (
                "UPDATE keys SET deleted_at_m = NULL WHERE id = 'a'; DELETE FROM invalidations WHERE cause = 'restored'"
                    .to_owned(),
                "rows of keys that aren't deleted: 1",
            ),
            (
                "DELETE FROM audit_log WHERE correlation_id = 'req_a'".to_owned(),
                "deletions without exactly one audit record: 1",
            ),
            (
                "UPDATE audit_log SET correlation_id = 'req_a'".to_owned(),
                "deletions without exactly one audit record: 2",
            ),
            (
                "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, targets)
                 VALUES (1, 'ws', 'key.delete', '', 'key', 'root', '[]')"
                    .to_owned(),
                "audit records without a change: 1",
            ),
            (
                "UPDATE invalidations SET request_id = NULL WHERE request_id = 'req_a';
                 DELETE FROM audit_log WHERE correlation_id = 'req_a'"
                    .to_owned(),
                "keys deleted past the API without exactly one audit record: 1",
            ),
            (
                "UPDATE invalidations SET request_id = NULL WHERE request_id = 'req_a';
                 UPDATE audit_log SET correlation_id = NULL, actor_type = 'database' WHERE correlation_id = 'req_a'"
                    .to_owned(),
                "deletions that no request asked for: 1",
            ),
            (again("request_id, 'changed'"), "requests with more than one row: 1"),
            (format!("UPDATE invalidations SET epoch = 2 {last}"), "rows of a later epoch: 1"),
            (
                "DELETE FROM receipts WHERE request_id = 'req_a'".to_owned(),
                "deletions whose receipt doesn't have their position: 1",
            ),
            (
                "UPDATE receipts SET position = 1 WHERE request_id = 'req_a'".to_owned(),
                "deletions whose receipt doesn't have their position: 1",
            ),
        ];
        for (damage, expected) in damages {
            assert_eq!(verdict(&damage)?, expected, "{damage}");
        }
        Ok(())
    }

    #[test]
    fn missing_receipts_are_waited_for() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let store =
            store_with(dir.path(), "UPDATE invalidations SET receipted = 0 WHERE request_id = 'req_a'")?;
        let failure = wait_for_receipts(Duration::ZERO, |statement| store.read(statement)).unwrap_err();
        assert!(failure.to_string().contains("receipt to be stored"), "{failure}");
        let dir = tempfile::tempdir()?;
        let store = store_with(dir.path(), "")?;
        wait_for_receipts(Duration::ZERO, |statement| store.read(statement))?;
        let failure = store.read("DELETE FROM receipts").unwrap_err();
        assert!(failure.to_string().contains("readonly"), "{failure}");
        Ok(())
    }
}
