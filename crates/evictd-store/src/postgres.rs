//! The store of several publishers, on PostgreSQL 15 or newer.
//!
//! Any number of publishers may use one database, and anybody may change records in it by SQL. Changes run side by
//! side and commit in any order; one row lock, on the head of the log, orders what needs an order: numbering,
//! rounds, epochs and the roster (R1, R7).
//!
//! Its clock is the server's. Its connection must be one to the server itself, or through a pooler that keeps
//! sessions together. The server needs a `synchronous_standby_names` if a fail-over is to lose nothing; where it
//! loses something, a new epoch begins (R2).
//!
//! The schema and its triggers are in `migrations/postgres`. The user that publishers connect as needs no more
//! than SELECT, INSERT, UPDATE and DELETE on its tables; whoever migrates owns them. In reading order:
//!
//! * `options`: where the server is.
//! * `connections`: which there are, and who may hold up whom (R10).
//! * `write`: a transaction, and a COMMIT that a dropped caller can't cancel (R4).
//! * `notices`: hears that a COMMIT wasn't replicated (R4).
//! * `log`: numbering, rounds, replays (R1, R5, R7).
//! * `lineage`: notices fail-overs, and numbers epochs (R2).
//! * `roster`: who may hold a lease (R11).
//! * `receipts`: what became of a request, and which requests are open (R12).
//! * `records`: what is read of keys, root keys and APIs (R6).
//! * `changes`: what the control API and operators change, with their audit records.
//! * `audit`: reading those, and deleting what is old enough to go.
//! * `schema`: in which schema the tables are, and whether it was altered (R3).
//! * `triggers`: whether they are in place, and nothing in their way (R3).
//! * `listener`: hears of changes past the control API.
//! * `reader`: lookups for agents, on a standby too.

mod audit;
mod changes;
mod connections;
mod lineage;
mod listener;
mod log;
mod notices;
mod options;
mod reader;
mod receipts;
mod records;
mod rights;
mod roster;
mod schema;
mod triggers;
mod write;

use std::collections::HashSet;

use async_trait::async_trait;
use evictd_core::history::{History, LogToken, RoundToken};
use evictd_core::ids::{ApiId, Identity, KeyHash, KeyId, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::record::{Lookup, RootKeyRecord};
use evictd_core::time::StoreTime;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};

use self::connections::{Connections, sql_state};
use self::listener::Listener;
use self::write::{By, Write};
use crate::audit::{AuditQuery, AuditRecord, Purge, Purged};
use crate::change::{
    Actor, Api, Authorize, ChangeError, DeleteMode, KeyDetails, KeyPage, KeyUpdate, ListKeys, NewApi, NewKey,
    NewRootKey, Operator, Reroll, RootKeyInfo,
};
use crate::history::VoucherKey;
use crate::log::{Backlog, Head, Numbered, NumberedRequest, Replay, Round, RoundRequest};
use crate::receipt::{FinalReceipt, Recorded};
use crate::roster::Roster;
use crate::rows::{AuditEntry, Author, sql_limit};
use crate::{HomeStore, StoreError};

pub use self::options::PostgresOptions;
pub use self::reader::PostgresReader;

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// The home store in one PostgreSQL database. Safe to share; other publishers may use the database at the same
/// time.
#[derive(Debug)]
pub struct PostgresStore {
    options: PostgresOptions,
    connections: Connections,
    listener: Listener,
}

impl PostgresStore {
    /// The version of the schema of the store in the database, if there is a store. Makes none, and changes none.
    pub async fn schema_version(options: &PostgresOptions) -> Result<Option<i64>, StoreError> {
        let mut connection = options.open().await?;
        schema::pin_to_home(&mut connection, options.clone()).await?;
        let look = async {
            if !has_schema(&mut connection).await? {
                return Ok(None);
            }
            let newest = "SELECT coalesce(max(version), 0) FROM ONLY _sqlx_migrations WHERE success";
            sqlx::query_scalar(newest).fetch_one(&mut connection).await.map(Some)
        };
        let version = look.await;
        drop(connection.close().await);
        version.map_err(|source| unreadable(options, source))
    }

