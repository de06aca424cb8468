//! Until when a cached answer may be given (R8).

use std::time::Duration;

use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::LeaseTime;

/// How old the knowledge behind an answer may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound {
    bound: Duration,
    trust: Duration,
}

/// Why a bound can't be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BoundError {
    /// The margin is under a tenth of the bound, too little for clock rates and scheduling.
    MarginTooSmall,
    /// Nothing is left of the bound after the margin.
    MarginTooLarge,
}

impl std::fmt::Display for BoundError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::MarginTooSmall => "the margin must be at least a tenth of the bound",
            Self::MarginTooLarge => "the margin must be at most half of the bound",
        })
    }
}

impl std::error::Error for BoundError {}

impl Bound {
    /// A bound and what is kept back of it; the margin lies between a tenth and a half of the bound.
    pub fn new(bound: Duration, margin: Duration) -> Result<Self, BoundError> {
        if margin * 10 < bound || margin.is_zero() {
            return Err(BoundError::MarginTooSmall);
        }
        if margin * 2 > bound {
            return Err(BoundError::MarginTooLarge);
        }
        Ok(Self { bound, trust: bound.saturating_sub(margin) })
    }

    /// The promise: nothing older is ever answered from.
    pub fn bound(self) -> Duration {
        self.bound
    }

    /// How long knowledge is trusted: the bound less the margin.
    pub fn trust(self) -> Duration {
        if Protection::MarginsAreKept.holds() { self.trust } else { self.bound }
    }

    /// Whether an answer may be given at `now` from an entry read at `read_at`, by an agent that was
    /// complete as of `proven_at`.
    ///
    /// `proven_at` alone would forget loads that were sent after the last proof; `read_at` alone would
    /// make evictd a TTL cache. Either one suffices: it is what the agent knew at that moment.
    pub fn allows(self, now: LeaseTime, read_at: LeaseTime, proven_at: LeaseTime) -> bool {
        now.since(read_at.max(proven_at)) < self.trust() || !Protection::LeasesRunOut.holds()
    }

    /// What is left of a lease proven at `proven_at`.
    pub fn remaining(self, now: LeaseTime, proven_at: LeaseTime) -> Duration {
        self.trust().saturating_sub(now.since(proven_at))
    }
}

/// Named for people; the hot path never reads it (R9).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// No proof yet: nothing is cached, every verification is a load.
    Starting,
    /// The lease runs.
    Live,
    /// The lease ran out: entries live by their own read only.
    Expired,
}

impl Mode {
    /// All modes, for metrics.
    pub const ALL: [Self; 3] = [Self::Starting, Self::Live, Self::Expired];

    /// The name in metrics and `/status`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Live => "live",
            Self::Expired => "expired",
        }
    }
}

/// Whether a load answers a verification that joined it when `joined` was applied here (R10).
///
/// `floor` is the highest floor of its scopes now. Floors that rose after the verification began need
/// not be met: it could as well have been answered before. What was confirmed before it began must be.
pub fn answers(as_of: LogPosition, floor: LogPosition, joined: LogPosition) -> bool {
    as_of >= floor.min(joined) || !Protection::AnswersMeetWhatWasApplied.holds()
}

/// Whether a load that was sent at `sent_at` may answer a verification that began at `began_at`, by an agent
/// that was proven complete as of `proven_at` when the verification began (R10, R12).
///
/// Later ones may join it only while a lease runs: receipts don't wait for an agent without one, so what was
/// read before the verification began may be older than what they already say everywhere.
pub fn may_share(bound: Bound, sent_at: LeaseTime, began_at: LeaseTime, proven_at: LeaseTime) -> bool {
    sent_at >= began_at
        || !bound.remaining(began_at, proven_at).is_zero()
        || !Protection::LoadsAreSharedUnderALease.holds()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn bound() -> Bound {
        Bound::new(Duration::from_secs(30), Duration::from_secs(3)).unwrap()
    }

    #[test]
    fn either_the_proof_or_the_own_read_carries_an_entry() {
        let allows = |now, read, proven| {
            bound().allows(LeaseTime(now * SECOND), LeaseTime(read * SECOND), LeaseTime(proven * SECOND))
        };
        assert!(allows(126, 0, 100));
        assert!(!allows(127, 0, 100));
        assert!(allows(127, 101, 0));
        assert!(!allows(128, 101, 0));
    }

    #[test]
    fn margins_out_of_proportion_are_refused() {
        let try_new = |bound, margin| Bound::new(Duration::from_millis(bound), Duration::from_millis(margin));
        assert_eq!(try_new(30_000, 2_999), Err(BoundError::MarginTooSmall));
        assert_eq!(try_new(30_000, 15_001), Err(BoundError::MarginTooLarge));
        assert_eq!(try_new(0, 0), Err(BoundError::MarginTooSmall));
        assert!(try_new(30_000, 3_000).is_ok());
    }

    #[test]
    fn without_a_lease_a_load_is_only_for_those_who_waited_when_it_was_sent() {
        let joins = |sent, began, proven| {
            may_share(
                bound(),
                LeaseTime(sent * SECOND),
                LeaseTime(began * SECOND),
                LeaseTime(proven * SECOND),
            )
        };
        assert!(joins(100, 101, 90), "a lease runs");
        assert!(!joins(100, 101, 0), "nobody waits for this agent's word");
        assert!(joins(101, 101, 0), "it was sent for this one");
    }

    #[test]
    fn a_load_answers_only_those_who_joined_before_the_floor_rose() {
        let at = |position| LogPosition::new(1, position).unwrap();
        assert!(answers(at(4), at(5), at(4)), "the floor rose to 5 after this one began");
        assert!(!answers(at(4), at(5), at(5)), "5 was confirmed before this one began");
        assert!(answers(at(5), at(5), at(9)));
    }
}
