//! The world: all parts, with one clock and one queue of events.

use evictd_core::history::BeginCause;
use evictd_core::lease::Mode;
use evictd_core::rules::Rule;
use evictd_core::service::Standing;

use crate::agent::SimAgent;
use crate::assumption::Assumption;
use crate::checker::{RunCounts, Violation};
use crate::ctx::Ctx;
use crate::event::{AgentEvent, PublisherEvent, SimEvent, StoreEvent, WorkEvent};
use crate::fault::{Edge, Fault, NodeFault, ScheduledFault, StoreFault};
use crate::message::Kinds;
use crate::node::NodeNumber;
use crate::process::{Process, ProcessState};
use crate::publisher::SimPublisher;
use crate::rng::Dice;
use crate::rows::{Attached, ChangePlan, KeyNumber, StoreSite};
use crate::scenario::{Scenario, SimSettings, draw_faults};
use crate::store::SimStore;
use crate::time::{Clock, Micros, Moment, SECOND};
use crate::trace::{SimTrace, trace};
use crate::workload;

/// The time without faults after which an agent must be live.
const LIVE_GRACE: Micros = 15 * SECOND;

#[derive(Debug)]
pub struct SimWorld {
    ctx: Ctx,
    store: SimStore,
    /// A copy of it, used by the last of the publishers.
    copy: Option<SimStore>,
    agents: Vec<SimAgent>,
    publishers: Vec<SimPublisher>,
    faults: Vec<ScheduledFault>,
    is_operator_called: bool,
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct RunOutcome {
    pub counts: RunCounts,
    pub violations: Vec<Violation>,
    pub lasted: Micros,
    pub events: u64,
    pub trace: SimTrace,
}

/// Runs one seed of one scenario, to the first violation.
pub fn run(scenario: Scenario, seed: u64, trace: SimTrace) -> RunOutcome {
    run_tuned(scenario, seed, trace, |_| {})
}

/// Runs one seed of one scenario with changed settings.
pub fn run_tuned(
    scenario: Scenario,
    seed: u64,
    trace: SimTrace,
    tune: impl Fn(&mut SimSettings),
) -> RunOutcome {
    SimWorld::new(scenario, seed, trace, tune).run()
}

impl SimWorld {
    fn new(scenario: Scenario, seed: u64, trace: SimTrace, tune: impl Fn(&mut SimSettings)) -> Self {
        let mut dice = Dice::new(seed, scenario as u64);
        let mut settings = SimSettings::draw(scenario, &mut dice);
        tune(&mut settings);
        let faults = draw_faults(scenario, &settings, &mut dice);
        let nodes = settings.agents + settings.publishers + settings.copies;
        let mut ctx = Ctx::new(settings, dice, trace);
        trace!(ctx, "{:?}", ctx.settings);
        for fault in &faults {
            trace!(ctx, "planned {} .. {}: {:?}", fault.from, fault.until, fault.fault);
        }
        let store = SimStore::new(&mut ctx);
        let process = |ctx: &mut Ctx, node: usize| {
            let most = ctx.settings.drift_ppm as i64;
            let any = ctx.dice.between(0, 2 * most as u64) as i64 - most;
            let drift = ctx.dice.pick(&[-most, most, any]);
            let reading = ctx.dice.between(SECOND, 1_000_000 * SECOND);
            Process::new(NodeNumber(node), Clock::new(reading, drift))
        };
        let mut agents = Vec::new();
        for node in 0..ctx.settings.agents {
            let process = process(&mut ctx, node);
            let replica = ctx.settings.replica_lag.filter(|_| ctx.dice.permille(700));
            agents.push(SimAgent::new(process, &mut ctx, replica));
        }
        let mut publishers = Vec::new();
        for node in ctx.settings.agents..nodes {
            let process = process(&mut ctx, node);
            publishers.push(SimPublisher::new(process, &ctx, 1));
        }
        Self { ctx, store, copy: None, agents, publishers, faults, is_operator_called: false }
    }

