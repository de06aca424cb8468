//! The follower against given histories: all effects, in order.

use super::*;
use crate::history::{Incarnation, Milestone};
use crate::ids::ApiId;
use crate::invalidation::{Cause, Scope};
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
    let sent = effects(|out| follower.poll(ms(0), out));
    assert_eq!(sent, [Effect::SendProbe { nonce: 100, seen: None, all: false }]);
    let mut out = Vec::new();
    assert_eq!(on_probe_answer(&mut follower, 100, at(head), ms(10), &mut out), Accepted::Yes);
    follower
}

#[test]
fn lease_runs_from_when_the_first_probe_was_sent() {
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
fn invalidation_is_applied_then_published_then_announced() {
    let mut follower = started(7);
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(20), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(8, 8), Effect::Announce]);
    assert_eq!(follower.wake_at(), ms(5_000), "no hole, only the next probe");
}

#[test]
fn applied_waits_for_the_hole() {
    let mut follower = started(7);
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(9))], ms(20), out));
    assert_eq!(out, [applied(at(9), Via::Live), progress(7, 9)]);
    let out = effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(25), out));
    assert_eq!(out, [applied(at(8), Via::Live), progress(9, 9), Effect::Announce]);
    assert_eq!(effects(|out| follower.poll(ms(1_000), out)), [], "the hole closed by itself");
}

#[test]
fn early_deletion_is_announced_once_contiguous() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(9))], ms(20), &mut Vec::new());
    let created = Invalidation { cause: Cause::Created, ..deletion(at(8)) };
    let out = effects(|out| on_live(&mut follower, vec![created.clone()], ms(25), out));
    let applied = Effect::Applied { invalidation: created, via: Via::Live };
    assert_eq!(out, [applied, progress(9, 9), Effect::Announce]);
}

#[test]
fn creation_is_not_announced_at_once() {
    let mut follower = started(7);
    let created = Invalidation { cause: Cause::Created, ..deletion(at(8)) };
    let out = effects(|out| on_live(&mut follower, vec![created], ms(20), out));
    assert!(!out.contains(&Effect::Announce), "{out:?}");
}

#[test]
fn hole_is_repaired_by_a_replay() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(10))], ms(20), &mut Vec::new());
    assert_eq!(follower.wake_at(), ms(20 + PATIENCE_MS));
    assert_eq!(effects(|out| follower.poll(ms(39), out)), []);
    let sent = effects(|out| follower.poll(ms(40), out));
    assert_eq!(
        sent,
        [Effect::SendReplay { nonce: 101, epoch: 1, from: 8, to: 10, cause: RepairCause::Gap, all: false }]
    );
    let rows = ReplayOutcome::Rows(vec![deletion(at(8)), deletion(at(9)), deletion(at(10))]);
    let out =
        effects(|out| assert_eq!(on_replay_answer(&mut follower, 101, rows, ms(50), out), Accepted::Yes));
    assert_eq!(
        out,
        [applied(at(8), Via::Replay), applied(at(9), Via::Replay), progress(10, 10), Effect::Announce],
        "10 was applied when the live feed brought it"
    );
}

#[test]
fn tick_shows_that_the_last_message_was_lost() {
    let mut follower = started(7);
    assert_eq!(effects(|out| on_tick(&mut follower, at(8), ms(20), out)), [progress(7, 8)]);
    let sent = effects(|out| follower.poll(ms(40), out));
    assert_eq!(
        sent,
        [Effect::SendReplay { nonce: 101, epoch: 1, from: 8, to: 8, cause: RepairCause::Tick, all: false }]
    );
}

#[test]
fn unanswered_replay_is_sent_again_with_a_new_number() {
    let mut follower = started(7);
    on_tick(&mut follower, at(8), ms(20), &mut Vec::new());
    follower.poll(ms(40), &mut Vec::new());
    assert_eq!(effects(|out| follower.poll(ms(40 + TIMEOUT_MS - 1), out)), []);
    let again = effects(|out| follower.poll(ms(40 + TIMEOUT_MS), out));
    assert!(matches!(again[..], [Effect::SendReplay { nonce: 102, .. }]), "{again:?}");
    assert_eq!(follower.wake_at(), ms(40 + 3 * TIMEOUT_MS), "the pause doubles");
}

#[test]
fn every_other_unanswered_replay_goes_to_all() {
    let mut follower = started(7);
    on_tick(&mut follower, at(8), ms(20), &mut Vec::new());
    let mut sent = Vec::new();
    while sent.len() < 8 {
        let now = follower.wake_at();
        let effects = effects(|out| follower.poll(now, out));
        sent.extend(effects.iter().filter_map(|effect| match effect {
            Effect::SendReplay { all, .. } => Some(*all),
            _ => None,
        }));
    }
    assert_eq!(sent, [false, true, false, true, false, true, false, true]);
}

