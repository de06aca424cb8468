//! The home store: the truth about keys, and the log of what changed, in one database.
//!
//! A change, its audit record and its log row are one transaction. Rows enter the log through the
//! database's own triggers, so that a change made past the API is published like any other (R1, R3).
//!
//! * [`HomeStore`]: what the publisher needs of a store.
//! * [`change`]: the changes of the control API, and why one is refused.
//! * [`log`]: numbered rows, rounds, replays.
//! * [`history`]: what a store knows of itself.
//! * [`roster`]: which agents there are.
//! * [`receipt`]: what became of a request.
//! * [`audit`]: who changed what, and what becomes of old rows.
//! * [`sqlite`]: the embedded store.
//! * [`postgres`]: the store of several publishers.

pub mod audit;
pub mod change;
pub mod history;
pub mod log;
pub mod postgres;
pub mod receipt;
pub mod roster;
mod rows;
pub mod sqlite;

use std::collections::HashSet;
use std::path::PathBuf;

use async_trait::async_trait;
use evictd_core::history::{History, LogToken, RoundToken};
use evictd_core::ids::{ApiId, Identity, KeyHash, KeyId, WorkspaceId};
use evictd_core::limits::{EPOCH_MAX, POSITION_MAX};
use evictd_core::position::LogPosition;
use evictd_core::record::{Lookup, RootKeyRecord};
use evictd_core::time::StoreTime;

use crate::audit::{AuditQuery, AuditRecord, Purge, Purged};
use crate::change::{
    Actor, Api, Authorize, ChangeError, DeleteMode, KeyDetails, KeyPage, KeyUpdate, ListKeys, NewApi, NewKey,
    NewRootKey, Operator, Reroll, RootKeyInfo,
};
use crate::history::VoucherKey;
use crate::log::{Backlog, Head, Numbered, NumberedRequest, Replay, Round, RoundRequest};
use crate::receipt::{FinalReceipt, Recorded};
use crate::roster::Roster;

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
    /// The last write has failed, see [`HomeStore::writable`].
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