    fn run(mut self) -> RunOutcome {
        let nodes = self.agents.len() + self.publishers.len();
        // Publishers first, so that agents reach one.
        for node in (0..nodes).rev() {
            self.start(NodeNumber(node));
        }
        workload::begin(&mut self.ctx);
        for (index, fault) in self.faults.iter().enumerate() {
            self.ctx.queue.push(fault.from, SimEvent::Fault(index, Edge::Begin));
            self.ctx.queue.push(fault.until, SimEvent::Fault(index, Edge::End));
        }
        self.ctx.queue.push(Moment(SECOND), SimEvent::Second);
        let mut events = 0;
        while let Some((at, event)) = self.ctx.queue.pop() {
            if at > self.ctx.settings.end {
                break;
            }
            self.ctx.now = at;
            events += 1;
            self.handle(event);
            if !self.ctx.checker.violations.is_empty() {
                break;
            }
        }
        if self.ctx.checker.violations.is_empty() {
            self.ctx.now = self.ctx.settings.end;
            self.ctx.checker.finish(self.ctx.now);
        }
        let Ctx { now, checker, mut trace, .. } = self.ctx;
        for Violation { rule, at, what } in &checker.violations {
            trace.line(*at, format_args!("{rule} {what}"));
        }
        RunOutcome { counts: checker.counts, violations: checker.violations, lasted: now.0, events, trace }
    }

    fn handle(&mut self, event: SimEvent) {
        let agents = self.agents.len();
        match event {
            SimEvent::Deliver(node, life, _) | SimEvent::Agent(node, life, _) if node.0 < agents => {
                let agent = &mut self.agents[node.0];
                match agent.process.admit(life, event) {
                    Some(SimEvent::Deliver(_, _, message)) => agent.on_message(&mut self.ctx, message),
                    Some(SimEvent::Agent(_, _, AgentEvent::Replica(key, nonce))) => {
                        let lag = agent.replica_lag.unwrap_or(0);
                        let read = self.store.read_replica(self.ctx.now, lag, key);
                        agent.on_replica(&mut self.ctx, key, nonce, read);
                    }
                    Some(SimEvent::Agent(_, _, event)) => agent.on_event(&mut self.ctx, event),
                    _ => {}
                }
            }
            SimEvent::Deliver(node, life, _) | SimEvent::Publisher(node, life, _) => {
                let is_at_copy = self.ctx.is_at_copy(node);
                let store = if is_at_copy { self.copy.as_mut() } else { Some(&mut self.store) };
                let Some(store) = store else { return };
                let publisher = &mut self.publishers[node.0 - agents];
                match publisher.process.admit(life, event) {
                    Some(SimEvent::Deliver(_, _, message)) => {
                        publisher.on_message(&mut self.ctx, store, &message);
                    }
                    Some(SimEvent::Publisher(_, _, event)) => publisher.on_event(&mut self.ctx, store, event),
                    _ => {}
                }
            }
            SimEvent::Agent(..) => {}
            SimEvent::Store(site, event) => self.on_store(site, event),
            SimEvent::Work(event) => self.on_work(event),
            SimEvent::Fault(index, edge) => self.on_fault(index, edge),
            SimEvent::Restart(node) => self.start(node),
            SimEvent::Reconnect(node) => self.connection(node, true),
            SimEvent::Operator => self.declare(),
            SimEvent::Second => self.on_second(),
        }
    }

    fn on_store(&mut self, site: StoreSite, event: StoreEvent) {
        let Self { ctx, store, copy, publishers, .. } = self;
        let (at_home, at_copy) = publishers.split_at_mut(ctx.settings.publishers);
        let (store, publishers) = match (site, copy) {
            (StoreSite::Home, _) => (store, at_home),
            (StoreSite::Copy { .. }, Some(copy)) => (copy, at_copy),
            (StoreSite::Copy { .. }, None) => return,
        };
        if store.on_event(ctx, event) {
            for publisher in publishers {
                publisher.wake(ctx);
            }
        }
    }