#[test]
fn late_answer_repairs_a_path_slower_than_the_timeout() {
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
fn hole_that_closes_by_itself_ends_its_repair() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(9))], ms(20), &mut Vec::new());
    let sent = effects(|out| follower.poll(ms(40), out));
    assert!(matches!(sent[..], [Effect::SendReplay { .. }]), "{sent:?}");
    on_live(&mut follower, vec![deletion(at(8))], ms(50), &mut Vec::new());
    assert_eq!(follower.wake_at(), ms(5_000), "only the next probe is due");
    assert_eq!(effects(|out| follower.poll(ms(4_999), out)), []);
}

#[test]
fn replay_with_a_missing_row_is_rejected() {
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
fn refused_replay_flushes_and_goes_on_from_the_head() {
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
fn very_long_gap_flushes() {
    let mut follower = started(7);
    let head = 8 + REPAIR_SPAN_MAX;
    on_tick(&mut follower, at(head), ms(20), &mut Vec::new());
    let out = effects(|out| follower.poll(ms(40), out));
    let sent = Effect::SendProbe { nonce: 101, seen: Some(voucher(at(head))), all: false };
    assert_eq!(out, [sent], "the live feed alone doesn't cause a flush");
    on_probe_answer(&mut follower, 101, at(head), ms(50), &mut Vec::new());
    let out = effects(|out| follower.poll(ms(50 + PATIENCE_MS), out));
    assert_eq!(
        out,
        [Effect::Flush(FlushReason::LongGap), progress(head, head), Effect::Proven(ms(40)), Effect::Announce]
    );
}

/// Failure: one tick sent with stolen credentials makes every agent deny until it is restarted.
#[test]
fn agent_recovers_from_a_forged_head() {
    let mut follower = started(7);
    on_tick(&mut follower, at(crate::limits::POSITION_MAX), ms(20), &mut Vec::new());
    let mut now = 40;
    let mut presented = Vec::new();
    // No publisher vouches for an agent that presents a position that doesn't exist.
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

/// Failure: a tick that claims a few positions too many makes agents flush.
#[test]
fn refusal_of_a_forged_head_flushes_nothing() {
    let mut follower = started(7);
    on_tick(&mut follower, at(9), ms(20), &mut Vec::new());
    follower.poll(ms(20 + PATIENCE_MS), &mut Vec::new());
    let out = effects(|out| {
        on_replay_answer(&mut follower, 101, ReplayOutcome::Refused { head: voucher(at(7)) }, ms(50), out);
    });
    assert_eq!(out, [progress(7, 7)]);
}

#[test]
fn proof_waits_until_its_head_is_applied() {
    let mut follower = started(7);
    let sent = effects(|out| follower.poll(ms(5_000), out));
    assert_eq!(sent, [Effect::SendProbe { nonce: 101, seen: Some(voucher(at(7))), all: false }]);
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
fn late_answer_proves_the_time_of_its_own_probe() {
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
fn answer_with_an_unknown_nonce_is_rejected() {
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

/// Failure: one message sent with a publisher's credentials moves every agent to an epoch that no
/// publisher answers for.
#[test]
fn epoch_of_the_live_feed_counts_once_confirmed() {
    let mut follower = started(7);
    assert_eq!(effects(|out| on_tick(&mut follower, in_epoch(2, 5), ms(20), out)), [rival(2)]);
    assert_eq!(
        effects(|out| on_live(&mut follower, vec![deletion(in_epoch(2, 6))], ms(30), out)),
        [rival(2)]
    );
    // The own history falls silent.
    assert_eq!(effects(|out| on_tick(&mut follower, in_epoch(2, 6), ms(3_000), out)), []);
    assert_eq!(follower.applied(), Some(at(7)));
    let sent = effects(|out| follower.poll(ms(3_000), out));
    assert_eq!(sent, [Effect::SendProbe { nonce: 101, seen: Some(voucher(at(7))), all: false }]);
    let out = effects(|out| {
        on_probe_answer(&mut follower, 101, in_epoch(2, 6), ms(3_010), out);
    });
    let moved = Effect::Progress { applied: in_epoch(2, 6), head: in_epoch(2, 6) };
    assert_eq!(
        out,
        [Effect::Flush(FlushReason::NewEpoch), moved, Effect::Proven(ms(3_000)), Effect::Announce]
    );
    // Late messages of the old one are ignored.
    assert_eq!(effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(3_030), out)), [rival(1)]);
}

#[test]
fn answer_of_a_rival_is_ignored() {
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

/// Failure: changes can bypass the log, and agents can't follow the new epoch, so they answer
/// nothing.
#[test]
fn answer_without_proof_still_names_the_history() {
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

/// A reopened store has a new incarnation, and the same epoch.
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

/// Failure: an older copy answers an agent that has rows which it lacks.
#[test]
fn answer_behind_the_received_head_is_ignored() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(8))], ms(20), &mut Vec::new());
    follower.poll(ms(5_000), &mut Vec::new());
    let mut copy = voucher(at(7));
    copy.milestone.provenance.incarnation = Incarnation(99);
    assert_eq!(follower.on_probe_answer(101, &copy, true, ms(5_010), &mut Vec::new()), Accepted::No);
    assert_eq!(follower.provenance(), Some(voucher(at(8)).milestone.provenance));
}

/// Failure: an older copy has the past that a probe proved before a deletion was received. Its
/// answer arrives later, when its positions have caught up and the agent's own history is silent.
#[test]
fn answer_to_a_probe_of_an_older_past_is_ignored() {
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
        "this probe presented all that was received"
    );
}

#[test]
fn replay_of_another_history_is_ignored() {
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
fn database_counts_if_it_has_the_received_log() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(8))], ms(20), &mut Vec::new());
    let accepts = |as_of, token| follower.accepts(LoadSource::Database(LogToken(token)), as_of);
    assert!(accepts(at(8), 8));
    assert!(accepts(at(7), 7), "it lags");
    assert!(!accepts(at(8), 80), "it diverged");
    assert!(!accepts(at(9), 9), "it is ahead of `applied`");
    assert!(!accepts(at(3), 3), "its token is no longer kept");
}

