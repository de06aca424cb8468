//! What every part of the world may use: the time, the future, chance, the network, the checkers.

use evictd_core::rules::Rule;

use crate::assumption::Assumption;
use crate::checker::Checker;
use crate::health::SimHealth;
use crate::net::Net;
use crate::node::NodeNumber;
use crate::queue::Queue;
use crate::rng::Dice;
use crate::rows::KeyNumber;
use crate::scenario::SimSettings;
use crate::time::{Micros, Moment, SECOND};
use crate::trace::SimTrace;

#[derive(Debug)]
pub struct Ctx {
    /// Real time. Processes read their own clocks instead.
    pub now: Moment,
    pub queue: Queue,
    pub dice: Dice,
    pub net: Net,
    pub checker: Checker,
    pub health: SimHealth,
    /// The last long pause: they don't happen all at once.
    pub starved_at: Moment,
    pub trace: SimTrace,
    pub settings: SimSettings,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DenialReason {
    Busy,
    Unreachable,
    /// What arrived is too old, twice.
    Stale,
}

/// The time without faults after which no verification may be denied.
const DENIAL_GRACE: Micros = 15 * SECOND;

impl Ctx {
    /// The surroundings of all processes of a world, before anything happened.
    pub fn new(settings: SimSettings, dice: Dice, trace: SimTrace) -> Self {
        let bound = settings.bound.as_micros() as u64;
        Self {
            now: Moment(0),
            queue: Queue::default(),
            net: Net::new(settings.agents, &settings.distances),
            checker: Checker::new(bound),
            health: SimHealth::default(),
            starved_at: Moment(0),
            dice,
            trace,
            settings,
        }
    }

    pub fn violated(&mut self, rule: Rule, what: String) {
        self.checker.violated(rule, self.now, what);
    }

    pub fn lacks(&self, assumption: Assumption) -> bool {
        self.settings.lacking == Some(assumption)
    }

    pub fn home_publishers(&self) -> impl Iterator<Item = NodeNumber> + use<> {
        (self.settings.agents..self.settings.agents + self.settings.publishers).map(NodeNumber)
    }

    pub fn copys_publishers(&self) -> impl Iterator<Item = NodeNumber> + use<> {
        let first = self.settings.agents + self.settings.publishers;
        (first..first + self.settings.copies).map(NodeNumber)
    }

    /// Whether this publisher works on a copy of the home store.
    pub fn is_at_copy(&self, publisher: NodeNumber) -> bool {
        publisher.0 >= self.settings.agents + self.settings.publishers
    }

    /// A verification was denied, which is a violation without faults (G5).
    pub fn denied(&mut self, agent: NodeNumber, key: KeyNumber, why: DenialReason) {
        self.checker.counts.denied += 1;
        let all = [agent].into_iter().chain(self.home_publishers());
        let well = all.map(|node| self.health.healthy_for(self.now, node)).min().flatten();
        if why != DenialReason::Busy && well.is_some_and(|well| well > DENIAL_GRACE) {
            self.violated(Rule::G5, format!("{agent:?} denied {key:?} ({why:?}) long after the last fault"));
        }
    }
}
