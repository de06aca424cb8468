//! What goes wrong, as data: a schedule drawn from the seed before the world begins.

use crate::net::Kinds;
use crate::queue::Node;
use crate::time::{Micros, Moment};

/// Whether a fault begins or ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Edge {
    /// It begins.
    Begin,
    /// It ends.
    End,
}

/// Something that goes wrong for a while.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A link loses, repeats and delays messages.
    Noise {
        /// Whose link.
        node: Node,
        /// Lost, of 1,000.
        loss: u32,
        /// Repeated, of 1,000.
        twice: u32,
        /// Overtaken, of 1,000, and by how much at most.
        late: (u32, Micros),
    },
    /// A link lets some kinds of messages through and others not.
    Gap {
        /// Whose link.
        node: Node,
        /// What is lost.
        kinds: Kinds,
    },
    /// A link carries nothing in, or out, or both, and neither end notices.
    Cut {
        /// Whose link.
        node: Node,
        /// Nothing gets in.
        deaf: bool,
        /// Nothing gets out.
        mute: bool,
        /// After the heal the connection is new, and the process knows it.
        reconnects: bool,
    },
    /// A link holds everything up, and delivers it in the end.
    Stall {
        /// Whose link.
        node: Node,
    },
    /// The connection is down, and both ends know it.
    Disconnect {
        /// Whose.
        node: Node,
    },
    /// A process stands still (SIGSTOP).
    Freeze {
        /// Which.
        node: Node,
        /// Whether its machine sleeps, clock and all, if the clock doesn't count that.
        suspend: bool,
    },
    /// A process is killed, and started again at the end.
    Crash {
        /// Which.
        node: Node,
        /// Whether it says goodbye first.
        goodbye: bool,
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
        /// Whether an operator says so at once; otherwise when publishers keep silent about it.
        declared: bool,
    },
    /// The store is copied, and publishers are started on the copy later. They are stopped at the end.
    Copy {
        /// How long after that.
        after: Micros,
    },
    /// The store is slow.
    Slow {
        /// So many times as slow.
        times: u64,
    },
    /// Nobody reaches the store.
    Down,
    /// One publisher doesn't reach the store.
    Detached {
        /// Which.
        node: Node,
    },
}

/// A fault, and when.
#[derive(Clone, Debug)]
pub struct Scheduled {
    /// From.
    pub from: Moment,
    /// Until.
    pub until: Moment,
    /// What.
    pub fault: Fault,
}

impl Fault {
    /// Whose part it spoils; nobody's is everybody's.
    pub fn node(&self) -> Option<Node> {
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
