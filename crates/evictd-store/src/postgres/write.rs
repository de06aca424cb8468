//! A transaction, and a COMMIT that survives its caller (R4).
//!
//! A caller that is dropped before the COMMIT leaves nothing behind: the transaction is rolled back. Once the COMMIT has
//! begun, the outcome doesn't depend on the caller.
//!
//! `statement_timeout` doesn't end a COMMIT: PostgreSQL stops that clock before it commits. A COMMIT fails if the client
//! stops waiting, if the connection breaks, or if an operator cancels the wait for a synchronous standby. Each is
//! [`StoreError::Unknown`].

use std::io;
use std::time::Duration;

use sqlx::postgres::{PgRow, Postgres};
use sqlx::{AssertSqlSafe, Decode, Row, Type};
use tokio::runtime::Handle;

use super::errors::{changed_nothing, failed};
use super::lanes::{Lane, LaneSession, Statement};
use super::notices;
use crate::error::StoreError;

/// The writer of a transaction.
#[derive(Clone, Copy)]
pub(super) enum By<'a> {
    Publisher,
    /// A request of the control API, with its id. It wakes its own publisher, so its commit sends no NOTIFY and is spared
    /// the lock for that.
    Request(&'a str),
    /// A request of an operator, with its id. All publishers are notified, because its process isn't one.
    Operator(&'a str),
}

impl By<'_> {
    /// Begins the transaction, and sets what the triggers read. Numbering and success need two more settings, whatever
    /// the session's are: a row that the user may not see is an error (R1), and the commit is durable (R4, R7), on
    /// synchronous standbys too.
    fn begin(self) -> String {
        const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL row_security = off;
            SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)";
        const NO_NOTIFY: &str = "SET LOCAL evictd.control_api = on";
        // Independent of standard_conforming_strings.
        let literal = |id: &str| format!("E'{}'", id.replace('\\', r"\\").replace('\'', r"\'"));
        match self {
            Self::Publisher => format!("{BEGIN}; {NO_NOTIFY}"),
            Self::Request(id) => {
                format!("{BEGIN}; {NO_NOTIFY}; SET LOCAL evictd.request_id = {}", literal(id))
            }
            Self::Operator(id) => format!("{BEGIN}; SET LOCAL evictd.request_id = {}", literal(id)),
        }
    }
}

/// A transaction. At its isolation level, each statement sees what was committed before it; numbering needs that (R1).
pub(super) struct PostgresWrite {
    /// `None` once the COMMIT has begun.
    session: Option<LaneSession>,
    /// For error messages.
    action: &'static str,
    expects_log_row: bool,
}

impl PostgresWrite {
    pub(super) async fn begin(lane: &Lane, action: &'static str, by: By<'_>) -> Result<Self, StoreError> {
        let begin = format!("{}; {}", by.begin(), lane.options().pin_transaction());
        loop {
            let mut session = lane.session().await.map_err(failed(action))?;
            match session.command(AssertSqlSafe(begin.clone())).await {
                Ok(()) => return Ok(Self { session: Some(session), action, expects_log_row: false }),
                Err(error) if session.was_dead(&error) => {}
                Err(error) => {
                    session.discard();
                    return Err(failed(action)(error));
                }
            }
        }
    }

    /// Runs a statement. Returns how many rows it changed.
    pub(super) async fn run(&mut self, statement: Statement) -> Result<u64, StoreError> {
        self.try_run(statement).await.map_err(failed(self.action))
    }

    /// Runs a statement. Returns how many rows it changed, or the driver's error.
    pub(super) async fn try_run(&mut self, statement: Statement) -> sqlx::Result<u64> {
        self.session()?.run(statement).await
    }

    /// Runs a statement that changes what verifications read: if it changes a row, the log must get one.
    pub(super) async fn run_logged(&mut self, statement: Statement) -> Result<u64, StoreError> {
        let changed = self.run(statement).await?;
        self.expects_log_row |= changed > 0;
        Ok(changed)
    }

    /// What was just changed is read by verifications, so the triggers must have written to the log (R3).
    pub(super) fn expect_log_row(&mut self) {
        self.expects_log_row = true;
    }

    pub(super) async fn rows(&mut self, statement: Statement) -> Result<Vec<PgRow>, StoreError> {
        let action = self.action;
        let rows = async { self.session()?.rows(statement).await };
        rows.await.map_err(failed(action))
    }

    /// Returns the first row.
    pub(super) async fn row(&mut self, statement: Statement) -> Result<Option<PgRow>, StoreError> {
        Ok(self.rows(statement).await?.into_iter().next())
    }

    /// Returns the first column of the first row.
    pub(super) async fn value<T>(&mut self, statement: Statement) -> Result<Option<T>, StoreError>
    where
        T: for<'r> Decode<'r, Postgres> + Type<Postgres>,
    {
        let row = self.row(statement).await?;
        row.map(|row| row.try_get(0)).transpose().map_err(failed(self.action))
    }

    /// Raises the time limit of later statements.
    pub(super) async fn allow(&mut self, limit: Duration) -> Result<(), StoreError> {
        let set = sqlx::query("SELECT set_config('statement_timeout', $1, true)");
        self.run(set.bind(limit.as_millis().to_string())).await?;
        let action = self.action;
        self.session().map_err(failed(action))?.allow(limit);
        Ok(())
    }

    /// Dates the log rows of this transaction, and commits. Dating is the last statement before the COMMIT, because the
    /// age of a change counts from there. A change that should have log rows and has none is undone: no agent would
    /// receive it.
    pub(super) async fn commit_change(mut self) -> Result<(), StoreError> {
        let dating = sqlx::query(
            "UPDATE ONLY invalidations SET committed_at = evictd_now()
             WHERE xact = pg_current_xact_id() AND position IS NULL",
        );
        if self.run(dating).await? == 0 && self.expects_log_row {
            return Err(StoreError::Unlogged { action: self.action });
        }
        self.commit().await
    }

    /// Commits in a task of its own. An error is [`StoreError::Unknown`] unless certainly nothing was committed.
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        let action = self.action;
        let Some(mut session) = self.session.take() else {
            return Err(failed(action)(sqlx::Error::PoolClosed));
        };
        let commit = tokio::spawn(async move { notices::watch(session.command("COMMIT")).await });
        // The task fails only if the runtime ends.
        match commit.await.unwrap_or((Err(sqlx::Error::WorkerCrashed), false)) {
            (Ok(()), false) => Ok(()),
            (Ok(()), true) => {
                let source = io::Error::other("the server warned that the COMMIT may be lost at a fail-over");
                Err(StoreError::Unknown { action, source: source.into() })
            }
            (Err(source), _) if changed_nothing(&source) => Err(StoreError::Database { action, source }),
            (Err(source), _) => Err(StoreError::Unknown { action, source }),
        }
    }

    fn session(&mut self) -> sqlx::Result<&mut LaneSession> {
        self.session.as_mut().ok_or(sqlx::Error::PoolClosed)
    }
}

/// Rolls back what wasn't committed.
impl Drop for PostgresWrite {
    fn drop(&mut self) {
        let Some(mut session) = self.session.take().filter(LaneSession::is_usable) else { return };
        let Ok(runtime) = Handle::try_current() else { return session.discard() };
        runtime.spawn(async move {
            if session.command("ROLLBACK").await.is_err() {
                session.discard();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_id_is_quoted_for_the_triggers() {
        let begin = By::Operator(r"it's\ odd").begin();
        assert!(begin.ends_with(r"SET LOCAL evictd.request_id = E'it\'s\\ odd'"), "{begin}");
    }
}
