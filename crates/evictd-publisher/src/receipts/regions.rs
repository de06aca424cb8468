//! The metrics of each region and its agent processes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use evictd_core::ids::{AgentName, Region};
use evictd_core::receipts::ReceiptTracker;
use evictd_core::time::LeaseTime;
use evictd_ops::metrics::{ByLabel, Registry};
use metrics::{Gauge, Histogram};

use crate::metrics::{AGENTS, AgentPresence, CONFIRMED};

/// Regions with series of their own. Receipts wait for agents of further regions, but no metric counts them.
const REGIONS_MAX: usize = 1_000;

pub(super) struct RegionMetrics {
    registry: Registry,
    configured: Vec<Region>,
    regions: BTreeMap<Region, RegionSeries>,
    /// Names that several live processes share; each was logged once.
    duplicate_names: BTreeSet<(Region, AgentName)>,
}

struct RegionSeries {
    confirmed: Histogram,
    agents: ByLabel<AgentPresence, Gauge>,
}

impl RegionMetrics {
    pub(super) fn new(registry: Registry, configured: &[Region]) -> Self {
        let (regions, duplicate_names) = (BTreeMap::new(), BTreeSet::new());
        let mut metrics = Self { registry, configured: Vec::new(), regions, duplicate_names };
        metrics.configure(configured);
        metrics
    }

    /// Shows the series of these regions, and counts those of them that have no agent as absent.
    pub(super) fn configure(&mut self, configured: &[Region]) {
        for region in configured {
            self.add(region);
        }
        self.configured = configured.to_vec();
    }

    pub(super) fn configured(&self) -> &[Region] {
        &self.configured
    }

    /// Shows the region's series from now on.
    pub(super) fn add(&mut self, region: &Region) {
        if self.regions.contains_key(region) || self.regions.len() >= REGIONS_MAX {
            return;
        }
        let name = region.as_str();
        let gauge = |state: AgentPresence| self.registry.gauge(&AGENTS, &[name, state.label()]);
        let confirmed = self.registry.histogram(&CONFIRMED, &[name]);
        let series = RegionSeries { confirmed, agents: ByLabel::new(gauge) };
        self.regions.insert(region.clone(), series);
    }

    pub(super) fn confirmed(&self, region: &Region, after: Duration) {
        if let Some(series) = self.regions.get(region) {
            series.confirmed.record(after.as_secs_f64());
        }
    }

    /// Brings the gauges up to date.
    pub(super) fn count(&mut self, tracker: &ReceiptTracker, now: LeaseTime) {
        let mut counts: BTreeMap<&Region, [u32; AgentPresence::ALL.len()]> = BTreeMap::new();
        for (identity, _, received_at, _) in tracker.instances() {
            let is_live = now.since(received_at) < tracker.bound();
            let counts = counts.entry(&identity.region).or_default();
            counts[if is_live { AgentPresence::Live } else { AgentPresence::Silent } as usize] += 1;
        }
        for region in &self.configured {
            counts.entry(region).or_insert_with(|| {
                let mut counts = [0; AgentPresence::ALL.len()];
                counts[AgentPresence::Absent as usize] = 1;
                counts
            });
        }
        let shared = tracker.duplicate_names(now);
        for ((region, _), processes) in &shared {
            let processes = u32::try_from(*processes).unwrap_or(u32::MAX);
            counts.entry(region).or_default()[AgentPresence::Duplicate as usize] += processes;
        }
        let duplicates: BTreeSet<_> = shared.keys().cloned().collect();
        for (region, agent) in duplicates.difference(&self.duplicate_names) {
            tracing::error!(%region, %agent, "several agent processes share one name; give each its own");
        }
        for (region, series) in &self.regions {
            let counts = counts.get(region).copied().unwrap_or_default();
            for (state, gauge) in series.agents.iter() {
                gauge.set(f64::from(counts[state as usize]));
            }
        }
        self.duplicate_names = duplicates;
    }
}
