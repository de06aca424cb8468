//! A write transaction, and a COMMIT that a dropped caller can't cancel (R4).
//!
//! A caller that goes away before the COMMIT leaves nothing behind: the transaction is rolled back. From
//! the COMMIT on the outcome no longer depends on the caller, who alone may miss it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqlitePool, SqliteRow};
use sqlx::{Decode, Row, Sqlite, Transaction, Type};

use super::clock::now;
use super::place::Place;
use crate::error::StoreError;

// SQLite's primary result codes, as far as they tell us something.
pub(super) const PERM: i32 = 3;
pub(super) const BUSY: i32 = 5;
pub(super) const READONLY: i32 = 8;
pub(super) const CORRUPT: i32 = 11;
const FULL: i32 = 13;
pub(super) const CANTOPEN: i32 = 14;
const CONSTRAINT: i32 = 19;
pub(super) const NOTADB: i32 = 26;

/// A statement with its parameters.
type Statement<'q> = Query<'q, Sqlite, SqliteArguments>;

/// The one connection that writes.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) pool: SqlitePool,
    /// Where the store is, once that is known.
    pub(super) place: Option<Arc<Place>>,
    pub(super) health: Health,
}

impl Writer {
    /// An error unless the store lies where it was opened, and the last write has succeeded.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        self.place.as_ref().map_or(Ok(()), |place| place.check())?;
        self.health.check()
    }
}

/// What the last write came to.
#[derive(Clone, Default, Debug)]
pub(super) struct Health(Arc<Mutex<State>>);

#[derive(Default, Debug)]
struct State {
    /// Why it failed, if it did.
    failure: Option<String>,
    /// The connection is no good. SQLite opens a file that it may not write to for reading, without a word; such
    /// a connection would refuse every change for ever.
    spoilt: bool,
}

impl Health {
    /// Whether the connection has turned out to be no good since this was asked last.
    pub(super) fn take_spoilt(&self) -> bool {
        std::mem::take(&mut self.state().spoilt)
    }

    /// As the function of this name, of the connection that writes.
    fn failed(&self, action: &'static str, error: sqlx::Error) -> StoreError {
        self.note(&error);
        failed(action)(error)
    }

    fn note(&self, error: &sqlx::Error) {
        let code = result_code(error);
        let mut state = self.state();
        state.spoilt |= code == Some(READONLY);
        // That a change contradicts the schema says nothing of the next one.
        if code != Some(CONSTRAINT) {
            state.failure = Some(error.to_string());
        }
    }

