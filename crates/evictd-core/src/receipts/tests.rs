use std::time::Duration;

use super::*;
use crate::exposure::{ApplyReport, Exposure};
use crate::ids::{AgentName, Identity, InstanceId, Region, WorkspaceId};
use crate::invalidation::Cause;
use crate::offset::DurationRange;
use crate::position::LogPosition;
use crate::roster::{Instance, PartitionPolicy};
use crate::time::{LeaseTime, StoreTime};

const BOUND: Duration = Duration::from_secs(30);

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

fn ms(ms: u64) -> LeaseTime {
    LeaseTime(1_000_000_000 + ms * 1_000)
}

fn agent(region: &str, agent: &str, instance: u64) -> Instance {
    Instance {
        identity: Identity {
            region: Region::new(region),
            agent: AgentName::new(agent),
            instance: InstanceId(instance),
        },
        policy: PartitionPolicy::Deny,
        bound: BOUND,
    }
}

fn deletion(position: u64) -> Change {
    Change {
        request: Some((format!("req_{position}").into(), WorkspaceId::new("ws"))),
        position: at(position),
        cause: Cause::Deleted,
        committed_at: StoreTime(0),
    }
}

/// A tracker with these agents, each at position 1.
fn tracker(agents: &[&Instance]) -> ReceiptTracker {
    let config = TrackerConfig { bound: BOUND, roster_delay: BOUND, open_max: 1_000 };
    let mut tracker = ReceiptTracker::new(config, []);
    for agent in agents {
        tracker.register(agent, ms(0));
        tracker.record_applied(&agent.identity, at(1), &[], ms(0));
    }
    tracker
}

fn track(tracker: &mut ReceiptTracker, position: u64, now: LeaseTime) {
    tracker.track(deletion(position), now, Measured::FromRequest, now);
}

fn finals(tracker: &mut ReceiptTracker) -> Vec<Receipt> {
    let events = tracker.take_events().into_iter();
    events
        .filter_map(|event| if let ReceiptEvent::Final(receipt) = event { Some(receipt) } else { None })
        .collect()
}

fn states(receipt: &Receipt) -> Vec<(&str, &str)> {
    receipt.regions.iter().map(|region| (region.region.as_str(), region.state.label())).collect()
}

#[test]
fn held_receipt_neither_confirms_nor_elapses() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 2, ms(0));
    tracker.hold(true);
    tracker.record_applied(&eu.identity, at(2), &[], ms(1));
    track(&mut tracker, 3, ms(60_000));
    tracker.poll(ms(60_000));
    tracker.end_due(ms(60_000));
    assert_eq!((finals(&mut tracker), tracker.wake_at()), (vec![], None));
    assert_eq!(states(&tracker.receipt("req_2", ms(60_000)).unwrap()), [("eu", "pending")]);
    tracker.mark_departed(&eu.identity, ms(60_001));
    assert_eq!(finals(&mut tracker), []);
}

#[test]
fn bound_restarts_when_the_publisher_serves_again() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 2, ms(0));
    tracker.hold(true);
    tracker.hold(false);
    tracker.resume_at(ms(40_000));
    tracker.record_applied(&eu.identity, at(2), &[], ms(40_001));
    tracker.end_due(ms(69_999));
    assert_eq!(
        (finals(&mut tracker), tracker.wake_at()),
        (vec![], Some(ms(70_000))),
        "an agent may be missing in the roster"
    );
    tracker.end_due(ms(70_000));
    assert_eq!(finals(&mut tracker).iter().map(states).collect::<Vec<_>>(), [[("eu", "confirmed")]]);
}

#[test]
fn apply_reports_count_while_receipts_are_held() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 2, ms(0));
    tracker.hold(true);
    let exposure = Exposure { last_after: Duration::from_secs(25) };
    tracker.record_applied(
        &eu.identity,
        at(2),
        &[ApplyReport { position: at(2), lag: DurationRange::default(), exposure }],
        ms(25_001),
    );
    tracker.hold(false);
    tracker.record_applied(&eu.identity, at(2), &[], ms(25_002));
    assert_eq!(finals(&mut tracker)[0].regions[0].exposure, Some(exposure));
}

#[test]
fn receipt_goes_on_once_it_is_no_longer_held() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 2, ms(0));
    track(&mut tracker, 3, ms(20_000));
    tracker.hold(true);
    tracker.record_applied(&eu.identity, at(3), &[], ms(40_000));
    tracker.hold(false);
    assert_eq!(tracker.wake_at(), Some(ms(30_000)));
    tracker.end_due(ms(40_001));
    assert_eq!(finals(&mut tracker).iter().map(states).collect::<Vec<_>>(), [[("eu", "elapsed")]]);
    tracker.record_applied(&eu.identity, at(3), &[], ms(40_002));
    let confirmed = finals(&mut tracker);
    assert_eq!(
        confirmed.iter().map(states).collect::<Vec<_>>(),
        [[("eu", "confirmed")]],
        "the agent announces it again"
    );
}

