//! The connections to the file, and who may hold up whom (R10).
//!
//! Whatever an agent's lease depends on waits neither for lookups nor for the control API: when there is too
//! much to do, lookups are late first, then the control API's changes, and rounds, numbering and replays not
//! at all. So each kind of reader has connections of its own. Readers never wait for the writer, nor it for
//! them: that is what the write-ahead log is for.
//!
//! There is one writer. Rounds, numbering and receipts queue for it directly, and each has one task; the
//! control API's changes come to it one at a time (`changing`), so that a round waits for one of them at most.

use std::path::Path;
use std::time::{Duration, Instant};

use sqlx::Connection;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{sleep, timeout};

use super::checkpoint;
use super::write::{self, Health, Write, Writer, failed};
use crate::error::StoreError;

/// How long a statement waits for another process's write.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a new file is tried that another process is creating as well.
const CREATION_RETRY: Duration = Duration::from_millis(10);

/// How long a caller waits for a connection or its turn: longer than [`BUSY_TIMEOUT`], so that a busy database
/// is reported as such.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections for lookups: enough for them to overlap, few enough to keep each one's page cache warm.
const LOOKUPS: u32 = 4;

/// Connections for the control API's reads.
const RECORDS: u32 = 2;

/// Connections for replays.
const REPLAYS: u32 = 2;

/// Connections for what the sequencer and the receipts ask.
const LOG: u32 = 2;

/// All connections to one file.
#[derive(Debug)]
pub(super) struct Connections {
    /// The one that writes.
    pub(super) writer: Writer,
    /// For lookups.
    pub(super) lookups: SqlitePool,
    /// For the control API's reads: they don't wait behind lookups.
    pub(super) records: SqlitePool,
    /// For replays: they wait behind nothing but replays.
    pub(super) replays: SqlitePool,
    /// For the log's own questions: they don't wait behind replays either.
    pub(super) log: SqlitePool,
    /// Never writes, so that `PRAGMA data_version` reports the writer's commits too.
    pub(super) watcher: SqlitePool,
    /// Empties the write-ahead log, with little patience.
    pub(super) checkpoints: SqlitePool,
    /// The control API's turn at the writer.
    changing: Semaphore,
}

/// The newest migration that was run on the file, which must exist. `None` of one that isn't a store, such as an
/// empty file.
pub(super) async fn schema_version(file: &Path) -> sqlx::Result<Option<i64>> {
    // Not read-only: that fails on a write-ahead log which nobody has open.
    let options = SqliteConnectOptions::new().filename(file).busy_timeout(BUSY_TIMEOUT);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    let tables = "SELECT count(*) > 0 FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations'";
    let look = async {
        if !sqlx::query_scalar(tables).fetch_one(&mut connection).await? {
            return Ok(None);
        }
        let newest = "SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success";
        sqlx::query_scalar(newest).fetch_one(&mut connection).await.map(Some)
    };
    let version = look.await;
    connection.close().await?;
    version
}

impl Connections {
    /// Opens the file, which must exist, and makes a new one a database.
    pub(super) async fn open(file: &Path) -> sqlx::Result<Self> {
        let options =
            SqliteConnectOptions::new().filename(file).busy_timeout(BUSY_TIMEOUT).foreign_keys(true);
        let writing = options
            .clone()
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("recursive_triggers", "ON")
            // What is erased is overwritten, not only unlinked.
            .pragma("secure_delete", "ON");
        let folding = writing.clone().busy_timeout(checkpoint::PATIENCE);
        let reading = options.read_only(true).pragma("query_only", "ON");
        let health = Health::default();
        Ok(Self {
            writer: Writer { pool: writer(writing, &health).await?, place: None, health },
            lookups: pool(LOOKUPS).connect_with(reading.clone()).await?,
            records: pool(RECORDS).connect_with(reading.clone()).await?,
            replays: pool(REPLAYS).connect_with(reading.clone()).await?,
            log: pool(LOG).connect_with(reading.clone()).await?,
            watcher: pool(1).connect_with(reading).await?,
            checkpoints: pool(1).connect_with(folding).await?,
            changing: Semaphore::new(1),
        })
    }

    /// A transaction of the control API's, when its turn has come. The turn ends with the permit.
    pub(super) async fn change(
        &self,
        action: &'static str,
    ) -> Result<(Write, SemaphorePermit<'_>), StoreError> {
        let failed = failed(action);
        let turn = timeout(ACQUIRE_TIMEOUT, self.changing.acquire())
            .await
            .map_err(|_| failed(sqlx::Error::PoolTimedOut))?
            .map_err(|_| failed(sqlx::Error::PoolClosed))?;
        Ok((Write::begin(&self.writer, action).await?, turn))
    }

    /// Waits for transactions in flight, then closes the file. The writer goes last: it alone can fold the
    /// write-ahead log back into the file.
    pub(super) async fn close(&self) {
        for others in
            [&self.watcher, &self.checkpoints, &self.log, &self.replays, &self.records, &self.lookups]
        {
            others.close().await;
        }
        self.writer.pool.close().await;
    }
}

/// Connects the writer. SQLite's own patience doesn't extend to the change of a new file's journal mode, so
/// that the slower one of two processes that create it is told "locked" at once.
async fn writer(options: SqliteConnectOptions, health: &Health) -> sqlx::Result<SqlitePool> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        let health = health.clone();
        let pool = pool(1).before_acquire(move |connection, _| {
            let good = !health.take_spoilt() && !connection.is_in_transaction();
            Box::pin(async move { Ok(good) })
        });
        match pool.connect_with(options.clone()).await {
            Err(error) if write::result_code(&error) == Some(write::BUSY) && Instant::now() < deadline => {
                sleep(CREATION_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// Connections that live as long as the store.
///
/// All are opened at once, with the write-ahead log, which SQLite leaves until something is read: later another
/// file may have taken its place, and two connections would read of different stores, or one of a mixture.
fn pool(size: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(size)
        .min_connections(size)
        .after_connect(|connection, _| {
            Box::pin(async move {
                sqlx::query("SELECT count(*) FROM sqlite_master").execute(connection).await.map(drop)
            })
        })
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
