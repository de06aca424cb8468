//! The connections to the file, and which work may delay which (R10).
//!
//! The work that agents' leases depend on waits neither for lookups nor for the control API. Under overload lookups are
//! delayed first, then the control API's changes; rounds, numbering and replays aren't. So each kind of reader has
//! connections of its own. With a write-ahead log, readers and the writer don't wait for each other.
//!
//! There is one writer. Rounds, numbering and receipts queue for it directly, with one task each. The control API's
//! changes queue for their turn first, so that a round waits for one of them at most.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::checkpoint;
use super::write::{self, SqliteWrite, Writer, WriterHealth, failed};
use crate::error::StoreError;

/// How long a statement waits for another process's write.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The pause between attempts to open a new file that another process is creating too.
const CREATION_RETRY: Duration = Duration::from_millis(10);

/// What is left of the write-ahead log once no reader needs it any more: several times what SQLite writes between two
/// checkpoints. Without a limit, the file keeps the size that one old reader or one bulk change has given it.
const WRITE_AHEAD_LOG_KEPT: u64 = 16 * 1024 * 1024;

/// How long a caller waits for a connection or its turn. Longer than [`BUSY_TIMEOUT`], so that a busy database is
/// reported as such.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

// Connections of each kind. For lookups: enough to overlap, few enough to keep each one's page cache warm.
const LOOKUPS: u32 = 4;
pub(super) const RECORDS: u32 = 2;
const AUTHENTICATIONS: u32 = 1;
const REPLAYS: u32 = 2;
const LOG: u32 = 2;

/// All connections to one file.
#[derive(Debug)]
pub(super) struct Pools {
    pub(super) writer: Writer,
    pub(super) lookups: SqlitePool,
    /// For the control API's reads.
    pub(super) records: SqlitePool,
    /// For root keys: a client's reads must not delay the authentication of others.
    pub(super) authentications: SqlitePool,
    pub(super) replays: SqlitePool,
    /// For what the sequencer and the receipts read.
    pub(super) log: SqlitePool,
    /// Never writes, so that `PRAGMA data_version` reports the writer's commits too.
    pub(super) watcher: SqlitePool,
    /// Empties the write-ahead log, with little patience.
    pub(super) checkpoints: SqlitePool,
    /// The control API's turn at the writer.
    changing: Arc<Semaphore>,
}

/// Returns the version of the newest migration of the file, which must exist; `None` if the file isn't a store.
pub(super) async fn schema_version(file: &Path) -> sqlx::Result<Option<i64>> {
    // Not read-only: that fails if there is a write-ahead log that no process has open.
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

impl Pools {
    /// Opens the file, which must exist. Makes an empty one a database.
    pub(super) async fn open(file: &Path) -> sqlx::Result<Self> {
        let options =
            SqliteConnectOptions::new().filename(file).busy_timeout(BUSY_TIMEOUT).foreign_keys(true);
        let writing = options
            .clone()
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("recursive_triggers", "ON")
            .pragma("journal_size_limit", WRITE_AHEAD_LOG_KEPT.to_string())
            // Overwrites what is erased.
            .pragma("secure_delete", "ON");
        let checkpointing = writing.clone().busy_timeout(checkpoint::PATIENCE);
        let reading = options.read_only(true).pragma("query_only", "ON");
        let health = WriterHealth::default();
        Ok(Self {
            writer: Writer { pool: connect_writer(writing, &health).await?, location: None, health },
            lookups: pool(LOOKUPS).connect_with(reading.clone()).await?,
            records: pool(RECORDS).connect_with(reading.clone()).await?,
            authentications: pool(AUTHENTICATIONS).connect_with(reading.clone()).await?,
            replays: pool(REPLAYS).connect_with(reading.clone()).await?,
            log: pool(LOG).connect_with(reading.clone()).await?,
            watcher: pool(1).connect_with(reading).await?,
            checkpoints: pool(1).connect_with(checkpointing).await?,
            changing: Arc::new(Semaphore::new(1)),
        })
    }

    /// Begins a transaction of the control API when its turn has come. The turn ends with the transaction.
    pub(super) async fn change(&self, action: &'static str) -> Result<SqliteWrite, StoreError> {
        let failed = failed(action);
        let turn = timeout(ACQUIRE_TIMEOUT, self.changing.clone().acquire_owned())
            .await
            .map_err(|_| failed(sqlx::Error::PoolTimedOut))?
            .map_err(|_| failed(sqlx::Error::PoolClosed))?;
        let mut write = SqliteWrite::begin(&self.writer, action).await?;
        write.turn = Some(turn);
        Ok(write)
    }

    /// Waits for running transactions, then closes the file. The writer closes last: it alone can copy the write-ahead
    /// log into the file.
    pub(super) async fn close(&self) {
        for others in [
            &self.watcher,
            &self.checkpoints,
            &self.log,
            &self.replays,
            &self.records,
            &self.authentications,
            &self.lookups,
        ] {
            others.close().await;
        }
        self.writer.pool.close().await;
    }
}

/// Connects the writer. SQLite's own timeout doesn't cover the change of a new file's journal mode: of two processes that
/// create it, the slower one gets "locked" at once.
async fn connect_writer(options: SqliteConnectOptions, health: &WriterHealth) -> sqlx::Result<SqlitePool> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        let health = health.clone();
        let pool = pool(1).before_acquire(move |connection, _| {
            let is_usable = !health.take_read_only() && !connection.is_in_transaction();
            Box::pin(async move { Ok(is_usable) })
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
/// All are opened at once, and so is the write-ahead log, which SQLite opens only when something is read. Later, another
/// file may have taken its place, and two connections would read different stores, or one a mixture.
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
        // After some failures (a full disk) SQLite has rolled back by itself, while the driver still counts an open
        // transaction. Such a connection is replaced.
        .before_acquire(|connection, _| {
            let is_usable = !connection.is_in_transaction();
            Box::pin(async move { Ok(is_usable) })
        })
}