    fn on_work(&mut self, event: WorkEvent) {
        let ctx = &mut self.ctx;
        match event {
            WorkEvent::Choose => workload::choose(ctx),
            WorkEvent::Change(key) => {
                let plan = workload::plan_key(ctx, &self.store, key);
                self.change(plan);
                self.change_copy(key);
            }
            WorkEvent::Wide(target) => {
                let plan = workload::plan_wide(&self.store, target);
                self.change(plan);
            }
            WorkEvent::Bulk => {
                for key in workload::bulk_keys(ctx) {
                    let mut plan = workload::plan_key(&mut self.ctx, &self.store, key);
                    plan.row = None;
                    plan.cause = evictd_core::invalidation::Cause::Erased;
                    self.store.begin(&mut self.ctx, plan, None, 1_000);
                }
            }
            WorkEvent::Verify(agent, key) => self.verify(agent, key),
            WorkEvent::Traffic(agent) => {
                let key = workload::traffic(ctx, agent);
                self.verify(agent, key);
            }
        }
    }

    fn verify(&mut self, agent: NodeNumber, key: KeyNumber) {
        let agent = &mut self.agents[agent.0];
        if agent.process.is_up() {
            agent.verify(&mut self.ctx, key);
        }
    }

    /// By one of the publishers, or by direct SQL.
    fn change(&mut self, plan: ChangePlan) {
        let ctx = &mut self.ctx;
        let span = workload::transaction_span(ctx);
        if ctx.dice.permille(300) {
            self.store.begin(ctx, plan, None, span);
        } else {
            let publisher = ctx.dice.index(ctx.settings.publishers);
            self.publishers[publisher].change(ctx, &mut self.store, plan, span);
        }
    }

    /// By direct SQL. So a copy's positions catch up with home's.
    fn change_copy(&mut self, key: KeyNumber) {
        let ctx = &mut self.ctx;
        if let Some(copy) = &mut self.copy
            && ctx.dice.permille(700)
        {
            let plan = workload::plan_key(ctx, copy, key);
            let span = workload::transaction_span(ctx);
            copy.begin(ctx, plan, None, span);
        }
    }

    fn start(&mut self, node: NodeNumber) {
        let Self { ctx, store, copy, agents, publishers, .. } = self;
        if let Some(agent) = agents.get_mut(node.0) {
            return agent.start(ctx);
        }
        let store = if ctx.is_at_copy(node) { copy.as_mut() } else { Some(store) };
        let Some(store) = store else { return };
        if ctx.now < store.down_until {
            // It can't open the store, exits, and is started again.
            return ctx.queue.push(store.down_until, SimEvent::Restart(node));
        }
        let publisher = &mut publishers[node.0 - agents.len()];
        if publisher.process.state == ProcessState::Down {
            publisher.start(ctx, store);
        }
    }

    fn process(&mut self, node: NodeNumber) -> &mut Process {
        let agents = self.agents.len();
        if node.0 < agents {
            &mut self.agents[node.0].process
        } else {
            &mut self.publishers[node.0 - agents].process
        }
    }

    fn on_fault(&mut self, index: usize, edge: Edge) {
        let ScheduledFault { fault, until, .. } = self.faults[index];
        trace!(self.ctx, "{edge:?} {fault:?}");
        if edge == Edge::Begin {
            self.ctx.health.fault_begins(fault.node());
        }
        match (fault, edge) {
            (Fault::Node(node, fault), Edge::Begin) => self.begin_at(node, fault, until),
            (Fault::Node(node, fault), Edge::End) => self.end_at(node, fault),
            (Fault::Store(fault), Edge::Begin) => self.begin_at_store(fault, until),
            (Fault::Store(fault), Edge::End) => self.end_at_store(fault),
        }
        if edge == Edge::Begin {
            return;
        }
        let busy_until = self.store.busy_until();
        if matches!(fault, Fault::Store(StoreFault::Slow(_))) && busy_until > self.ctx.now {
            // What began slowly still blocks the rest.
            return self.ctx.queue.push(busy_until, SimEvent::Fault(index, edge));
        }
        if let Some(node) = fault.node() {
            self.ctx.net.links[node.0].clear_since = self.ctx.now;
        }
        self.ctx.health.fault_ends(self.ctx.now, fault.node());
    }

