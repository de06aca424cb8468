//! An agent: the real follower, floors and stamps of the core, in a shell that does what the agent's does.
//!
//! The shell's steps are atomic here: what readers and writers see between them is the subject of
//! `evictd-core/tests/loom.rs`. Messages to an agent are never taken away, so each may arrive late, several
//! times, in any order or not at all.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use evictd_core::entry::{Reading, Stamp, Standing};
use evictd_core::follower::{Effect, Follower, evicts_one};
use evictd_core::lease::answers;
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::time::LeaseTime;

use crate::script::{Key, View};
use crate::store::Replay;
use crate::world::{EpochsBegin, Flaw, Tick, World};

/// A cached record: what of the store's history is in it, and the core's stamp.
#[derive(Debug)]
pub struct Entry {
    /// The changes of its key that it includes.
    pub view: View,
    /// When it is servable.
    pub stamp: Stamp,
}

/// What a verification knew when it began, and what it is owed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Verification {
    /// When it began.
    pub at: Tick,
    /// What was proven then.
    pub proven_at: LeaseTime,
    /// What was applied and so announced then.
    pub applied: LogPosition,
    /// The changes whose receipts said then that everybody had confirmed (G4).
    pub confirmed: View,
    /// The changes that this agent had confirmed then (G2).
    pub owed: View,
}

/// What a load read of the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Read {
    /// The changes of its key in the snapshot.
    pub view: View,
    /// The head in the same snapshot.
    pub as_of: LogPosition,
    /// How long the publisher's fence was old.
    pub fence_age: Tick,
    /// Whether the origin has a fence: a replica's reads vouch for nothing.
    pub vouched: bool,
}

/// A load under way, with one of the verifications that wait for it: the one that began last of those that
/// the checker chose to look at.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Flight {
    /// When it was sent.
    pub sent_at: Tick,
    /// Who waits.
    pub waiter: Verification,
    /// What it read, once it was read.
    pub read: Option<Read>,
}

/// A replay that was asked for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Wanted {
    /// The question's number.
    pub nonce: u64,
    /// The epoch of both ends.
    pub epoch: u32,
    /// The first position.
    pub from: u64,
    /// The last one.
    pub to: u64,
}

/// An agent process.
#[derive(Debug)]
pub struct Agent {
    /// Counts its restarts.
    pub process: u8,
    /// The protocol.
    pub follower: Follower,
    /// As published to verifications, and announced.
    pub applied: LogPosition,
    /// As published to verifications.
    pub proven_at: LeaseTime,
    /// By key.
    pub cache: [Option<Entry>; 2],
    /// By key.
    pub flights: [Option<Flight>; 2],
    /// Loads that it may still send.
    pub loads_left: u8,
    /// When a round last wrote it into the roster.
    pub rostered: Option<Tick>,
    /// Probes: number and what it had seen.
    pub asked: BTreeSet<(u64, LogPosition)>,
    /// Answers to probes: number and head.
    pub proofs: BTreeSet<(u64, LogPosition)>,
    /// Replays asked for.
    pub wanted: BTreeSet<Wanted>,
    /// Answers to replays.
    pub replays: BTreeSet<(u64, Replay)>,
    /// Of all the above: two agents with the same one behave alike.
    print: u64,
}

impl PartialEq for Agent {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Hash for Agent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

impl Agent {
    /// A process that knows nothing. Its questions have numbers that no other process uses.
    pub fn new(world: &World, process: u8) -> Self {
        let nonce = 1 + 1000 * u64::from(process);
        let mut agent = Self {
            process,
            follower: Follower::new(world.follower_config(), nonce),
            applied: LogPosition::ZERO,
            proven_at: LeaseTime(0),
            cache: [None, None],
            flights: [None, None],
            loads_left: world.loads,
            rostered: None,
            asked: BTreeSet::new(),
            proofs: BTreeSet::new(),
            wanted: BTreeSet::new(),
            replays: BTreeSet::new(),
            print: 0,
        };
        agent.seal(world, Tick(0));
        agent
    }

    /// The print, to bring agents that are alike into one order.
    pub fn print(&self) -> u64 {
        self.print
    }

    /// This agent after `step`, whose effects were performed in their order.
    #[must_use]
    pub fn after(&self, world: &World, now: Tick, step: impl FnOnce(&mut Self, &mut Vec<Effect>)) -> Self {
        let mut agent = self.fork();
        let mut effects = Vec::new();
        step(&mut agent, &mut effects);
        for effect in effects {
            agent.perform(effect);
        }
        agent.seal(world, now);
        agent
    }

    fn fork(&self) -> Self {
        let (follower, mut crossing) = self.follower.fork();
        let cache = self.cache.each_ref().map(|entry| {
            entry.as_ref().map(|Entry { view, stamp }| {
                let copy = Stamp::new(stamp.as_of(), stamp.read_at, crossing.anchors(&stamp.anchors));
                if stamp.is_shown() {
                    copy.show();
                }
                Entry { view: *view, stamp: copy }
            })
        });
        Self {
            follower,
            cache,
            flights: self.flights.clone(),
            asked: self.asked.clone(),
            proofs: self.proofs.clone(),
            wanted: self.wanted.clone(),
            replays: self.replays.clone(),
            ..*self
        }
    }

