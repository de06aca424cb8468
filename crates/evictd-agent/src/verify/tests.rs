//! The hot path: which cached records are served.

use std::time::Duration;

use evictd_core::ids::{ApiId, WorkspaceId};
use evictd_core::invalidation::Scope;
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState, RootKeyRecord, Verdict};
use evictd_ops::clock;
use evictd_wire::api::ids::hash;
use evictd_wire::api::root_key::authorize;

use super::*;
use crate::fixture::{BASE, TestAgent, at, ends_in, key, key_scope, root_key, row};
use crate::metrics::LoadOutcome;

/// The default bound less its margin.
const TRUST: Duration = Duration::from_secs(27);

/// The entry that a verification finds now.
fn cached(agent: &TestAgent, text: &str) -> Option<Arc<CachedRecord>> {
    agent.verifier.cached(&hash(text), agent.serving.begin())
}

/// An agent with `key_1` of `api_1` cached under "alice", read just now.
fn with_alice() -> TestAgent {
    let agent = TestAgent::live();
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    agent
}

#[test]
fn a_cached_record_is_served() {
    let agent = with_alice();
    assert!(cached(&agent, "alice").is_some());
    assert!(cached(&agent, "bob").is_none());
}

#[test]
fn a_hidden_entry_is_not_served() {
    let agent = TestAgent::live();
    let record = Record::Key(key("key_1"));
    let loaded = agent.loaded(hash("alice"), record, at(BASE), clock::lease_now());
    let inserted = loaded.insert(&*agent.cache);
    assert!(cached(&agent, "alice").is_none());
    inserted.settle(&agent.serving, &*agent.cache);
    assert!(cached(&agent, "alice").is_some());
}

#[test]
fn no_entry_is_served_below_the_floor_of_its_key() {
    let agent = with_alice();
    agent.invalidate(key_scope(hash("bob")));
    assert!(cached(&agent, "alice").is_some(), "bob's deletion doesn't affect alice");
    agent.invalidate(key_scope(hash("alice")));
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn no_entry_is_served_below_the_floor_of_its_api() {
    let agent = with_alice();
    agent.invalidate(Scope::Api(ApiId::new("api_2")));
    assert!(cached(&agent, "alice").is_some());
    agent.invalidate(Scope::Api(ApiId::new("api_1")));
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn no_entry_is_served_below_the_floor_of_its_workspace() {
    let agent = with_alice();
    let root = Record::RootKey(root_key(&["api.*.verify_key"]));
    agent.cached(hash("root"), root, at(BASE), clock::lease_now());
    agent.invalidate(Scope::Workspace(WorkspaceId::new("ws_2")));
    assert!(cached(&agent, "alice").is_some() && cached(&agent, "root").is_some());
    agent.invalidate(Scope::Workspace(WorkspaceId::new("ws_1")));
    assert!(cached(&agent, "alice").is_none());
    assert!(cached(&agent, "root").is_none());
}

#[test]
fn no_entry_is_served_below_the_horizon() {
    let agent = with_alice();
    agent.cached(hash("absent"), Record::Absent, at(BASE), clock::lease_now());
    agent.invalidate(Scope::All);
    assert!(cached(&agent, "alice").is_none());
    assert!(cached(&agent, "absent").is_none());
}

#[test]
fn a_floor_counts_at_once_even_out_of_order() {
    let agent = with_alice();
    agent.apply(row(at(BASE + 5), Scope::Api(ApiId::new("api_1"))));
    assert_eq!(agent.serving.applied(), at(BASE), "positions below are missing");
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn a_new_epoch_ends_all_cached_entries() {
    let agent = with_alice();
    agent.prove(LogPosition::new(2, 1).unwrap());
    assert!(cached(&agent, "alice").is_none());
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE + 9), clock::lease_now());
    assert!(cached(&agent, "alice").is_none(), "a load of the old epoch is old, whatever its position");
}

#[test]
fn a_lease_extends_entries_read_long_ago() {
    let agent = TestAgent::live();
    let long_ago = clock::lease_now().before(TRUST);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), long_ago);
    assert!(cached(&agent, "alice").is_some());
}

