//! The time since the last fault of each node: liveness (G5) is demanded only after a while without faults.

use std::collections::BTreeMap;

use crate::node::NodeNumber;
use crate::time::{Micros, Moment};

/// Faults under way, by node; those of the store by `None`.
#[derive(Debug, Default)]
pub struct SimHealth(BTreeMap<Option<NodeNumber>, Health>);

#[derive(Clone, Copy, Debug, Default)]
struct Health {
    faults: u32,
    healthy_since: Moment,
}

impl SimHealth {
    pub fn fault_begins(&mut self, node: Option<NodeNumber>) {
        self.0.entry(node).or_default().faults += 1;
    }

    pub fn fault_ends(&mut self, now: Moment, node: Option<NodeNumber>) {
        let health = self.0.entry(node).or_default();
        health.faults -= 1;
        health.healthy_since = now;
    }

    /// The time without a fault of the node and the store; `None` during a fault.
    pub fn healthy_for(&self, now: Moment, node: NodeNumber) -> Option<Micros> {
        let [node, store] = [Some(node), None].map(|node| self.0.get(&node).copied().unwrap_or_default());
        (node.faults + store.faults == 0).then(|| now.since(node.healthy_since.max(store.healthy_since)))
    }
}
