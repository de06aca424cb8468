//! What is known of each change's way through the regions (R11, R12).
//!
//! A [`ReceiptTracker`] hears which agent processes there are, how far each has applied the log, and which changes
//! were numbered. It ends the receipt of a change early when every process that could have served the key
//! has confirmed; otherwise when the bound has passed since the change was seen: then G1 itself holds for
//! it, whatever became of the others.
//!
//! Two things are the caller's duty. The roster must have been read after the change was committed, before
//! the change is tracked: who is written there later starts at a base that covers it. And when a new epoch
//! began, the open receipts must be looked up in the store again ([`ReceiptTracker::begin_epoch`]): the store may have
//! lost the change.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::exposure::{ApplyReport, Exposure};
use crate::ids::{AgentName, Identity, InstanceId, Region, WorkspaceId};
use crate::invalidation::Cause;
use crate::limits::{COUNTED_REPORTS_MAX, EARLY_REPORTS_MAX, RECEIPT_NAMES_MAX};
use crate::offset::DurationRange;
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::roster::{Instance, PartitionPolicy};
use crate::service::Service;
use crate::time::{LeaseTime, StoreTime};

/// Tunables of a tracker.
#[derive(Clone, Copy, Debug)]
pub struct TrackerConfig {
    /// The longest bound that any agent may keep: after it a receipt has elapsed. Whoever presents a longer one must
    /// get no lease.
    pub bound: Duration,
    /// How long other publishers may hear a process before this tracker learns of it by the roster. A process is
    /// forgotten when it was silent for so long and a bound: then whatever it may hold has run out.
    pub roster_delay: Duration,
    /// Most receipts open at once. Over it the newest are dropped, and found again in the store.
    pub open_max: usize,
}

/// A numbered change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The request that made it, and its workspace; `None` for direct SQL and ends that came by themselves,
    /// which get no receipt that somebody could ask for.
    pub request: Option<(Box<str>, WorkspaceId)>,
    /// Its place in the log.
    pub position: LogPosition,
    /// Why it was made.
    pub cause: Cause,
    /// When it was committed, on the store's clock.
    pub committed_at: StoreTime,
}

/// From where the times of a receipt are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measured {
    /// From before the commit, on this publisher's clock: each time is an upper bound.
    FromRequest,
    /// From when this publisher first saw the change: it was committed earlier.
    FromFirstSight,
}

impl Measured {
    /// The name in a receipt.
    pub fn label(self) -> &'static str {
        match self {
            Self::FromRequest => "request",
            Self::FromFirstSight => "first_sight",
        }
    }
}

/// Added to the silence after which a process is forgotten: announcements may be lost, or late.
const SILENCE_SLACK: Duration = Duration::from_secs(5);

/// The silence after which a process that serves stale records is forgotten. Until then receipts are unproven:
/// it may be cut off and serving, and nobody can tell that from its death.
const STALE_SILENCE: Duration = Duration::from_hours(24);

/// Who hasn't spoken for so long isn't taken for alive any more, where two bear one name.
const LIVE_WITHIN: Duration = Duration::from_secs(5);

/// How a region stands towards a change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RegionState {
    /// Somebody there has not confirmed yet.
    Pending,
    /// Everybody there who could have served the key has applied the change.
    Confirmed,
    /// Not everybody confirmed, and the bound has passed: nobody there answers from before the change.
    Elapsed,
    /// Not everybody confirmed, and one who didn't serves stale records by policy.
    Unproven,
    /// A configured region in which no agent was heard of.
    Absent,
}

impl RegionState {
    /// The name in a receipt.
    pub fn label(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Confirmed => "confirmed",
            Self::Elapsed => "elapsed",
            Self::Unproven => "unproven",
            Self::Absent => "absent",
        }
    }
}

/// One region's line of a receipt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegionReceipt {
    /// The region.
    pub region: Region,
    /// How it stands.
    pub state: RegionState,
    /// How many agent processes it has.
    pub instances: usize,
    /// When the last of them confirmed, since the start of the measurement.
    pub confirmed_after: Option<Duration>,
    /// Who hasn't confirmed, the first [`RECEIPT_NAMES_MAX`].
    pub missing: Vec<Identity>,
    /// How many haven't.
    pub missing_count: usize,
    /// The slowest agent's own measurement, as far as it arrived.
    pub lag: Option<DurationRange>,
    /// All agents' answers from the old state, as far as they told.
    pub exposure: Option<Exposure>,
    /// Names that several live processes bear.
    pub duplicate_names: bool,
}

