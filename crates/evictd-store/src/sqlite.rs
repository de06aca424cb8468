//! The embedded store, on SQLite.
//!
//! One connection writes: every change is a `BEGIN IMMEDIATE` transaction on it, so that "the rows of
//! this transaction" and "the order of commits" are exact. A few read-only connections answer everything
//! else from WAL snapshots and never wait for the writer. One more is kept for [`HomeStore::version`].
//!
//! The schema and its triggers are in `migrations/sqlite`. In reading order:
//!
//! * `write`: a write transaction, and a COMMIT that a dropped caller can't cancel (R4).
//! * `log`: numbering, rounds, replays (R1, R2, R5, R7).
//! * `lineage`: notices that the file was put back (R2).
//! * `records`: what is read of keys, root keys and APIs (R6).
//! * `changes`: what the control API changes, and its audit records.

mod changes;
mod lineage;
mod log;
mod records;
mod write;

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::record::{Lookup, RootKeyRecord};
use evictd_core::roster::Instance;
use evictd_core::time::StoreTime;
use sqlx::Connection;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use tokio::sync::{Semaphore, SemaphorePermit};

use self::lineage::Lineage;
use self::write::{Write, failed};
use crate::change::{
    Actor, Api, Authorize, ChangeError, DeleteMode, KeyDetails, NewApi, NewKey, NewRootKey, RootKeyInfo,
};
use crate::log::{Backlog, Numbered, Replay, Round};
use crate::{HomeStore, StoreError};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// How long a statement waits for another process's write.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a caller waits for a connection: longer than [`BUSY_TIMEOUT`], so that a busy database is
/// reported as such.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Read connections: enough for lookups to overlap, few enough to keep each one's page cache warm.
const READERS: u32 = 4;

/// Read connections for numbering and replays.
const LOG_READERS: u32 = 2;

/// Changes that may wait for the writer at once. Rounds and numbering wait behind so many, whatever the
/// control API is asked to do: leases depend on them.
const CHANGES_WAITING: usize = 16;

/// The home store in one SQLite file. Safe to share; other processes may use the file at the same time.
#[derive(Debug)]
pub struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
    changes: Semaphore,
    lineage: Lineage,
    /// For the log's own questions, which must not wait behind lookups.
    log_readers: SqlitePool,
    /// Never writes, so that `PRAGMA data_version` reports the writer's commits too.
    watcher: SqlitePool,
    /// The triggers as the migrations create them, by name.
    triggers: HashMap<String, String>,
}

impl SqliteStore {
    /// Opens the store at `path`, creates the file (readable by its owner only) where there is none, and
    /// brings its schema up to date. The directory must exist and be writable: SQLite keeps its log
    /// beside the file.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let refused = |source| StoreError::Open { path: path.to_owned(), advice: advice(&source), source };
        // Made absolute, because SQLite takes ":memory:" and "file:..." for something else than names.
        let file = std::path::absolute(path).map_err(|source| refused(source.into()))?;
        create_private(&file).map_err(|source| refused(source.into()))?;

        let options =
            SqliteConnectOptions::new().filename(&file).busy_timeout(BUSY_TIMEOUT).foreign_keys(true);
        let writing = options
            .clone()
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("recursive_triggers", "ON")
            // What is erased is overwritten, not only unlinked.
            .pragma("secure_delete", "ON");
        let reading = options.read_only(true).pragma("query_only", "ON");

        let writer = pool(1).connect_with(writing).await.map_err(refused)?;
        MIGRATIONS.run(&writer).await.map_err(StoreError::Migrate)?;
        let readers = pool(READERS).connect_with(reading.clone()).await.map_err(refused)?;
        let log_readers = pool(LOG_READERS).connect_with(reading.clone()).await.map_err(refused)?;
        let watcher = pool(1).connect_with(reading).await.map_err(refused)?;
        let changes = Semaphore::new(CHANGES_WAITING);
        let triggers = intended_triggers().await?;
        let store = Self {
            writer,
            readers,
            changes,
            lineage: Lineage::beside(&file),
            log_readers,
            watcher,
            triggers,
        };
        store.notice_a_restore().await?;
        Ok(store)
    }

    /// Begins a new epoch if the log had come further than this file knows.
    async fn notice_a_restore(&self) -> Result<(), StoreError> {
        // The note first: it never runs ahead of what is committed.
        let noted = self.lineage.read();
        if noted <= self.head().await? {
            return Ok(());
        }
        let round = self.round(&[], &[noted]).await?;
        if round.epoch_began {
            tracing::warn!(
                %noted, head = %round.numbered.head,
                "the home store is behind its own note: it was put back. A new epoch begins, agents flush once"
            );
        }
        Ok(())
    }

    /// A transaction of the control API's.
    async fn change(&self, action: &'static str) -> Result<(Write, SemaphorePermit<'_>), StoreError> {
        let closed = |_| StoreError::Database { action, source: sqlx::Error::PoolClosed };
        let turn = self.changes.acquire().await.map_err(closed)?;
        Ok((Write::begin(&self.writer, action).await?, turn))
    }

    /// Waits for transactions in flight, then closes the file. Later calls fail. The writer goes last: it
    /// alone can fold the write-ahead log back into the file.
    pub async fn close(&self) {
        self.watcher.close().await;
        self.log_readers.close().await;
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// Connections that live as long as the store.
fn pool(size: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(size)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        // After some failures (a full disk) SQLite has rolled back by itself, while the driver still counts
        // an open transaction. Such a connection is replaced.
        .before_acquire(|connection, _| {
            let clean = !connection.is_in_transaction();
            Box::pin(async move { Ok(clean) })
        })
}

/// Creates the file with its final permissions, before SQLite could create it with the process's own.
fn create_private(file: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(file) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// What to do about a store that can't be opened.
fn advice(error: &sqlx::Error) -> &'static str {
    const NO_DIRECTORY: &str = "its directory doesn't exist; create it or configure another path";
    const NOT_WRITABLE: &str = "the file and its directory must be writable by the user that runs evictd";
    match error {
        sqlx::Error::Io(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => NO_DIRECTORY,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => NOT_WRITABLE,
            _ => "see the cause, or configure another path",
        },
        _ => match write::result_code(error) {
            Some(write::READONLY | write::CANTOPEN | write::PERM) => NOT_WRITABLE,
            Some(write::NOTADB) => {
                "the file isn't an SQLite database; configure another path, or move it away"
            }
            Some(write::CORRUPT) => "the file is damaged; restore it from a backup",
            Some(write::BUSY) => "another process keeps it locked; stop that process",
            _ => "see the cause",
        },
    }
}

/// What the triggers should look like: what the migrations make in an empty database.
async fn intended_triggers() -> Result<HashMap<String, String>, StoreError> {
    let mut scratch =
        SqliteConnection::connect("sqlite::memory:").await.map_err(failed("read its triggers"))?;
    MIGRATIONS.run(&mut scratch).await.map_err(StoreError::Migrate)?;
    let triggers = triggers(&mut scratch).await?;
    scratch.close().await.map_err(failed("read its triggers"))?;
    Ok(triggers)
}

async fn triggers(connection: &mut SqliteConnection) -> Result<HashMap<String, String>, StoreError> {
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
            .fetch_all(connection)
            .await
            .map_err(failed("read its triggers"))?;
    Ok(rows.into_iter().collect())
}

/// The store's clock: this host's. SQLite has no other.
fn now() -> StoreTime {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    StoreTime(i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX))
}

