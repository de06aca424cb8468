//! Every interleaving of those who meet at a cached entry, with every value that the memory model lets them
//! read (R9): the load that brings it, the follow task that ends it, the verifications that read it.
//!
//! `Stamp`, `FloorCell`, `Floors` and `Follower` are the real ones, on loom's atomics. What surrounds them
//! mirrors the agent's shell: `loads.rs`, `verify.rs`, `follow.rs`, `knowledge.rs`. The cache is one slot. moka is
//! linearizable per key, so the slot is an atomic that says whether the entry is in it; an eviction that finds
//! nothing writes nothing there, and orders nobody's other memory.
//!
//! What must hold: a verification that starts after a confirmation is not answered from the old entry (G2),
//! and one that sees an extended proof sees the floors that were raised before it (G1). Each order that was
//! decided against is here too, and loom must find what is wrong with it.
//!
//! `cargo xtask model` runs this with `--cfg loom`; without, there is nothing here.

#![cfg(loom)]

use std::sync::Arc;
use std::time::Duration;

use evictd_core::entry::{Reading, Stamp, Standing};
use evictd_core::floors::{FloorCell, FloorLimits};
use evictd_core::follower::{Effect, Follower, FollowerConfig, evicts_one};
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::lease::{Bound, answers};
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Record, RecordState, RootKeyRecord};
use evictd_core::time::{LeaseTime, StoreTime};
use loom::sync::Mutex;
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

/// How a load puts its entry into the cache.
#[derive(Clone, Copy)]
enum Landing {
    /// Hidden, checked, shown.
    HiddenUntilChecked,
    /// As check-then-act.
    CheckedThenInserted,
    /// Visible at once, and taken out if it was wrong.
    InsertedThenRechecked,
}

/// In which order a verification reads.
#[derive(Clone, Copy)]
enum Verifying {
    /// Deadline and `applied`, entry, floors.
    InOrder,
    /// Entry, floors, deadline.
    DeadlineLast,
    /// Deadline, entry, floors, `applied`.
    AppliedLast,
    /// Entry, deadline, floors.
    EntryFirst,
}

/// In which order the follow task publishes.
#[derive(Clone, Copy)]
enum Publishing {
    /// As the core says: after the floors were raised.
    InOrder,
    /// The proof before the eviction.
    ProofFirst,
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

/// An agent with one entry, cached or about to be, from before position 2.
struct Agent {
    follower: Mutex<Follower>,
    horizon: Arc<FloorCell>,
    applied: AtomicU64,
    proven_at: AtomicU64,
    announced: AtomicU64,
    stamp: Stamp,
    is_cached: AtomicBool,
}

impl Agent {
    /// Its base is position 1, proven long ago. The load was read then, at `read_at` on the clock.
    fn new(end: End, read_at: LeaseTime) -> Self {
        let config = FollowerConfig {
            bound: bound(),
            probe_interval: Duration::from_secs(5),
            request_timeout: Duration::from_secs(1),
            gap_patience: Duration::ZERO,
            floors: FloorLimits::default(),
        };
        let mut follower = Follower::new(config, 1);
        let mut effects = Vec::new();
        follower.poll(LONG_AGO, &mut effects);
        follower.on_probe_answer(1, at(1), LONG_AGO, &mut effects);
        let anchors = follower.anchors(&record(end), &mut effects);
        Self {
            horizon: follower.floors().horizon().clone(),
            follower: Mutex::new(follower),
            applied: AtomicU64::new(at(1).to_bits()),
            proven_at: AtomicU64::new(LONG_AGO.0),
            announced: AtomicU64::new(at(1).to_bits()),
            stamp: Stamp::new(at(1), read_at, anchors),
            is_cached: AtomicBool::new(false),
        }
    }

    /// The entry is in the cache, and visible.
    fn with_entry(self) -> Self {
        self.is_cached.store(true, Ordering::Release);
        self.stamp.show();
        self
    }

    fn evict(&self) {
        // Only what is there is written to.
        let _ = self.is_cached.compare_exchange(true, false, Ordering::AcqRel, Ordering::Acquire);
    }

    fn meets_floors(&self) -> bool {
        self.follower.lock().expect("not poisoned").admits(&HASH, &self.stamp.anchors, self.stamp.as_of())
    }

    /// `Shared::land`.
    fn land(&self, landing: Landing) {
        match landing {
            Landing::HiddenUntilChecked => {
                self.is_cached.store(true, Ordering::Release);
                if self.meets_floors() { self.stamp.show() } else { self.evict() }
            }
            Landing::CheckedThenInserted => {
                if self.meets_floors() {
                    self.stamp.show();
                    self.is_cached.store(true, Ordering::Release);
                }
            }
            Landing::InsertedThenRechecked => {
                self.stamp.show();
                self.is_cached.store(true, Ordering::Release);
                if !self.meets_floors() {
                    self.evict();
                }
            }
        }
    }

