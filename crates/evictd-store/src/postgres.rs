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
mod head;
mod lineage;
mod listener;
mod log;
mod notices;
mod operator;
mod options;
mod reader;
mod receipts;
mod records;
mod rights;
mod roster;
mod schema;
mod triggers;
mod write;

use async_trait::async_trait;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};

use self::connections::{Connections, sql_state};
use self::listener::Listener;
use self::write::{By, Write};
use crate::HomeStore;
use crate::change::Actor;
use crate::error::StoreError;
use crate::operator::Operator;

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
    async fn close(&self) {
        self.listener.stop();
        self.connections.close().await;
    }
}
