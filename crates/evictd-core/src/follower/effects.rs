//! What a follower returns: effects, and whether an answer counted. And what it takes in of a replay.

use crate::floors::FloorsMerged;
use crate::history::{LogToken, Provenance, Voucher};
use crate::invalidation::Invalidation;
use crate::position::LogPosition;
use crate::time::LeaseTime;

/// How an invalidation arrived.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Via {
    Live,
    Replay,
}

labels!(Via { Live = "live", Replay = "replay" });

/// Why the agent flushed its cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FlushReason {
    /// The process has started, and its base position is known now.
    Start,
    /// The store may have gone back (R2).
    NewEpoch,
    /// No publisher had all missed rows.
    Refused,
    /// So much was missed that a flush costs less than the replay.
    LongGap,
}

labels!(FlushReason {
    Start = "start",
    NewEpoch = "new_epoch",
    Refused = "refused",
    LongGap = "long_gap",
});

/// What showed that an invalidation was missed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RepairCause {
    /// An invalidation beyond the next position.
    Gap,
    /// A tick whose head is above `applied`.
    Tick,
    /// A probe's answer whose head is above `applied`.
    Probe,
}

labels!(RepairCause { Gap = "gap", Tick = "tick", Probe = "probe" });

/// What the agent does, in the order given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// A floor was raised by an invalidation that arrived for the first time: evict the entry of
    /// its scope.
    Applied {
        invalidation: Invalidation,
        via: Via,
    },
    FloorsMerged(FloorsMerged),
    /// Clear the cache.
    Flush(FlushReason),
    /// `applied` or the head moved: publish them.
    Progress {
        applied: LogPosition,
        head: LogPosition,
    },
    /// The agent is proven complete as of this time: extend the deadline.
    Proven(LeaseTime),
    /// Announce `applied` to the publishers now: a deletion was applied, or may have been.
    Announce,
    /// Request a proof.
    SendProbe {
        /// Repeated by the answer.
        nonce: u64,
        /// What was received of the followed history. A publisher whose store doesn't have it must
        /// not vouch (R15, R16). `None` while the agent follows no history.
        seen: Option<Voucher>,
        /// To all publishers instead of the queue group (R14).
        all: bool,
    },
    /// A message of a history that this agent doesn't follow was ignored (R15).
    Rival(Provenance),
    /// Request missed rows.
    SendReplay {
        /// Repeated by the answer.
        nonce: u64,
        epoch: u32,
        /// The first missing position.
        from: u64,
        /// The last position requested.
        to: u64,
        cause: RepairCause,
        /// To all publishers instead of the queue group (R14).
        all: bool,
    },
}

/// Whether an answer counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accepted {
    Yes,
    /// It matches no open request, or it is of an older state. The agent counts and ignores it.
    No,
}

/// Where a record was read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LoadSource {
    /// By a publisher, which answers for this history.
    Authority(Provenance),
    /// By the agent itself, in a database whose log has this token at the record's position.
    Database(LogToken),
}

/// What a publisher answers to a replay.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplayOutcome {
    /// The rows from the first requested position on, without a gap.
    Rows(Vec<Invalidation>),
    /// The store doesn't have all rows. Start over at its head.
    Refused { head: Voucher },
}
