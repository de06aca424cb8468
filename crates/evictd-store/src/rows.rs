//! Reading rows, whichever driver fetched them.

use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use serde::Deserialize;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;

use crate::error::StoreError;

/// A row of a query. A column that doesn't have the type asked for is an error; so is NULL, unless the method's
/// name says `optional`.
pub(crate) trait Columns {
    fn optional_integer(&self, name: &'static str) -> Result<Option<i64>, StoreError>;

    fn optional_text(&self, name: &'static str) -> Result<Option<&str>, StoreError>;

    fn optional_bytes(&self, name: &'static str) -> Result<Option<&[u8]>, StoreError>;

    fn flag(&self, name: &'static str) -> Result<bool, StoreError>;

    fn integer(&self, name: &'static str) -> Result<i64, StoreError> {
        self.optional_integer(name)?.ok_or_else(|| absent(name))
    }

    fn text(&self, name: &'static str) -> Result<&str, StoreError> {
        self.optional_text(name)?.ok_or_else(|| absent(name))
    }

    fn bits(&self, name: &'static str) -> Result<u64, StoreError> {
        self.integer(name).map(i64::cast_unsigned)
    }

    /// A copy of a column of text.
    fn optional_string(&self, name: &'static str) -> Result<Option<String>, StoreError> {
        Ok(self.optional_text(name)?.map(str::to_owned))
    }

    fn string(&self, name: &'static str) -> Result<String, StoreError> {
        self.text(name).map(str::to_owned)
    }

    /// A column of microseconds.
    fn time(&self, name: &'static str) -> Result<StoreTime, StoreError> {
        self.integer(name).map(StoreTime)
    }

    /// A column of milliseconds.
    fn millis(&self, name: &'static str) -> Result<StoreTime, StoreError> {
        self.integer(name).map(StoreTime::from_millis)
    }

    /// A column of milliseconds.
    fn optional_millis(&self, name: &'static str) -> Result<Option<StoreTime>, StoreError> {
        Ok(self.optional_integer(name)?.map(StoreTime::from_millis))
    }

    fn position(&self, epoch: &'static str, position: &'static str) -> Result<LogPosition, StoreError> {
        log_position(self.integer(epoch)?, self.integer(position)?)
    }

    /// A column that holds a JSON list. `owner` is the record whose list it is, for the error.
    fn list<T: for<'a> Deserialize<'a>>(
        &self,
        name: &'static str,
        owner: &str,
    ) -> Result<Vec<T>, StoreError> {
        serde_json::from_str(self.text(name)?)
            .map_err(|_| StoreError::Corrupt { what: name, value: format!("that of {owner}") })
    }
}

impl Columns for SqliteRow {
    fn optional_integer(&self, name: &'static str) -> Result<Option<i64>, StoreError> {
        self.try_get(name).map_err(unreadable)
    }

    fn optional_text(&self, name: &'static str) -> Result<Option<&str>, StoreError> {
        self.try_get(name).map_err(unreadable)
    }

    fn optional_bytes(&self, name: &'static str) -> Result<Option<&[u8]>, StoreError> {
        self.try_get(name).map_err(unreadable)
    }

    fn flag(&self, name: &'static str) -> Result<bool, StoreError> {
        self.try_get(name).map_err(unreadable)
    }
}

impl Columns for PgRow {
    /// Epochs are INTEGER, all other numbers BIGINT.
    fn optional_integer(&self, name: &'static str) -> Result<Option<i64>, StoreError> {
        let wide = self.try_get::<Option<i64>, _>(name);
        wide.or_else(|error| {
            self.try_get::<Option<i32>, _>(name).map(|narrow| narrow.map(i64::from)).map_err(|_| error)
        })
        .map_err(unreadable)
    }

    fn optional_text(&self, name: &'static str) -> Result<Option<&str>, StoreError> {
        self.try_get(name).map_err(unreadable)
    }

    fn optional_bytes(&self, name: &'static str) -> Result<Option<&[u8]>, StoreError> {
        self.try_get(name).map_err(unreadable)
    }

    fn flag(&self, name: &'static str) -> Result<bool, StoreError> {
        self.try_get(name).map_err(unreadable)
    }
}

fn unreadable(source: sqlx::Error) -> StoreError {
    StoreError::Database { action: "read a row", source }
}

fn absent(what: &'static str) -> StoreError {
    StoreError::Corrupt { what, value: "NULL".to_owned() }
}

/// A place in the log, from two columns.
pub(crate) fn log_position(epoch: i64, position: i64) -> Result<LogPosition, StoreError> {
    u32::try_from(epoch)
        .ok()
        .zip(u64::try_from(position).ok())
        .and_then(|(epoch, position)| LogPosition::new(epoch, position))
        .ok_or_else(|| StoreError::Corrupt { what: "log position", value: format!("{epoch}.{position}") })
}

/// For LIMIT. A number that doesn't fit means all rows.
pub(crate) fn sql_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}