/// Their history is known only after the first answer. What is missing then is repaired.
#[test]
fn messages_before_the_base_are_ignored() {
    let mut follower = follower();
    follower.poll(ms(0), &mut Vec::new());
    assert_eq!(effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(5), out)), []);
    on_probe_answer(&mut follower, 100, at(7), ms(10), &mut Vec::new());
    assert_eq!((follower.applied(), follower.head()), (Some(at(7)), at(7)));
}

#[test]
fn duplicate_still_raises_its_floor() {
    let mut follower = started(7);
    on_live(&mut follower, vec![deletion(at(8))], ms(20), &mut Vec::new());
    assert_eq!(effects(|out| on_live(&mut follower, vec![deletion(at(8))], ms(30), out)), []);
    let anchors = follower.anchors(&Record::Absent, &mut Vec::new());
    assert_eq!(follower.floor(&KeyHash([8; 32]), &anchors), at(8));
}

#[test]
fn reconnect_makes_a_probe_due_at_once() {
    let mut follower = started(7);
    follower.connected(ms(700));
    let sent = effects(|out| follower.poll(ms(700), out));
    assert!(matches!(sent[..], [Effect::SendProbe { all: false, .. }]), "{sent:?}");
}

/// An input at a position near the base.
#[derive(Clone, Debug)]
enum FollowerInput {
    Live(u64),
    Tick(u64),
    ProbeAnswer { age: u64, head: u64 },
    ReplayAnswer { age: u64, rows: u64 },
    Connected,
}

fn any_input() -> impl proptest::strategy::Strategy<Value = FollowerInput> {
    use proptest::prelude::*;
    prop_oneof![
        4 => (1u64..40).prop_map(FollowerInput::Live),
        2 => (1u64..40).prop_map(FollowerInput::Tick),
        3 => (0u64..4, 1u64..40).prop_map(|(age, head)| FollowerInput::ProbeAnswer { age, head }),
        3 => (0u64..4, 1u64..12).prop_map(|(age, rows)| FollowerInput::ReplayAnswer { age, rows }),
        1 => Just(FollowerInput::Connected),
    ]
}

proptest::proptest! {
    /// An agent that sleeps until `wake_at` must never spin.
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
                FollowerInput::Live(position) => on_live(&mut follower, vec![deletion(at(position))], ms(now), &mut out),
                FollowerInput::Tick(head) => on_tick(&mut follower, at(head), ms(now), &mut out),
                FollowerInput::ProbeAnswer { age, head } => {
                    on_probe_answer(&mut follower, last_probe - age.min(last_probe), at(head), ms(now), &mut out);
                }
                FollowerInput::ReplayAnswer { age, rows } => {
                    let (nonce, from) = last_replay;
                    let rows = (from..from + rows).filter(|p| *p > 0).map(|p| deletion(at(p))).collect();
                    on_replay_answer(&mut follower, nonce - age.min(nonce), ReplayOutcome::Rows(rows), ms(now), &mut out);
                }
                FollowerInput::Connected => follower.connected(ms(now)),
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

    /// R5, R6: floors are a join-semilattice, and `applied` doesn't depend on the order either.
    #[test]
    fn any_order_of_the_same_rows_gives_the_same_state(
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
