//! Every interleaving of those who meet at a cached entry, with every value that the memory model lets them
//! read (R9): the load that brings it, the follow task that ends it, the verifications that read it.
//!
//! All three run the code that the agent runs, `evictd_core::serving`, on loom's atomics. Only the cache is made
//! up: it is one slot. moka is linearizable per key, so the slot is an atomic that says whether the entry is in
//! it; an eviction that finds nothing writes nothing there, and orders nobody's other memory.
//!
//! What must hold: a verification that starts after a confirmation is not answered from the old entry (G2),
//! and one that sees an extended proof sees the floors that were raised before it (G1). Each order that was
//! decided against is a protection that can be switched off, and loom must find what is wrong without it.
//!
//! `cargo xtask model` runs this with `--cfg loom`, and its `--negative-controls` the controls; without, there is
//! nothing here.

#![cfg(loom)]

use std::sync::Arc;
use std::time::Duration;

use evictd_core::entry::Validity;
use evictd_core::floors::FloorLimits;
use evictd_core::follower::{Effect, Follower, FollowerConfig, LoadSource};
use evictd_core::history::{Incarnation, LogToken, Milestone, Provenance, StoreId, Voucher};
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::lease::Bound;
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Record, RecordState, RootKeyRecord};
use evictd_core::serving::{
    AgentState, CacheEntry, EntryCache, HitVerdict, InsertedEntry, LoadAnswer, LoadedEntry,
};
use evictd_core::time::{LeaseTime, StoreTime};
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use loom::thread;

const HASH: KeyHash = KeyHash([7; 32]);

/// When the agent proved the base position, and when the entry was read.
const LONG_AGO: LeaseTime = LeaseTime(1_000_000_000);

/// Long after the bound.
const NOW: LeaseTime = LeaseTime(2_000_000_000);

fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).expect("small")
}

/// Each epoch is one incarnation.
fn provenance(epoch: u32) -> Provenance {
    Provenance { store: StoreId(1), incarnation: Incarnation(epoch.into()) }
}

fn voucher(at: LogPosition) -> Voucher {
    let milestone = Milestone { provenance: provenance(at.epoch()), at, token: LogToken(at.position()) };
    Voucher { milestone, mac: [0; 16] }
}

fn bound() -> Bound {
    Bound::new(Duration::from_secs(30), Duration::from_secs(3)).expect("a tenth is allowed")
}

/// One that depends on two floors, or on one where all floors are forgotten: floors are kept in a map, whose
/// order differs from run to run, and loom must see the same steps each time.
fn record(end: End) -> Record {
    if matches!(end, End::Flush) {
        return Record::RootKey(RootKeyRecord {
            root_key_id: KeyId::new("root"),
            workspace_id: WorkspaceId::new("ws"),
            state: RecordState::Active,
            permissions: Vec::new(),
            expires_at: None,
        });
    }
    Record::Key(KeyRecord {
        key_id: KeyId::new("key"),
        api_id: ApiId::new("api"),
        workspace_id: WorkspaceId::new("ws"),
        state: RecordState::Active,
        name: None,
        meta: None,
        external_id: None,
        permissions: Vec::new(),
        expires_at: None,
    })
}

/// What ends the entry.
#[derive(Clone, Copy)]
enum End {
    Key,
    Api,
    /// A new epoch, in which everything is forgotten.
    Flush,
}

const ENDS: [End; 3] = [End::Key, End::Api, End::Flush];

#[derive(Debug)]
struct Entry(Validity);

impl CacheEntry for Entry {
    fn validity(&self) -> &Validity {
        &self.0
    }
}

/// Room for one entry, and whether it is there.
struct Slot {
    entry: Arc<Entry>,
    is_cached: AtomicBool,
}

