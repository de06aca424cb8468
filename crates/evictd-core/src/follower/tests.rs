//! The follower against hand-made histories: every effect, in order.

use super::*;
use crate::ids::ApiId;
use crate::invalidation::Cause;
use crate::time::StoreTime;

const TIMEOUT_MS: u64 = 1_000;
const PATIENCE_MS: u64 = 20;

fn ms(ms: u64) -> LeaseTime {
    LeaseTime(10_000_000 + ms * 1_000)
}

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

fn deletion(position: LogPosition) -> Invalidation {
    let hash = KeyHash([position.position() as u8; 32]);
    let scope = Scope::Key { hash, key_id: None, api_id: Some(ApiId::new("api_1")) };
    Invalidation { position, scope, cause: Cause::Deleted, committed_at: StoreTime(0) }
}

fn applied(position: LogPosition, via: Via) -> Effect {
    Effect::Applied { invalidation: deletion(position), via }
}

fn progress(applied: u64, head: u64) -> Effect {
    Effect::Progress { applied: at(applied), head: at(head) }
}

fn follower() -> Follower {
    let bound = Bound::new(Duration::from_secs(30), Duration::from_secs(3)).unwrap();
    let config = FollowerConfig {
        bound,
        probe_interval: Duration::from_secs(5),
        request_timeout: Duration::from_millis(TIMEOUT_MS),
        gap_patience: Duration::from_millis(PATIENCE_MS),
        floors: FloorLimits::default(),
    };
    Follower::new(config, 100)
}

fn effects(step: impl FnOnce(&mut Vec<Effect>)) -> Vec<Effect> {
    let mut effects = Vec::new();
    step(&mut effects);
    effects
}

/// A follower whose base is `head`, proven at 0 ms.
fn started(head: u64) -> Follower {
    let mut follower = follower();
    let asked = effects(|out| follower.poll(ms(0), out));
    assert_eq!(asked, [Effect::SendProbe { nonce: 100, seen: LogPosition::ZERO, all: false }]);
    let mut out = Vec::new();
    assert_eq!(follower.on_probe_answer(100, at(head), ms(10), &mut out), Accepted::Yes);
    follower
}

#[test]
fn the_first_answer_gives_the_base_and_the_lease_runs_from_the_question() {
    let mut follower = follower();
    assert_eq!(follower.mode(ms(0)), Mode::Starting);
    follower.poll(ms(0), &mut Vec::new());
    let out = effects(|out| {
        follower.on_probe_answer(100, at(7), ms(400), out);
    });
    assert_eq!(
        out,
        [Effect::Flush(FlushReason::Start), progress(7, 7), Effect::Proven(ms(0)), Effect::Announce]
    );
    assert_eq!(follower.floors().horizon().get(), at(7));
    assert_eq!(follower.mode(ms(26_999)), Mode::Live);
    assert_eq!(follower.mode(ms(27_000)), Mode::Expired);
}

#[test]
fn nothing_is_admitted_before_the_base_is_known() {
    let mut follower = follower();
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    let hash = KeyHash([1; 32]);
    assert!(!follower.admits(&hash, &anchors, at(1_000)));
    let mut follower = started(7);
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    assert!(!follower.admits(&hash, &anchors, at(6)));
    assert!(follower.admits(&hash, &anchors, at(7)));
}

#[test]
fn an_invalidation_in_order_is_applied_then_progress_then_announced() {
    let mut follower = started(7);
    let out = effects(|out| follower.on_live(vec![deletion(at(8))], ms(20), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(8, 8), Effect::Announce]);
    assert_eq!(follower.wake_at(), ms(5_000), "no hole, only the next probe");
}

#[test]
fn later_invalidations_are_applied_at_once_but_progress_waits_for_the_hole() {
    let mut follower = started(7);
    let out = effects(|out| follower.on_live(vec![deletion(at(9))], ms(20), out));
    assert_eq!(out, [applied(at(9), Via::Live), progress(7, 9)]);
    let out = effects(|out| follower.on_live(vec![deletion(at(8))], ms(25), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(9, 9), Effect::Announce]);
    assert_eq!(effects(|out| follower.poll(ms(1_000), out)), [], "the hole closed by itself");
}

