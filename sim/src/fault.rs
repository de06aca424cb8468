//! Faults, as data: a schedule drawn from the seed before the world begins.

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
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    Node(NodeNumber, NodeFault),
    Store(StoreFault),
}

/// A fault of a process, or of its link.
#[derive(Clone, Copy, Debug)]
pub enum NodeFault {
    /// The link loses, repeats and delays messages.
    Noise {
        /// Lost messages, of 1,000.
        loss: u32,
        /// Repeated messages, of 1,000.
        twice: u32,
        /// Overtaken messages, of 1,000, and the longest delay.
        late: (u32, Micros),
    },
    /// The link loses these kinds of messages.
    Gap(Kinds),
    /// The link carries nothing in, or out, or both, and neither end detects it.
    Cut {
        /// Nothing gets in.
        deaf: bool,
        /// Nothing gets out.
        mute: bool,
        /// After the cut the connection is new, and the process detects it.
        reconnects: bool,
    },
    /// The link holds its messages, and delivers them at the end.
    Stall,
    /// The connection is down, and both ends detect it.
    Disconnect,
    /// The process is stopped (SIGSTOP).
    Freeze {
        /// Whether its machine sleeps, clock and all, if the clock doesn't count that.
        suspend: bool,
    },
    /// The process is killed, and started again at the end.
    Crash {
        /// Whether it sends a leave message first.
        leaves: bool,
    },
    /// The publisher doesn't reach the store.
    Detached,
}

/// A fault of the home store.
#[derive(Clone, Copy, Debug)]
pub enum StoreFault {
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
    /// The store is copied, and publishers are started on the copy after this time. They are stopped at the end.
    Copy(Micros),
    /// Each statement takes so many times as long.
    Slow(u64),
    /// No publisher reaches the store.
    Down,
}

#[derive(Clone, Copy, Debug)]
pub struct ScheduledFault {
    pub from: Moment,
    pub until: Moment,
    pub fault: Fault,
}

impl Fault {
    /// The node that it affects; `None` for all.
    pub fn node(&self) -> Option<NodeNumber> {
        match self {
            Self::Node(node, _) => Some(*node),
            Self::Store(_) => None,
        }
    }
}
