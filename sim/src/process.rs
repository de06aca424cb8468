//! The common part of all processes: a life, a clock, and ways to stop.

use crate::ctx::Ctx;
use crate::event::SimEvent;
use crate::message::ReplyTo;
use crate::node::{Life, NodeNumber, Nonce};
use crate::time::{Clock, Moment};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProcessState {
    Up,
    /// It is stopped; its events wait.
    Frozen(Moment),
    Down,
}

#[derive(Clone, Debug)]
pub struct Process {
    pub node: NodeNumber,
    pub life: Life,
    pub state: ProcessState,
    pub clock: Clock,
    deferred: Vec<SimEvent>,
}

impl Process {
    /// Not started yet.
    pub fn new(node: NodeNumber, clock: Clock) -> Self {
        Self { node, life: Life(0), state: ProcessState::Down, clock, deferred: Vec::new() }
    }

    pub fn reply_to(&self, nonce: Nonce) -> ReplyTo {
        ReplyTo { node: self.node, life: self.life, nonce }
    }

    pub fn is_up(&self) -> bool {
        self.state == ProcessState::Up
    }

    /// Gives an event back if it is to be handled now. What waits for a frozen process is kept, what was
    /// meant for another life is gone.
    pub fn admit(&mut self, life: Life, event: SimEvent) -> Option<SimEvent> {
        match self.state {
            _ if life != self.life => None,
            ProcessState::Up => Some(event),
            ProcessState::Frozen(_) => {
                self.deferred.push(event);
                None
            }
            ProcessState::Down => None,
        }
    }

    pub fn freeze(&mut self, now: Moment) {
        if self.is_up() {
            self.state = ProcessState::Frozen(now);
        }
    }

    /// Continues, and schedules the events that waited, in order. `clock_stood` if its clock didn't count this time.
    pub fn thaw(&mut self, ctx: &mut Ctx, clock_stood: bool) {
        let ProcessState::Frozen(since) = self.state else { return };
        self.state = ProcessState::Up;
        if clock_stood {
            self.clock.stopped_from(since, ctx.now);
        }
        let connected = ctx.net.links[self.node.0].connected;
        for event in std::mem::take(&mut self.deferred) {
            // What was sent to a connection that is gone is gone with it.
            if connected || !matches!(event, SimEvent::Deliver(..)) {
                ctx.queue.push(ctx.now, event);
            }
        }
    }

    /// Ends it, with its memory.
    pub fn kill(&mut self) {
        self.state = ProcessState::Down;
        self.deferred.clear();
    }

    /// Begins another life, connected and subscribed.
    pub fn start(&mut self, ctx: &mut Ctx) {
        self.life = Life(self.life.0 + 1);
        self.state = ProcessState::Up;
        let link = &mut ctx.net.links[self.node.0];
        (link.life, link.connected, link.listening, link.serving) = (self.life, true, true, false);
    }
}