/// What is known of one change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Receipt {
    /// Which change.
    pub change: Change,
    /// Whether anything can still change.
    pub is_final: bool,
    /// From where times are measured.
    pub measured: Measured,
    /// How long it took to become final, since the start of the measurement.
    pub final_after: Option<Duration>,
    /// By region name.
    pub regions: Vec<RegionReceipt>,
}

impl Receipt {
    /// The weakest of what the regions say; absent regions say nothing.
    pub fn state(&self) -> RegionState {
        let weakest = [RegionState::Pending, RegionState::Unproven, RegionState::Elapsed]
            .into_iter()
            .find(|state| self.regions.iter().any(|region| region.state == *state));
        match weakest {
            Some(state) => state,
            None if self.is_final => RegionState::Confirmed,
            None => RegionState::Pending,
        }
    }
}

/// What happened, for metrics and the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReceiptEvent {
    /// Every agent of the region has applied the deletion.
    Confirmed {
        /// Which region.
        region: Region,
        /// Since the start of the measurement.
        after: Duration,
    },
    /// A receipt of a request is final: to be kept.
    Final(Receipt),
}

/// All open receipts, and who they wait for.
#[derive(Debug)]
pub struct ReceiptTracker {
    config: TrackerConfig,
    regions: BTreeMap<Region, Standings>,
    /// How many regions with agents have come exactly so far.
    reached: BTreeMap<LogPosition, usize>,
    /// The furthest that any region ever came.
    furthest: LogPosition,
    instances: BTreeMap<Identity, Progress>,
    /// By rising position.
    open: VecDeque<Open>,
    /// The last open change of each request.
    requests: BTreeMap<Box<str>, LogPosition>,
    /// How many changes were ever tracked.
    tracked: u64,
    /// The highest position of them.
    newest: LogPosition,
    /// Apply reports of changes above: an agent may be quicker than the publisher itself.
    early: BTreeMap<LogPosition, BTreeMap<Region, Seen>>,
    /// Before this, processes may serve that the roster has forgotten.
    roster_complete_from: LeaseTime,
    polled_at: LeaseTime,
    /// Nothing becomes final.
    held: bool,
    /// The bound counts from here at the earliest.
    bound_counts_from: LeaseTime,
    /// What was applied in an older one says nothing.
    epoch: u32,
    events: Vec<ReceiptEvent>,
}

/// Where the processes of one region stand.
#[derive(Debug, Default)]
struct Standings {
    /// Without empty sets.
    by_position: BTreeMap<LogPosition, BTreeSet<Identity>>,
    instances: usize,
    /// How far everybody was, since when: the last one is now. So nothing has to be written down per open
    /// change and region.
    history: VecDeque<Stood>,
    /// Open changes up to here have been confirmed.
    confirmed: LogPosition,
    /// As of the last [`ReceiptTracker::poll`].
    duplicate_names: bool,
}

/// How far everybody in a region was from some moment on.
#[derive(Clone, Copy, Debug)]
struct Stood {
    since: LeaseTime,
    /// How many changes had been tracked by then.
    tracked: u64,
    /// `None` if there was nobody.
    reached: Option<LogPosition>,
}

/// What a process has told.
#[derive(Debug)]
struct Progress {
    applied: LogPosition,
    /// By this publisher, or by another one, as the roster tells.
    heard_at: LeaseTime,
    /// When this publisher heard it first, and last.
    spoke: Option<(LeaseTime, LeaseTime)>,
    policy: PartitionPolicy,
    /// Apply reports that were counted already: each is told several times.
    sighted: VecDeque<LogPosition>,
}

#[derive(Debug)]
struct Open {
    change: Change,
    since: LeaseTime,
    measured: Measured,
    first_seen: LeaseTime,
    /// How many changes had been tracked before.
    number: u64,
    apply_reports: BTreeMap<Region, Seen>,
}

/// What a region's agents saw of one change.
#[derive(Clone, Copy, Default, Debug)]
struct Seen {
    lag: Option<DurationRange>,
    exposure: Option<Exposure>,
}

