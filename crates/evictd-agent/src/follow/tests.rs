//! The follow task without a bus, and the arithmetic of the clock offset.

mod race;

use evictd_core::follower::Via;
use evictd_core::invalidation::Scope;
use evictd_ops::readiness::Readiness;
use evictd_wire::api::ids::hash;

use super::*;
use crate::bus;
use crate::fixture::{Agent, BASE, at, config, key, key_scope, row};

/// A feed whose server can't be reached: nothing arrives, and nothing is sent.
async fn deaf_feed(agent: &Agent) -> Feed {
    let config = config(&[("nats.urls", "nats://127.0.0.1:1")]);
    let bus = bus::connect(&config, &identity(), &agent.metrics, &Readiness::new()).await.unwrap();
    bus.split().0
}

fn identity() -> Identity {
    let speaker = config(&[]).speaker();
    Identity { region: speaker.region, agent: speaker.agent, instance: evictd_core::ids::InstanceId(1) }
}

/// An answer as it arrives.
fn answer(payload: Bytes) -> Message {
    Message {
        subject: "inbox".into(),
        reply: None,
        length: payload.len(),
        payload,
        headers: None,
        status: None,
        description: None,
    }
}

/// The follow task of `agent`.
fn task(agent: &Agent) -> Task {
    let follow = Follow {
        identity: identity(),
        bound: agent.knowledge.bound,
        knowledge: agent.knowledge.clone(),
        cache: agent.cache.clone(),
        metrics: agent.metrics.clone(),
        lease: Readiness::new().condition("lease", "a proof"),
        recent: Recent::default(),
    };
    Task {
        follow,
        effects: Vec::new(),
        offset: Offset::default(),
        last_heard: LeaseTime(0),
        mode: Mode::Starting,
    }
}

