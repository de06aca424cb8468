//! What the guarantees assume of the code around the core, one by one, so that each can be missing.
//!
//! Some belong to the surroundings, and no code of evictd's protects against their absence. The rest is done by the
//! stores' SQL and the publisher's shell, which this crate's own models stand in for: a control shows that the checkers
//! find its absence, and proves nothing about the shipped code, which has tests of its own. A world is set up without
//! one (`SimSettings::lacking`), and a promise must break in it.

use evictd_core::rules::Rule;

/// Something that the core depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Assumption {
    /// A2: the lease clock counts the time in which the machine sleeps.
    ClocksCountSuspension,
    /// R1: rows are found by "no position yet", not by a cursor, which would skip a late commit.
    LateCommitsAreFound,
    /// R3: every change writes its row, also one made past the API.
    EveryChangeWritesItsRow,
    /// R4: a commit whose outcome is unknown is not answered with success.
    UnknownIsNotSuccess,
    /// R7: a round is a durable write, which a demoted primary can't do.
    RoundsAreWrites,
    /// R7: a round answers only probes that were seen before it began.
    RoundsFollowTheirProbes,
    /// R11: an instance is in the roster before its probe's head is read.
    RosterPrecedesHead,
}

impl Assumption {
    /// The rule that rests on it.
    pub fn rule(self) -> Rule {
        match self {
            Self::ClocksCountSuspension => Rule::R8,
            Self::LateCommitsAreFound => Rule::R1,
            Self::EveryChangeWritesItsRow => Rule::R3,
            Self::UnknownIsNotSuccess => Rule::R4,
            Self::RoundsAreWrites | Self::RoundsFollowTheirProbes => Rule::R7,
            Self::RosterPrecedesHead => Rule::R11,
        }
    }
}