    fn check(&self) -> Result<(), StoreError> {
        let failure = self.state().failure.clone();
        failure.map_or(Ok(()), |cause| Err(StoreError::Unwritable { cause }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds SQLite's one write lock.
pub(super) struct Write {
    transaction: Transaction<'static, Sqlite>,
    place: Option<Arc<Place>>,
    health: Health,
    /// What for, in error messages.
    action: &'static str,
    /// The last row of the log before this transaction; what lies above is its own.
    log_end: i64,
    /// Whether the log must have a row of it.
    is_news: bool,
}

impl Write {
    /// Takes the write lock at once: a transaction that only later wants to write could find that
    /// others wrote in between, and fail.
    pub(super) async fn begin(writer: &Writer, action: &'static str) -> Result<Self, StoreError> {
        let (place, health) = (writer.place.clone(), writer.health.clone());
        let begun = async {
            let mut transaction = writer.pool.begin_with("BEGIN IMMEDIATE").await?;
            let log_end = sqlx::query_scalar("SELECT coalesce(max(id), 0) FROM invalidations")
                .fetch_one(&mut *transaction)
                .await?;
            Ok((transaction, log_end))
        };
        match begun.await {
            Ok((transaction, log_end)) => {
                Ok(Self { transaction, place, health, action, log_end, is_news: false })
            }
            Err(error) => Err(health.failed(action, error)),
        }
    }

    /// Runs a statement. Returns how many rows it changed.
    pub(super) async fn run(&mut self, statement: Statement<'_>) -> Result<u64, StoreError> {
        let outcome = statement.execute(&mut *self.transaction).await;
        Ok(outcome.map_err(|error| self.health.failed(self.action, error))?.rows_affected())
    }

    /// All rows of a statement.
    pub(super) async fn rows(&mut self, statement: Statement<'_>) -> Result<Vec<SqliteRow>, StoreError> {
        let rows = statement.fetch_all(&mut *self.transaction).await;
        rows.map_err(|error| self.health.failed(self.action, error))
    }

    /// The first row of a statement.
    pub(super) async fn row(&mut self, statement: Statement<'_>) -> Result<Option<SqliteRow>, StoreError> {
        let row = statement.fetch_optional(&mut *self.transaction).await;
        row.map_err(|error| self.health.failed(self.action, error))
    }

    /// The first value of a statement's first row.
    pub(super) async fn value<T>(&mut self, statement: Statement<'_>) -> Result<Option<T>, StoreError>
    where
        T: for<'r> Decode<'r, Sqlite> + Type<Sqlite>,
    {
        let row = self.row(statement).await?;
        row.map(|row| row.try_get(0)).transpose().map_err(failed(self.action))
    }

    /// What was just changed is read by verifications, so that the triggers must have told the log (R3).
    pub(super) fn expect_news(&mut self) {
        self.is_news = true;
    }

    /// Dates the log rows of this transaction, and commits. This is the last statement before the COMMIT,
    /// because the age of a change counts from there. A change that should have such rows and has none is undone:
    /// no agent would ever learn of it.
    pub(super) async fn commit_change(mut self, request_id: Option<&str>) -> Result<(), StoreError> {
        let dating = sqlx::query("UPDATE invalidations SET committed_at = ?1, request_id = ?2 WHERE id > ?3")
            .bind(now().0)
            .bind(request_id)
            .bind(self.log_end);
        if self.run(dating).await? == 0 && self.is_news {
            return Err(StoreError::Unlogged { action: self.action });
        }
        self.commit().await
    }

    /// Commits in a task of its own. What comes back as an error is [`StoreError::Unknown`], unless it is
    /// certain that nothing was committed: a store that isn't where it was opened is left as it was.
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        let Self { transaction, place, health, action, .. } = self;
        let is_in_place = || place.as_ref().map_or(Ok(()), |place| place.check());
        is_in_place()?;
        let outcome = tokio::spawn(transaction.commit()).await;
        // The task itself is lost only with the runtime.
        let Err(source) = outcome.unwrap_or(Err(sqlx::Error::WorkerCrashed)) else {
            health.state().failure = None;
            // Moved away while it was committed, perhaps: then nobody will find it where the store belongs.
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

/// Says what failed.
pub(super) fn failed(action: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { action, source }
}

/// SQLite's primary result code, if the error came from SQLite.
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

    async fn add_workspace(write: &mut Write) {
        write.run(sqlx::query("INSERT INTO workspaces (id) VALUES ('ws_1')")).await.unwrap();
    }

    async fn workspaces(writer: &SqlitePool) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM workspaces").fetch_one(writer).await.unwrap()
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_during_the_commit_does_not_cancel_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        let mut write = Write::begin(&store.connections.writer, "test").await.unwrap();
        add_workspace(&mut write).await;
        {
            let mut commit = pin!(write.commit());
            poll_fn(|context| {
                assert!(commit.as_mut().poll(context).is_pending());
                Poll::Ready(())
            })
            .await;
        }
        // The writer is free again only when the COMMIT has ended.
        assert_eq!(workspaces(&store.connections.writer.pool).await, 1);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_before_the_commit_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        let mut write = Write::begin(&store.connections.writer, "test").await.unwrap();
        add_workspace(&mut write).await;
        drop(write);
        assert_eq!(workspaces(&store.connections.writer.pool).await, 0);
    }

    #[tokio::test]
    async fn a_commit_that_breaks_a_constraint_is_known_to_have_changed_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        let mut write = Write::begin(&store.connections.writer, "test").await.unwrap();
        write.run(sqlx::query("PRAGMA defer_foreign_keys = ON")).await.unwrap();
        let orphan = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_none', 'orphan')";
        write.run(sqlx::query(orphan)).await.unwrap();
        assert!(matches!(write.commit().await, Err(StoreError::Database { .. })));
        store.writable().unwrap();
        store.head().await.unwrap();
        drop(Write::begin(&store.connections.writer, "test").await.unwrap());
    }

    #[tokio::test]
    async fn a_connection_that_turns_out_to_be_read_only_is_told_of_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        store.writable().unwrap();
        // As it is when the file can't be written to while it is opened.
        sqlx::query("PRAGMA query_only = ON").execute(&store.connections.writer.pool).await.unwrap();
        let error = Write::begin(&store.connections.writer, "test").await.err().unwrap();
        let StoreError::Database { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(result_code(&source), Some(READONLY));
        let told = store.writable().unwrap_err().to_string();
        assert!(told.contains("readonly"), "{told}");

        let mut write = Write::begin(&store.connections.writer, "test").await.unwrap();
        add_workspace(&mut write).await;
        assert!(store.writable().is_err(), "nothing was committed yet");
        write.commit().await.unwrap();
        store.writable().unwrap();
    }

    #[tokio::test]
    async fn a_full_disk_leaves_the_store_usable() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        // Becomes the present size, for this connection only: it ends when the store replaces it.
        sqlx::query("PRAGMA max_page_count = 1").execute(&store.connections.writer.pool).await.unwrap();
        let large =
            "INSERT INTO audit_log (time, workspace_id, event, actor_type, actor_id, targets, description)
                     VALUES (0, '', '', '', '', '[]', hex(zeroblob(60000)))";
        let mut write = Write::begin(&store.connections.writer, "test").await.unwrap();
        let error = write.run(sqlx::query(large)).await.unwrap_err();
        let StoreError::Database { source, .. } = error else { panic!("{error:?}") };
        assert_eq!(result_code(&source), Some(FULL));
        drop(write);

        let mut write = Write::begin(&store.connections.writer, "test").await.unwrap();
        write.run(sqlx::query(large)).await.unwrap();
        write.commit().await.unwrap();
    }
}
