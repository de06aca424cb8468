//! What every part of the world may use: the time, the future, chance, the network, the checkers.

use evictd_core::rules::Rule;

use crate::assumption::Assumption;
use crate::checker::Checker;
use crate::event::SimEvent;
use crate::health::SimHealth;
use crate::net::Net;
use crate::node::NodeNumber;
use crate::queue::Queue;
use crate::rng::Dice;
use crate::rows::KeyNumber;
use crate::scenario::SimSettings;
use crate::time::{Micros, Moment, SECOND};
use crate::trace::SimTrace;

/// The surroundings of a process.
#[derive(Debug)]
pub struct Ctx {
    /// Real time. Processes look at their own clocks instead.
    pub now: Moment,
    /// What is still to happen.
    pub queue: Queue<SimEvent>,
    /// Chance.
    pub dice: Dice,
    /// The network.
    pub net: Net,
    /// The truth, and its comparison with the answers.
    pub checker: Checker,
    /// Who has been well for how long.
    pub health: SimHealth,
    /// When something last starved: not everything does at once.
    pub starved_at: Moment,
    /// Where lines go.
    pub trace: SimTrace,
    /// How this world was set up.
    pub settings: SimSettings,
}

/// Why there is no record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DenialReason {
    /// Too many loads.
    Busy,
    /// No publisher answered.
    Unreachable,
    /// What arrived is too old, twice.
    Stale,
}

/// How long everything must have been well before a denial is one too many.
const DENIAL_GRACE: Micros = 15 * SECOND;

impl Ctx {
    /// The surroundings of all processes of a world, before anything happened.
    pub fn new(settings: SimSettings, dice: Dice, trace: SimTrace) -> Self {
        let nodes = settings.agents + settings.publishers + settings.copies;
        let bound = settings.bound.as_micros() as u64;
        Self {
            now: Moment(0),
            queue: Queue::default(),
            net: Net::new(settings.agents, &settings.distances),
            checker: Checker::new(settings.size, bound),
            health: SimHealth::new(nodes),
            starved_at: Moment(0),
            dice,
            trace,
            settings,
        }
    }

    /// Whether this world is set up without it.
    pub fn lacks(&self, assumption: Assumption) -> bool {
        self.settings.lacking == Some(assumption)
    }

    /// The publishers of the home store.
    pub fn home_publishers(&self) -> impl Iterator<Item = NodeNumber> + use<> {
        (self.settings.agents..self.settings.agents + self.settings.publishers).map(NodeNumber)
    }

    /// Those of a copy of it.
    pub fn copys_publishers(&self) -> impl Iterator<Item = NodeNumber> + use<> {
        let first = self.settings.agents + self.settings.publishers;
        (first..first + self.settings.copies).map(NodeNumber)
    }

    /// Whether this publisher works on a copy of the home store.
    pub fn is_at_copy(&self, publisher: NodeNumber) -> bool {
        publisher.0 >= self.settings.agents + self.settings.publishers
    }

    /// A verification was denied. While all is well, it must not be (G5).
    pub fn denied(&mut self, agent: NodeNumber, key: KeyNumber, why: DenialReason) {
        self.checker.counts.denied += 1;
        let all = [agent].into_iter().chain(self.home_publishers());
        let well = all.map(|node| self.health.healthy_for(self.now, node)).min().flatten();
        if why != DenialReason::Busy && well.is_some_and(|well| well > DENIAL_GRACE) {
            self.checker.violated(Rule::G5, self.now, || {
                format!("{agent:?} denied {key:?} ({why:?}), although nothing was wrong any more")
            });
        }
    }
}
