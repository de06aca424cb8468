//! The follow task, without a bus.

mod race;

use evictd_core::ids::ApiId;
use evictd_core::invalidation::Cause;
use evictd_core::record::Record;
use evictd_core::time::StoreTime;
use evictd_ops::readiness::Readiness;
use evictd_wire::api::ids::hash;

use super::*;
use crate::bus;
use crate::fixture::{BASE, PROVENANCE, TestAgent, at, config, key, key_scope, live, row, voucher};

/// A feed without a server: nothing arrives, and nothing is sent.
async fn disconnected_feed(agent: &TestAgent) -> Feed {
    let config = config(&[("nats.urls", "nats://127.0.0.1:1")]);
    bus::connect(&config, &agent.identity, &agent.metrics, &Readiness::new()).await.unwrap().feed
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

fn task(agent: &TestAgent) -> FollowTask {
    FollowTask::new(agent.follow_context(agent.lease_condition()))
}

#[tokio::test]
async fn an_invalidation_evicts_before_it_counts_as_applied() {
    let agent = TestAgent::live();
    let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
    let record = Record::Key(key("key_1"));
    agent.cached(hash("alice"), record, at(BASE), clock::lease_now());

    let rows = [row(at(BASE + 1), key_scope(hash("alice")))];
    task.on_live(&live(&rows));
    task.poll_and_perform(&feed).await;
    assert!(agent.cache.get(&hash("alice")).is_none());
    assert_eq!(agent.serving.applied(), at(BASE + 1));
    assert_eq!(agent.metric("evictd_agent_applied_position"), BASE + 1);
    assert_eq!(agent.metric(r#"evictd_agent_invalidations_total{via="live"}"#), 1);
}

#[tokio::test]
async fn malformed_and_unrequested_messages_are_only_counted() {
    let agent = TestAgent::live();
    let mut task = task(&agent);
    let garbage = Bytes::from_static(b"\xff\xff\xff");
    task.on_live(&garbage);
    task.on_probe_answer(&answer(garbage.clone()));
    task.on_replay_answer(&answer(garbage));
    let head = voucher(at(BASE + 7));
    let (store_time, held, is_proof) = (StoreTime(0), Duration::ZERO, true);
    let unasked = ProbeAnswer { nonce: 99, head, store_time, held, is_proof };
    task.on_probe_answer(&answer(unasked.encode()));
    let request = ReplayRequest { nonce: 99, epoch: 1, from: BASE + 1, to: BASE + 1 };
    let rows = evictd_core::follower::ReplayOutcome::Rows(vec![row(at(BASE + 1), Scope::All)]);
    let unasked = ReplayAnswer { nonce: 99, provenance: PROVENANCE, outcome: rows };
    task.on_replay_answer(&answer(unasked.encode(&request)));

    assert_eq!(task.effects, []);
    assert_eq!(agent.serving.follower.lock().head(), at(BASE));
    assert_eq!(task.offset.bounds(clock::lease_now()), None, "a clock from an unrequested answer was used");
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

/// Measures a probe that was answered `ago` with the head [`BASE`], by a store with this machine's clock.
fn measured(task: &mut FollowTask, ago: Duration) {
    let at_that_time = clock::lease_now().before(ago);
    let store_time = wall_clock(ago);
    let (sent_at, received_at, held, head) = (at_that_time, at_that_time, Duration::ZERO, at(BASE));
    task.offset.measured(Measurement { sent_at, received_at, held, store_time, head });
}

fn wall_clock(ago: Duration) -> StoreTime {
    StoreTime(clock::wall_now().0 - i64::try_from(ago.as_micros()).unwrap())
}

/// The first change, committed `ago`.
fn change(ago: Duration, scope: Scope) -> Invalidation {
    Invalidation { position: at(BASE + 1), scope, cause: Cause::Deleted, committed_at: wall_clock(ago) }
}

/// Receives `row` from the live feed and applies it. Returns its announced measurement.
async fn receive(task: &mut FollowTask, feed: &Feed, row: Invalidation) -> Option<ApplyReport> {
    let position = row.position;
    task.on_live(&live(&[row]));
    task.poll_and_perform(feed).await;
    let reported = task.announcement(false).unwrap();
    reported.apply_reports.into_iter().find(|apply_report| apply_report.position == position)
}

/// An agent that has just answered from a cached "alice". Its last probe is a minute old.
async fn exposed(settings: &[(&str, &str)]) -> (TestAgent, FollowTask, Feed) {
    let agent = TestAgent::live_with(settings);
    let mut task = task(&agent);
    let feed = disconnected_feed(&agent).await;
    measured(&mut task, Duration::from_mins(1));
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    agent.verifier.entry(hash("alice")).await.unwrap();
    (agent, task, feed)
}

const BREACHES: &str = "evictd_agent_bound_breaches_total";
const G1: &str = r#"evictd_invariant_violations_total{id="G1"}"#;

fn both_scopes() -> [Scope; 2] {
    [key_scope(hash("alice")), Scope::Api(ApiId::new("api_1"))]
}

#[tokio::test]
async fn answers_after_the_commit_are_reported_with_the_lag() {
    for scope in both_scopes() {
        let (agent, mut task, feed) = exposed(&[]).await;
        let ago = Duration::from_secs(10);
        let reported = receive(&mut task, &feed, change(ago, scope)).await.unwrap();
        assert!(
            (reported.lag.low..=reported.lag.high + Duration::from_secs(1)).contains(&ago),
            "{reported:?}"
        );
        assert!(reported.exposure.last_after + Duration::from_secs(1) > ago, "{reported:?}");
        assert!(reported.exposure.last_after <= reported.lag.high, "{reported:?}");
        assert_eq!(agent.metric("evictd_agent_exposure_seconds_count"), 1);
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (0, 0), "within the bound");
    }
}

/// The ways in which an entry can leave the cache before the change that would have evicted it.
#[derive(Clone, Copy, Debug)]
enum Gone {
    Replaced,
    FoundNoMore,
    PushedOut,
    Flushed,
    BelowItsApisFloor,
}

/// Failure: after a long partition a load replaces the old entry, and the change finds an entry without answers.
#[tokio::test]
async fn answers_from_removed_entries_are_reported() {
    for gone in [Gone::Replaced, Gone::FoundNoMore, Gone::PushedOut, Gone::Flushed, Gone::BelowItsApisFloor] {
        let (agent, mut task, feed) = exposed(&[("cache.size", "64KiB")]).await;
        let put = |text: &str, record: Record| {
            agent.cached(hash(text), record, at(BASE + 1), clock::lease_now());
        };
        match gone {
            Gone::Replaced => put("alice", Record::Key(key("key_1"))),
            Gone::FoundNoMore => put("alice", Record::Absent),
            Gone::PushedOut => {
                // Other keys are used more often.
                for n in 0..500 {
                    let other = format!("other {n}");
                    (0..9).for_each(|_| drop(agent.cache.get(&hash(&other))));
                    put(&other, Record::Key(key("key_2")));
                    agent.cache.run_pending_tasks();
                }
                assert!(agent.cache.get(&hash("alice")).is_none());
            }
            Gone::Flushed => agent.cache.clear(),
            Gone::BelowItsApisFloor => {
                agent.apply(row(at(BASE + 9), Scope::Api(ApiId::new("api_1"))));
                put("alice", Record::Key(key("key_1")));
            }
        }
        let ago = Duration::from_secs(40);
        let reported = receive(&mut task, &feed, change(ago, key_scope(hash("alice")))).await.unwrap();
        assert!(reported.exposure.last_after + Duration::from_secs(5) > ago, "{gone:?}: {reported:?}");
        // After a flush it may have been any key of that API, unless moka hasn't removed it yet.
        if !matches!(gone, Gone::Flushed) {
            assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (1, 1), "{gone:?}");
        }
    }
}

/// Failure: a load answers its waiter without being cached, and the answer isn't measured.
#[tokio::test]
async fn answers_from_uncached_loads_are_reported() {
    let agent = TestAgent::live();
    let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
    measured(&mut task, Duration::from_mins(1));
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    agent.home.hold();
    let (verifier, alice) = (agent.verifier.clone(), hash("alice"));
    let early = tokio::spawn(async move { verifier.entry(alice).await });
    agent.home.wait_for_lookup(1).await;
    agent.apply(row(at(BASE + 9), Scope::Api(ApiId::new("api_1"))));
    agent.home.release();
    early.await.unwrap().unwrap();
    assert!(agent.cache.get(&alice).is_none());
    let ago = Duration::from_secs(20);
    let reported = receive(&mut task, &feed, change(ago, key_scope(alice))).await.unwrap();
    assert!(reported.exposure.last_after + Duration::from_secs(5) > ago, "{reported:?}");
}

#[tokio::test]
async fn unused_or_reloaded_entries_are_no_exposure() {
    for scope in both_scopes() {
        let agent = TestAgent::live();
        let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
        measured(&mut task, Duration::from_mins(1));
        // LoadedRecord after the change: it is in there.
        agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE + 1), clock::lease_now());
        agent.verifier.entry(hash("alice")).await.unwrap();
        agent.cached(hash("bob"), Record::Key(key("key_2")), at(BASE), clock::lease_now());
        let reported = receive(&mut task, &feed, change(Duration::from_secs(40), scope)).await.unwrap();
        assert_eq!(reported.exposure, Exposure::default());
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (0, 0));
    }
}

