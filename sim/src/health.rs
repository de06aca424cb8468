//! The time since the last fault of each node: liveness (G5) is demanded only after a while without faults.

use crate::node::NodeNumber;
use crate::time::{Micros, Moment};

/// Faults under way, by node, and the store's.
#[derive(Debug)]
pub struct SimHealth {
    nodes: Vec<NodeHealth>,
    store: NodeHealth,
}

#[derive(Clone, Copy, Debug, Default)]
struct NodeHealth {
    faults: u32,
    healthy_since: Moment,
}

impl NodeHealth {
    fn healthy_for(&self, now: Moment) -> Option<Micros> {
        (self.faults == 0).then(|| now.since(self.healthy_since))
    }
}

impl SimHealth {
    /// Without faults.
    pub fn new(nodes: usize) -> Self {
        Self { nodes: vec![NodeHealth::default(); nodes], store: NodeHealth::default() }
    }

    /// A fault of a node, or of the store, begins.
    pub fn fault_begins(&mut self, node: Option<NodeNumber>) {
        self.condition(node).faults += 1;
    }

    pub fn fault_ends(&mut self, now: Moment, node: Option<NodeNumber>) {
        let condition = self.condition(node);
        condition.faults -= 1;
        condition.healthy_since = now;
    }

    fn condition(&mut self, node: Option<NodeNumber>) -> &mut NodeHealth {
        match node {
            Some(node) => &mut self.nodes[node.0],
            None => &mut self.store,
        }
    }

    /// The time without a fault of the node and the store; `None` during a fault.
    pub fn healthy_for(&self, now: Moment, node: NodeNumber) -> Option<Micros> {
        Some(self.nodes[node.0].healthy_for(now)?.min(self.store.healthy_for(now)?))
    }
}
