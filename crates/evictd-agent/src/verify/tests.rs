//! The hot path: what is answered from the cache, and what is not any more.

use std::time::Duration;

use evictd_core::ids::{ApiId, WorkspaceId};
use evictd_core::invalidation::Scope;
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState, RootKeyRecord, Verdict};
use evictd_ops::clock;
use evictd_wire::api::ids::hash;
use evictd_wire::api::root_key::authorize;

use super::*;
use crate::fixture::{Agent, BASE, at, ends_in, key, key_scope, root_key, row};
use crate::metrics::LoadOutcome;

/// What the default bound leaves after its margin.
const TRUST: Duration = Duration::from_secs(27);

/// What a verification that starts now finds.
fn cached(agent: &Agent, text: &str) -> Option<Arc<Entry>> {
    agent.verifier.cached(&hash(text), agent.knowledge.begin())
}

/// An agent with `key_1` of `api_1` cached under "alice", read just now.
fn with_alice() -> Agent {
    let agent = Agent::live();
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    agent
}

#[test]
fn what_is_cached_is_answered() {
    let agent = with_alice();
    assert!(cached(&agent, "alice").is_some());
    assert!(cached(&agent, "bob").is_none());
}

#[test]
fn what_is_hidden_is_not_answered() {
    let agent = Agent::live();
    let record = Record::Key(key("key_1"));
    let loaded = agent.loaded(hash("alice"), record, at(BASE), clock::lease_now());
    let inserted = loaded.insert(&*agent.cache);
    assert!(cached(&agent, "alice").is_none());
    inserted.settle(&agent.knowledge, &*agent.cache);
    assert!(cached(&agent, "alice").is_some());
}

#[test]
fn nothing_is_answered_below_the_floor_of_its_key() {
    let agent = with_alice();
    agent.invalidate(key_scope(hash("bob")));
    assert!(cached(&agent, "alice").is_some(), "bob's deletion is none of alice's business");
    agent.invalidate(key_scope(hash("alice")));
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn nothing_is_answered_below_the_floor_of_its_api() {
    let agent = with_alice();
    agent.invalidate(Scope::Api(ApiId::new("api_2")));
    assert!(cached(&agent, "alice").is_some());
    agent.invalidate(Scope::Api(ApiId::new("api_1")));
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn nothing_is_answered_below_the_floor_of_its_workspace() {
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
fn nothing_is_answered_below_the_horizon() {
    let agent = with_alice();
    agent.cached(hash("nobody"), Record::Absent, at(BASE), clock::lease_now());
    agent.invalidate(Scope::All);
    assert!(cached(&agent, "alice").is_none());
    assert!(cached(&agent, "nobody").is_none());
}

#[test]
fn a_floor_that_rises_out_of_order_counts_at_once() {
    let agent = with_alice();
    agent.apply(row(at(BASE + 5), Scope::Api(ApiId::new("api_1"))));
    assert_eq!(agent.knowledge.applied(), at(BASE), "positions below are missing");
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn a_new_epoch_ends_everything_that_was_cached() {
    let agent = with_alice();
    agent.prove(LogPosition::new(2, 1).unwrap());
    assert!(cached(&agent, "alice").is_none());
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE + 9), clock::lease_now());
    assert!(cached(&agent, "alice").is_none(), "a load of the old epoch is old, whatever its position");
}

#[test]
fn the_lease_carries_what_was_read_long_ago() {
    let agent = Agent::live();
    let long_ago = clock::lease_now().before(TRUST);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), long_ago);
    assert!(cached(&agent, "alice").is_some());
}

#[test]
fn without_a_lease_an_entry_lives_by_its_own_read() {
    let agent = Agent::expired_with(&[]);
    let now = clock::lease_now();
    agent.cached(hash("fresh"), Record::Key(key("key_1")), at(BASE), now);
    agent.cached(hash("old"), Record::Key(key("key_2")), at(BASE), now.before(TRUST));
    assert!(cached(&agent, "fresh").is_some());
    assert!(cached(&agent, "old").is_none());
}

#[test]
fn when_the_lease_has_run_out_too_an_old_entry_is_not_answered() {
    let agent = Agent::expired_with(&[]);
    let old = clock::lease_now().before(TRUST);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), old);
    agent.was_proven(old);
    assert!(cached(&agent, "alice").is_none());
    agent.was_proven(clock::lease_now());
    assert!(cached(&agent, "alice").is_some(), "a proof renews what no floor has reached");
}

#[test]
fn not_found_wears_off() {
    let agent = Agent::live_with(&[("cache.not_found_ttl", "2s")]);
    let deleted = KeyRecord { state: RecordState::Deleted, ..key("key_1") };
    let now = clock::lease_now();
    let worn = now.before(Duration::from_secs(2));
    agent.cached(hash("young"), Record::Absent, at(BASE), now);
    agent.cached(hash("worn"), Record::Absent, at(BASE), worn);
    agent.cached(hash("deleted"), Record::Key(deleted), at(BASE), worn);
    agent.cached(hash("found"), Record::Key(key("key_2")), at(BASE), worn);
    assert!(cached(&agent, "young").is_some());
    assert!(cached(&agent, "worn").is_none());
    assert!(cached(&agent, "deleted").is_none(), "a deleted key is not found either");
    assert!(cached(&agent, "found").is_some());
}

