//! A state of a world, and the actions that lead to the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::history::Incarnation;
use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;

use crate::agent::{ModelAgent, ModelVerification, Read};
use crate::defect::Flaw;
use crate::script::{ChangeId, View};
use crate::store::{Mark, ModelStore};
use crate::world::{SmallWorld, Tick};

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

#[derive(Clone, PartialEq, Hash, Debug, Default)]
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
    /// All that was ever sent on the live feed.
    pub live: BTreeMap<Mark, BTreeSet<ChangeId>>,
    /// Heads that ticks may hold.
    pub heads: BTreeSet<Mark>,
    /// Incarnations that ended, as their publishers reported.
    pub ended: BTreeSet<Incarnation>,
    /// The agents, in the order of their digests: they are alike.
    pub agents: Vec<Arc<ModelAgent>>,
    /// Those with rounds that take their time.
    pub publishers: Vec<ModelPublisher>,
    /// Changes that were committed, and lost.
    pub lost: Vec<LostChange>,
    /// Changes that were committed so far, lost ones included.
    pub committed: u8,
    pub failovers: u8,
    pub epochs: u8,
    pub restarts: u8,
    /// Until then the roster keeps a process that ended.
    pub rostered_until: Tick,
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
    Store(StoreAction),
    Agent(usize, AgentAction),
    Publisher(usize, PublisherAction),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StoreAction {
    TickPasses,
    NextChangeCommits,
    SequencerNumbers,
    StandbyCatchesUp,
    /// It is promoted by mistake, and numbers a log of its own.
    StandbyStrays,
    FailOver,
    LogIsPurged,
}

/// Queries are named by their numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AgentAction {
    /// The follower does what is due.
    Poll,
    Restart,
    ReceiveRow(Mark, ChangeId),
    ReceiveTick(Mark),
    ReceiveEnd(Incarnation),
    /// A round answers a probe.
    ProbeIsAnswered(u64),
    ReceiveProof(u64, Mark),
    /// A publisher answers a query for missing rows.
    ReplayIsAnswered(u64),
    /// By the place of the answer among those under way.
    ReceiveReplay(u64, usize),
    Verify,
    LoadIsRead(ReadSource),
    ReceiveLoad,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PublisherAction {
    ReceiveProbe(u64),
    /// Its transaction commits.
    BeginRound,
    /// The publisher answers.
    EndRound,
    /// It crashes and is restarted.
    Crash,
}

impl ModelPublisher {
    pub fn start() -> Self {
        Self { rounds: Rounds::new(Duration::ZERO, 8), running: None }
    }
}

impl SmallState {
    pub fn start(world: &SmallWorld) -> Self {
        let store = ModelStore::default();
        Self {
            heads: BTreeSet::from([store.mark()]),
            standby: store.clone(),
            store,
            agents: (0..world.agents).map(|_| Arc::new(ModelAgent::new(world, 0))).collect(),
            publishers: world.rounds.then(ModelPublisher::start).into_iter().collect(),
            ..Self::default()
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

    pub fn read(&self, world: &SmallWorld, origin: ReadSource) -> Option<Read> {
        let age = |fence| if world.demoted { self.now.since(fence) } else { Tick(0) };
        let (store, fence_age) = match origin {
            ReadSource::Primary => (&self.store, age(self.fence)),
            ReadSource::Replica => (&self.standby, Tick(0)),
            ReadSource::OldPrimary => self.old_primary.as_ref().map(|(store, fence)| (store, age(*fence)))?,
        };
        let fence_age = if world.has(Flaw::FencesAreIgnored) { Tick(0) } else { fence_age };
        let view = store.view().and(world.script.verified());
        Some(Read { view, as_of: store.mark(), fence_age, vouched: origin != ReadSource::Replica })
    }

    pub fn verification(&self, world: &SmallWorld, agent: &ModelAgent) -> ModelVerification {
        ModelVerification {
            at: self.now,
            reading: agent.core.state.begin(self.now.lease_time()),
            confirmed: self.confirmed_by_all(world).and(world.script.verified()),
            owed: self.store.covered(agent.core.applied()).and(world.script.verified()),
        }
    }

    /// Agents are alike, so their order means nothing.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.agents.sort_by_key(|agent| agent.digest);
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
            .map(|agent| agent.core.applied())
            .min()
            .map_or_else(View::default, |least| self.store.covered(least))
    }
}
