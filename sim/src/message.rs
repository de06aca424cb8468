//! The messages between processes.

use std::rc::Rc;

use evictd_core::follower::ReplayOutcome;
use evictd_core::history::{Provenance, RoundToken, Voucher};
use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_core::service::{Peer, Query};

use crate::node::{Life, NodeNumber, Nonce};
use crate::rows::{KeyNumber, Snapshot};

#[derive(Clone, Debug)]
pub enum SimMessage {
    /// Numbered rows, to all agents and publishers.
    Live(Voucher, Rc<[Invalidation]>),
    /// The head and the token of the publisher's last round, to all agents and publishers.
    Tick(Voucher, RoundToken),
    /// The end of an incarnation, to all agents and publishers.
    Ended(Provenance),
    /// A query for a proof.
    Probe {
        from: NodeNumber,
        life: Life,
        nonce: Nonce,
        seen: Option<Voucher>,
        all: bool,
    },
    ProbeAnswer {
        nonce: Nonce,
        head: Voucher,
    },
    /// A query for missed rows.
    Replay {
        from: NodeNumber,
        life: Life,
        nonce: Nonce,
        epoch: u32,
        first: u64,
        last: u64,
    },
    ReplayOutcome {
        nonce: Nonce,
        provenance: Provenance,
        answer: Box<ReplayOutcome>,
    },
    /// A query for a record.
    Lookup {
        from: NodeNumber,
        life: Life,
        nonce: Nonce,
        key: KeyNumber,
    },
    LookupAnswer {
        nonce: Nonce,
        key: KeyNumber,
        found: Box<FoundSnapshot>,
    },
    /// An agent's announcement of its progress.
    Applied {
        from: NodeNumber,
        life: Life,
        provenance: Provenance,
        applied: LogPosition,
    },
    /// An agent's announcement of its exit.
    Leave {
        from: NodeNumber,
        life: Life,
    },
    /// The server's answer to a lookup without a subscriber.
    NoResponders {
        nonce: Nonce,
        key: KeyNumber,
    },
    PublisherQuery {
        from: NodeNumber,
        life: Life,
        query: Query,
        info: Box<PeerInfo>,
    },
    PublisherAnswer {
        nonce: Nonce,
        info: Box<PeerInfo>,
    },
    /// The server's answer to a query without other publishers.
    NoPublisher {
        nonce: Nonce,
    },
}

/// A publisher's description of itself.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    pub peer: Peer,
    /// The token of its last round.
    pub round: RoundToken,
}

/// A record in an answer. Only the checker uses the place of the read.
#[derive(Clone, Debug)]
pub struct FoundSnapshot {
    pub read: Snapshot,
    /// The age of the authority's last fence (R8).
    pub fence_age: std::time::Duration,
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
            SimMessage::ReplayOutcome { .. } => Self::REPLAY,
            SimMessage::Applied { .. } => Self::APPLIED,
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
