//! A world: what can happen in it, and all states that it can get into.
//!
//! Most faults need no action of their own, because nothing ever has to happen. A message that is never
//! delivered is lost; one that is delivered again was duplicated; a link is cut while nothing is delivered
//! over it; a publisher that crashes has only not sent the rest, since all it knows is in the store (what it
//! remembers of probe rounds is modelled where `rounds` is set). So every schedule with these faults is among
//! those that are checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::floors::FloorLimits;
use evictd_core::follower::{FollowerConfig, ReplayOutcome};
use evictd_core::history::Incarnation;
use evictd_core::lease::Bound;
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::rules::Rule;
use evictd_core::time::LeaseTime;
use stateright::{Model, Property};

use crate::agent::{Agent, LoadResult, PendingLoad, Read, Verification};
use crate::laws;
use crate::script::{ChangeId, Key, Script};
use crate::store::{Mark, Replay, Store};

/// A reading of the world's clock, which everybody shares: drifting clocks are the margin's business, and
/// the model has none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tick(pub u64);

impl Tick {
    /// One tick.
    pub const LENGTH: Duration = Duration::from_secs(1);

    /// As the core reads it.
    pub fn lease_time(self) -> LeaseTime {
        LeaseTime(1_000_000_000).after(self.duration())
    }

    /// So many ticks.
    pub fn duration(self) -> Duration {
        Self::LENGTH * self.0 as u32
    }

    /// How many ticks ago `earlier` was.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

/// Something that is done wrong around the core. Each is a negative control.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Flaw {
    /// A round's answer goes to probes that arrived after its transaction.
    RoundsAnswerLatecomers,
    /// A demoted primary's reads count from when they were asked for, however old its fence.
    FencesAreIgnored,
    /// `as_of` is read after the record, in a snapshot of its own.
    SnapshotsAreTorn,
    /// A replica's reads count from when they were asked for.
    ReplicasVouchForTheirReads,
    /// Loads count from when they arrive.
    LoadsDateFromTheirArrival,
    /// A round answers with the head, whatever waits for its position.
    RoundsDoNotNumber,
}

/// What can happen, and how often.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each says whether one kind of thing happens")]
pub struct World {
    /// Names it in tables.
    pub name: &'static str,
    /// What is in it, in a few words.
    pub about: &'static str,
    /// The changes, in the order of their commits.
    pub script: Script,
    /// How many agents there are.
    pub agents: usize,
    /// The clock stops there.
    pub ticks: u64,
    /// How many ticks knowledge is trusted; no answer may be based on anything older.
    pub trust: u64,
    /// How many loads each agent process may send.
    pub loads: u8,
    /// Verifications of both keys, or of the first one only.
    pub keys: usize,
    /// How often agents restart.
    pub restarts: u8,
    /// How often a standby takes over that may lack the last transactions.
    pub failovers: u8,
    /// Loads may come from the standby.
    pub replica: bool,
    /// The standby is promoted by mistake: loads still come from it, and its log is ahead of home's.
    pub stray: bool,
    /// After a fail-over, the old primary goes on answering reads. The standby is a synchronous one, then.
    pub demoted: bool,
    /// The log is purged up to its head.
    pub purges: bool,
    /// Connections come back, so that probes and replays are asked again at once.
    pub reconnects: u8,
    /// One publisher keeps its probes in the core's rounds; the rounds of others are one step each.
    pub rounds: bool,
    /// Floors that agents keep.
    pub floors: FloorLimits,
    /// Whether each state is tried for finding back.
    pub heals: bool,
    /// What the core misses.
    pub missing: Option<Protection>,
    /// What the rest does wrong.
    pub flaw: Option<Flaw>,
}

/// A change that a fail-over lost.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Lost {
    /// Which.
    pub change: ChangeId,
    /// When.
    pub at: Tick,
    /// Where the epoch begins in which it never happened.
    pub forgotten_at: Option<LogPosition>,
}

/// A probe as a publisher keeps it: number and what was seen. The worlds with rounds have one agent.
type Waiting = (u64, Option<Mark>);

/// What a publisher keeps in memory.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Publisher {
    rounds: Rounds<Waiting>,
    /// The round under way: whom it answers, and with what.
    running: Option<(Vec<Waiting>, Mark)>,
}

