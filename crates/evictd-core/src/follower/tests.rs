//! The follower against hand-made histories: every effect, in order.

use super::*;
use crate::history::{Incarnation, Milestone};
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
        home_store: None,
    };
    Follower::new(config, 100)
}

/// Each epoch has one incarnation.
fn voucher(at: LogPosition) -> Voucher {
    let provenance = Provenance { store: StoreId(1), incarnation: Incarnation(at.epoch().into()) };
    Voucher { milestone: Milestone { provenance, at, token: LogToken(at.position()) }, mac: [0; 16] }
}

fn on_live(follower: &mut Follower, rows: Vec<Invalidation>, now: LeaseTime, out: &mut Vec<Effect>) {
    if let Some(last) = rows.last() {
        follower.on_live(&voucher(last.position), rows, now, out);
    }
}

fn on_tick(follower: &mut Follower, head: LogPosition, now: LeaseTime, out: &mut Vec<Effect>) {
    follower.on_tick(&voucher(head), now, out);
}

fn on_probe_answer(
    follower: &mut Follower,
    nonce: u64,
    head: LogPosition,
    now: LeaseTime,
    out: &mut Vec<Effect>,
) -> Accepted {
    follower.on_probe_answer(nonce, &voucher(head), true, now, out)
}

fn on_replay_answer(
    follower: &mut Follower,
    nonce: u64,
    answer: ReplayOutcome,
    now: LeaseTime,
    out: &mut Vec<Effect>,
) -> Accepted {
    let provenance = voucher(at(0)).milestone.provenance;
    follower.on_replay_answer(nonce, provenance, answer, now, out)
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
    assert_eq!(asked, [Effect::SendProbe { nonce: 100, seen: None, all: false }]);
    let mut out = Vec::new();
    assert_eq!(on_probe_answer(&mut follower, 100, at(head), ms(10), &mut out), Accepted::Yes);
    follower
}

#[test]
fn the_first_answer_gives_the_base_and_the_lease_runs_from_the_question() {
    let mut follower = follower();
    assert_eq!(follower.mode(ms(0)), Mode::Starting);
    follower.poll(ms(0), &mut Vec::new());
    let out = effects(|out| {
        on_probe_answer(&mut follower, 100, at(7), ms(400), out);
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
    assert!(!follower.admits(
        &hash,
        &anchors,
        LoadSource::Authority(voucher(at(1_000)).milestone.provenance),
        at(1_000)
    ));
    let mut follower = started(7);
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    assert!(!follower.admits(
        &hash,
        &anchors,
        LoadSource::Authority(voucher(at(6)).milestone.provenance),
        at(6)
    ));
    assert!(follower.admits(
        &hash,
        &anchors,
        LoadSource::Authority(voucher(at(7)).milestone.provenance),
        at(7)
    ));
}

#[test]
fn an_invalidation_in_order_is_applied_then_progress_then_announced() {
    let mut follower = started(7);
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(20), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(8, 8), Effect::Announce]);
    assert_eq!(follower.wake_at(), ms(5_000), "no hole, only the next probe");
}

#[test]
fn later_invalidations_are_applied_at_once_but_progress_waits_for_the_hole() {
    let mut follower = started(7);
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(9))], ms(20), out));
    assert_eq!(out, [applied(at(9), Via::Live), progress(7, 9)]);
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(25), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(9, 9), Effect::Announce]);
    assert_eq!(effects(|out| follower.poll(ms(1_000), out)), [], "the hole closed by itself");
}

#[test]
fn a_deletion_that_came_too_early_is_announced_when_its_predecessor_arrives() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(9))], ms(20), &mut Vec::new());
    let created = Invalidation { cause: Cause::Created, ..deletion(at(8)) };
    let out = effects(|out| on_live(&mut follower, vec![created.clone()], ms(25), out));
    let applied = Effect::Applied { invalidation: created, via: Via::Live };
    assert_eq!(out, [applied, progress(9, 9), Effect::Announce]);
}

#[test]
fn what_nobody_waits_for_is_not_announced_at_once() {
    let mut follower = started(7);
    let created = Invalidation { cause: Cause::Created, ..deletion(at(8)) };
    let out = effects(|out| on_live(&mut follower, vec![created], ms(20), out));
    assert!(!out.contains(&Effect::Announce), "{out:?}");
}