impl ReceiptTracker {
    /// An empty tracker. Regions that are `configured` appear in receipts even without an agent.
    pub fn new(config: TrackerConfig, configured: impl IntoIterator<Item = Region>) -> Self {
        let regions = configured.into_iter().map(|region| (region, Standings::default())).collect();
        Self {
            config,
            regions,
            reached: BTreeMap::new(),
            furthest: LogPosition::ZERO,
            instances: BTreeMap::new(),
            open: VecDeque::new(),
            requests: BTreeMap::new(),
            tracked: 0,
            newest: LogPosition::ZERO,
            early: BTreeMap::new(),
            roster_complete_from: LeaseTime(0),
            polled_at: LeaseTime(0),
            held: false,
            bound_counts_from: LeaseTime(0),
            epoch: 0,
            events: Vec::new(),
        }
    }

    /// A process stands in the roster: from now on receipts wait for it.
    pub fn register(&mut self, Instance { identity, policy, .. }: &Instance, now: LeaseTime) {
        if let Some(known) = self.instances.get_mut(identity) {
            (known.policy, known.heard_at) = (*policy, now);
            return;
        }
        let applied = LogPosition::ZERO;
        self.regions.entry(identity.region.clone()).or_default().arrive(identity, applied);
        self.moved(&identity.region, now);
        let progress =
            Progress { applied, heard_at: now, spoke: None, policy: *policy, sighted: VecDeque::new() };
        self.instances.insert(identity.clone(), progress);
    }

    /// A process tells how far it has applied, and what it saw of some changes. One that the roster doesn't
    /// know holds no lease, and nobody waits for it.
    pub fn record_applied(
        &mut self,
        identity: &Identity,
        applied: LogPosition,
        apply_reports: &[ApplyReport],
        now: LeaseTime,
    ) {
        let Some(progress) = self.instances.get_mut(identity) else { return };
        progress.speak(now);
        if applied.epoch() < self.epoch {
            return;
        }
        for apply_report in apply_reports.iter().filter(|apply_report| apply_report.position <= applied) {
            let position = apply_report.position;
            let seen = match place_of(&self.open, position) {
                Ok(place) if progress.is_first(position) => &mut self.open[place].apply_reports,
                Err(_) if position > self.newest && progress.is_first(position) => {
                    if self.early.len() == EARLY_REPORTS_MAX {
                        self.early.pop_first();
                    }
                    self.early.entry(position).or_default()
                }
                _ => continue,
            };
            seen.entry(identity.region.clone()).or_default().add(apply_report);
        }
        if self.held {
            return;
        }
        if applied > progress.applied {
            let before = std::mem::replace(&mut progress.applied, applied);
            if let Some(standings) = self.regions.get_mut(&identity.region) {
                standings.leave(identity, before);
                standings.arrive(identity, applied);
            }
            self.confirm(&identity.region, now);
        }
    }

    /// Keeps receipts to what their publisher knows of other publishers at `now`: to be called before anything is done to
    /// the tracker at that time.
    pub fn apply_service(&mut self, service: &Service, now: LeaseTime) {
        self.hold(!service.may_finalize(now));
        if let Some(at) = service.exclusive_since() {
            self.resume_at(at);
        }
    }

    /// While agents may follow another history than this store's, nothing becomes final: neither what they have applied
    /// nor the bound says anything of this one (R15). A copy of the store may give the same positions.
    fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// This publisher serves again since `at`, after another may have taken its place. That one's leases last for a bound
    /// from then on, and its agents may be missing in the roster.
    fn resume_at(&mut self, at: LeaseTime) {
        self.bound_counts_from = self.bound_counts_from.max(at);
        self.distrust_roster(at.after(self.config.bound));
    }

    /// Whether nothing becomes final at present.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// A process was heard here.
    pub fn record_contact(&mut self, identity: &Identity, now: LeaseTime) {
        if let Some(progress) = self.instances.get_mut(identity) {
            progress.speak(now);
        }
    }

    /// A process told that it answers nothing any more.
    pub fn mark_departed(&mut self, identity: &Identity, now: LeaseTime) {
        self.remove(identity);
        self.confirm(&identity.region, now);
    }

