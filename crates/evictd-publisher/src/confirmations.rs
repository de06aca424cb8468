//! Who has applied what: agents announce, and deletions become confirmed region by region.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::ids::{Identity, Region};
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

/// Agents, and deletions that not all of them have confirmed.
pub(crate) struct Confirmations {
    bound: Duration,
    state: Mutex<State>,
    registry: Registry,
}

#[derive(Default)]
struct State {
    instances: BTreeMap<Identity, Progress>,
    open: VecDeque<Open>,
    regions: BTreeMap<Region, RegionMetrics>,
}

#[derive(Clone, Copy)]
struct Progress {
    applied: LogPosition,
    heard_at: LeaseTime,
    policy: Option<PartitionPolicy>,
}

/// A deletion, and the regions that have confirmed it.
struct Open {
    position: LogPosition,
    committed_at: StoreTime,
    confirmed: BTreeSet<Region>,
}

struct RegionMetrics {
    confirmed: Histogram,
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

    /// Rows got their positions: deletions among them wait for confirmation from now on.
    pub(crate) fn numbered(&self, rows: &[Invalidation]) {
        let deletions = rows.iter().filter(|row| row.cause.is_deletion());
        let mut state = self.state.lock();
        for row in deletions {
            if state.open.len() == OPEN_MAX {
                state.open.pop_front();
            }
            let Invalidation { position, committed_at, .. } = *row;
            state.open.push_back(Open { position, committed_at, confirmed: BTreeSet::new() });
        }
    }

    /// An agent process asked for a proof.
    pub(crate) fn probed(&self, identity: &Identity, policy: PartitionPolicy) {
        if let Some(progress) = self.heard(&mut self.state.lock(), identity) {
            progress.policy = Some(policy);
        }
    }

    /// An agent process told how far it is.
    pub(crate) fn applied(&self, identity: &Identity, applied: LogPosition) {
        let mut state = self.state.lock();
        let Some(progress) = self.heard(&mut state, identity) else { return };
        if applied <= progress.applied {
            return;
        }
        progress.applied = applied;
        self.confirm(&mut state, &identity.region);
    }

    /// Gives up on what is over the bound, forgets who fell silent, and refreshes the agent gauges.
    pub(crate) fn sweep(&self) {
        let (now, wall_now) = (clock::lease_now(), clock::wall_now());
        let mut state = self.state.lock();
        let bound_us = i64::try_from(self.bound.as_micros()).unwrap_or(i64::MAX);
        state.open.retain(|open| wall_now.0 - open.committed_at.0 < bound_us);
        state.instances.retain(|_, progress| now.since(progress.heard_at) < self.bound * 3);
        let State { instances, regions, .. } = &mut *state;
        for (region, metrics) in regions {
            let mut live = BTreeMap::<_, u32>::new();
            let mut silent = 0_u32;
            for (identity, progress) in instances.iter().filter(|(identity, _)| identity.region == *region) {
                if now.since(progress.heard_at) < self.bound {
                    *live.entry(&identity.agent).or_default() += 1;
                } else {
                    silent += 1;
                }
            }
            let duplicate: u32 = live.values().filter(|count| **count > 1).sum();
            let counts = [live.values().sum::<u32>(), silent, duplicate];
            for (gauge, count) in metrics.agents.iter().zip(counts) {
                gauge.set(f64::from(count));
            }
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
        if state.instances.len() >= INSTANCES_MAX && !state.instances.contains_key(identity) {
            return None;
        }
        let registry = &self.registry;
        state.regions.entry(identity.region.clone()).or_insert_with(|| {
            let region = identity.region.as_str();
            RegionMetrics {
                confirmed: registry.histogram(&CONFIRMED, &[("region", region)]),
                agents: AgentState::ALL
                    .map(|state| registry.gauge(&AGENTS, &[("region", region), ("state", state.label())])),
            }
        });
        let unheard = Progress { applied: LogPosition::ZERO, heard_at: LeaseTime(0), policy: None };
        let progress = state.instances.entry(identity.clone()).or_insert(unheard);
        progress.heard_at = clock::lease_now();
        Some(progress)
    }

    /// A region has confirmed a deletion when every live process of it has. A deletion that all regions
    /// have confirmed is done with.
    fn confirm(&self, state: &mut State, region: &Region) {
        let (now, wall_now) = (clock::lease_now(), clock::wall_now());
        let live = |progress: &Progress| now.since(progress.heard_at) < self.bound;
        let State { instances, open, regions } = state;
        let mut slowest = BTreeMap::<&Region, LogPosition>::new();
        for (identity, progress) in instances.iter().filter(|(_, progress)| live(progress)) {
            let slowest = slowest.entry(&identity.region).or_insert(progress.applied);
            *slowest = (*slowest).min(progress.applied);
        }
        let (Some(reached), Some(metrics)) = (slowest.get(region), regions.get(region)) else { return };
        open.retain_mut(|open| {
            if open.position <= *reached && open.confirmed.insert(region.clone()) {
                let micros = (wall_now.0 - open.committed_at.0).max(0);
                metrics.confirmed.record(micros as f64 / 1e6);
            }
            !slowest.keys().all(|region| open.confirmed.contains(*region))
        });
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
        confirmations.applied(&identity, announcement.applied);
    }
}