#[test]
fn a_hole_that_stays_is_repaired_by_a_replay() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(10))], ms(20), &mut Vec::new());
    assert_eq!(follower.wake_at(), ms(20 + PATIENCE_MS));
    assert_eq!(effects(|out| follower.poll(ms(39), out)), []);
    let asked = effects(|out| follower.poll(ms(40), out));
    assert_eq!(
        asked,
        [Effect::SendReplay { nonce: 101, epoch: 1, from: 8, to: 10, cause: RepairCause::Gap, all: false }]
    );
    let rows = ReplayOutcome::Rows(vec![deletion(at(8)), deletion(at(9)), deletion(at(10))]);
    let out =
        effects(|out| assert_eq!(on_replay_answer(&mut follower, 101, rows, ms(50), out), Accepted::Yes));
    assert_eq!(
        out,
        [applied(at(8), Via::Replay), applied(at(9), Via::Replay), progress(10, 10), Effect::Announce],
        "10 was applied when it came live"
    );
}

#[test]
fn the_last_message_lost_is_shown_by_the_tick() {
    let mut follower = started(7);
    assert_eq!(effects(|out| on_tick(&mut follower, at(8), ms(20), out)), [progress(7, 8)]);
    let asked = effects(|out| follower.poll(ms(40), out));
    assert_eq!(
        asked,
        [Effect::SendReplay { nonce: 101, epoch: 1, from: 8, to: 8, cause: RepairCause::Tick, all: false }]
    );
}

#[test]
fn a_replay_that_is_not_answered_is_asked_again_with_a_new_number() {
    let mut follower = started(7);
    on_tick(&mut follower, at(8), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    assert_eq!(effects(|out| follower.poll(ms(40 + TIMEOUT_MS - 1), out)), []);
    let again = effects(|out| follower.poll(ms(40 + TIMEOUT_MS), out));
    assert!(matches!(again[..], [Effect::SendReplay { nonce: 102, .. }]), "{again:?}");
    assert_eq!(follower.wake_at(), ms(40 + 3 * TIMEOUT_MS), "the pause doubles");
}

#[test]
fn a_replay_that_nobody_answers_goes_to_all_every_other_time_however_often() {
    let mut follower = started(7);
    on_tick(&mut follower, at(8), ms(20), &mut Vec::new());
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
    on_tick(&mut follower, at(8), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    follower.poll(ms(40 + TIMEOUT_MS), &mut Vec::new());
    let late = ReplayOutcome::Rows(vec![deletion(at(8))]);
    assert_eq!(on_replay_answer(&mut follower, 101, late.clone(), ms(1_100), &mut Vec::new()), Accepted::Yes);
    assert_eq!(follower.applied(), Some(at(8)));
    assert_eq!(
        on_replay_answer(&mut follower, 102, late, ms(1_200), &mut Vec::new()),
        Accepted::No,
        "used up"
    );
}

#[test]
fn a_hole_that_closes_by_itself_ends_its_repair() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(9))], ms(20), &mut Vec::new());
    let asked = effects(|out| follower.poll(ms(40), out));
    assert!(matches!(asked[..], [Effect::SendReplay { .. }]), "{asked:?}");
    on_live(&mut follower, vec![deletion(at(8))], ms(50), &mut Vec::new());
    assert_eq!(follower.wake_at(), ms(5_000), "only the next probe is due");
    assert_eq!(effects(|out| follower.poll(ms(4_999), out)), []);
}

