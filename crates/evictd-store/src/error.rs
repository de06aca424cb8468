//! What can go wrong in a home store.

use std::path::PathBuf;

use evictd_core::limits::{EPOCH_MAX, POSITION_MAX};

/// The database refused, broke or couldn't be reached. Nothing was changed, unless `unknown`.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database can't be opened or created.
    #[error("the home store {place} can't be opened: {advice}")]
    Open {
        /// Where it should be: a path, or a URL without its password.
        place: String,
        /// What to do about it.
        advice: &'static str,
        /// What the system or the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// Another publisher has it open.
    #[error(
        "another publisher uses the home store {}: stop that one first, or give this one a store of its own (`store.path`)",
        path.display()
    )]
    InUse {
        /// Where it is.
        path: PathBuf,
    },
    /// The database said no, or didn't answer.
    #[error("the home store failed to {action}")]
    Database {
        /// What was tried.
        action: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// A COMMIT didn't report its outcome (R4): the change may or may not be there.
    #[error("the home store didn't say whether it committed to {action}; look again before you repeat it")]
    Unknown {
        /// What was tried.
        action: &'static str,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The file isn't where it was opened. Nothing was changed.
    #[error(
        "{} isn't the file that was opened: somebody moved, replaced or removed it; put it back, or restart evictd to go on with what lies there now",
        path.display()
    )]
    Misplaced {
        /// The store's file, or one that belongs to it.
        path: PathBuf,
    },
    /// The last write has failed, see [`LogStore::writable`](crate::log::LogStore::writable).
    #[error("the home store can't be written to: {cause}")]
    Unwritable {
        /// What the driver said to that write.
        cause: String,
    },
    /// The schema couldn't be brought up to date.
    #[error("the home store's schema couldn't be migrated")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// The schema has to be brought up to date, by somebody who may.
    #[error(
        "the home store {place} doesn't have this version's schema, and this user may not change it: run `evictd migrate` as the owner of its database"
    )]
    NotMigrated {
        /// Where it is.
        place: String,
    },
    /// What an agent reads is neither the home database nor a streaming replica of it.
    #[error(
        "the database holds a copy of the home store that another server or a dump brought: what it says of its age proves nothing. Read the home database or a streaming replica of it, never a logical one; a copy that was just restored is good once a publisher has begun its epoch"
    )]
    NotAReplica,
    /// Something stored can't be read back.
    #[error("the home store holds an invalid {what}: {value}")]
    Corrupt {
        /// Which column or table.
        what: &'static str,
        /// The offending value; never a secret.
        value: String,
    },
    /// The last epoch has begun already.
    #[error(
        "the home store has used up its {EPOCH_MAX} epochs, so that none can begin: copy workspaces, root_keys, apis and keys into a new store, start the publishers on that one, and restart the agents"
    )]
    EpochsUsedUp,
    /// The last position was given.
    #[error(
        "the home store's log has used up its {POSITION_MAX} positions, so that no change can get one: copy workspaces, root_keys, apis and keys into a new store, start the publishers on that one, and restart the agents"
    )]
    PositionsUsedUp,
    /// A change that a verification reads got no row in the log (R3), and was undone.
    #[error(
        "the home store couldn't {action}: its log got no row of the change, so that its triggers are switched off or altered. Nothing was changed; put the triggers back, then repeat it"
    )]
    Unlogged {
        /// What was tried.
        action: &'static str,
    },
    /// The triggers that feed the log (R3) are missing or were altered.
    #[error(
        "the home store lacks the trigger {name}, or it is switched off or altered: a change past the API would go unpublished. Put it back as it was; on PostgreSQL it has to be enabled by ENABLE ALWAYS"
    )]
    TriggerMissing {
        /// Which ones.
        name: String,
    },
    /// Something on the store's tables isn't evictd's, and may keep a change from its log or rows from readers (R3).
    #[error(
        "the home store's tables have what isn't evictd's ({name}), so that a change may go unpublished; the owner of its tables has to say: {remedy}"
    )]
    ForeignObject {
        /// What it is, and its name.
        name: String,
        /// The statement that removes it.
        remedy: String,
    },
    /// The schema that `log_head` was found in isn't the store's.
    #[error(
        "the home store {place} isn't complete: its user finds the table log_head first in the schema {schema}, which lacks the tables {tables}; drop that log_head if it isn't evictd's, or name evictd's schema in the URL (?options[search_path]=...)"
    )]
    TablesMissing {
        /// Where it is.
        place: String,
        /// The schema.
        schema: String,
        /// Their names.
        tables: String,
    },
    /// The database's user may not do what publishers do.
    #[error("the home store's user lacks rights; the owner of its tables has to say: {grants}")]
    RightMissing {
        /// The statements that give them.
        grants: String,
    },
}
