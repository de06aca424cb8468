//! What is where, and every schedule of a load, an invalidation and a verification that starts after the
//! invalidation was confirmed.

use evictd_core::follower::Follower;
use evictd_core::ids::ApiId;
use evictd_core::invalidation::Scope;
use evictd_core::record::{KeyRecord, RecordState};
use evictd_ops::clock;
use evictd_wire::api::ids::hash;

use super::*;
use crate::fixture::{BASE, at, config, key, key_scope, root_key, row};

/// One step of a thread; between two of them, any other thread may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// The loader puts what it read into the cache, hidden.
    Insert,
    /// It looks whether that meets the floors.
    Check,
    /// If so it shows it, otherwise it takes it out.
    Settle,
    /// The invalidation raises its floor.
    Raise,
    /// It evicts.
    Evict,
    /// It is confirmed.
    Confirm,
    /// The verification gets what is in the cache.
    Get,
    /// It looks whether that is shown and meets the shared floors.
    Answer,
    /// It only looks whether that is shown.
    AnswerBlindly,
}

use Step::{Answer, AnswerBlindly, Check, Confirm, Evict, Get, Insert, Raise, Settle};

const LAND: [Step; 3] = [Insert, Check, Settle];
const INVALIDATE_KEY: [Step; 3] = [Raise, Evict, Confirm];
const INVALIDATE_API: [Step; 2] = [Raise, Confirm];
const VERIFY: [Step; 2] = [Get, Answer];

/// A cache, its floors, and a load that has read what the invalidation ends.
struct World {
    cache: Cache,
    follower: Follower,
    scope: Scope,
    entry: Arc<Entry>,
    meets_floors: bool,
    got: Option<Arc<Entry>>,
    answered: bool,
}

impl World {
    fn new(scope: Scope) -> Self {
        let config = config(&[]);
        let mut follower = Follower::new(config.follower(), 1);
        let now = clock::lease_now();
        follower.poll(now, &mut Vec::new());
        follower.on_probe_answer(1, at(BASE), now, &mut Vec::new());
        let record = Record::Key(key("key_1"));
        let anchors = follower.anchors(&record, &mut Vec::new());
        let cache = Cache::new(&config.cache);
        let answers = cache.rings.answers_of(&record);
        let entry =
            Arc::new(Entry { record, stamp: Stamp::new(at(BASE), now, anchors), loaded_at: now, answers });
        Self { cache, follower, scope, entry, meets_floors: true, got: None, answered: false }
    }

    fn take(&mut self, step: Step) {
        let alice = hash("alice");
        let is_shown = |got: &Option<Arc<Entry>>| got.as_ref().is_some_and(|entry| entry.stamp.is_shown());
        match step {
            Insert => self.cache.insert_hidden(alice, self.entry.clone()),
            Check => self.meets_floors = self.follower.admits(&alice, &self.entry.stamp.anchors, at(BASE)),
            Settle if self.meets_floors => self.entry.stamp.show(),
            Settle | Evict => drop(self.cache.evict(&alice)),
            Raise => {
                let row = row(at(BASE + 1), self.scope.clone());
                self.follower.on_live(vec![row], clock::lease_now(), &mut Vec::new());
            }
            Confirm => {}
            Get => self.got = self.cache.found.get(&alice),
            Answer => {
                let floor = self.entry.stamp.anchors.floor().max(self.follower.floors().horizon().get());
                self.answered = is_shown(&self.got) && at(BASE) >= floor;
            }
            AnswerBlindly => self.answered = is_shown(&self.got),
        }
    }
}

/// All orders in which two threads can take their steps.
fn interleavings(one: &[Step], other: &[Step]) -> Vec<Vec<Step>> {
    let (Some((first, one_rest)), Some((second, other_rest))) = (one.split_first(), other.split_first())
    else {
        return vec![[one, other].concat()];
    };
    let one_goes = interleavings(one_rest, other).into_iter().map(|rest| [&[*first], &rest[..]].concat());
    let other_goes = interleavings(one, other_rest).into_iter().map(|rest| [&[*second], &rest[..]].concat());
    one_goes.chain(other_goes).collect()
}

/// The schedules in which the verification, which starts after the confirmation, is answered from what
/// the load brought.
fn stale(loader: &[Step], invalidation: &[Step], verification: &[Step], scope: &Scope) -> Vec<Vec<Step>> {
    let mut schedules = interleavings(loader, &[invalidation, verification].concat());
    assert!(schedules.len() >= 35, "too few to mean anything");
    schedules.retain(|schedule| {
        let mut world = World::new(scope.clone());
        for step in schedule {
            world.take(*step);
        }
        world.answered
    });
    schedules
}

fn alice() -> Scope {
    key_scope(hash("alice"))
}

fn api() -> Scope {
    Scope::Api(ApiId::new("api_1"))
}

