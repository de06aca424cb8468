//! What operators see of regions and agent processes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use evictd_core::ids::{AgentName, Region};
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::metrics::Registry;
use metrics::{Gauge, Histogram};
use serde::Serialize;

use super::{Receipts, State};
use crate::metrics::{AGENTS, AgentState, CONFIRMED};

/// Regions with series of their own; agents of further ones are waited for but not counted.
const REGIONS_MAX: usize = 1_000;

/// The metrics of each region.
pub(super) struct Series {
    registry: Registry,
    configured: Vec<Region>,
    regions: BTreeMap<Region, RegionSeries>,
    /// Names that several live processes bear; each was logged once.
    duplicate_names: BTreeSet<(Region, AgentName)>,
}

struct RegionSeries {
    confirmed: Histogram,
    agents: [Gauge; AgentState::ALL.len()],
}

/// An agent process, as `/status` shows it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AgentStatus {
    region: String,
    agent: String,
    instance: String,
    applied_position: u64,
    heard_ms_ago: u64,
    partition_policy: &'static str,
}

/// What `/status` tells of receipts.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ReceiptsStatus {
    open: usize,
    /// Final, and not stored yet.
    unrecorded: usize,
    bound_ms: u64,
    configured_regions: Vec<String>,
}

impl Series {
    pub(super) fn new(registry: Registry, configured: Vec<Region>) -> Self {
        let mut series = Self {
            registry,
            configured: Vec::new(),
            regions: BTreeMap::new(),
            duplicate_names: BTreeSet::new(),
        };
        for region in &configured {
            series.region(region);
        }
        series.configured = configured;
        series
    }

    /// The region's series show from now on.
    pub(super) fn region(&mut self, region: &Region) {
        if self.regions.contains_key(region) || self.regions.len() >= REGIONS_MAX {
            return;
        }
        let name = region.as_str();
        let gauge =
            |state: AgentState| self.registry.gauge(&AGENTS, &[("region", name), ("state", state.label())]);
        let confirmed = self.registry.histogram(&CONFIRMED, &[("region", name)]);
        let series = RegionSeries { confirmed, agents: AgentState::ALL.map(gauge) };
        self.regions.insert(region.clone(), series);
    }

    pub(super) fn confirmed(&self, region: &Region, after: Duration) {
        if let Some(series) = self.regions.get(region) {
            series.confirmed.record(after.as_secs_f64());
        }
    }
}

impl State {
    /// Brings the gauges up to date.
    pub(super) fn count(&mut self, now: LeaseTime) {
        let bound = self.tracker.bound();
        let mut counts: BTreeMap<&Region, [u32; AgentState::ALL.len()]> = BTreeMap::new();
        for (identity, _, heard_at, _) in self.tracker.instances() {
            let live = now.since(heard_at) < bound;
            let counts = counts.entry(&identity.region).or_default();
            counts[if live { AgentState::Live } else { AgentState::Silent } as usize] += 1;
        }
        for region in &self.series.configured {
            counts.entry(region).or_insert_with(|| {
                let mut counts = [0; AgentState::ALL.len()];
                counts[AgentState::Absent as usize] = 1;
                counts
            });
        }
        let shared = self.tracker.duplicate_names(now);
        for ((region, _), processes) in &shared {
            let processes = u32::try_from(*processes).unwrap_or(u32::MAX);
            counts.entry(region).or_default()[AgentState::Duplicate as usize] += processes;
        }
        let duplicates: BTreeSet<_> = shared.keys().cloned().collect();
        for (region, agent) in duplicates.difference(&self.series.duplicate_names) {
            tracing::error!(%region, %agent, "several processes run under one agent's name; give each its own");
        }
        for (region, series) in &self.series.regions {
            let counts = counts.get(region).copied().unwrap_or_default();
            for (gauge, count) in series.agents.iter().zip(counts) {
                gauge.set(f64::from(count));
            }
        }
        self.series.duplicate_names = duplicates;
    }
}

impl Receipts {
    pub(crate) fn agents(&self) -> Vec<AgentStatus> {
        let now = clock::lease_now();
        let state = self.state.lock();
        let status = |(identity, applied, heard_at, policy): (
            &evictd_core::ids::Identity,
            evictd_core::position::LogPosition,
            LeaseTime,
            evictd_core::roster::PartitionPolicy,
        )| AgentStatus {
            region: identity.region.to_string(),
            agent: identity.agent.to_string(),
            instance: identity.instance.to_string(),
            applied_position: applied.position(),
            heard_ms_ago: u64::try_from(now.since(heard_at).as_millis()).unwrap_or(u64::MAX),
            partition_policy: policy.label(),
        };
        state.tracker.instances().map(status).collect()
    }

    /// Deletions that not every agent has confirmed.
    pub(crate) fn unconfirmed(&self) -> usize {
        self.state.lock().tracker.unconfirmed()
    }

    pub(crate) fn status(&self) -> ReceiptsStatus {
        let state = self.state.lock();
        ReceiptsStatus {
            open: state.tracker.open(),
            unrecorded: state.unrecorded.len(),
            bound_ms: u64::try_from(state.tracker.bound().as_millis()).unwrap_or(u64::MAX),
            configured_regions: state.series.configured.iter().map(ToString::to_string).collect(),
        }
    }
}
