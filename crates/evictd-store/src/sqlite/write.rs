//! A write transaction, and a COMMIT that survives its caller (R4).
//!
//! A caller that is dropped before the COMMIT leaves nothing behind: the transaction is rolled back. Once the COMMIT has
//! begun, the outcome doesn't depend on the caller.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqlitePool, SqliteRow};
use sqlx::{Decode, Row, Sqlite, Transaction, Type};
use tokio::sync::OwnedSemaphorePermit;

use super::clock::now;
use super::location::FileLocation;
use crate::error::StoreError;

// The primary result codes of SQLite that are treated differently.
pub(super) const PERM: i32 = 3;
pub(super) const BUSY: i32 = 5;
pub(super) const READONLY: i32 = 8;
pub(super) const CORRUPT: i32 = 11;
const FULL: i32 = 13;
pub(super) const CANTOPEN: i32 = 14;
const CONSTRAINT: i32 = 19;
pub(super) const NOTADB: i32 = 26;

/// A statement with its parameters.
type BoundQuery<'q> = Query<'q, Sqlite, SqliteArguments>;

/// The one connection that writes.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) pool: SqlitePool,
    /// `None` until the store is open.
    pub(super) location: Option<Arc<FileLocation>>,
    pub(super) health: WriterHealth,
}

impl Writer {
    /// Fails unless the store's files are where they were opened, and the last write succeeded.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        self.location.as_ref().map_or(Ok(()), |location| location.check())?;
        self.health.check()
    }
}

/// The outcome of the last write.
#[derive(Clone, Default, Debug)]
pub(super) struct WriterHealth(Arc<Mutex<WriterState>>);

#[derive(Default, Debug)]
struct WriterState {
    /// The error of the last write; `None` if it succeeded.
    failure: Option<String>,
    /// Whether the connection must be replaced. SQLite silently opens a file read-only if it may not write to it, and
    /// such a connection would refuse every change for good.
    is_read_only: bool,
}

impl WriterHealth {
    /// Whether the connection has turned out to be read-only since the last call.
    pub(super) fn take_read_only(&self) -> bool {
        std::mem::take(&mut self.state().is_read_only)
    }

    /// As the function of this name, for the connection that writes.
    fn failed(&self, action: &'static str, error: sqlx::Error) -> StoreError {
        self.note(&error);
        failed(action)(error)
    }

    fn note(&self, error: &sqlx::Error) {
        let code = result_code(error);
        let mut state = self.state();
        state.is_read_only |= code == Some(READONLY);
        // A change that violates the schema says nothing about the next one.
        if code != Some(CONSTRAINT) {
            state.failure = Some(error.to_string());
        }
    }

