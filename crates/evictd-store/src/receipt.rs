//! Receipts: what became of a request of the control API (R12).
//!
//! The publisher decides when a receipt is final and what it says. The store keeps it, and until then knows
//! which log rows the request wrote.

use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::Cause;
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;

/// A receipt that won't change any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FinalReceipt {
    /// The request, `req_...`.
    pub request_id: String,
    /// The workspace it acted for; nobody else may read the receipt.
    pub workspace_id: WorkspaceId,
    /// Where its change stands in the log: the last row's position, if it wrote several.
    pub position: LogPosition,
    /// When it was committed, on the store's clock.
    pub committed_at: StoreTime,
    /// When its outcome was settled, on the store's clock.
    pub final_at: StoreTime,
    /// What is answered to those who ask: JSON. Ids only, because it outlives a permanent deletion.
    pub body: String,
}

/// What the store knows of a request that it carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Recorded {
    /// Its receipt is final.
    Final {
        /// As recorded, byte for byte.
        body: String,
    },
    /// Its log rows, in the order in which they were written. The receipt is still open.
    Open(Vec<OpenRow>),
    /// It changed nothing that any agent could have cached.
    Nothing,
}

/// A log row of a request whose receipt is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenRow {
    /// Its place in the log; `None` until it is numbered.
    pub position: Option<LogPosition>,
    /// Why it was written.
    pub cause: Cause,
    /// When it was committed, on the store's clock.
    pub committed_at: StoreTime,
}
