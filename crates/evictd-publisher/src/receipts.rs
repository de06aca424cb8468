//! What becomes of each change: the core's tracker of receipts, and what it hears and tells (R11, R12).
//!
//! The rules are [`evictd_core::receipts`]. Here is who calls them: numbering, announcements, rounds, the
//! roster in the store, and those who wait.
//!
//! * [`wait`]: requests under way, and those that wait for their receipt.
//! * [`roster`]: which agent processes there are.
//! * [`keep`]: final receipts go to the store, open ones are taken over from it.
//! * [`hear`]: what agents announce.
//! * [`agents`]: what operators see.

pub(crate) mod agents;
pub(crate) mod hear;
pub(crate) mod keep;
mod roster;
mod wait;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::{Identity, Region};
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Change, Measured, Receipt, ReceiptEvent, ReceiptTracker, TrackerConfig};
use evictd_core::rules::Rule;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::invariants::Invariants;
use evictd_ops::metrics::Registry;
use evictd_store::log::{Numbered, NumberedRequest};
use evictd_store::{HomeStore, StoreError};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use self::agents::Series;
use self::keep::Recorded;
use self::roster::Known;
use self::wait::{Starts, Waiting};
use crate::config::ReceiptsConfig;
use crate::history::HomeHistory;
use crate::metrics::Metrics;
use crate::rounds::RoundWish;
use crate::vouching::Vouching;

pub(crate) use self::keep::ReceiptView;

/// Receipts open at once, and those that wait to be stored; what is dropped beyond is found in the store again.
const OPEN_MAX: usize = 100_000;

/// Requests that wait for their receipt at once; further ones are answered with the state reached.
const WAITS_MAX: usize = 4_096;

/// The roster's note of when a process was last heard is up to a minute old.
const ROSTER_AGE: Duration = Duration::from_mins(1);

/// Added for the way of a sign of life from one publisher through the roster to another.
const ROSTER_SLACK: Duration = Duration::from_secs(45);

/// All that is known of changes on their way, and of the processes that they wait for.
pub(crate) struct Receipts {
    store: Arc<dyn HomeStore>,
    metrics: Arc<Metrics>,
    invariants: Invariants,
    /// Locked for moments only, never while the store is asked.
    state: Mutex<State>,
    /// How much of the roster has been read. Locked while it is read, so that whoever gets it reads anew.
    revision: tokio::sync::Mutex<u64>,
    /// Something is to be stored.
    recorded: Notify,
    /// Somebody waits for it.
    awaited: Notify,
    /// Some of it is stored.
    stored: Notify,
    /// The roster or the open requests are to be read again, all of them.
    look_again: Notify,
    /// Other publishers have numbered rows.
    numbered_elsewhere: Notify,
    rounds: RoundWish,
    vouching: Vouching,
    /// What agents have applied counts only if it lies in this history.
    history: Arc<HomeHistory>,
    places: Arc<Semaphore>,
    /// Those who wait for their receipt shall not wait any longer.
    draining: CancellationToken,
}

struct State {
    tracker: ReceiptTracker,
    head: LogPosition,
    /// Up to here, every row was numbered by this publisher, or looked at for whoever waits here.
    accounted: LogPosition,
    known: BTreeMap<Identity, Known>,
    /// Until then the roster may lack somebody: an epoch began a while ago.
    distrusted_until: Option<LeaseTime>,
    /// Processes that said goodbye, and whose row in the roster doesn't tell others yet.
    departed: BTreeSet<Identity>,
    /// Heard since the last round.
    heard: Vec<Identity>,
    starts: Starts,
    waiting: Waiting,
    /// Final, and not in the store yet.
    unrecorded: HashMap<Box<str>, Arc<Final>>,
    /// Stored lately: what the store said of them a moment before is no reason to open them again.
    recorded: Recorded,
    series: Series,
}

/// A receipt that won't change any more.
struct Final {
    receipt: Receipt,
    bound: Duration,
}

