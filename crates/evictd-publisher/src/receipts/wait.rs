//! Requests under way: when each began, and who waits for its receipt.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::WorkspaceId;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::propagation::Propagation;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Receipts;
use super::keep::ReceiptView;

/// Beginnings remembered; a change whose request began before them is measured from its first sight.
const STARTS_MAX: usize = 65_536;

/// How soon, and then how often, somebody who waits looks into the store for a change that is nobody's here: another
/// publisher may be done with it already, or it had no effect that any agent could tell.
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// When requests began that may have made a change.
#[derive(Default)]
pub(super) struct Starts {
    at: HashMap<Arc<str>, LeaseTime>,
    /// In order, those that were taken out included.
    order: VecDeque<Arc<str>>,
}

impl Starts {
    fn note(&mut self, request: &str, now: LeaseTime) {
        let request: Arc<str> = request.into();
        self.at.insert(request.clone(), now);
        self.order.push_back(request);
        if self.order.len() > STARTS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.at.remove(&oldest);
        }
    }

    pub(super) fn take(&mut self, request: &str) -> Option<LeaseTime> {
        self.at.remove(request)
    }
}

/// Who waits for the receipt of which request.
#[derive(Default)]
pub(super) struct Waiting(HashMap<Box<str>, oneshot::Sender<Propagation>>);

impl Waiting {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, request: &str) -> bool {
        self.0.contains_key(request)
    }

    pub(super) fn take(&mut self, request: &str) -> Option<oneshot::Sender<Propagation>> {
        self.0.remove(request)
    }
}

/// A request that is about to make a change. Dropping it ends its wait, and nothing else: the change may be
/// committed all the same.
pub(crate) struct Under<'a> {
    receipts: &'a Receipts,
    request: &'a str,
    wait: Option<(oneshot::Receiver<Propagation>, OwnedSemaphorePermit)>,
}

impl Receipts {
    /// A request begins: from here its times are measured. To be called before the store is, or the change could
    /// be confirmed before anybody has asked for it.
    pub(crate) fn under<'a>(&'a self, request: &'a str, waits: bool) -> Under<'a> {
        let place = if waits { self.places.clone().try_acquire_owned().ok() } else { None };
        let mut state = self.state.lock();
        state.starts.note(request, clock::lease_now());
        let wait = place.map(|place| {
            let (sender, receiver) = oneshot::channel();
            state.waiting.0.insert(request.into(), sender);
            (receiver, place)
        });
        Under { receipts: self, request, wait }
    }
}

impl Under<'_> {
    /// The request failed. Unless it is unknown whether it was carried out, it changed nothing.
    pub(crate) fn refused(self, error: &ApiError) {
        if error.kind != ErrorKind::ServiceUnavailable {
            self.receipts.state.lock().starts.take(self.request);
        }
    }

    /// The request has made a change that no agent could have cached.
    pub(crate) fn without_effect(self) -> Propagation {
        let mut state = self.receipts.state.lock();
        state.starts.take(self.request);
        Propagation::nothing(self.request, state.tracker.bound())
    }

    /// The receipt as soon as it is final, or what is known when `limit` is over or the publisher shuts down.
    /// The change was committed: whatever happens here, the request has succeeded.
    pub(crate) async fn settled(mut self, workspace: &WorkspaceId, limit: Duration) -> Propagation {
        let Some((mut receiver, _place)) = self.wait.take() else { return self.reached(workspace).await };
        let receipts = self.receipts;
        let over = tokio::time::sleep(limit);
        let mut over = std::pin::pin!(over);
        let mut pause = FIRST_LOOK;
        loop {
            tokio::select! {
                biased;
                settled = &mut receiver => match settled {
                    Ok(propagation) => return propagation,
                    Err(_) => return self.reached(workspace).await,
                },
                () = receipts.draining.cancelled() => return self.reached(workspace).await,
                () = &mut over => return self.reached(workspace).await,
                () = tokio::time::sleep(pause) => {
                    pause = (pause * 2).min(LOOK_EVERY);
                    if !receipts.state.lock().looks_after(self.request) {
                        let reached = self.reached(workspace).await;
                        if reached.r#final {
                            return reached;
                        }
                    }
                }
            }
        }
    }

    async fn reached(&self, workspace: &WorkspaceId) -> Propagation {
        let bound = self.receipts.state.lock().tracker.bound();
        match self.receipts.tell(workspace, self.request).await {
            Ok(Some(ReceiptView::Open(propagation))) => return *propagation,
            Ok(Some(ReceiptView::Stored(body))) => {
                if let Ok(propagation) = serde_json::from_str(body.get()) {
                    return propagation;
                }
            }
            Ok(None) => {}
            Err(error) => self.receipts.metrics.store_failed(&error),
        }
        Propagation::waiting(self.request, None, None, bound)
    }
}

impl Drop for Under<'_> {
    fn drop(&mut self) {
        self.receipts.state.lock().waiting.take(self.request);
    }
}
