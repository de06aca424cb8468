//! The home store: the truth about keys, and the log of what changed, in one database.
//!
//! A change, its audit record and its log row are one transaction. Rows enter the log through the
//! database's own triggers, so that a change made past the API is published like any other (R1, R3).
//!
//! * [`HomeStore`]: what the publisher needs of a store.
//! * [`change`]: the changes of the control API, and why one is refused.
//! * [`log`]: numbered rows, rounds, replays.
//! * [`sqlite`]: the embedded store.

pub mod change;
pub mod log;
pub mod sqlite;

use std::path::PathBuf;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::record::{Lookup, RootKeyRecord};
use evictd_core::roster::Instance;

use crate::change::{
    Actor, Api, Authorize, ChangeError, DeleteMode, KeyDetails, NewApi, NewKey, NewRootKey, RootKeyInfo,
};
use crate::log::{Backlog, Numbered, Replay, Round};

/// The database refused, broke or couldn't be reached. Nothing was changed, unless `unknown`.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database can't be opened or created.
    #[error("the home store {} can't be opened: {advice}", path.display())]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// What to do about it.
        advice: &'static str,
        /// What the system or the driver said.
        #[source]
        source: sqlx::Error,
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
    /// The schema couldn't be brought up to date.
    #[error("the home store's schema couldn't be migrated")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// Something stored can't be read back.
    #[error("the home store holds an invalid {what}: {value}")]
    Corrupt {
        /// Which column or table.
        what: &'static str,
        /// The offending value; never a secret.
        value: String,
    },
    /// The triggers that feed the log (R3) are missing or were altered.
    #[error(
        "the home store lacks the trigger {name}: a change past the API would go unpublished; run `evictd publisher` on an intact schema"
    )]
    TriggerMissing {
        /// Which one.
        name: String,
    },
}

/// What the publisher needs of a home store. One conformance suite holds for every implementation.
#[async_trait]
pub trait HomeStore: Send + Sync + 'static {
    /// Gives every committed row without a position the next ones, at most `limit` (R1).
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError>;

    /// One probe round (R7), in one durable transaction: writes `instances` that the roster lacks (R11),
    /// begins a new epoch if one of `seen` credibly lies above the head (R2), numbers every committed row,
    /// and raises the fence, which a demoted primary can't do. It never waits behind the control API's
    /// changes: leases depend on it.
    async fn round(&self, instances: &[Instance], seen: &[LogPosition]) -> Result<Round, StoreError>;

    /// The rows `from..=to` of `epoch`, or a prefix of at most `limit`; refused when the store can't
    /// cover even the first completely (R5).
    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError>;

    /// What `hash` stands for, with the head read in the same snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError>;

    /// The head, read alone.
    async fn head(&self) -> Result<LogPosition, StoreError>;

    /// What waits for a position.
    async fn backlog(&self) -> Result<Backlog, StoreError>;

    /// Turns keys and root keys whose expiry has passed on the store's clock into expired ones, at most
    /// `limit`; each becomes a row of the log. Returns how many.
    async fn expire(&self, limit: usize) -> Result<u64, StoreError>;

    /// A number that changes when any connection commits anything: the sequencer's cue for changes made
    /// past the API.
    async fn version(&self) -> Result<i64, StoreError>;

    /// Checks that the log's triggers are in place and unaltered (R3).
    async fn check_triggers(&self) -> Result<(), StoreError>;

    /// The root key with this hash, whatever its state.
    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError>;

    /// Stores a root key, and the workspace if it is new.
    async fn create_root_key(&self, root_key: NewRootKey) -> Result<(), StoreError>;

    /// Whether anybody can call the control API.
    async fn has_root_keys(&self) -> Result<bool, StoreError>;

    /// All root keys, newest first, without their hashes.
    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError>;

    /// Creates an API.
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError>;

    /// A live API of this workspace.
    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError>;

    /// Creates a key in a live API of the actor's workspace.
    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError>;

    /// A live key of this workspace, in a live API.
    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError>;

    /// Deletes a live key. Existence is judged before permission: a foreign or deleted key is
    /// [`ChangeError::KeyNotFound`] even to those who may not delete (unkey-wire contract).
    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Deletes a live API: one row of the log, however many keys it has.
    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError>;
}