    /// A change got its position. `since` is where its times are measured from.
    pub fn track(&mut self, change: Change, since: LeaseTime, measured: Measured, now: LeaseTime) {
        let position = change.position;
        // Several tasks number: what one of them was given first may get here last.
        let Err(place) = place_of(&self.open, position) else { return };
        let number = self.tracked;
        self.tracked += 1;
        self.newest = self.newest.max(position);
        let apply_reports = self.early.remove(&position).unwrap_or_default();
        // Whatever lies above was committed no earlier, so this one's bound ends no later than that one's. Thus what
        // is due first stands first.
        let first_seen = self.open.get(place).map_or(now, |next| now.min(next.first_seen));
        let open = Open { change, since, measured, first_seen, number, apply_reports };
        if position <= self.furthest {
            for (name, standings) in &mut self.regions {
                if standings.reached().is_some_and(|reached| reached >= position) {
                    // Everybody has applied it already: it was adopted from the store, say.
                    self.events.extend(open.confirmation(name, now));
                } else {
                    let below = LogPosition::from_bits(position.to_bits().saturating_sub(1));
                    standings.confirmed = standings.confirmed.min(below);
                }
            }
        }
        if let Some((request, _)) = &open.change.request {
            let last = self.requests.entry(request.clone()).or_insert(position);
            *last = position.max(*last);
        }
        self.open.insert(place, open);
        if self.open.len() > self.config.open_max {
            // The newest: whatever is dropped comes back from the store, and the oldest must get done.
            let newest = self.open.pop_back();
            self.close(newest);
        }
        self.finish(now);
    }

    /// Ends what the bound has ended, and forgets who fell silent: to be called now and then. Costs as much as
    /// there are processes. While receipts are held nobody is forgotten: those that follow another history aren't silent.
    pub fn poll(&mut self, now: LeaseTime) {
        if self.held {
            return;
        }
        if now.since(std::mem::replace(&mut self.polled_at, now)) > SILENCE_SLACK {
            // This process stood still itself, and could hear nobody.
            self.instances.values_mut().for_each(|progress| progress.heard_at = now);
        }
        let silent = |progress: &Progress| now.since(progress.heard_at);
        let run_out = self.config.bound + self.config.roster_delay + SILENCE_SLACK;
        let is_gone = |progress: &Progress| match progress.policy {
            PartitionPolicy::Deny => silent(progress) >= run_out,
            // Nothing of it runs out by itself.
            PartitionPolicy::ServeStale => silent(progress) >= run_out.max(STALE_SILENCE),
        };
        let gone: Vec<Identity> = self
            .instances
            .iter()
            .filter(|(_, progress)| is_gone(progress))
            .map(|(identity, _)| identity.clone())
            .collect();
        for identity in &gone {
            self.mark_departed(identity, now);
        }
        self.regions.values_mut().for_each(|standings| standings.duplicate_names = false);
        for (region, _) in self.duplicate_names(now).into_keys() {
            if let Some(standings) = self.regions.get_mut(&region) {
                standings.duplicate_names = true;
            }
        }
        self.finish(now);
    }

    /// Ends what the bound has ended: to be called at [`ReceiptTracker::wake_at`].
    pub fn end_due(&mut self, now: LeaseTime) {
        self.finish(now);
    }

    /// When the bound ends something next.
    pub fn wake_at(&self) -> Option<LeaseTime> {
        let first = self.open.front().filter(|_| !self.held);
        first.map(|open| self.counts_from(open).after(self.time_to_elapse()))
    }

    /// The longest bound that anybody may keep: after it a receipt has elapsed.
    pub fn bound(&self) -> Duration {
        self.config.bound
    }

    /// Whether receipts wait for this process: the roster holds it.
    pub fn has_instance(&self, identity: &Identity) -> bool {
        self.instances.contains_key(identity)
    }

    /// How many other processes were heard lately under the name of this one.
    pub fn duplicate_instances(&self, identity: &Identity, now: LeaseTime) -> usize {
        let first = Identity { instance: InstanceId(0), ..identity.clone() };
        self.instances
            .range(first..)
            .take_while(|(other, _)| other.region == identity.region && other.agent == identity.agent)
            .filter(|(other, progress)| {
                *other != identity && now.since(progress.heard_at) < self.config.bound
            })
            .count()
    }

