//! Final receipts go to the store; what is open there and not here is taken over.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::WorkspaceId;
use evictd_core::position::LogPosition;
use evictd_store::StoreError;
use evictd_store::receipt::{self, FinalReceipt};
use evictd_wire::api::propagation::Propagation;
use serde_json::value::RawValue;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Final, Receipts, State, change};

/// Receipts stored in one transaction.
const BATCH: usize = 256;

/// How long a receipt may wait for others, to be stored with them in one transaction.
const GATHER: Duration = Duration::from_millis(50);

/// How long somebody who asks waits for a receipt to be stored.
const RECORD_PATIENCE: Duration = Duration::from_secs(1);

/// The pause after the store failed.
const PAUSE: Duration = Duration::from_secs(1);

/// How often the store is searched for requests that nobody looks after.
pub(super) const ADOPT_EVERY: Duration = Duration::from_secs(5);

/// How often the whole roster is read, for what other publishers heard.
const ROSTER_EVERY: Duration = Duration::from_secs(15);

/// Open requests read at once.
const PAGE: usize = 1_024;

/// Stored receipts remembered by name.
const RECORDED_MAX: usize = 8_192;

/// The requests whose receipts were stored last.
#[derive(Default)]
pub(super) struct Recorded {
    requests: HashSet<Arc<str>>,
    order: VecDeque<Arc<str>>,
}

impl Recorded {
    pub(super) fn contains(&self, request: &str) -> bool {
        self.requests.contains(request)
    }

    fn note(&mut self, request: &str) {
        let request: Arc<str> = request.into();
        if self.requests.insert(request.clone()) {
            self.order.push_back(request);
        }
        if self.order.len() > RECORDED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.requests.remove(&oldest);
        }
    }
}

/// What can be told of a request.
pub(crate) enum ReceiptView {
    /// It is on its way.
    Open(Box<Propagation>),
    /// It is settled: as recorded, byte for byte.
    Stored(Box<RawValue>),
}

impl Receipts {
    /// Keeps receipts and the roster until `shutdown`; what is final then is stored still.
    pub(crate) async fn keep(self: Arc<Self>, shutdown: CancellationToken) {
        // Side by side: who waits for a receipt that another publisher's work decides about doesn't wait for a disk.
        tokio::join!(self.keep_final_ones(&shutdown), self.keep_up(&shutdown));
    }

