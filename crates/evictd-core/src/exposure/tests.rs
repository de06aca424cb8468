//! What rings and entries report.

use super::*;
use crate::ids::{ApiId, KeyId};
use crate::record::{KeyRecord, RecordState};

/// As the real clock, which is never near 0; the beginning of a second.
const START: LeaseTime = LeaseTime(1_200_000_000 * SLOT_US);

fn seconds(seconds: u64) -> LeaseTime {
    START.after(Duration::from_secs(seconds))
}

fn millis(millis: u64) -> LeaseTime {
    START.after(Duration::from_millis(millis))
}

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

/// A commit that is known to the microsecond.
fn exactly(at: LeaseTime) -> CommitWindow {
    CommitWindow { earliest: at, latest: at }
}

fn after(at_most: u64, at_least: u64) -> AnswersAfter {
    AnswersAfter { at_most: Duration::from_millis(at_most), at_least: Duration::from_millis(at_least) }
}

fn key_in(api: &str, workspace: &str) -> Record {
    Record::Key(KeyRecord {
        key_id: KeyId::new("key_1"),
        api_id: ApiId::new(api),
        workspace_id: WorkspaceId::new(workspace),
        state: RecordState::Active,
        name: None,
        meta: None,
        external_id: None,
        permissions: Vec::new(),
        expires_at: None,
    })
}

fn hash(n: u8) -> KeyHash {
    KeyHash([n; 32])
}

fn key_scope(n: u8) -> Scope {
    Scope::Key { hash: hash(n), key_id: None, api_id: Some(ApiId::new("api_1")) }
}

/// An entry of `api_1` as of `as_of` that is served at `time`, and leaves the cache.
fn gone(log: &ExposureLog, n: u8, as_of: u64, time: LeaseTime) {
    let answers = log.answers_of(&key_in("api_1", "ws_1"));
    answers.note(time, at(as_of), at(as_of));
    log.record_evicted(&hash(n), at(as_of), &answers);
}

fn exposure(log: &ExposureLog, scope: &Scope, position: u64, commit: LeaseTime) -> AnswersAfter {
    log.exposure(scope, at(position), exactly(commit), None)
}

#[test]
fn evicted_entry_gives_its_last_answer() {
    let log = ExposureLog::default();
    let answers = log.answers_of(&key_in("api_1", "ws_1"));
    answers.note(millis(2_250), at(5), at(5));
    let of = |position, commit| {
        log.exposure(&key_scope(1), at(position), exactly(commit), Some((&answers, at(5))))
    };
    assert_eq!(of(6, millis(400)), after(2_250 - 400 + 1, 2_250 - 400), "up to a tick late");
    assert_eq!(of(5, millis(400)), AnswersAfter::default(), "it includes the change");
    assert_eq!(of(6, millis(2_300)), AnswersAfter::default(), "before the commit");
}

#[test]
fn exposure_spans_the_uncertainty_of_the_commit() {
    let ring = Ring::new(Arc::new(LastAnswer::new()));
    ring.note(seconds(10), at(5), at(5));
    let commit = CommitWindow { earliest: seconds(7), latest: seconds(9) };
    assert_eq!(ring.exposure(at(6), commit), after(3_001, 1_000));
}

/// Failure: a load replaces the entry that was served, and its answers are lost.
#[test]
fn replaced_entry_counts_until_a_proof_covers_it() {
    let log = ExposureLog::default();
    gone(&log, 1, 5, seconds(25));
    gone(&log, 1, 7, seconds(40));
    assert_eq!(
        exposure(&log, &key_scope(1), 6, seconds(1)),
        after(24_001, 24_000),
        "the first one lacked it"
    );
    assert_eq!(exposure(&log, &key_scope(1), 8, seconds(1)), after(39_001, 39_000), "both lacked it");
    assert_eq!(exposure(&log, &key_scope(2), 6, seconds(1)), AnswersAfter::default());
    log.proven(seconds(26));
    assert_eq!(exposure(&log, &key_scope(1), 6, seconds(1)), AnswersAfter::default());
    assert_eq!(exposure(&log, &key_scope(1), 8, seconds(1)), after(39_001, 39_000));
    log.proven(seconds(41));
    assert!(log.state.lock().past.is_empty());
}

/// A verification had found the entry, or waited for it, before it left the cache.
#[test]
fn late_answer_from_an_evicted_entry_counts() {
    let log = ExposureLog::default();
    let answers = log.answers_of(&key_in("api_1", "ws_1"));
    log.record_evicted(&hash(1), at(5), &answers);
    answers.note(seconds(3), at(5), at(5));
    log.record_evicted(&hash(1), at(5), &answers);
    assert_eq!(exposure(&log, &key_scope(1), 6, seconds(1)), after(2_001, 0));
    assert_eq!(exposure(&log, &key_scope(1), 6, seconds(4)), AnswersAfter::default());
}

#[test]
fn evicted_entries_of_a_busy_key_are_merged() {
    let log = ExposureLog::default();
    (0..20).for_each(|n| gone(&log, 1, 5 + n, seconds(n)));
    assert_eq!(log.state.lock().past[&hash(1)].len(), PAST_OF_A_KEY);
    let after = exposure(&log, &key_scope(1), 20, seconds(0));
    assert!(after.at_most >= Duration::from_secs(14), "{after:?}");
}

