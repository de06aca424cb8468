//! `/status`: how this agent stands, and what it forgot last.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::follower::Via;
use evictd_core::ids::Identity;
use evictd_core::invalidation::{Invalidation, Scope};
use evictd_core::position::LogPosition;
use evictd_ops::clock;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cache::Cache;
use crate::config::AgentConfig;
use crate::knowledge::Knowledge;

/// How many applied invalidations are shown.
const RECENT_MAX: usize = 32;

/// The last invalidations applied here, newest last.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent(Arc<Mutex<VecDeque<RecentRow>>>);

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RecentRow {
    position: u64,
    scope: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    cause: &'static str,
    via: &'static str,
    committed_at_us: i64,
    lag_ms: f64,
    lag_error_ms: f64,
}

impl Recent {
    pub(crate) fn push(&self, invalidation: &Invalidation, via: Via, lag: Duration, error: Duration) {
        let id = match &invalidation.scope {
            Scope::Key { key_id, .. } => key_id.as_ref().map(ToString::to_string),
            Scope::Api(api) => Some(api.to_string()),
            Scope::Workspace(workspace) => Some(workspace.to_string()),
            Scope::All => None,
        };
        let row = RecentRow {
            position: invalidation.position.position(),
            scope: invalidation.scope.label(),
            id,
            cause: invalidation.cause.label(),
            via: match via {
                Via::Live => "live",
                Via::Replay => "replay",
            },
            committed_at_us: invalidation.committed_at.0,
            lag_ms: millis(lag),
            lag_error_ms: millis(error),
        };
        let mut rows = self.0.lock();
        if rows.len() == RECENT_MAX {
            rows.pop_front();
        }
        rows.push_back(row);
    }
}

/// The closure behind `/status`.
pub(crate) fn status(
    identity: &Identity,
    config: &AgentConfig,
    knowledge: &Arc<Knowledge>,
    cache: &Arc<Cache>,
    recent: Recent,
) -> Arc<dyn Fn() -> Value + Send + Sync> {
    let (knowledge, cache, identity) = (knowledge.clone(), cache.clone(), identity.clone());
    let lease = config.lease.clone();
    Arc::new(move || {
        let now = clock::lease_now();
        let follower = knowledge.follower.lock();
        let applied = follower.applied();
        let remaining = follower.proven_at().map_or(Duration::ZERO, |at| knowledge.bound.remaining(now, at));
        let (key_floors, scope_floors) = follower.floors().counts();
        let (found, not_found, bytes) = cache.size();
        json!({
            "role": "agent",
            "version": env!("CARGO_PKG_VERSION"),
            "region": identity.region.as_str(),
            "agent": identity.agent.as_str(),
            "instance": identity.instance.to_string(),
            "mode": follower.mode(now).label(),
            "bound": lease.bound.to_string(),
            "leaseRemainingMs": millis(remaining),
            "epoch": applied.map(LogPosition::epoch),
            "appliedPosition": applied.map(LogPosition::position),
            "headPosition": follower.head().position(),
            "floors": { "keys": key_floors, "scopes": scope_floors },
            "cache": { "found": found, "notFound": not_found, "bytes": bytes },
            "recent": *recent.0.lock(),
        })
    })
}

fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}