impl Slot {
    /// Only what is there is written to.
    fn empty(&self) -> bool {
        self.is_cached.compare_exchange(true, false, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl EntryCache for Slot {
    type Entry = Entry;

    fn get(&self, _: &KeyHash) -> Option<Arc<Entry>> {
        self.is_cached.load(Ordering::Acquire).then(|| self.entry.clone())
    }

    fn insert_hidden(&self, _: KeyHash, _: Arc<Entry>) {
        self.is_cached.store(true, Ordering::Release);
    }

    fn evict(&self, _: &KeyHash) -> Option<Arc<Entry>> {
        self.empty().then(|| self.entry.clone())
    }

    fn clear(&self) {
        self.empty();
    }
}

/// What the entry's slot is before there is one.
struct NoCache;

impl EntryCache for NoCache {
    type Entry = Entry;

    fn get(&self, _: &KeyHash) -> Option<Arc<Entry>> {
        None
    }

    fn insert_hidden(&self, _: KeyHash, _: Arc<Entry>) {}

    fn evict(&self, _: &KeyHash) -> Option<Arc<Entry>> {
        None
    }

    fn clear(&self) {}
}

/// An agent with one entry, cached or about to be, from before position 2.
struct Agent {
    state: AgentState,
    slot: Slot,
    announced: AtomicU64,
}

impl Agent {
    /// Its base is position 1, proven long ago. What is loaded was read then, at `read_at` on the clock.
    fn new(end: End, read_at: LeaseTime) -> (Self, LoadedEntry<Entry>) {
        let config = FollowerConfig {
            bound: bound(),
            probe_interval: Duration::from_secs(5),
            request_timeout: Duration::from_secs(1),
            gap_patience: Duration::ZERO,
            floors: FloorLimits::default(),
            home_store: None,
        };
        let state = AgentState::new(Follower::new(config, 1), bound());
        let mut effects = Vec::new();
        {
            let mut follower = state.follower.lock();
            follower.poll(LONG_AGO, &mut effects);
            follower.on_probe_answer(1, &voucher(at(1)), true, LONG_AGO, &mut effects);
        }
        effects.iter().for_each(|effect| drop(state.perform(effect, &NoCache)));
        let source = LoadSource::Authority(provenance(1));
        let answer = LoadAnswer { hash: HASH, source, as_of: at(1), read_at, sent_at: NOW };
        let loaded =
            LoadedEntry::new(&state, answer, record(end), &mut effects, |_, validity| Entry(validity));
        let slot = Slot { entry: loaded.entry().clone(), is_cached: AtomicBool::new(false) };
        (Self { state, slot, announced: AtomicU64::new(at(1).to_bits()) }, loaded)
    }

    /// The entry is in the cache, and visible.
    fn with_entry(end: End, read_at: LeaseTime) -> Self {
        let (agent, loaded) = Self::new(end, read_at);
        agent.settle(loaded.insert(&agent.slot));
        agent
    }

    fn settle(&self, inserted: InsertedEntry<Entry>) {
        inserted.settle(&self.state, &self.slot);
    }

    /// The change is applied. With `proves`, a probe that was sent after the change is answered, too: before
    /// its head is applied, so that everything follows from the change.
    fn end(&self, end: End, proves: bool) {
        let mut effects = Vec::new();
        {
            let mut follower = self.state.follower.lock();
            follower.poll(NOW, &mut Vec::new());
            let invalidate = |scope| {
                vec![Invalidation {
                    position: at(2),
                    scope,
                    cause: Cause::Deleted,
                    committed_at: StoreTime(0),
                }]
            };
            let change = voucher(at(2));
            if proves && !matches!(end, End::Flush) {
                follower.on_probe_answer(2, &change, true, NOW, &mut effects);
            }
            match end {
                End::Key => {
                    let scope = Scope::Key { hash: HASH, key_id: None, api_id: Some(ApiId::new("api")) };
                    follower.on_live(&change, invalidate(scope), NOW, &mut effects);
                }
                End::Api => {
                    follower.on_live(&change, invalidate(Scope::Api(ApiId::new("api"))), NOW, &mut effects);
                }
                // A new epoch begins with the answer to a probe.
                End::Flush => {
                    let later = voucher(LogPosition::new(2, 1).expect("small"));
                    follower.on_probe_answer(2, &later, proves, NOW, &mut effects);
                }
            }
        }
        for effect in effects {
            self.state.perform(&effect, &self.slot);
            if effect == Effect::Announce {
                self.announced.store(self.state.applied().to_bits(), Ordering::Release);
            }
        }
    }

    /// Whether a verification at `now` is answered from the entry.
    fn verify(&self, now: LeaseTime) -> bool {
        let candidate = self.state.begin(now).find(&self.state, &self.slot, &HASH);
        match candidate.map(|candidate| candidate.judge(&self.state)) {
            Some(HitVerdict::Servable(hit)) => {
                hit.answer(&self.state);
                true
            }
            _ => false,
        }
    }

    /// Whether the change was confirmed before now.
    fn has_confirmed(&self) -> bool {
        LogPosition::from_bits(self.announced.load(Ordering::Acquire)) > at(1)
    }
}

/// A load lands while the change that it lacks is applied; a verification starts after the confirmation.
fn a_load_meets(end: End) {
    loom::model(move || {
        // In time: only the floors and the eviction protect.
        let (agent, loaded) = Agent::new(end, NOW);
        let agent = loom::sync::Arc::new(agent);
        let (loader, follow) = (agent.clone(), agent.clone());
        let loader = thread::spawn(move || loader.settle(loaded.insert(&loader.slot)));
        let follow = thread::spawn(move || follow.end(end, false));
        if agent.has_confirmed() {
            assert!(!agent.verify(NOW), "confirmed, and answered from before");
        }
        loader.join().expect("the load ends");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(NOW), "confirmed, and answered from before");
    });
}

#[test]
fn no_load_brings_back_what_was_confirmed() {
    ENDS.into_iter().for_each(a_load_meets);
}

/// The lease ran out long ago. While a repair applies the change and proves so, a verification reads.
fn a_renewal_meets(end: End) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(Agent::with_entry(end, LONG_AGO));
        let follow = agent.clone();
        let follow = thread::spawn(move || follow.end(end, true));
        assert!(!agent.verify(NOW), "answered from older than the bound");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(NOW), "answered from older than the bound");
    });
}

