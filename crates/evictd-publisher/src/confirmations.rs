//! Who has applied what: agents announce, and deletions become confirmed region by region.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::{AgentName, Identity, Region};
use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_ops::metrics::Registry;
use evictd_wire::applied::Applied;
use metrics::{Gauge, Histogram};
use parking_lot::Mutex;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::bus::Intake;
use crate::metrics::{AGENTS, AgentState, CONFIRMED, Metrics, Refusal};

/// Deletions watched at once; over it the oldest are no longer watched, and only their metric is missing.
const OPEN_MAX: usize = 10_000;

/// Agent processes remembered; each that is silent for three bounds is forgotten.
const INSTANCES_MAX: usize = 100_000;

/// Regions with series of their own; agents of further ones are served but not watched.
const REGIONS_MAX: usize = 1_000;

/// Agents, and deletions that not all of them have confirmed.
pub(crate) struct Confirmations {
    bound: Duration,
    state: Mutex<State>,
    registry: Registry,
}

#[derive(Default)]
struct State {
    head: LogPosition,
    instances: BTreeMap<Identity, Progress>,
    regions: BTreeMap<Region, RegionState>,
    /// By rising position.
    open: VecDeque<Open>,
    /// Names that several live processes bear; each was logged once.
    duplicate_names: BTreeSet<(Region, AgentName)>,
}

#[derive(Clone, Copy)]
struct Progress {
    applied: LogPosition,
    heard_at: LeaseTime,
    live: bool,
    policy: Option<PartitionPolicy>,
}

/// A deletion that not every region has confirmed.
struct Open {
    position: LogPosition,
    committed_at: StoreTime,
}

struct RegionState {
    /// How many live processes stand at each position: the first is how far the region is.
    standing: BTreeMap<LogPosition, usize>,
    /// Deletions up to here are in the histogram.
    confirmed: LogPosition,
    seconds: Histogram,
    agents: [Gauge; 3],
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
    #[serde(skip_serializing_if = "Option::is_none")]
    partition_policy: Option<&'static str>,
}

impl Confirmations {
    pub(crate) fn new(bound: Duration, registry: Registry) -> Self {
        Self { bound, state: Mutex::default(), registry }
    }

    /// The log reaches to `head`.
    pub(crate) fn head(&self, head: LogPosition) {
        let mut state = self.state.lock();
        state.head = state.head.max(head);
    }

    /// How far the log reaches, as far as this publisher has seen.
    pub(crate) fn log_head(&self) -> LogPosition {
        self.state.lock().head
    }

    /// Rows got their positions and are about to be sent: deletions among them wait for confirmation.
    pub(crate) fn numbered(&self, rows: &[Invalidation]) {
        let Some(last) = rows.last() else { return };
        let mut state = self.state.lock();
        state.head = state.head.max(last.position);
        for Invalidation { position, committed_at, .. } in rows.iter().filter(|row| row.cause.is_deletion()) {
            if state.open.len() == OPEN_MAX {
                state.open.pop_front();
            }
            // Two tasks number: what one of them was given first may get here last.
            let index = state.open.partition_point(|open| open.position < *position);
            state.open.insert(index, Open { position: *position, committed_at: *committed_at });
        }
    }

    /// An agent process asked for a proof.
    pub(crate) fn probed(&self, identity: &Identity, policy: PartitionPolicy) {
        if let Some(progress) = self.heard(&mut self.state.lock(), identity) {
            progress.policy = Some(policy);
        }
    }

    /// An agent process told how far it is. `false` if it claims more than there is: that confirms nothing.
    pub(crate) fn applied(&self, identity: &Identity, applied: LogPosition) -> bool {
        let mut state = self.state.lock();
        if applied > state.head {
            return false;
        }
        let Some(progress) = self.heard(&mut state, identity) else { return true };
        if applied > progress.applied {
            let before = std::mem::replace(&mut progress.applied, applied);
            if let Some(region) = state.regions.get_mut(&identity.region) {
                region.leaves(before);
                region.stands(applied);
            }
            state.confirm(&identity.region);
        }
        true
    }

    /// Gives up on what is over the bound, forgets who fell silent, and refreshes the agent gauges.
    pub(crate) fn sweep(&self) {
        let (now, wall_now) = (clock::lease_now(), clock::wall_now());
        let bound_us = i64::try_from(self.bound.as_micros()).unwrap_or(i64::MAX);
        let mut state = self.state.lock();
        let State { instances, regions, open, duplicate_names, .. } = &mut *state;
        open.retain(|open| wall_now.0.saturating_sub(open.committed_at.0) < bound_us);
        for (identity, progress) in &mut *instances {
            if progress.live && now.since(progress.heard_at) >= self.bound {
                progress.live = false;
                if let Some(region) = regions.get_mut(&identity.region) {
                    region.leaves(progress.applied);
                }
            }
        }
        instances.retain(|_, progress| now.since(progress.heard_at) < self.bound * 3);
        let mut counts: BTreeMap<&Region, [u32; 3]> = BTreeMap::new();
        let mut names: BTreeMap<_, u32> = BTreeMap::new();
        for (identity, progress) in &*instances {
            let [live, silent, _] = counts.entry(&identity.region).or_default();
            *if progress.live { live } else { silent } += 1;
            *names.entry((&identity.region, &identity.agent)).or_default() += u32::from(progress.live);
        }
        let duplicates: BTreeSet<_> = names
            .into_iter()
            .filter(|(_, processes)| *processes > 1)
            .map(|((region, agent), processes)| {
                counts.entry(region).or_default()[2] += processes;
                (region.clone(), agent.clone())
            })
            .collect();
        for (region, agent) in duplicates.difference(duplicate_names) {
            tracing::error!(%region, %agent, "several processes run under one agent's name; give each its own");
        }
        *duplicate_names = duplicates;
        for (name, region) in &*regions {
            let counts = counts.get(name).copied().unwrap_or_default();
            for (gauge, count) in region.agents.iter().zip(counts) {
                gauge.set(f64::from(count));
            }
        }
        let names: Vec<Region> = regions.keys().cloned().collect();
        for region in &names {
            state.confirm(region);
        }
    }

