//! Open receipts, and those that are final but not stored. No I/O: [`super::task`] reads and writes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::history::{LogToken, Milestone, Past};
use evictd_core::ids::{Identity, Region, WorkspaceId};
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Change, Measured, Receipt, ReceiptEvent, ReceiptTracker, TrackerConfig};
use evictd_core::roster::Instance;
use evictd_core::time::LeaseTime;
use evictd_store::receipt::FinalReceipt;
use evictd_wire::api::propagation::Propagation;
use evictd_wire::applied::Applied;
use tokio::sync::oneshot;

use super::regions::RegionMetrics;
use super::requests::{LatestRequests, ReceiptWaiters};
use super::roster::RosterMirror;
use crate::history::HomeHistory;
use crate::metrics::PublisherMetrics;

/// Receipts open at once, and final ones that wait to be stored. What is dropped beyond is found in the store again.
pub(super) const OPEN_MAX: usize = 100_000;

/// Request starts kept. A change whose request started before them is measured from when it is first seen.
const STARTS_MAX: usize = 65_536;

/// How long a final receipt may wait for others, to be stored with them in one transaction.
const GATHER: Duration = Duration::from_millis(50);

/// Stored receipts whose requests are kept.
const STORED_MAX: usize = 8_192;

pub(super) struct ReceiptsState {
    pub(super) tracker: ReceiptTracker,
    pub(super) roster: RosterMirror,
    pub(super) regions: RegionMetrics,
    pub(super) waiters: ReceiptWaiters,
    /// When requests began that may have made a change.
    pub(super) starts: LatestRequests<LeaseTime>,
    unstored: HashMap<Box<str>, Arc<UnstoredReceipt>>,
    /// Requests whose receipts were stored lately: a page that the store read a moment before shows them as open.
    stored: LatestRequests<()>,
    /// Queries for receipts that are final and not stored. They are dropped when the store has the receipt.
    queries: HashMap<Box<str>, Vec<oneshot::Sender<Propagation>>>,
    epoch: u32,
    store_due: LeaseTime,
}

/// A final receipt that the store doesn't have yet.
pub(super) struct UnstoredReceipt {
    receipt: Receipt,
    bound: Duration,
}

/// An announcement that claims more than the log holds.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Ahead;

impl ReceiptsState {
    pub(super) fn new(
        config: TrackerConfig,
        regions: Vec<Region>,
        metrics: RegionMetrics,
        epoch: u32,
    ) -> Self {
        Self {
            tracker: ReceiptTracker::new(config, regions),
            roster: RosterMirror::default(),
            regions: metrics,
            waiters: ReceiptWaiters::default(),
            starts: LatestRequests::new(STARTS_MAX),
            unstored: HashMap::new(),
            stored: LatestRequests::new(STORED_MAX),
            queries: HashMap::new(),
            epoch,
            store_due: LeaseTime::default(),
        }
    }

    /// Returns whether `epoch` is a new one. If so, open receipts are dropped: the store may have lost their changes, and
    /// agents that apply the new epoch would confirm them. What the store still has is to be read from it.
    pub(super) fn enter_epoch(&mut self, epoch: u32, now: LeaseTime) -> bool {
        if epoch <= self.epoch {
            return false;
        }
        // The log of a new store begins with the first epoch; nothing was lost then.
        let had_one = std::mem::replace(&mut self.epoch, epoch) > 0;
        if had_one {
            self.tracker.begin_epoch(epoch, now);
            self.roster.distrust(&mut self.tracker, now);
            self.unstored.clear();
            self.queries.clear();
            self.stored.clear();
        }
        had_one
    }

    /// Opens receipts, unless they are open or final here already.
    pub(super) fn track(&mut self, changes: Vec<Change>, now: LeaseTime) {
        for change in last_of_each_request(changes) {
            let (request, position) = (change.request.as_ref().map(|(id, _)| id.clone()), change.position);
            // A later change of an open request isn't known yet: pages of the log may separate a request's rows.
            let is_known = |id: &str| match self.tracker.last_of(id) {
                Some(last) => last >= position,
                None => self.looks_after(id) || self.stored.contains(id),
            };
            if request.as_deref().is_some_and(is_known) {
                continue;
            }
            let started = request.as_deref().and_then(|id| self.starts.take(id));
            let measured = if started.is_some() { Measured::FromRequest } else { Measured::FromFirstSight };
            tracing::trace!(%position, request, "receipt opened");
            self.tracker.track(change, started.unwrap_or(now), measured, now);
        }
    }

    /// Replaces the configured regions.
    pub(super) fn configure(&mut self, configured: Vec<Region>) {
        self.regions.configure(&configured);
        self.tracker.configure(configured);
    }

    /// Notes that a process requests a lease: receipts wait for it from now on.
    pub(super) fn probed(&mut self, instance: &Instance, now: LeaseTime) {
        self.roster.probed(&instance.identity);
        self.tracker.register(instance, now);
        self.tracker.record_contact(&instance.identity, now);
        self.regions.add(&instance.identity.region);
    }

    /// Notes that a process has sent something, and returns whether receipts wait for it.
    pub(super) fn saw(&mut self, identity: &Identity, now: LeaseTime) -> bool {
        self.tracker.record_contact(identity, now);
        self.roster.saw(identity, now);
        self.tracker.has_instance(identity)
    }

    /// Returns whether the request's receipt is open here, or final and not stored.
    pub(super) fn looks_after(&self, request: &str) -> bool {
        self.tracker.is_open(request) || self.unstored.contains_key(request)
    }

