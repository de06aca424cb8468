//! Empties the write-ahead log, for the sake of what was erased.
//!
//! SQLite folds that log back into the file by itself, and then writes over it from its beginning. But once a reader
//! has let it grow, what lies behind that beginning may stay there for good: the pages of keys that are long gone.

use std::time::Duration;

use sqlx::Row;
use sqlx::sqlite::SqlitePool;

use super::write::failed;
use crate::error::StoreError;

/// How long the log's end is waited for: nobody may write meanwhile, and rounds are writes.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

/// Folds the log into the file and cuts it to nothing. False if somebody was reading or writing for all of
/// [`PATIENCE`], and it is to be tried again.
pub(super) async fn empty_log(connection: &SqlitePool) -> Result<bool, StoreError> {
    const ACTION: &str = "empty its write-ahead log";
    // Most of the work first, beside everybody else's.
    for pragma in ["PRAGMA wal_checkpoint(PASSIVE)", "PRAGMA wal_checkpoint(TRUNCATE)"] {
        let row = sqlx::query(pragma).fetch_one(connection).await.map_err(failed(ACTION))?;
        let busy: i64 = row.try_get("busy").map_err(failed(ACTION))?;
        if busy != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}
