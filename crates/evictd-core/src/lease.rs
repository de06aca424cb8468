//! How long a cached answer may be served (R8).

use std::time::Duration;

use crate::position::LogPosition;
use crate::protection::Protection;
use crate::time::LeaseTime;

/// How old the state behind an answer may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bound {
    bound: Duration,
    trust: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BoundError {
    /// Under a tenth of the bound: too little for clock rates and scheduling.
    MarginTooSmall,
    /// Over half of the bound.
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
    /// The margin is kept back of the bound. It must lie between a tenth and a half of it.
    pub fn new(bound: Duration, margin: Duration) -> Result<Self, BoundError> {
        if margin * 10 < bound || margin.is_zero() {
            return Err(BoundError::MarginTooSmall);
        }
        if margin * 2 > bound {
            return Err(BoundError::MarginTooLarge);
        }
        Ok(Self { bound, trust: bound.saturating_sub(margin) })
    }

    /// No answer is based on an older state.
    pub fn bound(self) -> Duration {
        self.bound
    }

    /// How long a proof or a read is trusted: the bound less the margin.
    pub fn trust(self) -> Duration {
        if Protection::MarginsAreKept.holds() { self.trust } else { self.bound }
    }

    /// Whether an entry read at `read_at` may be served at `now`, by an agent that was proven
    /// complete as of `proven_at`.
    ///
    /// Either time suffices: it dates a state that the entry is known to be no older than. With
    /// `proven_at` alone, loads after the last proof would not be served. With `read_at` alone,
    /// evictd would be a TTL cache.
    pub fn allows(self, now: LeaseTime, read_at: LeaseTime, proven_at: LeaseTime) -> bool {
        now.since(read_at.max(proven_at)) < self.trust() || !Protection::LeasesRunOut.holds()
    }

    /// Returns what is left of a lease proven at `proven_at`.
    pub fn remaining(self, now: LeaseTime, proven_at: LeaseTime) -> Duration {
        self.trust().saturating_sub(now.since(proven_at))
    }
}

/// For people; the hot path never reads it (R9).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// No proof yet: nothing is cached, and every verification is a load.
    Starting,
    Live,
    /// The lease ran out: an entry is served only within the bound after its own read.
    Expired,
}

labels!(Mode { Starting = "starting", Live = "live", Expired = "expired" });

/// Whether a load answers a verification that joined it when `joined` was applied here (R10).
///
/// `floor` is the highest floor of its scopes now. The load need not meet floors that rose after
/// the verification began, because the answer could as well have come before. It must include what
/// was confirmed before.
pub fn answers(as_of: LogPosition, floor: LogPosition, joined: LogPosition) -> bool {
    as_of >= floor.min(joined) || !Protection::AnswersMeetWhatWasApplied.holds()
}

/// Whether a verification that began at `began_at` may share a load that was sent at `sent_at`. The
/// agent was proven complete as of `proven_at` when the verification began (R10, R12).
///
/// A verification that began after the load was sent may share it only while a lease runs. Receipts
/// don't wait for an agent without a lease, so a read from before the verification may be older
/// than a final receipt allows.
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
    fn entry_is_served_by_its_read_or_by_the_proof() {
        let allows = |now, read, proven| {
            bound().allows(LeaseTime(now * SECOND), LeaseTime(read * SECOND), LeaseTime(proven * SECOND))
        };
        assert!(allows(126, 0, 100));
        assert!(!allows(127, 0, 100));
        assert!(allows(127, 101, 0));
        assert!(!allows(128, 101, 0));
    }

    #[test]
    fn margin_is_a_tenth_to_a_half_of_the_bound() {
        let try_new = |bound, margin| Bound::new(Duration::from_millis(bound), Duration::from_millis(margin));
        assert_eq!(try_new(30_000, 2_999), Err(BoundError::MarginTooSmall));
        assert_eq!(try_new(30_000, 15_001), Err(BoundError::MarginTooLarge));
        assert_eq!(try_new(0, 0), Err(BoundError::MarginTooSmall));
        assert!(try_new(30_000, 3_000).is_ok());
    }

    #[test]
    fn load_is_shared_with_later_verifications_under_a_lease() {
        let joins = |sent, began, proven| {
            may_share(
                bound(),
                LeaseTime(sent * SECOND),
                LeaseTime(began * SECOND),
                LeaseTime(proven * SECOND),
            )
        };
        assert!(joins(100, 101, 90), "a lease runs");
        assert!(!joins(100, 101, 0), "receipts don't wait for this agent");
        assert!(joins(101, 101, 0), "sent after the verification began");
    }

    #[test]
    fn load_answers_verifications_from_before_the_floor_rose() {
        let at = |position| LogPosition::new(1, position).unwrap();
        assert!(answers(at(4), at(5), at(4)), "the floor rose to 5 after the verification began");
        assert!(!answers(at(4), at(5), at(5)), "5 was confirmed before the verification began");
        assert!(answers(at(5), at(5), at(9)));
    }
}