/// A state of a world.
#[derive(Clone, PartialEq, Hash, Debug)]
pub struct State {
    /// The clock.
    pub now: Tick,
    /// The primary.
    pub store: Store,
    /// Another one, that is behind or not.
    pub standby: Store,
    /// Whether the standby was promoted by mistake.
    pub is_stray: bool,
    /// The one before the fail-over, and when its fence was last raised.
    pub old_primary: Option<(Store, Tick)>,
    /// The last successful round.
    pub fence: Tick,
    /// Sent on the live feed, ever.
    pub live: BTreeMap<Mark, BTreeSet<ChangeId>>,
    /// Heads that ticks may speak of.
    pub heads: BTreeSet<Mark>,
    /// Incarnations that ended, as their publishers said.
    pub ended: BTreeSet<Incarnation>,
    /// The agents, in the order of their prints: they are alike.
    pub agents: Vec<Arc<Agent>>,
    /// Those with rounds that take their time.
    pub publishers: Vec<Publisher>,
    /// Committed, and gone.
    pub lost: Vec<Lost>,
    /// Changes that were committed so far, lost ones included.
    pub committed: u8,
    /// Fail-overs so far.
    pub failovers: u8,
    /// Epochs begun so far.
    pub epochs: u8,
    /// Restarts so far.
    pub restarts: u8,
    /// Until then a process that ended is in the roster.
    pub remembered_until: Tick,
    /// Reconnects so far.
    pub reconnects: u8,
    /// A wrong answer was given.
    pub broken: Option<Rule>,
}

/// Where a load reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// From the primary.
    Primary,
    /// From the standby.
    Replica,
    /// From the primary of before the fail-over.
    OldPrimary,
}

/// What can happen. Agents and publishers by their places in the state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
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
    HearLive(usize, Mark, ChangeId),
    HearTick(usize, Mark),
    HearEnd(usize, Incarnation),
    Round(usize, u64),
    HearProof(usize, u64, Mark),
    Replay(usize, u64),
    HearReplay(usize, u64, usize),
    Verify(usize, Key),
    Read(usize, Key, Origin),
    CompleteLoad(usize, Key),
    Arrive(usize, u64),
    BeginRound(usize),
    EndRound(usize),
    Crash(usize),
}

impl fmt::Display for Action {
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
            Self::HearLive(a, mark, change) => {
                write!(f, "agent {a} hears of change {} at {}", change.0, mark.at)
            }
            Self::HearTick(a, head) => write!(f, "agent {a} hears a tick: the head is {}", head.at),
            Self::HearEnd(a, incarnation) => {
                write!(f, "agent {a} hears that incarnation {incarnation} ended")
            }
            Self::Round(a, nonce) => write!(f, "a round answers agent {a}'s probe {nonce}"),
            Self::HearProof(a, nonce, head) => {
                write!(f, "agent {a} hears the answer to probe {nonce}: the head is {}", head.at)
            }
            Self::Replay(a, nonce) => write!(f, "a publisher answers agent {a}'s replay {nonce}"),
            Self::HearReplay(a, nonce, _) => write!(f, "agent {a} hears the answer to replay {nonce}"),
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

impl World {
    /// A world in which one key is deleted, to be varied.
    pub const fn plain(name: &'static str, about: &'static str, script: Script) -> Self {
        Self {
            name,
            about,
            script,
            agents: 1,
            ticks: 1,
            trust: 1,
            loads: 1,
            keys: 1,
            restarts: 0,
            failovers: 0,
            replica: false,
            stray: false,
            demoted: false,
            purges: false,
            reconnects: 0,
            rounds: false,
            floors: FloorLimits { keys: 8, scopes: 8 },
            heals: true,
            missing: None,
            flaw: None,
        }
    }

    /// The core's bound: its trust is the world's, since all clocks run alike.
    pub fn bound(&self) -> Bound {
        let trust = Tick::LENGTH * self.trust as u32;
        Bound::new(trust * 2, trust)
            .unwrap_or_else(|error| unreachable!("half of a bound is allowed: {error}"))
    }

    /// One probe per tick, and repairs at once: everything else is a matter of which action comes first.
    pub fn follower_config(&self) -> FollowerConfig {
        FollowerConfig {
            bound: self.bound(),
            probe_interval: Tick::LENGTH,
            request_timeout: Tick::LENGTH,
            gap_patience: Duration::ZERO,
            floors: self.floors,
            home_store: None,
        }
    }

    /// Whether answers that match no open question have no effect.
    pub fn answers_are_matched(&self) -> bool {
        self.missing != Some(Protection::AnswersMatchQuestions)
    }

