//! The receipt tracker at the planned size: 10,000 agents in 300 regions, each of which announces
//! once a second, while 10,000 changes a second are tracked.

use std::time::{Duration, Instant};

use evictd_core::exposure::{ApplyReport, Exposure};
use evictd_core::ids::{AgentName, Identity, InstanceId, Region, WorkspaceId};
use evictd_core::invalidation::Cause;
use evictd_core::offset::DurationRange;
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Change, Measured, ReceiptEvent, ReceiptTracker, TrackerConfig};
use evictd_core::roster::{Instance, PartitionPolicy};
use evictd_core::time::{LeaseTime, StoreTime};

const AGENTS: u64 = 10_000;
const REGIONS: u64 = 300;
const SECONDS: u64 = 2;
const CHANGES_PER_SECOND: u64 = 10_000;

fn agents() -> Vec<Instance> {
    let agent = |n: u64| Instance {
        identity: Identity {
            region: Region::new(format!("region-{}", n % REGIONS)),
            agent: AgentName::new(format!("agent-{}", n / REGIONS)),
            instance: InstanceId(n + 1),
        },
        policy: PartitionPolicy::Deny,
        bound: Duration::from_secs(30),
    };
    (0..AGENTS).map(agent).collect()
}

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

/// Runs [`SECONDS`] of announcements and changes. Returns how long it took, and how many receipts
/// and confirmations it gave. Every `with_request`-th change is a request's.
fn run(with_request: u64, apply_reports: u64) -> (Duration, u64, u64) {
    let config = TrackerConfig {
        bound: Duration::from_secs(30),
        roster_delay: Duration::from_secs(100),
        open_max: 100_000,
    };
    let (mut tracker, agents) = (ReceiptTracker::new(config, []), agents());
    for agent in &agents {
        tracker.register(agent, LeaseTime(0));
    }
    let (mut finals, mut confirmations) = (0, 0);
    let started = Instant::now();
    for tick in 0..SECONDS * CHANGES_PER_SECOND {
        let now = LeaseTime(1_000_000 + tick * 1_000_000 / CHANGES_PER_SECOND);
        let position = tick + 1;
        let request = position.is_multiple_of(with_request);
        let change = Change {
            request: request.then(|| (format!("req_{position}").into(), WorkspaceId::new("ws_1"))),
            position: at(position),
            cause: Cause::Deleted,
            committed_at: StoreTime(0),
        };
        tracker.track(change, now, Measured::FromRequest, now);
        let agent = &agents[(tick % AGENTS) as usize];
        let seen: Vec<ApplyReport> = (position.saturating_sub(apply_reports)..position)
            .filter(|position| *position > 0)
            .map(|position| ApplyReport {
                position: at(position),
                lag: DurationRange::default(),
                exposure: Exposure::default(),
            })
            .collect();
        tracker.record_applied(&agent.identity, at(position), &seen, now);
        if tick % CHANGES_PER_SECOND == 0 {
            tracker.poll(now);
        }
        for event in tracker.take_events() {
            match event {
                ReceiptEvent::Final(_) => finals += 1,
                ReceiptEvent::Confirmed { .. } => confirmations += 1,
            }
        }
    }
    (started.elapsed(), finals, confirmations)
}

#[test]
fn full_load_takes_a_fraction_of_real_time() {
    for (with_request, apply_reports) in [(u64::MAX, 0), (100, 16), (1, 0)] {
        let (took, finals, confirmations) = run(with_request, apply_reports);
        eprintln!(
            "every {with_request}: {:?} per second, {finals} receipts, {confirmations} confirmations",
            took / SECONDS as u32
        );
        // Measured: 0.14 to 0.3 s. The rest is for shared machines.
        assert!(took < Duration::from_secs(2 * SECONDS), "{took:?} for {SECONDS} seconds");
        assert!(confirmations >= REGIONS * CHANGES_PER_SECOND / 2, "{confirmations}");
    }
}
