//! Real time, which no process can see, and the clocks that processes have instead.

use evictd_core::time::{LeaseTime, StoreTime};

/// A span of real time in microseconds.
pub type Micros = u64;

pub const MS: Micros = 1_000;

pub const SECOND: Micros = 1_000_000;

/// A moment of real time, in microseconds since the world began. Guarantees are judged in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Moment(pub Micros);

impl Moment {
    /// Later than everything.
    pub const NEVER: Self = Self(u64::MAX);

    /// This moment plus `span`, saturating.
    #[must_use]
    pub fn after(self, span: Micros) -> Self {
        Self(self.0.saturating_add(span))
    }

    /// How long ago `earlier` was; zero if it lies ahead.
    pub fn since(self, earlier: Self) -> Micros {
        self.0.saturating_sub(earlier.0)
    }

    /// As the store's clock shows it, which is exact.
    pub fn store_time(self) -> StoreTime {
        StoreTime(self.0 as i64)
    }
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.6}", self.0 as f64 / SECOND as f64)
    }
}

/// Parts per million: the rate of an exact clock.
const EXACT_PPM: u64 = 1_000_000;

/// A lease clock (R8): its own start, its own rate.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    anchor: Moment,
    reading: u64,
    rate_ppm: u64,
}

impl Clock {
    /// A clock that shows `reading` at the world's beginning and runs at `1 + drift_ppm / 10^6`.
    pub fn new(reading: u64, drift_ppm: i64) -> Self {
        Self { anchor: Moment(0), reading, rate_ppm: EXACT_PPM.saturating_add_signed(drift_ppm) }
    }

    /// What it shows at `now`.
    pub fn read(&self, now: Moment) -> LeaseTime {
        let run = u128::from(now.since(self.anchor)) * u128::from(self.rate_ppm) / u128::from(EXACT_PPM);
        LeaseTime(self.reading + run as u64)
    }

    /// The first moment at which it shows `reading` or more.
    pub fn moment(&self, reading: LeaseTime) -> Moment {
        let ahead = u128::from(reading.0.saturating_sub(self.reading));
        let span = (ahead * u128::from(EXACT_PPM)).div_ceil(u128::from(self.rate_ppm));
        self.anchor.after(u64::try_from(span).unwrap_or(u64::MAX))
    }

    /// It stood still from `from` until `now`: what a clock does that doesn't count suspended time.
    pub fn stopped_from(&mut self, from: Moment, now: Moment) {
        let reading = self.read(from).0;
        *self = Self { anchor: now, reading, rate_ppm: self.rate_ppm };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_the_first_at_which_the_clock_shows_it() {
        for drift in [-20_000, 0, 13, 20_000] {
            let clock = Clock::new(7_000, drift);
            for reading in [7_001, 123_456, 99_999_999] {
                let moment = clock.moment(LeaseTime(reading));
                assert!(clock.read(moment) >= LeaseTime(reading));
                assert!(clock.read(Moment(moment.0 - 1)) < LeaseTime(reading));
            }
        }
    }

    #[test]
    fn a_clock_that_stood_still_goes_on_where_it_was() {
        let mut clock = Clock::new(0, 0);
        clock.stopped_from(Moment(10), Moment(500));
        assert_eq!(clock.read(Moment(503)), LeaseTime(13));
    }
}
