//! The receipts task: takes inputs, starts reads and writes of the store, and ends receipts as time passes.
//!
//! * [`roster_reads`]: receipts are opened after the roster was read.
//! * [`storage`]: final receipts are stored, and open requests adopted.

mod roster_reads;
pub(super) mod storage;

use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::Identity;
use evictd_core::limits::DUPLICATE_INSTANCES_MAX;
use evictd_core::position::LogPosition;
use evictd_core::receipts::TrackerConfig;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::metrics::Registry;
use evictd_store::HomeStore;
use evictd_wire::applied::Applied;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::handle::{Receipts, WAITS_MAX};
use super::input::{NewChanges, QUEUE_CAPACITY, ReceiptInput};
use super::membership::Membership;
use super::regions::RegionMetrics;
use super::snapshot::ReceiptsSnapshot;
use super::state::{OPEN_MAX, ReceiptsState, UnstoredReceipt};
use crate::config::ReceiptsConfig;
use crate::shared::Shared;

/// A roster row's `last_seen` is up to a minute old.
const ROSTER_AGE: Duration = Duration::from_mins(1);

/// Added for the way of a sign of life from one publisher through the roster to another.
const ROSTER_SLACK: Duration = Duration::from_secs(45);

/// How often silent processes are dropped and gauges are updated.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// The pause after the store failed.
const PAUSE: Duration = Duration::from_secs(1);

pub(crate) struct ReceiptsTask {
    store: Arc<dyn HomeStore>,
    shared: Shared,
    inputs: mpsc::Receiver<ReceiptInput>,
    pub(super) state: ReceiptsState,
    snapshot: watch::Sender<ReceiptsSnapshot>,
    pub(super) work: Work,
}

/// Reads and writes of the store that are due, or under way.
#[derive(Default)]
pub(super) struct Work {
    jobs: FuturesUnordered<BoxFuture<'static, Completion>>,
    deferred: Deferred,
    roster_read: Option<RosterRead>,
    is_writing_roster: bool,
    storing: Option<Vec<Arc<UnstoredReceipt>>>,
    pub(super) adoption: Option<Adoption>,
    /// Up to here, every row was numbered by this publisher, or searched for requests that wait here.
    accounted: LogPosition,
    /// Other publishers have numbered rows.
    pub(super) numbered_elsewhere: bool,
    pub(super) roster_due: LeaseTime,
    pub(super) adoption_due: LeaseTime,
    catch_up_due: LeaseTime,
    sweep_due: LeaseTime,
    /// The store has failed to keep receipts, and is left alone until then.
    store_paused_until: LeaseTime,
}

/// What waits for the next read of the roster, which has to begin after it came.
#[derive(Default)]
struct Deferred {
    changes: Vec<NewChanges>,
    announcements: Vec<(Identity, Applied)>,
    lookups: Vec<(Identity, oneshot::Sender<bool>)>,
}

/// A read of the roster and the log's head.
struct RosterRead {
    /// The revision that changes are read from; 0 for the whole roster.
    since: u64,
    /// The log's head when the read began.
    before: LogPosition,
    deferred: Deferred,
}

/// A search of the store for open requests.
pub(super) struct Adoption {
    /// Only requests that a client waits for here.
    only_awaited: bool,
    /// The log's head when the search began.
    head: LogPosition,
}

/// What the task does with the result of a read or write.
type Completion = Box<dyn FnOnce(&mut ReceiptsTask) + Send>;

impl ReceiptsTask {
    /// Makes the task and the handles of its queue. A wait for a receipt ends when `draining` is cancelled.
    pub(crate) fn new(
        config: &ReceiptsConfig,
        store: Arc<dyn HomeStore>,
        shared: Shared,
        registry: &Registry,
        draining: CancellationToken,
    ) -> (Receipts, Membership, Self) {
        let bound = Duration::from(config.bound);
        let regions = config.regions();
        let is_alone = store.is_exclusive();
        let roster_delay = if is_alone { Duration::ZERO } else { ROSTER_AGE + bound + ROSTER_SLACK };
        let tracker = TrackerConfig { bound, roster_delay, open_max: OPEN_MAX };
        let metrics = RegionMetrics::new(registry.clone(), &regions);
        let state = ReceiptsState::new(tracker, regions, metrics, shared.head.current().epoch());
        let (queue, inputs) = mpsc::channel(QUEUE_CAPACITY);
        let receipts = Receipts {
            queue: queue.clone(),
            store: store.clone(),
            metrics: shared.metrics.clone(),
            head: shared.head.clone(),
            bound,
            waits: Arc::new(Semaphore::new(WAITS_MAX)),
            draining,
        };
        let task =
            Self { store, shared, inputs, state, snapshot: watch::Sender::default(), work: Work::default() };
        (receipts, Membership { queue, bound }, task)
    }

    pub(crate) fn snapshot(&self) -> watch::Receiver<ReceiptsSnapshot> {
        self.snapshot.subscribe()
    }

