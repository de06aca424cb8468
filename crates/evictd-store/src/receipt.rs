//! Receipts: what became of a request of the control API (R12).
//!
//! The publisher decides when a receipt is final and what it says. The store keeps it, and until then knows
//! which log rows the request wrote.

use std::collections::HashSet;

use async_trait::async_trait;
use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::Cause;
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;

use crate::error::StoreError;
use crate::log::NumberedRequest;

/// What became of requests (R12).
#[async_trait]
pub trait ReceiptStore: std::fmt::Debug + Send + Sync + 'static {
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
    ) -> Result<Option<StoredOutcome>, StoreError>;

    /// The numbered rows of requests without a final receipt, after a position, at most `limit`, in order of
    /// position: what a publisher has to go on with that starts, or stands in for another. Cheap however long
    /// the log is.
    async fn open_requests(
        &self,
        after: LogPosition,
        limit: usize,
    ) -> Result<Vec<NumberedRequest>, StoreError>;
}

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
pub enum StoredOutcome {
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
