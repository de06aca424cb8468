//! Loads of a home region in memory, one step at a time.

use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash};
use evictd_core::invalidation::Scope;
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Record, RecordState};
use evictd_core::serving::EntryCache;
use evictd_wire::api::ids::hash;
use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::database::{Database, DatabaseError};
use crate::fixture::{Agent, BASE, at, key, key_scope, lookup};

impl Shared {
    /// Waits until all places are free again.
    async fn all_landed(&self, places: usize) {
        drop(self.permits.acquire_many(u32::try_from(places).unwrap()).await.unwrap());
    }
}

/// Loads for a verification that starts now.
fn load(agent: &Agent, text: &str) -> impl Future<Output = Result<Arc<Entry>, LoadError>> + use<> {
    let (loads, hash, began) = (agent.loads.clone(), hash(text), agent.knowledge.begin());
    async move { loads.load(hash, began).await }
}

fn is_cached(agent: &Agent, text: &str) -> bool {
    agent.cache.get(&hash(text)).is_some()
}

fn state(entry: &Entry) -> Option<RecordState> {
    match &entry.record {
        Record::Key(key) => Some(key.state),
        Record::RootKey(_) | Record::Absent => None,
    }
}

/// An agent whose home region knows "alice", `key_1` of `api_1`.
fn agent(settings: &[(&str, &str)]) -> Agent {
    let agent = Agent::live_with(settings);
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    agent
}