/// For LIMIT, where "as many as there are" is as good as any number that doesn't fit.
fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

#[async_trait]
impl HomeStore for SqliteStore {
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = log::head_if_idle(&self.log_readers).await? {
            return Ok(Numbered { head, rows: Vec::new() });
        }
        let mut write = Write::begin(&self.writer, "number its log").await?;
        let numbered = log::number(&mut write, sql_limit(limit)).await?;
        write.commit().await?;
        self.lineage.note(numbered.head);
        Ok(numbered)
    }

    async fn round(&self, instances: &[Instance], seen: &[LogPosition]) -> Result<Round, StoreError> {
        let mut write = Write::begin(&self.writer, "commit a probe round").await?;
        let (store_time, read_at) = (now(), Instant::now());
        log::register(&mut write, instances, store_time).await?;
        // Before anything is numbered: what waits could bring the head above what was seen, and hide that
        // the store went back.
        let epoch_began = log::raise_fence(&mut write, seen).await?;
        let numbered = log::number(&mut write, i64::MAX).await?;
        write.commit().await?;
        self.lineage.note(numbered.head);
        Ok(Round { numbered, store_time, read_at, epoch_began })
    }

    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError> {
        log::replay(&self.log_readers, epoch, from, to, sql_limit(limit)).await
    }

    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        records::lookup(&self.readers, hash).await
    }

    async fn head(&self) -> Result<LogPosition, StoreError> {
        log::head(&self.log_readers).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        log::backlog(&self.log_readers).await
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        let now = now();
        if !records::any_to_expire(&self.readers, now).await? {
            return Ok(0);
        }
        let (mut write, _turn) = self.change("expire keys").await?;
        let expired = changes::expire(&mut write, now, sql_limit(limit)).await?;
        write.commit_change(None).await?;
        Ok(expired)
    }

    async fn version(&self) -> Result<i64, StoreError> {
        sqlx::query_scalar("PRAGMA data_version")
            .fetch_one(&self.watcher)
            .await
            .map_err(failed("tell whether it changed"))
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        let mut reader = self.readers.acquire().await.map_err(failed("read its triggers"))?;
        let found = triggers(&mut reader).await?;
        match self.triggers.iter().find(|(name, sql)| found.get(*name) != Some(*sql)) {
            Some((name, _)) => Err(StoreError::TriggerMissing { name: name.clone() }),
            None => Ok(()),
        }
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        records::root_key(&self.readers, hash).await
    }

    async fn create_root_key(&self, root_key: NewRootKey) -> Result<(), StoreError> {
        let (mut write, _turn) = self.change("store a root key").await?;
        changes::create_root_key(&mut write, &root_key).await?;
        write.commit_change(None).await
    }

    async fn has_root_keys(&self) -> Result<bool, StoreError> {
        records::has_root_keys(&self.readers).await
    }

    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError> {
        records::root_keys(&self.readers).await
    }

    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let (mut write, _turn) = self.change("create an API").await?;
        changes::create_api(&mut write, actor, &api).await?;
        write.commit_change(Some(&actor.request_id)).await
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        records::api(&self.readers, workspace, api).await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.change("create a key").await?;
        changes::create_key(&mut write, actor, &key).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError> {
        records::key(&self.readers, workspace, key).await
    }

    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.change("delete a key").await?;
        changes::delete_key(&mut write, actor, key, mode, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.change("delete an API").await?;
        changes::delete_api(&mut write, actor, api).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the error and not by trying: a test that runs as root may write anywhere.
    #[test]
    fn a_place_that_cannot_be_written_is_explained() {
        for kind in [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem] {
            assert!(advice(&sqlx::Error::Io(kind.into())).contains("must be writable"));
        }
    }
}
