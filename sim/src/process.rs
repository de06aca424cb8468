//! What all processes have in common: a life, a clock, and ways to stand still.

use crate::ctx::Ctx;
use crate::queue::{Event, Life, Node};
use crate::time::{Clock, Moment};

/// Whether a process does anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It runs.
    Up,
    /// It stands still; what reaches it waits.
    Frozen(Moment),
    /// It doesn't exist.
    Down,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Which.
    pub node: Node,
    /// Which run of it.
    pub life: Life,
    /// Whether it runs.
    pub state: State,
    /// Its lease clock.
    pub clock: Clock,
    deferred: Vec<Event>,
}

impl Process {
    /// A process that was not started yet.
    pub fn new(node: Node, clock: Clock) -> Self {
        Self { node, life: Life(0), state: State::Down, clock, deferred: Vec::new() }
    }

    /// Whether it runs.
    pub fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Gives an event back if it is to be handled now. What waits for a frozen process is kept, what was
    /// meant for another life is gone.
    pub fn admit(&mut self, life: Life, event: Event) -> Option<Event> {
        match self.state {
            _ if life != self.life => None,
            State::Up => Some(event),
            State::Frozen(_) => {
                self.deferred.push(event);
                None
            }
            State::Down => None,
        }
    }

    /// It stands still from now on.
    pub fn freeze(&mut self, now: Moment) {
        if self.is_up() {
            self.state = State::Frozen(now);
        }
    }

    /// It goes on, with everything that waited, in order. `clock_stood` if its clock didn't count this time.
    pub fn thaw(&mut self, ctx: &mut Ctx, clock_stood: bool) {
        let State::Frozen(since) = self.state else { return };
        self.state = State::Up;
        if clock_stood {
            self.clock.stood_still(since, ctx.now);
        }
        let connected = ctx.net.links[self.node.0].connected;
        for event in std::mem::take(&mut self.deferred) {
            // What was sent to a connection that is gone is gone with it.
            if connected || !matches!(event, Event::Deliver(..)) {
                ctx.queue.push(ctx.now, event);
            }
        }
    }

    /// It is gone, with everything that it knew.
    pub fn kill(&mut self) {
        self.state = State::Down;
        self.deferred.clear();
    }

    /// It begins another life, connected and listening.
    pub fn start(&mut self, ctx: &mut Ctx) {
        self.life = Life(self.life.0 + 1);
        self.state = State::Up;
        let link = &mut ctx.net.links[self.node.0];
        (link.life, link.connected, link.listening, link.serving) = (self.life, true, true, false);
    }
}