#[test]
fn a_deletion_that_came_too_early_is_announced_when_its_predecessor_arrives() {
    let mut follower = started(7);
    follower.on_live(vec![deletion(at(9))], ms(20), &mut Vec::new());
    let created = Invalidation { cause: Cause::Created, ..deletion(at(8)) };
    let out = effects(|out| follower.on_live(vec![created.clone()], ms(25), out));
    let applied = Effect::Applied { invalidation: created, via: Via::Live };
    assert_eq!(out, [applied, progress(9, 9), Effect::Announce]);
}

#[test]
fn what_nobody_waits_for_is_not_announced_at_once() {
    let mut follower = started(7);
    let created = Invalidation { cause: Cause::Created, ..deletion(at(8)) };
    let out = effects(|out| follower.on_live(vec![created], ms(20), out));
    assert!(!out.contains(&Effect::Announce), "{out:?}");
}

#[test]
fn a_hole_that_stays_is_repaired_by_a_replay() {
    let mut follower = started(7);
    follower.on_live(vec![deletion(at(10))], ms(20), &mut Vec::new());
    assert_eq!(follower.wake_at(), ms(20 + PATIENCE_MS));
    assert_eq!(effects(|out| follower.poll(ms(39), out)), []);
    let asked = effects(|out| follower.poll(ms(40), out));
    assert_eq!(
        asked,
        [Effect::SendReplay { nonce: 101, epoch: 1, from: 8, to: 10, cause: RepairCause::Gap, all: false }]
    );
    let rows = ReplayAnswer::Rows(vec![deletion(at(8)), deletion(at(9)), deletion(at(10))]);
    let out = effects(|out| assert_eq!(follower.on_replay_answer(101, rows, ms(50), out), Accepted::Yes));
    assert_eq!(
        out,
        [applied(at(8), Via::Replay), applied(at(9), Via::Replay), progress(10, 10), Effect::Announce],
        "10 was applied when it came live"
    );
}

#[test]
fn the_last_message_lost_is_shown_by_the_tick() {
    let mut follower = started(7);
    assert_eq!(effects(|out| follower.on_tick(at(8), ms(20), out)), [progress(7, 8)]);
    let asked = effects(|out| follower.poll(ms(40), out));
    assert_eq!(
        asked,
        [Effect::SendReplay { nonce: 101, epoch: 1, from: 8, to: 8, cause: RepairCause::Tick, all: false }]
    );
}