#[test]
fn receipt_is_final_once_every_process_confirmed() {
    let (eu, us) = (agent("eu", "a", 1), agent("us", "a", 2));
    let mut tracker = tracker(&[&eu, &us]);
    track(&mut tracker, 2, ms(100));
    tracker.record_applied(&eu.identity, at(2), &[], ms(103));
    assert_eq!(finals(&mut tracker), []);
    let pending = tracker.receipt("req_2", ms(104)).unwrap();
    assert_eq!(states(&pending), [("eu", "confirmed"), ("us", "pending")]);
    assert_eq!((pending.state(), pending.is_final), (RegionState::Pending, false));
    tracker.record_applied(&us.identity, at(2), &[], ms(120));
    let [receipt] = &finals(&mut tracker)[..] else { panic!("one receipt") };
    assert_eq!(receipt.state(), RegionState::Confirmed);
    let after: Vec<_> = receipt.regions.iter().map(|region| region.confirmed_after.unwrap()).collect();
    assert_eq!(after, [Duration::from_millis(3), Duration::from_millis(20)]);
    assert_eq!(receipt.final_after, Some(Duration::from_millis(20)));
    assert_eq!(tracker.receipt("req_2", ms(121)), None, "it is closed");
}

#[test]
fn unconfirmed_receipt_elapses_at_the_bound_and_names_agents() {
    let (eu, us) = (agent("eu", "a", 1), agent("us", "a", 2));
    let mut tracker = tracker(&[&eu, &us]);
    track(&mut tracker, 2, ms(100));
    tracker.record_applied(&eu.identity, at(2), &[], ms(103));
    assert_eq!(tracker.wake_at(), Some(ms(30_100)));
    tracker.poll(ms(30_099));
    assert_eq!(finals(&mut tracker), []);
    tracker.poll(ms(30_100));
    let [receipt] = &finals(&mut tracker)[..] else { panic!("one receipt") };
    assert_eq!(states(receipt), [("eu", "confirmed"), ("us", "elapsed")]);
    assert_eq!(receipt.regions[1].missing, [us.identity]);
    assert_eq!(receipt.state(), RegionState::Elapsed);
}

#[test]
fn stale_serving_agent_makes_the_receipt_unproven() {
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..agent("eu", "a", 1) };
    let mut tracker = tracker(&[&stale, &agent("eu", "b", 2)]);
    track(&mut tracker, 2, ms(0));
    tracker.poll(ms(30_000));
    assert_eq!(finals(&mut tracker)[0].state(), RegionState::Unproven);
}

#[test]
fn both_processes_of_one_name_must_confirm() {
    let (one, other) = (agent("eu", "a", 1), agent("eu", "a", 2));
    let mut tracker = tracker(&[&one]);
    tracker.register(&other, ms(1));
    track(&mut tracker, 2, ms(1));
    tracker.record_contact(&other.identity, ms(1));
    tracker.poll(ms(1));
    assert!(!tracker.receipt("req_2", ms(1)).unwrap().regions[0].duplicate_names, "it may be a successor");
    tracker.record_applied(&one.identity, at(2), &[], ms(1));
    tracker.poll(ms(2));
    let pending = tracker.receipt("req_2", ms(2)).unwrap();
    assert_eq!(states(&pending), [("eu", "pending")]);
    assert_eq!(pending.regions[0].missing, std::slice::from_ref(&other.identity));
    assert!(pending.regions[0].duplicate_names);
    // What another publisher wrote into the roster is old, and doesn't show two at once.
    tracker.register(&one, ms(6_000));
    tracker.record_contact(&other.identity, ms(6_000));
    assert!(tracker.duplicate_names(ms(6_000)).is_empty());
    tracker.record_applied(&other.identity, at(2), &[], ms(3));
    assert_eq!(finals(&mut tracker)[0].state(), RegionState::Confirmed);
}

#[test]
fn configured_region_without_an_agent_is_absent() {
    let config = TrackerConfig { bound: BOUND, roster_delay: BOUND, open_max: 10 };
    let mut tracker = ReceiptTracker::new(config, [Region::new("ap")]);
    let eu = agent("eu", "a", 1);
    tracker.register(&eu, ms(0));
    track(&mut tracker, 2, ms(0));
    assert_eq!(finals(&mut tracker), []);
    tracker.record_applied(&eu.identity, at(2), &[], ms(1));
    assert_eq!(states(&finals(&mut tracker)[0]), [("ap", "absent"), ("eu", "confirmed")]);
}

