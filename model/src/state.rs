//! A state of a world, and the actions that lead to the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::history::Incarnation;
use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;

use crate::agent::{ModelAgent, ModelVerification, Read};
use crate::script::{ChangeId, ModelKey, View};
use crate::store::{Mark, ModelStore};
use crate::world::{SmallWorld, Tick, WorldFlaw};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LostChange {
    pub change: ChangeId,
    pub at: Tick,
    /// The beginning of the epoch in which it never happened.
    pub void_from: Option<LogPosition>,
}

/// A probe as a publisher keeps it: number and what was seen. The worlds with rounds have one agent.
pub type QueuedProbe = (u64, Option<Mark>);

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ModelPublisher {
    pub rounds: Rounds<QueuedProbe>,
    /// The round under way: the probes that it answers, and its head.
    pub running: Option<(Vec<QueuedProbe>, Mark)>,
}

#[derive(Clone, PartialEq, Hash, Debug)]
pub struct SmallState {
    pub now: Tick,
    pub store: ModelStore,
    /// Another one, that is behind or not.
    pub standby: ModelStore,
    /// Whether the standby was promoted by mistake.
    pub is_stray: bool,
    /// The one before the fail-over, and when its fence was last raised.
    pub old_primary: Option<(ModelStore, Tick)>,
    /// The last successful round.
    pub fence: Tick,
    /// Sent on the live feed, ever.
    pub live: BTreeMap<Mark, BTreeSet<ChangeId>>,
    /// Heads that ticks may hold.
    pub heads: BTreeSet<Mark>,
    /// Incarnations that ended, as their publishers said.
    pub ended: BTreeSet<Incarnation>,
    /// The agents, in the order of their prints: they are alike.
    pub agents: Vec<Arc<ModelAgent>>,
    /// Those with rounds that take their time.
    pub publishers: Vec<ModelPublisher>,
    /// Committed, and gone.
    pub lost: Vec<LostChange>,
    /// Changes that were committed so far, lost ones included.
    pub committed: u8,
    pub failovers: u8,
    pub epochs: u8,
    pub restarts: u8,
    /// Until then the roster keeps a process that ended.
    pub rostered_until: Tick,
    pub reconnects: u8,
    /// A wrong answer was given.
    pub broken: Option<Rule>,
}

/// Where a load reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReadSource {
    Primary,
    Replica,
    /// From the primary of before the fail-over.
    OldPrimary,
}

/// What can happen. Agents and publishers by their places in the state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SmallAction {
    Pass,
    Commit,
    Number,
    CatchUp,
    Stray,
    FailOver,
    Purge,
    Poll(usize),
    Reconnect(usize),
    Restart(usize),
    ReceiveLive(usize, Mark, ChangeId),
    ReceiveTick(usize, Mark),
    ReceiveEnd(usize, Incarnation),
    Round(usize, u64),
    ReceiveProof(usize, u64, Mark),
    Replay(usize, u64),
    ReceiveReplay(usize, u64, usize),
    Verify(usize, ModelKey),
    Read(usize, ModelKey, ReadSource),
    CompleteLoad(usize, ModelKey),
    Arrive(usize, u64),
    BeginRound(usize),
    EndRound(usize),
    Crash(usize),
}

impl fmt::Display for SmallAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("a tick passes"),
            Self::Commit => f.write_str("the next change commits"),
            Self::Number => f.write_str("the sequencer numbers what is committed"),
            Self::CatchUp => f.write_str("the standby catches up"),
            Self::Stray => f.write_str("the standby is promoted by mistake, and numbers a log of its own"),
            Self::FailOver => f.write_str("the standby becomes the primary"),
            Self::Purge => f.write_str("the log is purged"),
            Self::Poll(a) => write!(f, "agent {a} asks what is due"),
            Self::Reconnect(a) => write!(f, "agent {a} is connected again"),
            Self::Restart(a) => write!(f, "agent {a} restarts"),
            Self::ReceiveLive(a, mark, change) => {
                write!(f, "agent {a} receives change {} at {}", change.0, mark.at)
            }
            Self::ReceiveTick(a, head) => write!(f, "agent {a} receives a tick: the head is {}", head.at),
            Self::ReceiveEnd(a, incarnation) => {
                write!(f, "agent {a} receives that incarnation {incarnation} ended")
            }
            Self::Round(a, nonce) => write!(f, "a round answers agent {a}'s probe {nonce}"),
            Self::ReceiveProof(a, nonce, head) => {
                write!(f, "agent {a} receives the answer to probe {nonce}: the head is {}", head.at)
            }
            Self::Replay(a, nonce) => write!(f, "a publisher answers agent {a}'s replay {nonce}"),
            Self::ReceiveReplay(a, nonce, _) => write!(f, "agent {a} receives the answer to replay {nonce}"),
            Self::Verify(a, key) => write!(f, "a verification of key {key:?} begins at agent {a}"),
            Self::Read(a, key, origin) => {
                write!(f, "agent {a}'s load of key {key:?} is read from {origin:?}")
            }
            Self::CompleteLoad(a, key) => write!(f, "agent {a}'s load of key {key:?} arrives"),
            Self::Arrive(p, nonce) => write!(f, "probe {nonce} arrives at publisher {p}"),
            Self::BeginRound(p) => write!(f, "publisher {p} begins a round: its transaction commits"),
            Self::EndRound(p) => write!(f, "publisher {p} ends its round, and answers"),
            Self::Crash(p) => write!(f, "publisher {p} crashes and is restarted"),
        }
    }
}

