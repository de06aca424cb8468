//! The receipts task: takes inputs, starts reads and writes of the store, and ends receipts as time passes.
//!
//! * [`roster_reads`]: receipts are opened after the roster was read.
//! * [`storage`]: final receipts are stored, and open requests adopted.

mod roster_reads;
pub(super) mod storage;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::{Identity, Region};
use evictd_core::limits::DUPLICATE_INSTANCES_MAX;
use evictd_core::position::LogPosition;
use evictd_core::receipts::TrackerConfig;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::metrics::Registry;
use evictd_store::log::NumberedRequest;
use evictd_store::roster::Roster;
use evictd_store::{LogStore, ReceiptStore, RosterStore, StoreError};
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
use crate::history::HomeHistory;
use crate::log_head::LogHead;
use crate::metrics::Metrics;
use crate::rounds::RoundTrigger;
use crate::vouching::Vouching;

/// A roster row's `last_seen` is up to a minute old.
const ROSTER_AGE: Duration = Duration::from_mins(1);

/// Added for the way of a sign of life from one publisher through the roster to another.
const ROSTER_SLACK: Duration = Duration::from_secs(45);

/// How often silent processes are dropped and gauges are updated.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// The pause after the store failed.
const PAUSE: Duration = Duration::from_secs(1);

/// What the task reads and writes.
pub(crate) struct ReceiptSources {
    pub(crate) log: Arc<dyn LogStore>,
    pub(crate) roster: Arc<dyn RosterStore>,
    pub(crate) receipts: Arc<dyn ReceiptStore>,
    pub(crate) head: LogHead,
    pub(crate) history: Arc<HomeHistory>,
    pub(crate) vouching: Vouching,
    pub(crate) rounds: RoundTrigger,
    pub(crate) metrics: Arc<Metrics>,
}

pub(crate) struct ReceiptsTask {
    pub(super) sources: ReceiptSources,
    inputs: mpsc::Receiver<ReceiptInput>,
    pub(super) state: ReceiptsState,
    snapshot: watch::Sender<ReceiptsSnapshot>,
    jobs: FuturesUnordered<BoxFuture<'static, JobResult>>,
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

/// What a read or write of the store has come to.
enum JobResult {
    RosterRead(Result<(Roster, LogPosition), StoreError>),
    RosterWritten(Result<(), StoreError>),
    Stored(Result<HashSet<String>, StoreError>),
    /// A page of them, and the epoch in which it was read.
    OpenRequests(Result<(u32, Vec<NumberedRequest>), StoreError>),
}

impl ReceiptsTask {
    /// Makes the task and the handles of its queue. A wait for a receipt ends when `draining` is cancelled.
    pub(crate) fn new(
        config: &ReceiptsConfig,
        sources: ReceiptSources,
        registry: &Registry,
        draining: CancellationToken,
    ) -> (Receipts, Membership, Self) {
        let bound = Duration::from(config.bound);
        let regions: Vec<Region> = config.regions.iter().map(|name| Region::new(name.as_str())).collect();
        let is_alone = sources.log.is_exclusive();
        let roster_delay = if is_alone { Duration::ZERO } else { ROSTER_AGE + bound + ROSTER_SLACK };
        let tracker = TrackerConfig { bound, roster_delay, open_max: OPEN_MAX };
        let metrics = RegionMetrics::new(registry.clone(), &regions);
        let state = ReceiptsState::new(tracker, regions, metrics, sources.head.current().epoch());
        let (queue, inputs) = mpsc::channel(QUEUE_CAPACITY);
        let receipts = Receipts {
            queue: queue.clone(),
            store: sources.receipts.clone(),
            metrics: sources.metrics.clone(),
            head: sources.head.clone(),
            bound,
            waits: Arc::new(Semaphore::new(WAITS_MAX)),
            draining,
        };
        let due = LeaseTime::default();
        let task = Self {
            sources,
            inputs,
            state,
            snapshot: watch::Sender::default(),
            jobs: FuturesUnordered::new(),
            deferred: Deferred::default(),
            roster_read: None,
            is_writing_roster: false,
            storing: None,
            adoption: None,
            accounted: LogPosition::ZERO,
            numbered_elsewhere: false,
            roster_due: due,
            adoption_due: due,
            catch_up_due: due,
            sweep_due: due,
            store_paused_until: due,
        };
        (receipts, Membership { queue, bound }, task)
    }

    pub(crate) fn snapshot(&self) -> watch::Receiver<ReceiptsSnapshot> {
        self.snapshot.subscribe()
    }