#[test]
fn a_replay_that_is_not_answered_is_asked_again_with_a_new_number() {
    let mut follower = started(7);
    follower.on_tick(at(8), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    assert_eq!(effects(|out| follower.poll(ms(40 + TIMEOUT_MS - 1), out)), []);
    let again = effects(|out| follower.poll(ms(40 + TIMEOUT_MS), out));
    assert!(matches!(again[..], [Effect::SendReplay { nonce: 102, .. }]), "{again:?}");
    assert_eq!(follower.wake_at(), ms(40 + 3 * TIMEOUT_MS), "the pause doubles");
}

#[test]
fn a_replay_that_nobody_answers_goes_to_all_every_other_time_however_often() {
    let mut follower = started(7);
    follower.on_tick(at(8), ms(20), &mut Vec::new());
    let mut asked = Vec::new();
    while asked.len() < 8 {
        let now = follower.wake_at();
        let sent = effects(|out| follower.poll(now, out));
        asked.extend(sent.iter().filter_map(|effect| match effect {
            Effect::SendReplay { all, .. } => Some(*all),
            _ => None,
        }));
    }
    assert_eq!(asked, [false, true, false, true, false, true, false, true]);
}

#[test]
fn a_path_slower_than_the_timeout_is_repaired_by_the_late_answer() {
    let mut follower = started(7);
    follower.on_tick(at(8), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    follower.poll(ms(40 + TIMEOUT_MS), &mut Vec::new());
    let late = ReplayAnswer::Rows(vec![deletion(at(8))]);
    assert_eq!(follower.on_replay_answer(101, late.clone(), ms(1_100), &mut Vec::new()), Accepted::Yes);
    assert_eq!(follower.applied(), Some(at(8)));
    assert_eq!(follower.on_replay_answer(102, late, ms(1_200), &mut Vec::new()), Accepted::No, "used up");
}

#[test]
fn a_hole_that_closes_by_itself_ends_its_repair() {
    let mut follower = started(7);
    follower.on_live(vec![deletion(at(9))], ms(20), &mut Vec::new());
    let asked = effects(|out| follower.poll(ms(40), out));
    assert!(matches!(asked[..], [Effect::SendReplay { .. }]), "{asked:?}");
    follower.on_live(vec![deletion(at(8))], ms(50), &mut Vec::new());
    assert_eq!(follower.wake_at(), ms(5_000), "only the next probe is due");
    assert_eq!(effects(|out| follower.poll(ms(4_999), out)), []);
}

#[test]
fn an_answer_with_a_row_missing_is_not_taken_for_nothing() {
    let mut follower = started(7);
    follower.on_tick(at(9), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    for rows in [vec![], vec![deletion(at(9))], vec![deletion(at(8)), deletion(at(10))]] {
        let answer = ReplayAnswer::Rows(rows);
        assert_eq!(follower.on_replay_answer(101, answer, ms(50), &mut Vec::new()), Accepted::No);
    }
    assert_eq!(follower.applied(), Some(at(7)));
    let prefix = ReplayAnswer::Rows(vec![deletion(at(8))]);
    assert_eq!(follower.on_replay_answer(101, prefix, ms(60), &mut Vec::new()), Accepted::Yes);
    let rest = effects(|out| follower.poll(ms(60), out));
    assert!(matches!(rest[..], [Effect::SendReplay { from: 9, to: 9, .. }]), "{rest:?}");
}

#[test]
fn a_refused_replay_flushes_and_goes_on_from_the_head() {
    let mut follower = started(7);
    follower.on_tick(at(9), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    let out = effects(|out| {
        follower.on_replay_answer(101, ReplayAnswer::Refused { head: at(12) }, ms(50), out);
    });
    assert_eq!(out, [Effect::Flush(FlushReason::Refused), progress(12, 12), Effect::Announce]);
    assert_eq!(follower.floors().horizon().get(), at(12));
}

#[test]
fn a_gap_longer_than_a_replay_is_worth_flushes() {
    let mut follower = started(7);
    follower.on_tick(at(8 + REPAIR_SPAN_MAX), ms(20), &mut Vec::new());
    let out = effects(|out| follower.poll(ms(40), out));
    let head = 8 + REPAIR_SPAN_MAX;
    assert_eq!(out, [Effect::Flush(FlushReason::LongGap), progress(head, head), Effect::Announce]);
}

#[test]
fn a_proof_waits_until_everything_below_its_head_is_applied() {
    let mut follower = started(7);
    let asked = effects(|out| follower.poll(ms(5_000), out));
    assert_eq!(asked, [Effect::SendProbe { nonce: 101, seen: at(7), all: false }]);
    let out = effects(|out| {
        follower.on_probe_answer(101, at(9), ms(5_010), out);
    });
    assert_eq!(out, [progress(7, 9)], "8 and 9 are missing: no proof");
    assert_eq!(follower.proven_at(), Some(ms(0)));
    let out = effects(|out| follower.on_live(vec![deletion(at(8)), deletion(at(9))], ms(5_015), out));
    assert_eq!(
        out,
        [
            applied(at(8), Via::Live),
            applied(at(9), Via::Live),
            progress(9, 9),
            Effect::Proven(ms(5_000)),
            Effect::Announce
        ]
    );
}

#[test]
fn an_unanswered_probe_is_sent_to_all_and_a_late_answer_proves_its_own_time() {
    let mut follower = started(7);
    follower.poll(ms(5_000), &mut Vec::new());
    let second = effects(|out| follower.poll(ms(5_000 + TIMEOUT_MS), out));
    assert_eq!(second, [Effect::SendProbe { nonce: 102, seen: at(7), all: true }]);
    let late = effects(|out| {
        follower.on_probe_answer(101, at(7), ms(6_100), out);
    });
    assert_eq!(late, [Effect::Proven(ms(5_000))]);
    assert_eq!(follower.on_probe_answer(101, at(7), ms(6_200), &mut Vec::new()), Accepted::No, "used up");
}

#[test]
fn an_unknown_nonce_proves_nothing() {
    let mut follower = started(7);
    let out = effects(|out| assert_eq!(follower.on_probe_answer(55, at(9), ms(20), out), Accepted::No));
    assert_eq!(out, []);
    assert_eq!(follower.head(), at(7));
}

#[test]
fn a_new_epoch_flushes_once_and_the_old_one_moves_nothing() {
    let mut follower = started(7);
    let new = |position| LogPosition::new(2, position).unwrap();
    let out = effects(|out| follower.on_tick(new(5), ms(20), out));
    let moved = Effect::Progress { applied: new(5), head: new(5) };
    assert_eq!(out, [Effect::Flush(FlushReason::NewEpoch), moved, Effect::Announce]);
    assert_eq!(effects(|out| follower.on_tick(at(99), ms(30), out)), []);
    assert_eq!(effects(|out| follower.on_live(vec![deletion(at(8))], ms(30), out)), []);
    let out = effects(|out| follower.on_live(vec![deletion(new(6))], ms(40), out));
    let moved = Effect::Progress { applied: new(6), head: new(6) };
    assert_eq!(out, [applied(new(6), Via::Live), moved, Effect::Announce]);
}

#[test]
fn an_answer_from_an_older_epoch_is_ignored() {
    let mut follower = started(7);
    follower.on_tick(LogPosition::new(2, 1).unwrap(), ms(20), &mut Vec::new());
    follower.poll(ms(5_000), &mut Vec::new());
    assert_eq!(follower.on_probe_answer(101, at(9), ms(5_010), &mut Vec::new()), Accepted::No);
    assert_eq!(follower.proven_at(), Some(ms(0)));
}

#[test]
fn what_came_before_the_base_still_counts_above_it() {
    let mut follower = follower();
    follower.poll(ms(0), &mut Vec::new());
    let out = effects(|out| follower.on_live(vec![deletion(at(8))], ms(5), out));
    assert_eq!(out, [applied(at(8), Via::Live)]);
    let out = effects(|out| {
        follower.on_probe_answer(100, at(7), ms(10), out);
    });
    assert_eq!(
        out,
        [Effect::Flush(FlushReason::Start), progress(8, 8), Effect::Proven(ms(0)), Effect::Announce]
    );
}

#[test]
fn a_duplicate_is_not_news_but_still_raises_its_floor() {
    let mut follower = started(7);
    follower.on_live(vec![deletion(at(8))], ms(20), &mut Vec::new());
    assert_eq!(effects(|out| follower.on_live(vec![deletion(at(8))], ms(30), out)), []);
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    assert_eq!(follower.floor(&KeyHash([8; 32]), &anchors), at(8));
}

#[test]
fn a_reconnect_makes_a_proof_due_at_once() {
    let mut follower = started(7);
    follower.connected(ms(700));
    let asked = effects(|out| follower.poll(ms(700), out));
    assert!(matches!(asked[..], [Effect::SendProbe { all: false, .. }]), "{asked:?}");
}

/// What may come in, at a position near the base.
#[derive(Clone, Debug)]
enum Input {
    Live(u64),
    Tick(u64),
    ProbeAnswer { age: u64, head: u64 },
    ReplayAnswer { age: u64, rows: u64 },
    Connected,
}

fn any_input() -> impl proptest::strategy::Strategy<Value = Input> {
    use proptest::prelude::*;
    prop_oneof![
        4 => (1u64..40).prop_map(Input::Live),
        2 => (1u64..40).prop_map(Input::Tick),
        3 => (0u64..4, 1u64..40).prop_map(|(age, head)| Input::ProbeAnswer { age, head }),
        3 => (0u64..4, 1u64..12).prop_map(|(age, rows)| Input::ReplayAnswer { age, rows }),
        1 => Just(Input::Connected),
    ]
}

proptest::proptest! {
    /// A shell that sleeps until `wake_at` must never spin, whatever came in.
    #[test]
    fn after_a_poll_nothing_is_due_yet(
        history in proptest::collection::vec((any_input(), 0u64..1_500), 1..60),
    ) {
        let mut follower = follower();
        let mut now = 0;
        let (mut last_probe, mut last_replay) = (0, (0, 0));
        for (input, pause) in history {
            now += pause;
            let mut out = Vec::new();
            match input {
                Input::Live(position) => follower.on_live(vec![deletion(at(position))], ms(now), &mut out),
                Input::Tick(head) => follower.on_tick(at(head), ms(now), &mut out),
                Input::ProbeAnswer { age, head } => {
                    follower.on_probe_answer(last_probe - age.min(last_probe), at(head), ms(now), &mut out);
                }
                Input::ReplayAnswer { age, rows } => {
                    let (nonce, from) = last_replay;
                    let rows = (from..from + rows).filter(|p| *p > 0).map(|p| deletion(at(p))).collect();
                    follower.on_replay_answer(nonce - age.min(nonce), ReplayAnswer::Rows(rows), ms(now), &mut out);
                }
                Input::Connected => follower.connected(ms(now)),
            }
            follower.poll(ms(now), &mut out);
            for effect in &out {
                match effect {
                    Effect::SendProbe { nonce, .. } => last_probe = *nonce,
                    Effect::SendReplay { nonce, from, .. } => last_replay = (*nonce, *from),
                    _ => {}
                }
            }
            proptest::prop_assert!(follower.wake_at() > ms(now), "due at once after {out:?}");
            if let Some(applied) = follower.applied() {
                proptest::prop_assert!(applied <= follower.head());
            }
        }
    }

    /// R5, R6: floors are a join-semilattice, and `applied` doesn't depend on the way either.
    #[test]
    fn any_order_repetition_and_batching_of_the_same_rows_ends_in_the_same_state(
        (rows, shuffled) in shuffled_rows(),
        batches in proptest::collection::vec(1usize..9, 40),
    ) {
        let (mut one, mut other) = (started(7), started(7));
        for row in rows.clone() {
            one.on_live(vec![row], ms(20), &mut Vec::new());
        }
        let mut left = &shuffled[..];
        for size in batches {
            let (batch, rest) = left.split_at(size.min(left.len()));
            other.on_live(batch.to_vec(), ms(20), &mut Vec::new());
            left = rest;
        }
        other.on_live(left.to_vec(), ms(20), &mut Vec::new());
        proptest::prop_assert_eq!(one.applied(), Some(at(7 + rows.len() as u64)));
        proptest::prop_assert_eq!(one.applied(), other.applied());
        for row in &rows {
            let Scope::Key { hash, .. } = &row.scope else { unreachable!() };
            let floor = |follower: &mut Follower| {
                let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
                follower.floor(hash, &anchors)
            };
            proptest::prop_assert_eq!(floor(&mut one), floor(&mut other));
            proptest::prop_assert!(floor(&mut one) >= row.position);
        }
    }
}

/// Rows right above position 7, and the same ones in another order, some of them twice.
fn shuffled_rows() -> impl proptest::strategy::Strategy<Value = (Vec<Invalidation>, Vec<Invalidation>)> {
    use proptest::prelude::*;
    (1u64..30, 0usize..10).prop_flat_map(|(count, repeated)| {
        let rows: Vec<_> = (8..8 + count).map(|position| deletion(at(position))).collect();
        let doubled: Vec<_> = rows.iter().chain(rows.iter().take(repeated)).cloned().collect();
        (Just(rows), Just(doubled).prop_shuffle())
    })
}
