//! Requests in progress, and the clients that wait for them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use evictd_wire::api::propagation::Propagation;
use tokio::sync::oneshot;

/// A map by request id that drops the oldest entries beyond a limit.
pub(super) struct LatestRequests<V> {
    entries: HashMap<Arc<str>, V>,
    /// In order of insertion, taken entries included.
    order: VecDeque<Arc<str>>,
    limit: usize,
}

impl<V> LatestRequests<V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), order: VecDeque::new(), limit }
    }

    pub(super) fn insert(&mut self, request: &str, value: V) {
        let request: Arc<str> = request.into();
        if self.entries.insert(request.clone(), value).is_none() {
            self.order.push_back(request);
        }
        if self.order.len() > self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            self.entries.remove(&oldest);
        }
    }

    pub(super) fn contains(&self, request: &str) -> bool {
        self.entries.contains_key(request)
    }

    pub(super) fn take(&mut self, request: &str) -> Option<V> {
        self.entries.remove(request)
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
    }
}

/// Clients that wait for a final receipt. One that no longer waits has dropped its receiver.
#[derive(Default)]
pub(super) struct ReceiptWaiters(HashMap<Box<str>, oneshot::Sender<Propagation>>);

impl ReceiptWaiters {
    pub(super) fn insert(&mut self, request: Box<str>, waiter: oneshot::Sender<Propagation>) {
        self.0.insert(request, waiter);
    }

    pub(super) fn contains(&self, request: &str) -> bool {
        self.0.get(request).is_some_and(|waiter| !waiter.is_closed())
    }

    pub(super) fn take(&mut self, request: &str) -> Option<oneshot::Sender<Propagation>> {
        self.0.remove(request)
    }

    /// Drops those that no longer wait, and returns whether any still does.
    pub(super) fn any_waits(&mut self) -> bool {
        self.0.retain(|_, waiter| !waiter.is_closed());
        !self.0.is_empty()
    }
}