/// What the publisher needs of a home store. One conformance suite holds for every implementation.
#[async_trait]
pub trait HomeStore: std::fmt::Debug + Send + Sync + 'static {
    /// Whether no other publisher can use it meanwhile.
    fn is_exclusive(&self) -> bool;

    /// Waits for what is under way, and lets go of the database. Later calls fail.
    async fn close(&self);

    /// Gives every committed row without a position the next ones, at most `limit` (R1), and a few more where that
    /// would take a request's rows apart.
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError>;

    /// One probe round (R7), in one durable transaction: writes `instances` that the roster lacks (R11),
    /// begins a new epoch if the database's server shows another history than the head's (R2), numbers every
    /// committed row, and draws a round token, which a demoted primary can't write. It never waits behind the
    /// control API's changes, beyond the one under way: leases depend on it.
    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError>;

    /// Begins an incarnation and an epoch because an operator says that this store is the one to follow, and may have
    /// gone back (R2, R15). All agents flush once. Returns the new head: its position goes on.
    /// [`StoreError::EpochsUsedUp`] after the last one.
    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError>;

    /// Begins an incarnation in the present epoch: what is given out from here on is taken for nothing that a copy of the
    /// store gives out (R15). An epoch, if one is due.
    async fn begin_incarnation(&self) -> Result<Head, StoreError>;

    /// Notes an epoch that an agent has proved to have seen of a history that isn't this store's: what an operator
    /// declares begins above it (R15).
    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError>;

    /// What the roster gained or changed after revision `since`; all of it for 0. Cheap when that is nothing.
    /// Who was forgotten isn't told.
    async fn roster(&self, since: u64) -> Result<Roster, StoreError>;

    /// A bound has passed since `epoch` began, so the roster is complete again.
    async fn trust_roster(&self, epoch: u32) -> Result<(), StoreError>;

    /// Notes that instances said goodbye, for other publishers to read: they may have missed it. One that asks for a
    /// proof again is there again.
    async fn part_with_instances(&self, departed: &[Identity]) -> Result<(), StoreError>;

    /// Deletes roster rows, each only if it was last seen when `gone` says: whoever was heard meanwhile stays.
    /// The roster's time may be a minute old, so an instance that was seen less than its bound and a minute
    /// ago may still hold a lease.
    async fn forget_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError>;

    /// The rows `from..=to` of `epoch`, or a prefix of at most `limit`; refused when the store can't
    /// cover even the first completely (R5).
    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError>;

    /// What `hash` stands for, with the head read in the same snapshot (R6).
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError>;

    /// The head, read alone.
    async fn head(&self) -> Result<Head, StoreError>;

    /// Which pasts this store knows (R15).
    async fn history(&self) -> Result<History, StoreError>;

    /// The key of its vouchers (R16).
    async fn voucher_key(&self) -> Result<VoucherKey, StoreError>;

    /// The token of the row at exactly `at`, or of the incarnation that began there; `None` if neither is kept.
    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError>;

    /// Whether one of the last [`history::ROUND_TOKENS_KEPT`] rounds drew `token`.
    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError>;

    /// What waits for a position.
    async fn backlog(&self) -> Result<Backlog, StoreError>;

    /// Turns keys and root keys whose expiry has passed on the store's clock into expired ones, at most
    /// `limit`; each becomes a row of the log. Returns how many.
    async fn expire(&self, limit: usize) -> Result<u64, StoreError>;

    /// An error if the last write has failed and none has succeeded since, or if the next one is known to fail:
    /// what reading alone doesn't show. Costs nothing. It turns good again by a write that succeeds, so whoever
    /// asks has to see to one.
    fn writable(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// A number that changes when any connection commits anything: the sequencer's cue for changes made
    /// past the API.
    async fn version(&self) -> Result<i64, StoreError>;

    /// Returns when the store says by itself that somebody committed something past the API. One that can't
    /// say never returns; [`HomeStore::version`] must be asked either way, because what is said may be lost.
    async fn told_of_a_change(&self);

    /// Checks that the log's triggers are in place and unaltered (R3), and that publishers have all rights they need.
    async fn check_triggers(&self) -> Result<(), StoreError>;

    /// The root key with this hash, whatever its state.
    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError>;

    /// Stores a root key, and the workspace if it is new.
    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError>;

    /// Marks a root key as deleted, which every agent learns like any other deletion. False if there is no
    /// such root key, or it was deleted before.
    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError>;

    /// Protects a live API from deletion, or lifts that. False if there is no such API.
    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError>;

    /// Audit records, newest first.
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError>;

    /// Deletes what is old enough to go. A prefix of the log in the order of positions: never a row from its
    /// middle. Called again until it finds nothing.
    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError>;

    /// Keeps final receipts, all or none. The first one of a request stays: several publishers may have
    /// finished the same, and what was answered once is answered again. Of a change that the store doesn't hold none is kept.
    /// Returns the requests for which none was kept now. Rounds
    /// wait for it meanwhile: a thousand at once are well, a hundred thousand aren't.
    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError>;

    /// What became of a request of this workspace; `None` if it carried out no such request.
    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<Recorded>, StoreError>;

    /// The numbered rows of requests without a final receipt, after a position, at most `limit`, in order of
    /// position: what a publisher has to go on with that starts, or stands in for another. Cheap however long
    /// the log is.
    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError>;

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

    /// Live keys of a live API of this workspace; `None` if there is no such API.
    async fn list_keys(&self, workspace: &WorkspaceId, list: ListKeys)
    -> Result<Option<KeyPage>, StoreError>;

    /// Changes a live key. Existence is judged before permission.
    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

    /// Replaces a live key by a new one with its settings. Existence is judged before permission.
    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError>;

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
