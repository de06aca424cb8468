//! Core NATS as the rest sees it: at-most-once, with queue groups, and with everything that goes wrong.
//!
//! Every process has one connection. A message goes through the sender's link and the receiver's; each
//! can lose, repeat, hold up or swallow it. A link can be dead while its process, or the server, takes it
//! for working (half-open): questions to a queue group then still go to a member that hears nothing.

use std::rc::Rc;

use evictd_core::follower::ReplayOutcome;
use evictd_core::history::{Provenance, RoundToken, Voucher};
use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_core::service::{Peer, Query};

use crate::ctx::Ctx;
use crate::queue::{Event, Life, Node};
use crate::store::{KeyNumber, Snapshot};
use crate::time::{MS, Micros, Moment};
use crate::trace::trace;

/// A question's number.
pub type Nonce = u64;

/// What travels.
#[derive(Clone, Debug)]
pub enum Message {
    /// Numbered rows, to all agents and publishers.
    Live(Voucher, Rc<[Invalidation]>),
    /// How long the log is, and what the publisher's last round drew, likewise.
    Tick(Voucher, RoundToken),
    /// An incarnation is over, likewise.
    Ended(Provenance),
    /// Asks for a proof.
    Probe { from: Node, life: Life, nonce: Nonce, seen: Option<Voucher>, all: bool },
    /// Answers a probe.
    ProbeAnswer { nonce: Nonce, head: Voucher },
    /// Asks for missed rows.
    Replay { from: Node, life: Life, nonce: Nonce, epoch: u32, first: u64, last: u64 },
    /// Answers a replay.
    ReplayOutcome { nonce: Nonce, provenance: Provenance, answer: Box<ReplayOutcome> },
    /// Asks for a record.
    Lookup { from: Node, life: Life, nonce: Nonce, key: KeyNumber },
    /// Answers a lookup.
    LookupAnswer { nonce: Nonce, key: KeyNumber, found: Box<Found> },
    /// Tells how far an agent is.
    Applied { from: Node, life: Life, provenance: Provenance, applied: LogPosition },
    /// Tells that an agent process ends.
    Goodbye { from: Node, life: Life },
    /// The server's word that nobody listens to a question.
    Nobody { nonce: Nonce, key: KeyNumber },
    /// A publisher asks who else is there.
    PublisherQuery { from: Node, life: Life, query: Query, introduction: Box<Introduction> },
    /// Answers that.
    PublisherAnswer { nonce: Nonce, introduction: Box<Introduction> },
    /// The server's word that no other publisher is there.
    NoPublisher { nonce: Nonce },
}

/// A publisher, as it presents itself to others.
#[derive(Clone, Debug)]
pub struct Introduction {
    /// Whom it speaks for, and how it stands.
    pub peer: Peer,
    /// What its last round drew.
    pub round: RoundToken,
}

/// A record as an answer carries it; where it was read is known to the checker only.
#[derive(Clone, Debug)]
pub struct Found {
    /// What was read.
    pub read: Snapshot,
    /// The age of the authority's last fence (R8).
    pub fence_age: std::time::Duration,
}

/// Kinds of messages, for faults that hit some of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kinds(pub u8);

impl Kinds {
    /// None.
    pub const NONE: Self = Self(0);
    /// The live feed without its ticks.
    pub const LIVE: Self = Self(1);
    /// Ticks.
    pub const TICK: Self = Self(2);
    /// Answers to replays.
    pub const REPLAY: Self = Self(4);
    /// Announcements.
    pub const APPLIED: Self = Self(8);

    fn of(message: &Message) -> Self {
        match message {
            Message::Live(..) => Self::LIVE,
            Message::Tick(..) | Message::Ended(_) => Self::TICK,
            Message::ReplayOutcome { .. } => Self::REPLAY,
            Message::Applied { .. } => Self::APPLIED,
            _ => Self::NONE,
        }
    }