#[test]
fn who_sees_a_renewed_lease_sees_what_was_raised_before_it() {
    ENDS.into_iter().for_each(a_renewal_meets);
}

/// A hit lifts its entry while the change is applied; a verification starts after the confirmation.
fn a_lift_meets(end: End) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(Agent::with_entry(end, NOW));
        let (hit, follow) = (agent.clone(), agent.clone());
        let hit = thread::spawn(move || hit.verify(NOW));
        let follow = thread::spawn(move || follow.end(end, false));
        if agent.has_confirmed() {
            assert!(!agent.verify(NOW), "confirmed, and answered from before");
        }
        hit.join().expect("the hit ends");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(NOW), "confirmed, and answered from before");
    });
}

#[test]
fn no_lift_carries_an_entry_over_a_floor_that_it_did_not_meet() {
    ENDS.into_iter().for_each(a_lift_meets);
}

/// The lease ran out long ago, and what a load brings was read back then. While a repair applies the change
/// and proves so, a verification begins and the load is judged for it.
fn a_settled_load_meets(end: End) {
    loom::model(move || {
        let (agent, loaded) = Agent::new(end, LONG_AGO);
        let agent = loom::sync::Arc::new(agent);
        let settled = loaded.insert(&agent.slot).settle(&agent.state, &agent.slot);
        let follow = agent.clone();
        let follow = thread::spawn(move || follow.end(end, true));
        let began = agent.state.begin(NOW);
        assert!(settled.answer(&agent.state, began, NOW).is_none(), "answered from older than the bound");
        follow.join().expect("the change is applied");
    });
}

#[test]
fn no_load_is_vouched_for_by_a_proof_that_came_after_its_floor() {
    ENDS.into_iter().for_each(a_settled_load_meets);
}

/// Each order that was decided against. What is missing is missing on loom's threads, too: they all run on this one.
#[cfg(evictd_negative_controls)]
mod controls {
    use evictd_core::protection::Protection;

    use super::*;

    #[test]
    #[should_panic(expected = "confirmed, and answered from before")]
    fn checking_before_inserting_would_bring_it_back() {
        Protection::ChecksFollowInsertions.without(|| a_load_meets(End::Key));
    }

    #[test]
    #[should_panic(expected = "confirmed, and answered from before")]
    fn showing_before_checking_would_bring_it_back_for_a_moment() {
        Protection::EntriesAppearChecked.without(|| a_load_meets(End::Key));
    }

    #[test]
    #[should_panic(expected = "confirmed, and answered from before")]
    fn announcing_before_evicting_would_answer_what_was_confirmed() {
        Protection::EvictionPrecedesApplied.without(|| a_lift_meets(End::Key));
    }

    #[test]
    #[should_panic(expected = "answered from older than the bound")]
    fn publishing_the_proof_before_the_eviction_would_renew_the_old_entry() {
        Protection::EvictionPrecedesApplied.without(|| a_renewal_meets(End::Key));
    }

    #[test]
    #[should_panic(expected = "answered from older than the bound")]
    fn reading_the_deadline_after_the_floors_would_answer_from_an_old_entry() {
        Protection::DeadlinePrecedesFloors.without(|| a_renewal_meets(End::Api));
    }

    #[test]
    #[should_panic(expected = "answered from older than the bound")]
    fn finding_the_entry_before_the_deadline_would_answer_from_an_evicted_one() {
        Protection::DeadlinePrecedesFloors.without(|| a_renewal_meets(End::Key));
    }

    #[test]
    #[should_panic(expected = "answered from older than the bound")]
    fn judging_a_load_by_the_floors_first_would_answer_from_an_old_one() {
        Protection::DeadlinePrecedesFloors.without(|| a_settled_load_meets(End::Api));
    }

    #[test]
    #[should_panic(expected = "answered from older than the bound")]
    fn beginning_with_what_is_applied_would_answer_from_an_old_load() {
        Protection::ProofsPrecedeApplied.without(|| a_settled_load_meets(End::Api));
    }

    #[test]
    #[should_panic(expected = "confirmed, and answered from before")]
    fn lifting_to_what_was_applied_after_the_floors_were_read_would_carry_it_over_one() {
        Protection::AdvancesRestOnTheReading.without(|| a_lift_meets(End::Api));
    }
}