    fn begin_at(&mut self, node: NodeNumber, fault: NodeFault, until: Moment) {
        let now = self.ctx.now;
        let trouble = &mut self.ctx.net.links[node.0].trouble;
        match fault {
            NodeFault::Noise { loss, twice, late } => {
                (trouble.loss, trouble.twice, trouble.late) = (loss, twice, late);
            }
            NodeFault::Gap(kinds) => trouble.without = kinds,
            NodeFault::Cut { deaf, mute, .. } => (trouble.deaf, trouble.mute) = (deaf, mute),
            NodeFault::Stall => trouble.held_until = until,
            NodeFault::Disconnect => self.connection(node, false),
            NodeFault::Freeze { suspend } => {
                self.process(node).freeze(now);
                if suspend {
                    // A sleeping machine answers no ping: the server drops it.
                    self.connection(node, false);
                }
            }
            NodeFault::Crash { leaves } => {
                if leaves {
                    match self.agents.get(node.0) {
                        Some(agent) => agent.leave(&mut self.ctx),
                        None => self.publishers[node.0 - self.agents.len()].leave(&mut self.ctx),
                    }
                }
                self.kill(node);
            }
            NodeFault::Detached => self.store.attach(node, Attached::Nowhere),
        }
    }

    fn end_at(&mut self, node: NodeNumber, fault: NodeFault) {
        let trouble = &mut self.ctx.net.links[node.0].trouble;
        match fault {
            NodeFault::Noise { .. } => (trouble.loss, trouble.twice, trouble.late) = (0, 0, (0, 0)),
            NodeFault::Gap(_) => trouble.without = Kinds::NONE,
            NodeFault::Cut { reconnects, .. } => {
                (trouble.deaf, trouble.mute) = (false, false);
                if reconnects {
                    self.connection(node, true);
                }
            }
            NodeFault::Stall => trouble.held_until = Moment(0),
            NodeFault::Disconnect => self.connection(node, true),
            NodeFault::Freeze { suspend } => {
                self.thaw(node, suspend);
                if suspend {
                    let at = within(&mut self.ctx, 3 * SECOND);
                    self.ctx.queue.push(at, SimEvent::Reconnect(node));
                }
            }
            NodeFault::Crash { .. } => {
                if self.process(node).state == ProcessState::Down {
                    self.start(node);
                }
            }
            NodeFault::Detached => self.store.attach(node, Attached::Primary),
        }
    }

    fn begin_at_store(&mut self, fault: StoreFault, until: Moment) {
        let Self { ctx, store, .. } = self;
        match fault {
            StoreFault::Failover { lost, pause, lingers } => self.fail_over(lost, pause, lingers),
            StoreFault::Restore { lost, .. } => {
                for node in ctx.home_publishers() {
                    self.kill(node);
                }
                self.store.restore(&mut self.ctx, lost);
                self.store.down_until = until;
            }
            StoreFault::Slow(times) => store.slowness = times,
            StoreFault::Down => store.down_until = until,
            StoreFault::Copy(after) => {
                self.copy = Some(store.copy(ctx));
                for node in ctx.copys_publishers() {
                    ctx.queue.push(ctx.now.after(after), SimEvent::Restart(node));
                }
            }
        }
    }

    fn end_at_store(&mut self, fault: StoreFault) {
        let Self { ctx, store, .. } = self;
        match fault {
            StoreFault::Failover { .. } => {
                for node in ctx.home_publishers() {
                    store.attach(node, Attached::Primary);
                }
            }
            StoreFault::Restore { declared, .. } => {
                if declared {
                    store.begin_incarnation(ctx, BeginCause::Declared, 0);
                }
                for node in ctx.home_publishers() {
                    self.start(node);
                }
            }
            StoreFault::Slow(_) => store.slowness = 1,
            StoreFault::Down => {}
            StoreFault::Copy(_) => {
                for node in ctx.copys_publishers() {
                    self.kill(node);
                }
                self.copy = None;
            }
        }
    }

