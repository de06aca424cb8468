//! What the driver's errors mean.

use std::borrow::Cow;
use std::io::{self, ErrorKind};

use crate::error::StoreError;

/// Returns the error of an action that failed.
pub(super) fn failed(action: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { action, source }
}

/// Returns the server's error code if the error came from the server.
pub(super) fn sql_state(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Returns the error of a server that didn't answer in time.
pub(super) fn timed_out() -> sqlx::Error {
    io::Error::new(ErrorKind::TimedOut, "the server didn't answer in time").into()
}

/// Whether the server knows no such user or password, or admits it from nowhere.
pub(super) fn refuses_login(error: &sqlx::Error) -> bool {
    sql_state(error).is_some_and(|code| matches!(&*code, "28P01" | "28000"))
}

pub(super) fn is_timeout(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == ErrorKind::TimedOut)
}

/// Whether the connection is unusable after this error.
pub(super) fn ends_connection(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(_) => sql_state(error).is_some_and(|code| {
            // The server ended it, or its transaction idled for too long, ...
            matches!(&*code, "57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "25P03" | "25P04")
                || code.starts_with("08")
                // ... or the server isn't the primary any more.
                || code == "25006"
        }),
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => true,
        _ => false,
    }
}

/// Whether a COMMIT that failed with this error certainly changed nothing: a constraint or a conflict with another
/// transaction ended it.
pub(super) fn changed_nothing(error: &sqlx::Error) -> bool {
    sql_state(error).is_some_and(|code| code.starts_with("23") || matches!(&*code, "40001" | "40P01"))
}

/// Whether a statement waited too long for a lock or for its turn, or the server has no connection left.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    sql_state(error).is_some_and(|code| matches!(&*code, "55P03" | "57014" | "53300" | "40001" | "40P01"))
}

/// Returns the unique constraint that a statement violated.
pub(super) fn violated_unique(error: &sqlx::Error) -> Option<&str> {
    let error = error.as_database_error().filter(|error| error.is_unique_violation())?;
    error.constraint()
}
