//! Empties the write-ahead log, so that it keeps no traces of erased keys.
//!
//! SQLite copies that log into the file by itself, and then overwrites it from its beginning. But once a reader has let
//! it grow, the pages behind that beginning may stay for good.

use std::time::Duration;

use sqlx::Row;
use sqlx::sqlite::SqlitePool;

use super::write::failed;
use crate::error::StoreError;

/// How long to wait for readers of the log's end. Writes, such as rounds, wait meanwhile.
pub(super) const PATIENCE: Duration = Duration::from_millis(100);

/// Copies the log into the file and truncates it. Returns false if another connection was reading or writing for all of
/// [`PATIENCE`]; then it must be tried again.
pub(super) async fn empty_log(connection: &SqlitePool) -> Result<bool, StoreError> {
    const ACTION: &str = "empty its write-ahead log";
    // Most of the work first, which blocks no other connection.
    for pragma in ["PRAGMA wal_checkpoint(PASSIVE)", "PRAGMA wal_checkpoint(TRUNCATE)"] {
        let row = sqlx::query(pragma).fetch_one(connection).await.map_err(failed(ACTION))?;
        let busy: i64 = row.try_get("busy").map_err(failed(ACTION))?;
        if busy != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}