fn delete_alice(agent: &Agent) -> LogPosition {
    agent.home.put(hash("alice"), Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_1") }));
    agent.invalidate(key_scope(hash("alice")))
}

#[tokio::test]
async fn what_was_loaded_is_cached_whether_found_or_not() {
    let agent = agent(&[]);
    assert_eq!(state(&load(&agent, "alice").await.unwrap()), Some(RecordState::Active));
    assert_eq!(load(&agent, "nobody").await.unwrap().record, Record::Absent);
    assert!(is_cached(&agent, "alice") && is_cached(&agent, "nobody"));
    assert_eq!(agent.metric(r#"evictd_agent_loads_total{outcome="ok"}"#), 2);
}

#[tokio::test]
async fn verifications_that_come_together_ask_once() {
    let agent = agent(&[]);
    agent.home.hold();
    let (one, other, ()) = tokio::join!(load(&agent, "alice"), load(&agent, "alice"), async {
        agent.home.is_asked(1).await;
        agent.home.release();
    });
    assert!(Arc::ptr_eq(&one.unwrap(), &other.unwrap()));
    assert_eq!(agent.home.asked(), 1);
}

#[tokio::test]
async fn who_began_after_a_newer_floor_is_not_answered_by_an_older_load() {
    let agent = agent(&[]);
    agent.home.hold();
    let early = tokio::spawn(load(&agent, "alice"));
    agent.home.is_asked(1).await;

    let deleted_at = delete_alice(&agent);
    let mut late = Box::pin(load(&agent, "alice"));
    assert!(late.as_mut().now_or_never().is_none(), "it joins the load that is under way");
    agent.home.release();

    let (early, late) = (early.await.unwrap().unwrap(), late.await.unwrap());
    assert_eq!(state(&early), Some(RecordState::Active), "it began before the deletion was confirmed");
    assert_eq!(state(&late), Some(RecordState::Deleted));
    assert_eq!(late.validity.as_of(), deleted_at);
    assert_eq!(agent.home.asked(), 2);
    assert_eq!(agent.metric("evictd_agent_stale_loads_rejected_total"), 1);
    assert_eq!(state(&agent.cache.get(&hash("alice")).unwrap()), Some(RecordState::Deleted));
}

/// Receipts don't wait for an agent that has no lease yet, so a change may be confirmed everywhere between the
/// sending of a load and the beginning of a verification (R10, R12).
#[tokio::test]
async fn without_a_lease_nobody_joins_a_load_that_was_sent_before_it_began() {
    let agent = Agent::starting(&[]);
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    agent.home.hold();
    let early = tokio::spawn(load(&agent, "alice"));
    agent.home.is_asked(1).await;
    agent.home.put(hash("alice"), Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_1") }));
    let mut late = Box::pin(load(&agent, "alice"));
    assert!(late.as_mut().now_or_never().is_none());
    agent.home.release();
    assert_eq!(state(&early.await.unwrap().unwrap()), Some(RecordState::Active));
    assert_eq!(state(&late.await.unwrap()), Some(RecordState::Deleted));
    assert_eq!(agent.home.asked(), 2);
}

/// Between a landing and the end of its task there is time for a deletion and a verification to begin.
#[tokio::test]
async fn who_joins_a_load_that_has_landed_already_is_held_to_the_floors_of_now() {
    let agent = agent(&[]);
    let alice = hash("alice");
    let (landing, flight) = watch::channel(None);
    agent.loads.shared.flights.lock().insert(alice, flight);
    let loaded = agent.home.lookup(alice).await.unwrap();
    let settled = agent.loads.shared.land(alice, loaded, clock::lease_now());

    delete_alice(&agent);
    let mut late = Box::pin(load(&agent, "alice"));
    assert!(late.as_mut().now_or_never().is_none(), "it joins");
    agent.loads.shared.flights.lock().remove(&alice);
    landing.send_replace(Some(Ok(settled)));
    assert_eq!(state(&late.await.unwrap()), Some(RecordState::Deleted));
}

#[tokio::test]
async fn a_load_that_arrives_below_a_floor_answers_but_is_not_cached() {
    let agent = agent(&[]);
    agent.home.hold();
    let early = tokio::spawn(load(&agent, "alice"));
    agent.home.is_asked(1).await;
    agent.invalidate(Scope::Api(ApiId::new("api_1")));
    agent.home.release();
    assert_eq!(state(&early.await.unwrap().unwrap()), Some(RecordState::Active));
    assert!(!is_cached(&agent, "alice"));
    assert_eq!(agent.home.asked(), 1);
}

#[tokio::test]
async fn a_source_that_lags_is_asked_twice_and_then_not_believed() {
    let agent = agent(&[]);
    let ahead = crate::fixture::row(at(BASE + 1), key_scope(hash("alice")));
    // The agent hears of a position that the source hasn't reached.
    agent.apply(ahead);
    assert_eq!(load(&agent, "alice").await.unwrap_err(), LoadError::Stale);
    assert_eq!(agent.home.asked(), 2);
    assert!(!is_cached(&agent, "alice"));
    agent.home.advance();
    assert!(load(&agent, "alice").await.is_ok());
}

#[tokio::test]
async fn a_read_that_may_be_older_than_the_bound_answers_nobody() {
    let agent = Agent::starting(&[]);
    agent.home.set_fence_age(Duration::from_secs(27));
    assert_eq!(load(&agent, "alice").await.unwrap_err(), LoadError::Stale);
    agent.home.set_fence_age(Duration::from_secs(1));
    assert!(load(&agent, "alice").await.is_ok());
}

#[tokio::test]
async fn before_the_base_position_is_known_loads_answer_but_nothing_is_cached() {
    let agent = Agent::starting(&[]);
    assert_eq!(load(&agent, "nobody").await.unwrap().record, Record::Absent);
    assert!(!is_cached(&agent, "nobody"), "floors that are not known yet can't be met");
    agent.prove(at(BASE));
    load(&agent, "nobody").await.unwrap();
    assert!(is_cached(&agent, "nobody"));
}

#[tokio::test]
async fn loads_over_the_limit_are_shed_at_once_and_others_go_on() {
    let agent = agent(&[("loads.concurrent_max", "1")]);
    agent.home.hold();
    let first = tokio::spawn(load(&agent, "alice"));
    agent.home.is_asked(1).await;
    let shed = load(&agent, "bob").now_or_never().expect("it doesn't wait");
    assert_eq!(shed.unwrap_err(), LoadError::Busy);
    let joiner = load(&agent, "alice");
    let (joined, ()) = tokio::join!(joiner, async { agent.home.release() });
    assert!(joined.is_ok(), "who joins needs no place of its own");
    assert!(first.await.unwrap().is_ok());
    assert_eq!(agent.metric(r#"evictd_agent_loads_total{outcome="shed"}"#), 1);
    assert!(load(&agent, "bob").await.is_ok(), "the place is free again");
}

#[tokio::test]
async fn who_gives_up_takes_nothing_from_the_others() {
    let agent = agent(&[]);
    agent.home.hold();
    let mut first = Box::pin(load(&agent, "alice"));
    assert!(first.as_mut().now_or_never().is_none());
    let mut second = Box::pin(load(&agent, "alice"));
    assert!(second.as_mut().now_or_never().is_none());
    agent.home.is_asked(1).await;
    drop(first);
    agent.home.release();
    assert!(second.await.is_ok());
    assert_eq!(agent.home.asked(), 1);
}

#[tokio::test]
async fn a_load_that_everybody_gave_up_on_still_lands() {
    let agent = agent(&[]);
    agent.home.hold();
    let mut only = Box::pin(load(&agent, "alice"));
    assert!(only.as_mut().now_or_never().is_none());
    agent.home.is_asked(1).await;
    drop(only);
    // Joins the same load, or finds it cached: in either case nothing is asked again.
    agent.home.release();
    let mut entry = agent.cache.get(&hash("alice"));
    if entry.is_none() {
        entry = load(&agent, "alice").await.ok();
    }
    assert_eq!(state(&entry.unwrap()), Some(RecordState::Active));
    assert_eq!(agent.home.asked(), 1);
}

#[tokio::test]
async fn a_failure_is_everybodys_and_the_next_load_asks_again() {
    let agent = agent(&[]);
    for (outcome, error, label) in [
        (LoadOutcome::Busy, LoadError::Busy, "busy"),
        (LoadOutcome::Timeout, LoadError::Unreachable, "timeout"),
        (LoadOutcome::Unsent, LoadError::Unreachable, "unsent"),
    ] {
        let asked = agent.home.asked();
        agent.home.fail(Some((outcome, error)));
        let (one, other) = tokio::join!(load(&agent, "alice"), load(&agent, "alice"));
        assert_eq!((one.unwrap_err(), other.unwrap_err()), (error, error));
        assert_eq!(agent.home.asked(), asked + 1);
        assert_eq!(agent.metric(&format!("evictd_agent_loads_total{{outcome=\"{label}\"}}")), 1);
    }
    agent.home.fail(None);
    assert!(load(&agent, "alice").await.is_ok());
}

/// After a flush everybody comes at once, and then again.
#[tokio::test]
async fn a_flush_storm_never_has_more_loads_under_way_than_allowed() {
    const MAX: usize = 4;
    let agent = agent(&[("loads.concurrent_max", "4")]);
    for round in 1..=3 {
        agent.home.hold();
        let storm: Vec<_> =
            (0..50).map(|n| tokio::spawn(load(&agent, &format!("key {n} of {round}")))).collect();
        let shed = r#"evictd_agent_loads_total{outcome="shed"}"#;
        // Places go by order of arrival; whoever comes later is told at once to come again.
        agent.home.is_asked(MAX * round).await;
        let mut storm = storm.into_iter();
        let first: Vec<_> = storm.by_ref().take(MAX).collect();
        for shed in storm {
            assert_eq!(shed.await.unwrap().unwrap_err(), LoadError::Busy);
        }
        assert_eq!(agent.metric(shed), (50 - MAX as u64) * round as u64);
        assert_eq!(agent.home.asked(), MAX * round, "nobody got in beside them");
        assert_eq!(agent.loads.shared.permits.available_permits(), 0);
        agent.home.release();
        for served in first {
            assert!(served.await.unwrap().is_ok());
        }
        agent.loads.shared.all_landed(MAX).await;
    }
}

#[derive(Debug)]
struct BrokenOrigin;

#[async_trait::async_trait]
impl Origin for BrokenOrigin {
    async fn lookup(&self, _: KeyHash) -> Result<Loaded, (LoadOutcome, LoadError)> {
        panic!("on purpose")
    }
}

#[tokio::test]
async fn a_load_that_breaks_gives_its_place_back() {
    let agent = agent(&[]);
    let config = crate::fixture::config(&[("loads.concurrent_max", "1")]).loads;
    let Agent { knowledge, cache, metrics, .. } = &agent;
    let origin = Arc::new(BrokenOrigin);
    let loads = Loads::new(&config, None, origin, knowledge.clone(), cache.clone(), metrics.clone());
    for _ in 0..3 {
        let broken = loads.load(hash("alice"), agent.knowledge.begin()).await;
        assert_eq!(broken.unwrap_err(), LoadError::Unreachable, "not `Busy`: the place is free");
        loads.shared.all_landed(1).await;
    }
    assert!(loads.shared.flights.lock().is_empty());
}

/// A replica, and what it has replayed so far.
#[derive(Debug)]
struct MemoryReplica {
    lookup: Mutex<Option<Lookup>>,
    /// A record that makes no sense.
    nonsense: Mutex<Option<KeyHash>>,
}

#[async_trait]
impl Database for MemoryReplica {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, DatabaseError> {
        if *self.nonsense.lock() == Some(hash) {
            return Err(DatabaseError::Record("nonsense for the test".into()));
        }
        let down = || DatabaseError::Unusable(Down(std::io::Error::other("down for the test")).into());
        self.lookup.lock().clone().ok_or_else(down)
    }
}

/// What a driver says, which leaves the reason to its cause.
#[derive(Debug, thiserror::Error)]
#[error("the database can't be opened")]
struct Down(#[source] std::io::Error);

impl MemoryReplica {
    fn holds(&self, as_of: LogPosition, record: Record) {
        *self.lookup.lock() = Some(lookup(as_of, record));
    }
}

/// As `agent`, with loads that ask a replica first: it knows alice as of the base.
fn with_replica(agent: &mut Agent) -> Arc<MemoryReplica> {
    with_replica_that_may_fail(agent).0
}

fn with_replica_that_may_fail(agent: &mut Agent) -> (Arc<MemoryReplica>, Replica) {
    let replica = Arc::new(MemoryReplica { lookup: Mutex::default(), nonsense: Mutex::default() });
    replica.holds(at(BASE), Record::Key(key("key_1")));
    let Agent { home, knowledge, cache, metrics, .. } = &agent;
    let remark = agent.readiness.remark("database");
    let asked = Replica::new(replica.clone(), Duration::from_secs(5), metrics.clone(), remark);
    let config = crate::fixture::config(&[]).loads;
    agent.loads = Loads::new(
        &config,
        Some(asked.clone()),
        home.clone(),
        knowledge.clone(),
        cache.clone(),
        metrics.clone(),
    );
    (replica, asked)
}

#[tokio::test]
async fn while_a_lease_runs_the_replica_answers_alone() {
    let mut agent = agent(&[]);
    with_replica(&mut agent);
    let entry = load(&agent, "alice").await.unwrap();
    assert_eq!((state(&entry), agent.home.asked()), (Some(RecordState::Active), 0));
    assert!(is_cached(&agent, "alice"));
    assert_eq!(entry.validity.read_at, LeaseTime::default(), "the lease alone vouches for it");
    assert_eq!(agent.metric(r#"evictd_agent_database_reads_total{outcome="ok"}"#), 1);
}

#[tokio::test]
async fn a_replica_that_lags_never_brings_a_deleted_key_back() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    let deleted_at = delete_alice(&agent);
    let entry = load(&agent, "alice").await.unwrap();
    assert_eq!((state(&entry), agent.home.asked()), (Some(RecordState::Deleted), 1));
    assert_eq!(entry.validity.as_of(), deleted_at);
    assert_eq!(state(&agent.cache.get(&hash("alice")).unwrap()), Some(RecordState::Deleted));
    assert_eq!(agent.metric(r#"evictd_agent_database_reads_total{outcome="too_old"}"#), 1);

    agent.cache.evict(&hash("alice"));
    replica.holds(deleted_at, Record::Absent);
    assert_eq!(load(&agent, "alice").await.unwrap().record, Record::Absent, "it has caught up");
    assert_eq!(agent.home.asked(), 1);
}

#[tokio::test]
async fn without_a_lease_the_replica_is_not_asked() {
    let mut agent = Agent::starting(&[]);
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    let replica = with_replica(&mut agent);
    replica.holds(at(BASE), Record::Absent);
    assert_eq!(state(&load(&agent, "alice").await.unwrap()), Some(RecordState::Active));
    assert_eq!(agent.home.asked(), 1);
}

#[tokio::test]
async fn when_the_database_fails_the_authority_is_asked_and_readiness_remarks_on_it() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    *replica.lookup.lock() = None;
    assert_eq!(state(&load(&agent, "alice").await.unwrap()), Some(RecordState::Active));
    assert_eq!(agent.home.asked(), 1);
    let remarks = agent.readiness.remarks();
    assert!(remarks.iter().any(|remark| remark.detail.contains("down for the test")), "{remarks:?}");
    assert!(agent.readiness.is_ready(), "it is no reason to take the agent out of service");

    assert_eq!(agent.metric(r#"evictd_agent_database_reads_total{outcome="failed"}"#), 1);
}

/// Failure: each load waits for a database that is silent.
#[tokio::test(start_paused = true)]
async fn a_database_that_failed_is_asked_again_now_and_then_and_nobody_waits_for_it() {
    let mut agent = agent(&[]);
    let (replica, asked) = with_replica_that_may_fail(&mut agent);
    *replica.lookup.lock() = None;
    let failed = r#"evictd_agent_database_reads_total{outcome="failed"}"#;
    for key in ["alice", "bob", "carol"] {
        load(&agent, key).await.unwrap();
    }
    assert_eq!((agent.home.asked(), agent.metric(failed)), (3, 1), "one has found it out");
    let shutdown = CancellationToken::new();
    let trying = tokio::spawn(asked.keep_trying(shutdown.clone()));
    until(|| agent.metric(failed) == 3).await;
    load(&agent, "dave").await.unwrap();
    assert_eq!(agent.home.asked(), 4);

    replica.holds(at(BASE), Record::Absent);
    until(|| agent.readiness.remarks().is_empty()).await;
    load(&agent, "erin").await.unwrap();
    assert_eq!(agent.home.asked(), 4, "it is trusted again");

    *replica.lookup.lock() = None;
    load(&agent, "frank").await.unwrap();
    replica.holds(at(BASE), Record::Absent);
    until(|| agent.readiness.remarks().is_empty()).await;
    shutdown.cancel();
    trying.await.unwrap();
}

/// Failure: nonsense in one tenant's record sends all loads of all tenants home.
#[tokio::test]
async fn a_record_that_cannot_be_read_is_asked_of_the_authority_alone() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    *replica.nonsense.lock() = Some(hash("alice"));
    load(&agent, "alice").await.unwrap();
    assert_eq!(agent.home.asked(), 1);
    load(&agent, "nobody").await.unwrap();
    assert_eq!(agent.home.asked(), 1, "the database works");
    assert!(agent.readiness.remarks().is_empty());
}

/// Failure: a database whose password is wrong shows when the first client comes, and that it is mended with the next.
#[tokio::test(start_paused = true)]
async fn a_database_that_fails_from_the_start_is_remarked_on_and_found_mended_without_a_load() {
    let mut agent = agent(&[]);
    let (replica, asked) = with_replica_that_may_fail(&mut agent);
    *replica.lookup.lock() = None;
    let shutdown = CancellationToken::new();
    let trying = tokio::spawn(asked.keep_trying(shutdown.clone()));
    until(|| !agent.readiness.remarks().is_empty()).await;
    replica.holds(at(BASE), Record::Absent);
    until(|| agent.readiness.remarks().is_empty()).await;
    shutdown.cancel();
    trying.await.unwrap();
}

/// Waits for what comes by itself, in paused time as well.
async fn until(is_so: impl Fn() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn what_the_replica_doesnt_have_is_remembered_for_a_while_as_well() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    replica.holds(at(BASE), Record::Absent);
    let before = clock::lease_now();
    let entry = load(&agent, "nobody").await.unwrap();
    let ttl = agent.cache.not_found_ttl();
    assert!(entry.expires_at >= before.after(ttl), "from then on it ages, whoever vouches for it");
    assert!(is_cached(&agent, "nobody"));
}