impl Receipts {
    /// Nothing is known yet; see [`Receipts::begin`].
    pub(crate) fn new(
        config: &ReceiptsConfig,
        store: Arc<dyn HomeStore>,
        metrics: Arc<Metrics>,
        registry: &Registry,
        rounds: RoundWish,
        (history, vouching): (Arc<HomeHistory>, Vouching),
        draining: CancellationToken,
    ) -> Self {
        let bound = Duration::from(config.bound);
        let configured: Vec<Region> = config.regions.iter().map(|name| Region::new(name.as_str())).collect();
        let tracker_config =
            TrackerConfig { bound, roster_delay: roster_delay(&*store, bound), open_max: OPEN_MAX };
        let state = State {
            tracker: ReceiptTracker::new(tracker_config, configured.iter().cloned()),
            head: LogPosition::ZERO,
            accounted: LogPosition::ZERO,
            known: BTreeMap::new(),
            distrusted_until: None,
            departed: BTreeSet::new(),
            heard: Vec::new(),
            starts: Starts::default(),
            waiting: Waiting::default(),
            unrecorded: HashMap::new(),
            recorded: Recorded::default(),
            series: Series::new(registry.clone(), configured),
        };
        Self {
            store,
            metrics,
            invariants: Invariants::new(registry),
            state: Mutex::new(state),
            revision: tokio::sync::Mutex::new(0),
            recorded: Notify::new(),
            awaited: Notify::new(),
            stored: Notify::new(),
            look_again: Notify::new(),
            numbered_elsewhere: Notify::new(),
            rounds,
            vouching,
            history,
            places: Arc::new(Semaphore::new(WAITS_MAX)),
            draining,
        }
    }

    /// Reads what the store knows: the roster, and the requests that another publisher, or this one before its
    /// restart, has left open.
    pub(crate) async fn begin(&self) -> Result<(), StoreError> {
        self.head(self.store.head().await?.at);
        self.read_roster().await?;
        self.adopt_what_is_open().await
    }

    /// The log reaches to `head`.
    pub(crate) fn head(&self, head: LogPosition) {
        let (mut state, now) = self.lock();
        let began = head.epoch() > state.head.epoch() && state.head > LogPosition::ZERO;
        state.head = state.head.max(head);
        if began {
            // The store may have lost changes, and the agents' word for the new epoch would confirm them. What it
            // still has is found in it.
            state.tracker.begin_epoch(head.epoch(), now);
            state.distrust_roster(now);
            state.unrecorded.clear();
            state.recorded = Recorded::default();
            drop(state);
            self.look_again.notify_one();
        }
    }

    /// The longest bound that an agent may keep.
    pub(crate) fn bound(&self) -> Duration {
        self.state.lock().tracker.bound()
    }

    /// How far the log reaches, as far as this publisher has seen.
    pub(crate) fn log_head(&self) -> LogPosition {
        self.state.lock().head
    }

    /// Rows got their positions, and are on their way. `known` is the head as it was known before they did.
    ///
    /// Receipts are opened for them after the roster was read: everybody who may serve from before them stands
    /// there by now (R12).
    pub(crate) async fn numbered(&self, known: LogPosition, numbered: &Numbered) {
        self.account_for(numbered);
        if numbered.rows.is_empty() {
            return;
        }
        if numbered.head.at < known {
            tracing::warn!(head = %numbered.head.at, %known, "the home store is behind what it was");
            return self.rounds.want();
        }
        self.check_density(numbered);
        let mut changes: Vec<Change> = numbered.requests.iter().map(change).collect();
        // Past the API, by SQL say: nobody can ask for a receipt, but how long it took is of interest.
        let requested: HashSet<LogPosition> = changes.iter().map(|change| change.position).collect();
        let others = numbered.rows.iter().filter(|row| row.cause.is_deletion());
        changes.extend(others.filter(|row| !requested.contains(&row.position)).map(|row| Change {
            request: None,
            position: row.position,
            cause: row.cause,
            committed_at: row.committed_at,
        }));
        self.open(numbered.head.at.epoch(), changes).await;
    }

    /// Notices that other publishers have numbered rows. This publisher's own requests may be among them, and who
    /// waits for their receipts must not wait until they are found by themselves.
    fn account_for(&self, numbered: &Numbered) {
        let mut state = self.state.lock();
        let begin = numbered.rows.first().map(|row| row.position);
        if begin.is_some() && begin == state.accounted.next() {
            state.accounted = numbered.head.at;
        } else if numbered.head.at > state.accounted {
            self.numbered_elsewhere.notify_one();
        }
    }

    /// R1, as far as it shows here.
    fn check_density(&self, numbered: &Numbered) {
        let ends_at_head = numbered.rows.last().is_some_and(|last| last.position == numbered.head.at);
        let dense = numbered.rows.windows(2).all(|pair| pair[0].position.next() == Some(pair[1].position));
        if !ends_at_head || !dense {
            let first = numbered.rows.first().map(|row| row.position);
            self.invariants.violated(
                Rule::R1,
                format_args!("{} rows from {first:?} to the head {}", numbered.rows.len(), numbered.head.at),
            );
        }
    }