#[test]
fn no_schedule_brings_back_a_key_that_was_invalidated() {
    assert_eq!(stale(&LAND, &INVALIDATE_KEY, &VERIFY, &alice()), [[]; 0]);
}

#[test]
fn no_schedule_brings_back_a_key_whose_api_was_invalidated() {
    assert_eq!(stale(&LAND, &INVALIDATE_API, &VERIFY, &api()), [[]; 0]);
}

#[test]
fn checking_before_inserting_would_bring_it_back() {
    let found = stale(&[Check, Insert, Settle], &INVALIDATE_KEY, &VERIFY, &alice());
    assert!(found.contains(&vec![Check, Raise, Evict, Insert, Settle, Confirm, Get, Answer]), "{found:?}");
}

#[test]
fn showing_before_checking_would_bring_it_back() {
    // The first `Settle` shows, whatever the floors say; the second one corrects that too late.
    let found = stale(&[Insert, Settle, Check, Settle], &INVALIDATE_KEY, &VERIFY, &alice());
    assert!(
        found.contains(&vec![Raise, Evict, Insert, Settle, Confirm, Get, Answer, Check, Settle]),
        "{found:?}"
    );
}

#[test]
fn evicting_before_raising_would_bring_it_back() {
    let found = stale(&LAND, &[Evict, Raise, Confirm], &VERIFY, &alice());
    assert!(found.contains(&vec![Evict, Insert, Check, Raise, Settle, Confirm, Get, Answer]), "{found:?}");
}

#[test]
fn a_hit_that_ignored_the_shared_floors_would_bring_it_back() {
    assert_ne!(stale(&LAND, &INVALIDATE_API, &[Get, AnswerBlindly], &api()), [[]; 0]);
}

fn entry(record: Record) -> Arc<Entry> {
    let mut follower = Follower::new(config(&[]).follower(), 1);
    let anchors = follower.anchors(&record, &mut Vec::new());
    let stamp = Stamp::new(at(BASE), clock::lease_now(), anchors);
    stamp.show();
    let answers = Rings::new().answers_of(&record);
    Arc::new(Entry { record, loaded_at: stamp.read_at, stamp, answers })
}

fn put(cache: &Cache, text: &str, record: Record) {
    let shown = entry(record.clone());
    let stamp = Stamp::new(shown.stamp.as_of(), shown.stamp.read_at, shown.stamp.anchors.clone());
    let answers = cache.rings.answers_of(&record);
    let hidden = Arc::new(Entry { record, loaded_at: stamp.read_at, stamp, answers });
    cache.insert_hidden(hash(text), hidden.clone());
    hidden.stamp.show();
}

#[test]
fn a_record_that_changes_sides_is_found_on_the_new_one_only() {
    let cache = Cache::new(&config(&[]).cache);
    let alice = hash("alice");
    let active = || Record::Key(key("key_1"));
    let deleted = || Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_1") });
    for (record, not_found) in
        [(active(), false), (deleted(), true), (Record::Absent, true), (active(), false)]
    {
        put(&cache, "alice", record);
        assert_eq!(cache.get(&alice).unwrap().is_not_found(), not_found);
        assert_eq!(cache.found.contains_key(&alice), !not_found);
        assert_eq!(cache.not_found.contains_key(&alice), not_found);
    }
}

#[test]
fn evicting_and_clearing_leave_nothing_of_either_side() {
    let cache = Cache::new(&config(&[]).cache);
    let put_both = || {
        put(&cache, "alice", Record::Key(key("key_1")));
        put(&cache, "nobody", Record::Absent);
    };
    put_both();
    cache.evict(&hash("alice"));
    cache.evict(&hash("nobody"));
    assert!(cache.get(&hash("alice")).is_none() && cache.get(&hash("nobody")).is_none());
    put_both();
    cache.clear();
    assert!(cache.get(&hash("alice")).is_none() && cache.get(&hash("nobody")).is_none());
}

#[test]
fn guessing_keys_pushes_no_good_one_out() {
    let cache = Cache::new(&config(&[("cache.not_found_entries", "10")]).cache);
    put(&cache, "alice", Record::Key(key("key_1")));
    put(&cache, "root", Record::RootKey(root_key(&["api.*.verify_key"])));
    for guess in 0..1_000 {
        put(&cache, &format!("guess {guess}"), Record::Absent);
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
    let small = entry(Record::Key(key("key_1")));
    let meta = KeyRecord { meta: Some("m".repeat(10_000).into()), ..key("key_1") };
    assert_eq!(entry(Record::Key(meta)).weight() - small.weight(), 10_000);
    assert!(entry(Record::Absent).weight() > 0);
    assert!(entry(Record::RootKey(root_key(&["api.*.verify_key"]))).weight() > small.weight());
}
