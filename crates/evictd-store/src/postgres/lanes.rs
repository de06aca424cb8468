//! The connections to the server, and which work may delay which (R10).
//!
//! The work that agents' leases depend on waits neither for lookups nor for the control API: each kind of work has a
//! [`Lane`] of its own. The lane `log` has a connection for each task that uses it. Changes run side by side, and the
//! server orders them.
//!
//! The lanes aren't a `sqlx::Pool`, because a server may freeze or vanish silently. Here every statement has a time limit
//! on the client too, and a connection whose statement didn't end is dropped. A connection that turns out to be dead when
//! it is reused is replaced where that is safe: for statements that only read, and for BEGIN.

use std::fmt;
use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgArguments, PgConnection, PgRow, Postgres};
use sqlx::query::Query;
use sqlx::{Connection, Executor, SqlSafeStr};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::errors::{ends_connection, failed, is_timeout, timed_out};
use super::options::PostgresOptions;
use crate::error::StoreError;

/// A statement with its parameters.
pub(super) type Statement = Query<'static, Postgres, PgArguments>;

/// How much longer than the server the client waits for a statement: the server's own error says more.
const GRACE: Duration = Duration::from_secs(2);

/// How long a caller waits for its turn.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection that was idle for longer isn't reused: a device in between may have dropped it.
const IDLE_MAX: Duration = Duration::from_mins(2);

const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections for the log. The sequencer, rounds and receipts have a task each, which may run two statements at once.
const LOG: u32 = 4;
const REPLAYS: u32 = 2;
const AUTHENTICATIONS: u32 = 1;

/// All connections of a store.
#[derive(Debug)]
pub(super) struct Lanes {
    /// For rounds, numbering, receipts, and what the sequencer reads.
    pub(super) log: Lane,
    pub(super) replays: Lane,
    pub(super) lookups: Lane,
    /// For the control API's reads.
    pub(super) records: Lane,
    /// For root keys: a client's reads must not delay the authentication of others.
    pub(super) authentications: Lane,
    /// For the control API's changes.
    pub(super) changes: Lane,
}

impl Lanes {
    /// Creates the lanes. They connect on first use.
    pub(super) fn new(options: PostgresOptions) -> Self {
        let rest = options.connections.saturating_sub(LOG + REPLAYS + AUTHENTICATIONS).max(3);
        let (lookups, records) = ((rest / 4).max(1), (rest / 6).max(1));
        let options = Arc::new(options);
        Self {
            log: Lane::new(&options, LOG),
            replays: Lane::new(&options, REPLAYS),
            lookups: Lane::new(&options, lookups),
            records: Lane::new(&options, records),
            authentications: Lane::new(&options, AUTHENTICATIONS),
            changes: Lane::new(&options, rest - lookups - records),
        }
    }

    /// Waits for running statements, then closes all connections.
    pub(super) async fn close(&self) {
        let Self { log, replays, lookups, records, authentications, changes } = self;
        for lane in [changes, records, authentications, lookups, replays, log] {
            lane.close().await;
        }
    }
}

/// Connections of one kind, at most a fixed number.
#[derive(Clone)]
pub(super) struct Lane(Arc<LaneState>);