    /// Returns whether the store may have what this announcement is about: a further head, or a new process.
    pub(super) fn is_unknown(&self, identity: &Identity, announcement: &Applied, head: LogPosition) -> bool {
        let is_new = || !self.tracker.has_instance(identity) && !self.roster.has_departed(identity);
        announcement.applied > head || (!announcement.leaving && is_new())
    }

    /// Takes in an announcement; one that claims more than the log holds confirms nothing. Returns whether the roster is
    /// to be read soon.
    pub(super) fn announced(
        &mut self,
        identity: &Identity,
        announcement: &Applied,
        (history, head): (&HomeHistory, LogPosition),
        now: LeaseTime,
    ) -> Result<bool, Ahead> {
        let Applied { applied: at, provenance, leaving, .. } = *announcement;
        // What was applied of another history confirms nothing here.
        let applied = Milestone { provenance, at, token: LogToken::default() };
        let counts = at <= head && history.history().judge(&applied, head) == Past::Known;
        if counts {
            self.tracker.record_applied(identity, at, &announcement.apply_reports, now);
        }
        // A process that leaves is taken in after what it has applied.
        match (leaving, counts) {
            (true, _) => {
                let is_member = self.tracker.has_instance(identity);
                self.tracker.mark_departed(identity, now);
                Ok(self.roster.left(identity, is_member))
            }
            (false, true) => {
                self.roster.saw(identity, now);
                Ok(false)
            }
            (false, false) => Err(Ahead),
        }
    }

    /// Answers a query for a receipt.
    pub(super) fn view(
        &mut self,
        workspace: &WorkspaceId,
        request: Box<str>,
        reply: oneshot::Sender<Propagation>,
        now: LeaseTime,
    ) {
        if self.unstored.contains_key(&request) {
            self.store_due = now;
            let queries = self.queries.entry(request).or_default();
            // While the store fails, clients give up and query again.
            queries.retain(|query| !query.is_closed());
            queries.push(reply);
            return;
        }
        let Some(receipt) = self.tracker.receipt(&request, now) else { return };
        if receipt.change.request.as_ref().is_some_and(|(_, owner)| owner == workspace)
            && let Some(propagation) = Propagation::new(&receipt, self.tracker.bound())
        {
            // The client may be gone.
            drop(reply.send(propagation));
        }
    }

    /// Takes the tracker's events: counts them, and keeps final receipts to be stored.
    pub(super) fn take_events(&mut self, metrics: &PublisherMetrics, now: LeaseTime) {
        let bound = self.tracker.bound();
        for event in self.tracker.take_events() {
            match event {
                ReceiptEvent::Confirmed { region, after } => self.regions.confirmed(&region, after),
                ReceiptEvent::Final(receipt) => {
                    metrics.receipt(receipt.state());
                    let Some((request, _)) = &receipt.change.request else { continue };
                    if self.waiters.contains(request) {
                        self.store_due = now;
                    } else if self.unstored.is_empty() {
                        self.store_due = now.after(GATHER);
                    }
                    if self.unstored.len() < OPEN_MAX {
                        self.unstored.insert(request.clone(), Arc::new(UnstoredReceipt { receipt, bound }));
                    }
                }
            }
        }
    }

    pub(super) fn unstored(&self) -> usize {
        self.unstored.len()
    }

    /// Returns when receipts are to be stored next; `None` if there are none. At once if a client waits for one.
    pub(super) fn store_due(&self) -> Option<LeaseTime> {
        (!self.unstored.is_empty()).then_some(self.store_due)
    }

    /// Returns final receipts to be stored next, at most `limit`.
    pub(super) fn batch(&self, limit: usize) -> Vec<Arc<UnstoredReceipt>> {
        self.unstored.values().take(limit).cloned().collect()
    }

    /// Notes that receipts were stored, and sends them to the clients that wait. What was answered as final stays so, even
    /// if this process is killed now, and whatever another publisher has decided: so they are sent only now.
    pub(super) fn on_stored(&mut self, batch: &[Arc<UnstoredReceipt>], settled_elsewhere: &HashSet<String>) {
        for settled in batch {
            let Some((request, _)) = &settled.receipt.change.request else { continue };
            // A new epoch may have come between, and with it another receipt of the same request.
            if !self.unstored.get(request).is_some_and(|kept| Arc::ptr_eq(kept, settled)) {
                continue;
            }
            self.unstored.remove(request);
            self.queries.remove(request);
            self.stored.insert(request, ());
            // A client that gets none here reads the store: another publisher's receipt was there first.
            if let Some(waiter) = self.waiters.take(request)
                && !settled_elsewhere.contains(&**request)
                && let Some(propagation) = Propagation::new(&settled.receipt, settled.bound)
            {
                drop(waiter.send(propagation));
            }
        }
    }
}

impl UnstoredReceipt {
    pub(super) fn to_record(&self) -> Option<FinalReceipt> {
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

/// Returns the last change of each request: an agent that has applied it has applied all of them.
pub(super) fn last_of_each_request(mut changes: Vec<Change>) -> Vec<Change> {
    let mut last: HashMap<Box<str>, LogPosition> = HashMap::new();
    for change in &changes {
        if let Some((request, _)) = &change.request {
            let position = last.entry(request.clone()).or_insert(change.position);
            *position = change.position.max(*position);
        }
    }
    changes.retain(|change| {
        change.request.as_ref().is_none_or(|(request, _)| last.get(request) == Some(&change.position))
    });
    changes
}
