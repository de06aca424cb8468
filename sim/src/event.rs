//! Everything that can be scheduled.

use std::time::Duration;

use crate::fault::Edge;
use crate::message::SimMessage;
use crate::node::{Life, NodeNumber, Nonce};
use crate::rows::{ChangeNumber, ChangeTarget, KeyNumber, NumberedBatch, Numbering, StoreSite, Transaction};
use crate::steps::SimVerification;

/// Something that happens at a moment.
#[derive(Clone, Debug)]
pub enum SimEvent {
    /// A message arrives at a process.
    Deliver(NodeNumber, Life, SimMessage),
    /// Something inside an agent process.
    Agent(NodeNumber, Life, AgentEvent),
    /// Something inside a publisher process.
    Publisher(NodeNumber, Life, PublisherEvent),
    /// Something inside a store.
    Store(StoreSite, StoreEvent),
    /// The workload acts.
    Work(WorkEvent),
    /// A fault begins or ends.
    Fault(usize, Edge),
    /// A process starts again.
    Restart(NodeNumber),
    /// A process is connected again.
    Reconnect(NodeNumber),
    /// An operator declares that the store is the one to follow.
    Operator,
    /// The world's housekeeping, each second.
    Second,
}

/// Something inside an agent process.
#[derive(Clone, Debug)]
pub enum AgentEvent {
    /// The follower wants to be polled.
    Wake,
    /// A second went by.
    Beat,
    /// The follow task continues with its effects.
    Perform,
    /// A verification goes on.
    Verify(Box<SimVerification>),
    /// A load's question wasn't answered in time.
    Timeout(KeyNumber, Nonce),
    /// A replica answers a load.
    Replica(KeyNumber, Nonce),
    /// A load that arrived goes on.
    StepLoad(KeyNumber),
}

/// Something inside a publisher process.
#[derive(Clone, Debug)]
pub enum PublisherEvent {
    /// Every second: send the head.
    Tick,
    /// A look at the own standing among other publishers (R15).
    Beat,
    /// Look whether something was committed past the API.
    Poll,
    /// A round may be due.
    Round,
    /// A probe may have waited too long for a round (R14).
    Patience,
    /// A change's transaction ended.
    Committed {
        /// Which change it became, in truth.
        change: Option<ChangeNumber>,
        /// Whether the client receives success.
        success: bool,
    },
    /// Numbering ended.
    Numbered {
        /// `None` if it failed, or its outcome is unknown.
        numbered: Option<NumberedBatch>,
        /// Whether it was a round.
        is_round: bool,
    },
    /// A lookup's statement runs now.
    Look {
        reply_to: ReplyTo,
        key: KeyNumber,
        /// The age of the last fence when the question came in.
        fence_age: Duration,
    },
    /// A replay's statement runs now.
    Replay {
        reply_to: ReplyTo,
        /// The epoch of both ends.
        epoch: u32,
        first: u64,
        last: u64,
    },
    /// The connection pool finds the primary.
    Attach,
}

/// Who asks a question: answers go into the inbox of that process (R13).
#[derive(Clone, Copy, Debug)]
pub struct ReplyTo {
    pub node: NodeNumber,
    pub life: Life,
    pub nonce: Nonce,
}

/// Something inside the store.
#[derive(Clone, Debug)]
pub enum StoreEvent {
    /// A change's transaction comes to its end.
    Commit(Box<Transaction>),
    /// A numbering transaction comes to its end.
    Number(Box<Numbering>),
    /// R11's rows, written too late: only without its protection.
    Register(Vec<(NodeNumber, Life)>),
}

/// A step of the workload.
#[derive(Clone, Copy, Debug)]
pub enum WorkEvent {
    /// Choose a key to change soon, and warm it up.
    Choose,
    /// Change it now.
    Change(KeyNumber),
    /// Change an API or a workspace now.
    Wide(ChangeTarget),
    /// Delete many keys of one API at once, by direct SQL.
    Bulk,
    /// Verify a key at an agent.
    Verify(NodeNumber, KeyNumber),
    /// Verify keys at an agent at random, and go on.
    Traffic(NodeNumber),
}