    /// `Task::on_live` or `Task::on_probe_answer`, then `Task::perform`. With `proves`, a probe that was sent
    /// after the change is answered too.
    fn end(&self, end: End, proves: bool, publishing: Publishing) {
        let mut effects = Vec::new();
        {
            let mut follower = self.follower.lock().expect("not poisoned");
            let invalidate = |scope| {
                vec![Invalidation {
                    position: at(2),
                    scope,
                    cause: Cause::Deleted,
                    committed_at: StoreTime(0),
                }]
            };
            if proves {
                follower.poll(NOW, &mut Vec::new());
            }
            match end {
                End::Key => {
                    let scope = Scope::Key { hash: HASH, key_id: None, api_id: Some(ApiId::new("api")) };
                    follower.on_live(invalidate(scope), NOW, &mut effects);
                }
                End::Api => follower.on_live(invalidate(Scope::Api(ApiId::new("api"))), NOW, &mut effects),
                End::Flush => {
                    let later = LogPosition::new(2, 1).expect("small");
                    follower.on_tick(later, NOW, &mut effects);
                }
            }
            if proves {
                let head = follower.applied().expect("it has a base");
                follower.on_probe_answer(2, head, NOW, &mut effects);
            }
        }
        if matches!(publishing, Publishing::ProofFirst) {
            effects.sort_by_key(|effect| !matches!(effect, Effect::Proven(_)));
        }
        for effect in effects {
            self.perform(&effect);
        }
    }

    fn perform(&self, effect: &Effect) {
        match effect {
            Effect::Applied { invalidation, .. } => {
                if evicts_one(&invalidation.scope).is_some() {
                    self.evict();
                }
            }
            Effect::Flush(_) => self.evict(),
            Effect::Progress { applied, .. } => self.applied.store(applied.to_bits(), Ordering::Release),
            Effect::Proven(at) => {
                self.proven_at.fetch_max(at.0, Ordering::AcqRel);
            }
            Effect::Announce => {
                self.announced.store(self.applied.load(Ordering::Acquire), Ordering::Release);
            }
            Effect::Widened(_) | Effect::SendProbe { .. } | Effect::SendReplay { .. } => {}
        }
    }

    fn proven_at(&self) -> LeaseTime {
        LeaseTime(self.proven_at.load(Ordering::Acquire))
    }

    fn applied(&self) -> LogPosition {
        LogPosition::from_bits(self.applied.load(Ordering::Acquire))
    }

    fn judge(&self, now: LeaseTime, proven_at: LeaseTime) -> bool {
        let reading = Reading { now, proven_at, applied: LogPosition::ZERO };
        self.stamp.standing(reading, &self.horizon, bound()) == Standing::Servable
    }

    /// `Verifier::cached`: whether a verification at `now` is answered from the entry.
    fn verify(&self, verifying: Verifying, now: LeaseTime) -> bool {
        let cached = || self.is_cached.load(Ordering::Acquire);
        match verifying {
            Verifying::InOrder => {
                let (proven_at, applied) = (self.proven_at(), self.applied());
                let hit = cached() && self.judge(now, proven_at);
                if hit {
                    self.stamp.lift(applied);
                }
                hit
            }
            Verifying::DeadlineLast => {
                let in_time_of_its_own = cached() && self.judge(now, now);
                in_time_of_its_own && bound().allows(now, self.stamp.read_at, self.proven_at())
            }
            Verifying::AppliedLast => {
                let proven_at = self.proven_at();
                let hit = cached() && self.judge(now, proven_at);
                if hit {
                    self.stamp.lift(self.applied());
                }
                hit
            }
            Verifying::EntryFirst => {
                let found = cached();
                found && self.judge(now, self.proven_at())
            }
        }
    }

    /// Whether the change was confirmed before now.
    fn has_confirmed(&self) -> bool {
        LogPosition::from_bits(self.announced.load(Ordering::Acquire)) > at(1)
    }
}

/// A load lands while the change that it lacks is applied; a verification starts after the confirmation.
fn a_load_meets(end: End, landing: Landing) {
    loom::model(move || {
        // In time: only the floors and the eviction protect.
        let agent = loom::sync::Arc::new(Agent::new(end, NOW));
        let (loader, follow) = (agent.clone(), agent.clone());
        let loader = thread::spawn(move || loader.land(landing));
        let follow = thread::spawn(move || follow.end(end, false, Publishing::InOrder));
        if agent.has_confirmed() {
            assert!(!agent.verify(Verifying::InOrder, NOW), "confirmed, and answered from before");
        }
        loader.join().expect("the load ends");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(Verifying::InOrder, NOW), "confirmed, and answered from before");
    });
}

#[test]
fn no_load_brings_back_what_was_confirmed() {
    for end in ENDS {
        a_load_meets(end, Landing::HiddenUntilChecked);
    }
}

#[test]
#[should_panic(expected = "confirmed, and answered from before")]
fn checking_before_inserting_would_bring_it_back() {
    a_load_meets(End::Key, Landing::CheckedThenInserted);
}

#[test]
#[should_panic(expected = "confirmed, and answered from before")]
fn checking_what_is_visible_already_would_bring_it_back_for_a_moment() {
    a_load_meets(End::Key, Landing::InsertedThenRechecked);
}