#[test]
fn an_answer_with_a_row_missing_is_not_taken_for_nothing() {
    let mut follower = started(7);
    on_tick(&mut follower, at(9), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    for rows in [vec![], vec![deletion(at(9))], vec![deletion(at(8)), deletion(at(10))]] {
        let answer = ReplayOutcome::Rows(rows);
        assert_eq!(on_replay_answer(&mut follower, 101, answer, ms(50), &mut Vec::new()), Accepted::No);
    }
    assert_eq!(follower.applied(), Some(at(7)));
    let prefix = ReplayOutcome::Rows(vec![deletion(at(8))]);
    assert_eq!(on_replay_answer(&mut follower, 101, prefix, ms(60), &mut Vec::new()), Accepted::Yes);
    let rest = effects(|out| follower.poll(ms(60), out));
    assert!(matches!(rest[..], [Effect::SendReplay { from: 9, to: 9, .. }]), "{rest:?}");
}

#[test]
fn a_refused_replay_flushes_and_goes_on_from_the_head() {
    let mut follower = started(7);
    on_tick(&mut follower, at(9), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    let out = effects(|out| {
        on_replay_answer(&mut follower, 101, ReplayOutcome::Refused { head: voucher(at(12)) }, ms(50), out);
    });
    assert_eq!(out, [Effect::Flush(FlushReason::Refused), progress(12, 12), Effect::Announce]);
    assert_eq!(follower.floors().horizon().get(), at(12));
}

#[test]
fn a_gap_longer_than_a_replay_is_worth_flushes() {
    let mut follower = started(7);
    let head = 8 + REPAIR_SPAN_MAX;
    on_tick(&mut follower, at(head), ms(20), &mut Vec::new());
    let out = effects(|out| follower.poll(ms(40), out));
    let asked = Effect::SendProbe { nonce: 101, seen: Some(voucher(at(head))), all: false };
    assert_eq!(out, [asked], "the live feed alone isn't worth it");
    on_probe_answer(&mut follower, 101, at(head), ms(50), &mut Vec::new());
    let out = effects(|out| follower.poll(ms(50 + PATIENCE_MS), out));
    assert_eq!(
        out,
        [Effect::Flush(FlushReason::LongGap), progress(head, head), Effect::Proven(ms(40)), Effect::Announce]
    );
}

/// Failure: one tick under a stolen login makes every agent deny until it is restarted.
#[test]
fn agent_finds_back_from_a_lie_about_the_head() {
    let mut follower = started(7);
    on_tick(&mut follower, at(crate::limits::POSITION_MAX), ms(20), &mut Vec::new());
    let mut now = 40;
    let mut presented = Vec::new();
    // No publisher vouches for an agent that presents what was never given out.
    while presented.len() < 3 {
        follower.poll(ms(now), &mut Vec::new());
        if let Some(probe) = follower.probes.back().filter(|probe| probe.sent_at == ms(now)) {
            presented.push(probe.seen.unwrap().milestone.at.position());
        }
        now += 500;
    }
    assert_eq!(presented, [crate::limits::POSITION_MAX, crate::limits::POSITION_MAX, 7]);
    let nonce = follower.probes.back().unwrap().nonce;
    let out = effects(|out| {
        assert_eq!(on_probe_answer(&mut follower, nonce, at(8), ms(now), out), Accepted::Yes);
    });
    assert_eq!(out, [progress(7, 8)], "nothing was flushed");
    assert_eq!((follower.applied(), follower.head()), (Some(at(7)), at(8)));
    assert_eq!(follower.followed_history.voucher(), Some(voucher(at(8))));
}

/// Failure: a tick that claims a little more than there is costs everything cached.
#[test]
fn refusal_of_what_was_never_given_out_costs_nothing() {
    let mut follower = started(7);
    on_tick(&mut follower, at(9), ms(20), &mut Vec::new());
    follower.poll(ms(20 + PATIENCE_MS), &mut Vec::new());
    let out = effects(|out| {
        on_replay_answer(&mut follower, 101, ReplayOutcome::Refused { head: voucher(at(7)) }, ms(50), out);
    });
    assert_eq!(out, [progress(7, 7)]);
}

#[test]
fn a_proof_waits_until_everything_below_its_head_is_applied() {
    let mut follower = started(7);
    let asked = effects(|out| follower.poll(ms(5_000), out));
    assert_eq!(asked, [Effect::SendProbe { nonce: 101, seen: Some(voucher(at(7))), all: false }]);
    let out = effects(|out| {
        on_probe_answer(&mut follower, 101, at(9), ms(5_010), out);
    });
    assert_eq!(out, [progress(7, 9)], "8 and 9 are missing: no proof");
    assert_eq!(follower.proven_at(), Some(ms(0)));
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(8)), deletion(at(9))], ms(5_015), out));
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
    assert_eq!(second, [Effect::SendProbe { nonce: 102, seen: Some(voucher(at(7))), all: true }]);
    let late = effects(|out| {
        on_probe_answer(&mut follower, 101, at(7), ms(6_100), out);
    });
    assert_eq!(late, [Effect::Proven(ms(5_000))]);
    assert_eq!(
        on_probe_answer(&mut follower, 101, at(7), ms(6_200), &mut Vec::new()),
        Accepted::No,
        "used up"
    );
}

#[test]
fn an_unknown_nonce_proves_nothing() {
    let mut follower = started(7);
    let out = effects(|out| assert_eq!(on_probe_answer(&mut follower, 55, at(9), ms(20), out), Accepted::No));
    assert_eq!(out, []);
    assert_eq!(follower.head(), at(7));
}

fn in_epoch(epoch: u32, position: u64) -> LogPosition {
    LogPosition::new(epoch, position).unwrap()
}

fn rival(epoch: u32) -> Effect {
    Effect::Rival(voucher(in_epoch(epoch, 0)).milestone.provenance)
}

