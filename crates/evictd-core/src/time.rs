//! Two clocks that must never be mixed up: each has a type of its own.

use std::time::Duration;

/// A reading of the lease clock, in microseconds: CLOCK_BOOTTIME on Linux, which keeps running
/// while the machine sleeps (R8). Only differences have a meaning, and only within one boot of one
/// machine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LeaseTime(pub u64);

impl LeaseTime {
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(micros(duration)))
    }

    /// Saturates at the clock's start.
    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(micros(duration)))
    }

    /// Returns how long ago `earlier` was; zero if it is later than `self`.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// A reading of the home store's clock, in microseconds since 1970 (UTC). No safety rule depends on
/// it. It dates changes, ends keys that expire, and measures lag.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct StoreTime(pub i64);

impl StoreTime {
    /// Unkey's unit is milliseconds since 1970.
    pub fn from_millis(millis: i64) -> Self {
        Self(millis.saturating_mul(1000))
    }

    pub fn as_millis(self) -> i64 {
        self.0.div_euclid(1000)
    }

    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add_unsigned(micros(duration)))
    }

    #[must_use]
    pub fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub_unsigned(micros(duration)))
    }
}

/// Microseconds, the unit of both clocks, saturating.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// As [`micros`], for arithmetic with [`StoreTime`] and for SQL.
pub fn signed_micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Milliseconds with a fraction, as JSON shows them. Microseconds are as fine as anything is measured.
pub fn millis(duration: Duration) -> f64 {
    micros(duration) as f64 / 1000.0
}