    /// As the agent's follow task does.
    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Applied { invalidation, .. } => {
                let evicted = evicts_one(&invalidation.scope);
                for key in Key::ALL.into_iter().filter(|key| evicted == Some(&key.key_hash())) {
                    self.cache[key.index()] = None;
                }
            }
            Effect::Flush(_) => self.cache = [None, None],
            Effect::Progress { applied, .. } => self.applied = applied,
            Effect::Proven(at) => self.proven_at = self.proven_at.max(at),
            Effect::SendProbe { nonce, seen, .. } => {
                self.asked.insert((nonce, seen));
            }
            Effect::SendReplay { nonce, epoch, from, to, .. } => {
                self.wanted.insert(Wanted { nonce, epoch, from, to });
            }
            // Whatever is applied is taken for announced: nobody can have heard of more.
            Effect::Widened(_) | Effect::Announce => {}
        }
    }

    /// Drops what can have no effect any more, and takes the print.
    fn seal(&mut self, world: &World, now: Tick) {
        if world.answers_are_matched() {
            let open = |nonce: &u64| self.follower.awaits(*nonce);
            if world.epochs_begin != EpochsBegin::WhenAnAgentHasSeenMore {
                self.asked.retain(|(nonce, _)| open(nonce));
            }
            self.proofs.retain(|(nonce, _)| open(nonce));
            self.wanted.retain(|wanted| open(&wanted.nonce));
            self.replays.retain(|(nonce, _)| open(nonce));
        }
        if world.missing != Some(Protection::HitsMeetFloors) {
            let horizon = self.follower.floors().horizon().get();
            for entry in &mut self.cache {
                let floor = entry.as_ref().map(|entry| entry.stamp.anchors.floor().max(horizon));
                // Floors never sink.
                entry.take_if(|entry| Some(entry.stamp.as_of()) < floor);
            }
        }
        self.print = self.digest(now);
    }

    fn digest(&self, now: Tick) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.follower.digest(now.lease_time(), &mut hasher);
        (self.process, self.applied, self.proven_at).hash(&mut hasher);
        for entry in &self.cache {
            let entry = entry.as_ref().map(|Entry { view, stamp }| {
                // It lives by the later of the two, and `proven_at` never goes back.
                let lives_by = stamp.read_at.max(self.proven_at);
                (view, stamp.as_of(), lives_by, stamp.anchors.floor(), stamp.is_shown())
            });
            entry.hash(&mut hasher);
        }
        (&self.flights, self.loads_left, self.rostered).hash(&mut hasher);
        let since = |nonce: u64| self.follower.questions_since(nonce);
        for (nonce, seen) in &self.asked {
            (0, since(*nonce), seen).hash(&mut hasher);
        }
        for (nonce, head) in &self.proofs {
            (1, since(*nonce), head).hash(&mut hasher);
        }
        for Wanted { nonce, .. } in &self.wanted {
            (2, since(*nonce)).hash(&mut hasher);
        }
        for (nonce, replay) in &self.replays {
            (3, since(*nonce), replay).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// The entry that a verification at `now` is answered from at once, if there is one (R9's order).
    pub fn hit(&self, world: &World, key: Key, now: Tick) -> Option<&Entry> {
        let reading = Reading { now: now.lease_time(), proven_at: self.proven_at, applied: self.applied };
        let entry = self.cache[key.index()].as_ref()?;
        let standing = entry.stamp.standing(reading, self.follower.floors().horizon(), world.bound());
        (standing == Standing::Servable).then_some(entry)
    }

    /// What a load brought is cached if it may be, and answers its waiter if it may: then with what view.
    pub fn land(&mut self, world: &World, key: Key, now: Tick, effects: &mut Vec<Effect>) -> Option<Landed> {
        let Flight { sent_at, waiter, read } = self.flights[key.index()].take()?;
        let Read { view, as_of, fence_age, vouched } = read?;
        let record = world.script.record(key, view);
        let anchors = self.follower.anchors(&record, effects);
        let dated = if world.flaw == Some(Flaw::LoadsDateFromTheirArrival) { now } else { sent_at };
        let read_at = if vouched || world.flaw == Some(Flaw::ReplicasVouchForTheirReads) {
            dated.lease_time().before(fence_age.duration())
        } else {
            LeaseTime(0)
        };
        let floor = self.follower.floor(&key.key_hash(), &anchors);
        let proof = if as_of >= floor { self.proven_at } else { waiter.proven_at };
        let answered =
            answers(as_of, floor, waiter.applied) && world.bound().allows(now.lease_time(), read_at, proof);
        // Hidden, checked, shown: in one step here.
        let stamp = Stamp::new(as_of, read_at, anchors);
        self.cache[key.index()] = None;
        if self.follower.admits(&key.key_hash(), &stamp.anchors, as_of) {
            stamp.show();
            self.cache[key.index()] = Some(Entry { view, stamp });
        }
        answered.then_some(Landed { view, waiter })
    }
}

/// An answer that a load gave.
#[derive(Clone, Copy, Debug)]
pub struct Landed {
    /// What it was based on.
    pub view: View,
    /// Whom it was given to.
    pub waiter: Verification,
}
