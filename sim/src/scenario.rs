//! Scenarios: the settings of a world, and its faults. All of it is drawn from the seed.

use std::time::Duration;

use clap::ValueEnum;
use evictd_core::floors::FloorLimits;
use evictd_core::follower::FollowerConfig;
use evictd_core::lease::Bound;

use crate::assumption::Assumption;
use crate::fault::{Fault, NodeFault, ScheduledFault, StoreFault};
use crate::message::Kinds;
use crate::node::NodeNumber;
use crate::rng::Dice;
use crate::time::{MS, Micros, Moment, SECOND};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
pub enum Scenario {
    /// No fault.
    Calm,
    /// Messages are lost and repeated.
    Loss,
    /// Messages overtake each other, and are held up for long.
    Reorder,
    /// Links carry nothing, in one direction or both.
    Partition,
    /// Links are dead, and neither end detects it.
    HalfOpen,
    /// Processes freeze.
    Freeze,
    /// Processes are killed and started again.
    Crash,
    /// Another primary takes over, often without the last commits.
    Failover,
    /// The store is put back to an older copy.
    Restore,
    /// Agents read from replicas that lag.
    Replica,
    /// Clocks drift, and machines sleep.
    Clocks,
    /// Many keys are deleted at once, and floors are few.
    Bulk,
    /// All of them.
    Everything,
    /// A copy of the store starts beside it, with a publisher of its own: from a backup, or the original of a
    /// store that was restored.
    Copies,
}

impl Scenario {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

#[derive(Clone, Debug)]
pub struct SimSettings {
    /// The first nodes.
    pub agents: usize,
    /// The nodes after the agents.
    pub publishers: usize,
    /// Whether the store is one publisher's alone, as SQLite's is: it begins an incarnation at each start, and can be
    /// put back unnoticed. A shared one fails over, and shows that, as PostgreSQL does.
    pub exclusive: bool,
    /// Copies of the store that are started, each with a publisher of its own.
    pub copies: usize,
    pub bound: Duration,
    pub margin: Duration,
    pub probe_interval: Duration,
    /// The silence after which a query is repeated.
    pub request_timeout: Duration,
    /// The time in which a gap may close by itself.
    pub gap_patience: Duration,
    pub floors: FloorLimits,
    pub keys: usize,
    pub end: Moment,
    /// Clocks run by at most so many millionths too fast or too slow.
    pub drift_ppm: u64,
    /// How far behind replicas are, for agents that read from one.
    pub replica_lag: Option<Micros>,
    pub changes_per_second: u64,
    /// Random verifications in a second, at each agent.
    pub verifications_per_second: u64,
    /// How often there is a bulk deletion; zero for never.
    pub bulk_every: Micros,
    /// Commits with an unknown outcome, of 1,000.
    pub unknown_permille: u32,
    /// Transactions that take long, of 1,000.
    pub long_transactions_permille: u32,
    /// Lookups that take long, of 1,000.
    pub slow_loads_permille: u32,
    /// Verifications, loads and inputs that other events interrupt, of 1,000.
    pub preempted_permille: u32,
    /// Long pauses among those, of 1,000.
    pub starved_permille: u32,
    /// Verifications among those that stall for long, of 1,000.
    pub stalled_verifications_permille: u32,
    /// Faults that come in pairs, of 1,000.
    pub paired_permille: u32,
    /// Whether every process that exits announces that: receipts wait for the others.
    pub polite: bool,
    /// How long rows of the log are kept.
    pub retention: Duration,
    /// Distances to the centre of the network, by node.
    pub distances: Vec<Micros>,
    /// The assumption that doesn't hold.
    pub lacking: Option<Assumption>,
}

impl SimSettings {
    pub fn bound(&self) -> Bound {
        // In proportion by construction; a bound that isn't trusts nothing.
        Bound::new(self.bound, self.margin).unwrap_or_else(|_| unreachable!("a tenth is kept back"))
    }

    pub fn follower(&self) -> FollowerConfig {
        FollowerConfig {
            bound: self.bound(),
            probe_interval: self.probe_interval,
            request_timeout: self.request_timeout,
            gap_patience: self.gap_patience,
            floors: self.floors,
            home_store: None,
        }
    }

