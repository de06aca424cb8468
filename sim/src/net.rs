//! A model of core NATS: at-most-once delivery, queue groups, and faults.
//!
//! Every process has one connection. A message goes through the sender's link and the receiver's; each
//! can lose, repeat or delay it. A link can be dead while its process, or the server, takes it
//! for working (half-open): queries to a queue group then still go to a member that receives nothing.

use crate::message::Kinds;
use crate::node::{Life, NodeNumber};
use crate::time::{Micros, Moment};

/// What is wrong with a link now.
#[derive(Clone, Copy, Debug)]
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
        let noise = self.loss + self.twice + self.late.0;
        self.deaf || self.mute || noise > 0 || self.held_until > Moment(0) || self.without != Kinds::NONE
    }
}

impl Default for Trouble {
    fn default() -> Self {
        Self {
            loss: 0,
            twice: 0,
            late: (0, 0),
            deaf: false,
            mute: false,
            held_until: Moment(0),
            without: Kinds::NONE,
        }
    }
}

#[derive(Clone, Debug)]
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
    /// For the report.
    pub sent: u64,
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
        let link = |distance: &Micros| SimLink {
            trouble: Trouble::default(),
            connected: false,
            listening: false,
            serving: false,
            life: Life::default(),
            clear_since: Moment(0),
            distance: *distance,
        };
        let nodes = distances.len();
        Self {
            links: distances.iter().map(link).collect(),
            agents,
            last: vec![Moment(0); nodes * nodes],
            sent: 0,
        }
    }

    pub fn publishers(&self) -> impl Iterator<Item = NodeNumber> + use<> {
        (self.agents..self.links.len()).map(NodeNumber)
    }

    /// The publishers that receive such a query.
    pub fn listeners(&self, audience: Audience) -> impl Iterator<Item = NodeNumber> {
        self.publishers().filter(move |node| {
            let link = &self.links[node.0];
            link.listening && (audience == Audience::All || link.serving)
        })
    }

    /// The nearest publisher that receives such a query: queue groups prefer their own cluster.
    pub fn nearest(&self, from: NodeNumber, audience: Audience) -> Option<NodeNumber> {
        let publishers = self.links.len() - self.agents;
        self.listeners(audience).min_by_key(|node| (node.0 + from.0) % publishers)
    }
}