#[test]
fn without_a_lease_an_entry_lasts_from_its_own_read() {
    let agent = TestAgent::expired_with(&[]);
    let now = clock::lease_now();
    agent.cached(hash("fresh"), Record::Key(key("key_1")), at(BASE), now);
    agent.cached(hash("old"), Record::Key(key("key_2")), at(BASE), now.before(TRUST));
    assert!(cached(&agent, "fresh").is_some());
    assert!(cached(&agent, "old").is_none());
}

#[test]
fn an_old_entry_is_not_served_after_the_lease() {
    let agent = TestAgent::expired_with(&[]);
    let old = clock::lease_now().before(TRUST);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), old);
    agent.was_proven(old);
    assert!(cached(&agent, "alice").is_none());
    agent.was_proven(clock::lease_now());
    assert!(cached(&agent, "alice").is_some(), "a proof renews entries above their floors");
}

#[test]
fn not_found_expires() {
    let agent = TestAgent::live_with(&[("cache.not_found_ttl", "2s")]);
    let deleted = KeyRecord { state: RecordState::Deleted, ..key("key_1") };
    let now = clock::lease_now();
    let expired = now.before(Duration::from_secs(2));
    agent.cached(hash("fresh"), Record::Absent, at(BASE), now);
    agent.cached(hash("expired"), Record::Absent, at(BASE), expired);
    agent.cached(hash("deleted"), Record::Key(deleted), at(BASE), expired);
    agent.cached(hash("found"), Record::Key(key("key_2")), at(BASE), expired);
    assert!(cached(&agent, "fresh").is_some());
    assert!(cached(&agent, "expired").is_none());
    assert!(cached(&agent, "deleted").is_none(), "a deleted key is not found either");
    assert!(cached(&agent, "found").is_some());
}

#[test]
fn a_used_entry_outlives_a_horizon_that_it_met() {
    let agent = with_alice();
    agent.cached(hash("idle"), Record::Key(key("key_2")), at(BASE), clock::lease_now());
    let applied = agent.invalidate(key_scope(hash("bob")));

    let entry = cached(&agent, "alice").unwrap();
    assert_eq!(entry.validity.as_of(), applied, "the hit had met every floor up to here");

    // As when bob's floor is dropped to save memory.
    agent.serving.follower.lock().floors().horizon().raise(applied);
    assert!(cached(&agent, "alice").is_some());
    assert!(cached(&agent, "idle").is_none(), "it may not have met bob's floor");

    agent.invalidate(Scope::All);
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn a_hit_advances_no_entry_above_the_applied_position_it_read() {
    let agent = with_alice();
    let before = agent.serving.begin();
    let after = agent.invalidate(key_scope(hash("bob")));
    let entry = agent.verifier.cached(&hash("alice"), before).unwrap();
    assert!(entry.validity.as_of() < after, "its floors may have been read before that position was applied");
}

#[tokio::test]
async fn hits_and_misses_are_counted() {
    let agent = with_alice();
    agent.verifier.entry(hash("alice")).await.unwrap();
    agent.verifier.entry(hash("bob")).await.unwrap();
    agent.verifier.entry(hash("bob")).await.unwrap();
    assert_eq!(agent.metric("evictd_agent_cache_hits_total"), 2);
    assert_eq!(agent.metric("evictd_agent_cache_misses_total"), 1);
    assert_eq!(agent.home.lookups(), 1);
}

#[test]
fn an_expiry_that_may_have_passed_at_home_has_passed() {
    let agent = TestAgent::live();
    let soon = KeyRecord { expires_at: Some(ends_in(Duration::from_mins(1))), ..key("key_1") };
    let root = RootKeyRecord { expires_at: soon.expires_at, ..root_key(&["api.*.verify_key"]) };
    let acts = || authorize(Some(&root), agent.verifier.home_time()).is_ok();
    let verdict = || soon.verdict(agent.verifier.home_time());
    assert_eq!(verdict(), Verdict::Valid);
    assert!(acts());

    // The store's clock may be that far ahead of this machine's.
    let offset = clock::wall_now().0 - clock::lease_now().0 as i64;
    agent.serving.publish_home_offset_high(offset + 61_000_000);
    assert_eq!(verdict(), Verdict::Expired);
    assert!(!acts());
}

const UNREACHABLE: (LoadOutcome, LoadError) = (LoadOutcome::Timeout, LoadError::Unreachable);
const STALE: &[(&str, &str)] = &[("partition.policy", "serve_stale")];

/// An agent without a lease, cut off from all publishers. It has cached "alice", read so long ago.
fn cut_off(settings: &[(&str, &str)], read_ago: Duration) -> TestAgent {
    let agent = TestAgent::expired_with(settings);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now().before(read_ago));
    agent.home.fail(Some(UNREACHABLE));
    agent
}

