//! Every interleaving of the accesses to a cached entry, with every value that the memory model
//! allows them to read (R9): by the load that inserts it, the follow task that voids it, and the
//! verifications that read it.
//!
//! All three run the agent's code, `evictd_core::serving`, on loom's atomics. Only the cache is a
//! fake, with room for one entry. moka is linearizable per key, so an atomic that says whether the
//! entry is cached is enough. An eviction that finds nothing writes nothing, so that it doesn't
//! order other memory.
//!
//! Two promises are checked. A verification that starts after a confirmation is not answered from
//! the old entry (G2). One that sees an extended proof sees the floors that were raised before it
//! (G1). Each rejected order of steps is a protection that can be switched off, and loom must find
//! what breaks without it.
//!
//! `cargo xtask model` runs this with `--cfg loom`, and its `--negative-controls` the controls.
//! Other builds skip it.

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

/// Depends on two floors, or on one for a flush: floors are in a map whose order differs from run
/// to run, and loom must see the same steps each time.
fn record(by: VoidedBy) -> Record {
    if matches!(by, VoidedBy::Flush) {
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

/// What voids the entry.
#[derive(Clone, Copy)]
enum VoidedBy {
    Key,
    Api,
    /// A new epoch, which flushes.
    Flush,
}

const ALL_CAUSES: [VoidedBy; 3] = [VoidedBy::Key, VoidedBy::Api, VoidedBy::Flush];

#[derive(Debug)]
struct LoomEntry(Validity);

impl CacheEntry for LoomEntry {
    fn validity(&self) -> &Validity {
        &self.0
    }
}

/// A cache of one entry.
struct OneEntryCache {
    entry: Arc<LoomEntry>,
    is_cached: AtomicBool,
}

impl OneEntryCache {
    /// Writes nothing if it is empty.
    fn empty(&self) -> bool {
        self.is_cached.compare_exchange(true, false, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl EntryCache for OneEntryCache {
    type Entry = LoomEntry;

    fn get(&self, _: &KeyHash) -> Option<Arc<LoomEntry>> {
        self.is_cached.load(Ordering::Acquire).then(|| self.entry.clone())
    }

    fn insert_hidden(&self, _: KeyHash, _: Arc<LoomEntry>) {
        self.is_cached.store(true, Ordering::Release);
    }

    fn evict(&self, _: &KeyHash) -> Option<Arc<LoomEntry>> {
        self.empty().then(|| self.entry.clone())
    }

    fn clear(&self) {
        self.empty();
    }
}

/// Before there is an entry.
struct NoCache;

impl EntryCache for NoCache {
    type Entry = LoomEntry;

    fn get(&self, _: &KeyHash) -> Option<Arc<LoomEntry>> {
        None
    }

    fn insert_hidden(&self, _: KeyHash, _: Arc<LoomEntry>) {}

    fn evict(&self, _: &KeyHash) -> Option<Arc<LoomEntry>> {
        None
    }

    fn clear(&self) {}
}

/// An agent with one entry, cached or about to be, from before position 2.
struct LoomAgent {
    state: AgentState,
    cache: OneEntryCache,
    announced: AtomicU64,
}

impl LoomAgent {
    /// Its base is position 1, proven long ago. The load was read at `read_at`, as of the base.
    fn new(by: VoidedBy, read_at: LeaseTime) -> (Self, LoadedEntry<LoomEntry>) {
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
            LoadedEntry::new(&state, answer, record(by), &mut effects, |_, validity| LoomEntry(validity));
        let cache = OneEntryCache { entry: loaded.entry().clone(), is_cached: AtomicBool::new(false) };
        (Self { state, cache, announced: AtomicU64::new(at(1).to_bits()) }, loaded)
    }

    /// With its entry cached and shown.
    fn with_entry(by: VoidedBy, read_at: LeaseTime) -> Self {
        let (agent, loaded) = Self::new(by, read_at);
        agent.settle(loaded.insert(&agent.cache));
        agent
    }

    fn settle(&self, inserted: InsertedEntry<LoomEntry>) {
        inserted.settle(&self.state, &self.cache);
    }

    /// Applies the change. With `proves`, a probe that was sent after the change is answered, too.
    /// The answer comes before the change, so that applying the change gives the proof.
    fn void(&self, by: VoidedBy, proves: bool) {
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
            if proves && !matches!(by, VoidedBy::Flush) {
                follower.on_probe_answer(2, &change, true, NOW, &mut effects);
            }
            match by {
                VoidedBy::Key => {
                    let scope = Scope::Key { hash: HASH, key_id: None, api_id: Some(ApiId::new("api")) };
                    follower.on_live(&change, invalidate(scope), NOW, &mut effects);
                }
                VoidedBy::Api => {
                    follower.on_live(&change, invalidate(Scope::Api(ApiId::new("api"))), NOW, &mut effects);
                }
                // A new epoch begins with the answer to a probe.
                VoidedBy::Flush => {
                    let later = voucher(LogPosition::new(2, 1).expect("small"));
                    follower.on_probe_answer(2, &later, proves, NOW, &mut effects);
                }
            }
        }
        for effect in effects {
            self.state.perform(&effect, &self.cache);
            if effect == Effect::Announce {
                self.announced.store(self.state.applied().to_bits(), Ordering::Release);
            }
        }
    }

    /// Whether a verification at `now` is answered from the entry.
    fn verify(&self, now: LeaseTime) -> bool {
        let candidate = self.state.begin(now).find(&self.state, &self.cache, &HASH);
        match candidate.map(|candidate| candidate.judge(&self.state)) {
            Some(HitVerdict::Servable(hit)) => {
                hit.answer(&self.state);
                true
            }
            _ => false,
        }
    }

    fn has_confirmed(&self) -> bool {
        LogPosition::from_bits(self.announced.load(Ordering::Acquire)) > at(1)
    }
}

/// A load is inserted while the change that it lacks is applied. A verification starts after the
/// confirmation.
fn a_load_meets(by: VoidedBy) {
    loom::model(move || {
        // The read is recent, so only the floors and the eviction protect.
        let (agent, loaded) = LoomAgent::new(by, NOW);
        let agent = loom::sync::Arc::new(agent);
        let (loader, follow) = (agent.clone(), agent.clone());
        let loader = thread::spawn(move || loader.settle(loaded.insert(&loader.cache)));
        let follow = thread::spawn(move || follow.void(by, false));
        if agent.has_confirmed() {
            assert!(!agent.verify(NOW), "confirmed, and served from before");
        }
        loader.join().expect("the load completes");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(NOW), "confirmed, and served from before");
    });
}

#[test]
fn no_load_reverts_a_confirmed_change() {
    ALL_CAUSES.into_iter().for_each(a_load_meets);
}

/// The lease ran out long ago. A verification reads while a repair applies the change and renews
/// the lease.
fn a_renewal_meets(by: VoidedBy) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(LoomAgent::with_entry(by, LONG_AGO));
        let follow = agent.clone();
        let follow = thread::spawn(move || follow.void(by, true));
        assert!(!agent.verify(NOW), "served from older than the bound");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(NOW), "served from older than the bound");
    });
}