#[test]
fn an_entry_in_use_outlives_a_horizon_that_it_met() {
    let agent = with_alice();
    agent.cached(hash("idle"), Record::Key(key("key_2")), at(BASE), clock::lease_now());
    let applied = agent.invalidate(key_scope(hash("bob")));

    let entry = cached(&agent, "alice").unwrap();
    assert_eq!(entry.validity.as_of(), applied, "the hit had met every floor up to here");

    // As when bob's floor is dropped to save memory.
    agent.knowledge.follower.lock().floors().horizon().raise(applied);
    assert!(cached(&agent, "alice").is_some());
    assert!(cached(&agent, "idle").is_none(), "nobody knows whether it met bob's floor");

    agent.invalidate(Scope::All);
    assert!(cached(&agent, "alice").is_none());
}

#[test]
fn a_hit_lifts_no_entry_above_what_was_applied_before_it_looked() {
    let agent = with_alice();
    let before = agent.knowledge.begin();
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
    assert_eq!(agent.home.asked(), 1);
}

#[test]
fn an_end_that_may_have_come_at_home_has_come() {
    let agent = Agent::live();
    let soon = KeyRecord { expires_at: Some(ends_in(Duration::from_mins(1))), ..key("key_1") };
    let root = RootKeyRecord { expires_at: soon.expires_at, ..root_key(&["api.*.verify_key"]) };
    let acts = || authorize(Some(&root), agent.verifier.home_time()).is_ok();
    let verdict = || soon.verdict(agent.verifier.home_time());
    assert_eq!(verdict(), Verdict::Valid);
    assert!(acts());

    // The store's clock may be that far ahead of this machine's.
    let offset = clock::wall_now().0 - clock::lease_now().0 as i64;
    agent.knowledge.publish_home_offset_high(offset + 61_000_000);
    assert_eq!(verdict(), Verdict::Expired);
    assert!(!acts());
}

const UNREACHABLE: (LoadOutcome, LoadError) = (LoadOutcome::Timeout, LoadError::Unreachable);
const STALE: &[(&str, &str)] = &[("partition.policy", "serve_stale")];

/// An agent whose lease has run out, and that reaches no publisher; it has "alice", read so long ago.
fn cut_off(settings: &[(&str, &str)], read_ago: Duration) -> Agent {
    let agent = Agent::expired_with(settings);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now().before(read_ago));
    agent.home.fail(Some(UNREACHABLE));
    agent
}

#[tokio::test]
async fn what_is_out_of_time_is_answered_only_if_policy_says_so_and_nobody_can_be_reached() {
    let old = TRUST + Duration::from_secs(10);
    let deny = cut_off(&[], old);
    assert_eq!(deny.verifier.entry(hash("alice")).await.unwrap_err(), LoadError::Unreachable);

    let agent = cut_off(STALE, old);
    let found = agent.verifier.entry(hash("alice")).await.unwrap();
    assert_eq!(found.stale.map(|age| age.as_secs()), Some(37));
    assert_eq!(agent.verifier.entry(hash("bob")).await.unwrap_err(), LoadError::Unreachable);

    // Whoever answers that it is busy, or with what is too old, could be reached.
    for (outcome, error) in [(LoadOutcome::Busy, LoadError::Busy), (LoadOutcome::Ok, LoadError::Stale)] {
        agent.home.fail(Some((outcome, error)));
        assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap_err(), error);
    }
    agent.home.fail(None);
    assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap().stale, None, "loaded again");
}

#[tokio::test]
async fn what_something_has_changed_is_never_answered_stale() {
    for scope in [
        key_scope(hash("alice")),
        Scope::Api(ApiId::new("api_1")),
        Scope::Workspace(WorkspaceId::new("ws_1")),
        Scope::All,
    ] {
        let agent = Agent::live_with(STALE);
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
        "or nobody could act on api_1"
    );
    assert_eq!(agent.verifier.entry(hash("bob")).await.unwrap_err(), LoadError::Unreachable);
}

#[tokio::test]
async fn a_machine_that_stood_still_answers_from_nothing_it_knew() {
    let agent = Agent::live_with(STALE);
    agent.cached(hash("alice"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    agent.home.put(hash("bob"), Record::Key(key("key_2")));
    agent.home.hold();
    let verifier = agent.verifier.clone();
    let under_way = tokio::spawn(async move { verifier.entry(hash("bob")).await });
    agent.home.is_asked(1).await;

    agent.knowledge.end();
    agent.home.release();
    assert_eq!(under_way.await.unwrap().unwrap_err(), LoadError::Stale, "its answer may be from before");
    assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap_err(), LoadError::Stale);
    agent.prove(at(BASE + 1));
    assert!(cached(&agent, "alice").is_none() && cached(&agent, "bob").is_none(), "a proof changes nothing");
    agent.home.fail(Some(UNREACHABLE));
    assert_eq!(agent.verifier.entry(hash("alice")).await.unwrap_err(), LoadError::Unreachable);
}
