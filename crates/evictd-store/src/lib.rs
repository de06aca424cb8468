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
mod error;
pub mod history;
pub mod log;
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

/// A whole home store. Each part of it is a trait of its own, so that a signature says what it uses.
/// One conformance suite tests every implementation.
#[async_trait]
pub trait HomeStore:
    LogStore + RosterStore + ReceiptStore + RecordStore + ChangeStore + OperatorStore
{
    /// Waits for running transactions, then closes the database. Later calls fail.
    async fn close(&self);
}
