//! All open receipts, and the processes that they wait for.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::instances::Instances;
use super::open::{OpenReceipt, RegionReports};
use super::receipt::{Change, Measured, Receipt, ReceiptEvent, RegionReceipt, RegionState};
use super::region::{RegionProgress, Regions};
use crate::exposure::ApplyReport;
use crate::ids::{AgentName, Identity, Region};
use crate::limits::{EARLY_REPORTS_MAX, RECEIPT_NAMES_MAX};
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::roster::{Instance, PartitionPolicy};
use crate::service::Service;
use crate::time::LeaseTime;

/// Added to the silence after which a process counts as gone: announcements may be lost or late.
const SILENCE_SLACK: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug)]
pub struct TrackerConfig {
    /// The longest bound that any agent may keep. After it a receipt has elapsed. An agent that
    /// presents a longer one must get no lease.
    pub bound: Duration,
    /// How long it may take until a process that other publishers received from shows in the
    /// roster. A process counts as gone after a silence of this and a bound: then whatever it held
    /// has run out.
    pub roster_delay: Duration,
    /// Most open receipts. Above it the newest are dropped, and found again in the store.
    pub open_max: usize,
}

#[derive(Debug)]
pub struct ReceiptTracker {
    config: TrackerConfig,
    regions: Regions,
    instances: Instances,
    /// By rising position.
    open: VecDeque<OpenReceipt>,
    /// The last open change of each request.
    requests: BTreeMap<Box<str>, LogPosition>,
    /// How many changes were ever tracked.
    tracked: u64,
    /// The highest position of them.
    newest: LogPosition,
    /// Reports of changes above `newest`: an agent may be faster than the publisher itself.
    early: BTreeMap<LogPosition, RegionReports>,
    /// Before this, processes may serve that are missing in the roster.
    roster_complete_from: LeaseTime,
    polled_at: LeaseTime,
    /// Nothing becomes final.
    held: bool,
    /// The bound counts from here at the earliest.
    bound_counts_from: LeaseTime,
    /// Positions of an older epoch don't count as applied.
    epoch: u32,
    events: Vec<ReceiptEvent>,
}

