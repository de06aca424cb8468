//! The home store: all records, and the log of their changes, in one database.
//!
//! A change, its audit record and its log row are one transaction. The database's own triggers write the log, so that a
//! change made outside the API is published like any other (R1, R3).
//!
//! A store is [`SqliteStore`](sqlite::SqliteStore) or [`PostgresStore`](postgres::PostgresStore). What it does is divided
//! into traits, and each store implements each of them beside its SQL:
//!
//! * [`log::LogStore`]: numbering, rounds, replays, the store's [`history`].
//! * [`roster::RosterStore`]: the instances that may hold a lease.
//! * [`receipt::ReceiptStore`]: what became of requests.
//! * [`record::RecordStore`]: reading keys, root keys and APIs.
//! * [`change::ChangeStore`]: the control API's changes, expiries, and purging old rows.
//! * [`operator::OperatorStore`]: what operators do with the command line, with [`audit`] records.

pub mod audit;
mod audit_entry;
pub mod change;
mod error;
pub mod history;
pub mod log;
mod log_rows;
pub mod operator;
pub mod postgres;
pub mod receipt;
pub mod record;
pub mod roster;
mod rows;
pub mod sqlite;

use async_trait::async_trait;

pub use crate::change::ChangeStore;
pub use crate::error::StoreError;
pub use crate::log::LogStore;
pub use crate::operator::OperatorStore;
pub use crate::receipt::ReceiptStore;
pub use crate::record::RecordStore;
pub use crate::roster::RosterStore;

/// A whole home store, for the composition root. One conformance suite tests every implementation.
#[async_trait]
pub trait HomeStore:
    LogStore + RosterStore + ReceiptStore + RecordStore + ChangeStore + OperatorStore
{
    /// Returns how many requests of the control API this store works on at once.
    fn concurrency(&self) -> Concurrency;

    /// Waits for running transactions, then closes the database. Later calls fail.
    async fn close(&self);
}

/// How many requests a store works on at once. Further ones wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Concurrency {
    pub reads: usize,
    pub changes: usize,
}
