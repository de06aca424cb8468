//! A model of core NATS: at-most-once delivery, queue groups, and faults.
//!
//! Every process has one connection. A message goes through the sender's link and the receiver's; each
//! can lose, repeat or delay it. A link can be dead while its process, or the server, takes it
//! for working (half-open): queries to a queue group then still go to a member that receives nothing.

use crate::message::Kinds;
use crate::node::{Life, NodeNumber};
use crate::time::{Micros, Moment};

/// What is wrong with a link now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Trouble {
    /// Messages lost, of 1,000, each way.
    pub loss: u32,
    /// Messages that come twice.
    pub twice: u32,
    /// Messages that are overtaken, and by how much at most.
    pub late: (u32, Micros),
    /// Nothing gets in.
    pub deaf: bool,
    /// Nothing gets out.
    pub mute: bool,
    /// What is on the way is held until then, and arrives then.
    pub held_until: Moment,
    /// Kinds that are lost on the way in or out.
    pub without: Kinds,
}

impl Trouble {
    pub fn is_any(&self) -> bool {
        *self != Self::default()
    }
}

#[derive(Clone, Debug, Default)]
pub struct SimLink {
    pub trouble: Trouble,
    /// As the process sees it.
    pub connected: bool,
    /// Whether the server has its subscriptions.
    pub listening: bool,
    /// Whether it is a member of the queue groups (R14).
    pub serving: bool,
    /// Which run of the process it belongs to.
    pub life: Life,
    /// When something was last wrong with it.
    pub clear_since: Moment,
    /// Distance to the centre of the network.
    pub distance: Micros,
}

impl SimLink {
    /// Whether a message of the server itself arrives.
    pub fn is_open(&self, now: Moment) -> bool {
        !self.trouble.mute && !self.trouble.deaf && self.trouble.held_until <= now
    }
}

#[derive(Debug)]
pub struct Net {
    pub links: Vec<SimLink>,
    pub agents: usize,
    /// The last arrival on each path, so that order is kept where nothing disturbs it.
    pub last: Vec<Moment>,
}

/// The receivers of a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Audience {
    One,
    All,
}

impl Net {
    /// A network of so many agents, and publishers, at these distances.
    pub fn new(agents: usize, distances: &[Micros]) -> Self {
        let link = |distance: &Micros| SimLink { distance: *distance, ..SimLink::default() };
        let last = vec![Moment(0); distances.len() * distances.len()];
        Self { links: distances.iter().map(link).collect(), agents, last }
    }

    /// The publishers that receive a query: all others, or the nearest one that serves. Queue groups prefer their own
    /// cluster.
    pub fn receivers(&self, from: NodeNumber, audience: Audience) -> Vec<NodeNumber> {
        let publishers = (self.agents..self.links.len()).map(NodeNumber);
        let others = publishers.filter(|node| *node != from && self.links[node.0].listening);
        match audience {
            Audience::All => others.collect(),
            Audience::One => {
                let count = self.links.len() - self.agents;
                let serving = others.filter(|node| self.links[node.0].serving);
                serving.min_by_key(|node| (node.0 + from.0) % count).into_iter().collect()
            }
        }
    }
}
