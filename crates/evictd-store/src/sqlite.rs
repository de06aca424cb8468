//! The embedded store, on SQLite.
//!
//! One connection writes. Every change is a `BEGIN IMMEDIATE` transaction on it, so that "the rows of this transaction"
//! and "the order of commits" are exact. Read-only connections read WAL snapshots and never wait for the writer.
//!
//! The schema and its triggers are in `migrations/sqlite`. In reading order:
//!
//! * `pools`: the connections, and which work may delay which (R10).
//! * `exclusive`: one publisher per file.
//! * `location`: detects that the file was moved.
//! * `write`: a write transaction, and a COMMIT that survives its caller (R4).
//! * `log`: numbering, rounds, replays, incarnations (R1, R2, R5, R7, R15).
//! * `schema`: detects missing triggers and changes of the schema (R3).
//! * `roster`: the instances that may hold a lease (R11).
//! * `receipts`: receipts and open requests (R12).
//! * `records`: reading keys, root keys and APIs (R6).
//! * `changes`, `operator`: changes by the control API, by time and by operators.
//! * `audit`: their audit records.
//! * `purge`, `checkpoint`: deleting old rows, and their traces.

mod audit;
mod changes;
mod checkpoint;
mod clock;
mod exclusive;
mod location;
mod log;
mod operator;
mod pools;
mod purge;
mod receipts;
mod records;
mod roster;
mod schema;
mod write;

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use evictd_core::history::BeginCause;
use sqlx::Connection;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnection, SqlitePool};

use self::exclusive::Exclusive;
use self::location::FileLocation;
use self::pools::Pools;
use self::schema::Triggers;
use self::write::failed;
use crate::error::StoreError;
use crate::log::LogStore;
use crate::{Concurrency, HomeStore};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// The home store in one SQLite file. Other processes may use the file at the same time.
#[derive(Debug)]
pub struct SqliteStore {
    pools: Pools,
    /// The triggers as the migrations create them.
    triggers: Triggers,
    exclusive: Option<Exclusive>,
    /// Whether the write-ahead log may hold traces of erased and purged rows.
    has_traces: AtomicBool,
}

impl SqliteStore {
    /// Returns the schema version of the store at `path`; `None` if there is no store. Changes nothing.
    pub async fn schema_version(path: &Path) -> Result<Option<i64>, StoreError> {
        let refused = refused(path);
        let file = std::path::absolute(path).map_err(|source| refused(source.into()))?;
        if !file.try_exists().map_err(|source| refused(source.into()))? {
            return Ok(None);
        }
        pools::schema_version(&file).await.map_err(refused)
    }

    /// Opens the store at `path` for a tool that doesn't number the log. Other processes may have it open.
    ///
    /// Creates the file, readable by its owner only, if there is none, and migrates the schema. The directory must exist
    /// and be writable: SQLite keeps its log beside the file.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let file = create_if_missing(path)?;
        Self::connect(path, &file, None).await
    }

    /// As [`SqliteStore::open`], for a publisher: begins an incarnation. Returns [`StoreError::InUse`] while another
    /// publisher has the store open.
    pub async fn open_exclusively(path: &Path) -> Result<Self, StoreError> {
        let file = create_if_missing(path)?;
        let exclusive = Exclusive::take(&file).map_err(|source| refused(path)(source.into()))?;
        let exclusive = exclusive.ok_or_else(|| StoreError::InUse { path: path.to_owned() })?;
        let store = Self::connect(path, &file, Some(exclusive)).await?;
        store.begin_incarnation(BeginCause::Opened, None).await?;
        Ok(store)
    }

    async fn connect(path: &Path, file: &Path, exclusive: Option<Exclusive>) -> Result<Self, StoreError> {
        let mut pools = Pools::open(file).await.map_err(refused(path))?;
        migrate(&pools.writer.pool, path).await?;
        let location = FileLocation::of(file).map_err(|source| refused(path)(source.into()))?;
        pools.writer.location = Some(Arc::new(location));
        let triggers = intended_triggers().await?;
        // An earlier process may have left some.
        let has_traces = AtomicBool::new(true);
        Ok(Self { pools, triggers, exclusive, has_traces })
    }
}

