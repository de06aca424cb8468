//! Who has been well for how long: what liveness (G5) may be demanded of.

use crate::queue::Node;
use crate::time::{Micros, Moment};

/// Faults under way, by node, and the store's.
#[derive(Debug)]
pub struct Health {
    nodes: Vec<Condition>,
    store: Condition,
}

#[derive(Clone, Copy, Debug, Default)]
struct Condition {
    faults: u32,
    well_since: Moment,
}

impl Condition {
    fn well_for(&self, now: Moment) -> Option<Micros> {
        (self.faults == 0).then(|| now.since(self.well_since))
    }
}

impl Health {
    /// Everybody is well.
    pub fn new(nodes: usize) -> Self {
        Self { nodes: vec![Condition::default(); nodes], store: Condition::default() }
    }

    /// Something goes wrong with a node, or the store.
    pub fn falls_ill(&mut self, node: Option<Node>) {
        self.condition(node).faults += 1;
    }

    /// It is over.
    pub fn recovers(&mut self, now: Moment, node: Option<Node>) {
        let condition = self.condition(node);
        condition.faults -= 1;
        condition.well_since = now;
    }

    fn condition(&mut self, node: Option<Node>) -> &mut Condition {
        match node {
            Some(node) => &mut self.nodes[node.0],
            None => &mut self.store,
        }
    }

    /// How long a node, and the store, have been well; `None` if they aren't.
    pub fn well_for(&self, now: Moment, node: Node) -> Option<Micros> {
        Some(self.nodes[node.0].well_for(now)?.min(self.store.well_for(now)?))
    }
}