struct LaneState {
    options: Arc<PostgresOptions>,
    size: u32,
    places: Arc<Semaphore>,
    /// Since when each connection is idle. The last one is reused first.
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
        Self(Arc::new(LaneState { options: options.clone(), size, places, idle: Mutex::default() }))
    }

    /// Returns how many statements run at once.
    pub(super) fn size(&self) -> usize {
        self.0.size as usize
    }

    pub(super) fn options(&self) -> &PostgresOptions {
        &self.0.options
    }

    /// Returns a connection in bounded time.
    pub(super) async fn session(&self) -> sqlx::Result<LaneSession> {
        let place = timeout(ACQUIRE_TIMEOUT, self.0.places.clone().acquire_owned())
            .await
            .map_err(|_| sqlx::Error::PoolTimedOut)?
            .map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.0.pop_idle();
        let is_reused = idle.is_some();
        let connection = match idle {
            Some(connection) => connection,
            None => self.0.options.connect().await?,
        };
        let time_limit = self.0.options.statement_timeout + GRACE;
        Ok(LaneSession {
            lane: self.clone(),
            connection: Some(connection),
            is_reused,
            time_limit,
            _place: place,
        })
    }

    /// Returns the rows of a statement that only reads. It may run twice.
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

    /// Returns the first row of a statement that only reads. It may run twice.
    pub(super) async fn row(
        &self,
        action: &'static str,
        statement: impl Fn() -> Statement,
    ) -> Result<Option<PgRow>, StoreError> {
        Ok(self.rows(action, statement).await?.into_iter().next())
    }

    /// Waits for running statements. Later calls fail.
    pub(super) async fn close(&self) {
        drop(self.0.places.acquire_many(self.0.size).await);
        self.0.places.close();
        let idle = std::mem::take(&mut *self.0.idle());
        for (connection, _) in idle {
            drop(timeout(CLOSE_TIMEOUT, connection.close()).await);
        }
    }
}

impl LaneState {
    fn idle(&self) -> MutexGuard<'_, Vec<(PgConnection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pop_idle(&self) -> Option<PgConnection> {
        let mut idle = self.idle();
        idle.retain(|(_, since)| since.elapsed() < IDLE_MAX);
        idle.pop().map(|(connection, _)| connection)
    }
}

/// A connection in use, and its place in the lane. Dropping it makes the connection idle.
pub(super) struct LaneSession {
    lane: Lane,
    /// `None` while a statement runs: if its caller is dropped or its time is over, the connection is dropped with it, and
    /// the server rolls back.
    connection: Option<PgConnection>,
    /// Whether the connection was idle before, and may have died since.
    is_reused: bool,
    /// For each statement.
    time_limit: Duration,
    _place: OwnedSemaphorePermit,
}

impl LaneSession {
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

    /// Runs a command without parameters and result.
    pub(super) async fn command(&mut self, command: impl SqlSafeStr + Send) -> sqlx::Result<()> {
        let mut connection = self.take()?;
        let outcome = self.bounded(connection.execute(command.into_sql_str())).await;
        self.keep(connection, outcome).map(drop)
    }

    /// Raises the time limit of later statements.
    pub(super) fn allow(&mut self, limit: Duration) {
        self.time_limit = self.time_limit.max(limit + GRACE);
    }

    /// Whether `error` only shows that the connection had died before it was reused. Never after a timeout: the next
    /// connection would time out too.
    pub(super) fn was_dead(&self, error: &sqlx::Error) -> bool {
        self.is_reused && self.connection.is_none() && !is_timeout(error)
    }

    pub(super) fn is_usable(&self) -> bool {
        self.connection.is_some()
    }

    /// Drops the connection, and with it an unfinished transaction.
    pub(super) fn discard(mut self) {
        self.connection = None;
    }

    fn take(&mut self) -> sqlx::Result<PgConnection> {
        self.connection.take().ok_or_else(|| io::Error::from(ErrorKind::NotConnected).into())
    }

    async fn bounded<T>(&self, statement: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
        timeout(self.time_limit, statement).await.unwrap_or_else(|_| Err(timed_out()))
    }

    fn keep<T>(&mut self, connection: PgConnection, outcome: sqlx::Result<T>) -> sqlx::Result<T> {
        match &outcome {
            Err(error) if ends_connection(error) => {
                if is_timeout(error) {
                    // The idle ones would time out too.
                    self.lane.0.idle().clear();
                }
            }
            _ => self.connection = Some(connection),
        }
        outcome
    }
}

impl Drop for LaneSession {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.lane.0.idle().push((connection, Instant::now()));
        }
    }
}