#[async_trait]
impl HomeStore for SqliteStore {
    /// There is one writer. A second change waits for it, so that it never has to wait for one.
    fn concurrency(&self) -> Concurrency {
        Concurrency { reads: pools::RECORDS as usize, changes: 2 }
    }

    async fn close(&self) {
        self.pools.close().await;
        if let Some(exclusive) = &self.exclusive {
            exclusive.release();
        }
    }
}

/// Returns the error of a store that can't be opened.
fn refused(path: &Path) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Open {
        place: path.display().to_string(),
        advice: advice(&source),
        is_permanent: is_permanent(&source),
        source,
    }
}

/// Returns the absolute path of the file, and creates it if it is missing. SQLite would take relative paths such as
/// ":memory:" and "file:..." for other things than names.
fn create_if_missing(path: &Path) -> Result<PathBuf, StoreError> {
    let create = || {
        let file = std::path::absolute(path)?;
        create_private(&file)?;
        Ok(file)
    };
    create().map_err(|source: std::io::Error| refused(path)(source.into()))
}

/// Creates the file with its final permissions. SQLite would create it with those of the process.
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

/// Whether it isn't the file's state of the moment that prevents it from being opened, but its place or what it is.
fn is_permanent(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => matches!(
            error.kind(),
            ErrorKind::NotFound
                | ErrorKind::NotADirectory
                | ErrorKind::IsADirectory
                | ErrorKind::PermissionDenied
                | ErrorKind::ReadOnlyFilesystem
        ),
        _ => matches!(
            write::result_code(error),
            Some(write::READONLY | write::CANTOPEN | write::PERM | write::NOTADB | write::CORRUPT)
        ),
    }
}

/// Whether another connection kept the file locked for too long.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    write::result_code(error) == Some(write::BUSY)
}

/// Migrates the schema in one transaction: of two processes that open a new or older file, one migrates it and the other
/// finds it done.
async fn migrate(writer: &SqlitePool, path: &Path) -> Result<(), StoreError> {
    let mut whole = writer.begin_with("BEGIN IMMEDIATE").await.map_err(refused(path))?;
    let was_known = schema::is_known(&mut whole).await.map_err(refused(path))?;
    MIGRATIONS.run(&mut *whole).await.map_err(StoreError::Migrate)?;
    if was_known {
        schema::note(&mut whole).await.map_err(refused(path))?;
    }
    whole.commit().await.map_err(refused(path))
}

