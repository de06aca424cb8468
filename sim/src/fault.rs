//! What goes wrong, as data: a schedule drawn from the seed before the world begins.

use crate::message::Kinds;
use crate::node::NodeNumber;
use crate::time::{Micros, Moment};

/// Whether a fault begins or ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Edge {
    Begin,
    End,
}

/// A fault with a duration.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A link loses, repeats and delays messages.
    Noise {
        node: NodeNumber,
        /// Lost messages, of 1,000.
        loss: u32,
        /// Repeated messages, of 1,000.
        twice: u32,
        /// Overtaken messages, of 1,000, and the longest delay.
        late: (u32, Micros),
    },
    /// A link lets some kinds of messages through and others not.
    Gap {
        node: NodeNumber,
        /// What is lost.
        kinds: Kinds,
    },
    /// A link carries nothing in, or out, or both, and neither end notices.
    Cut {
        node: NodeNumber,
        /// Nothing gets in.
        deaf: bool,
        /// Nothing gets out.
        mute: bool,
        /// After the cut the connection is new, and the process notices it.
        reconnects: bool,
    },
    /// A link holds its messages, and delivers them at the end.
    Stall { node: NodeNumber },
    /// The connection is down, and both ends notice it.
    Disconnect { node: NodeNumber },
    /// A process is stopped (SIGSTOP).
    Freeze {
        node: NodeNumber,
        /// Whether its machine sleeps, clock and all, if the clock doesn't count that.
        suspend: bool,
    },
    /// A process is killed, and started again at the end.
    Crash {
        node: NodeNumber,
        /// Whether it sends a leave message first.
        leaves: bool,
    },
    /// Another primary takes over, which lacks the last commits. The old one answers reads until the end.
    Failover {
        /// How many commits are lost.
        lost: u64,
        /// How long nothing can be written.
        pause: Micros,
        /// How long each publisher stays with the old primary, at most; over the end, all stay until then.
        lingers: Micros,
    },
    /// The store is put back to an older copy; publishers are stopped meanwhile.
    Restore {
        /// How many commits are lost.
        lost: u64,
        /// Whether an operator declares the store at once; otherwise only when its publishers are silent.
        declared: bool,
    },
    /// The store is copied, and publishers are started on the copy later. They are stopped at the end.
    Copy {
        /// How long after that.
        after: Micros,
    },
    /// The store is slow.
    Slow { times: u64 },
    /// No publisher reaches the store.
    Down,
    /// One publisher doesn't reach the store.
    Detached { node: NodeNumber },
}

#[derive(Clone, Debug)]
pub struct ScheduledFault {
    pub from: Moment,
    pub until: Moment,
    pub fault: Fault,
}

impl Fault {
    /// The node that it affects; `None` for all.
    pub fn node(&self) -> Option<NodeNumber> {
        match self {
            Self::Noise { node, .. }
            | Self::Gap { node, .. }
            | Self::Cut { node, .. }
            | Self::Stall { node }
            | Self::Disconnect { node }
            | Self::Freeze { node, .. }
            | Self::Crash { node, .. }
            | Self::Detached { node } => Some(*node),
            Self::Failover { .. }
            | Self::Restore { .. }
            | Self::Copy { .. }
            | Self::Slow { .. }
            | Self::Down => None,
        }
    }
}
