//! A transaction, and a COMMIT that a dropped caller can't cancel (R4).
//!
//! A caller that goes away before the COMMIT leaves nothing behind: the transaction is rolled back. From
//! the COMMIT on the outcome no longer depends on the caller, who alone may miss it.
//!
//! `statement_timeout` ends no COMMIT: PostgreSQL stops that clock before it commits. What remains is that this
//! side stops waiting, that the connection breaks, or that an operator cancels the wait for a synchronous standby;
//! each is [`StoreError::Unknown`].

use std::io;
use std::time::Duration;

use sqlx::postgres::{PgRow, Postgres};
use sqlx::{AssertSqlSafe, Decode, Row, Type};
use tokio::runtime::Handle;

use super::connections::{Lane, Session, Statement, failed, sql_state};
use super::{notices, schema};
use crate::error::StoreError;

/// Who writes.
#[derive(Clone, Copy)]
pub(super) enum By<'a> {
    /// A publisher, for itself.
    Publisher,
    /// A request of the control API, which wakes its own publisher. The commit is spared the lock that NOTIFY takes.
    Request(&'a str),
    /// A request of an operator, whose process is no publisher: all of them are told.
    Operator(&'a str),
}

impl By<'_> {
    /// Begins the transaction, and tells the triggers what they don't know. What numbering and success rest on is set
    /// here, whatever was set before for the session, and whoever had it: rows that can't be seen are an error
    /// (R1), and the commit is durable (R4, R7), on the synchronous standbys too, if there are any.
    fn begin(self) -> String {
        const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL row_security = off;
            SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)";
        const UNTOLD: &str = "SET LOCAL evictd.control_api = on";
        // Whatever standard_conforming_strings says.
        let literal = |id: &str| format!("E'{}'", id.replace('\\', r"\\").replace('\'', r"\'"));
        match self {
            Self::Publisher => format!("{BEGIN}; {UNTOLD}"),
            Self::Request(id) => format!("{BEGIN}; {UNTOLD}; SET LOCAL evictd.request_id = {}", literal(id)),
            Self::Operator(id) => format!("{BEGIN}; SET LOCAL evictd.request_id = {}", literal(id)),
        }
    }
}

/// A transaction at the isolation level that numbering rests on: each statement sees what was committed before
/// it (R1).
pub(super) struct Write {
    /// Gone once the COMMIT has begun.
    session: Option<Session>,
    /// What for, in error messages.
    action: &'static str,
    /// Whether the log must have a row of it.
    is_news: bool,
}

impl Write {
    /// Begins a transaction.
    pub(super) async fn begin(lane: &Lane, action: &'static str, by: By<'_>) -> Result<Self, StoreError> {
        let pin = lane.schema().map_or_else(String::new, schema::pin_transaction);
        let begin = format!("{}; {pin}", by.begin());
        loop {
            let mut session = lane.session().await.map_err(failed(action))?;
            match session.command(AssertSqlSafe(begin.clone())).await {
                Ok(()) => return Ok(Self { session: Some(session), action, is_news: false }),
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

    /// Runs a statement whose error is to be looked at.
    pub(super) async fn try_run(&mut self, statement: Statement) -> sqlx::Result<u64> {
        self.session()?.run(statement).await
    }

    /// All rows of a statement.
    pub(super) async fn rows(&mut self, statement: Statement) -> Result<Vec<PgRow>, StoreError> {
        let action = self.action;
        let rows = async { self.session()?.rows(statement).await };
        rows.await.map_err(failed(action))
    }

    /// The first row of a statement.
    pub(super) async fn row(&mut self, statement: Statement) -> Result<Option<PgRow>, StoreError> {
        Ok(self.rows(statement).await?.into_iter().next())
    }

    /// The first value of a statement's first row.
    pub(super) async fn value<T>(&mut self, statement: Statement) -> Result<Option<T>, StoreError>
    where
        T: for<'r> Decode<'r, Postgres> + Type<Postgres>,
    {
        let row = self.row(statement).await?;
        row.map(|row| row.try_get(0)).transpose().map_err(failed(self.action))
    }

    /// Gives the statements that follow more time than usual.
    pub(super) async fn take_time(&mut self, limit: Duration) -> Result<(), StoreError> {
        let set = sqlx::query("SELECT set_config('statement_timeout', $1, true)");
        self.run(set.bind(limit.as_millis().to_string())).await?;
        let action = self.action;
        self.session().map_err(failed(action))?.wait_for(limit);
        Ok(())
    }

    /// What was just changed is read by verifications, so that the triggers must have told the log (R3).
    pub(super) fn expect_news(&mut self) {
        self.is_news = true;
    }

    /// Dates the log rows of this transaction, and commits. This is the last statement before the COMMIT,
    /// because the age of a change counts from there. A change that should have such rows and has none is undone:
    /// no agent would ever learn of it.
    pub(super) async fn commit_change(mut self) -> Result<(), StoreError> {
        let dating = sqlx::query(
            "UPDATE ONLY invalidations SET committed_at = evictd_now()
             WHERE xact = pg_current_xact_id() AND position IS NULL",
        );
        if self.run(dating).await? == 0 && self.is_news {
            return Err(StoreError::Unlogged { action: self.action });
        }
        self.commit().await
    }

    /// Commits in a task of its own. What comes back as an error is [`StoreError::Unknown`], unless it is
    /// certain that nothing was committed.
    pub(super) async fn commit(mut self) -> Result<(), StoreError> {
        let action = self.action;
        let Some(mut session) = self.session.take() else {
            return Err(failed(action)(sqlx::Error::PoolClosed));
        };
        let commit = tokio::spawn(async move { notices::listening(session.command("COMMIT")).await });
        // The task itself is lost only with the runtime.
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

    fn session(&mut self) -> sqlx::Result<&mut Session> {
        self.session.as_mut().ok_or(sqlx::Error::PoolClosed)
    }
}

/// Rolls back what wasn't committed.
impl Drop for Write {
    fn drop(&mut self) {
        let Some(mut session) = self.session.take().filter(Session::is_alive) else { return };
        let Ok(runtime) = Handle::try_current() else { return session.discard() };
        runtime.spawn(async move {
            if session.command("ROLLBACK").await.is_err() {
                session.discard();
            }
        });
    }
}

/// Whether a COMMIT that ended so has certainly changed nothing: a constraint, or a conflict with another
/// transaction, ended it.
fn changed_nothing(error: &sqlx::Error) -> bool {
    sql_state(error).is_some_and(|code| code.starts_with("23") || matches!(&*code, "40001" | "40P01"))
}

/// The constraint that a statement violated by repeating what must be unique.
pub(super) fn repeated(error: &sqlx::Error) -> Option<&str> {
    let error = error.as_database_error().filter(|error| error.is_unique_violation())?;
    error.constraint()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_told_to_the_triggers_whatever_it_is_called() {
        let begin = By::Operator(r"it's\ odd").begin();
        assert!(begin.ends_with(r"SET LOCAL evictd.request_id = E'it\'s\\ odd'"), "{begin}");
    }
}