    /// Runs a part of the core as this world has it.
    pub fn under<T>(&self, run: impl FnOnce() -> T) -> T {
        match self.missing {
            #[cfg(evictd_negative_controls)]
            Some(missing) => missing.without(run),
            _ => run(),
        }
    }

    fn verified_keys(&self) -> &'static [Key] {
        &Key::ALL[..self.keys]
    }

    fn has_standby(&self) -> bool {
        self.replica || self.failovers > 0
    }
}

impl State {
    fn start(world: &World) -> Self {
        let store = Store::default();
        let publisher = Publisher { rounds: Rounds::new(Duration::ZERO, 8), running: None };
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
            agents: (0..world.agents).map(|_| Arc::new(Agent::new(world, 0))).collect(),
            publishers: if world.rounds { vec![publisher] } else { Vec::new() },
            lost: Vec::new(),
            committed: 0,
            failovers: 0,
            epochs: 0,
            restarts: 0,
            remembered_until: Tick(0),
            reconnects: 0,
            broken: None,
        }
    }

    /// One transaction of the sequencer or a round.
    fn number(&mut self, seen_epoch: u32) {
        let before = self.store.mark();
        let (numbered, epoch_began) = self.store.number(seen_epoch, u32::from(self.failovers) + 1);
        if epoch_began {
            self.epochs += 1;
            self.ended.insert(before.incarnation);
            let begins =
                LogPosition::new(self.store.head.epoch(), self.store.head.position() - numbered.len() as u64);
            for lost in self.lost.iter_mut().filter(|lost| lost.forgotten_at.is_none()) {
                lost.forgotten_at = begins;
            }
        }
        for (position, change) in numbered {
            self.live.entry(self.store.mark_at(position)).or_default().insert(change);
        }
        self.heads.insert(self.store.mark());
    }

    fn fail_over(&mut self, world: &World) {
        if world.demoted {
            self.standby = self.store.clone();
        }
        let kept = self.standby.view();
        let gone = self.store.rows.iter().filter(|row| !kept.includes(row.change));
        let gone: Vec<Lost> =
            gone.map(|row| Lost { change: row.change, at: self.now, forgotten_at: None }).collect();
        self.lost.extend(gone);
        let old = std::mem::replace(&mut self.store, self.standby.clone());
        self.failovers += 1;
        if world.demoted {
            self.old_primary = Some((old, self.fence));
        }
    }

    fn raise_fence(&mut self, world: &World) {
        if world.demoted {
            self.fence = self.now;
        }
    }

    fn read(&self, world: &World, key: Key, origin: Origin) -> Option<Read> {
        let age = |fence| if world.demoted { self.now.since(fence) } else { Tick(0) };
        let (store, fence_age) = match origin {
            Origin::Primary => (&self.store, age(self.fence)),
            Origin::Replica => (&self.standby, Tick(0)),
            Origin::OldPrimary => self.old_primary.as_ref().map(|(store, fence)| (store, age(*fence)))?,
        };
        let fence_age = if world.flaw == Some(Flaw::FencesAreIgnored) { Tick(0) } else { fence_age };
        let view = store.view().and(world.script.of(key));
        Some(Read { view, as_of: store.mark(), fence_age, vouched: origin != Origin::Replica })
    }

    fn verification(&self, world: &World, agent: &Agent, key: Key) -> Verification {
        Verification {
            at: self.now,
            reading: agent.state.begin(self.now.lease_time()),
            confirmed: laws::confirmed_by_all(world, self).and(world.script.of(key)),
            owed: laws::covered(&self.store, agent.applied()).and(world.script.of(key)),
        }
    }

    /// Replaces an agent; `None` if nothing changed.
    fn with(mut self, index: usize, agent: Agent) -> Option<Self> {
        if *self.agents[index] == agent {
            return None;
        }
        self.agents[index] = Arc::new(agent);
        Some(self)
    }

    /// Agents are alike, so their order means nothing.
    fn sorted(mut self) -> Self {
        self.agents.sort_by_key(|agent| agent.print());
        self
    }
}

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::start(self)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        self.store_actions(state, actions);
        for (index, agent) in state.agents.iter().enumerate() {
            self.bus_actions(state, index, agent, actions);
            self.load_actions(state, index, agent, actions);
        }
        for (index, publisher) in state.publishers.iter().enumerate() {
            let asked = state.agents.iter().flat_map(|agent| &agent.asked).map(|(nonce, _)| *nonce);
            actions.extend(asked.map(|nonce| Action::Arrive(index, nonce)));
            if publisher.running.is_some() {
                actions.push(Action::EndRound(index));
            } else if publisher.rounds.start_at().is_some() {
                actions.push(Action::BeginRound(index));
            }
            actions.push(Action::Crash(index));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        self.under(|| self.step(last, action)).map(State::sorted)
    }

    fn format_action(&self, action: &Action) -> String {
        action.to_string()
    }

    fn properties(&self) -> Vec<Property<Self>> {
        laws::all(self)
    }
}

