//! Loads from a home region in memory, one step at a time.

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
use crate::fixture::{BASE, TestAgent, at, key, key_scope, lookup};

impl Loads {
    /// Waits until all permits are free again.
    async fn all_completed(&self, permits: u32) {
        drop(self.0.permits.acquire_many(permits).await.unwrap());
    }
}

/// Loads for a verification that starts now.
fn load(agent: &TestAgent, text: &str) -> impl Future<Output = Result<Arc<CachedRecord>, LoadError>> + use<> {
    let (loads, hash, began) = (agent.loads.clone(), hash(text), agent.serving.begin());
    async move { loads.load(hash, began).await }
}

fn is_cached(agent: &TestAgent, text: &str) -> bool {
    agent.cache.get(&hash(text)).is_some()
}

fn state(entry: &CachedRecord) -> Option<RecordState> {
    match &entry.record {
        Record::Key(key) => Some(key.state),
        Record::RootKey(_) | Record::Absent => None,
    }
}

/// An agent whose home region has "alice", `key_1` of `api_1`.
fn agent(settings: &[(&str, &str)]) -> TestAgent {
    let agent = TestAgent::live_with(settings);
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    agent
}

fn delete_alice(agent: &TestAgent) -> LogPosition {
    agent.home.put(hash("alice"), Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_1") }));
    agent.invalidate(key_scope(hash("alice")))
}

#[tokio::test]
async fn loads_are_cached_whether_found_or_not() {
    let agent = agent(&[]);
    assert_eq!(state(&load(&agent, "alice").await.unwrap()), Some(RecordState::Active));
    assert_eq!(load(&agent, "absent").await.unwrap().record, Record::Absent);
    assert!(is_cached(&agent, "alice") && is_cached(&agent, "absent"));
    assert_eq!(agent.metric(r#"evictd_agent_loads_total{outcome="ok"}"#), 2);
}

#[tokio::test]
async fn concurrent_verifications_share_one_load() {
    let agent = agent(&[]);
    agent.home.hold();
    let (one, other, ()) = tokio::join!(load(&agent, "alice"), load(&agent, "alice"), async {
        agent.home.wait_for_lookup(1).await;
        agent.home.release();
    });
    assert!(Arc::ptr_eq(&one.unwrap(), &other.unwrap()));
    assert_eq!(agent.home.lookups(), 1);
}

#[tokio::test]
async fn a_load_below_a_floor_answers_no_later_verification() {
    let agent = agent(&[]);
    agent.home.hold();
    let early = tokio::spawn(load(&agent, "alice"));
    agent.home.wait_for_lookup(1).await;

    let deleted_at = delete_alice(&agent);
    let mut late = Box::pin(load(&agent, "alice"));
    assert!(late.as_mut().now_or_never().is_none(), "it shares the load under way");
    agent.home.release();

    let (early, late) = (early.await.unwrap().unwrap(), late.await.unwrap());
    assert_eq!(state(&early), Some(RecordState::Active), "it began before the deletion was confirmed");
    assert_eq!(state(&late), Some(RecordState::Deleted));
    assert_eq!(late.validity.as_of(), deleted_at);
    assert_eq!(agent.home.lookups(), 2);
    assert_eq!(agent.metric("evictd_agent_stale_loads_rejected_total"), 1);
    assert_eq!(state(&agent.cache.get(&hash("alice")).unwrap()), Some(RecordState::Deleted));
}

/// Receipts don't wait for an agent without a lease, so a change may be confirmed everywhere between the sending of a
/// load and the beginning of a verification (R10, R12).
#[tokio::test]
async fn without_a_lease_no_earlier_load_is_shared() {
    let agent = TestAgent::starting(&[]);
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    agent.home.hold();
    let early = tokio::spawn(load(&agent, "alice"));
    agent.home.wait_for_lookup(1).await;
    agent.home.put(hash("alice"), Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_1") }));
    let mut late = Box::pin(load(&agent, "alice"));
    assert!(late.as_mut().now_or_never().is_none());
    agent.home.release();
    assert_eq!(state(&early.await.unwrap().unwrap()), Some(RecordState::Active));
    assert_eq!(state(&late.await.unwrap()), Some(RecordState::Deleted));
    assert_eq!(agent.home.lookups(), 2);
}

/// Between the insertion of a load and the end of its task, a deletion may be applied and a verification begin.
#[tokio::test]
async fn sharing_a_completed_load_checks_the_present_floors() {
    let agent = agent(&[]);
    let alice = hash("alice");
    let (sender, load_under_way) = watch::channel(None);
    agent.loads.0.in_flight.lock().insert(alice, load_under_way);
    let loaded = agent.home.lookup(alice).await.unwrap();
    let settled = agent.loads.0.insert_checked(alice, loaded, clock::lease_now());

    delete_alice(&agent);
    let mut late = Box::pin(load(&agent, "alice"));
    assert!(late.as_mut().now_or_never().is_none(), "it shares the load");
    agent.loads.0.in_flight.lock().remove(&alice);
    sender.send_replace(Some(Ok(settled)));
    assert_eq!(state(&late.await.unwrap()), Some(RecordState::Deleted));
}

#[tokio::test]
async fn a_load_below_a_floor_answers_its_waiter_but_is_not_cached() {
    let agent = agent(&[]);
    agent.home.hold();
    let early = tokio::spawn(load(&agent, "alice"));
    agent.home.wait_for_lookup(1).await;
    agent.invalidate(Scope::Api(ApiId::new("api_1")));
    agent.home.release();
    assert_eq!(state(&early.await.unwrap().unwrap()), Some(RecordState::Active));
    assert!(!is_cached(&agent, "alice"));
    assert_eq!(agent.home.lookups(), 1);
}

#[tokio::test]
async fn a_lagging_origin_is_queried_twice_and_then_rejected() {
    let agent = agent(&[]);
    let ahead = crate::fixture::row(at(BASE + 1), key_scope(hash("alice")));
    // The agent receives a position that the origin hasn't reached.
    agent.apply(ahead);
    assert_eq!(load(&agent, "alice").await.unwrap_err(), LoadError::Stale);
    assert_eq!(agent.home.lookups(), 2);
    assert!(!is_cached(&agent, "alice"));
    agent.home.advance();
    assert!(load(&agent, "alice").await.is_ok());
}

#[tokio::test]
async fn a_read_that_may_be_older_than_the_bound_is_rejected() {
    let agent = TestAgent::starting(&[]);
    agent.home.set_fence_age(Duration::from_secs(27));
    assert_eq!(load(&agent, "alice").await.unwrap_err(), LoadError::Stale);
    agent.home.set_fence_age(Duration::from_secs(1));
    assert!(load(&agent, "alice").await.is_ok());
}

#[tokio::test]
async fn before_the_base_position_loads_are_not_cached() {
    let agent = TestAgent::starting(&[]);
    assert_eq!(load(&agent, "absent").await.unwrap().record, Record::Absent);
    assert!(!is_cached(&agent, "absent"), "its floors are unknown");
    agent.prove(at(BASE));
    load(&agent, "absent").await.unwrap();
    assert!(is_cached(&agent, "absent"));
}

#[tokio::test]
async fn loads_over_the_limit_are_shed_at_once() {
    let agent = agent(&[("loads.concurrent_max", "1")]);
    agent.home.hold();
    let first = tokio::spawn(load(&agent, "alice"));
    agent.home.wait_for_lookup(1).await;
    let shed = load(&agent, "bob").now_or_never().expect("it doesn't wait");
    assert_eq!(shed.unwrap_err(), LoadError::Busy);
    let (shared, ()) = tokio::join!(load(&agent, "alice"), async { agent.home.release() });
    assert!(shared.is_ok(), "a shared load needs no further permit");
    assert!(first.await.unwrap().is_ok());
    assert_eq!(agent.metric(r#"evictd_agent_loads_total{outcome="shed"}"#), 1);
    assert!(load(&agent, "bob").await.is_ok(), "the permit is free again");
}

#[tokio::test]
async fn a_waiter_that_gives_up_doesnt_end_the_load() {
    let agent = agent(&[]);
    agent.home.hold();
    let mut first = Box::pin(load(&agent, "alice"));
    assert!(first.as_mut().now_or_never().is_none());
    let mut second = Box::pin(load(&agent, "alice"));
    assert!(second.as_mut().now_or_never().is_none());
    agent.home.wait_for_lookup(1).await;
    drop(first);
    agent.home.release();
    assert!(second.await.is_ok());
    assert_eq!(agent.home.lookups(), 1);
}

#[tokio::test]
async fn a_load_without_waiters_still_completes() {
    let agent = agent(&[]);
    agent.home.hold();
    let mut only = Box::pin(load(&agent, "alice"));
    assert!(only.as_mut().now_or_never().is_none());
    agent.home.wait_for_lookup(1).await;
    drop(only);
    // Shares the same load, or finds it cached: neither sends another query.
    agent.home.release();
    let mut entry = agent.cache.get(&hash("alice"));
    if entry.is_none() {
        entry = load(&agent, "alice").await.ok();
    }
    assert_eq!(state(&entry.unwrap()), Some(RecordState::Active));
    assert_eq!(agent.home.lookups(), 1);
}

#[tokio::test]
async fn all_waiters_share_a_failure_and_the_next_load_retries() {
    let agent = agent(&[]);
    for (outcome, error, label) in [
        (LoadOutcome::Busy, LoadError::Busy, "busy"),
        (LoadOutcome::Timeout, LoadError::Unreachable, "timeout"),
        (LoadOutcome::Unsent, LoadError::Unreachable, "unsent"),
    ] {
        let lookups = agent.home.lookups();
        agent.home.fail(Some((outcome, error)));
        let (one, other) = tokio::join!(load(&agent, "alice"), load(&agent, "alice"));
        assert_eq!((one.unwrap_err(), other.unwrap_err()), (error, error));
        assert_eq!(agent.home.lookups(), lookups + 1);
        assert_eq!(agent.metric(&format!("evictd_agent_loads_total{{outcome=\"{label}\"}}")), 1);
    }
    agent.home.fail(None);
    assert!(load(&agent, "alice").await.is_ok());
}

/// After a flush all keys are loaded at once, several times.
#[tokio::test]
async fn a_flush_storm_never_exceeds_the_limit_of_loads() {
    const MAX: usize = 4;
    let agent = agent(&[("loads.concurrent_max", "4")]);
    for round in 1..=3 {
        agent.home.hold();
        let storm: Vec<_> =
            (0..50).map(|n| tokio::spawn(load(&agent, &format!("key {n} of {round}")))).collect();
        let shed = r#"evictd_agent_loads_total{outcome="shed"}"#;
        // Permits go by order of arrival. Later loads fail at once.
        agent.home.wait_for_lookup(MAX * round).await;
        let mut storm = storm.into_iter();
        let first: Vec<_> = storm.by_ref().take(MAX).collect();
        for shed in storm {
            assert_eq!(shed.await.unwrap().unwrap_err(), LoadError::Busy);
        }
        assert_eq!(agent.metric(shed), (50 - MAX as u64) * round as u64);
        assert_eq!(agent.home.lookups(), MAX * round, "no other load was sent");
        assert_eq!(agent.loads.0.permits.available_permits(), 0);
        agent.home.release();
        for served in first {
            assert!(served.await.unwrap().is_ok());
        }
        agent.loads.all_completed(MAX as u32).await;
    }
}

#[derive(Debug)]
struct BrokenOrigin;

#[async_trait::async_trait]
impl Origin for BrokenOrigin {
    async fn lookup(&self, _: KeyHash) -> Result<LoadedRecord, (LoadOutcome, LoadError)> {
        panic!("on purpose")
    }
}

#[tokio::test]
async fn a_load_that_panics_returns_its_permit() {
    let agent = agent(&[("loads.concurrent_max", "1")]);
    let loads = agent.parts.loads(None, Arc::new(BrokenOrigin));
    for _ in 0..3 {
        let broken = loads.load(hash("alice"), agent.serving.begin()).await;
        assert_eq!(broken.unwrap_err(), LoadError::Unreachable, "not `Busy`: the permit is free");
        loads.all_completed(1).await;
    }
    assert!(loads.0.in_flight.lock().is_empty());
}

/// A replica with one record, as of the position that it has replayed.
#[derive(Debug)]
struct MemoryReplica {
    lookup: Mutex<Option<Lookup>>,
    /// The hash of an invalid record.
    invalid: Mutex<Option<KeyHash>>,
}

#[async_trait]
impl Database for MemoryReplica {
    async fn lookup(&self, hash: KeyHash) -> Result<Lookup, DatabaseError> {
        if *self.invalid.lock() == Some(hash) {
            return Err(DatabaseError::Record("invalid for the test".into()));
        }
        let down = || DatabaseError::Unusable(Down(std::io::Error::other("down for the test")).into());
        self.lookup.lock().clone().ok_or_else(down)
    }
}

/// The error of a driver, whose cause has the reason.
#[derive(Debug, thiserror::Error)]
#[error("the database can't be opened")]
struct Down(#[source] std::io::Error);

impl MemoryReplica {
    fn holds(&self, as_of: LogPosition, record: Record) {
        *self.lookup.lock() = Some(lookup(as_of, record));
    }
}

/// Adds a replica to `agent`, with "alice" as of the base position.
fn with_replica(agent: &mut TestAgent) -> Arc<MemoryReplica> {
    with_replica_that_may_fail(agent).0
}

fn with_replica_that_may_fail(agent: &mut TestAgent) -> (Arc<MemoryReplica>, DatabaseReader) {
    let replica = Arc::new(MemoryReplica { lookup: Mutex::default(), invalid: Mutex::default() });
    replica.holds(at(BASE), Record::Key(key("key_1")));
    let reader = agent.parts.reader(replica.clone());
    agent.loads = agent.parts.loads(Some(reader.clone()), agent.home.clone());
    (replica, reader)
}

#[tokio::test]
async fn during_a_lease_the_replica_answers_alone() {
    let mut agent = agent(&[]);
    with_replica(&mut agent);
    let entry = load(&agent, "alice").await.unwrap();
    assert_eq!((state(&entry), agent.home.lookups()), (Some(RecordState::Active), 0));
    assert!(is_cached(&agent, "alice"));
    assert_eq!(entry.validity.read_at, LeaseTime::default(), "only the lease proves it");
    assert_eq!(agent.metric(r#"evictd_agent_database_reads_total{outcome="ok"}"#), 1);
}

#[tokio::test]
async fn a_replica_that_lags_never_brings_a_deleted_key_back() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    let deleted_at = delete_alice(&agent);
    let entry = load(&agent, "alice").await.unwrap();
    assert_eq!((state(&entry), agent.home.lookups()), (Some(RecordState::Deleted), 1));
    assert_eq!(entry.validity.as_of(), deleted_at);
    assert_eq!(state(&agent.cache.get(&hash("alice")).unwrap()), Some(RecordState::Deleted));
    assert_eq!(agent.metric(r#"evictd_agent_database_reads_total{outcome="too_old"}"#), 1);

    agent.cache.evict(&hash("alice"));
    replica.holds(deleted_at, Record::Absent);
    assert_eq!(load(&agent, "alice").await.unwrap().record, Record::Absent, "it has caught up");
    assert_eq!(agent.home.lookups(), 1);
}

#[tokio::test]
async fn without_a_lease_the_replica_is_not_queried() {
    let mut agent = TestAgent::starting(&[]);
    agent.home.put(hash("alice"), Record::Key(key("key_1")));
    let replica = with_replica(&mut agent);
    replica.holds(at(BASE), Record::Absent);
    assert_eq!(state(&load(&agent, "alice").await.unwrap()), Some(RecordState::Active));
    assert_eq!(agent.home.lookups(), 1);
}

#[tokio::test]
async fn a_failed_database_is_replaced_by_the_authority_and_reported() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    *replica.lookup.lock() = None;
    assert_eq!(state(&load(&agent, "alice").await.unwrap()), Some(RecordState::Active));
    assert_eq!(agent.home.lookups(), 1);
    let warnings = agent.readiness.warnings();
    assert!(warnings.iter().any(|warning| warning.detail.contains("down for the test")), "{warnings:?}");
    assert!(agent.readiness.is_ready(), "the agent stays in service");

    assert_eq!(agent.metric(r#"evictd_agent_database_reads_total{outcome="failed"}"#), 1);
}

/// Failure: each load waits for a silent database.
#[tokio::test(start_paused = true)]
async fn a_failed_database_is_retried_without_delaying_loads() {
    let mut agent = agent(&[]);
    let (replica, reader) = with_replica_that_may_fail(&mut agent);
    *replica.lookup.lock() = None;
    let failed = r#"evictd_agent_database_reads_total{outcome="failed"}"#;
    for key in ["alice", "bob", "carol"] {
        load(&agent, key).await.unwrap();
    }
    assert_eq!((agent.home.lookups(), agent.metric(failed)), (3, 1), "only the first load queried it");
    let shutdown = CancellationToken::new();
    let trying = tokio::spawn(reader.retry_failures(shutdown.clone()));
    until(|| agent.metric(failed) == 3).await;
    load(&agent, "dave").await.unwrap();
    assert_eq!(agent.home.lookups(), 4);

    replica.holds(at(BASE), Record::Absent);
    until(|| agent.readiness.warnings().is_empty()).await;
    load(&agent, "erin").await.unwrap();
    assert_eq!(agent.home.lookups(), 4, "the database is used again");

    *replica.lookup.lock() = None;
    load(&agent, "frank").await.unwrap();
    replica.holds(at(BASE), Record::Absent);
    until(|| agent.readiness.warnings().is_empty()).await;
    shutdown.cancel();
    trying.await.unwrap();
}

/// Failure: one tenant's invalid record sends all loads of all tenants to the authority.
#[tokio::test]
async fn only_an_invalid_record_is_loaded_from_the_authority() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    *replica.invalid.lock() = Some(hash("alice"));
    load(&agent, "alice").await.unwrap();
    assert_eq!(agent.home.lookups(), 1);
    load(&agent, "absent").await.unwrap();
    assert_eq!(agent.home.lookups(), 1, "the database works");
    assert!(agent.readiness.warnings().is_empty());
}

/// Failure: a wrong password shows only with the first load, and its correction only with the next one.
#[tokio::test(start_paused = true)]
async fn a_failure_at_the_start_is_reported_and_cleared_without_loads() {
    let mut agent = agent(&[]);
    let (replica, reader) = with_replica_that_may_fail(&mut agent);
    *replica.lookup.lock() = None;
    let shutdown = CancellationToken::new();
    let trying = tokio::spawn(reader.retry_failures(shutdown.clone()));
    until(|| !agent.readiness.warnings().is_empty()).await;
    replica.holds(at(BASE), Record::Absent);
    until(|| agent.readiness.warnings().is_empty()).await;
    shutdown.cancel();
    trying.await.unwrap();
}

/// Waits until `is_so`, in paused time as well.
async fn until(is_so: impl Fn() -> bool) {
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn not_found_at_the_replica_is_cached_until_its_ttl() {
    let mut agent = agent(&[]);
    let replica = with_replica(&mut agent);
    replica.holds(at(BASE), Record::Absent);
    let before = clock::lease_now();
    let entry = load(&agent, "absent").await.unwrap();
    let ttl = agent.cache.not_found_ttl();
    assert!(entry.expires_at >= before.after(ttl), "it expires in spite of the lease");
    assert!(is_cached(&agent, "absent"));
}