#[tokio::test]
async fn an_invalidation_is_evicted_and_then_counts_as_applied() {
    let agent = Agent::live();
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    let record = evictd_core::record::Record::Key(key("key_1"));
    agent.cached(hash("alice"), record, at(BASE), clock::lease_now());

    let rows = [row(at(BASE + 1), key_scope(hash("alice")))];
    task.on_live(&live::encode_invalidations(&rows).next().unwrap());
    task.poll_and_perform(&feed).await;
    assert!(agent.cache.get(&hash("alice")).is_none());
    assert_eq!(agent.knowledge.applied(), at(BASE + 1));
    assert_eq!(agent.metric("evictd_agent_applied_position"), BASE + 1);
    assert_eq!(agent.metric(r#"evictd_agent_invalidations_total{via="live"}"#), 1);
}

#[tokio::test]
async fn what_is_malformed_or_unasked_is_counted_and_changes_nothing() {
    let agent = Agent::live();
    let mut task = task(&agent);
    let garbage = Bytes::from_static(b"\xff\xff\xff");
    task.on_live(&garbage);
    task.on_probe_answer(&answer(garbage.clone()));
    task.on_replay_answer(&answer(garbage));
    let head = at(BASE + 7);
    let unasked = ProbeAnswer { nonce: 99, head, store_time: StoreTime(0), held: Duration::ZERO };
    task.on_probe_answer(&answer(unasked.encode()));
    let request = ReplayRequest { nonce: 99, epoch: 1, from: BASE + 1, to: BASE + 1 };
    let rows = evictd_core::follower::ReplayAnswer::Rows(vec![row(at(BASE + 1), Scope::All)]);
    let unasked = ReplayAnswer { nonce: 99, outcome: rows };
    task.on_replay_answer(&answer(unasked.encode(&request)));

    assert_eq!(task.effects, []);
    assert_eq!(agent.knowledge.follower.lock().head(), at(BASE));
    assert_eq!(task.offset.error, Offset::default().error, "a clock was believed that nobody asked for");
    for (subject, reason) in [
        ("live", "malformed"),
        ("probe", "malformed"),
        ("replay", "malformed"),
        ("probe", "unasked"),
        ("replay", "unasked"),
    ] {
        let series =
            format!("evictd_agent_ignored_messages_total{{subject=\"{subject}\",reason=\"{reason}\"}}");
        assert_eq!(agent.metric(&series), 1, "{series}");
    }
}

#[test]
fn times_out_of_this_world_do_not_stop_the_follower() {
    let agent = Agent::live();
    let task = task(&agent);
    for micros in [i64::MIN, i64::MAX] {
        let mut row = row(at(BASE + 1), Scope::All);
        row.committed_at = StoreTime(micros);
        task.applied(&row, Via::Live);
        let mut offset = Offset::default();
        offset.measured(StoreTime(micros), StoreTime(0), Duration::ZERO);
        offset.measured(StoreTime(micros), StoreTime(-micros.saturating_add(1)), Duration::ZERO);
        offset.high_micros();
        offset.age_of(StoreTime(-micros.saturating_add(1)), StoreTime(micros));
    }
}

const SECOND: i64 = 1_000_000;

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[test]
fn an_offset_that_was_never_measured_may_be_an_hour_off() {
    let offset = Offset::default();
    assert_eq!(offset.error, Duration::from_hours(1));
    assert_eq!(offset.age_of(StoreTime(2 * SECOND), StoreTime(5 * SECOND)), Duration::from_secs(3));
}

#[test]
fn a_clock_that_was_read_half_way_is_known_exactly() {
    let mut offset = Offset::default();
    // The store is 5 s ahead; its clock was read 10 ms before the answer came.
    let received_at = StoreTime(100 * SECOND);
    let store_time = StoreTime(105 * SECOND - 10_000);
    offset.measured(store_time, received_at, millis(20));
    assert_eq!((offset.micros, offset.error), (5 * SECOND, millis(10)));
    assert_eq!(offset.high_micros(), 5 * SECOND + 10_000);
    assert_eq!(offset.age_of(StoreTime(104 * SECOND), received_at), Duration::from_secs(1));
}

#[test]
fn the_true_offset_lies_within_the_error_however_lopsided_the_way() {
    for true_offset in [-3600 * SECOND, -1, 0, 7, 5 * SECOND] {
        for back_ms in 0..=40 {
            let mut offset = Offset::default();
            let received_at = StoreTime(1_000 * SECOND);
            let store_time = StoreTime(received_at.0 + true_offset - back_ms * 1000);
            offset.measured(store_time, received_at, millis(40));
            let off_by = (offset.micros - true_offset).unsigned_abs();
            assert!(Duration::from_micros(off_by) <= offset.error, "{true_offset} {back_ms}");
            assert!(offset.high_micros() >= true_offset);
        }
    }
}

#[test]
fn a_worse_measurement_does_not_replace_a_better_one_until_that_has_grown_old() {
    let mut offset = Offset::default();
    let now = StoreTime(SECOND);
    offset.measured(StoreTime(2 * SECOND), now, Duration::ZERO);
    assert_eq!((offset.micros, offset.error), (SECOND, Duration::ZERO));
    let worse = |offset: &mut Offset| offset.measured(StoreTime(2 * SECOND - 4_000), now, millis(10));
    for age in 1..10 {
        worse(&mut offset);
        assert_eq!((offset.micros, offset.error), (SECOND, Offset::DRIFT * age));
    }
    worse(&mut offset);
    assert_eq!((offset.micros, offset.error), (SECOND + 1_000, millis(5)));
}

#[test]
fn a_clock_that_was_set_is_believed_at_once() {
    let mut offset = Offset::default();
    let now = StoreTime(SECOND);
    offset.measured(StoreTime(2 * SECOND), now, Duration::ZERO);
    offset.measured(StoreTime(9 * SECOND), now, millis(10));
    assert_eq!((offset.micros, offset.error), (8 * SECOND + 5_000, millis(5)));
}

#[test]
fn nothing_is_younger_than_new() {
    assert_eq!(Offset::default().age_of(StoreTime(9 * SECOND), StoreTime(SECOND)), Duration::ZERO);
}