    /// Runs until all senders of its queue are gone. What is final then is stored still.
    pub(crate) async fn run(mut self) {
        let mut head = self.sources.head.watch();
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
                Some(done) = self.jobs.next() => self.on_job(done),
                Ok(()) = head.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Reads the clock, and holds receipts unless they may become final at that time. A step changes the state at the time
    /// that it began: this process may stand still at any moment, and its clock may not.
    fn begin_step(&mut self) -> LeaseTime {
        let now = clock::lease_now();
        self.sources.vouching.apply_to(&mut self.state.tracker, now);
        if self.state.enter_epoch(self.sources.head.current().epoch(), now) {
            (self.roster_due, self.adoption_due) = (now, now);
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
                if first.is_some() && first == self.accounted.next() {
                    self.accounted = head;
                } else if head > self.accounted {
                    self.numbered_elsewhere = true;
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
                    self.deferred.lookups.push((identity, reply));
                }
            }
            ReceiptInput::TakeSeen { reply } => drop(reply.send(state.roster.take_seen())),
            #[cfg(test)]
            ReceiptInput::Inspect(inspect) => inspect(self),
        }
        self.state.take_events(&self.sources.metrics, now);
    }

    fn on_job(&mut self, done: JobResult) {
        match done {
            JobResult::RosterRead(read) => self.on_roster_read(read),
            JobResult::RosterWritten(written) => {
                self.is_writing_roster = false;
                if let Err(error) = written {
                    self.sources.metrics.store_failed(&error);
                }
            }
            JobResult::Stored(stored) => self.on_stored(stored),
            JobResult::OpenRequests(read) => self.on_open_requests(read),
        }
        let now = self.begin_step();
        self.state.take_events(&self.sources.metrics, now);
    }

    fn start(&self, job: impl Future<Output = JobResult> + Send + 'static) {
        self.jobs.push(job.boxed());
    }

    /// Ends what the bound ends. Once a second, drops processes that fell silent, and updates what operators see.
    fn sweep(&mut self, now: LeaseTime) {
        let Self { state, sources, .. } = self;
        if now < self.sweep_due {
            state.tracker.end_due(now);
        } else {
            self.sweep_due = now.after(SWEEP_EVERY);
            state.tracker.poll(now);
            state.regions.count(&state.tracker, now);
            state.waiters.any_waits();
            sources.metrics.unconfirmed(state.tracker.unconfirmed());
            self.snapshot.send_replace(ReceiptsSnapshot::of(&state.tracker, state.unstored()));
        }
        state.take_events(&sources.metrics, now);
    }

    /// Returns when something is due next that no input and no job signals.
    fn wake_at(&self) -> LeaseTime {
        let store_due = self.state.store_due().filter(|_| self.storing.is_none());
        let store_due = store_due.map(|due| due.max(self.store_paused_until));
        let catches_up = self.roster_read.is_none() && !self.deferred.announcements.is_empty();
        let catch_up_due = catches_up.then_some(self.catch_up_due);
        let due = [self.state.tracker.wake_at(), store_due, catch_up_due];
        due.into_iter().flatten().fold(self.sweep_due, LeaseTime::min)
    }

    /// Stores what is final. What is open is found in the store by the next publisher.
    async fn finish(mut self) {
        self.store_paused_until = LeaseTime::default();
        loop {
            let now = self.begin_step();
            let is_done = self.state.unstored() == 0 || now < self.store_paused_until;
            if is_done && self.storing.is_none() {
                return;
            }
            self.start_storing();
            if let Some(done) = self.jobs.next().await {
                self.on_job(done);
            }
        }
    }
}

#[cfg(test)]
impl ReceiptsTask {
    /// Returns whether nothing is being read or written, nor about to be.
    pub(super) fn is_idle(&self) -> bool {
        let Deferred { changes, announcements, lookups } = &self.deferred;
        let is_deferred = !(changes.is_empty() && announcements.is_empty() && lookups.is_empty());
        let adopts = self.numbered_elsewhere && self.adoption.is_none();
        let now = clock::lease_now();
        !is_deferred && !adopts && self.jobs.is_empty() && now < self.roster_due.min(self.adoption_due)
    }

    /// Lets no search for open requests begin.
    pub(super) fn pause_adoption(&mut self) {
        self.adoption = Some(Adoption { only_awaited: true, head: LogPosition::ZERO });
    }
}

impl Deferred {
    fn append(&mut self, later: &mut Self) {
        self.changes.append(&mut later.changes);
        self.announcements.append(&mut later.announcements);
        self.lookups.append(&mut later.lookups);
    }
}
