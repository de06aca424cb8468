//! The handle of the control API and of numbering.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::{Identity, Region, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::receipts::Change;
use evictd_ops::clock;
use evictd_ops::time::Backoff;
use evictd_store::log::{Numbered, NumberedRequest};
use evictd_store::receipt::StoredOutcome;
use evictd_store::{ReceiptStore, StoreError};
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::propagation::Propagation;
use evictd_wire::applied::Applied;
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::input::{NewChanges, ReceiptInput};
use crate::log_head::LogHead;
use crate::metrics::PublisherMetrics;

/// Requests that wait for their receipt at once; further ones are answered with the state reached.
pub(super) const WAITS_MAX: usize = 4_096;

/// How soon, and then how often, a waiting request looks into the store: another publisher may have made the receipt
/// final, or no agent could have cached what the change touched.
const LOOK: Backoff = Backoff { first: Duration::from_millis(50), max: Duration::from_millis(500) };

/// How long a query waits for a final receipt to be stored.
const STORE_PATIENCE: Duration = Duration::from_secs(1);

/// The sending end of the receipts task's queue.
#[derive(Clone)]
pub(crate) struct Receipts {
    pub(super) queue: mpsc::Sender<ReceiptInput>,
    pub(super) store: Arc<dyn ReceiptStore>,
    pub(super) metrics: Arc<PublisherMetrics>,
    pub(super) head: LogHead,
    pub(super) bound: Duration,
    pub(super) waits: Arc<Semaphore>,
    /// Ends every wait.
    pub(super) draining: CancellationToken,
}

/// A handle of the receipts task, which ends when all other handles are gone.
#[derive(Clone)]
pub(crate) struct WeakReceipts(mpsc::WeakSender<ReceiptInput>);

impl WeakReceipts {
    /// Replaces the regions that receipts list even without an agent. Without a task, does nothing.
    pub(crate) async fn configure(&self, regions: Vec<Region>) {
        if let Some(queue) = self.0.upgrade() {
            drop(queue.send(ReceiptInput::Configured { regions }).await);
        }
    }
}

/// The receipt of one request.
pub(crate) enum ReceiptView {
    Open(Box<Propagation>),
    /// Final, byte for byte as stored.
    Stored(Box<RawValue>),
}

/// A request that is about to make a change. Dropping it ends its wait, and nothing else: the change may be committed
/// all the same.
pub(crate) struct PendingChange<'a> {
    receipts: &'a Receipts,
    request: &'a str,
    wait: Option<(oneshot::Receiver<Propagation>, OwnedSemaphorePermit)>,
}

impl Receipts {
    /// Opens receipts for rows that just got their positions; not if the store went back (`is_behind`).
    pub(crate) async fn numbered(&self, numbered: &Numbered, is_behind: bool) {
        let changes = if is_behind { Vec::new() } else { changes(numbered) };
        let head = numbered.head.at;
        let changes = NewChanges { epoch: head.epoch(), changes, opened: None };
        let first = numbered.rows.first().map(|row| row.position);
        self.send(ReceiptInput::Numbered { first, head, changes }).await;
    }

    /// Returns a handle that doesn't keep the task running.
    pub(crate) fn downgrade(&self) -> WeakReceipts {
        WeakReceipts(self.queue.downgrade())
    }

    /// Takes in how far an agent process has applied the log.
    pub(crate) async fn announced(&self, identity: Identity, announcement: Applied) {
        self.metrics.announced();
        self.send(ReceiptInput::Announced { identity, announcement }).await;
    }

    /// Begins a request: its times are measured from here. To be called before the store is, or the change could be
    /// confirmed before the wait begins.
    pub(crate) async fn begin<'a>(&'a self, request: &'a str, waits: bool) -> PendingChange<'a> {
        let permit = if waits { self.waits.clone().try_acquire_owned().ok() } else { None };
        let (waiter, wait) = permit
            .map(|permit| {
                let (waiter, receiver) = oneshot::channel();
                (waiter, (receiver, permit))
            })
            .unzip();
        self.send(ReceiptInput::Begun { request: request.into(), at: clock::lease_now(), waiter }).await;
        PendingChange { receipts: self, request, wait }
    }