    /// All of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn contains(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

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
    /// Whether anything is wrong.
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

/// One process's connection.
#[derive(Clone, Debug)]
pub struct Link {
    /// What is wrong.
    pub trouble: Trouble,
    /// Whether the process takes itself for connected.
    pub connected: bool,
    /// Whether the server takes it for a listener.
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

impl Link {
    /// Whether the server's own word gets through.
    fn is_open(&self, now: Moment) -> bool {
        !self.trouble.mute && !self.trouble.deaf && self.trouble.held_until <= now
    }
}

/// All links.
#[derive(Debug)]
pub struct Net {
    /// By node.
    pub links: Vec<Link>,
    agents: usize,
    /// The last arrival on each path, so that order is kept where nothing disturbs it.
    last: Vec<Moment>,
    /// Messages handed over, for the report.
    pub sent: u64,
}

/// Who shall hear a question.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Audience {
    /// One member of the queue groups.
    One,
    /// Every publisher that listens.
    All,
}

impl Net {
    /// A network of so many agents, and publishers, at these distances.
    pub fn new(agents: usize, distances: &[Micros]) -> Self {
        let link = |distance: &Micros| Link {
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

    /// The nodes of publishers.
    pub fn publishers(&self) -> impl Iterator<Item = Node> + use<> {
        (self.agents..self.links.len()).map(Node)
    }

    /// Publishers that would hear this.
    fn listeners(&self, audience: Audience) -> impl Iterator<Item = Node> {
        self.publishers().filter(move |node| {
            let link = &self.links[node.0];
            link.listening && (audience == Audience::All || link.serving)
        })
    }

    /// The nearest of those that would hear this: queue groups prefer their own cluster.
    fn nearest(&self, from: Node, audience: Audience) -> Option<Node> {
        let publishers = self.links.len() - self.agents;
        self.listeners(audience).min_by_key(|node| (node.0 + from.0) % publishers)
    }
}

impl Ctx {
    /// Sends a message from one process to another. Nothing is queued for a connection that is known to be
    /// down.
    pub fn send(&mut self, from: Node, to: Node, message: Message) {
        if self.net.links[from.0].connected {
            self.carry(from, to, message);
        }
    }

    /// Sends to every agent and every other publisher that listens. Publishers learn from ticks what they need;
    /// where there is no copy of the store, they are spared the rest.
    pub fn broadcast(&mut self, from: Node, message: &Message) {
        let spared = matches!(message, Message::Live(..)) && self.settings.copies == 0;
        let receivers = if spared { self.net.agents } else { self.net.links.len() };
        for node in (0..receivers).map(Node).filter(|node| *node != from) {
            if self.net.links[node.0].listening {
                self.send(from, node, message.clone());
            }
        }
    }

    /// Asks all other publishers who they are; the server says if there is none.
    pub fn ask_publishers(&mut self, from: Node, nonce: Nonce, message: &Message) {
        if !self.net.links[from.0].connected {
            return;
        }
        let others: Vec<Node> = self.net.listeners(Audience::All).filter(|node| *node != from).collect();
        for other in &others {
            self.carry(from, *other, message.clone());
        }
        let link = &self.net.links[from.0];
        if others.is_empty() && link.is_open(self.now) {
            let at = self.now.after(2 * link.distance);
            self.queue.push(at, Event::Deliver(from, link.life, Message::NoPublisher { nonce }));
        }
    }

    /// Asks publishers. `false` if the connection is known to be down.
    pub fn ask(&mut self, from: Node, audience: Audience, message: Message) -> bool {
        if !self.net.links[from.0].connected {
            return false;
        }
        if audience == Audience::All {
            for publisher in self.net.publishers() {
                if self.net.links[publisher.0].listening {
                    self.carry(from, publisher, message.clone());
                }
            }
            return true;
        }
        match self.net.nearest(from, audience) {
            Some(publisher) => self.carry(from, publisher, message),
            None => self.nobody_listens(from, &message),
        }
        true
    }

    fn nobody_listens(&mut self, to: Node, message: &Message) {
        let Message::Lookup { nonce, key, .. } = message else { return };
        let link = &self.net.links[to.0];
        if link.is_open(self.now) {
            let at = self.now.after(2 * link.distance);
            let nobody = Message::Nobody { nonce: *nonce, key: *key };
            let life = link.life;
            self.queue.push(at, Event::Deliver(to, life, nobody));
        }
    }

    fn carry(&mut self, from: Node, to: Node, message: Message) {
        self.net.sent += 1;
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
            self.queue.push(again, Event::Deliver(to, life, message.clone()));
        }
        self.queue.push(at, Event::Deliver(to, life, message));
    }
}