/// Failure: one message under a publisher's login sends every agent into an epoch that no publisher answers for.
#[test]
fn epoch_of_the_live_feed_counts_once_an_answer_confirms_it() {
    let mut follower = started(7);
    assert_eq!(effects(|out| on_tick(&mut follower, in_epoch(2, 5), ms(20), out)), [rival(2)]);
    assert_eq!(
        effects(|out| on_live(&mut follower, vec![deletion(in_epoch(2, 6))], ms(30), out)),
        [rival(2)]
    );
    // Its own history falls silent.
    assert_eq!(effects(|out| on_tick(&mut follower, in_epoch(2, 6), ms(3_000), out)), []);
    assert_eq!(follower.applied(), Some(at(7)));
    let asked = effects(|out| follower.poll(ms(3_000), out));
    assert_eq!(asked, [Effect::SendProbe { nonce: 101, seen: Some(voucher(at(7))), all: false }]);
    let out = effects(|out| {
        on_probe_answer(&mut follower, 101, in_epoch(2, 6), ms(3_010), out);
    });
    let moved = Effect::Progress { applied: in_epoch(2, 6), head: in_epoch(2, 6) };
    assert_eq!(
        out,
        [Effect::Flush(FlushReason::NewEpoch), moved, Effect::Proven(ms(3_000)), Effect::Announce]
    );
    // What is left of the old one moves nothing.
    assert_eq!(effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(3_030), out)), [rival(1)]);
}

#[test]
fn answer_of_a_rival_moves_nothing() {
    let mut follower = started(7);
    follower.poll(ms(5_000), &mut Vec::new());
    on_tick(&mut follower, at(7), ms(5_005), &mut Vec::new());
    let out = effects(|out| {
        assert_eq!(on_probe_answer(&mut follower, 101, in_epoch(2, 9), ms(5_010), out), Accepted::No);
    });
    assert_eq!(out, [rival(2)]);
    assert_eq!(follower.proven_at(), Some(ms(0)));
    assert_eq!(on_probe_answer(&mut follower, 101, at(7), ms(5_020), &mut Vec::new()), Accepted::Yes);
    assert_eq!(follower.proven_at(), Some(ms(5_000)), "the probe was still open");
}

/// Failure: changes can go past the log, and agents can't follow the epoch that began, so that they answer nothing.
#[test]
fn answer_that_proves_nothing_names_the_history() {
    let mut follower = started(7);
    follower.poll(ms(5_000), &mut Vec::new());
    let out = effects(|out| {
        assert_eq!(
            follower.on_probe_answer(101, &voucher(in_epoch(2, 7)), false, ms(5_010), out),
            Accepted::Yes
        );
    });
    let moved = Effect::Progress { applied: in_epoch(2, 7), head: in_epoch(2, 7) };
    assert_eq!(out, [Effect::Flush(FlushReason::NewEpoch), moved, Effect::Announce]);
    assert_eq!(follower.proven_at(), Some(ms(0)));
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    let source = LoadSource::Authority(voucher(in_epoch(2, 7)).milestone.provenance);
    assert!(follower.admits(&KeyHash([1; 32]), &anchors, source, in_epoch(2, 7)));
}

/// A store that was opened again has a new incarnation, and the same epoch.
#[test]
fn restarted_store_costs_no_flush() {
    let mut follower = started(7);
    follower.poll(ms(5_000), &mut Vec::new());
    let mut restarted = voucher(at(8));
    restarted.milestone.provenance.incarnation = Incarnation(99);
    let out = effects(|out| {
        assert_eq!(follower.on_probe_answer(101, &restarted, true, ms(5_010), out), Accepted::Yes);
    });
    assert_eq!(out, [progress(7, 8)]);
    assert_eq!(follower.provenance(), Some(restarted.milestone.provenance));
    let out = effects(|out| follower.on_live(&restarted, vec![deletion(at(8))], ms(5_020), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(8, 8), Effect::Proven(ms(5_000)), Effect::Announce]);
}

/// Failure: an older copy answers an agent whose newest rows it lacks.
#[test]
fn answer_that_is_behind_what_was_received_moves_nothing() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(8))], ms(20), &mut Vec::new());
    follower.poll(ms(5_000), &mut Vec::new());
    let mut copy = voucher(at(7));
    copy.milestone.provenance.incarnation = Incarnation(99);
    assert_eq!(follower.on_probe_answer(101, &copy, true, ms(5_010), &mut Vec::new()), Accepted::No);
    assert_eq!(follower.provenance(), Some(voucher(at(8)).milestone.provenance));
}

