//! How far the agents of each region have applied the log.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::open::OpenReceipt;
use crate::ids::{Identity, Region};
use crate::position::LogPosition;
use crate::time::LeaseTime;

/// The regions that are configured or have agents.
#[derive(Debug, Default)]
pub(super) struct Regions {
    pub(super) by_name: BTreeMap<Region, RegionProgress>,
    /// How many regions with agents have reached exactly this position.
    reached: BTreeMap<LogPosition, usize>,
    /// The furthest position that any region ever reached.
    pub(super) furthest: LogPosition,
}

impl Regions {
    pub(super) fn new(configured: impl IntoIterator<Item = Region>) -> Self {
        let by_name = configured.into_iter().map(|region| (region, RegionProgress::default())).collect();
        Self { by_name, ..Self::default() }
    }

    /// Replaces the configured regions. One that has had agents stays: open receipts may have its progress.
    pub(super) fn configure(&mut self, configured: impl IntoIterator<Item = Region>) {
        self.by_name.retain(|_, region| !region.history.is_empty());
        for region in configured {
            self.by_name.entry(region).or_default();
        }
    }

    /// What every region with agents has reached.
    pub(super) fn reached_everywhere(&self) -> LogPosition {
        self.reached.first_key_value().map_or(LogPosition::NEVER, |(reached, _)| *reached)
    }

    pub(super) fn arrive(&mut self, identity: &Identity, at: LogPosition) {
        self.by_name.entry(identity.region.clone()).or_default().arrive(identity, at);
    }

    pub(super) fn leave(&mut self, identity: &Identity, at: LogPosition) {
        if let Some(region) = self.by_name.get_mut(&identity.region) {
            region.leave(identity, at);
        }
    }

    /// Writes down where the region is now, when `tracked` changes have been tracked. What lies
    /// further back than `kept` matters to no open receipt.
    pub(super) fn note_progress(&mut self, name: &Region, tracked: u64, now: LeaseTime, kept: Duration) {
        let Some(region) = self.by_name.get_mut(name) else { return };
        let (before, after) = (region.reached(), region.slowest());
        if before == after {
            return;
        }
        while region.history.get(1).is_some_and(|next| next.since.after(kept) < now) {
            region.history.pop_front();
        }
        region.history.push_back(ProgressStep { since: now, tracked, reached: after });
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
}

/// How far the processes of one region are.
#[derive(Debug, Default)]
pub(super) struct RegionProgress {
    /// Without empty sets.
    by_position: BTreeMap<LogPosition, BTreeSet<Identity>>,
    pub(super) instances: usize,
    /// Where the region was since when; the last one is now. It spares a note per open change and
    /// region.
    history: VecDeque<ProgressStep>,
    /// Open changes up to here have been confirmed.
    pub(super) confirmed: LogPosition,
    /// As of the last [`ReceiptTracker::poll`](super::ReceiptTracker::poll).
    pub(super) duplicate_names: bool,
}

/// Where the slowest process of a region was from some moment on.
#[derive(Clone, Copy, Debug)]
struct ProgressStep {
    since: LeaseTime,
    /// How many changes had been tracked by then.
    tracked: u64,
    /// `None` without a process.
    reached: Option<LogPosition>,
}

impl ProgressStep {
    fn includes(&self, open: &OpenReceipt) -> bool {
        self.reached.is_some_and(|reached| reached >= open.change.position)
    }
}

impl RegionProgress {
    /// What every process has applied; `None` without a process.
    pub(super) fn reached(&self) -> Option<LogPosition> {
        self.history.back()?.reached
    }

    /// As [`Self::reached`], before it is noted.
    fn slowest(&self) -> Option<LogPosition> {
        self.by_position.first_key_value().map(|(position, _)| *position)
    }

    /// The processes that have not applied `position`, slowest first.
    pub(super) fn behind(&self, position: LogPosition) -> impl Iterator<Item = &BTreeSet<Identity>> {
        self.by_position.range(..position).map(|(_, names)| names)
    }

    /// When every process here had applied the change, or when it was first seen if that was later.
    /// What happens to the region afterwards, such as a new process, doesn't take it back.
    pub(super) fn confirmed_at(&self, open: &OpenReceipt) -> Option<LeaseTime> {
        let later = self.first_after(open);
        let earlier = later.checked_sub(1).and_then(|at| self.history.get(at));
        if earlier.is_some_and(|progress| progress.includes(open)) {
            return Some(open.first_seen);
        }
        self.history.range(later..).find(|progress| progress.includes(open)).map(|progress| progress.since)
    }

    /// Whether it was the last step that confirmed the change.
    pub(super) fn has_just_confirmed(&self, open: &OpenReceipt) -> bool {
        let from = self.first_after(open).saturating_sub(1);
        let last = self.history.len().saturating_sub(1);
        !self.history.range(from..last.max(from)).any(|progress| progress.includes(open))
    }

    /// The index of the first step that came after the change was tracked.
    fn first_after(&self, open: &OpenReceipt) -> usize {
        self.history.partition_point(|progress| progress.tracked <= open.number)
    }

    fn arrive(&mut self, identity: &Identity, at: LogPosition) {
        self.instances += usize::from(self.by_position.entry(at).or_default().insert(identity.clone()));
    }

    fn leave(&mut self, identity: &Identity, at: LogPosition) {
        if let Some(names) = self.by_position.get_mut(&at)
            && names.remove(identity)
        {
            self.instances -= 1;
            if names.is_empty() {
                self.by_position.remove(&at);
            }
        }
    }
}