    /// The names that several processes bear at once, and how many: each has spoken after all of them had begun to. A
    /// process that was killed and its successor haven't, however soon after the first the second comes.
    pub fn duplicate_names(&self, now: LeaseTime) -> BTreeMap<(Region, AgentName), usize> {
        let live = self.instances.iter().filter_map(|(identity, progress)| {
            let (first, last) = progress.spoke?;
            (now.since(last) < LIVE_WITHIN).then_some(((&identity.region, &identity.agent), first, last))
        });
        // Instances of one name stand side by side.
        let live: Vec<_> = live.collect();
        live.chunk_by(|(one, ..), (other, ..)| one == other)
            .filter_map(|processes| {
                let begun = processes.iter().map(|(_, first, _)| *first).max()?;
                let together = processes.iter().filter(|(.., last)| *last >= begun).count();
                let ((region, agent), ..) = processes[0];
                (together > 1).then(|| ((region.clone(), agent.clone()), together))
            })
            .collect()
    }

    /// The last of this request's changes that are open here.
    pub fn last_of(&self, request: &str) -> Option<LogPosition> {
        self.requests.get(request).copied()
    }

    /// Whether this request's receipt is open here.
    pub fn is_open(&self, request: &str) -> bool {
        self.requests.contains_key(request)
    }

