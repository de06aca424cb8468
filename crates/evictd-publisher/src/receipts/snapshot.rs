//! What `/status` shows of receipts and agents, as of the last second.

use evictd_core::ids::Identity;
use evictd_core::position::LogPosition;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use serde_json::{Value, json};

use super::state::ReceiptsState;

#[derive(Default)]
pub(crate) struct ReceiptsSnapshot {
    pub(crate) open: usize,
    pub(crate) unstored: usize,
    pub(crate) unconfirmed: usize,
    pub(crate) configured_regions: Vec<String>,
    agents: Vec<(Identity, LogPosition, LeaseTime, PartitionPolicy)>,
}

impl ReceiptsSnapshot {
    pub(super) fn of(state: &ReceiptsState) -> Self {
        let tracker = &state.tracker;
        let owned = |(identity, applied, received_at, policy): (&Identity, _, _, _)| {
            (identity.clone(), applied, received_at, policy)
        };
        Self {
            open: tracker.open(),
            unstored: state.unstored(),
            unconfirmed: tracker.unconfirmed(),
            configured_regions: state
                .regions
                .configured()
                .iter()
                .map(|region| region.as_str().to_owned())
                .collect(),
            agents: tracker.instances().map(owned).collect(),
        }
    }

    /// Returns the agent processes that receipts wait for.
    pub(crate) fn agents(&self) -> Vec<Value> {
        let now = clock::lease_now();
        let agent = |(identity, applied, received_at, policy): &(
            Identity,
            LogPosition,
            LeaseTime,
            PartitionPolicy,
        )| {
            json!({
                "region": identity.region.to_string(),
                "agent": identity.agent.to_string(),
                "instance": identity.instance.to_string(),
                "appliedPosition": applied.position(),
                "receivedMsAgo": u64::try_from(now.since(*received_at).as_millis()).unwrap_or(u64::MAX),
                "partitionPolicy": policy.label(),
            })
        };
        self.agents.iter().map(agent).collect()
    }
}
