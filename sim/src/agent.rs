//! An agent: the real follower, floors, stamps and lease, in a shell that does what evictd-agent's does.
//!
//! Where the real code can be preempted, this one sometimes is: the effects of one input, the steps of one
//! verification and of one landing load then become events of their own (R9).
//!
//! * [`verify`]: a verification's steps.
//! * [`load`]: what the cache doesn't have.

mod load;
mod verify;

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use evictd_core::entry::Stamp;
use evictd_core::floors::FloorCell;
use evictd_core::follower::{Effect, FlushReason, Follower, ReplayAnswer, evicts_one};
use evictd_core::invalidation::{Invalidation, Scope};
use evictd_core::lease::{Bound, Mode};
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::record::{Record, RecordState};
use evictd_core::rules::Rule;
use evictd_core::time::LeaseTime;

pub use self::load::Denial;
use crate::agent::load::{Flight, Landing};
use crate::agent::verify::Verification;
use crate::ctx::Ctx;
use crate::net::{Audience, Found, Message, Nonce};
use crate::process::Process;
use crate::queue::{Event, Life, Node};
use crate::store::{ApiNumber, KeyNumber, Lsn, WorkspaceNumber, key_of};
use crate::time::{MS, Micros, Moment, SECOND};
use crate::trace::trace;

/// Something inside an agent process.
#[derive(Clone, Debug)]
pub enum AgentEvent {
    /// The follower wants to be polled.
    Wake,
    /// A second went by.
    Beat,
    /// The follow task goes on with what it was told to do.
    Perform,
    /// A verification goes on.
    Verify(Box<Verification>),
    /// A load's question wasn't answered in time.
    Timeout(KeyNumber, Nonce),
    /// A replica answers a load.
    Replica(KeyNumber, Nonce),
    /// A load that arrived goes on.
    Land(KeyNumber, Landing),
}

/// What the follow task takes in, one at a time.
#[derive(Debug)]
enum Input {
    Live(Rc<[Invalidation]>),
    Tick(LogPosition),
    ProbeAnswer(Nonce, LogPosition),
    ReplayAnswer(Nonce, ReplayAnswer),
    Connected,
    Nothing,
    Beat,
}

/// A cached record.
#[derive(Debug)]
pub struct Entry {
    key: KeyNumber,
    record: Record,
    stamp: Stamp,
    /// Where it was read: for the checker.
    lsn: Lsn,
    api: Option<ApiNumber>,
    workspace: Option<WorkspaceNumber>,
    /// Whether its end was counted.
    counted: Cell<bool>,
}

impl Entry {
    fn is_not_found(&self) -> bool {
        match &self.record {
            Record::Absent => true,
            Record::Key(key) => key.state == RecordState::Deleted,
            Record::RootKey(root) => root.state == RecordState::Deleted,
        }
    }
}

/// An agent process.
#[derive(Debug)]
pub struct Agent {
    /// What every process has.
    pub process: Process,
    bound: Bound,
    follower: Follower,
    horizon: Arc<FloorCell>,
    /// What the follow task published for verifications.
    applied: LogPosition,
    proven_at: LeaseTime,
    /// What it told the publishers.
    announced: LogPosition,
    cache: Vec<Option<Rc<Entry>>>,
    flights: Vec<Option<Box<Flight>>>,
    flying: usize,
    next_nonce: Nonce,
    inputs: VecDeque<Input>,
    performing: VecDeque<Effect>,
    /// The rest of `performing` waits for its event.
    preempted: bool,
    wake: Moment,
    /// How far behind the replica is that this agent reads; `None` if it asks the authority.
    pub replica_lag: Option<Micros>,
    /// Times that a new epoch made this process forget everything.
    epoch_flushes: u64,
    epochs_at_start: u64,
}

impl Agent {
    /// An agent that was not started yet.
    pub fn new(process: Process, ctx: &mut Ctx, replica_lag: Option<Micros>) -> Self {
        let bound = ctx.settings.bound();
        let follower = Follower::new(ctx.settings.follower(), ctx.dice.any());
        let keys = ctx.settings.size.keys;
        Self {
            process,
            bound,
            horizon: follower.floors().horizon().clone(),
            follower,
            applied: LogPosition::ZERO,
            proven_at: LeaseTime(0),
            announced: LogPosition::ZERO,
            cache: vec![None; keys],
            flights: (0..keys).map(|_| None).collect(),
            flying: 0,
            next_nonce: 1,
            inputs: VecDeque::new(),
            performing: VecDeque::new(),
            preempted: false,
            wake: Moment::NEVER,
            replica_lag,
            epoch_flushes: 0,
            epochs_at_start: 0,
        }
    }