#[test]
fn last_answer_of_any_key_stands_in_above_the_limit() {
    let log = ExposureLog::default();
    gone(&log, 1, 5, seconds(20));
    for n in 0..PAST_ANSWERS_MAX as u64 {
        let mut hash = KeyHash([9; 32]);
        hash.0[..8].copy_from_slice(&n.to_le_bytes());
        let answers = log.answers_of(&key_in("api_2", "ws_1"));
        answers.note(seconds(21), at(5), at(5));
        log.record_evicted(&hash, at(5), &answers);
    }
    assert!(log.state.lock().past.len() < PAST_ANSWERS_MAX);
    assert_eq!(
        exposure(&log, &key_scope(1), 6, seconds(1)),
        after(20_001, 0),
        "it may have been another key"
    );
    assert_eq!(
        exposure(&log, &key_scope(1), 6, seconds(22)),
        AnswersAfter::default(),
        "later answers are distinguished"
    );
}

#[test]
fn last_answer_of_any_key_stands_in_after_a_flush() {
    let log = ExposureLog::default();
    let answers = log.answers_of(&key_in("api_1", "ws_1"));
    answers.note(seconds(3), at(5), at(5));
    log.flushed();
    assert_eq!(exposure(&log, &key_scope(1), 6, seconds(1)), after(2_001, 0));
    answers.note(seconds(9), at(6), at(6));
    assert_eq!(
        exposure(&log, &key_scope(1), 7, seconds(1)),
        after(2_001, 0),
        "not later than before the flush"
    );
    assert_eq!(exposure(&log, &key_scope(1), 7, seconds(5)), AnswersAfter::default());
}

/// Loads may bring changes that have not arrived here. Their answers are distinguished by their
/// state.
#[test]
fn answers_ahead_of_applied_count_for_later_changes() {
    let ring = Ring::new(Arc::new(LastAnswer::new()));
    ring.note(seconds(2), at(7), at(5));
    ring.note(seconds(4), at(9), at(5));
    let of = |position| ring.exposure(at(position), exactly(seconds(1)));
    assert_eq!(of(6), AnswersAfter::default());
    assert_eq!(of(8), after(2_000, 1_000), "up to the end of that second");
    assert_eq!(of(10), after(3_001, 3_000));
}

#[test]
fn overwritten_slot_still_counts() {
    let ring = Ring::new(Arc::new(LastAnswer::new()));
    ring.note(seconds(0), at(7), at(5));
    (0..=SLOTS as u64).for_each(|second| ring.note(seconds(second), at(7 + second), at(5)));
    let after = ring.exposure(at(8), exactly(START.before(Duration::from_secs(1))));
    assert!(after.at_most >= Duration::from_secs(1), "{after:?}");
}

#[test]
fn last_answer_is_written_once_per_tick() {
    let last = LastAnswer::new();
    assert_eq!(last.before(), LeaseTime(0));
    for micros in [0, 1, 999] {
        last.note(LeaseTime(START.0 + micros));
        assert_eq!(last.before(), LeaseTime(START.0 + TICK_US), "{micros}");
    }
    last.note(LeaseTime(START.0 + TICK_US));
    assert_eq!(last.before(), LeaseTime(START.0 + 2 * TICK_US));
}

#[test]
fn each_scope_counts_its_own_answers() {
    let log = ExposureLog::default();
    let records = [key_in("api_1", "ws_1"), key_in("api_2", "ws_1"), key_in("api_3", "ws_2"), Record::Absent];
    for (second, record) in (1..).zip(&records) {
        log.answers_of(record).note(seconds(second), at(5), at(5));
    }
    let last = |scope: &Scope| exposure(&log, scope, 6, START).at_least.as_secs();
    assert_eq!(last(&Scope::Api(ApiId::new("api_1"))), 1);
    assert_eq!(last(&Scope::Api(ApiId::new("api_unknown"))), 0);
    assert_eq!(last(&Scope::Workspace(WorkspaceId::new("ws_1"))), 2);
    assert_eq!(last(&Scope::Workspace(WorkspaceId::new("ws_2"))), 3);
    assert_eq!(last(&Scope::All), 4);
}

#[test]
fn rings_without_entries_are_dropped() {
    let log = ExposureLog::default();
    let held = log.answers_of(&key_in("api_0", "ws_1"));
    log.answers_of(&key_in("api_gone", "ws_1")).note(seconds(3), at(5), at(5));
    (0..RINGS_KEPT * 3).for_each(|n| drop(log.answers_of(&key_in(&format!("api_{n}"), "ws_1"))));
    assert!(log.state.lock().rings.len() <= RINGS_KEPT);
    held.note(seconds(1), at(5), at(5));
    let of = |api: &str| exposure(&log, &Scope::Api(ApiId::new(api)), 6, START);
    assert_eq!(of("api_gone"), after(3_001, 0), "its last answer is kept, but not its API");
    assert_eq!(of("api_0").at_least, Duration::from_secs(1), "its ring is kept");
}
