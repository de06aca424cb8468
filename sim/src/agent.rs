//! An agent: the real follower, floors and lease, and the real steps of hits, loads and evictions, around a modeled
//! cache and bus.
//!
//! Where the real code can be preempted, this one sometimes is: the effects of one input, the steps of one
//! verification and of one load then become events of their own (R9). What lies between two steps is kept
//! as the core gave it.
//!
//! * [`verify`]: a verification's steps.
//! * [`load`]: loads of what the cache doesn't have.

mod load;
mod verify;

use std::collections::VecDeque;
use std::time::Duration;

use evictd_core::follower::{Effect, FlushReason, Follower, LoadSource};
use evictd_core::invalidation::{Invalidation, Scope};
use evictd_core::lease::Mode;
use evictd_core::offset::CommitWindow;
use evictd_core::position::LogPosition;
use evictd_core::record::Record;
use evictd_core::rules::Rule;
use evictd_core::serving::AgentState;
use evictd_core::time::LeaseTime;

use crate::cached::{SimCache, SimEntry};
use crate::checker::Confirmed;
use crate::ctx::Ctx;
use crate::event::{AgentEvent, SimEvent};
use crate::message::SimMessage;
use crate::net::Audience;
use crate::node::{NodeNumber, Nonce};
use crate::process::Process;
use crate::rows::{KeyNumber, RowRange, Snapshot};
use crate::steps::OpenLoad;
use crate::time::{MS, Micros, Moment, SECOND};
use crate::trace::trace;

/// What the follow task takes in, one at a time.
#[derive(Debug)]
enum AgentInput {
    Message(SimMessage),
    Connected,
    Beat,
    Wake,
}

#[derive(Debug)]
pub struct SimAgent {
    pub process: Process,
    state: AgentState,
    /// The position that it announced.
    announced: Confirmed,
    cache: SimCache,
    loads: Vec<Option<Box<OpenLoad>>>,
    loading: usize,
    next_nonce: Nonce,
    inputs: VecDeque<AgentInput>,
    performing: VecDeque<Effect>,
    /// The rest of `performing` waits for its event.
    preempted: bool,
    wake: Moment,
    /// How far behind the replica is that this agent reads; `None` if it queries the authority.
    pub replica_lag: Option<Micros>,
    /// Flushes of this process because of a new epoch.
    epoch_flushes: u64,
    epochs_at_start: u64,
}

impl SimAgent {
    /// An agent that holds nothing yet.
    pub fn new(process: Process, ctx: &mut Ctx, replica_lag: Option<Micros>) -> Self {
        let keys = ctx.settings.keys;
        let follower = Follower::new(ctx.settings.follower(), ctx.dice.any());
        Self {
            process,
            state: AgentState::new(follower, ctx.settings.bound()),
            announced: Confirmed::default(),
            cache: SimCache::new(keys),
            loads: (0..keys).map(|_| None).collect(),
            loading: 0,
            next_nonce: 1,
            inputs: VecDeque::new(),
            performing: VecDeque::new(),
            preempted: false,
            wake: Moment::NEVER,
            replica_lag,
            epoch_flushes: 0,
            epochs_at_start: ctx.checker.counts.epochs,
        }
    }

    pub fn start(&mut self, ctx: &mut Ctx) {
        self.count_ends(ctx, &Scope::All);
        self.process.start(ctx);
        *self =
            Self { next_nonce: self.next_nonce, ..Self::new(self.process.clone(), ctx, self.replica_lag) };
        ctx.checker.restarted(self.node());
        trace!(ctx, "{:?} starts its life {}", self.process.node, self.process.life.0);
        self.take_in(ctx, AgentInput::Connected);
        let beat = ctx.now.after(ctx.dice.below(SECOND));
        self.later(ctx, beat, AgentEvent::Beat);
    }

    /// Announces that it stops answering.
    pub fn leave(&self, ctx: &mut Ctx) {
        if self.process.is_up() {
            ctx.send_query(self.node(), Audience::All, &SimMessage::Leave(self.node(), self.process.life));
        }
    }

    /// Handles a connect.
    pub fn connected(&mut self, ctx: &mut Ctx) {
        if self.process.is_up() {
            self.take_in(ctx, AgentInput::Connected);
        }
    }

    pub fn mode(&self, now: Moment) -> Mode {
        self.state.follower.lock().mode(self.process.clock.read(now))
    }

    fn node(&self) -> NodeNumber {
        self.process.node
    }