    /// Opens receipts of changes that were read in `epoch`, unless they are known or another epoch has begun.
    /// If the roster can't be read, they are left to be found in the store.
    async fn open(&self, epoch: u32, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let read = async {
            self.read_roster_changes().await?;
            self.store.head().await
        };
        let head = match read.await {
            Ok(head) => head.at,
            Err(error) => return self.metrics.store_failed(&error),
        };
        let (mut state, now) = self.lock();
        if head < state.head {
            // It went back. What agents have applied of the lost history must not confirm what replaced it.
            return self.rounds.want();
        }
        if state.head.epoch() != epoch {
            return;
        }
        for change in last_of_each_request(changes) {
            let (request, position) = (change.request.as_ref().map(|(id, _)| id.clone()), change.position);
            // What is open or final here already is not to be measured once more, from now.
            // A later change of an open one is news: pages of the log may take a request's rows apart.
            let is_known = |id: &str| match state.tracker.last_of(id) {
                Some(last) => last >= position,
                None => state.looks_after(id) || state.recorded.contains(id),
            };
            if request.as_deref().is_some_and(is_known) {
                continue;
            }
            let started = request.as_deref().and_then(|id| state.starts.take(id));
            let (since, measured) = match started {
                Some(since) => (since, Measured::FromRequest),
                None => (now, Measured::FromFirstSight),
            };
            tracing::trace!(%position, request, "a receipt is open");
            state.tracker.track(change, since, measured, now);
        }
        self.settle(&mut state);
    }

    /// Locks the state, and holds receipts unless they may become final now. What is done to the tracker under this lock is
    /// done at the time that comes with it: a process may stand still at any moment, and its clock may not.
    fn lock(&self) -> (MutexGuard<'_, State>, LeaseTime) {
        let mut state = self.state.lock();
        let now = clock::lease_now();
        self.vouching.rule(&mut state.tracker, now);
        (state, now)
    }

    /// Records and reports what the tracker's last changes brought about.
    fn settle(&self, state: &mut State) {
        let bound = state.tracker.bound();
        let mut any_final = false;
        for event in state.tracker.take_events() {
            match event {
                ReceiptEvent::Confirmed { region, after } => state.series.confirmed(&region, after),
                ReceiptEvent::Final(receipt) => {
                    self.metrics.receipt(receipt.state());
                    let Some((request, _)) = &receipt.change.request else { continue };
                    // Whoever waits is told when it is stored: what was told as final stays so, whoever is killed
                    // now, and whatever another publisher has come to.
                    if state.waiting.contains(request) {
                        self.awaited.notify_one();
                    }
                    if state.unrecorded.len() < OPEN_MAX {
                        state.unrecorded.insert(request.clone(), Arc::new(Final { receipt, bound }));
                    }
                    any_final = true;
                }
            }
        }
        if any_final {
            self.recorded.notify_one();
        }
    }

    /// Ends what the bound ends and forgets who fell silent, as time goes by; until `shutdown`.
    pub(crate) async fn keep_time(self: Arc<Self>, shutdown: CancellationToken) {
        const SWEEP: Duration = Duration::from_secs(1);
        let mut swept: Option<LeaseTime> = None;
        loop {
            let wait = {
                let (mut state, now) = self.lock();
                if swept.is_none_or(|swept| now.since(swept) >= SWEEP) {
                    swept = Some(now);
                    state.tracker.poll(now);
                    state.count(now);
                    self.metrics.unconfirmed(state.tracker.unconfirmed());
                } else {
                    state.tracker.end_due(now);
                }
                self.settle(&mut state);
                let due = state.tracker.wake_at().map_or(SWEEP, |due| due.since(now));
                // A receipt may be opened meanwhile; the next one is due a bound later at the earliest.
                due.min(SWEEP).min(state.tracker.bound() / 10).max(Duration::from_millis(5))
            };
            if shutdown.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
        }
    }
}

/// Of several changes that one request made, the last: who has applied that has applied all of them.
fn last_of_each_request(mut changes: Vec<Change>) -> Vec<Change> {
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

/// How long other publishers may hear a process before this one learns of it.
fn roster_delay(store: &dyn HomeStore, bound: Duration) -> Duration {
    if store.is_exclusive() { Duration::ZERO } else { ROSTER_AGE + bound + ROSTER_SLACK }
}

fn change(request: &NumberedRequest) -> Change {
    Change {
        request: Some((request.request_id.as_str().into(), request.workspace_id.clone())),
        position: request.position,
        cause: request.cause,
        committed_at: request.committed_at,
    }
}

#[cfg(test)]
mod tests;
