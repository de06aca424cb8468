//! What the receipts task takes from its queue.

use evictd_core::ids::{Identity, Region, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::receipts::Change;
use evictd_core::roster::Instance;
use evictd_core::time::LeaseTime;
use evictd_wire::api::propagation::Propagation;
use evictd_wire::applied::Applied;
use tokio::sync::oneshot;

/// Inputs that may wait. Each takes microseconds; senders wait while the queue is full.
pub(super) const QUEUE_CAPACITY: usize = 4_096;

pub(super) enum ReceiptInput {
    /// A request begins that may make a change. A client that waits gets its final receipt.
    Begun { request: Box<str>, at: LeaseTime, waiter: Option<oneshot::Sender<Propagation>> },
    /// The request has changed nothing that an agent could have cached.
    Unchanged { request: Box<str> },
    /// Rows from `first` up to `head` got their positions, or none did.
    Numbered { first: Option<LogPosition>, head: LogPosition, changes: NewChanges },
    /// The store holds a change whose receipt isn't open here.
    Found(NewChanges),
    /// Answered with the receipt if it is open here. Otherwise `reply` is dropped, as soon as the store is the place to
    /// look.
    View { workspace: WorkspaceId, request: Box<str>, reply: oneshot::Sender<Propagation> },
    /// An agent process reports how far it has applied the log.
    Announced { identity: Identity, announcement: Applied },
    /// An agent process requests a lease. Answered with whether it may have one.
    Probed { instance: Instance, reply: oneshot::Sender<bool> },
    /// An agent process has sent a lookup. Answered with whether receipts wait for it.
    LookedUp { identity: Identity, reply: oneshot::Sender<bool> },
    /// Answered with the processes whose roster rows are to be refreshed.
    TakeSeen { reply: oneshot::Sender<Vec<Identity>> },
    /// The configured regions have changed.
    Configured { regions: Vec<Region> },
    #[cfg(test)]
    Inspect(Inspection),
}

/// What a test does with the task.
#[cfg(test)]
pub(super) type Inspection = Box<dyn FnOnce(&mut dyn std::any::Any) + Send>;

/// Changes that were read in one epoch, and whose receipts are to be opened.
pub(super) struct NewChanges {
    pub(super) epoch: u32,
    pub(super) changes: Vec<Change>,
    /// Dropped when the receipts are open, or can't be opened.
    pub(super) opened: Option<oneshot::Sender<()>>,
}