    /// Runs until all senders of its queue are gone. What is final then is stored still.
    pub(crate) async fn run(mut self) {
        let mut head = self.shared.head.watch();
        loop {
            let now = self.begin_step();
            self.sweep(now);
            self.read_roster(now);
            self.store_receipts(now);
            self.adopt(now);
            let pause = self.wake_at().since(now);
            tokio::select! {
                input = self.inputs.recv() => match input {
                    Some(input) => self.on_input(input),
                    None => return self.finish().await,
                },
                Some(complete) = self.work.jobs.next() => self.on_job(complete),
                Ok(()) = head.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Reads the clock, and holds receipts unless they may become final at that time. A step changes the state at the time
    /// that it began: this process may stand still at any moment, and its clock may not.
    fn begin_step(&mut self) -> LeaseTime {
        let now = clock::lease_now();
        self.shared.vouching.apply_to(&mut self.state.tracker, now);
        if self.state.enter_epoch(self.shared.head.current().epoch(), now) {
            (self.work.roster_due, self.work.adoption_due) = (now, now);
        }
        now
    }

    fn on_input(&mut self, input: ReceiptInput) {
        let now = self.begin_step();
        let state = &mut self.state;
        match input {
            ReceiptInput::Begun { request, at, waiter } => {
                state.starts.insert(&request, at);
                if let Some(waiter) = waiter {
                    state.waiters.insert(request, waiter);
                }
            }
            ReceiptInput::Unchanged { request } => {
                state.starts.take(&request);
            }
            ReceiptInput::Numbered { first, head, changes } => {
                // This publisher's own requests may be among rows that another has numbered.
                if first.is_some() && first == self.work.accounted.next() {
                    self.work.accounted = head;
                } else if head > self.work.accounted {
                    self.work.numbered_elsewhere = true;
                }
                self.open(changes);
            }
            ReceiptInput::Found(changes) => self.open(changes),
            ReceiptInput::View { workspace, request, reply } => state.view(&workspace, request, reply, now),
            ReceiptInput::Announced { identity, announcement } => {
                self.on_announcement(identity, announcement, now);
            }
            ReceiptInput::Probed { instance, reply } => {
                let is_admitted =
                    state.tracker.duplicate_instances(&instance.identity, now) < DUPLICATE_INSTANCES_MAX;
                if is_admitted {
                    state.probed(&instance, now);
                }
                reply.send(is_admitted).ok();
            }
            ReceiptInput::LookedUp { identity, reply } => {
                if state.saw(&identity, now) {
                    reply.send(true).ok();
                } else {
                    self.work.deferred.lookups.push((identity, reply));
                }
            }
            ReceiptInput::TakeSeen { reply } => drop(reply.send(state.roster.take_seen())),
            ReceiptInput::Configured { regions } => state.configure(regions),
            #[cfg(test)]
            ReceiptInput::Inspect(inspect) => inspect(self),
        }
        self.state.take_events(&self.shared.metrics, now);
    }

    fn on_job(&mut self, complete: Completion) {
        complete(self);
        let now = self.begin_step();
        self.state.take_events(&self.shared.metrics, now);
    }

    /// Starts a read or write of the store. `complete` takes its result.
    fn start<T: Send + 'static>(
        &self,
        job: impl Future<Output = T> + Send + 'static,
        complete: fn(&mut Self, T),
    ) {
        let job =
            job.map(move |result| Box::new(move |task: &mut Self| complete(task, result)) as Completion);
        self.work.jobs.push(job.boxed());
    }

    /// Ends what the bound ends. Once a second, drops processes that fell silent, and updates what operators see.
    fn sweep(&mut self, now: LeaseTime) {
        let Self { state, shared, .. } = self;
        if now < self.work.sweep_due {
            state.tracker.end_due(now);
        } else {
            self.work.sweep_due = now.after(SWEEP_EVERY);
            state.tracker.poll(now);
            state.regions.count(&state.tracker, now);
            state.waiters.any_waits();
            shared.metrics.unconfirmed(state.tracker.unconfirmed());
            self.snapshot.send_replace(ReceiptsSnapshot::of(state));
        }
        state.take_events(&shared.metrics, now);
    }

    /// Returns when something is due next that no input and no job signals.
    fn wake_at(&self) -> LeaseTime {
        let store_due = self.state.store_due().filter(|_| self.work.storing.is_none());
        let store_due = store_due.map(|due| due.max(self.work.store_paused_until));
        let catches_up = self.work.roster_read.is_none() && !self.work.deferred.announcements.is_empty();
        let catch_up_due = catches_up.then_some(self.work.catch_up_due);
        let due = [self.state.tracker.wake_at(), store_due, catch_up_due];
        due.into_iter().flatten().fold(self.work.sweep_due, LeaseTime::min)
    }

    /// Stores what is final. What is open is found in the store by the next publisher.
    async fn finish(mut self) {
        self.work.store_paused_until = LeaseTime::default();
        loop {
            let now = self.begin_step();
            let is_done = self.state.unstored() == 0 || now < self.work.store_paused_until;
            if is_done && self.work.storing.is_none() {
                return;
            }
            self.start_storing();
            if let Some(complete) = self.work.jobs.next().await {
                self.on_job(complete);
            }
        }
    }
}

#[cfg(test)]
impl ReceiptsTask {
    /// Returns whether nothing is being read or written, nor about to be.
    pub(super) fn is_idle(&self) -> bool {
        let Deferred { changes, announcements, lookups } = &self.work.deferred;
        let is_deferred = !(changes.is_empty() && announcements.is_empty() && lookups.is_empty());
        let adopts = self.work.numbered_elsewhere && self.work.adoption.is_none();
        let now = clock::lease_now();
        !is_deferred
            && !adopts
            && self.work.jobs.is_empty()
            && now < self.work.roster_due.min(self.work.adoption_due)
    }

    /// Lets no search for open requests begin.
    pub(super) fn pause_adoption(&mut self) {
        self.work.adoption = Some(Adoption { only_awaited: true, head: LogPosition::ZERO });
    }
}

impl Deferred {
    fn append(&mut self, later: &mut Self) {
        self.changes.append(&mut later.changes);
        self.announcements.append(&mut later.announcements);
        self.lookups.append(&mut later.lookups);
    }
}
