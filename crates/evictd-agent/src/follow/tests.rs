//! The follow task without a bus.

mod race;

use evictd_core::ids::ApiId;
use evictd_core::invalidation::Cause;
use evictd_core::record::Record;
use evictd_core::time::StoreTime;
use evictd_ops::readiness::Readiness;
use evictd_wire::api::ids::hash;

use super::*;
use crate::bus;
use crate::fixture::{Agent, BASE, PROVENANCE, at, config, key, key_scope, live, row, voucher};

/// A feed whose server can't be reached: nothing arrives, and nothing is sent.
async fn deaf_feed(agent: &Agent) -> Feed {
    let config = config(&[("nats.urls", "nats://127.0.0.1:1")]);
    let bus = bus::connect(&config, &identity(), &agent.metrics, &Readiness::new()).await.unwrap();
    bus.split().0
}

fn identity() -> Identity {
    let requester = config(&[]).requester();
    Identity { region: requester.region, agent: requester.agent, instance: evictd_core::ids::InstanceId(1) }
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
        policies: agent.policies.clone(),
        lease: agent.readiness.condition("lease", "a proof"),
        feed: agent.readiness.remark("feed"),
        history: agent.readiness.remark("history"),
        recent: Recent::default(),
    };
    Task::new(follow)
}

#[tokio::test]
async fn an_invalidation_is_evicted_and_then_counts_as_applied() {
    let agent = Agent::live();
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    let record = Record::Key(key("key_1"));
    agent.cached(hash("alice"), record, at(BASE), clock::lease_now());

    let rows = [row(at(BASE + 1), key_scope(hash("alice")))];
    task.on_live(&live(&rows));
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
    let head = voucher(at(BASE + 7));
    let (store_time, held, is_proof) = (StoreTime(0), Duration::ZERO, true);
    let unasked = ProbeAnswer { nonce: 99, head, store_time, held, is_proof };
    task.on_probe_answer(&answer(unasked.encode()));
    let request = ReplayRequest { nonce: 99, epoch: 1, from: BASE + 1, to: BASE + 1 };
    let rows = evictd_core::follower::ReplayOutcome::Rows(vec![row(at(BASE + 1), Scope::All)]);
    let unasked = ReplayAnswer { nonce: 99, provenance: PROVENANCE, outcome: rows };
    task.on_replay_answer(&answer(unasked.encode(&request)));

    assert_eq!(task.effects, []);
    assert_eq!(agent.knowledge.follower.lock().head(), at(BASE));
    assert_eq!(task.offset.bounds(clock::lease_now()), None, "a clock was believed that nobody asked for");
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

/// A probe that was answered `ago` by a store whose clock is that of this machine, and knew of [`BASE`].
fn measured(task: &mut Task, ago: Duration) {
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

/// Takes `row` in from the live feed, as far as applying it; returns what is told of it.
async fn take_in(task: &mut Task, feed: &Feed, row: Invalidation) -> Option<ApplyReport> {
    let position = row.position;
    task.on_live(&live(&[row]));
    task.poll_and_perform(feed).await;
    let told = task.announcement(false).unwrap();
    told.apply_reports.into_iter().find(|apply_report| apply_report.position == position)
}

/// An agent that has just answered from a cached "alice", and whose last probe is a minute old.
async fn exposed(settings: &[(&str, &str)]) -> (Agent, Task, Feed) {
    let agent = Agent::live_with(settings);
    let mut task = task(&agent);
    let feed = deaf_feed(&agent).await;
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
async fn what_was_answered_after_the_commit_is_told_with_the_lag() {
    for scope in both_scopes() {
        let (agent, mut task, feed) = exposed(&[]).await;
        let ago = Duration::from_secs(10);
        let told = take_in(&mut task, &feed, change(ago, scope)).await.unwrap();
        assert!((told.lag.low..=told.lag.high + Duration::from_secs(1)).contains(&ago), "{told:?}");
        assert!(told.exposure.last_after + Duration::from_secs(1) > ago, "{told:?}");
        assert!(told.exposure.last_after <= told.lag.high, "{told:?}");
        assert_eq!(agent.metric("evictd_agent_exposure_seconds_count"), 1);
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (0, 0), "within the bound");
    }
}

/// How an entry can be gone before the change arrives that should have ended it.
#[derive(Clone, Copy, Debug)]
enum Gone {
    Replaced,
    FoundNoMore,
    PushedOut,
    Flushed,
    BelowItsApisFloor,
}

/// Failure: after a long cut a load replaces the old entry, and the change finds an entry without a past.
#[tokio::test]
async fn what_left_the_cache_before_its_change_came_is_told() {
    for gone in [Gone::Replaced, Gone::FoundNoMore, Gone::PushedOut, Gone::Flushed, Gone::BelowItsApisFloor] {
        let (agent, mut task, feed) = exposed(&[("cache.size", "64KiB")]).await;
        let put = |text: &str, record: Record| {
            agent.cached(hash(text), record, at(BASE + 1), clock::lease_now());
        };
        match gone {
            Gone::Replaced => put("alice", Record::Key(key("key_1"))),
            Gone::FoundNoMore => put("alice", Record::Absent),
            Gone::PushedOut => {
                // Others are asked for more often.
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
        let told = take_in(&mut task, &feed, change(ago, key_scope(hash("alice")))).await.unwrap();
        assert!(told.exposure.last_after + Duration::from_secs(5) > ago, "{gone:?}: {told:?}");
        // After a flush it may have been any key of that API, unless moka has still to remove it.
        if !matches!(gone, Gone::Flushed) {
            assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (1, 1), "{gone:?}");
        }
    }
}

/// It is cached no longer, or never was: but who waited for it got it.
#[tokio::test]
async fn what_a_load_answered_without_being_cached_is_told() {
    let agent = Agent::live();
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    measured(&mut task, Duration::from_mins(1));
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    agent.home.hold();
    let (verifier, alice) = (agent.verifier.clone(), hash("alice"));
    let early = tokio::spawn(async move { verifier.entry(alice).await });
    agent.home.is_asked(1).await;
    agent.apply(row(at(BASE + 9), Scope::Api(ApiId::new("api_1"))));
    agent.home.release();
    early.await.unwrap().unwrap();
    assert!(agent.cache.get(&alice).is_none());
    let ago = Duration::from_secs(20);
    let told = take_in(&mut task, &feed, change(ago, key_scope(alice))).await.unwrap();
    assert!(told.exposure.last_after + Duration::from_secs(5) > ago, "{told:?}");
}

#[tokio::test]
async fn what_was_never_answered_from_or_loaded_since_is_no_exposure() {
    for scope in both_scopes() {
        let agent = Agent::live();
        let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
        measured(&mut task, Duration::from_mins(1));
        // Loaded after the change: it is in there.
        agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE + 1), clock::lease_now());
        agent.verifier.entry(hash("alice")).await.unwrap();
        agent.cached(hash("bob"), Record::Key(key("key_2")), at(BASE), clock::lease_now());
        let told = take_in(&mut task, &feed, change(Duration::from_secs(40), scope)).await.unwrap();
        assert_eq!(told.exposure, Exposure::default());
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (0, 0));
    }
}