    pub(super) async fn keep_final_ones(&self, shutdown: &CancellationToken) {
        while shutdown.run_until_cancelled(self.recorded.notified()).await.is_some() {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = self.awaited.notified() => {}
                () = tokio::time::sleep(GATHER) => {}
            }
            if let Err(error) = self.record().await {
                self.metrics.store_failed(&error);
                shutdown.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
                self.recorded.notify_one();
            }
        }
        if let Err(error) = self.record().await {
            self.metrics.store_failed(&error);
        }
    }

    /// Keeps up with what other publishers do: with the roster, and with the requests that they numbered.
    async fn keep_up(&self, shutdown: &CancellationToken) {
        let every = |period| {
            let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let (mut adopt, mut roster) = (every(ADOPT_EVERY), every(ROSTER_EVERY));
        loop {
            let done = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = roster.tick() => self.read_roster().await,
                () = self.look_again.notified() => self.look_again().await,
                _ = adopt.tick() => self.adopt_what_is_open().await,
                () = self.numbered_elsewhere.notified() => self.adopt_what_is_waited_for().await,
            };
            if let Err(error) = done {
                self.metrics.store_failed(&error);
                shutdown.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
            }
        }
    }

    async fn look_again(&self) -> Result<(), StoreError> {
        self.read_roster().await?;
        self.adopt_what_is_open().await
    }

    /// Stores what is final, and tells those who wait for it. It stays here until that has succeeded.
    pub(super) async fn record(&self) -> Result<(), StoreError> {
        loop {
            let batch: Vec<Arc<Final>> = self.state.lock().unrecorded.values().take(BATCH).cloned().collect();
            if batch.is_empty() {
                return Ok(());
            }
            let receipts: Vec<FinalReceipt> =
                batch.iter().filter_map(|settled| settled.to_record()).collect();
            let settled_elsewhere = self.store.record_receipts(&receipts).await?;
            let mut state = self.state.lock();
            for settled in &batch {
                let Some((request, _)) = &settled.receipt.change.request else { continue };
                // A new epoch may have come between, and with it another receipt of the same request.
                if !state.unrecorded.get(request).is_some_and(|kept| Arc::ptr_eq(kept, settled)) {
                    continue;
                }
                state.unrecorded.remove(request);
                state.recorded.note(request);
                // Whoever isn't told here looks into the store: another publisher's receipt was there first.
                if let Some(waiting) = state.waiting.take(request)
                    && !settled_elsewhere.contains(&**request)
                    && let Some(propagation) = Propagation::new(&settled.receipt, settled.bound)
                {
                    // Whoever waited may be gone.
                    drop(waiting.send(propagation));
                }
            }
            drop(state);
            self.stored.notify_waiters();
        }
    }

    /// Takes over the requests that the store has as open and that nobody here looks after.
    pub(super) async fn adopt_what_is_open(&self) -> Result<(), StoreError> {
        self.adopt(LogPosition::ZERO, |_, _| true).await
    }

    /// Takes over those that somebody waits for here, of what other publishers have numbered lately. The others are
    /// theirs: two who keep the same receipt do everything twice.
    pub(super) async fn adopt_what_is_waited_for(&self) -> Result<(), StoreError> {
        let accounted = {
            let mut state = self.state.lock();
            if state.waiting.is_empty() {
                // Whoever comes to wait later has a change that is numbered later.
                state.accounted = state.accounted.max(state.head);
                return Ok(());
            }
            state.accounted
        };
        self.adopt(accounted, |state, request| state.waiting.contains(request)).await
    }

    /// Takes over what is open above a position and `wanted`. From there on, everything up to the head is
    /// accounted for.
    async fn adopt(
        &self,
        mut after: LogPosition,
        wanted: impl Fn(&State, &str) -> bool,
    ) -> Result<(), StoreError> {
        let head = self.log_head();
        loop {
            let epoch = self.log_head().epoch();
            let page = self.store.open_requests(after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.position;
            let whole = page.len() == PAGE;
            let strays = {
                let state = self.state.lock();
                let is_stray = |id: &str| !state.looks_after(id) && wanted(&state, id);
                page.iter().filter(|request| is_stray(&request.request_id)).map(change).collect()
            };
            self.open(epoch, strays).await;
            if !whole {
                break;
            }
        }
        let mut state = self.state.lock();
        state.accounted = state.accounted.max(head);
        Ok(())
    }

    /// What is known of a request of this workspace; `None` if the workspace has carried out no such request.
    pub(crate) async fn tell(
        &self,
        workspace: &WorkspaceId,
        request: &str,
    ) -> Result<Option<ReceiptView>, StoreError> {
        if let Some(told) = self.tell_from_memory(workspace, request) {
            return Ok(Some(told));
        }
        self.until_recorded(request).await;
        let epoch = self.log_head().epoch();
        let bound = self.state.lock().tracker.bound();
        let propagation = match self.store.receipt(workspace, request).await? {
            None => return Ok(None),
            Some(receipt::StoredOutcome::Final { body }) => {
                let corrupt = |_| StoreError::Corrupt { what: "receipt", value: request.to_owned() };
                return Ok(Some(ReceiptView::Stored(RawValue::from_string(body).map_err(corrupt)?)));
            }
            Some(receipt::StoredOutcome::Nothing) => Propagation::nothing(request, bound),
            Some(receipt::StoredOutcome::Open(rows)) => {
                let numbered = rows.iter().rev().find_map(|row| Some((row.position?, row)));
                if let Some((position, row)) = numbered {
                    // Another publisher numbered it, or this one a moment ago.
                    let change = evictd_core::receipts::Change {
                        request: Some((request.into(), workspace.clone())),
                        position,
                        cause: row.cause,
                        committed_at: row.committed_at,
                    };
                    self.open(epoch, vec![change]).await;
                    if let Some(told) = self.tell_from_memory(workspace, request) {
                        return Ok(Some(told));
                    }
                }
                let committed_at = rows.last().map(|row| row.committed_at);
                let place = numbered.map(|(position, row)| (position, row.cause));
                Propagation::waiting(request, place, committed_at, bound)
            }
        };
        Ok(Some(ReceiptView::Open(Box::new(propagation))))
    }

    /// Waits until a receipt that is final is stored, as long as that takes no longer than it should. Only its own task
    /// stores: many who ask would take the connections that rounds need.
    async fn until_recorded(&self, request: &str) {
        let waiting = async {
            loop {
                let mut stored = std::pin::pin!(self.stored.notified());
                stored.as_mut().enable();
                if !self.state.lock().unrecorded.contains_key(request) {
                    return;
                }
                self.awaited.notify_one();
                stored.await;
            }
        };
        // Otherwise it isn't told as final yet.
        drop(tokio::time::timeout(RECORD_PATIENCE, waiting).await);
    }

    /// What is known of an open receipt.
    fn tell_from_memory(&self, workspace: &WorkspaceId, request: &str) -> Option<ReceiptView> {
        let (state, now) = self.lock();
        let receipt = state.tracker.receipt(request, now)?;
        let of_workspace = receipt.change.request.as_ref().is_some_and(|(_, owner)| owner == workspace);
        let told = of_workspace.then(|| Propagation::new(&receipt, state.tracker.bound()))??;
        Some(ReceiptView::Open(Box::new(told)))
    }
}

impl State {
    pub(super) fn looks_after(&self, request: &str) -> bool {
        self.tracker.is_open(request) || self.unrecorded.contains_key(request)
    }
}

impl Final {
    fn to_record(&self) -> Option<FinalReceipt> {
        let change = &self.receipt.change;
        // By the store's clock, which purges it one day, and not by this machine's.
        let final_at = change.committed_at.after(self.receipt.final_after.unwrap_or_default());
        let (request, workspace) = change.request.as_ref()?;
        let propagation = Propagation::new(&self.receipt, self.bound)?;
        Some(FinalReceipt {
            request_id: request.to_string(),
            workspace_id: workspace.clone(),
            position: change.position,
            committed_at: change.committed_at,
            final_at,
            // It has no map, let alone one with keys that aren't text.
            body: serde_json::to_string(&propagation).ok()?,
        })
    }
}
