//! The errors of a home store.

use std::error::Error as _;
use std::path::PathBuf;

use evictd_core::limits::{EPOCH_MAX, POSITION_MAX};

use crate::{postgres, sqlite};

/// A call that failed. Nothing was changed, except perhaps with [`StoreError::Unknown`].
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the home store {place} can't be opened: {advice}")]
    Open {
        /// A path, or a URL without its password.
        place: String,
        advice: &'static str,
        /// Whether the configuration names a place that can't be a home store.
        is_permanent: bool,
        #[source]
        source: sqlx::Error,
    },
    #[error(
        "another publisher uses the home store {}: stop that one first, or give this one a store of its own (`store.path`)",
        path.display()
    )]
    InUse { path: PathBuf },
    /// The database refused a call, or didn't answer.
    #[error("the home store failed to {action}")]
    Database {
        action: &'static str,
        #[source]
        source: sqlx::Error,
    },
    /// A COMMIT didn't report its outcome (R4): the change may or may not be there.
    #[error("the home store didn't report whether it committed to {action}; check before you repeat it")]
    Unknown {
        action: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error(
        "{} isn't the file that was opened: it was moved, replaced or removed; put it back, or restart evictd to use what is there now",
        path.display()
    )]
    Misplaced {
        /// The store's file, or one that belongs to it.
        path: PathBuf,
    },
    /// The last write failed, see [`LogStore::writable`](crate::log::LogStore::writable).
    #[error("the home store can't be written to: {cause}")]
    Unwritable { cause: String },
    #[error("the home store's schema couldn't be migrated")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    #[error(
        "the home store {place} doesn't have this version's schema, and this user may not change it: run `evictd migrate` as the owner of its database"
    )]
    NotMigrated { place: String },
    /// The database that an agent reads is neither home nor a streaming replica of it.
    #[error(
        "the database holds a copy of the home store, made by another server or a dump: the age that it shows proves nothing. Read the home database or a streaming replica of it, never a logical one; a restored copy can be read once a publisher has begun its epoch"
    )]
    NotAReplica,
    #[error("the home store holds an invalid {what}: {value}")]
    Corrupt {
        /// A column or table.
        what: &'static str,
        /// Never a secret.
        value: String,
    },
    #[error(
        "the home store has used up its {EPOCH_MAX} epochs, so that none can begin: copy workspaces, root_keys, apis and keys into a new store, start the publishers on that one, and restart the agents"
    )]
    EpochsUsedUp,
    #[error(
        "the home store's log has used up its {POSITION_MAX} positions, so that no change can get one: copy workspaces, root_keys, apis and keys into a new store, start the publishers on that one, and restart the agents"
    )]
    PositionsUsedUp,
    /// A change that verifications read got no row in the log (R3), and was undone.
    #[error(
        "the home store couldn't {action}: its log got no row for the change, so its triggers are disabled or altered. Nothing was changed; restore the triggers, then repeat it"
    )]
    Unlogged { action: &'static str },
    /// A trigger that writes the log (R3) is missing or altered.
    #[error(
        "the home store's trigger {name} is missing, disabled or altered: a change outside the API would not be published. Restore it; on PostgreSQL, with ENABLE ALWAYS"
    )]
    TriggerMissing {
        /// One or more names.
        name: String,
    },
    /// An object on the store's tables that isn't evictd's. It may keep a change out of the log, or rows from readers (R3).
    #[error(
        "the home store's tables have an object that isn't evictd's ({name}), so a change may not be published; the owner of the tables must run: {remedy}"
    )]
    ForeignObject {
        /// Its kind and name.
        name: String,
        /// The statement that removes it.
        remedy: String,
    },
    /// The schema that has `log_head` lacks other tables.
    #[error(
        "the home store {place} isn't complete: the first schema with a table log_head is {schema}, which lacks the tables {tables}; drop that log_head if it isn't evictd's, or name evictd's schema in the URL (?options[search_path]=...)"
    )]
    TablesMissing { place: String, schema: String, tables: String },
    /// The database's user lacks rights that publishers need.
    #[error("the home store's user lacks rights; the owner of the tables must run: {grants}")]
    RightMissing {
        /// The statements that give them.
        grants: String,
    },
}

impl StoreError {
    /// Whether the store can't be opened with this configuration and this version of evictd, however long one waits.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Open { is_permanent, .. } => *is_permanent,
            Self::Migrate(_) => self.is_foreign_schema(),
            Self::EpochsUsedUp | Self::PositionsUsedUp => true,
            _ => false,
        }
    }

    /// Whether another version of evictd made the store's schema. Other failures of a migration have a source, the
    /// database's error.
    pub fn is_foreign_schema(&self) -> bool {
        matches!(self, Self::Migrate(error) if error.source().is_none())
    }

    /// Whether the store works, and the call waited too long for others. The same call may succeed later.
    pub fn is_busy(&self) -> bool {
        let Self::Database { source, .. } = self else { return false };
        matches!(source, sqlx::Error::PoolTimedOut) || sqlite::is_busy(source) || postgres::is_busy(source)
    }
}