impl ReceiptTracker {
    /// An empty tracker. Regions that are `configured` appear in receipts even without an agent.
    pub fn new(config: TrackerConfig, configured: impl IntoIterator<Item = Region>) -> Self {
        Self {
            config,
            regions: Regions::new(configured),
            instances: Instances::default(),
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

    /// Replaces the regions that appear in receipts even without an agent. Final receipts stay as they are.
    pub fn configure(&mut self, configured: impl IntoIterator<Item = Region>) {
        self.regions.configure(configured);
    }

    /// Takes in an entry of the roster. From now on receipts wait for the process.
    pub fn register(&mut self, instance: &Instance, now: LeaseTime) {
        if self.instances.register(instance, now) {
            self.regions.arrive(&instance.identity, LogPosition::ZERO);
            self.note_progress(&instance.identity.region, now);
        }
    }

    /// Takes in how far a process has applied the log, and what it measured of some changes. A
    /// process that is missing in the roster holds no lease, and receipts don't wait for it.
    pub fn record_applied(
        &mut self,
        identity: &Identity,
        applied: LogPosition,
        reports: &[ApplyReport],
        now: LeaseTime,
    ) {
        let Some(instance) = self.instances.0.get_mut(identity) else { return };
        instance.record_contact(now);
        if applied.epoch() < self.epoch {
            return;
        }
        for report in reports.iter().filter(|report| report.position <= applied) {
            let position = report.position;
            let reports = match index_of(&self.open, position) {
                Ok(index) if instance.count_report(position) => &mut self.open[index].reports,
                Err(_) if position > self.newest && instance.count_report(position) => {
                    if self.early.len() == EARLY_REPORTS_MAX {
                        self.early.pop_first();
                    }
                    self.early.entry(position).or_default()
                }
                _ => continue,
            };
            reports.entry(identity.region.clone()).or_default().add(report);
        }
        if !self.held && applied > instance.applied {
            let before = std::mem::replace(&mut instance.applied, applied);
            self.regions.leave(identity, before);
            self.regions.arrive(identity, applied);
            self.confirm(&identity.region, now);
        }
    }

    /// Takes in what `service` says of other publishers at `now`. Call it before any other
    /// method at that time.
    pub fn apply_service(&mut self, service: &Service, now: LeaseTime) {
        self.hold(!service.may_finalize(now));
        if let Some(at) = service.exclusive_since() {
            self.resume_at(at);
        }
    }

    /// While agents may follow another history than this store's, nothing becomes final: neither
    /// what they have applied nor the bound says anything about this one (R15). A copy of the store
    /// may use the same positions.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// This publisher serves again since `at`, after another one may have taken its place. Leases
    /// of the other one last for a bound from then on, and its agents may be missing in the roster.
    pub(super) fn resume_at(&mut self, at: LeaseTime) {
        self.bound_counts_from = self.bound_counts_from.max(at);
        self.distrust_roster(at.after(self.config.bound));
    }

    /// Whether nothing becomes final at present.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// A message of the process arrived here.
    pub fn record_contact(&mut self, identity: &Identity, now: LeaseTime) {
        if let Some(instance) = self.instances.0.get_mut(identity) {
            instance.record_contact(now);
        }
    }

    /// The process answers nothing any more: receipts don't wait for it.
    pub fn mark_departed(&mut self, identity: &Identity, now: LeaseTime) {
        if let Some(instance) = self.instances.0.remove(identity) {
            self.regions.leave(identity, instance.applied);
        }
        self.confirm(&identity.region, now);
    }

    /// A change got its position. `since` is where its times are measured from.
    pub fn track(&mut self, change: Change, since: LeaseTime, measured: Measured, now: LeaseTime) {
        let position = change.position;
        // Several tasks number changes, so a lower position may arrive after a higher one.
        let Err(index) = index_of(&self.open, position) else { return };
        let number = self.tracked;
        self.tracked += 1;
        self.newest = self.newest.max(position);
        let reports = self.early.remove(&position).unwrap_or_default();
        // The changes above were committed no earlier, so the bound of this one ends no later than
        // theirs. Thus the first receipt is the first that is due.
        let first_seen = self.open.get(index).map_or(now, |next| now.min(next.first_seen));
        let open = OpenReceipt { change, since, measured, first_seen, number, reports };
        if position <= self.regions.furthest {
            for (name, region) in &mut self.regions.by_name {
                if region.reached().is_some_and(|reached| reached >= position) {
                    // The whole region has applied it already: it was adopted from the store, say.
                    self.events.extend(open.confirmation(name, now));
                } else {
                    let below = LogPosition::from_bits(position.to_bits().saturating_sub(1));
                    region.confirmed = region.confirmed.min(below);
                }
            }
        }
        if let Some((request, _)) = &open.change.request {
            let last = self.requests.entry(request.clone()).or_insert(position);
            *last = position.max(*last);
        }
        self.open.insert(index, open);
        if self.open.len() > self.config.open_max {
            // The newest: it comes back from the store, and the oldest must become final.
            let newest = self.open.pop_back();
            self.close(newest);
        }
        self.end_due(now);
    }

    /// Ends what the bound has ended, and removes silent processes. Call it now and then: it costs
    /// as much as there are processes. While receipts are held it does nothing: agents of another
    /// history aren't silent.
    pub fn poll(&mut self, now: LeaseTime) {
        if self.held {
            return;
        }
        if now.since(std::mem::replace(&mut self.polled_at, now)) > SILENCE_SLACK {
            // This publisher itself was frozen, and received nothing.
            self.instances.0.values_mut().for_each(|instance| instance.contact_at = now);
        }
        let run_out = self.config.bound + self.config.roster_delay + SILENCE_SLACK;
        for identity in self.instances.silent(run_out, now) {
            self.mark_departed(&identity, now);
        }
        self.regions.by_name.values_mut().for_each(|region| region.duplicate_names = false);
        for (name, _) in self.duplicate_names(now).into_keys() {
            if let Some(region) = self.regions.by_name.get_mut(&name) {
                region.duplicate_names = true;
            }
        }
        self.end_due(now);
    }

    /// When the bound ends the next receipt.
    pub fn wake_at(&self) -> Option<LeaseTime> {
        let first = self.open.front().filter(|_| !self.held);
        first.map(|open| self.elapses_at(open))
    }

    /// The longest bound that any agent may keep: after it a receipt has elapsed.
    pub fn bound(&self) -> Duration {
        self.config.bound
    }

    /// Whether receipts wait for this process: it is in the roster.
    pub fn has_instance(&self, identity: &Identity) -> bool {
        self.instances.0.contains_key(identity)
    }

    /// How many other processes sent a message within the bound under the agent's name of this one.
    pub fn duplicate_instances(&self, identity: &Identity, now: LeaseTime) -> usize {
        self.instances.duplicates_of(identity, self.config.bound, now)
    }

    /// The names that several processes use at once, and how many.
    pub fn duplicate_names(&self, now: LeaseTime) -> BTreeMap<(Region, AgentName), usize> {
        self.instances.duplicate_names(now)
    }

    /// The last open change of this request.
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

    /// Returns the events since the last call.
    pub fn take_events(&mut self) -> Vec<ReceiptEvent> {
        std::mem::take(&mut self.events)
    }

    /// The store went back, and the roster with it. Until `until`, a bound later, a process that is
    /// missing in the roster may hold a lease. So nothing becomes final early until then (R11).
    pub fn distrust_roster(&mut self, until: LeaseTime) {
        self.roster_complete_from = self.roster_complete_from.max(until);
    }

    /// A new epoch began. Drops the open receipts: the caller queries the store for which of these
    /// changes it still has. What agents have applied may be of a lost history, so it counts from
    /// here on.
    pub fn begin_epoch(&mut self, epoch: u32, now: LeaseTime) {
        self.epoch = epoch;
        self.open.clear();
        self.requests.clear();
        self.early.clear();
        for (identity, instance) in &mut self.instances.0 {
            let before = std::mem::take(&mut instance.applied);
            self.regions.leave(identity, before);
            self.regions.arrive(identity, LogPosition::ZERO);
        }
        let names: Vec<Region> = self.regions.by_name.keys().cloned().collect();
        for name in &names {
            self.note_progress(name, now);
        }
        for region in self.regions.by_name.values_mut().filter(|region| region.instances > 0) {
            region.confirmed = LogPosition::ZERO;
        }
    }

    /// The receipt of a request, while it is open. Of several changes, the last one counts.
    pub fn receipt(&self, request: &str, now: LeaseTime) -> Option<Receipt> {
        let index = index_of(&self.open, *self.requests.get(request)?).ok()?;
        Some(self.write(&self.open[index], now, false))
    }

    /// How many deletions are not confirmed everywhere.
    pub fn unconfirmed(&self) -> usize {
        self.open.iter().filter(|open| open.change.cause.is_deletion()).count()
    }

    /// The processes that receipts wait for: what each has applied, when its last message arrived,
    /// its policy.
    pub fn instances(&self) -> impl Iterator<Item = (&Identity, LogPosition, LeaseTime, PartitionPolicy)> {
        self.instances
            .0
            .iter()
            .map(|(identity, instance)| (identity, instance.applied, instance.contact_at, instance.policy))
    }

    /// After so long a receipt has elapsed: G1 holds for it, whatever was confirmed. It counts from
    /// when the change was first seen, which is after its commit.
    fn time_to_elapse(&self) -> Duration {
        let bound = self.config.bound;
        if Protection::ReceiptsWaitForTheBound.holds() { bound } else { bound / 2 }
    }

    fn elapses_at(&self, open: &OpenReceipt) -> LeaseTime {
        open.first_seen.max(self.bound_counts_from).after(self.time_to_elapse())
    }

    fn is_roster_complete(&self, now: LeaseTime) -> bool {
        now >= self.roster_complete_from || !Protection::LostRostersAreDistrusted.holds()
    }

    fn note_progress(&mut self, name: &Region, now: LeaseTime) {
        self.regions.note_progress(name, self.tracked, now, self.time_to_elapse());
    }

    /// Confirms the open changes that the region has come to include.
    fn confirm(&mut self, name: &Region, now: LeaseTime) {
        self.note_progress(name, now);
        let Some(region) = self.regions.by_name.get_mut(name) else { return };
        if let Some(reached) = region.reached().filter(|reached| *reached > region.confirmed) {
            let from = self.open.partition_point(|open| open.change.position <= region.confirmed);
            let to = self.open.partition_point(|open| open.change.position <= reached);
            let newly = self.open.range(from..to.max(from)).filter(|open| region.has_just_confirmed(open));
            self.events.extend(newly.filter_map(|open| open.confirmation(name, now)));
            region.confirmed = reached;
        }
        self.end_due(now);
    }

    /// Takes out what is final: what every process has applied, and what has elapsed. Both are in
    /// front. Call it at [`Self::wake_at`].
    pub fn end_due(&mut self, now: LeaseTime) {
        let everywhere = self.regions.reached_everywhere();
        while let Some(open) = self.open.front().filter(|_| !self.held) {
            let by_all = open.change.position <= everywhere && self.is_roster_complete(now);
            let confirmed = by_all || !Protection::ReceiptsWaitForAll.holds();
            if !confirmed && now < self.elapses_at(open) {
                break;
            }
            if self.is_last_of_its_request(&open.change) {
                let receipt = self.write(open, now, true);
                self.events.push(ReceiptEvent::Final(receipt));
            }
            let done = self.open.pop_front();
            self.close(done);
        }
    }

    /// Of several changes of one request, the last one's receipt counts.
    fn is_last_of_its_request(&self, change: &Change) -> bool {
        let request = change.request.as_ref();
        request.is_some_and(|(id, _)| self.requests.get(id) == Some(&change.position))
    }

    fn close(&mut self, open: Option<OpenReceipt>) {
        if let Some(OpenReceipt { change, .. }) = open
            && self.is_last_of_its_request(&change)
            && let Some((request, _)) = change.request
        {
            self.requests.remove(&request);
        }
    }

    fn write(&self, open: &OpenReceipt, now: LeaseTime, is_final: bool) -> Receipt {
        let has_elapsed = now >= self.elapses_at(open) && !self.held;
        let line = |(name, region)| self.line(name, region, open, has_elapsed);
        Receipt {
            change: open.change.clone(),
            is_final,
            measured: open.measured,
            final_after: is_final.then(|| now.since(open.since)),
            regions: self.regions.by_name.iter().map(line).collect(),
        }
    }

    fn line(
        &self,
        name: &Region,
        region: &RegionProgress,
        open: &OpenReceipt,
        has_elapsed: bool,
    ) -> RegionReceipt {
        let report = open.reports.get(name).copied().unwrap_or_default();
        let confirmed_at = region.confirmed_at(open);
        let confirmed = confirmed_at.is_some();
        let behind = || region.behind(if confirmed { LogPosition::ZERO } else { open.change.position });
        let missing = || behind().flatten();
        let is_stale = |identity: &Identity| {
            self.instances.0.get(identity).is_some_and(|it| it.policy == PartitionPolicy::ServeStale)
        };
        let state = if confirmed {
            RegionState::Confirmed
        } else if region.instances == 0 {
            RegionState::Absent
        } else if !has_elapsed {
            RegionState::Pending
        } else if missing().any(is_stale) {
            RegionState::Unproven
        } else {
            RegionState::Elapsed
        };
        RegionReceipt {
            region: name.clone(),
            state,
            instances: region.instances,
            confirmed_after: confirmed_at.map(|at| at.since(open.since)),
            missing: missing().take(RECEIPT_NAMES_MAX).cloned().collect(),
            missing_count: behind().map(std::collections::BTreeSet::len).sum(),
            lag: report.lag,
            exposure: report.exposure,
            duplicate_names: region.duplicate_names,
        }
    }
}

/// Where the receipt of the change at `position` is, or where it belongs.
fn index_of(open: &VecDeque<OpenReceipt>, position: LogPosition) -> Result<usize, usize> {
    open.binary_search_by_key(&position, |open| open.change.position)
}