/// Failure: an older copy knows the past that was proved before a deletion was received; its answer arrives later,
/// when its positions have caught up and the agent's own history is silent.
#[test]
fn answer_about_an_earlier_past_moves_nothing() {
    let mut follower = started(7);
    follower.poll(ms(5_000), &mut Vec::new());
    on_live(&mut follower, vec![deletion(at(8))], ms(5_010), &mut Vec::new());
    let mut copy = voucher(at(9));
    copy.milestone.provenance.incarnation = Incarnation(99);
    assert_eq!(follower.on_probe_answer(101, &copy, true, ms(9_000), &mut Vec::new()), Accepted::No);
    assert_eq!(follower.provenance(), Some(voucher(at(8)).milestone.provenance));
    follower.poll(ms(9_000), &mut Vec::new());
    assert_eq!(follower.on_probe_answer(102, &copy, true, ms(9_010), &mut Vec::new()), Accepted::Yes);
    assert_eq!(
        follower.provenance(),
        Some(copy.milestone.provenance),
        "its publisher was asked about all of it"
    );
}

#[test]
fn replay_of_another_history_moves_nothing() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(9))], ms(20), &mut Vec::new());
    follower.poll(ms(20 + PATIENCE_MS), &mut Vec::new());
    let (foreign, rows) =
        (voucher(in_epoch(2, 0)).milestone.provenance, ReplayOutcome::Rows(vec![deletion(at(8))]));
    let answer = follower.on_replay_answer(101, foreign, rows, ms(50), &mut Vec::new());
    assert_eq!((answer, follower.applied()), (Accepted::No, Some(at(7))));
}

#[test]
fn loads_of_another_history_are_not_admitted() {
    let mut follower = started(7);
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    let foreign = LoadSource::Authority(voucher(in_epoch(2, 0)).milestone.provenance);
    assert!(!follower.admits(&KeyHash([1; 32]), &anchors, foreign, in_epoch(2, 9)));
}

#[test]
fn database_counts_where_it_has_the_log_that_was_received() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(8))], ms(20), &mut Vec::new());
    let accepts = |as_of, token| follower.accepts(LoadSource::Database(LogToken(token)), as_of);
    assert!(accepts(at(8), 8));
    assert!(accepts(at(7), 7), "it lags");
    assert!(!accepts(at(8), 80), "it diverged");
    assert!(!accepts(at(9), 9), "it is ahead of what was applied");
    assert!(!accepts(at(3), 3), "it is older than what is remembered");
}

/// Which history they come from is known only by the first answer; what is missing then is repaired.
#[test]
fn what_came_before_the_base_moves_nothing() {
    let mut follower = follower();
    follower.poll(ms(0), &mut Vec::new());
    assert_eq!(effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(5), out)), []);
    on_probe_answer(&mut follower, 100, at(7), ms(10), &mut Vec::new());
    assert_eq!((follower.applied(), follower.head()), (Some(at(7)), at(7)));
}

#[test]
fn a_duplicate_is_not_news_but_still_raises_its_floor() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(8))], ms(20), &mut Vec::new());
    assert_eq!(effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(30), out)), []);
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
    ReplayOutcome { age: u64, rows: u64 },
    Connected,
}

fn any_input() -> impl proptest::strategy::Strategy<Value = Input> {
    use proptest::prelude::*;
    prop_oneof![
        4 => (1u64..40).prop_map(Input::Live),
        2 => (1u64..40).prop_map(Input::Tick),
        3 => (0u64..4, 1u64..40).prop_map(|(age, head)| Input::ProbeAnswer { age, head }),
        3 => (0u64..4, 1u64..12).prop_map(|(age, rows)| Input::ReplayOutcome { age, rows }),
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
                Input::Live(position) => on_live(&mut follower, vec![deletion(at(position))], ms(now), &mut out),
                Input::Tick(head) => on_tick(&mut follower, at(head), ms(now), &mut out),
                Input::ProbeAnswer { age, head } => {
                    on_probe_answer(&mut follower, last_probe - age.min(last_probe), at(head), ms(now), &mut out);
                }
                Input::ReplayOutcome { age, rows } => {
                    let (nonce, from) = last_replay;
                    let rows = (from..from + rows).filter(|p| *p > 0).map(|p| deletion(at(p))).collect();
                    on_replay_answer(&mut follower, nonce - age.min(nonce), ReplayOutcome::Rows(rows), ms(now), &mut out);
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
            on_live(&mut one, vec![row], ms(20), &mut Vec::new());
        }
        let mut left = &shuffled[..];
        for size in batches {
            let (batch, rest) = left.split_at(size.min(left.len()));
            on_live(&mut other, batch.to_vec(), ms(20), &mut Vec::new());
            left = rest;
        }
        on_live(&mut other, left.to_vec(), ms(20), &mut Vec::new());
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