    fn clock(&self, ctx: &Ctx) -> LeaseTime {
        self.process.clock.read(ctx.now)
    }

    fn later(&self, ctx: &mut Ctx, at: Moment, event: AgentEvent) {
        ctx.queue.push(at, SimEvent::Agent(self.node(), self.process.life, event));
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

    pub fn on_event(&mut self, ctx: &mut Ctx, event: AgentEvent) {
        match event {
            AgentEvent::Wake => self.take_in(ctx, AgentInput::Wake),
            AgentEvent::Beat => {
                self.take_in(ctx, AgentInput::Beat);
                let next = ctx.now.after(SECOND);
                self.later(ctx, next, AgentEvent::Beat);
            }
            AgentEvent::Perform => {
                self.preempted = false;
                self.work(ctx);
            }
            AgentEvent::Verify(verification) => self.step_and_pause(ctx, verification),
            AgentEvent::Timeout(key, nonce) => self.timed_out(ctx, key, nonce),
            AgentEvent::Replica(..) => {}
            AgentEvent::StepLoad(key) => self.step_load(ctx, key),
        }
    }

    pub fn on_message(&mut self, ctx: &mut Ctx, message: SimMessage) {
        match message {
            SimMessage::LookupAnswer(nonce, key, read, fence_age) => {
                let source = LoadSource::Authority(read.provenance);
                self.arrived(ctx, key, nonce, source, *read, fence_age);
            }
            SimMessage::NoResponders(nonce, key) => self.unreachable(ctx, key, nonce),
            message => self.take_in(ctx, AgentInput::Message(message)),
        }
    }

    /// A replica's answer to a load.
    pub fn on_replica(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce, read: Snapshot) {
        let source = LoadSource::Database(read.token);
        self.arrived(ctx, key, nonce, source, read, Duration::ZERO);
    }

    fn take_in(&mut self, ctx: &mut Ctx, input: AgentInput) {
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
            self.state.follower.lock().poll(now, &mut effects);
            self.performing.extend(effects);
        }
        let wake_at = self.state.follower.lock().wake_at();
        let wake = self.process.clock.moment(wake_at).max(ctx.now.after(1));
        if wake < self.wake || self.wake <= ctx.now {
            self.wake = wake;
            self.later(ctx, wake, AgentEvent::Wake);
        }
    }

    fn follow(&mut self, ctx: &mut Ctx, input: AgentInput, effects: &mut Vec<Effect>) {
        let now = self.clock(ctx);
        let mut follower = self.state.follower.lock();
        match input {
            AgentInput::Message(SimMessage::Live(voucher, rows)) => {
                follower.on_live(&voucher, rows.to_vec(), now, effects);
            }
            AgentInput::Message(SimMessage::Tick(head, _)) => follower.on_tick(&head, now, effects),
            AgentInput::Message(SimMessage::Ended(provenance)) => follower.on_end(provenance, now),
            AgentInput::Message(SimMessage::ProbeAnswer(nonce, head)) => {
                follower.on_probe_answer(nonce, &head, true, now, effects);
            }
            AgentInput::Message(SimMessage::ReplayOutcome(nonce, provenance, answer)) => {
                follower.on_replay_answer(nonce, provenance, *answer, now, effects);
            }
            AgentInput::Message(_) | AgentInput::Wake => {}
            AgentInput::Connected => follower.connected(now),
            AgentInput::Beat => {
                drop(follower);
                self.announce(ctx);
            }
        }
    }

    /// The core performs the effect (R9). This adds messages and counts.
    fn perform(&mut self, ctx: &mut Ctx, effect: Effect) {
        trace!(ctx, "{:?} {effect:?}", self.node());
        if matches!(effect, Effect::Flush(_)) {
            self.count_ends(ctx, &Scope::All);
        }
        let evicted = self.state.perform(&effect, &self.cache);
        if let Some(entry) = &evicted {
            self.count_end(ctx, entry);
        }
        match effect {
            Effect::Applied { invalidation, .. } => {
                self.count_ends(ctx, &invalidation.scope);
                self.report_exposure(ctx, &invalidation, evicted.as_deref());
            }
            Effect::Flush(reason) => self.flushed(ctx, reason),
            Effect::Proven(at) => {
                self.cache.exposure.proven(at);
                ctx.checker.settled(self.node(), self.process.clock.moment(at));
            }
            Effect::FloorsMerged(_) | Effect::Progress { .. } | Effect::Rival(_) => {}
            Effect::Announce => self.announce(ctx),
            Effect::SendProbe { nonce, seen, all } => {
                let audience = if all { Audience::All } else { Audience::One };
                let probe = SimMessage::Probe(self.process.reply_to(nonce), seen, audience);
                ctx.send_query(self.node(), audience, &probe);
            }
            Effect::SendReplay { nonce, epoch, from, to, all, .. } => {
                ctx.checker.counts.repairs += 1;
                let audience = if all { Audience::All } else { Audience::One };
                let range = RowRange { epoch, first: from, last: to };
                let replay = SimMessage::Replay(self.process.reply_to(nonce), range);
                ctx.send_query(self.node(), audience, &replay);
            }
        }
    }