    fn bound_micros(&self) -> Micros {
        self.bound.as_micros() as u64
    }

    pub fn draw(scenario: Scenario, dice: &mut Dice) -> Self {
        // The default configuration, or one with a third of all times: it finds the same in less time.
        let default = dice.permille(250);
        let scale = |ms: u64| Duration::from_millis(if default { ms } else { ms / 3 });
        let agents = dice.between(2, 4) as usize;
        // Only SQLite's store can be put back without a trace.
        let exclusive = match scenario {
            Scenario::Restore => true,
            Scenario::Failover => false,
            _ => dice.permille(250),
        };
        let publishers = if exclusive { 1 } else { dice.between(1, 3) as usize };
        let copies = usize::from(scenario == Scenario::Copies);
        let bulk = matches!(scenario, Scenario::Bulk | Scenario::Everything);
        let bound = scale(30_000);
        let keys = dice.between(400, 4_000) as usize;
        let floors = if bulk {
            FloorLimits { keys: dice.between(20, 400) as usize, scopes: dice.between(3, 20) as usize }
        } else {
            FloorLimits::default()
        };
        let replica =
            matches!(scenario, Scenario::Replica) || (scenario == Scenario::Everything && dice.permille(300));
        let far = dice.permille(500);
        let distance = |dice: &mut Dice, agent: bool| {
            if agent { dice.between(200, if far { 40 * MS } else { 2 * MS }) } else { dice.between(100, MS) }
        };
        let distances = (0..agents + publishers + copies).map(|node| distance(dice, node < agents)).collect();
        let troubled = !matches!(scenario, Scenario::Calm | Scenario::Replica | Scenario::Bulk);
        Self {
            agents,
            publishers,
            exclusive,
            copies,
            bound,
            margin: scale(3_000),
            probe_interval: scale(5_000),
            request_timeout: Duration::from_millis(if default { 1_000 } else { 500 }),
            gap_patience: Duration::from_millis(20),
            floors,
            keys,
            end: Moment(4 * bound.as_micros() as u64 + 20 * SECOND),
            drift_ppm: if scenario == Scenario::Clocks { 20_000 } else { 200 },
            replica_lag: replica.then(|| dice.between(10 * MS, 40 * SECOND)),
            changes_per_second: dice.between(100, 400),
            verifications_per_second: dice.between(50, 200),
            bulk_every: if bulk { dice.between(SECOND / 2, 4 * SECOND) } else { 0 },
            unknown_permille: if troubled { dice.below(10) as u32 } else { 0 },
            long_transactions_permille: if dice.permille(500) { 20 } else { 0 },
            slow_loads_permille: if dice.permille(500) { 50 } else { 2 },
            preempted_permille: dice.pick(&[20, 100, 300]),
            starved_permille: if troubled { 10 } else { 0 },
            stalled_verifications_permille: if troubled { 2 } else { 0 },
            paired_permille: 300,
            polite: dice.permille(500),
            retention: if dice.permille(300) {
                Duration::from_millis(dice.between(500, 40_000))
            } else {
                Duration::MAX
            },
            distances,
            lacking: None,
        }
    }
}

/// Draws the faults. They begin after a first lease and end early enough that every agent must be live at the
/// world's end.
pub fn draw_faults(scenario: Scenario, settings: &SimSettings, dice: &mut Dice) -> Vec<ScheduledFault> {
    let kinds: &[Scenario] = match scenario {
        Scenario::Everything => &Scenario::value_variants()[1..12],
        Scenario::Copies => &[Scenario::Loss, Scenario::Partition, Scenario::Freeze, Scenario::Crash],
        _ => &[scenario],
    };
    let count = match scenario {
        Scenario::Calm | Scenario::Replica | Scenario::Bulk => 0,
        Scenario::Failover | Scenario::Restore => dice.between(1, 3),
        Scenario::Everything => dice.between(3, 12),
        Scenario::Crash => dice.between(4, 40),
        _ => dice.between(2, 8),
    };
    let bound = settings.bound_micros();
    let last = Moment(3 * bound);
    let mut faults = Vec::new();
    for _ in 0..count {
        let kind = dice.pick(kinds);
        let from = Moment(dice.between(bound / 3, 5 * bound / 2));
        let span = if dice.permille(500) { dice.below(bound / 2) } else { dice.below(3 * bound / 2) };
        let restarts = kind == Scenario::Crash && dice.permille(700);
        let until = from.after(if restarts { dice.below(SECOND) } else { span }).min(last);
        let pair = dice.permille(settings.paired_permille);
        let mut drawn = if pair { draw_pair(kind, settings, from, dice) } else { Vec::new() };
        // Not every kind comes in pairs.
        if drawn.is_empty() {
            drawn.extend(draw_fault(kind, settings, dice).map(|fault| ScheduledFault { from, until, fault }));
        }
        faults.append(&mut drawn);
    }
    if scenario == Scenario::Copies {
        // A copy that home's publishers don't answer may serve, which is what the model's worlds are for.
        faults.retain(|fault| fault.fault.node().is_some_and(|node| node.0 < settings.agents));
        faults.extend(draw_copy(settings, dice));
    }
    for fault in &mut faults {
        fault.until = fault.until.min(last).max(fault.from.after(MS));
    }
    faults.sort_by_key(|fault| fault.from);
    faults
}

/// A copy, what goes wrong with its publisher, and perhaps a restore of the store that it was made from: then the copy
/// is the original, which comes back when the restored one serves.
fn draw_copy(settings: &SimSettings, dice: &mut Dice) -> Vec<ScheduledFault> {
    let bound = settings.bound_micros();
    let from = Moment(dice.between(bound / 3, 3 * bound / 2));
    let mut after = if dice.permille(500) { 0 } else { dice.below(bound) };
    let mut faults = Vec::new();
    if settings.exclusive && dice.permille(600) {
        let (lasts, lost) = (dice.below(3 * SECOND), dice.below(5_000));
        let restore = Fault::Store(StoreFault::Restore { lost, declared: true });
        faults.push(ScheduledFault { from, until: from.after(lasts), fault: restore });
        after += lasts + RESTORED_WITHIN;
    }
    faults.insert(
        0,
        ScheduledFault { from, until: Moment::NEVER, fault: Fault::Store(StoreFault::Copy(after)) },
    );
    let node = NodeNumber(settings.agents + settings.publishers);
    for _ in 0..dice.below(4) {
        let fault = match dice.below(3) {
            0 => NodeFault::Freeze { suspend: false },
            1 => NodeFault::Crash { leaves: dice.permille(500) },
            _ => NodeFault::Disconnect,
        };
        let from = from.after(after + dice.below(bound));
        let until = from.after(dice.below(bound));
        faults.push(ScheduledFault { from, until, fault: Fault::Node(node, fault) });
    }
    faults
}

/// The time in which the publisher of a declared store serves: it queries other publishers first.
const RESTORED_WITHIN: Micros = 8 * SECOND;

/// Draws two faults, of which the second makes the first one matter. For example, an agent detects a missed row within
/// milliseconds, unless it is cut off right then.
fn draw_pair(kind: Scenario, settings: &SimSettings, from: Moment, dice: &mut Dice) -> Vec<ScheduledFault> {
    let bound = settings.bound_micros();
    let agent = NodeNumber(dice.index(settings.agents));
    let at_agent = |fault| Fault::Node(agent, fault);
    let cut = (at_agent(NodeFault::Cut { deaf: true, mute: false, reconnects: true }), bound + bound / 4);
    let (first, lasts, (second, second_lasts)) = match kind {
        Scenario::Reorder => {
            let late = dice.pick(&[4 * SECOND, 8 * SECOND, 20 * SECOND]);
            (at_agent(NodeFault::Noise { loss: 0, twice: 0, late: (500, late) }), 3 * SECOND, cut)
        }
        Scenario::Failover => (Fault::Store(StoreFault::Slow(dice.between(2_000, 8_000))), 8 * SECOND, cut),
        // Nothing else is needed here: a cut for so long is.
        Scenario::Clocks | Scenario::Partition => (at_agent(NodeFault::Gap(Kinds::NONE)), SECOND, cut),
        Scenario::Crash => {
            let restart = (at_agent(NodeFault::Crash { leaves: true }), SECOND / 2);
            (at_agent(NodeFault::Noise { loss: 300, twice: 0, late: (0, 0) }), 8 * SECOND, restart)
        }
        _ => return Vec::new(),
    };
    let then = from.after(dice.below(lasts));
    vec![
        ScheduledFault { from, until: from.after(lasts), fault: first },
        ScheduledFault { from: then, until: then.after(second_lasts), fault: second },
    ]
}

fn draw_fault(kind: Scenario, settings: &SimSettings, dice: &mut Dice) -> Option<Fault> {
    let nodes = settings.agents + settings.publishers;
    let node = NodeNumber(dice.index(nodes));
    let agent = NodeNumber(dice.index(settings.agents));
    let publisher = NodeNumber(settings.agents + dice.index(settings.publishers));
    let (node, fault) = match kind {
        Scenario::Calm | Scenario::Replica | Scenario::Bulk => return None,
        Scenario::Loss if dice.permille(300) => {
            let kinds =
                [Kinds::LIVE, Kinds::REPLAY, Kinds::APPLIED, Kinds::LIVE.and(Kinds::TICK).and(Kinds::REPLAY)];
            (agent, NodeFault::Gap(dice.pick(&kinds)))
        }
        Scenario::Loss => {
            let (loss, twice) = (dice.between(1, 400) as u32, dice.below(200) as u32);
            (node, NodeFault::Noise { loss, twice, late: (dice.below(100) as u32, 100 * MS) })
        }
        Scenario::Reorder if dice.permille(400) => (node, NodeFault::Stall),
        Scenario::Reorder => {
            let late = dice.pick(&[50 * MS, SECOND, 40 * SECOND]);
            let twice = dice.below(300) as u32;
            (node, NodeFault::Noise { loss: 0, twice, late: (dice.between(20, 500) as u32, late) })
        }
        Scenario::Partition if dice.permille(250) => (node, NodeFault::Disconnect),
        Scenario::Partition => {
            let (deaf, mute) = dice.pick(&[(true, true), (true, false), (false, true)]);
            (node, NodeFault::Cut { deaf, mute, reconnects: true })
        }
        Scenario::HalfOpen => (node, NodeFault::Cut { deaf: true, mute: true, reconnects: false }),
        Scenario::Freeze => (node, NodeFault::Freeze { suspend: false }),
        Scenario::Clocks if dice.permille(500) => {
            (agent, NodeFault::Cut { deaf: true, mute: true, reconnects: true })
        }
        Scenario::Clocks => (node, NodeFault::Freeze { suspend: true }),
        Scenario::Crash => (node, NodeFault::Crash { leaves: settings.polite || dice.permille(300) }),
        // One publisher's own store can't fail over.
        Scenario::Failover => match dice.below(if settings.exclusive { 3 } else { 10 }) {
            0 => return Some(Fault::Store(StoreFault::Slow(dice.between(5, 400)))),
            1 => return Some(Fault::Store(StoreFault::Down)),
            2 => (publisher, NodeFault::Detached),
            _ => {
                let lost = if dice.permille(300) { 0 } else { dice.below(2_000) };
                let pause = dice.below(3 * SECOND);
                let lingers =
                    if dice.permille(500) { Micros::MAX } else { dice.below(settings.bound_micros()) };
                return Some(Fault::Store(StoreFault::Failover { lost, pause, lingers }));
            }
        },
        // A server that is put back begins another timeline, like one that fails over.
        Scenario::Restore if !settings.exclusive => return draw_fault(Scenario::Failover, settings, dice),
        Scenario::Restore => {
            let (lost, declared) = (dice.below(20_000), dice.permille(300));
            return Some(Fault::Store(StoreFault::Restore { lost, declared }));
        }
        Scenario::Everything | Scenario::Copies => return draw_fault(Scenario::Loss, settings, dice),
    };
    Some(Fault::Node(node, fault))
}
