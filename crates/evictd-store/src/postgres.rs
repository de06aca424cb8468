//! The store of several publishers, on PostgreSQL 15 or newer.
//!
//! Any number of publishers may use one database, and any user with the rights may change records by SQL. Changes run side
//! by side and commit in any order. A row lock on the head of the log orders what needs an order: numbering, rounds, epochs
//! and the roster (R1, R7).
//!
//! The store's clock is the server's. Connections go to the server itself, or through a pooler in session mode. Without
//! `synchronous_standby_names` a fail-over may lose commits; then an epoch begins (R2).
//!
//! The schema and its triggers are in `migrations/postgres`. The user who migrates owns the tables. The publishers' user
//! needs SELECT, INSERT, UPDATE and DELETE at most. In reading order:
//!
//! * `options`: where the server is.
//! * `lanes`: the connections, and which work may delay which (R10).
//! * `write`: a transaction, and a COMMIT that survives its caller (R4).
//! * `notices`: detects that a COMMIT wasn't replicated (R4).
//! * `head`: the lock on the head of the log; epochs and incarnations (R2, R15).
//! * `lineage`: which history a server writes (R2).
//! * `log`: numbering, rounds, replays (R1, R5, R7).
//! * `roster`: the instances that may hold a lease (R11).
//! * `receipts`: receipts and open requests (R12).
//! * `records`, `lookups`: reading keys, root keys and APIs (R6).
//! * `changes`, `operator`: changes by the control API, by time and by operators.
//! * `audit`, `purge`: their audit records, and deleting old rows.
//! * `migrations`, `schema`: the tables, and whether they were altered (R3).
//! * `triggers`, `rights`: whether the triggers are in place (R3), and publishers have the rights they need.
//! * `listener`: receives notifications of changes outside the control API.
//! * `reader`: lookups for agents, on a standby too.

mod audit;
mod changes;
mod errors;
mod head;
mod lanes;
mod lineage;
mod listener;
mod log;
mod lookups;
mod migrations;
mod notices;
mod operator;
mod options;
mod purge;
mod reader;
mod receipts;
mod records;
mod rights;
mod roster;
mod schema;
mod triggers;
mod write;

use async_trait::async_trait;
use sqlx::Connection;

use self::lanes::Lanes;
use self::listener::Listener;
use self::write::{By, PostgresWrite};
use crate::change::Actor;
use crate::error::StoreError;
use crate::operator::Operator;
use crate::{Concurrency, HomeStore};

pub(crate) use self::errors::is_busy;
pub use self::options::{PostgresOptions, UrlSource};
pub use self::reader::PostgresReader;

/// The home store in one PostgreSQL database. Other publishers may use the database at the same time.
#[derive(Debug)]
pub struct PostgresStore {
    options: PostgresOptions,
    lanes: Lanes,
    listener: Listener,
}

impl PostgresStore {
    /// Returns the schema version of the store in the database; `None` if there is no store. Changes nothing.
    pub async fn schema_version(options: &PostgresOptions) -> Result<Option<i64>, StoreError> {
        let mut connection = options.open().await?;
        schema::pin_to_home(&mut connection, options.clone()).await?;
        let version = migrations::version(&mut connection).await;
        drop(connection.close().await);
        version.map_err(|source| options.unreadable(source))
    }

    /// Connects, and migrates the schema. Returns [`StoreError::NotMigrated`] if it must be migrated and this user has no
    /// right to do so.
    pub async fn connect(options: PostgresOptions) -> Result<Self, StoreError> {
        let mut connection = options.open().await?;
        let mut options = schema::pin_to_home(&mut connection, options).await?;
        if !migrations::is_current(&mut connection, &options).await? {
            migrations::migrate(&mut connection, &options).await?;
            options = schema::pin_to_home(&mut connection, options).await?;
        }
        schema::assert_complete(&mut connection, &options).await?;
        // The migration changed its settings.
        drop(connection.close().await);
        let lanes = Lanes::new(options.clone());
        Ok(Self { options, lanes, listener: Listener::default() })
    }

    /// Begins a transaction of the publisher's own. It doesn't wait for the control API (R10).
    async fn log(&self, action: &'static str) -> Result<PostgresWrite, StoreError> {
        PostgresWrite::begin(&self.lanes.log, action, By::Publisher).await
    }

    /// Begins a transaction of the control API.
    async fn change(&self, action: &'static str, actor: &Actor) -> Result<PostgresWrite, StoreError> {
        PostgresWrite::begin(&self.lanes.changes, action, By::Request(&actor.request_id)).await
    }

    /// Begins a transaction of an operator.
    async fn command(&self, action: &'static str, operator: &Operator) -> Result<PostgresWrite, StoreError> {
        PostgresWrite::begin(&self.lanes.changes, action, By::Operator(&operator.request_id)).await
    }
}

#[async_trait]
impl HomeStore for PostgresStore {
    fn concurrency(&self) -> Concurrency {
        Concurrency { reads: self.lanes.records.size(), changes: self.lanes.changes.size() }
    }

    async fn close(&self) {
        self.listener.stop();
        self.lanes.close().await;
    }
}