/// The agent's clock says that it was proven just now, and the change is 40 s old: what must not be.
#[tokio::test]
async fn an_answer_from_beyond_the_bound_is_a_breach() {
    for scope in both_scopes() {
        let (agent, mut task, feed) = exposed(&[]).await;
        take_in(&mut task, &feed, change(Duration::from_secs(40), scope)).await.unwrap();
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (1, 1));
    }
}

#[tokio::test]
async fn a_breach_that_policy_allows_violates_nothing() {
    for scope in both_scopes() {
        let (agent, mut task, feed) = exposed(&[("partition.apis.api_1", "serve_stale")]).await;
        take_in(&mut task, &feed, change(Duration::from_secs(40), scope)).await.unwrap();
        assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (1, 0));
    }
}

#[tokio::test]
async fn a_change_applied_late_without_an_answer_is_no_breach() {
    let agent = Agent::live();
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    measured(&mut task, Duration::from_mins(2));
    let told = take_in(&mut task, &feed, change(Duration::from_secs(90), key_scope(hash("alice")))).await;
    assert!(told.unwrap().lag.low > Duration::from_secs(80));
    assert_eq!((agent.metric(BREACHES), agent.metric(G1)), (0, 0));
}

#[tokio::test]
async fn before_the_stores_clock_is_known_nothing_is_said_of_a_lag() {
    let agent = Agent::live();
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    assert_eq!(take_in(&mut task, &feed, change(Duration::ZERO, Scope::All)).await, None);
    assert_eq!(agent.metric(r#"evictd_agent_propagation_lag_seconds_count{scope="all"}"#), 0);
    assert_eq!(agent.metric(r#"evictd_agent_invalidations_total{via="live"}"#), 1);
}

#[tokio::test]
async fn the_last_announcement_says_that_the_agent_leaves() {
    let agent = Agent::live();
    let mut task = task(&agent);
    let told = |task: &mut Task, leaving| task.announcement(leaving).unwrap();
    assert!(!told(&mut task, false).leaving);
    let last = told(&mut task, true);
    assert!(last.leaving);
    assert_eq!(last.applied, at(BASE));
}

#[tokio::test]
async fn a_silent_feed_is_remarked_on_and_keeps_nobody_unready() {
    let agent = Agent::live();
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    task.enter(Mode::Live);
    task.on_beat(&feed).await;
    assert_eq!(agent.readiness.remarks(), []);
    let now = clock::lease_now();
    task.last_heard = now.before(FEED_SILENT_AFTER);
    task.on_beat(&feed).await;
    assert_eq!(agent.metric("evictd_agent_feed_silent"), 1);
    assert_eq!(agent.readiness.remarks(), [], "without a connection that says nothing of the feed");
    task.remark_on_feed(true, now);
    assert_eq!(agent.readiness.remarks(), [], "it has just come about");
    task.connected_at = now.before(FEED_SILENT_AFTER);
    task.remark_on_feed(true, now);
    assert!(agent.readiness.is_ready());
    let remark = agent.readiness.remarks().remove(0);
    assert!(remark.condition == "feed" && remark.detail.contains("no publisher ticks"), "{remark:?}");
    task.on_beat(&feed).await;
    assert_eq!(agent.readiness.remarks(), [], "the connection is lost, too");
    task.remark_on_feed(true, now);
    task.on_live(&Live { voucher: voucher(at(BASE)), event: LiveEvent::Tick(None) }.encode());
    task.on_beat(&feed).await;
    assert_eq!(agent.readiness.remarks(), []);
}

#[tokio::test]
async fn each_mode_shows_in_metrics_and_readiness() {
    let shown = |agent: &Agent| {
        Mode::ALL.map(|mode| agent.metric(&format!("evictd_agent_mode{{mode=\"{}\"}}", mode.label())))
    };
    let waits_for_the_lease = |agent: &Agent| !agent.readiness.is_ready();

    let agent = Agent::starting(&[]);
    let (mut starting, feed) = (task(&agent), deaf_feed(&agent).await);
    starting.on_beat(&feed).await;
    assert_eq!((shown(&agent), waits_for_the_lease(&agent)), ([1, 0, 0], true));
    assert!(agent.readiness.waiting_for()[0].detail.contains("a proof"), "no word of an expiry");

    agent.prove(at(BASE));
    starting.on_beat(&feed).await;
    assert_eq!((shown(&agent), waits_for_the_lease(&agent)), ([0, 1, 0], false));

    agent.knowledge.end();
    starting.on_beat(&feed).await;
    assert_eq!((shown(&agent), waits_for_the_lease(&agent)), ([0, 0, 1], true));
    assert_eq!(agent.metric("evictd_agent_lease_remaining_seconds"), 0);
}

#[tokio::test]
async fn probes_tell_whether_anything_may_be_answered_stale() {
    for (settings, policy) in [
        (&[][..], PartitionPolicy::Deny),
        (&[("partition.apis.api_9", "serve_stale")], PartitionPolicy::ServeStale),
        (&[("partition.policy", "serve_stale")], PartitionPolicy::ServeStale),
    ] {
        assert_eq!(task(&Agent::live_with(settings)).follow.policies.widest(), policy);
    }
}

#[test]
fn progress_that_goes_back_is_a_violation() {
    let agent = Agent::live();
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
fn what_an_eviction_left_behind_is_a_violation() {
    let agent = Agent::live();
    let task = task(&agent);
    let g2 = r#"evictd_invariant_violations_total{id="G2"}"#;
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE + 1), clock::lease_now());
    task.check_evicted(&hash("alice"), at(BASE + 1));
    task.check_evicted(&hash("nobody"), at(BASE + 1));
    assert_eq!(agent.metric(g2), 0);
    task.check_evicted(&hash("alice"), at(BASE + 2));
    assert_eq!(agent.metric(g2), 1);
}

/// A flush sends everybody to the origin at once. The feed must not notice.
#[tokio::test]
async fn invalidations_are_applied_while_as_many_loads_as_may_be_are_under_way() {
    let agent = Agent::live_with(&[("loads.concurrent_max", "8")]);
    let (mut task, feed) = (task(&agent), deaf_feed(&agent).await);
    agent.home.hold();
    for n in 0..100 {
        let verifier = agent.verifier.clone();
        tokio::spawn(async move { drop(verifier.entry(hash(&format!("key {n}"))).await) });
    }
    agent.home.is_asked(8).await;
    take_in(&mut task, &feed, change(Duration::ZERO, Scope::All)).await;
    assert_eq!(agent.knowledge.applied(), at(BASE + 1));
    assert_eq!(agent.home.asked(), 8);
    agent.home.release();
}
