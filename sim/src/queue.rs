//! What happens next: events in the order of their moments, and of their scheduling where those are equal.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use crate::agent::AgentEvent;
use crate::fault::Edge;
use crate::net::Message;
use crate::publisher::PublisherEvent;
use crate::store::{Site, StoreEvent};
use crate::time::Moment;
use crate::workload::WorkEvent;

/// Numbers processes: agents from zero, then publishers, last those of a copy of the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Node(pub usize);

/// Which run of a process: what was meant for an earlier one reaches nobody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Life(pub u32);

/// Something that happens at a moment.
#[derive(Clone, Debug)]
pub enum Event {
    /// A message arrives at a process.
    Deliver(Node, Life, Message),
    /// Something inside an agent process.
    Agent(Node, Life, AgentEvent),
    /// Something inside a publisher process.
    Publisher(Node, Life, PublisherEvent),
    /// Something inside a store.
    Store(Site, StoreEvent),
    /// Somebody asks for something.
    Work(WorkEvent),
    /// A fault begins or ends.
    Fault(usize, Edge),
    /// A process starts again.
    Restart(Node),
    /// A process is connected again.
    Reconnect(Node),
    /// An operator declares that the store is the one to follow.
    Operator,
    /// The world's housekeeping, each second.
    Second,
}

#[derive(Debug)]
struct Scheduled {
    at: Moment,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest: the heap gives out its greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// All that is still to happen.
#[derive(Debug, Default)]
pub struct Queue {
    heap: BinaryHeap<Scheduled>,
    scheduled: u64,
}

impl Queue {
    /// Schedules `event` for `at`, after what was scheduled for then before.
    pub fn push(&mut self, at: Moment, event: Event) {
        self.scheduled += 1;
        self.heap.push(Scheduled { at, order: self.scheduled, event });
    }

    /// What happens next, and when.
    pub fn pop(&mut self) -> Option<(Moment, Event)> {
        self.heap.pop().map(|next| (next.at, next.event))
    }

    /// How many events there were.
    pub fn scheduled(&self) -> u64 {
        self.scheduled
    }
}