#[test]
fn regions_can_be_configured_anew() {
    let config = TrackerConfig { bound: BOUND, roster_delay: BOUND, open_max: 10 };
    let mut tracker = ReceiptTracker::new(config, [Region::new("ap"), Region::new("us")]);
    let (eu, us) = (agent("eu", "a", 1), agent("us", "a", 2));
    tracker.register(&eu, ms(0));
    tracker.register(&us, ms(0));
    tracker.configure([Region::new("sa")]);
    track(&mut tracker, 2, ms(0));
    tracker.record_applied(&us.identity, at(2), &[], ms(1));
    tracker.mark_departed(&us.identity, ms(1));
    tracker.configure([Region::new("sa")]);
    tracker.record_applied(&eu.identity, at(2), &[], ms(2));
    let receipt = finals(&mut tracker).remove(0);
    assert_eq!(states(&receipt), [("eu", "confirmed"), ("sa", "absent"), ("us", "confirmed")]);
}

#[test]
fn silent_process_is_removed_after_the_roster_delay() {
    let (here, gone) = (agent("eu", "a", 1), agent("eu", "b", 2));
    let mut tracker = tracker(&[&here, &gone]);
    track(&mut tracker, 2, ms(0));
    tracker.record_applied(&here.identity, at(2), &[], ms(1));
    tracker.poll(ms(30_000));
    let receipt = finals(&mut tracker).remove(0);
    assert_eq!((receipt.state(), &receipt.regions[0].missing), (RegionState::Elapsed, &vec![gone.identity]));
    // Its silence counts from the poll at 30 s: before that, the tracker itself wasn't polled.
    for second in 31..95 {
        tracker.record_contact(&here.identity, ms(second * 1_000));
        tracker.poll(ms(second * 1_000));
    }
    assert_eq!(tracker.instances().count(), 2);
    tracker.poll(ms(95_000));
    assert_eq!(tracker.instances().count(), 1);
    track(&mut tracker, 3, ms(95_001));
    tracker.record_applied(&here.identity, at(3), &[], ms(95_002));
    assert_eq!(finals(&mut tracker)[0].state(), RegionState::Confirmed);
}

#[test]
fn silent_process_that_serves_stale_records_is_kept() {
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..agent("us", "a", 2) };
    let mut tracker = tracker(&[&stale]);
    let hour = 3_600;
    (0..23 * hour).for_each(|second| tracker.poll(ms(second * 1_000)));
    track(&mut tracker, 2, ms(23 * hour * 1_000));
    (23 * hour..24 * hour).for_each(|second| tracker.poll(ms(second * 1_000)));
    assert_eq!(finals(&mut tracker)[0].state(), RegionState::Unproven);
    assert_eq!(tracker.instances().count(), 1);
    tracker.poll(ms(24 * hour * 1_000));
    assert_eq!(tracker.instances().count(), 0);
}

#[test]
fn departed_process_is_not_waited_for() {
    let (here, leaving) = (agent("eu", "a", 1), agent("us", "a", 2));
    let mut tracker = tracker(&[&here, &leaving]);
    track(&mut tracker, 2, ms(0));
    tracker.record_applied(&here.identity, at(2), &[], ms(1));
    tracker.mark_departed(&leaving.identity, ms(2));
    assert_eq!(states(&finals(&mut tracker)[0]), [("eu", "confirmed"), ("us", "absent")]);
}

#[test]
fn process_outside_the_roster_confirms_nothing() {
    let (known, unknown) = (agent("eu", "a", 1), agent("eu", "b", 2));
    let mut tracker = tracker(&[&known]);
    track(&mut tracker, 2, ms(0));
    tracker.record_applied(&unknown.identity, at(2), &[], ms(1));
    assert_eq!(finals(&mut tracker), []);
    tracker.register(&unknown, ms(2));
    tracker.record_applied(&known.identity, at(2), &[], ms(3));
    assert_eq!(finals(&mut tracker), [], "receipts wait for its first announcement");
    tracker.record_applied(&unknown.identity, at(2), &[], ms(4));
    assert_eq!(finals(&mut tracker).len(), 1);
}

#[test]
fn slowest_apply_report_stands_for_its_region() {
    let (one, other) = (agent("eu", "a", 1), agent("eu", "b", 2));
    let mut tracker = tracker(&[&one, &other]);
    track(&mut tracker, 2, ms(0));
    let apply_report = |low, high, last| ApplyReport {
        position: at(2),
        lag: DurationRange { low: Duration::from_millis(low), high: Duration::from_millis(high) },
        exposure: Exposure { last_after: Duration::from_millis(last) },
    };
    for _ in 0..3 {
        tracker.record_applied(&one.identity, at(2), &[apply_report(1, 3, 2)], ms(3));
    }
    tracker.record_applied(&other.identity, at(2), &[apply_report(2, 9, 8)], ms(9));
    let receipt = finals(&mut tracker).remove(0);
    let DurationRange { low, high } = receipt.regions[0].lag.unwrap();
    assert_eq!((low.as_millis(), high.as_millis()), (2, 9), "the slowest agent's");
    assert_eq!(receipt.regions[0].exposure.unwrap().last_after.as_millis(), 8, "the last answer of any");
}