    /// Returns the receipt of a request; `None` if this workspace has carried out no such request.
    pub(crate) async fn view(
        &self,
        workspace: &WorkspaceId,
        request: &str,
    ) -> Result<Option<ReceiptView>, StoreError> {
        if let Some(open) = self.open_view(workspace, request).await {
            return Ok(Some(open));
        }
        let epoch = self.head.current().epoch();
        let rows = match self.store.receipt(workspace, request).await? {
            None => return Ok(None),
            Some(StoredOutcome::Final { body }) => {
                let corrupt = |_| StoreError::Corrupt { what: "receipt", value: request.to_owned() };
                return Ok(Some(ReceiptView::Stored(RawValue::from_string(body).map_err(corrupt)?)));
            }
            Some(StoredOutcome::Nothing) => return Ok(Some(open(Propagation::nothing(request, self.bound)))),
            Some(StoredOutcome::Open(rows)) => rows,
        };
        let numbered = rows.iter().rev().find_map(|row| Some((row.position?, row)));
        if let Some((position, row)) = numbered {
            // Another publisher numbered it, or this one a moment ago.
            let change = Change {
                request: Some((request.into(), workspace.clone())),
                position,
                cause: row.cause,
                committed_at: row.committed_at,
            };
            let (opened, is_open) = oneshot::channel();
            self.send(ReceiptInput::Found(NewChanges { epoch, changes: vec![change], opened: Some(opened) }))
                .await;
            is_open.await.ok();
            if let Some(open) = self.open_view(workspace, request).await {
                return Ok(Some(open));
            }
        }
        let committed_at = rows.last().map(|row| row.committed_at);
        let place = numbered.map(|(position, row)| (position, row.cause));
        Ok(Some(open(Propagation::waiting(request, place, committed_at, self.bound))))
    }

    /// Returns the receipt if it is open here. One that is final is waited for until it is stored; if that takes longer
    /// than [`STORE_PATIENCE`], it isn't shown as final yet.
    async fn open_view(&self, workspace: &WorkspaceId, request: &str) -> Option<ReceiptView> {
        let (reply, view) = oneshot::channel();
        self.send(ReceiptInput::View { workspace: workspace.clone(), request: request.into(), reply }).await;
        tokio::time::timeout(STORE_PATIENCE, view).await.ok()?.ok().map(open)
    }

    async fn send(&self, input: ReceiptInput) {
        // The task outlives all senders. Should it have panicked, the publisher is about to end.
        self.queue.send(input).await.ok();
    }
}

impl PendingChange<'_> {
    /// Ends a request that failed. Unless its outcome is unknown, it has changed nothing.
    pub(crate) async fn refused(self, error: &ApiError) {
        if error.kind != ErrorKind::ServiceUnavailable {
            self.unchanged().await;
        }
    }

    /// Ends a request whose change no agent could have cached.
    pub(crate) async fn without_effect(self) -> Propagation {
        self.unchanged().await;
        Propagation::nothing(self.request, self.receipts.bound)
    }

    async fn unchanged(&self) {
        self.receipts.send(ReceiptInput::Unchanged { request: self.request.into() }).await;
    }

    /// Returns the receipt as soon as it is final, or the state reached when `limit` is over or the publisher shuts down.
    /// The change was committed: whatever happens here, the request has succeeded.
    pub(crate) async fn settled(mut self, workspace: &WorkspaceId, limit: Duration) -> Propagation {
        if let Some((receiver, _permit)) = self.wait.take() {
            let settled = tokio::select! {
                biased;
                settled = receiver => settled.ok(),
                () = self.receipts.draining.cancelled() => None,
                () = tokio::time::sleep(limit) => None,
                settled = self.settled_elsewhere(workspace) => Some(settled),
            };
            if let Some(settled) = settled {
                return settled;
            }
        }
        self.reached(workspace).await
    }

    async fn settled_elsewhere(&self, workspace: &WorkspaceId) -> Propagation {
        let mut looks = 0_u32;
        loop {
            tokio::time::sleep(LOOK.pause(looks)).await;
            looks = looks.saturating_add(1);
            let reached = self.reached(workspace).await;
            if reached.r#final {
                return reached;
            }
        }
    }

    async fn reached(&self, workspace: &WorkspaceId) -> Propagation {
        match self.receipts.view(workspace, self.request).await {
            Ok(Some(ReceiptView::Open(propagation))) => return *propagation,
            Ok(Some(ReceiptView::Stored(body))) => {
                if let Ok(propagation) = serde_json::from_str(body.get()) {
                    return propagation;
                }
            }
            Ok(None) => {}
            Err(error) => self.receipts.metrics.store_failed(&error),
        }
        Propagation::waiting(self.request, None, None, self.receipts.bound)
    }
}

fn open(propagation: Propagation) -> ReceiptView {
    ReceiptView::Open(Box::new(propagation))
}

pub(super) fn change(request: &NumberedRequest) -> Change {
    Change {
        request: Some((request.request_id.as_str().into(), request.workspace_id.clone())),
        position: request.position,
        cause: request.cause,
        committed_at: request.committed_at,
    }
}

/// Returns the changes of requests, and deletions by direct SQL or expiry: those have no receipt, but are measured.
fn changes(numbered: &Numbered) -> Vec<Change> {
    let mut changes: Vec<Change> = numbered.requests.iter().map(change).collect();
    let requested: HashSet<LogPosition> = changes.iter().map(|change| change.position).collect();
    let others = numbered.rows.iter().filter(|row| row.cause.is_deletion());
    changes.extend(others.filter(|row| !requested.contains(&row.position)).map(|row| Change {
        request: None,
        position: row.position,
        cause: row.cause,
        committed_at: row.committed_at,
    }));
    changes
}
