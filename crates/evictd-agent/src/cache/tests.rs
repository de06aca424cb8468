//! Which of the two caches holds an entry. `loom` checks the order of insertions and evictions in the core.

use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::invalidation::Scope;
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

/// Failure: after an API is deleted, its entries keep the memory until each is asked for, and moka refuses the records of
/// other APIs, because they were used less.
#[test]
fn entries_of_a_deleted_api_make_room_for_new_ones() {
    const ENTRIES: usize = 1_000;
    let agent = TestAgent::live_with(&[("cache.size", "512KiB")]);
    let cache = &agent.cache;
    let of_api = |api: &str| KeyRecord { api_id: ApiId::new(api), ..key("key_1") };
    let fill = |api: &str| {
        let hashes: Vec<_> = (0..ENTRIES).map(|n| hash(&format!("{api} {n}"))).collect();
        for hash in &hashes {
            agent.cached(*hash, Record::Key(of_api(api)), agent.serving.applied(), clock::lease_now());
            cache.run_pending_tasks();
        }
        hashes
    };
    let cached = |hashes: &[KeyHash]| {
        cache.run_pending_tasks();
        hashes.iter().filter(|hash| cache.get(hash).is_some()).count()
    };
    let old = fill("api_1");
    let full = cached(&old);
    assert!(full > 300 && full < ENTRIES, "{full} entries fill it");
    for _ in 0..3 {
        cached(&old);
    }
    let early = cached(&fill("api_0"));
    assert!(early < full / 10, "moka admits {early} new entries beside those that were used more");

    agent.invalidate(Scope::Api(ApiId::new("api_1")));
    let evicted = cache.evict_void(|entry| agent.serving.is_void(entry), || false);
    assert!(evicted > full / 2, "{evicted}");
    assert_eq!(cached(&old), 0);
    let new = fill("api_2");
    assert!(cached(&new) > full / 2, "{} of {full}", cached(&new));
}

#[tokio::test]
async fn deletion_of_an_api_starts_the_eviction_of_its_entries() {
    let agent = TestAgent::live();
    let (cache, shutdown) = (agent.cache.clone(), CancellationToken::new());
    let sweep = tokio::spawn(evict_void_entries(cache.clone(), agent.serving.clone(), shutdown.clone()));
    put(&agent, "alice", Record::Key(key("key_1")));
    put(&agent, "bob", Record::Key(KeyRecord { api_id: ApiId::new("api_2"), ..key("key_2") }));
    agent.invalidate(Scope::Api(ApiId::new("api_1")));
    cache.wide_floor_raised();
    while cache.get(&hash("alice")).is_some() {
        tokio::task::yield_now().await;
    }
    assert!(cache.get(&hash("bob")).is_some());
    shutdown.cancel();
    sweep.await.unwrap();
}

/// A record as this test names it, the `n`th of its kind.
fn record(kind: &str, n: usize) -> Record {
    let text = |length: usize| Some(Box::from("x".repeat(length)));
    let named = |prefix: &str| format!("{prefix}_{n:022}");
    // As a load decodes it: of its exact size from the start.
    let boxed = |text: String| Box::<str>::from(&*text);
    let small = KeyRecord {
        key_id: KeyId::new(named("key")),
        api_id: ApiId::new("api_2cGKbMxRjIzhCxo1IdjH3a"),
        workspace_id: WorkspaceId::new("ws_2cGKbMxRyIzhCxo1Idjz8q"),
        ..key("")
    };
    Record::Key(match kind {
        "small" => small,
        "typical" => KeyRecord {
            name: text(20),
            meta: text(90),
            external_id: text(24),
            permissions: (0..4).map(|n| boxed(format!("documents.{n}.read"))).collect(),
            ..small
        },
        _ => KeyRecord {
            permissions: (0..400).map(|n| boxed(format!("documents.{n:06}.read"))).collect(),
            meta: text(4_000),
            ..small
        },
    })
}

/// The resident memory of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

const MEMORY_CHILD: &str = "EVICTD_TEST_MEMORY";

/// Fills a cache, and prints what it weighs and what the process takes for it.
#[allow(clippy::print_stdout, reason = "the test that runs it reads that")]
fn measure(kind: &str, entries: usize) {
    let agent = TestAgent::live_with(&[("cache.size", "64GiB")]);
    let before = resident();
    for n in 0..entries {
        agent.cached(hash(&n.to_string()), record(kind, n), at(BASE), clock::lease_now());
    }
    agent.cache.run_pending_tasks();
    let (found, _, weight) = agent.cache.size();
    assert_eq!(found, entries as u64);
    println!("MEASURED {weight} {}", resident() - before);
}

/// Failure: the cache takes a multiple of `cache.size`, and the kernel kills the agent. Each size is measured in a process of
/// its own, because no other test may allocate meanwhile.
#[test]
fn weight_is_within_a_quarter_of_the_memory_taken() {
    const NAME: &str = "cache::tests::weight_is_within_a_quarter_of_the_memory_taken";
    if let Ok(wanted) = std::env::var(MEMORY_CHILD) {
        let (kind, entries) = wanted.split_once(' ').unwrap();
        return measure(kind, entries.parse().unwrap());
    }
    let mut wrong = Vec::new();
    for case in ["small 20000", "small 1000000", "typical 20000", "typical 1000000", "large 3000"] {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", NAME, "--nocapture", "--test-threads=1"]).env(MEMORY_CHILD, case);
        let output = String::from_utf8(child.output().unwrap().stdout).unwrap();
        let measured = output.lines().find_map(|line| line.split_once("MEASURED ")).unwrap().1;
        let (weight, taken) = measured.split_once(' ').unwrap();
        let ratio = weight.parse::<f64>().unwrap() / taken.parse::<f64>().unwrap();
        if !(0.75..=1.25).contains(&ratio) {
            wrong.push(format!("{case}: weighs {weight}, takes {taken}, which is {ratio:.2}"));
        }
    }
    assert!(wrong.is_empty(), "weight by memory taken: {wrong:?}");
}
