//! How long a cached answer may be served (R8).

use std::time::Duration;

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
}
