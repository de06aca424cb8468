//! Receipts: what became of a request of the control API (R12).
//!
//! The publisher decides when a receipt is final, and writes its text. The store keeps it, and until then the log rows
//! that the request wrote.

use std::collections::HashSet;
use std::fmt::Debug;

use async_trait::async_trait;
use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::Cause;
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;

use crate::error::StoreError;
use crate::log::NumberedRequest;
use crate::log_rows::{cause, position, request};
use crate::rows::Columns;

/// Receipts (R12).
#[async_trait]
pub trait ReceiptStore: Debug + Send + Sync + 'static {
    /// Stores final receipts, all or none. The first receipt of a request stays, because several publishers may have
    /// finished the same request. A receipt of a change that the store doesn't hold isn't stored. Returns the requests
    /// whose receipt wasn't stored.
    ///
    /// Rounds wait meanwhile: a thousand receipts at once are fine, a hundred thousand aren't.
    async fn record_receipts(&self, receipts: &[FinalReceipt]) -> Result<HashSet<String>, StoreError>;

    /// Returns what became of a request of this workspace; `None` if it carried out no such request.
    async fn receipt(
        &self,
        workspace: &WorkspaceId,
        request_id: &str,
    ) -> Result<Option<StoredOutcome>, StoreError>;

    /// Returns the numbered rows of requests without a final receipt, after a position, at most `limit`, in the order
    /// of positions. A publisher continues these when it starts or takes over. Cheap however long the log is.
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
    /// The workspace that may read the receipt.
    pub workspace_id: WorkspaceId,
    /// The position of its change: that of the last row if it wrote several.
    pub position: LogPosition,
    /// On the store's clock.
    pub committed_at: StoreTime,
    /// On the store's clock.
    pub final_at: StoreTime,
    /// The JSON that clients get. It has ids only, because it outlives a permanent deletion.
    pub body: String,
}

/// What the store holds about a request that it carried out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoredOutcome {
    /// Its receipt is final.
    Final {
        /// As stored, byte for byte.
        body: String,
    },
    /// Its log rows, in the order in which they were written. The receipt is still open.
    Open(Vec<OpenRow>),
    /// It changed nothing that an agent could have cached.
    Nothing,
}

impl StoredOutcome {
    /// There is a row for each log row of the request, at least one. Each has the columns `body` and `carried_out`.
    pub(crate) fn read(rows: &[impl Columns]) -> Result<Option<Self>, StoreError> {
        let Some(first) = rows.first() else { return Ok(None) };
        if let Some(body) = first.optional_string("body")? {
            return Ok(Some(Self::Final { body }));
        }
        if first.optional_integer("id")?.is_some() {
            return Ok(Some(Self::Open(rows.iter().map(OpenRow::read).collect::<Result<_, _>>()?)));
        }
        Ok(first.flag("carried_out")?.then_some(Self::Nothing))
    }
}

/// A log row of a request whose receipt is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenRow {
    /// `None` until it is numbered.
    pub position: Option<LogPosition>,
    pub cause: Cause,
    /// On the store's clock.
    pub committed_at: StoreTime,
}

impl OpenRow {
    fn read(row: &impl Columns) -> Result<Self, StoreError> {
        Ok(Self { position: position(row)?, cause: cause(row), committed_at: row.time("committed_at")? })
    }
}

/// Reads rows of open requests.
pub(crate) fn read_open_requests<R: Columns>(rows: &[R]) -> Result<Vec<NumberedRequest>, StoreError> {
    let read = |row: &R| request(row, row.position("epoch", "position")?);
    rows.iter().filter_map(|row| read(row).transpose()).collect()
}