/// Reads the triggers that the migrations make in an empty database.
async fn intended_triggers() -> Result<Triggers, StoreError> {
    let mut scratch =
        SqliteConnection::connect("sqlite::memory:").await.map_err(failed("read its triggers"))?;
    MIGRATIONS.run(&mut scratch).await.map_err(StoreError::Migrate)?;
    let triggers = schema::intended(&mut scratch).await?;
    scratch.close().await.map_err(failed("read its triggers"))?;
    Ok(triggers)
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::{Pin, pin};
    use std::task::Poll;

    use evictd_core::ids::{KeyHash, KeyId, WorkspaceId};

    use super::*;
    use crate::log::{Replay, RoundRequest};
    use crate::operator::{NewRootKey, Operator, OperatorStore};
    use crate::record::RecordStore;
    use crate::roster::RosterStore;

    /// Takes all connections of a pool, as if each were busy.
    async fn occupy(pool: &SqlitePool) -> Vec<sqlx::pool::PoolConnection<sqlx::Sqlite>> {
        let mut taken = Vec::new();
        for _ in 0..pool.options().get_max_connections() {
            taken.push(pool.acquire().await.unwrap());
        }
        taken
    }

    /// Polls the future once. Returns whether it is still waiting.
    async fn waits(future: &mut (impl Future + Unpin)) -> bool {
        poll_fn(|context| Poll::Ready(Pin::new(&mut *future).poll(context).is_pending())).await
    }

    fn operator() -> Operator {
        Operator { name: "ops".to_owned(), request_id: "req_operator".to_owned() }
    }

    fn root_key(n: u8) -> NewRootKey {
        NewRootKey {
            id: KeyId::new(format!("root_{n}")),
            workspace_id: WorkspaceId::new("ws_1"),
            hash: KeyHash([n; 32]),
            start: "unkey_".to_owned(),
            name: None,
            permissions: Vec::new(),
            expires_at: None,
        }
    }

    async fn new_store() -> (tempfile::TempDir, Arc<SqliteStore>) {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        (directory, Arc::new(store))
    }

    #[tokio::test]
    async fn stuck_lookups_delay_nothing_else() {
        let (_directory, store) = new_store().await;
        let _stuck = occupy(&store.pools.lookups).await;
        let mut lookup = pin!(store.lookup(KeyHash([1; 32])));
        assert!(waits(&mut lookup).await);

        store.create_root_key(&operator(), root_key(1)).await.unwrap();
        assert!(store.root_key(KeyHash([1; 32])).await.unwrap().is_some());
        assert_eq!(store.number(10).await.unwrap().rows.len(), 1);
        store.round(RoundRequest::default()).await.unwrap();
        assert!(
            matches!(store.replay(1, 1, 1, 10).await.unwrap(), Replay::Rows { rows, .. } if rows.len() == 1)
        );
    }

    #[tokio::test]
    async fn stuck_control_api_delays_neither_replays_nor_the_log() {
        let (_directory, store) = new_store().await;
        store.create_root_key(&operator(), root_key(1)).await.unwrap();
        store.number(10).await.unwrap();
        let pools = &store.pools;
        let _stuck = (occupy(&pools.lookups).await, occupy(&pools.records).await);
        let _change = pools.change("test").await.unwrap();
        assert!(waits(&mut pin!(store.root_key(KeyHash([1; 32])))).await);
        assert!(waits(&mut pin!(store.create_root_key(&operator(), root_key(2)))).await);

        assert!(
            matches!(store.replay(1, 1, 1, 10).await.unwrap(), Replay::Rows { rows, .. } if rows.len() == 1)
        );
        assert_eq!(store.number(10).await.unwrap().head, store.head().await.unwrap());
        assert_eq!(store.roster(0).await.unwrap().entries, []);
    }

    #[tokio::test]
    async fn stuck_replays_delay_neither_rounds_nor_numbering() {
        let (_directory, store) = new_store().await;
        let _stuck = occupy(&store.pools.replays).await;
        assert!(waits(&mut pin!(store.replay(1, 1, 1, 10))).await);
        store.create_root_key(&operator(), root_key(1)).await.unwrap();
        assert_eq!(store.number(10).await.unwrap().rows.len(), 1);
        store.round(RoundRequest::default()).await.unwrap();
    }

    #[tokio::test]
    async fn round_waits_for_the_running_change_and_no_other() {
        let (_directory, store) = new_store().await;
        let running = store.pools.change("test").await.unwrap();
        let mut changes: Vec<_> = (1..=20)
            .map(|n| {
                let store = store.clone();
                Box::pin(async move { store.create_root_key(&operator(), root_key(n)).await })
            })
            .collect();
        for change in &mut changes {
            assert!(waits(change).await);
        }
        let mut round = pin!(store.round(RoundRequest::default()));
        assert!(waits(&mut round).await);

        let changes: Vec<_> = changes.into_iter().map(tokio::spawn).collect();
        drop(running);
        assert_eq!(round.await.unwrap().numbered.rows, [], "it came before all that had waited longer");
        for change in changes {
            change.await.unwrap().unwrap();
        }
        assert_eq!(store.number(100).await.unwrap().rows.len(), 20);
    }

    /// By the error and not by trying: root may write anywhere.
    #[test]
    fn unwritable_place_is_explained() {
        for kind in [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem] {
            assert!(advice(&sqlx::Error::Io(kind.into())).contains("must be writable"));
        }
    }
}
