//! `/status`: the agent's state, and the invalidations that it applied last.

use std::collections::VecDeque;
use std::sync::Arc;

use evictd_core::exposure::ApplyReport;
use evictd_core::follower::Via;
use evictd_core::ids::Identity;
use evictd_core::invalidation::{Invalidation, Scope};
use evictd_core::position::LogPosition;
use evictd_core::time::millis;
use evictd_ops::clock;
use evictd_ops::config::HumanDuration;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cache::RecordCache;

use crate::policy::Policies;
use crate::serving::ServingState;

const RECENT_MAX: usize = 32;

/// The last invalidations applied here, newest last.
#[derive(Clone, Debug, Default)]
pub(crate) struct RecentChanges(Arc<Mutex<VecDeque<RecentChange>>>);

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RecentChange {
    position: u64,
    scope: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    cause: &'static str,
    via: &'static str,
    committed_at_us: i64,
    /// Absent before the first measurement of the store's clock.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    measured: Option<RecentLag>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(clippy::struct_field_names, reason = "the unit is part of the published names")]
struct RecentLag {
    /// The middle of the interval between the next two.
    lag_ms: f64,
    lag_low_ms: f64,
    lag_high_ms: f64,
    last_answer_after_ms: f64,
}

impl RecentChanges {
    pub(crate) fn push(&self, invalidation: &Invalidation, via: Via, apply_report: Option<&ApplyReport>) {
        let id = match &invalidation.scope {
            Scope::Key { key_id, .. } => key_id.as_ref().map(ToString::to_string),
            Scope::Api(api) => Some(api.to_string()),
            Scope::Workspace(workspace) => Some(workspace.to_string()),
            Scope::All => None,
        };
        let row = RecentChange {
            position: invalidation.position.position(),
            scope: invalidation.scope.label(),
            id,
            cause: invalidation.cause.label(),
            via: via.label(),
            committed_at_us: invalidation.committed_at.0,
            measured: apply_report.map(|ApplyReport { lag, exposure, .. }| RecentLag {
                lag_ms: millis(lag.middle()),
                lag_low_ms: millis(lag.low),
                lag_high_ms: millis(lag.high),
                last_answer_after_ms: millis(exposure.last_after),
            }),
        };
        let mut rows = self.0.lock();
        if rows.len() == RECENT_MAX {
            rows.pop_front();
        }
        rows.push_back(row);
    }
}

/// The parts that `/status` reports on.
pub(crate) struct StatusSources {
    pub(crate) identity: Identity,
    pub(crate) bound: HumanDuration,
    pub(crate) vm_clock_watched: bool,
    pub(crate) serving: Arc<ServingState>,
    pub(crate) cache: Arc<RecordCache>,
    pub(crate) policies: Arc<Policies>,
    pub(crate) recent: RecentChanges,
}

impl StatusSources {
    pub(crate) fn report(&self) -> Value {
        let Self { identity, serving, cache, .. } = self;
        let now = clock::lease_now();
        let follower = serving.follower.lock();
        let applied = follower.applied();
        let remaining = serving.remaining(&follower, now);
        let (key_floors, scope_floors) = follower.floors().counts();
        let (found, not_found, bytes) = cache.size();
        json!({
            "role": "agent",
            "version": env!("CARGO_PKG_VERSION"),
            "region": identity.region.as_str(),
            "agent": identity.agent.as_str(),
            "instance": identity.instance.to_string(),
            "mode": serving.mode(&follower, now).label(),
            "bound": self.bound.to_string(),
            "partitionPolicy": self.policies.widest().label(),
            "vmClockWatched": self.vm_clock_watched,
            "leaseRemainingMs": millis(remaining),
            "homeStore": follower.provenance().map(|followed| followed.store.to_string()),
            "incarnation": follower.provenance().map(|followed| followed.incarnation.to_string()),
            "epoch": applied.map(LogPosition::epoch),
            "appliedPosition": applied.map(LogPosition::position),
            "headPosition": follower.head().position(),
            "floors": { "keys": key_floors, "scopes": scope_floors },
            "cache": { "found": found, "notFound": not_found, "bytes": bytes },
            "recent": *self.recent.0.lock(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use evictd_core::exposure::Exposure;
    use evictd_core::offset::DurationRange;

    use super::*;
    use crate::fixture::{at, row};

    #[test]
    fn a_recent_change_shows_its_lag_interval_and_exposure() {
        let recent = RecentChanges::default();
        let row = row(at(7), Scope::All);
        let span =
            |low, high| DurationRange { low: Duration::from_millis(low), high: Duration::from_millis(high) };
        let exposure = Exposure { last_after: Duration::from_millis(19) };
        recent.push(&row, Via::Live, None);
        recent.push(&row, Via::Live, Some(&ApplyReport { position: at(7), lag: span(10, 20), exposure }));
        let shown = serde_json::to_value(&*recent.0.lock()).unwrap();
        assert_eq!(shown[0].get("lagMs"), None, "the store's clock was not known yet");
        assert_eq!(shown[0]["position"], 7);
        let numbers =
            ["lagMs", "lagLowMs", "lagHighMs", "lastAnswerAfterMs"].map(|name| shown[1][name].as_f64());
        assert_eq!(numbers, [Some(15.0), Some(10.0), Some(20.0), Some(19.0)]);
    }
}