    /// Deletions that not every live agent has confirmed.
    pub(crate) fn unconfirmed(&self) -> usize {
        self.state.lock().open.len()
    }

    pub(crate) fn agents(&self) -> Vec<AgentStatus> {
        let now = clock::lease_now();
        let state = self.state.lock();
        let status = |(identity, progress): (&Identity, &Progress)| AgentStatus {
            region: identity.region.to_string(),
            agent: identity.agent.to_string(),
            instance: identity.instance.to_string(),
            applied_position: progress.applied.position(),
            heard_ms_ago: u64::try_from(now.since(progress.heard_at).as_millis()).unwrap_or(u64::MAX),
            partition_policy: progress.policy.map(PartitionPolicy::label),
        };
        state.instances.iter().map(status).collect()
    }

    fn heard<'a>(&self, state: &'a mut State, identity: &Identity) -> Option<&'a mut Progress> {
        let State { instances, regions, .. } = state;
        let full = instances.len() >= INSTANCES_MAX && !instances.contains_key(identity)
            || regions.len() >= REGIONS_MAX && !regions.contains_key(&identity.region);
        if full {
            return None;
        }
        let region =
            regions.entry(identity.region.clone()).or_insert_with(|| self.new_region(&identity.region));
        let progress = instances.entry(identity.clone()).or_insert(Progress {
            applied: LogPosition::ZERO,
            heard_at: LeaseTime(0),
            live: false,
            policy: None,
        });
        progress.heard_at = clock::lease_now();
        if !std::mem::replace(&mut progress.live, true) {
            region.stands(progress.applied);
        }
        Some(progress)
    }

    fn new_region(&self, region: &Region) -> RegionState {
        let region = region.as_str();
        let agents =
            |state: AgentState| self.registry.gauge(&AGENTS, &[("region", region), ("state", state.label())]);
        RegionState {
            standing: BTreeMap::new(),
            confirmed: LogPosition::ZERO,
            seconds: self.registry.histogram(&CONFIRMED, &[("region", region)]),
            agents: AgentState::ALL.map(agents),
        }
    }
}

impl State {
    /// A region has confirmed a deletion when every live process of it has. A deletion that all regions
    /// with live processes have confirmed is done with.
    fn confirm(&mut self, region: &Region) {
        let wall_now = clock::wall_now();
        let Some(region) = self.regions.get_mut(region) else { return };
        if let Some(reached) = region.reached().filter(|reached| *reached > region.confirmed) {
            let from = self.open.partition_point(|open| open.position <= region.confirmed);
            let to = self.open.partition_point(|open| open.position <= reached);
            for open in self.open.range(from..to.max(from)) {
                let micros = wall_now.0.saturating_sub(open.committed_at.0).max(0);
                region.seconds.record(micros as f64 / 1e6);
            }
            region.confirmed = reached;
        }
        if let Some(everywhere) = self.regions.values().filter_map(RegionState::reached).min() {
            let done = self.open.partition_point(|open| open.position <= everywhere);
            self.open.drain(..done);
        }
    }
}

impl RegionState {
    fn reached(&self) -> Option<LogPosition> {
        self.standing.first_key_value().map(|(position, _)| *position)
    }

    fn stands(&mut self, position: LogPosition) {
        *self.standing.entry(position).or_default() += 1;
    }

    fn leaves(&mut self, position: LogPosition) {
        if let Some(count) = self.standing.get_mut(&position) {
            *count -= 1;
            if *count == 0 {
                self.standing.remove(&position);
            }
        }
    }
}

/// Hears announcements until `shutdown`.
pub(crate) async fn hear(
    confirmations: Arc<Confirmations>,
    mut intake: Intake,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
) {
    while let Some(Some(heard)) = shutdown.run_until_cancelled(intake.next()).await {
        let Ok(announcement) = Applied::decode(&heard.payload) else {
            intake.refuse(Refusal::Malformed);
            continue;
        };
        metrics.announced();
        let identity = Identity {
            region: heard.speaker.region,
            agent: heard.speaker.agent,
            instance: announcement.instance,
        };
        if !confirmations.applied(&identity, announcement.applied) {
            tracing::debug!(region = %identity.region, agent = %identity.agent, applied = %announcement.applied, "an agent claims more than the log holds");
            intake.refuse(Refusal::Ahead);
        }
    }
}

#[cfg(test)]
mod tests;