/// The lease ran out long ago. While a repair applies the change and proves so, a verification reads.
fn a_renewal_meets(end: End, verifying: Verifying, publishing: Publishing) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(Agent::new(end, LONG_AGO).with_entry());
        let follow = agent.clone();
        let follow = thread::spawn(move || follow.end(end, true, publishing));
        assert!(!agent.verify(verifying, NOW), "answered from older than the bound");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(verifying, NOW), "answered from older than the bound");
    });
}

#[test]
fn who_sees_a_renewed_lease_sees_what_was_raised_before_it() {
    for end in ENDS {
        a_renewal_meets(end, Verifying::InOrder, Publishing::InOrder);
    }
}

#[test]
#[should_panic(expected = "answered from older than the bound")]
fn reading_the_deadline_after_the_floors_would_answer_from_an_old_entry() {
    a_renewal_meets(End::Api, Verifying::DeadlineLast, Publishing::InOrder);
}

#[test]
#[should_panic(expected = "answered from older than the bound")]
fn getting_the_entry_before_the_deadline_would_answer_from_an_evicted_one() {
    a_renewal_meets(End::Key, Verifying::EntryFirst, Publishing::InOrder);
}

#[test]
#[should_panic(expected = "answered from older than the bound")]
fn publishing_the_proof_before_the_eviction_would_renew_the_old_entry() {
    a_renewal_meets(End::Key, Verifying::InOrder, Publishing::ProofFirst);
}

/// A hit lifts its entry while the change is applied; a verification starts after the confirmation.
fn a_lift_meets(end: End, verifying: Verifying) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(Agent::new(end, NOW).with_entry());
        let (hit, follow) = (agent.clone(), agent.clone());
        let hit = thread::spawn(move || hit.verify(verifying, NOW));
        let follow = thread::spawn(move || follow.end(end, false, Publishing::InOrder));
        if agent.has_confirmed() {
            assert!(!agent.verify(Verifying::InOrder, NOW), "confirmed, and answered from before");
        }
        hit.join().expect("the hit ends");
        follow.join().expect("the change is applied");
        assert!(!agent.verify(Verifying::InOrder, NOW), "confirmed, and answered from before");
    });
}

#[test]
fn no_lift_carries_an_entry_over_a_floor_that_it_did_not_meet() {
    for end in ENDS {
        a_lift_meets(end, Verifying::InOrder);
    }
}

#[test]
#[should_panic(expected = "confirmed, and answered from before")]
fn lifting_to_what_was_applied_after_the_floors_were_read_would_carry_it_over_one() {
    a_lift_meets(End::Api, Verifying::AppliedLast);
}

/// In which order a load's answer is judged.
#[derive(Clone, Copy)]
enum Judging {
    /// When it began: the proof, then `applied`. Now: the proof, then the floors.
    InOrder,
    /// Now: the floors, then the proof.
    FloorsFirst,
    /// When it began: `applied`, then the proof.
    AppliedFirst,
}

/// The lease ran out long ago, and what a load brings was read back then. While a repair applies the change
/// and proves so, a verification begins and the load is judged for it (`Knowledge::begin`, `Shared::answers`).
fn a_landed_load_meets(end: End, judging: Judging) {
    loom::model(move || {
        let agent = loom::sync::Arc::new(Agent::new(end, LONG_AGO));
        let follow = agent.clone();
        let follow = thread::spawn(move || follow.end(end, true, Publishing::InOrder));
        let (began_proven_at, began_applied) = match judging {
            Judging::InOrder | Judging::FloorsFirst => (agent.proven_at(), agent.applied()),
            Judging::AppliedFirst => {
                let applied = agent.applied();
                (agent.proven_at(), applied)
            }
        };
        let floor = || agent.follower.lock().expect("not poisoned").floor(&HASH, &agent.stamp.anchors);
        let (proven_at, floor) = match judging {
            Judging::InOrder | Judging::AppliedFirst => (agent.proven_at(), floor()),
            Judging::FloorsFirst => {
                let floor = floor();
                (agent.proven_at(), floor)
            }
        };
        let as_of = agent.stamp.as_of();
        let proof = if as_of >= floor { proven_at } else { began_proven_at };
        let answered =
            answers(as_of, floor, began_applied) && bound().allows(NOW, agent.stamp.read_at, proof);
        assert!(!answered, "answered from older than the bound");
        follow.join().expect("the change is applied");
    });
}

#[test]
fn no_load_is_vouched_for_by_a_proof_that_came_after_its_floor() {
    for end in ENDS {
        a_landed_load_meets(end, Judging::InOrder);
    }
}

#[test]
#[should_panic(expected = "answered from older than the bound")]
fn judging_a_load_by_the_floors_first_would_answer_from_an_old_one() {
    a_landed_load_meets(End::Api, Judging::FloorsFirst);
}

#[test]
#[should_panic(expected = "answered from older than the bound")]
fn beginning_with_what_is_applied_would_answer_from_an_old_load() {
    a_landed_load_meets(End::Api, Judging::AppliedFirst);
}