    /// Connects, and brings the schema up to date: of several that do so at once, one does it and the others find
    /// it done. [`StoreError::NotMigrated`] where that is needed and this user may not do it.
    pub async fn connect(options: PostgresOptions) -> Result<Self, StoreError> {
        let mut connection = options.open().await?;
        let mut options = schema::pin_to_home(&mut connection, options).await?;
        if !is_current(&mut connection, &options).await? {
            migrate(&mut connection, &options).await?;
            options = schema::pin_to_home(&mut connection, options).await?;
        }
        schema::assert_complete(&mut connection, &options).await?;
        // What it was set to for the migration goes with it.
        drop(connection.close().await);
        let connections = Connections::new(options.clone());
        Ok(Self { options, connections, listener: Listener::default() })
    }
}

/// Whether the database has exactly this version's schema. To look needs no right to change it.
async fn is_current(connection: &mut PgConnection, options: &PostgresOptions) -> Result<bool, StoreError> {
    let look = async {
        if !has_schema(&mut *connection).await? {
            return Ok(false);
        }
        let applied: Vec<(i64, Vec<u8>)> = sqlx::query_as(
            "SELECT version, checksum FROM ONLY _sqlx_migrations WHERE success ORDER BY version",
        )
        .fetch_all(connection)
        .await?;
        let known = MIGRATIONS.iter().map(|migration| (migration.version, migration.checksum.to_vec()));
        Ok(known.eq(applied))
    };
    look.await.map_err(|source| unreadable(options, source))
}

/// Whether migrations were ever run on the database.
async fn has_schema(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL").fetch_one(connection).await
}

fn unreadable(options: &PostgresOptions, source: sqlx::Error) -> StoreError {
    let advice = "its table _sqlx_migrations can't be read; GRANT SELECT on it, and USAGE on its schema";
    StoreError::Open { place: options.place(), advice, source }
}

/// Brings the schema up to date, however long that takes, in one transaction: of several that do so at once, each
/// finds it done or not begun.
async fn migrate(connection: &mut PgConnection, options: &PostgresOptions) -> Result<(), StoreError> {
    let refused = |error| match &error {
        MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _)
            if sql_state(source).is_some_and(|code| matches!(&*code, "42501" | "25006")) =>
        {
            // Insufficient privilege; a standby.
            StoreError::NotMigrated { place: options.place() }
        }
        _ => StoreError::Migrate(error),
    };
    let prepare = |source| refused(MigrateError::Execute(source));
    connection.execute("SET statement_timeout = 0; SET lock_timeout = 0").await.map_err(prepare)?;
    let mut whole = connection.begin().await.map_err(prepare)?;
    let turn = "SELECT pg_advisory_xact_lock(hashtextextended('evictd migrations', 0))";
    whole.execute(turn).await.map_err(prepare)?;
    let was_known = schema::begin_migration(&mut whole).await.map_err(prepare)?;
    MIGRATIONS.run(&mut *whole).await.map_err(refused)?;
    schema::end_migration(&mut whole, was_known).await.map_err(prepare)?;
    whole.commit().await.map_err(prepare)
}

impl PostgresStore {
    /// A transaction of the publisher's own, in which nobody waits for the control API (R10).
    async fn log(&self, action: &'static str) -> Result<Write, StoreError> {
        Write::begin(&self.connections.log, action, By::Publisher).await
    }

    /// A transaction of the control API's.
    async fn change(&self, action: &'static str, actor: &Actor) -> Result<Write, StoreError> {
        Write::begin(&self.connections.changes, action, By::Request(&actor.request_id)).await
    }

    /// A transaction of an operator's.
    async fn command(&self, action: &'static str, operator: &Operator) -> Result<Write, StoreError> {
        Write::begin(&self.connections.changes, action, By::Operator(&operator.request_id)).await
    }
}

#[async_trait]
impl HomeStore for PostgresStore {
    fn is_exclusive(&self) -> bool {
        false
    }

    async fn close(&self) {
        self.listener.stop();
        self.connections.close().await;
    }