    fn check(&self) -> Result<(), StoreError> {
        let failure = self.state().failure.clone();
        failure.map_or(Ok(()), |cause| Err(StoreError::Unwritable { cause }))
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transaction that holds SQLite's one write lock.
pub(super) struct SqliteWrite {
    transaction: Transaction<'static, Sqlite>,
    location: Option<Arc<FileLocation>>,
    health: WriterHealth,
    /// For error messages.
    action: &'static str,
    /// The last row of the log before this transaction. Rows above it are this transaction's own.
    log_end: i64,
    expects_log_row: bool,
    /// The control API's turn at the writer, if this is a change of its.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

impl SqliteWrite {
    /// Takes the write lock at once. A transaction that began with reading would fail if another one wrote before its
    /// first write.
    pub(super) async fn begin(writer: &Writer, action: &'static str) -> Result<Self, StoreError> {
        let (location, health) = (writer.location.clone(), writer.health.clone());
        let begun = async {
            let mut transaction = writer.pool.begin_with("BEGIN IMMEDIATE").await?;
            let log_end = sqlx::query_scalar("SELECT coalesce(max(id), 0) FROM invalidations")
                .fetch_one(&mut *transaction)
                .await?;
            Ok((transaction, log_end))
        };
        match begun.await {
            Ok((transaction, log_end)) => Ok(Self {
                transaction,
                location,
                health,
                action,
                log_end,
                expects_log_row: false,
                turn: None,
            }),
            Err(error) => Err(health.failed(action, error)),
        }
    }

    /// Runs a statement. Returns how many rows it changed.
    pub(super) async fn run(&mut self, statement: BoundQuery<'_>) -> Result<u64, StoreError> {
        let outcome = statement.execute(&mut *self.transaction).await;
        Ok(outcome.map_err(|error| self.health.failed(self.action, error))?.rows_affected())
    }

    /// Runs a statement that changes what verifications read: if it changes a row, the log must get one.
    pub(super) async fn run_logged(&mut self, statement: BoundQuery<'_>) -> Result<u64, StoreError> {
        let changed = self.run(statement).await?;
        self.expects_log_row |= changed > 0;
        Ok(changed)
    }

    /// What was just changed is read by verifications, so the triggers must have written to the log (R3).
    pub(super) fn expect_log_row(&mut self) {
        self.expects_log_row = true;
    }

    pub(super) async fn rows(&mut self, statement: BoundQuery<'_>) -> Result<Vec<SqliteRow>, StoreError> {
        let rows = statement.fetch_all(&mut *self.transaction).await;
        rows.map_err(|error| self.health.failed(self.action, error))
    }

    /// Returns the first row.
    pub(super) async fn row(&mut self, statement: BoundQuery<'_>) -> Result<Option<SqliteRow>, StoreError> {
        let row = statement.fetch_optional(&mut *self.transaction).await;
        row.map_err(|error| self.health.failed(self.action, error))
    }

    /// Returns the first column of the first row.
    pub(super) async fn value<T>(&mut self, statement: BoundQuery<'_>) -> Result<Option<T>, StoreError>
    where
        T: for<'r> Decode<'r, Sqlite> + Type<Sqlite>,
    {
        let row = self.row(statement).await?;
        row.map(|row| row.try_get(0)).transpose().map_err(failed(self.action))
    }

    /// Dates the log rows of this transaction, and commits. Dating is the last statement before the COMMIT, because the
    /// age of a change counts from there. A change that should have log rows and has none is undone: no agent would
    /// receive it.
    pub(super) async fn commit_change(mut self, request_id: Option<&str>) -> Result<(), StoreError> {
        let dating = sqlx::query("UPDATE invalidations SET committed_at = ?1, request_id = ?2 WHERE id > ?3")
            .bind(now().0)
            .bind(request_id)
            .bind(self.log_end);
        if self.run(dating).await? == 0 && self.expects_log_row {
            return Err(StoreError::Unlogged { action: self.action });
        }
        self.commit().await
    }

    /// Rolls back. Fails if a commit would have failed because the store's files were moved.
    pub(super) fn roll_back(self) -> Result<(), StoreError> {
        self.location.as_ref().map_or(Ok(()), |location| location.check())
    }

    /// Commits in a task of its own. An error is [`StoreError::Unknown`] unless certainly nothing was committed. Nothing
    /// is committed to a store whose files were moved.
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        let Self { transaction, location, health, action, turn: _turn, .. } = self;
        let is_in_place = || location.as_ref().map_or(Ok(()), |location| location.check());
        is_in_place()?;
        let outcome = tokio::spawn(transaction.commit()).await;
        // The task fails only if the runtime ends.
        let Err(source) = outcome.unwrap_or(Err(sqlx::Error::WorkerCrashed)) else {
            health.state().failure = None;
            // If the files were moved during the commit, the store may lack it.
            let moved = |error: StoreError| sqlx::Error::Protocol(error.to_string());
            return is_in_place().map_err(|error| StoreError::Unknown { action, source: moved(error) });
        };
        health.note(&source);
        if matches!(result_code(&source), Some(BUSY | FULL | CONSTRAINT)) {
            Err(StoreError::Database { action, source })
        } else {
            Err(StoreError::Unknown { action, source })
        }
    }
}

/// Returns the error of an action that failed.
pub(super) fn failed(action: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { action, source }
}

/// Returns SQLite's primary result code if the error came from SQLite.
pub(super) fn result_code(error: &sqlx::Error) -> Option<i32> {
    let extended: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(extended & 0xff)
}

#[cfg(test)]
mod tests {
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::Poll;

    use super::*;
    use crate::log::LogStore;
    use crate::sqlite::SqliteStore;

    async fn add_workspace(write: &mut SqliteWrite) {
        write.run(sqlx::query("INSERT INTO workspaces (id) VALUES ('ws_1')")).await.unwrap();
    }

    async fn workspaces(writer: &SqlitePool) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM workspaces").fetch_one(writer).await.unwrap()
    }

    #[tokio::test]
    async fn dropped_caller_does_not_cancel_its_commit() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        let mut write = SqliteWrite::begin(&store.pools.writer, "test").await.unwrap();
        add_workspace(&mut write).await;
        {
            let mut commit = pin!(write.commit());
            poll_fn(|context| {
                assert!(commit.as_mut().poll(context).is_pending());
                Poll::Ready(())
            })
            .await;
        }
        // The writer is free again only after the COMMIT.
        assert_eq!(workspaces(&store.pools.writer.pool).await, 1);
    }

    #[tokio::test]
    async fn caller_dropped_before_the_commit_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        let mut write = SqliteWrite::begin(&store.pools.writer, "test").await.unwrap();
        add_workspace(&mut write).await;
        drop(write);
        assert_eq!(workspaces(&store.pools.writer.pool).await, 0);
    }

