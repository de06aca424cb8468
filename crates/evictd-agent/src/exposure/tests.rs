//! What rings and entries remember.

use std::thread;

use super::*;
use crate::fixture::{at, key, root_key};

/// As the real clock, which is never near 0; the beginning of a second.
const START: LeaseTime = LeaseTime(1_200_000_000 * SLOT_US);

fn seconds(seconds: u64) -> LeaseTime {
    START.after(Duration::from_secs(seconds))
}

fn millis(millis: u64) -> LeaseTime {
    START.after(Duration::from_millis(millis))
}

/// A commit that is known to the microsecond.
fn exactly(at: LeaseTime) -> Commit {
    Commit { earliest: at, latest: at }
}

fn after(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn answers_of_whole_seconds_are_counted_and_the_last_one_is_dated() {
    let ring = Ring::new();
    for time in [0, 500, 1_000, 1_100, 2_000, 2_250] {
        ring.note(millis(time), at(5));
    }
    let seen = ring.exposure(at(6), exactly(millis(400)));
    assert_eq!(seen.exposure.answers, 2 + 2, "those of the commit's own second may have come before it");
    assert_eq!(seen.exposure.last_after, after(2_250 - 400 + 1), "up to a tick late");
    assert_eq!(seen.surely_after, after(2_000 - 400), "from the beginning of its second");
}

#[test]
fn answers_from_before_the_commit_or_from_a_newer_state_are_none() {
    let ring = Ring::new();
    ring.note(millis(0), at(5));
    assert_eq!(ring.exposure(at(6), exactly(millis(10))), Seen::default(), "before the commit");
    ring.note(seconds(2), at(6));
    assert_eq!(ring.exposure(at(6), exactly(seconds(1))), Seen::default(), "as new as the change");
    ring.note(seconds(2), at(5));
    ring.note(seconds(2), at(6));
    let mixed = ring.exposure(at(6), exactly(seconds(1)));
    assert_eq!(mixed.exposure.answers, 1, "which of the three isn't known");
}

#[test]
fn a_commit_that_is_known_up_to_an_error_gives_the_highest_time_and_the_lowest() {
    let ring = Ring::new();
    ring.note(seconds(10), at(5));
    let commit = Commit { earliest: seconds(7), latest: seconds(9) };
    let seen = ring.exposure(at(6), commit);
    assert_eq!(seen.exposure.last_after, after(3_001));
    assert_eq!(seen.surely_after, after(1_000));
}

#[test]
fn a_ring_forgets_after_half_a_minute() {
    let ring = Ring::new();
    (0..SLOTS as u64 + 10).for_each(|second| ring.note(seconds(second), at(5)));
    assert_eq!(ring.exposure(at(6), exactly(START)).exposure.answers, SLOTS as u64);
}

#[test]
fn answers_on_many_threads_are_all_counted() {
    let ring = Ring::new();
    let threads = 4;
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| (0..20_000u64).for_each(|n| ring.note(seconds(1).after(after(n / 20)), at(5))));
        }
    });
    let seen = ring.exposure(at(6), exactly(START));
    assert_eq!(seen.exposure.answers, threads * 20_000);
}

#[test]
fn an_entry_is_written_once_in_a_tick_and_never_dated_too_early() {
    let last = LastAnswer::default();
    assert_eq!(last.before(), LeaseTime(0));
    for micros in [0, 1, 999] {
        last.note(LeaseTime(START.0 + micros));
        assert_eq!(last.before(), LeaseTime(START.0 + TICK_US), "{micros}");
    }
    last.note(LeaseTime(START.0 + TICK_US));
    assert_eq!(last.before(), LeaseTime(START.0 + 2 * TICK_US));
}

/// Answers once for each record, `second` after the start.
fn answer(rings: &Rings, records: &[&Record], second: u64) {
    for record in records {
        rings.answers_of(record).note(seconds(second), at(5));
    }
}

#[test]
fn each_scope_adds_up_what_lies_in_it() {
    let of = |api: &str, workspace: &str| {
        Record::Key(evictd_core::record::KeyRecord {
            api_id: ApiId::new(api),
            workspace_id: WorkspaceId::new(workspace),
            ..key("key_1")
        })
    };
    let (one, two, foreign) = (of("api_1", "ws_1"), of("api_2", "ws_1"), of("api_3", "ws_2"));
    let root = Record::RootKey(root_key(&[]));
    let rings = Rings::new();
    answer(&rings, &[&one, &one, &two, &foreign, &root, &Record::Absent], 1);
    let answers = |scope: &Scope| rings.exposure(scope, at(6), exactly(START)).exposure.answers;
    assert_eq!(answers(&Scope::Api(ApiId::new("api_1"))), 2);
    assert_eq!(answers(&Scope::Api(ApiId::new("api_unknown"))), 0);
    assert_eq!(answers(&Scope::Workspace(WorkspaceId::new("ws_1"))), 4);
    assert_eq!(answers(&Scope::Workspace(WorkspaceId::new("ws_2"))), 1);
    assert_eq!(answers(&Scope::All), 6);
}

#[test]
fn rings_that_nobody_holds_are_dropped_when_there_are_many() {
    let rings = Rings::new();
    let record = |n: usize| {
        let api_id = ApiId::new(format!("api_{n}"));
        Record::Key(evictd_core::record::KeyRecord { api_id, ..key("key_1") })
    };
    let held = rings.answers_of(&record(0));
    (0..RINGS_KEPT * 3).for_each(|n| drop(rings.answers_of(&record(n))));
    assert!(rings.kept.lock().apis.len() <= RINGS_KEPT);
    held.note(seconds(1), at(5));
    let scope = Scope::Api(ApiId::new("api_0"));
    assert_eq!(rings.exposure(&scope, at(6), exactly(START)).exposure.answers, 1, "it is still the one");
}