    /// Checks the exposure that the agent reports: it covers what was answered, and a reported breach is one (G5).
    fn report_exposure(&self, ctx: &mut Ctx, invalidation: &Invalidation, evicted: Option<&SimEntry>) {
        let Invalidation { position, ref scope, .. } = *invalidation;
        let Some(exposed) = ctx.checker.exposed(self.node(), position) else { return };
        let read = |moment| self.process.clock.read(moment);
        let committed = read(exposed.committed);
        let commit = CommitWindow { earliest: committed, latest: committed };
        let evicted = evicted.map(|entry| (&entry.answers, entry.validity.as_of()));
        let reported = self.cache.exposure.exposure(scope, position, commit, evicted);
        let began = read(exposed.last_began).since(committed);
        let given = read(exposed.last_given).since(committed);
        let node = self.node();
        if reported.at_most < began {
            let what = format!(
                "{node:?} reports {reported:?} of {position}, but a verification began {began:?} after it"
            );
            ctx.violated(Rule::G5, what);
        }
        // An entry that was read between the commit and its numbering has the change without a sign of it. A row that
        // is wider than the change covers other keys, too.
        let bound = self.state.bound.bound();
        if reported.at_least > bound && given <= bound && scope.evicted_key().is_some() {
            let what = format!(
                "{node:?} reports a breach, {reported:?} of {position}, but last answered {given:?} after it"
            );
            ctx.violated(Rule::G5, what);
        }
    }

    fn flushed(&mut self, ctx: &mut Ctx, reason: FlushReason) {
        if reason == FlushReason::NewEpoch {
            self.epoch_flushes += 1;
            let epochs = ctx.checker.counts.epochs;
            // An epoch that began before the start may be received after it.
            if self.epoch_flushes > epochs - self.epochs_at_start + 1 {
                let (node, flushes) = (self.node(), self.epoch_flushes);
                ctx.violated(Rule::G5, format!("{node:?} flushed {flushes} times for {epochs} epochs"));
            }
        }
    }

    fn announce(&mut self, ctx: &mut Ctx) {
        let applied = self.state.applied();
        let provenance = self.state.follower.lock().provenance();
        let Some(provenance) = provenance.filter(|_| applied != LogPosition::ZERO) else { return };
        if !ctx.net.links[self.node().0].connected {
            return;
        }
        self.announced = ctx.checker.confirmed(provenance.incarnation, applied);
        let message = SimMessage::Applied(self.node(), self.process.life, provenance, applied);
        ctx.send_query(self.node(), Audience::All, &message);
    }

    /// Entries of an API or a workspace stay cached below its floor. Their end is counted only.
    fn count_ends(&self, ctx: &mut Ctx, scope: &Scope) {
        if scope.evicted_key().is_some() {
            return;
        }
        let depends = |entry: &SimEntry| match (scope, &entry.record) {
            (Scope::Api(id), Record::Key(key)) => key.api_id == *id,
            (Scope::Workspace(id), Record::Key(key)) => key.workspace_id == *id,
            (Scope::Workspace(id), Record::RootKey(key)) => key.workspace_id == *id,
            (Scope::All, _) => true,
            _ => false,
        };
        for entry in self.cache.places.borrow().iter().flatten().filter(|entry| depends(entry)) {
            self.count_end(ctx, entry);
        }
    }

    /// An entry ends: counts for how long it could be served after a change.
    fn count_end(&self, ctx: &mut Ctx, entry: &SimEntry) {
        if !entry.validity.is_shown() || entry.counted.replace(true) {
            return;
        }
        let lacking = ctx.checker.lacking_since(&entry.place);
        let Some(since) = lacking else { return };
        let trusted = entry.validity.read_at.max(self.state.proven_at()).after(self.state.bound.trust());
        let until = self.process.clock.moment(trusted).min(ctx.now);
        if until > since {
            ctx.checker.counts.evicted.add(until.since(since));
        }
    }
}