    /// How many receipts are open, of requests and of other changes.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<ReceiptEvent> {
        std::mem::take(&mut self.events)
    }

    /// The store went back a while ago, and the roster with it: until this moment, a bound later, a process that
    /// the roster has forgotten may hold a lease. So until then nothing is final early (R11).
    pub fn distrust_roster(&mut self, until: LeaseTime) {
        self.roster_complete_from = self.roster_complete_from.max(until);
    }

    /// A new epoch began. Open receipts are dropped: the store has to be asked again which of these changes it
    /// has. And what everybody has applied may be of a history that is no more, so it counts from here on.
    pub fn begin_epoch(&mut self, epoch: u32, now: LeaseTime) {
        self.epoch = epoch;
        self.open.clear();
        self.requests.clear();
        self.early.clear();
        for (identity, progress) in &mut self.instances {
            let before = std::mem::take(&mut progress.applied);
            if let Some(standings) = self.regions.get_mut(&identity.region) {
                standings.leave(identity, before);
                standings.arrive(identity, LogPosition::ZERO);
                standings.confirmed = LogPosition::ZERO;
            }
        }
        let regions: Vec<Region> = self.regions.keys().cloned().collect();
        for region in &regions {
            self.moved(region, now);
        }
    }

    /// What is known of a request's change, while it is open. Of several changes, the last one counts.
    pub fn receipt(&self, request: &str, now: LeaseTime) -> Option<Receipt> {
        let place = place_of(&self.open, *self.requests.get(request)?).ok()?;
        Some(self.write(&self.open[place], now, false))
    }

    /// Deletions that not everybody has confirmed.
    pub fn unconfirmed(&self) -> usize {
        self.open.iter().filter(|open| open.change.cause.is_deletion()).count()
    }

    /// The processes that receipts wait for: how far each is, when it was last heard, and its policy.
    pub fn instances(&self) -> impl Iterator<Item = (&Identity, LogPosition, LeaseTime, PartitionPolicy)> {
        self.instances
            .iter()
            .map(|(identity, progress)| (identity, progress.applied, progress.heard_at, progress.policy))
    }

    /// After this a receipt has elapsed: G1 holds for it, whatever anybody confirmed. Counted from when the
    /// change was seen, so from after its commit.
    fn time_to_elapse(&self) -> Duration {
        let bound = self.config.bound;
        if Protection::ReceiptsWaitForTheBound.holds() { bound } else { bound / 2 }
    }

    fn counts_from(&self, open: &Open) -> LeaseTime {
        open.first_seen.max(self.bound_counts_from)
    }

    fn knows_everybody(&self, now: LeaseTime) -> bool {
        now >= self.roster_complete_from || !Protection::LostRostersAreDistrusted.holds()
    }

    fn remove(&mut self, identity: &Identity) {
        if let Some(progress) = self.instances.remove(identity)
            && let Some(standings) = self.regions.get_mut(&identity.region)
        {
            standings.leave(identity, progress.applied);
        }
    }

    /// Notes where the region stands now.
    fn moved(&mut self, name: &Region, now: LeaseTime) {
        let time_to_elapse = self.time_to_elapse();
        let Some(standings) = self.regions.get_mut(name) else { return };
        let (before, after) = (standings.reached(), standings.slowest());
        if before == after {
            return;
        }
        // What was before is of interest to changes that are open still.
        while standings.history.get(1).is_some_and(|next| next.since.after(time_to_elapse) < now) {
            standings.history.pop_front();
        }
        standings.history.push_back(Stood { since: now, tracked: self.tracked, reached: after });
        if let Some(before) = before
            && let Some(regions) = self.reached.get_mut(&before)
        {
            *regions -= 1;
            if *regions == 0 {
                self.reached.remove(&before);
            }
        }
        if let Some(after) = after {
            *self.reached.entry(after).or_default() += 1;
            self.furthest = self.furthest.max(after);
        }
    }

    /// The region may have come further: open changes up to there are confirmed in it.
    fn confirm(&mut self, name: &Region, now: LeaseTime) {
        self.moved(name, now);
        let Some(standings) = self.regions.get_mut(name) else { return };
        if let Some(reached) = standings.reached().filter(|reached| *reached > standings.confirmed) {
            let from = self.open.partition_point(|open| open.change.position <= standings.confirmed);
            let to = self.open.partition_point(|open| open.change.position <= reached);
            let newly = self.open.range(from..to.max(from)).filter(|open| standings.has_just_confirmed(open));
            self.events.extend(newly.filter_map(|open| open.confirmation(name, now)));
            standings.confirmed = reached;
        }
        self.finish(now);
    }

    /// Takes out what is final: what every process has applied, and what has elapsed. Both stand in front.
    fn finish(&mut self, now: LeaseTime) {
        let everywhere = self.reached.first_key_value().map_or(LogPosition::NEVER, |(reached, _)| *reached);
        let time_to_elapse = self.time_to_elapse();
        while let Some(open) = self.open.front().filter(|_| !self.held) {
            let everybody = open.change.position <= everywhere && self.knows_everybody(now);
            let confirmed = everybody || !Protection::ReceiptsWaitForAll.holds();
            if !confirmed && now.since(self.counts_from(open)) < time_to_elapse {
                break;
            }
            // Of several changes of one request, the last one's receipt counts.
            if open
                .change
                .request
                .as_ref()
                .is_some_and(|(id, _)| self.requests.get(id) == Some(&open.change.position))
            {
                let receipt = self.write(open, now, true);
                self.events.push(ReceiptEvent::Final(receipt));
            }
            let done = self.open.pop_front();
            self.close(done);
        }
    }

    fn close(&mut self, open: Option<Open>) {
        if let Some(Open { change, .. }) = open
            && let Some((request, _)) = change.request
            && self.requests.get(&request) == Some(&change.position)
        {
            self.requests.remove(&request);
        }
    }

    fn write(&self, open: &Open, now: LeaseTime, is_final: bool) -> Receipt {
        let elapsed = now.since(self.counts_from(open)) >= self.time_to_elapse() && !self.held;
        let line = |(name, standings)| self.line(name, standings, open, elapsed);
        Receipt {
            change: open.change.clone(),
            is_final,
            measured: open.measured,
            final_after: is_final.then(|| now.since(open.since)),
            regions: self.regions.iter().map(line).collect(),
        }
    }

    fn line(&self, name: &Region, standings: &Standings, open: &Open, elapsed: bool) -> RegionReceipt {
        let seen = open.apply_reports.get(name).copied().unwrap_or_default();
        let confirmed_at = standings.confirmed_at(open);
        let confirmed = confirmed_at.is_some();
        let before = if confirmed { LogPosition::ZERO } else { open.change.position };
        let behind: Vec<&BTreeSet<Identity>> =
            standings.by_position.range(..before).map(|(_, names)| names).collect();
        let missing = || behind.iter().copied().flatten();
        let is_stale = |identity: &Identity| {
            self.instances.get(identity).is_some_and(|it| it.policy == PartitionPolicy::ServeStale)
        };
        let state = if confirmed {
            RegionState::Confirmed
        } else if standings.instances == 0 {
            RegionState::Absent
        } else if !elapsed {
            RegionState::Pending
        } else if missing().any(is_stale) {
            RegionState::Unproven
        } else {
            RegionState::Elapsed
        };
        RegionReceipt {
            region: name.clone(),
            state,
            instances: standings.instances,
            confirmed_after: confirmed_at.map(|at| at.since(open.since)),
            missing: missing().take(RECEIPT_NAMES_MAX).cloned().collect(),
            missing_count: behind.iter().map(|names| names.len()).sum(),
            lag: seen.lag,
            exposure: seen.exposure,
            duplicate_names: standings.duplicate_names,
        }
    }
}