    /// A new process: random nonces, empty memory.
    pub fn start(&mut self, ctx: &mut Ctx) {
        self.forget_all(ctx);
        self.process.start(ctx);
        self.follower = Follower::new(ctx.settings.follower(), ctx.dice.any());
        self.horizon = self.follower.floors().horizon().clone();
        (self.applied, self.announced) = (LogPosition::ZERO, LogPosition::ZERO);
        self.proven_at = LeaseTime(0);
        self.flights.iter_mut().for_each(|flight| *flight = None);
        self.flying = 0;
        self.inputs.clear();
        self.performing.clear();
        (self.preempted, self.wake) = (false, Moment::NEVER);
        (self.epoch_flushes, self.epochs_at_start) = (0, ctx.checker.counts.epochs);
        trace!(ctx, "{:?} starts its life {}", self.process.node, self.process.life.0);
        self.take_in(ctx, Input::Connected);
        let beat = ctx.now.after(ctx.dice.below(SECOND));
        self.later(ctx, beat, AgentEvent::Beat);
    }

    /// It answers nothing any more, and says so.
    pub fn leave(&self, ctx: &mut Ctx) {
        if self.process.is_up() {
            let goodbye = Message::Goodbye { from: self.node(), life: self.life() };
            ctx.ask(self.node(), Audience::All, goodbye);
        }
    }

    /// The connection came about (again).
    pub fn connected(&mut self, ctx: &mut Ctx) {
        if self.process.is_up() {
            self.take_in(ctx, Input::Connected);
        }
    }

    /// Its mode now.
    pub fn mode(&self, now: Moment) -> Mode {
        self.follower.mode(self.process.clock.read(now))
    }

    fn node(&self) -> Node {
        self.process.node
    }

    fn life(&self) -> Life {
        self.process.life
    }

    fn clock(&self, ctx: &Ctx) -> LeaseTime {
        self.process.clock.read(ctx.now)
    }

    fn later(&self, ctx: &mut Ctx, at: Moment, event: AgentEvent) {
        ctx.queue.push(at, Event::Agent(self.node(), self.life(), event));
    }

    /// A pause between two steps of something that was preempted.
    fn pause(ctx: &mut Ctx) -> Moment {
        let rested = ctx.now.since(ctx.starved_at) > SECOND;
        let usual = if rested && ctx.dice.permille(ctx.settings.starved_permille) {
            ctx.starved_at = ctx.now;
            300 * MS
        } else {
            ctx.dice.pick(&[20, 50, 100, MS])
        };
        ctx.now.after(ctx.dice.span(usual))
    }

    /// Handles one of its own events.
    pub fn on_event(&mut self, ctx: &mut Ctx, event: AgentEvent) {
        match event {
            AgentEvent::Wake => self.take_in(ctx, Input::Nothing),
            AgentEvent::Beat => {
                self.take_in(ctx, Input::Beat);
                let next = ctx.now.after(SECOND);
                self.later(ctx, next, AgentEvent::Beat);
            }
            AgentEvent::Perform => {
                self.preempted = false;
                self.work(ctx);
            }
            AgentEvent::Verify(verification) => self.go_on(ctx, verification),
            AgentEvent::Timeout(key, nonce) => self.timed_out(ctx, key, nonce),
            AgentEvent::Replica(..) => {}
            AgentEvent::Land(key, landing) => self.land(ctx, key, landing),
        }
    }

    /// Handles a message.
    pub fn on_message(&mut self, ctx: &mut Ctx, message: Message) {
        match message {
            Message::Live(rows) => self.take_in(ctx, Input::Live(rows)),
            Message::Tick(head) => self.take_in(ctx, Input::Tick(head)),
            Message::ProbeAnswer { nonce, head } => self.take_in(ctx, Input::ProbeAnswer(nonce, head)),
            Message::ReplayAnswer { nonce, answer } => {
                self.take_in(ctx, Input::ReplayAnswer(nonce, *answer));
            }
            Message::LookupAnswer { nonce, key, found } => self.arrived(ctx, key, nonce, *found),
            Message::Nobody { nonce, key } => self.unreachable(ctx, key, nonce),
            _ => {}
        }
    }

    /// A replica's answer to a load.
    pub fn on_replica(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce, found: Found) {
        self.arrived(ctx, key, nonce, found);
    }

    fn take_in(&mut self, ctx: &mut Ctx, input: Input) {
        self.inputs.push_back(input);
        if !self.preempted {
            self.work(ctx);
        }
    }

    /// The follow task: one input at a time, and everything that it leads to before the next.
    fn work(&mut self, ctx: &mut Ctx) {
        loop {
            let preempts = ctx.dice.permille(ctx.settings.preempted_permille);
            while let Some(effect) = self.performing.pop_front() {
                self.perform(ctx, effect);
                let rest = self.performing.len();
                // A few times within one input, however much it brings about.
                if preempts && rest > 0 && ctx.dice.index(rest) < 3 {
                    self.preempted = true;
                    let at = Self::pause(ctx);
                    return self.later(ctx, at, AgentEvent::Perform);
                }
            }
            let Some(input) = self.inputs.pop_front() else { break };
            let mut effects = Vec::new();
            self.follow(ctx, input, &mut effects);
            let now = self.clock(ctx);
            self.follower.poll(now, &mut effects);
            if !Protection::EvictionPrecedesApplied.holds() {
                effects.sort_by_key(|effect| matches!(effect, Effect::Applied { .. } | Effect::Flush(_)));
            }
            self.performing.extend(effects);
        }
        let wake = self.process.clock.moment(self.follower.wake_at()).max(ctx.now.after(1));
        if wake < self.wake || self.wake <= ctx.now {
            self.wake = wake;
            self.later(ctx, wake, AgentEvent::Wake);
        }
    }