/// The last proof is new although the change is 40 s old, which the protocol excludes.
#[tokio::test]
async fn an_answer_beyond_the_bound_is_a_breach() {
    for scope in both_scopes() {
        let (agent, mut task, feed) = exposed(&[]).await;
        receive(&mut task, &feed, change(Duration::from_secs(40), scope)).await.unwrap();
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (1, 1));
    }
}

#[tokio::test]
async fn a_breach_that_policy_permits_is_no_violation() {
    for scope in both_scopes() {
        let (agent, mut task, feed) = exposed(&[("partition.apis.api_1", "serve_stale")]).await;
        receive(&mut task, &feed, change(Duration::from_secs(40), scope)).await.unwrap();
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (1, 0));
    }
}

#[tokio::test]
async fn a_late_change_without_an_answer_is_no_breach() {
    let agent = TestAgent::live();
    let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
    measured(&mut task, Duration::from_mins(2));
    let reported = receive(&mut task, &feed, change(Duration::from_secs(90), key_scope(hash("alice")))).await;
    assert!(reported.unwrap().lag.low > Duration::from_secs(80));
    assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (0, 0));
}

#[tokio::test]
async fn no_lag_is_reported_before_the_first_clock_measurement() {
    let agent = TestAgent::live();
    let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
    assert_eq!(receive(&mut task, &feed, change(Duration::ZERO, Scope::All)).await, None);
    assert_eq!(agent.metric(r#"evictd_agent_propagation_lag_seconds_count{scope="all"}"#), 0);
    assert_eq!(agent.metric(r#"evictd_agent_invalidations_total{via="live"}"#), 1);
}

#[tokio::test]
async fn the_last_announcement_is_marked_as_leaving() {
    let agent = TestAgent::live();
    let mut task = task(&agent);
    let reported = |task: &mut FollowTask, leaving| task.announcement(leaving).unwrap();
    assert!(!reported(&mut task, false).leaving);
    let last = reported(&mut task, true);
    assert!(last.leaving);
    assert_eq!(last.applied, at(BASE));
}

#[tokio::test]
async fn a_silent_feed_is_a_warning_and_doesnt_affect_readiness() {
    let agent = TestAgent::live();
    let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
    task.enter(Mode::Live);
    task.on_beat(&feed).await;
    assert_eq!(agent.readiness.warnings(), []);
    let now = clock::lease_now();
    task.last_live_at = now.before(FEED_SILENT_AFTER);
    task.on_beat(&feed).await;
    assert_eq!(agent.metric("evictd_agent_feed_silent"), 1);
    assert_eq!(agent.readiness.warnings(), [], "only the connection's condition reports that");
    task.update_feed_condition(true, now);
    assert_eq!(agent.readiness.warnings(), [], "the connection is new");
    task.connected_at = now.before(FEED_SILENT_AFTER);
    task.update_feed_condition(true, now);
    assert!(agent.readiness.is_ready());
    let warning = agent.readiness.warnings().remove(0);
    assert!(warning.condition == "feed" && warning.detail.contains("no publisher ticks"), "{warning:?}");
    task.on_beat(&feed).await;
    assert_eq!(agent.readiness.warnings(), [], "the connection is lost, too");
    task.update_feed_condition(true, now);
    task.on_live(&Live { voucher: voucher(at(BASE)), event: LiveEvent::Tick(None) }.encode());
    task.on_beat(&feed).await;
    assert_eq!(agent.readiness.warnings(), []);
}

#[tokio::test]
async fn each_mode_shows_in_metrics_and_readiness() {
    let shown = |agent: &TestAgent| {
        Mode::ALL.map(|mode| agent.metric(&format!("evictd_agent_mode{{mode=\"{}\"}}", mode.label())))
    };
    let waits_for_the_lease = |agent: &TestAgent| !agent.readiness.is_ready();

    let agent = TestAgent::starting(&[]);
    let (mut starting, feed) = (task(&agent), disconnected_feed(&agent).await);
    starting.on_beat(&feed).await;
    assert_eq!((shown(&agent), waits_for_the_lease(&agent)), ([1, 0, 0], true));
    assert!(agent.readiness.waiting_for()[0].detail.contains("the first proof"), "no expiry yet");

    agent.prove(at(BASE));
    starting.on_beat(&feed).await;
    assert_eq!((shown(&agent), waits_for_the_lease(&agent)), ([0, 1, 0], false));

    agent.serving.end();
    starting.on_beat(&feed).await;
    assert_eq!((shown(&agent), waits_for_the_lease(&agent)), ([0, 0, 1], true));
    assert_eq!(agent.metric("evictd_agent_lease_remaining_seconds"), 0);
}

#[tokio::test]
async fn probes_report_whether_any_record_may_be_stale() {
    for (settings, policy) in [
        (&[][..], PartitionPolicy::Deny),
        (&[("partition.apis.api_9", "serve_stale")], PartitionPolicy::ServeStale),
        (&[("partition.policy", "serve_stale")], PartitionPolicy::ServeStale),
    ] {
        assert_eq!(task(&TestAgent::live_with(settings)).context.policies.widest(), policy);
    }
}

#[test]
fn progress_that_goes_back_is_a_violation() {
    let agent = TestAgent::live();
    let invariants = &agent.metrics.invariants;
    let violations = |id| agent.metric(&format!("evictd_invariant_violations_total{{id=\"{id}\"}}"));
    let at_epoch = |epoch, position| LogPosition::new(epoch, position).unwrap();
    check_progress(invariants, at_epoch(1, 5), at_epoch(1, 5));
    check_progress(invariants, at_epoch(1, 5), at_epoch(2, 1));
    assert_eq!((violations("R5"), violations("R2")), (0, 0));
    check_progress(invariants, at_epoch(1, 5), at_epoch(1, 4));
    check_progress(invariants, at_epoch(2, 1), at_epoch(1, 9));
    assert_eq!((violations("R5"), violations("R2")), (1, 1));
}

#[test]
fn an_older_entry_after_an_eviction_is_a_violation() {
    let agent = TestAgent::live();
    let task = task(&agent);
    let g2 = r#"evictd_invariant_violations_total{id="G2"}"#;
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE + 1), clock::lease_now());
    task.check_evicted(&hash("alice"), at(BASE + 1));
    task.check_evicted(&hash("absent"), at(BASE + 1));
    assert_eq!(agent.metric(g2), 0);
    task.check_evicted(&hash("alice"), at(BASE + 2));
    assert_eq!(agent.metric(g2), 1);
}

/// A flush causes many loads at once. They must not delay the feed.
#[tokio::test]
async fn invalidations_are_applied_at_the_limit_of_loads() {
    let agent = TestAgent::live_with(&[("loads.concurrent_max", "8")]);
    let (mut task, feed) = (task(&agent), disconnected_feed(&agent).await);
    agent.home.hold();
    for n in 0..100 {
        let verifier = agent.verifier.clone();
        tokio::spawn(async move { drop(verifier.entry(hash(&format!("key {n}"))).await) });
    }
    agent.home.wait_for_lookup(8).await;
    receive(&mut task, &feed, change(Duration::ZERO, Scope::All)).await;
    assert_eq!(agent.serving.applied(), at(BASE + 1));
    assert_eq!(agent.home.lookups(), 8);
    agent.home.release();
}