impl World {
    fn store_actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.now.0 < self.ticks {
            actions.push(Action::Pass);
        }
        if usize::from(state.committed) < self.script.len() {
            actions.push(Action::Commit);
        }
        if !state.store.is_numbered() {
            actions.push(Action::Number);
        }
        if self.has_standby() && !self.demoted && !state.is_stray && state.standby != state.store {
            actions.push(Action::CatchUp);
        }
        if self.stray && !state.is_stray {
            actions.push(Action::Stray);
        }
        if state.failovers < self.failovers {
            actions.push(Action::FailOver);
        }
        if self.purges && !state.store.is_purged() {
            actions.push(Action::Purge);
        }
    }

    fn bus_actions(&self, state: &State, index: usize, agent: &Agent, actions: &mut Vec<Action>) {
        if agent.state.follower.lock().wake_at() <= state.now.lease_time() {
            actions.push(Action::Poll(index));
        }
        if state.reconnects < self.reconnects {
            actions.push(Action::Reconnect(index));
        }
        if state.restarts < self.restarts {
            actions.push(Action::Restart(index));
        }
        for (mark, changes) in &state.live {
            actions.extend(changes.iter().map(|change| Action::HearLive(index, *mark, *change)));
        }
        actions.extend(state.heads.iter().map(|head| Action::HearTick(index, *head)));
        actions.extend(state.ended.iter().map(|ended| Action::HearEnd(index, *ended)));
        let asked = agent.asked.iter().map(|(nonce, _)| *nonce);
        actions.extend(
            asked
                .filter(unanswered(agent.proofs.iter().map(|(nonce, _)| *nonce)))
                .map(|nonce| Action::Round(index, nonce)),
        );
        actions.extend(agent.proofs.iter().map(|(nonce, head)| Action::HearProof(index, *nonce, *head)));
        let wanted = agent.wanted.iter().map(|wanted| wanted.nonce);
        let replayed = agent.replays.iter().map(|(nonce, ..)| *nonce);
        actions.extend(wanted.filter(unanswered(replayed)).map(|nonce| Action::Replay(index, nonce)));
        let replays = agent.replays.iter().enumerate();
        actions.extend(replays.map(|(place, (nonce, ..))| Action::HearReplay(index, *nonce, place)));
    }

    fn load_actions(&self, state: &State, index: usize, agent: &Agent, actions: &mut Vec<Action>) {
        for key in self.verified_keys() {
            actions.push(Action::Verify(index, *key));
            match &agent.loads[key.index()] {
                Some(PendingLoad { read: None, .. }) => {
                    actions.push(Action::Read(index, *key, Origin::Primary));
                    if self.replica {
                        actions.push(Action::Read(index, *key, Origin::Replica));
                    }
                    if state.old_primary.is_some() {
                        actions.push(Action::Read(index, *key, Origin::OldPrimary));
                    }
                }
                Some(PendingLoad { read: Some(_), .. }) => actions.push(Action::CompleteLoad(index, *key)),
                None => {}
            }
        }
    }

    /// The state after `action`; `None` if that changes nothing.
    pub fn step(&self, last: &State, action: Action) -> Option<State> {
        match action {
            Action::Pass
            | Action::Commit
            | Action::Number
            | Action::CatchUp
            | Action::Stray
            | Action::FailOver
            | Action::Purge => Some(self.step_store(last, action)),
            Action::Verify(index, key) => self.step_verification(last, index, key),
            Action::CompleteLoad(index, key) => self.complete_load(last, index, key),
            Action::Arrive(index, _)
            | Action::BeginRound(index)
            | Action::EndRound(index)
            | Action::Crash(index) => self.step_publisher(last, index, action),
            Action::Poll(index)
            | Action::Reconnect(index)
            | Action::Restart(index)
            | Action::HearLive(index, ..)
            | Action::HearTick(index, _)
            | Action::HearEnd(index, _)
            | Action::Round(index, _)
            | Action::HearProof(index, ..)
            | Action::Replay(index, _)
            | Action::HearReplay(index, ..)
            | Action::Read(index, ..) => self.step_agent(last, index, action),
        }
    }

    fn step_store(&self, last: &State, action: Action) -> State {
        let mut state = last.clone();
        match action {
            Action::Pass => state.now.0 += 1,
            Action::Commit => {
                let change = ChangeId(state.committed);
                state.store.rows.push(crate::store::Row { change, at: state.now, position: None });
                state.committed += 1;
            }
            Action::Number => state.number(0),
            Action::CatchUp => state.standby = state.store.clone(),
            Action::Stray => {
                state.is_stray = true;
                state.standby.number(0, 2);
            }
            Action::FailOver => state.fail_over(self),
            _ => state.store.purge(),
        }
        state
    }

    fn step_agent(&self, last: &State, index: usize, action: Action) -> Option<State> {
        let mut state = last.clone();
        let now = state.now.lease_time();
        let agent = last.agents[index].clone();
        let next = match action {
            Action::Poll(_) => {
                agent.after(self, last.now, |agent, effects| agent.state.follower.lock().poll(now, effects))
            }
            Action::Reconnect(_) => {
                state.reconnects += 1;
                agent.after(self, last.now, |agent, _| agent.state.follower.lock().connected(now))
            }
            Action::Restart(_) => {
                state.restarts += 1;
                if agent.rostered.is_some() {
                    state.remembered_until = Tick(state.now.0 + 2 * self.trust);
                }
                // Answers to the process that ended are still on the way.
                Agent::new(self, agent.process + 1).after(self, last.now, |next, _| {
                    next.proofs.clone_from(&agent.proofs);
                    next.replays.clone_from(&agent.replays);
                })
            }
            Action::HearLive(_, mark, change) => {
                let row = self.script.change(change).row(mark.at);
                agent.after(self, last.now, |agent, effects| {
                    agent.state.follower.lock().on_live(&mark.voucher(), vec![row], now, effects);
                })
            }
            Action::HearTick(_, head) => agent.after(self, last.now, |agent, effects| {
                agent.state.follower.lock().on_tick(&head.voucher(), now, effects);
            }),
            Action::HearEnd(_, incarnation) => agent.after(self, last.now, |agent, _| {
                let ended = Mark { at: LogPosition::ZERO, incarnation }.provenance();
                agent.state.follower.lock().on_end(ended, now);
            }),
            Action::Round(_, nonce) => {
                let (_, seen) = *agent.asked.iter().find(|(asked, _)| *asked == nonce)?;
                if self.flaw != Some(Flaw::RoundsDoNotNumber) {
                    state.number(seen.map_or(0, |seen| seen.at.epoch()));
                }
                state.raise_fence(self);
                let (head, at) = (state.store.mark(), state.now);
                let is_admitted = state.store.admits(seen);
                let next = agent.after(self, last.now, |agent, _| {
                    if is_admitted {
                        agent.proofs.insert((nonce, head));
                    }
                    agent.rostered = Some(at).filter(|_| self.agents > 1);
                });
                // The round may have changed the store only.
                state.agents[index] = Arc::new(next);
                return (state != *last).then_some(state);
            }
            Action::HearProof(_, nonce, head) => agent.after(self, last.now, |agent, effects| {
                agent.state.follower.lock().on_probe_answer(nonce, &head.voucher(), true, now, effects);
            }),
            Action::Replay(_, nonce) => {
                let wanted = *agent.wanted.iter().find(|wanted| wanted.nonce == nonce)?;
                let (epoch, from, to) = (wanted.epoch, wanted.from, wanted.to);
                let replay = state.store.replay(epoch, from, to);
                let head = state.store.mark();
                agent.after(self, last.now, |agent, _| {
                    agent.replays.insert((nonce, head, replay));
                })
            }
            Action::HearReplay(_, nonce, place) => {
                let (_, head, replay) = agent.replays.iter().nth(place)?.clone();
                let (provenance, answer) = (head.provenance(), self.replay_answer(replay));
                agent.after(self, last.now, |agent, effects| {
                    let mut follower = agent.state.follower.lock();
                    follower.on_replay_answer(nonce, provenance, answer, now, effects);
                })
            }
            Action::Read(_, key, origin) => {
                let read = last.read(self, key, origin);
                agent.after(self, last.now, |agent, _| {
                    if let Some(load) = &mut agent.loads[key.index()] {
                        load.read = read;
                    }
                })
            }
            _ => return None,
        };
        state.with(index, next)
    }

    fn replay_answer(&self, replay: Replay) -> ReplayOutcome {
        match replay {
            Replay::Rows(rows) => ReplayOutcome::Rows(
                rows.into_iter().map(|(position, change)| self.script.change(change).row(position)).collect(),
            ),
            Replay::Refused(head) => ReplayOutcome::Refused { head: head.voucher() },
        }
    }

    /// A hit lifts its entry; otherwise the verification sends a load or joins the one under way.
    fn step_verification(&self, last: &State, index: usize, key: Key) -> Option<State> {
        let agent = &last.agents[index];
        let began = last.verification(self, agent, key);
        let next = agent.after(self, last.now, |agent, _| {
            if let Some(hit) = agent.hit(key, last.now) {
                hit.answer(&agent.state);
            } else if let Some(load) = &mut agent.loads[key.index()] {
                // It begins after the load was sent, if only by a moment.
                let moment = Duration::from_micros(1);
                let reading = agent.state.begin(last.now.lease_time().after(moment));
                if agent.state.may_share(load.sent_at.lease_time(), reading) {
                    load.waiter = Verification { reading, ..began };
                }
            } else if agent.loads_left > 0 {
                agent.loads_left -= 1;
                agent.loads[key.index()] = Some(PendingLoad { sent_at: last.now, waiter: began, read: None });
            }
        });
        last.clone().with(index, next)
    }

    fn complete_load(&self, last: &State, index: usize, key: Key) -> Option<State> {
        let mut result = None;
        let next = last.agents[index].after(self, last.now, |agent, effects| {
            let read = agent.loads[key.index()].as_mut().and_then(|load| load.read.as_mut());
            if let Some(read) = read.filter(|_| self.flaw == Some(Flaw::SnapshotsAreTorn)) {
                read.as_of = last.store.mark();
            }
            result = agent.complete_load(self, key, last.now, effects);
        });
        let mut state = last.clone();
        state.broken = result.and_then(|result: LoadResult| laws::judge_load(self, last, key, &result));
        state.with(index, next)
    }

    fn step_publisher(&self, last: &State, index: usize, action: Action) -> Option<State> {
        let mut state = last.clone();
        let now = state.now.lease_time();
        match action {
            Action::Arrive(_, nonce) => {
                let asked = last.agents.iter().flat_map(|agent| &agent.asked);
                let probe = *asked.into_iter().find(|(asked, _)| *asked == nonce)?;
                let Publisher { rounds, running } = &mut state.publishers[index];
                match running {
                    Some((answered, _)) if self.flaw == Some(Flaw::RoundsAnswerLatecomers) => {
                        answered.push(probe);
                    }
                    _ if rounds.waiting().contains(&probe) => return None,
                    _ => rounds.add(probe, now).ok()?,
                }
            }
            Action::BeginRound(_) => {
                let probes = state.publishers[index].rounds.start(now)?;
                let epochs = probes.iter().filter_map(|(_, seen)| seen.map(|seen| seen.at.epoch()));
                state.number(epochs.max().unwrap_or(0));
                state.publishers[index].running = Some((probes, state.store.mark()));
            }
            Action::EndRound(_) => {
                let publisher = &mut state.publishers[index];
                let (probes, head) = publisher.running.take()?;
                publisher.rounds.finish(true);
                let admitted = probes.iter().filter(|(_, seen)| last.store.admits(*seen));
                let admitted: Vec<u64> = admitted.map(|(nonce, _)| *nonce).collect();
                let next = state.agents[0].after(self, last.now, |agent, _| {
                    agent.proofs.extend(admitted.into_iter().map(|nonce| (nonce, head)));
                });
                state.agents[0] = Arc::new(next);
            }
            _ => {
                state.publishers[index] = Publisher { rounds: Rounds::new(Duration::ZERO, 8), running: None }
            }
        }
        (state != *last).then_some(state)
    }
}

/// Of several answers to one question only the first to arrive counts, and which one that is was decided when
/// it was sent: so a second one would only repeat what another schedule shows.
fn unanswered(answers: impl Iterator<Item = u64> + Clone) -> impl Fn(&u64) -> bool {
    move |nonce| !answers.clone().any(|answered| answered == *nonce)
}