    fn follow(&mut self, ctx: &mut Ctx, input: Input, effects: &mut Vec<Effect>) {
        let now = self.clock(ctx);
        match input {
            Input::Live(rows) => self.follower.on_live(rows.to_vec(), now, effects),
            Input::Tick(head) => self.follower.on_tick(head, now, effects),
            Input::ProbeAnswer(nonce, head) => {
                self.follower.on_probe_answer(nonce, head, now, effects);
            }
            Input::ReplayAnswer(nonce, answer) => {
                self.follower.on_replay_answer(nonce, answer, now, effects);
            }
            Input::Connected => self.follower.connected(now),
            Input::Beat => self.announce(ctx),
            Input::Nothing => {}
        }
    }

    /// Floors were raised inside the core; what follows is R9's order.
    fn perform(&mut self, ctx: &mut Ctx, effect: Effect) {
        trace!(ctx, "{:?} {effect:?}", self.node());
        match effect {
            Effect::Applied { invalidation, .. } => self.evict_scope(ctx, &invalidation.scope),
            Effect::Flush(reason) => {
                self.forget_all(ctx);
                self.flushed(ctx, reason);
            }
            Effect::Widened(_) => {}
            Effect::Progress { applied, .. } => self.applied = applied,
            Effect::Proven(at) => self.proven_at = self.proven_at.max(at),
            Effect::Announce => self.announce(ctx),
            Effect::SendProbe { nonce, seen, all } => {
                let audience = if all { Audience::All } else { Audience::Probes };
                let probe = Message::Probe { from: self.node(), life: self.life(), nonce, seen, all };
                ctx.ask(self.node(), audience, probe);
            }
            Effect::SendReplay { nonce, epoch, from, to, all, .. } => {
                ctx.checker.counts.repairs += 1;
                let audience = if all { Audience::All } else { Audience::Questions };
                let (node, life) = (self.node(), self.life());
                let replay = Message::Replay { from: node, life, nonce, epoch, first: from, last: to };
                ctx.ask(node, audience, replay);
            }
        }
    }

    fn flushed(&mut self, ctx: &mut Ctx, reason: FlushReason) {
        ctx.checker.counts.flushes += 1;
        if reason == FlushReason::NewEpoch {
            self.epoch_flushes += 1;
            let epochs = ctx.checker.counts.epochs;
            // One that began before the start may be heard of after it.
            if self.epoch_flushes > epochs - self.epochs_at_start + 1 {
                let (node, flushes) = (self.node(), self.epoch_flushes);
                ctx.checker.violated(Rule::G5, ctx.now, || {
                    format!("{node:?} flushed {flushes} times for {epochs} epochs: they fight")
                });
            }
        }
    }

    fn announce(&mut self, ctx: &mut Ctx) {
        if self.applied == LogPosition::ZERO || !ctx.net.links[self.node().0].connected {
            return;
        }
        self.announced = self.announced.max(self.applied);
        let message = Message::Applied { from: self.node(), life: self.life(), applied: self.applied };
        ctx.ask(self.node(), Audience::All, message);
    }

    fn evict_scope(&mut self, ctx: &mut Ctx, scope: &Scope) {
        if let Some(hash) = evicts_one(scope) {
            self.evict(ctx, key_of(hash));
            return;
        }
        // They stay, and die by their floor; only their end is counted.
        let depends = |entry: &Entry| match (scope, &entry.record) {
            (Scope::Api(id), Record::Key(key)) => key.api_id == *id,
            (Scope::Workspace(id), Record::Key(key)) => key.workspace_id == *id,
            (Scope::Workspace(id), Record::RootKey(key)) => key.workspace_id == *id,
            (Scope::All, _) => true,
            _ => false,
        };
        for entry in self.cache.iter().flatten().filter(|entry| depends(entry)) {
            self.count_end(ctx, entry);
        }
    }

    fn evict(&mut self, ctx: &mut Ctx, key: KeyNumber) {
        if let Some(entry) = self.cache[key.0].take() {
            self.count_end(ctx, &entry);
        }
    }

    fn forget_all(&mut self, ctx: &mut Ctx) {
        for entry in self.cache.iter().flatten() {
            self.count_end(ctx, entry);
        }
        self.cache.iter_mut().for_each(|entry| *entry = None);
    }

    /// From now on this entry is not answered from: how long was it, while something had changed?
    fn count_end(&self, ctx: &mut Ctx, entry: &Entry) {
        if !entry.stamp.is_shown() || entry.counted.replace(true) {
            return;
        }
        let lacking = ctx.checker.first_lacking(entry.key, entry.api, entry.workspace, entry.lsn);
        let Some(since) = lacking else { return };
        let trusted = entry.stamp.read_at.max(self.proven_at).after(self.bound.trust());
        let until = self.process.clock.moment(trusted).min(ctx.now);
        if until > since {
            ctx.checker.counts.forgotten.add(until.since(since));
        }
    }
}