/// Failure: an agent that measures nonsense, or lies, makes a final receipt useless.
#[test]
fn report_of_an_impossible_time_is_cut() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 2, ms(0));
    let report = ApplyReport {
        position: at(2),
        lag: DurationRange { low: Duration::from_hours(1), high: Duration::MAX },
        exposure: Exposure { last_after: Duration::MAX },
    };
    tracker.record_applied(&eu.identity, at(2), &[report], ms(9));
    let RegionReceipt { lag, exposure, .. } = finals(&mut tracker).remove(0).regions.remove(0);
    let DurationRange { low, high } = lag.unwrap();
    assert_eq!([low, high, exposure.unwrap().last_after].map(|time| time.as_millis()), [9, 9, 9]);
}

#[test]
fn change_tracked_late_is_confirmed_by_earlier_reports() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    tracker.record_applied(&eu.identity, at(9), &[], ms(0));
    track(&mut tracker, 5, ms(1));
    assert_eq!(finals(&mut tracker)[0].state(), RegionState::Confirmed);
}

#[test]
fn changes_tracked_out_of_order_are_confirmed() {
    let (eu, us) = (agent("eu", "a", 1), agent("us", "a", 2));
    let mut tracker = tracker(&[&eu, &us]);
    track(&mut tracker, 3, ms(0));
    tracker.record_applied(&eu.identity, at(3), &[], ms(1));
    // A process starts there, and has not announced anything yet.
    let late = agent("eu", "b", 3);
    tracker.register(&late, ms(2));
    track(&mut tracker, 2, ms(2));
    for instance in [&late, &us] {
        tracker.record_applied(&instance.identity, at(3), &[], ms(3));
    }
    let receipts = finals(&mut tracker);
    assert_eq!(receipts.len(), 2);
    assert!(receipts.iter().all(|receipt| receipt.state() == RegionState::Confirmed), "{receipts:?}");
}

#[test]
fn new_epoch_drops_open_receipts() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 2, ms(0));
    tracker.begin_epoch(2, ms(1));
    tracker.record_applied(&eu.identity, LogPosition::new(2, 1).unwrap(), &[], ms(1));
    assert_eq!(finals(&mut tracker), []);
}

#[test]
fn no_receipt_is_final_early_with_a_distrusted_roster() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    tracker.distrust_roster(ms(30_000));
    track(&mut tracker, 2, ms(10_000));
    tracker.record_applied(&eu.identity, at(2), &[], ms(10_001));
    tracker.poll(ms(29_999));
    assert_eq!(finals(&mut tracker), []);
    tracker.poll(ms(30_000));
    assert_eq!(finals(&mut tracker).len(), 1);
}

#[test]
fn positions_of_a_lost_history_confirm_nothing() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    tracker.record_applied(&eu.identity, at(9), &[], ms(0));
    tracker.begin_epoch(2, ms(1));
    let again = Change { position: LogPosition::new(2, 5).unwrap(), ..deletion(5) };
    tracker.track(Change { position: at(8), ..deletion(8) }, ms(2), Measured::FromFirstSight, ms(2));
    tracker.track(again, ms(2), Measured::FromFirstSight, ms(2));
    tracker.record_applied(&eu.identity, at(99), &[], ms(2));
    assert_eq!(finals(&mut tracker), []);
    tracker.record_applied(&eu.identity, LogPosition::new(2, 5).unwrap(), &[], ms(3));
    assert_eq!(finals(&mut tracker).len(), 2);
}

#[test]
fn change_found_late_does_not_delay_later_ones() {
    let eu = agent("eu", "a", 1);
    let mut tracker = tracker(&[&eu]);
    track(&mut tracker, 10, ms(0));
    track(&mut tracker, 5, ms(29_000));
    tracker.poll(ms(30_000));
    assert_eq!(
        finals(&mut tracker).len(),
        2,
        "the lower position was committed before the higher one was numbered"
    );
}

#[test]
fn newest_receipts_are_dropped_above_the_limit() {
    let eu = agent("eu", "a", 1);
    let config = TrackerConfig { bound: BOUND, roster_delay: BOUND, open_max: 2 };
    let mut tracker = ReceiptTracker::new(config, []);
    tracker.register(&eu, ms(0));
    for position in [3, 4, 2] {
        track(&mut tracker, position, ms(0));
    }
    assert_eq!(tracker.receipt("req_4", ms(0)), None);
    assert!(tracker.receipt("req_2", ms(0)).is_some() && tracker.receipt("req_3", ms(0)).is_some());
}