#[tokio::test]
async fn stale_entries_are_served_only_by_policy_and_when_cut_off() {
    let old = TRUST + Duration::from_secs(10);
    let deny = cut_off(&[], old);
    assert_eq!(deny.verifier.entry(hash("alice")).await.unwrap_err(), LoadError::Unreachable);

    let agent = cut_off(STALE, old);
    let found = agent.verifier.entry(hash("alice")).await.unwrap();
    assert_eq!(found.stale.map(|age| age.as_secs()), Some(37));
    assert_eq!(agent.verifier.entry(hash("bob")).await.unwrap_err(), LoadError::Unreachable);

    // A publisher that is busy or has an old record was reachable.
    for (outcome, error) in [(LoadOutcome::Busy, LoadError::Busy), (LoadOutcome::Ok, LoadError::Stale)] {
        agent.home.fail(Some((outcome, error)));
        assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap_err(), error);
    }
    agent.home.fail(None);
    assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap().stale, None, "loaded again");
}

#[tokio::test]
async fn an_entry_below_a_floor_is_never_served_stale() {
    for scope in [
        key_scope(hash("alice")),
        Scope::Api(ApiId::new("api_1")),
        Scope::Workspace(WorkspaceId::new("ws_1")),
        Scope::All,
    ] {
        let agent = TestAgent::live_with(STALE);
        let read_at = clock::lease_now().before(TRUST * 2);
        agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), read_at);
        agent.home.fail(Some(UNREACHABLE));
        agent.invalidate(scope.clone());
        let denied = agent.verifier.entry(hash("alice")).await;
        assert_eq!(denied.unwrap_err(), LoadError::Unreachable, "{scope:?}");
    }
}

#[tokio::test]
async fn an_api_may_have_a_policy_of_its_own() {
    let old = TRUST * 2;
    let agent = cut_off(&[("partition.apis.api_1", "serve_stale")], old);
    let other = KeyRecord { api_id: ApiId::new("api_2"), ..key("key_2") };
    let read_at = clock::lease_now().before(old);
    agent.cached(hash("bob"), Record::Key(other), at(BASE), read_at);
    agent.cached(hash("root"), Record::RootKey(root_key(&[])), at(BASE), read_at);
    assert!(agent.verifier.entry(hash("alice")).await.unwrap().stale.is_some());
    assert!(
        agent.verifier.entry(hash("root")).await.unwrap().stale.is_some(),
        "or no root key could act on api_1"
    );
    assert_eq!(agent.verifier.entry(hash("bob")).await.unwrap_err(), LoadError::Unreachable);
}

#[tokio::test]
async fn after_a_disruption_no_earlier_record_is_served() {
    let agent = TestAgent::live_with(STALE);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    agent.home.put(hash("bob"), Record::Key(key("key_2")));
    agent.home.hold();
    let verifier = agent.verifier.clone();
    let under_way = tokio::spawn(async move { verifier.entry(hash("bob")).await });
    agent.home.wait_for_lookup(1).await;

    agent.serving.end();
    agent.home.release();
    assert_eq!(
        under_way.await.unwrap().unwrap_err(),
        LoadError::Stale,
        "its answer may be from before the disruption"
    );
    assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap_err(), LoadError::Stale);
    agent.prove(at(BASE + 1));
    assert!(cached(&agent, "alice").is_none() && cached(&agent, "bob").is_none(), "a proof changes nothing");
    agent.home.fail(Some(UNREACHABLE));
    assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap_err(), LoadError::Unreachable);
}