/// Where an open change stands, or where it belongs.
fn place_of(open: &VecDeque<Open>, position: LogPosition) -> Result<usize, usize> {
    open.binary_search_by_key(&position, |open| open.change.position)
}

impl Open {
    /// What is to be told of a region that confirms now.
    fn confirmation(&self, region: &Region, now: LeaseTime) -> Option<ReceiptEvent> {
        let after = now.since(self.since);
        let is_deletion = self.change.cause.is_deletion();
        is_deletion.then(|| ReceiptEvent::Confirmed { region: region.clone(), after })
    }
}

impl Seen {
    fn add(&mut self, ApplyReport { lag, exposure, .. }: &ApplyReport) {
        let slowest = self.lag.get_or_insert(*lag);
        if lag.high > slowest.high {
            *slowest = *lag;
        }
        let sum = self.exposure.get_or_insert_default();
        sum.last_after = sum.last_after.max(exposure.last_after);
    }
}

impl Progress {
    fn speak(&mut self, now: LeaseTime) {
        let first = self.spoke.map_or(now, |(first, _)| first);
        (self.heard_at, self.spoke) = (now, Some((first, now)));
    }

    /// Whether this apply report comes for the first time, as far as remembered.
    fn is_first(&mut self, position: LogPosition) -> bool {
        if self.sighted.contains(&position) {
            return false;
        }
        if self.sighted.len() == COUNTED_REPORTS_MAX {
            self.sighted.pop_front();
        }
        self.sighted.push_back(position);
        true
    }
}

impl Standings {
    /// How far everybody is; `None` if there is nobody.
    fn reached(&self) -> Option<LogPosition> {
        self.history.back()?.reached
    }

    /// As [`Standings::reached`], before it was noted.
    fn slowest(&self) -> Option<LogPosition> {
        self.by_position.first_key_value().map(|(position, _)| *position)
    }

    /// When everybody here had applied the change, or when it was seen if that was later. What happens to the
    /// region afterwards, such as the arrival of a process that hasn't spoken yet, doesn't take it back.
    fn confirmed_at(&self, open: &Open) -> Option<LeaseTime> {
        let has_it = |stood: &&Stood| stood.reached.is_some_and(|reached| reached >= open.change.position);
        let since = self.history.partition_point(|stood| stood.tracked <= open.number);
        if since.checked_sub(1).and_then(|at| self.history.get(at)).as_ref().is_some_and(has_it) {
            return Some(open.first_seen);
        }
        self.history.range(since..).find(has_it).map(|stood| stood.since)
    }

    /// Whether it was the last move that confirmed the change.
    fn has_just_confirmed(&self, open: &Open) -> bool {
        let has_it = |stood: &Stood| stood.reached.is_some_and(|reached| reached >= open.change.position);
        let since = self.history.partition_point(|stood| stood.tracked <= open.number);
        let before = since.saturating_sub(1)..self.history.len().saturating_sub(1);
        !self.history.range(before.start..before.end.max(before.start)).any(has_it)
    }

    fn arrive(&mut self, identity: &Identity, position: LogPosition) {
        self.instances += usize::from(self.by_position.entry(position).or_default().insert(identity.clone()));
    }

    fn leave(&mut self, identity: &Identity, position: LogPosition) {
        if let Some(names) = self.by_position.get_mut(&position)
            && names.remove(identity)
        {
            self.instances -= 1;
            if names.is_empty() {
                self.by_position.remove(&position);
            }
        }
    }
}

#[cfg(test)]
mod tests;