#[test]
fn renewed_lease_is_seen_with_the_floors_raised_before_it() {
    ALL_CAUSES.into_iter().for_each(a_renewal_meets);
}

/// A hit advances its entry while the change is applied. A verification starts after the
/// confirmation.
fn a_hit_meets(by: VoidedBy) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(LoomAgent::with_entry(by, NOW));
        let (hit, follow) = (agent.clone(), agent.clone());
        let hit = thread::spawn(move || hit.verify(NOW));
        let follow = thread::spawn(move || follow.void(by, false));
        if agent.has_confirmed() {
            assert!(!agent.verify(NOW), "confirmed, and served from before");
        }
        hit.join().expect("the hit completes");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(NOW), "confirmed, and served from before");
    });
}

#[test]
fn hit_never_advances_an_entry_over_a_floor() {
    ALL_CAUSES.into_iter().for_each(a_hit_meets);
}

/// The lease ran out long ago, and the load was read back then. A verification begins and the load
/// is judged for it, while a repair applies the change and renews the lease.
fn a_settled_load_meets(by: VoidedBy) {
    loom::model(move || {
        let (agent, loaded) = LoomAgent::new(by, LONG_AGO);
        let agent = loom::sync::Arc::new(agent);
        let settled = loaded.insert(&agent.cache).settle(&agent.state, &agent.cache);
        let follow = agent.clone();
        let follow = thread::spawn(move || follow.void(by, true));
        let began = agent.state.begin(NOW);
        assert!(settled.answer(&agent.state, began, NOW).is_none(), "served from older than the bound");
        follow.join().expect("the change is applied");
    });
}

#[test]
fn newer_proof_does_not_cover_a_load_below_its_floor() {
    ALL_CAUSES.into_iter().for_each(a_settled_load_meets);
}

/// The rejected orders. A protection that is switched off is off on loom's threads too: they all
/// run on this one.
#[cfg(evictd_negative_controls)]
mod controls {
    use evictd_core::protection::Protection;

    use super::*;

    #[test]
    #[should_panic(expected = "confirmed, and served from before")]
    fn checking_before_inserting_reverts_the_change() {
        Protection::ChecksFollowInsertions.without(|| a_load_meets(VoidedBy::Key));
    }

    #[test]
    #[should_panic(expected = "confirmed, and served from before")]
    fn showing_before_checking_reverts_the_change() {
        Protection::EntriesAppearChecked.without(|| a_load_meets(VoidedBy::Key));
    }

    #[test]
    #[should_panic(expected = "confirmed, and served from before")]
    fn announcing_before_evicting_serves_the_old_entry() {
        Protection::EvictionPrecedesApplied.without(|| a_hit_meets(VoidedBy::Key));
    }

    #[test]
    #[should_panic(expected = "served from older than the bound")]
    fn publishing_the_proof_before_evicting_renews_the_old_entry() {
        Protection::EvictionPrecedesApplied.without(|| a_renewal_meets(VoidedBy::Key));
    }

    #[test]
    #[should_panic(expected = "served from older than the bound")]
    fn reading_the_deadline_after_floors_serves_the_old_entry() {
        Protection::DeadlinePrecedesFloors.without(|| a_renewal_meets(VoidedBy::Api));
    }

    #[test]
    #[should_panic(expected = "served from older than the bound")]
    fn finding_the_entry_before_the_deadline_serves_an_evicted_one() {
        Protection::DeadlinePrecedesFloors.without(|| a_renewal_meets(VoidedBy::Key));
    }

    #[test]
    #[should_panic(expected = "served from older than the bound")]
    fn reading_floors_before_the_proof_serves_an_old_load() {
        Protection::DeadlinePrecedesFloors.without(|| a_settled_load_meets(VoidedBy::Api));
    }

    #[test]
    #[should_panic(expected = "served from older than the bound")]
    fn reading_applied_before_the_proof_serves_an_old_load() {
        Protection::ProofsPrecedeApplied.without(|| a_settled_load_meets(VoidedBy::Api));
    }

    #[test]
    #[should_panic(expected = "confirmed, and served from before")]
    fn advancing_past_the_floors_read_serves_the_old_entry() {
        Protection::AdvancesRestOnTheReading.without(|| a_hit_meets(VoidedBy::Api));
    }
}
