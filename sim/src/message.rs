//! The messages between processes.

use std::rc::Rc;
use std::time::Duration;

use evictd_core::follower::ReplayOutcome;
use evictd_core::history::{Provenance, RoundToken, Voucher};
use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_core::service::{Peer, Standing};

use crate::net::Audience;
use crate::node::{Life, NodeNumber, Nonce};
use crate::rows::{KeyNumber, RowRange, Snapshot};

/// The inbox of a requester: answers go only there (R13).
#[derive(Clone, Copy, Debug)]
pub struct ReplyTo {
    pub node: NodeNumber,
    pub life: Life,
    pub nonce: Nonce,
}

#[derive(Clone, Debug)]
pub enum SimMessage {
    /// Numbered rows, to all agents and publishers.
    Live(Voucher, Rc<[Invalidation]>),
    /// The head and the token of the publisher's last round, to all agents and publishers.
    Tick(Voucher, RoundToken),
    /// The end of an incarnation, to all agents and publishers.
    Ended(Provenance),
    /// A query for a proof, with what the agent has seen.
    Probe(ReplyTo, Option<Voucher>, Audience),
    ProbeAnswer(Nonce, Voucher),
    /// A query for missed rows.
    Replay(ReplyTo, RowRange),
    ReplayOutcome(Nonce, Provenance, Box<ReplayOutcome>),
    /// A query for a record.
    Lookup(ReplyTo, KeyNumber),
    /// A record, and the age of the authority's last fence (R8).
    LookupAnswer(Nonce, KeyNumber, Box<Snapshot>, Duration),
    /// The server's answer to a lookup without a subscriber.
    NoResponders(Nonce, KeyNumber),
    /// An agent's announcement of what it has applied.
    Applied(NodeNumber, Life, Provenance, LogPosition),
    /// An agent's announcement of its exit.
    Leave(NodeNumber, Life),
    PublisherQuery(ReplyTo, Standing, Provenance),
    /// A publisher's description of itself, and the token of its last round.
    PublisherAnswer(Nonce, Box<Peer>, RoundToken),
    /// The server's answer to a query without other publishers.
    NoPublisher(Nonce),
}

/// Sets of message kinds, for faults that affect some of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kinds(pub u8);

impl Kinds {
    pub const NONE: Self = Self(0);
    /// The live feed without its ticks.
    pub const LIVE: Self = Self(1);
    pub const TICK: Self = Self(2);
    /// Answers to replays.
    pub const REPLAY: Self = Self(4);
    pub const APPLIED: Self = Self(8);

    pub fn of(message: &SimMessage) -> Self {
        match message {
            SimMessage::Live(..) => Self::LIVE,
            SimMessage::Tick(..) | SimMessage::Ended(_) => Self::TICK,
            SimMessage::ReplayOutcome(..) => Self::REPLAY,
            SimMessage::Applied(..) => Self::APPLIED,
            _ => Self::NONE,
        }
    }

    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}
