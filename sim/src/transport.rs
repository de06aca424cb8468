//! Sending over the network: which messages arrive, and when.

use crate::ctx::Ctx;
use crate::event::SimEvent;
use crate::message::{Kinds, SimMessage};
use crate::net::Audience;
use crate::node::NodeNumber;
use crate::time::MS;
use crate::trace::trace;

impl Ctx {
    /// Sends a message from one process to another. Nothing is queued for a connection that is known to be
    /// down.
    pub fn send(&mut self, from: NodeNumber, to: NodeNumber, message: SimMessage) {
        if self.net.links[from.0].connected {
            self.carry(from, to, message);
        }
    }

    /// Sends to every agent and every other publisher that listens. Rows go to publishers only if there is a copy of
    /// the store.
    pub fn broadcast(&mut self, from: NodeNumber, message: &SimMessage) {
        let spared = matches!(message, SimMessage::Live(..)) && self.settings.copies == 0;
        let receivers = if spared { self.net.agents } else { self.net.links.len() };
        for node in (0..receivers).map(NodeNumber).filter(|node| *node != from) {
            if self.net.links[node.0].listening {
                self.send(from, node, message.clone());
            }
        }
    }

    /// Sends a query to publishers. Without any, the server reports that. `false` if the connection is known to be
    /// down.
    pub fn send_query(&mut self, from: NodeNumber, audience: Audience, message: &SimMessage) -> bool {
        if !self.net.links[from.0].connected {
            return false;
        }
        let receivers = self.net.receivers(from, audience);
        if receivers.is_empty() {
            self.send_no_responders(from, message);
        }
        for publisher in receivers {
            self.carry(from, publisher, message.clone());
        }
        true
    }

    fn send_no_responders(&mut self, to: NodeNumber, message: &SimMessage) {
        let answer = match *message {
            SimMessage::Lookup(reply_to, key) => SimMessage::NoResponders(reply_to.nonce, key),
            SimMessage::PublisherQuery(reply_to, ..) => SimMessage::NoPublisher(reply_to.nonce),
            _ => return,
        };
        let link = &self.net.links[to.0];
        if link.is_open(self.now) {
            let at = self.now.after(2 * link.distance);
            self.queue.push(at, SimEvent::Deliver(to, link.life, answer));
        }
    }

    fn carry(&mut self, from: NodeNumber, to: NodeNumber, message: SimMessage) {
        let (sender, receiver) = (&self.net.links[from.0], &self.net.links[to.0]);
        let (out, into) = (sender.trouble, receiver.trouble);
        let kind = Kinds::of(&message);
        let blocked = out.without.contains(kind) || into.without.contains(kind);
        if out.mute || into.deaf || blocked || self.dice.permille(out.loss) || self.dice.permille(into.loss) {
            trace!(self, "lost {from:?} -> {to:?}: {message:?}");
            return;
        }
        let way = sender.distance + receiver.distance;
        let life = receiver.life;
        let way = way + self.dice.span(way.max(100) / 8);
        let mut at = self.now.after(way).max(out.held_until).max(into.held_until);
        let path = from.0 * self.net.links.len() + to.0;
        let overtaken = self.dice.permille(out.late.0.max(into.late.0));
        if overtaken {
            let late = out.late.1.max(into.late.1);
            at = at.after(self.dice.below(late.max(1)));
        } else {
            at = at.max(self.net.last[path]);
            self.net.last[path] = at;
        }
        if self.dice.permille(out.twice.max(into.twice)) {
            let again = at.after(self.dice.span(20 * MS));
            self.queue.push(again, SimEvent::Deliver(to, life, message.clone()));
        }
        self.queue.push(at, SimEvent::Deliver(to, life, message));
    }
}