    fn fail_over(&mut self, lost: u64, pause: Micros, lingers: Micros) {
        let ctx = &mut self.ctx;
        self.store.fail_over(ctx, lost);
        self.store.down_until = ctx.now.after(pause);
        for publisher in &self.publishers[..ctx.settings.publishers] {
            let node = publisher.process.node;
            self.store.attach(node, Attached::Demoted);
            if lingers < Micros::MAX {
                let at = ctx.now.after(ctx.dice.below(lingers + 1));
                ctx.queue.push(at, SimEvent::Publisher(node, publisher.process.life, PublisherEvent::Attach));
            }
        }
    }

    /// Calls an operator if a publisher is silent because its store lacks what agents have seen. One restore may need
    /// several declarations, because an earlier declaration may be among what was lost.
    fn call_operator(&mut self) {
        let is_behind = |publisher: &SimPublisher| publisher.standing() == Standing::Behind;
        let at_home = &self.publishers[..self.ctx.settings.publishers];
        if self.is_operator_called || !at_home.iter().any(is_behind) {
            return;
        }
        self.is_operator_called = true;
        self.ctx.health.fault_begins(None);
        let bound = self.ctx.settings.bound.as_micros() as u64;
        let at = within(&mut self.ctx, bound);
        self.ctx.queue.push(at, SimEvent::Operator);
    }

    /// An operator declares the store.
    fn declare(&mut self) {
        let ctx = &mut self.ctx;
        if ctx.now < self.store.down_until {
            return ctx.queue.push(self.store.down_until, SimEvent::Operator);
        }
        self.is_operator_called = false;
        self.store.begin_incarnation(ctx, BeginCause::Declared, 0);
        ctx.health.fault_ends(ctx.now, None);
    }

    /// The connection is lost or new, and both ends detect it.
    fn connection(&mut self, node: NodeNumber, up: bool) {
        let up = up && self.process(node).state != ProcessState::Down;
        let link = &mut self.ctx.net.links[node.0];
        (link.connected, link.listening) = (up, up);
        let agents = self.agents.len();
        match self.agents.get_mut(node.0) {
            _ if !up => {}
            Some(agent) => agent.connected(&mut self.ctx),
            None => self.publishers[node.0 - agents].connected(),
        }
    }

    fn kill(&mut self, node: NodeNumber) {
        self.process(node).kill();
        let link = &mut self.ctx.net.links[node.0];
        (link.connected, link.listening) = (false, false);
    }

    fn thaw(&mut self, node: NodeNumber, suspend: bool) {
        let Self { ctx, agents, publishers, .. } = self;
        let stood = suspend && ctx.lacks(Assumption::ClocksCountSuspension);
        match agents.get_mut(node.0) {
            Some(agent) => agent.process.thaw(ctx, stood),
            None => publishers[node.0 - agents.len()].thaw(ctx, stood),
        }
    }

    /// An agent without faults for long enough must be live (G5).
    fn on_second(&mut self) {
        self.call_operator();
        let ctx = &mut self.ctx;
        ctx.queue.push(ctx.now.after(SECOND), SimEvent::Second);
        let well = |node: NodeNumber| ctx.health.healthy_for(ctx.now, node);
        let best = ctx.home_publishers().filter_map(well).max();
        for agent in &self.agents {
            let node = agent.process.node;
            let Some(since) = well(node).min(best) else { continue };
            if since > LIVE_GRACE && ctx.now.0 > LIVE_GRACE && agent.mode(ctx.now) != Mode::Live {
                let mode = agent.mode(ctx.now);
                let what = format!("{node:?} is {mode:?} long after the last fault of it and of a publisher");
                ctx.checker.violated(Rule::G5, ctx.now, what);
            }
        }
    }
}

fn within(ctx: &mut Ctx, span: Micros) -> Moment {
    ctx.now.after(ctx.dice.below(span))
}