impl SmallState {
    pub fn start(world: &SmallWorld) -> Self {
        let store = ModelStore::default();
        let publisher = ModelPublisher { rounds: Rounds::new(Duration::ZERO, 8), running: None };
        Self {
            now: Tick(0),
            standby: store.clone(),
            heads: BTreeSet::from([store.mark()]),
            ended: BTreeSet::new(),
            store,
            is_stray: false,
            old_primary: None,
            fence: Tick(0),
            live: BTreeMap::new(),
            agents: (0..world.agents).map(|_| Arc::new(ModelAgent::new(world, 0))).collect(),
            publishers: if world.rounds { vec![publisher] } else { Vec::new() },
            lost: Vec::new(),
            committed: 0,
            failovers: 0,
            epochs: 0,
            restarts: 0,
            rostered_until: Tick(0),
            reconnects: 0,
            broken: None,
        }
    }

    /// One transaction of the sequencer or a round.
    pub fn number(&mut self, seen_epoch: u32) {
        let before = self.store.mark();
        let (numbered, epoch_began) = self.store.number(seen_epoch, u32::from(self.failovers) + 1);
        if epoch_began {
            self.epochs += 1;
            self.ended.insert(before.incarnation);
            let begins =
                LogPosition::new(self.store.head.epoch(), self.store.head.position() - numbered.len() as u64);
            for lost in self.lost.iter_mut().filter(|lost| lost.void_from.is_none()) {
                lost.void_from = begins;
            }
        }
        for (position, change) in numbered {
            self.live.entry(self.store.mark_at(position)).or_default().insert(change);
        }
        self.heads.insert(self.store.mark());
    }

    pub fn fail_over(&mut self, world: &SmallWorld) {
        if world.demoted {
            self.standby = self.store.clone();
        }
        let kept = self.standby.view();
        let gone = self.store.rows.iter().filter(|row| !kept.includes(row.change));
        let gone: Vec<LostChange> =
            gone.map(|row| LostChange { change: row.change, at: self.now, void_from: None }).collect();
        self.lost.extend(gone);
        let old = std::mem::replace(&mut self.store, self.standby.clone());
        self.failovers += 1;
        if world.demoted {
            self.old_primary = Some((old, self.fence));
        }
    }

    pub fn raise_fence(&mut self, world: &SmallWorld) {
        if world.demoted {
            self.fence = self.now;
        }
    }

    pub fn read(&self, world: &SmallWorld, key: ModelKey, origin: ReadSource) -> Option<Read> {
        let age = |fence| if world.demoted { self.now.since(fence) } else { Tick(0) };
        let (store, fence_age) = match origin {
            ReadSource::Primary => (&self.store, age(self.fence)),
            ReadSource::Replica => (&self.standby, Tick(0)),
            ReadSource::OldPrimary => self.old_primary.as_ref().map(|(store, fence)| (store, age(*fence)))?,
        };
        let fence_age = if world.flaw == Some(WorldFlaw::FencesAreIgnored) { Tick(0) } else { fence_age };
        let view = store.view().and(world.script.of(key));
        Some(Read { view, as_of: store.mark(), fence_age, vouched: origin != ReadSource::Replica })
    }

    pub fn verification(&self, world: &SmallWorld, agent: &ModelAgent, key: ModelKey) -> ModelVerification {
        ModelVerification {
            at: self.now,
            reading: agent.state.begin(self.now.lease_time()),
            confirmed: self.confirmed_by_all(world).and(world.script.of(key)),
            owed: self.store.covered(agent.applied()).and(world.script.of(key)),
        }
    }

    /// Replaces an agent; `None` if nothing changed.
    pub fn with(mut self, index: usize, agent: ModelAgent) -> Option<Self> {
        if *self.agents[index] == agent {
            return None;
        }
        self.agents[index] = Arc::new(agent);
        Some(self)
    }

    /// Agents are alike, so their order means nothing.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.agents.sort_by_key(|agent| agent.print());
        self
    }

    /// The changes whose receipts may be confirmed: every process of the roster has applied them, and announced it
    /// at once. The roster keeps a process that ended for a while.
    pub fn confirmed_by_all(&self, world: &SmallWorld) -> View {
        if world.agents < 2 || self.now < self.rostered_until {
            return View::default();
        }
        let rostered = self.agents.iter().filter(|agent| agent.rostered.is_some());
        rostered
            .map(|agent| agent.applied())
            .min()
            .map_or_else(View::default, |least| self.store.covered(least))
    }
}