    async fn number(&self, limit: usize) -> Result<Numbered, StoreError> {
        if let Some(head) = log::head_if_idle(&self.connections.log).await? {
            return Ok(Numbered { head, rows: Vec::new(), requests: Vec::new() });
        }
        let mut write = self.log("number its log").await?;
        let mut head = log::lock_head(&mut write).await?;
        head.begin_epoch_if_due(&mut write, 0).await?;
        let numbered = head.number(&mut write, sql_limit(limit)).await?;
        write.commit().await?;
        Ok(numbered)
    }

    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError> {
        let RoundRequest { instances, touched, seen_epoch } = request;
        let mut write = self.log("commit a probe round").await?;
        let mut head = log::lock_head(&mut write).await?;
        let clock = head.clock;
        roster::update(&mut write, instances, touched, clock.store_time).await?;
        head.compare_schema(&mut write).await?;
        let began = head.begin_epoch_if_due(&mut write, seen_epoch).await?;
        let schema_fault = head.schema_fault(&mut write).await?;
        head.draw_round_token(&mut write).await?;
        let numbered = head.number(&mut write, i64::MAX).await?;
        write.commit().await?;
        Ok(Round { numbered, clock, began, schema_fault })
    }

    async fn begin_epoch(&self, operator: &Operator) -> Result<Head, StoreError> {
        let mut write = self.log("begin a new epoch").await?;
        let mut head = log::lock_head(&mut write).await?;
        head.begin_epoch(&mut write, &operator.name).await?;
        let head = head.head;
        let by = Author::operator(operator, None);
        audit::record(&mut write, by, &AuditEntry::epoch_begun(head.at)).await?;
        write.commit().await?;
        tracing::warn!(head = %head.at, "a new epoch begins because an operator said so; agents flush once");
        Ok(head)
    }

