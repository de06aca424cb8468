//! The connections to the server, and who may hold up whom (R10).
//!
//! Whatever an agent's lease depends on waits neither for lookups nor for the control API: each kind of work has
//! a [`Lane`] of its own, and `log` has one for each task that uses it. Changes run side by side; what they
//! have in common is the server's business.
//!
//! The lanes are no `sqlx::Pool`, because a server may also freeze, or vanish without a word. Every statement
//! here has a limit on this side, too, and a connection whose statement didn't end is dropped and not given back
//! to be waited for. A connection that turns out to be dead when it is used again is replaced without anybody
//! noticing, where that is safe: for what only reads, and for BEGIN.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgArguments, PgConnection, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::{Connection, Executor, SqlSafeStr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::PostgresOptions;
use crate::error::StoreError;

/// A statement with its parameters.
pub(super) type Statement = Query<'static, Postgres, PgArguments>;

/// How much longer than the server this side waits for a statement: the server's own error says more.
const GRACE: Duration = Duration::from_secs(2);

/// How long a caller waits for its turn.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that wasn't used for so long isn't used again: what lies between may have forgotten it.
const IDLE_MAX: Duration = Duration::from_mins(2);

/// How long a connection may take to say goodbye.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections for the log: the sequencer, rounds, and receipts have a task each, which may ask for two things.
const LOG: u32 = 4;

/// Connections for replays.
const REPLAYS: u32 = 2;

/// All connections of a store.
#[derive(Debug)]
pub(super) struct Connections {
    /// Rounds, numbering, receipts, and what the sequencer asks. They wait behind nothing else.
    pub(super) log: Lane,
    /// Replays.
    pub(super) replays: Lane,
    /// Lookups.
    pub(super) lookups: Lane,
    /// The control API's reads.
    pub(super) records: Lane,
    /// The control API's changes.
    pub(super) changes: Lane,
}

impl Connections {
    /// Connects only when it is needed.
    pub(super) fn new(options: PostgresOptions) -> Self {
        let rest = options.connections.saturating_sub(LOG + REPLAYS).max(3);
        let (lookups, records) = ((rest / 4).max(1), (rest / 6).max(1));
        let options = Arc::new(options);
        Self {
            log: Lane::new(&options, LOG),
            replays: Lane::new(&options, REPLAYS),
            lookups: Lane::new(&options, lookups),
            records: Lane::new(&options, records),
            changes: Lane::new(&options, rest - lookups - records),
        }
    }

    /// Waits for what is under way, then closes all of them.
    pub(super) async fn close(&self) {
        for lane in [&self.changes, &self.records, &self.lookups, &self.replays, &self.log] {
            lane.close().await;
        }
    }
}

/// Connections of one kind, at most a fixed number.
#[derive(Clone)]
pub(super) struct Lane(Arc<Shared>);

struct Shared {
    options: Arc<PostgresOptions>,
    size: u32,
    places: Arc<Semaphore>,
    /// The one that was used last is used next.
    idle: Mutex<Vec<(PgConnection, Instant)>>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("options", &self.0.options).field("size", &self.0.size).finish()
    }
}

impl Lane {
    pub(super) fn new(options: &Arc<PostgresOptions>, size: u32) -> Self {
        let places = Arc::new(Semaphore::new(size as usize));
        Self(Arc::new(Shared { options: options.clone(), size, places, idle: Mutex::default() }))
    }

    /// The schema that its connections look for tables in.
    pub(super) fn schema(&self) -> Option<&str> {
        self.0.options.schema()
    }

    /// A connection, in bounded time.
    pub(super) async fn session(&self) -> sqlx::Result<Session> {
        let place = timeout(ACQUIRE_TIMEOUT, self.0.places.clone().acquire_owned())
            .await
            .map_err(|_| sqlx::Error::PoolTimedOut)?
            .map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.0.pop_idle();
        let reused = idle.is_some();
        let connection = match idle {
            Some(connection) => connection,
            None => self.0.options.connect().await?,
        };
        let patience = self.0.options.statement_timeout + GRACE;
        Ok(Session { lane: self.clone(), connection: Some(connection), reused, patience, _place: place })
    }

    /// The rows of a statement that only reads; it may be asked twice.
    pub(super) async fn rows(
        &self,
        action: &'static str,
        statement: impl Fn() -> Statement,
    ) -> Result<Vec<PgRow>, StoreError> {
        loop {
            let mut session = self.session().await.map_err(failed(action))?;
            match session.rows(statement()).await {
                Err(error) if session.was_dead(&error) => {}
                outcome => return outcome.map_err(failed(action)),
            }
        }
    }

