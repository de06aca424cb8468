//! Everything that can be scheduled.

use std::time::Duration;

use crate::fault::Edge;
use crate::message::{ReplyTo, SimMessage};
use crate::node::{Life, NodeNumber, Nonce};
use crate::rows::{
    ChangeNumber, ChangeTarget, KeyNumber, NumberedBatch, Numbering, RowRange, StoreSite, Transaction,
};
use crate::steps::SimVerification;

#[derive(Clone, Debug)]
pub enum SimEvent {
    Deliver(NodeNumber, Life, SimMessage),
    Agent(NodeNumber, Life, AgentEvent),
    Publisher(NodeNumber, Life, PublisherEvent),
    Store(StoreSite, StoreEvent),
    Work(WorkEvent),
    Fault(usize, Edge),
    Restart(NodeNumber),
    Reconnect(NodeNumber),
    /// An operator declares that the store is the one to follow.
    Operator,
    /// The world's housekeeping, each second.
    Second,
}

#[derive(Clone, Debug)]
pub enum AgentEvent {
    /// The follower wants to be polled.
    Wake,
    Beat,
    /// The follow task continues with its effects.
    Perform,
    Verify(Box<SimVerification>),
    /// A load's query has timed out.
    Timeout(KeyNumber, Nonce),
    Replica(KeyNumber, Nonce),
    StepLoad(KeyNumber),
}

#[derive(Clone, Debug)]
pub enum PublisherEvent {
    /// Every second: send the head.
    Tick,
    /// The own state among other publishers is checked (R15).
    Beat,
    /// It polls for changes made past the API.
    Poll,
    Round,
    /// A probe may have waited too long for a round (R14).
    Patience,
    Committed {
        /// The change that was committed.
        change: Option<ChangeNumber>,
        success: bool,
    },
    Numbered {
        /// `None` if it failed, or its outcome is unknown.
        numbered: Option<NumberedBatch>,
        is_round: bool,
    },
    /// A lookup's statement runs now. The fence had this age when the query arrived.
    Lookup(ReplyTo, KeyNumber, Duration),
    /// A replay's statement runs now.
    Replay(ReplyTo, RowRange),
    /// The connection pool finds the primary.
    Attach,
}

#[derive(Clone, Debug)]
pub enum StoreEvent {
    /// A change's transaction comes to its end.
    Commit(Box<Transaction>),
    /// A numbering transaction comes to its end.
    Number(Box<Numbering>),
    /// R11's rows, written too late: only without its protection.
    Register(Vec<(NodeNumber, Life)>),
}

#[derive(Clone, Copy, Debug)]
pub enum WorkEvent {
    /// Choose a key to change soon, and warm it up.
    Choose,
    Change(KeyNumber),
    /// Change an API or a workspace now.
    Wide(ChangeTarget),
    /// Delete many keys of one API at once, by direct SQL.
    Bulk,
    Verify(NodeNumber, KeyNumber),
    /// Verify a random key at an agent, and schedule the next verification.
    Traffic(NodeNumber),
}