    #[tokio::test]
    async fn commit_that_breaks_a_constraint_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        let mut write = SqliteWrite::begin(&store.pools.writer, "test").await.unwrap();
        write.run(sqlx::query("PRAGMA defer_foreign_keys = ON")).await.unwrap();
        let orphan = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_none', 'orphan')";
        write.run(sqlx::query(orphan)).await.unwrap();
        assert!(matches!(write.commit().await, Err(StoreError::Database { .. })));
        store.writable().unwrap();
        store.head().await.unwrap();
        drop(SqliteWrite::begin(&store.pools.writer, "test").await.unwrap());
    }

    #[tokio::test]
    async fn read_only_connection_is_reported_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        store.writable().unwrap();
        // As if the file could not be written to when it was opened.
        sqlx::query("PRAGMA query_only = ON").execute(&store.pools.writer.pool).await.unwrap();
        let error = SqliteWrite::begin(&store.pools.writer, "test").await.err().unwrap();
        let StoreError::Database { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(result_code(&source), Some(READONLY));
        let error = store.writable().unwrap_err().to_string();
        assert!(error.contains("readonly"), "{error}");

        let mut write = SqliteWrite::begin(&store.pools.writer, "test").await.unwrap();
        add_workspace(&mut write).await;
        assert!(store.writable().is_err(), "nothing was committed yet");
        write.commit().await.unwrap();
        store.writable().unwrap();
    }

    #[tokio::test]
    async fn full_disk_leaves_the_store_usable() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        // SQLite raises the limit to the present size. It applies to this connection only, which the store replaces.
        sqlx::query("PRAGMA max_page_count = 1").execute(&store.pools.writer.pool).await.unwrap();
        let large =
            "INSERT INTO audit_log (time, workspace_id, event, actor_type, actor_id, targets, description)
                     VALUES (0, '', '', '', '', '[]', hex(zeroblob(60000)))";
        let mut write = SqliteWrite::begin(&store.pools.writer, "test").await.unwrap();
        let error = write.run(sqlx::query(large)).await.unwrap_err();
        let StoreError::Database { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(result_code(&source), Some(FULL));
        drop(write);

        let mut write = SqliteWrite::begin(&store.pools.writer, "test").await.unwrap();
        write.run(sqlx::query(large)).await.unwrap();
        write.commit().await.unwrap();
    }
}