    /// The first row of a statement that only reads.
    pub(super) async fn row(
        &self,
        action: &'static str,
        statement: impl Fn() -> Statement,
    ) -> Result<Option<PgRow>, StoreError> {
        Ok(self.rows(action, statement).await?.into_iter().next())
    }

    /// Waits for what is under way. Later calls fail.
    pub(super) async fn close(&self) {
        drop(self.0.places.acquire_many(self.0.size).await);
        self.0.places.close();
        let idle = std::mem::take(&mut *self.0.idle());
        for (connection, _) in idle {
            drop(timeout(CLOSE_TIMEOUT, connection.close()).await);
        }
    }
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, Vec<(PgConnection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pop_idle(&self) -> Option<PgConnection> {
        let mut idle = self.idle();
        idle.retain(|(_, since)| since.elapsed() < IDLE_MAX);
        idle.pop().map(|(connection, _)| connection)
    }
}

/// A connection in somebody's hands, and its place in the lane.
pub(super) struct Session {
    lane: Lane,
    /// Not here while a statement runs: when its caller goes away or has waited long enough, the connection is
    /// dropped with it, and the server rolls back.
    connection: Option<PgConnection>,
    /// Whether it comes from an earlier use, and may have died since.
    reused: bool,
    /// How long a statement may take.
    patience: Duration,
    _place: OwnedSemaphorePermit,
}

impl Session {
    /// The rows of a statement.
    pub(super) async fn rows(&mut self, statement: Statement) -> sqlx::Result<Vec<PgRow>> {
        let mut connection = self.take()?;
        let outcome = self.bounded(connection.fetch_all(statement)).await;
        self.keep(connection, outcome)
    }

    /// Runs a statement. Returns how many rows it changed.
    pub(super) async fn run(&mut self, statement: Statement) -> sqlx::Result<u64> {
        let mut connection = self.take()?;
        let outcome = self.bounded(connection.execute(statement)).await;
        self.keep(connection, outcome).map(|done| done.rows_affected())
    }

    /// Runs a command that has neither parameters nor an answer.
    pub(super) async fn command(&mut self, command: impl SqlSafeStr + Send) -> sqlx::Result<()> {
        let mut connection = self.take()?;
        let outcome = self.bounded(connection.execute(command.into_sql_str())).await;
        self.keep(connection, outcome).map(drop)
    }

    /// How long statements may take from here on, if that is longer.
    pub(super) fn wait_for(&mut self, limit: Duration) {
        self.patience = self.patience.max(limit + GRACE);
    }

    /// Whether `error` only tells that the connection had died before it was used again. Never after a silence:
    /// the next one would be as silent.
    pub(super) fn was_dead(&self, error: &sqlx::Error) -> bool {
        self.reused && self.connection.is_none() && !is_time_out(error)
    }

    /// Whether it can still be used.
    pub(super) fn is_alive(&self) -> bool {
        self.connection.is_some()
    }

    /// Drops the connection, and with it what it was in the middle of.
    pub(super) fn discard(mut self) {
        self.connection = None;
    }

    fn take(&mut self) -> sqlx::Result<PgConnection> {
        self.connection.take().ok_or_else(|| io::Error::from(ErrorKind::NotConnected).into())
    }

    async fn bounded<T>(&self, statement: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
        timeout(self.patience, statement).await.unwrap_or_else(|_| Err(timed_out()))
    }

    fn keep<T>(&mut self, connection: PgConnection, outcome: sqlx::Result<T>) -> sqlx::Result<T> {
        match &outcome {
            Err(error) if ends_the_connection(error) => {
                if is_time_out(error) {
                    // They lead to the same silence.
                    self.lane.0.idle().clear();
                }
            }
            _ => self.connection = Some(connection),
        }
        outcome
    }
}

/// Gives the connection back.
impl Drop for Session {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.lane.0.idle().push((connection, Instant::now()));
        }
    }
}

/// Whether a connection can't be used any more after this error.
fn ends_the_connection(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(_) => sql_state(error).is_some_and(|code| {
            // It was told to go, or its transaction idled for too long, ...
            matches!(&*code, "57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "25P03" | "25P04")
                || code.starts_with("08")
                // ... or it leads to a server that isn't the primary any more.
                || code == "25006"
        }),
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        _ => false,
    }
}

/// The code by which the server says what is wrong, if it said so.
pub(super) fn sql_state(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// The server didn't answer in time.
pub(super) fn timed_out() -> sqlx::Error {
    io::Error::new(ErrorKind::TimedOut, "the server didn't answer in time").into()
}

fn is_time_out(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == ErrorKind::TimedOut)
}

/// Says what failed.
pub(super) fn failed(action: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { action, source }
}