    async fn begin_incarnation(&self) -> Result<Head, StoreError> {
        let mut write = self.log("begin an incarnation").await?;
        let mut head = log::lock_head(&mut write).await?;
        if head.begin_epoch_if_due(&mut write, 0).await?.is_none() {
            head.begin_incarnation(&mut write).await?;
        }
        write.commit().await?;
        Ok(head.head)
    }

    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = self.log("note a lost epoch").await?;
        let mut head = log::lock_head(&mut write).await?;
        head.note_lost_epoch(&mut write, epoch).await?;
        write.commit().await
    }

    async fn roster(&self, since: u64) -> Result<Roster, StoreError> {
        roster::changed(&self.connections.log, since).await
    }

    async fn trust_roster(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = self.log("trust its roster").await?;
        log::lock_head(&mut write).await?;
        roster::trust(&mut write, epoch).await?;
        write.commit().await
    }

    async fn part_with_instances(&self, departed: &[Identity]) -> Result<(), StoreError> {
        if departed.is_empty() {
            return Ok(());
        }
        let mut write = self.log("part with instances").await?;
        log::lock_head(&mut write).await?;
        roster::part(&mut write, departed).await?;
        write.commit().await
    }

    async fn forget_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut write = self.log("forget instances").await?;
        log::lock_head(&mut write).await?;
        roster::forget(&mut write, gone).await?;
        write.commit().await
    }

    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError> {
        log::replay(&self.connections.replays, epoch, from, to, sql_limit(limit)).await
    }

    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, StoreError> {
        records::lookup(&self.connections.lookups, hash).await
    }

    async fn head(&self) -> Result<Head, StoreError> {
        log::head(&self.connections.log).await
    }

    async fn history(&self) -> Result<History, StoreError> {
        log::history(&self.connections.log).await
    }

    async fn voucher_key(&self) -> Result<VoucherKey, StoreError> {
        log::voucher_key(&self.connections.log).await
    }

    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError> {
        log::row_token(&self.connections.log, at).await
    }

    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError> {
        log::has_round_token(&self.connections.log, token).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        log::backlog(&self.connections.log).await
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        if !records::any_to_expire(&self.connections.changes).await? {
            return Ok(0);
        }
        let mut write = Write::begin(&self.connections.changes, "expire keys", By::Publisher).await?;
        let expired = changes::expire(&mut write, sql_limit(limit)).await?;
        write.commit_change().await?;
        Ok(expired)
    }

    async fn version(&self) -> Result<i64, StoreError> {
        log::version(&self.connections.log).await
    }

    async fn told_of_a_change(&self) {
        self.listener.told(&self.options).await;
    }

    async fn check_triggers(&self) -> Result<(), StoreError> {
        triggers::check(&self.connections.log).await?;
        rights::check(&self.connections.log).await
    }

    async fn root_key(&self, hash: KeyHash) -> Result<Option<RootKeyRecord>, StoreError> {
        records::root_key(&self.connections.records, hash).await
    }

    async fn create_root_key(&self, operator: &Operator, root_key: NewRootKey) -> Result<(), StoreError> {
        let mut write = self.command("store a root key", operator).await?;
        changes::create_root_key(&mut write, operator, &root_key).await?;
        write.commit_change().await
    }

    async fn revoke_root_key(&self, operator: &Operator, id: &KeyId) -> Result<bool, StoreError> {
        let mut write = self.command("revoke a root key", operator).await?;
        let revoked = changes::revoke_root_key(&mut write, operator, id).await?;
        write.commit_change().await?;
        Ok(revoked)
    }

    async fn protect_api(&self, operator: &Operator, api: &ApiId, protect: bool) -> Result<bool, StoreError> {
        let mut write = self.command("protect an API", operator).await?;
        let found = changes::protect_api(&mut write, operator, api, protect).await?;
        write.commit_change().await?;
        Ok(found)
    }

    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditRecord>, StoreError> {
        audit::audit(&self.connections.records, query).await
    }

    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError> {
        let mut write = Write::begin(&self.connections.changes, "purge old rows", By::Publisher).await?;
        let purged = audit::purge(&mut write, purge).await?;
        write.commit().await?;
        Ok(purged)
    }

    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError> {
        if receipts.is_empty() {
            return Ok(HashSet::new());
        }
        let mut write = self.log("record receipts").await?;
        let had_one = receipts::record(&mut write, receipts).await?;
        write.commit().await?;
        Ok(had_one)
    }

    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<Recorded>, StoreError> {
        receipts::receipt(&self.connections.records, workspace, request_id).await
    }

    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError> {
        receipts::open_requests(&self.connections.log, after, sql_limit(limit)).await
    }

    async fn has_root_keys(&self) -> Result<bool, StoreError> {
        records::has_root_keys(&self.connections.records).await
    }

    async fn root_keys(&self) -> Result<Vec<RootKeyInfo>, StoreError> {
        records::root_keys(&self.connections.records).await
    }

    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let mut write = self.change("create an API", actor).await?;
        changes::create_api(&mut write, actor, &api).await?;
        write.commit_change().await
    }

    async fn api(&self, workspace: &WorkspaceId, api: &ApiId) -> Result<Option<Api>, StoreError> {
        records::api(&self.connections.records, workspace, api).await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let mut write = self.change("create a key", actor).await?;
        changes::create_key(&mut write, actor, &key).await?;
        Ok(write.commit_change().await?)
    }

    async fn key(&self, workspace: &WorkspaceId, key: &KeyId) -> Result<Option<KeyDetails>, StoreError> {
        records::key(&self.connections.records, workspace, key).await
    }

    async fn list_keys(
        &self,
        workspace: &WorkspaceId,
        list: ListKeys,
    ) -> Result<Option<KeyPage>, StoreError> {
        records::list_keys(&self.connections.records, workspace, &list).await
    }

    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("update a key", actor).await?;
        changes::update_key(&mut write, actor, key, &update, authorize).await?;
        Ok(write.commit_change().await?)
    }

    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("reroll a key", actor).await?;
        changes::reroll_key(&mut write, actor, &reroll, authorize).await?;
        Ok(write.commit_change().await?)
    }

    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("delete a key", actor).await?;
        changes::delete_key(&mut write, actor, key, mode, authorize).await?;
        Ok(write.commit_change().await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let mut write = self.change("delete an API", actor).await?;
        changes::delete_api(&mut write, actor, api).await?;
        Ok(write.commit_change().await?)
    }
}
