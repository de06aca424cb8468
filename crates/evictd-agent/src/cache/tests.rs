//! Which of the two caches holds an entry. `loom` checks the order of insertions and evictions in the core.

use evictd_core::record::{KeyRecord, RecordState};
use evictd_ops::clock;
use evictd_wire::api::ids::hash;

use super::*;
use crate::fixture::{BASE, TestAgent, at, key, root_key};

fn put(agent: &TestAgent, text: &str, record: Record) -> Arc<CachedRecord> {
    agent.cached(hash(text), record, at(BASE), clock::lease_now())
}

#[test]
fn a_record_is_in_one_of_the_two_caches_only() {
    let agent = TestAgent::live();
    let cache = &agent.cache;
    let alice = hash("alice");
    let active = || Record::Key(key("key_1"));
    let deleted = || Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_1") });
    for (record, not_found) in
        [(active(), false), (deleted(), true), (Record::Absent, true), (active(), false)]
    {
        put(&agent, "alice", record);
        assert_eq!(cache.get(&alice).unwrap().is_not_found(), not_found);
        assert_eq!(cache.found.contains_key(&alice), !not_found);
        assert_eq!(cache.not_found.contains_key(&alice), not_found);
    }
}

#[test]
fn evicting_and_clearing_affect_both_caches() {
    let agent = TestAgent::live();
    let cache = &agent.cache;
    let put_both = || {
        put(&agent, "alice", Record::Key(key("key_1")));
        put(&agent, "absent", Record::Absent);
    };
    put_both();
    cache.evict(&hash("alice"));
    cache.evict(&hash("absent"));
    assert!(cache.get(&hash("alice")).is_none() && cache.get(&hash("absent")).is_none());
    put_both();
    cache.clear();
    assert!(cache.get(&hash("alice")).is_none() && cache.get(&hash("absent")).is_none());
}

#[test]
fn guessed_keys_displace_no_valid_one() {
    let agent = TestAgent::live_with(&[("cache.not_found_entries", "10")]);
    let cache = &agent.cache;
    put(&agent, "alice", Record::Key(key("key_1")));
    put(&agent, "root", Record::RootKey(root_key(&["api.*.verify_key"])));
    for guess in 0..1_000 {
        put(&agent, &format!("guess {guess}"), Record::Absent);
    }
    cache.run_pending_tasks();
    let (found, not_found, bytes) = cache.size();
    assert_eq!(found, 2);
    assert!(not_found <= 10, "{not_found}");
    assert!(bytes > 0);
    assert!(cache.get(&hash("alice")).is_some() && cache.get(&hash("root")).is_some());
}

#[test]
fn large_records_weigh_more() {
    let agent = TestAgent::live();
    let weight = |record| put(&agent, "alice", record).weight();
    let small = weight(Record::Key(key("key_1")));
    let meta = KeyRecord { meta: Some("m".repeat(10_000).into()), ..key("key_1") };
    assert_eq!(weight(Record::Key(meta)) - small, 10_000);
    assert!(weight(Record::Absent) > 0);
    assert!(weight(Record::RootKey(root_key(&["api.*.verify_key"]))) > small);
}
