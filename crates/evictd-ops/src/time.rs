//! Pauses between attempts, and regular intervals.

use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior};

/// Pauses between attempts: each is twice as long as the one before, up to `max`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backoff {
    pub first: Duration,
    pub max: Duration,
}

impl Backoff {
    /// Returns the pause after so many failures in a row before the last one.
    pub fn pause(self, failures: u32) -> Duration {
        self.first.saturating_mul(2_u32.saturating_pow(failures)).min(self.max)
    }

    /// As [`Backoff::pause`], shortened by up to a half at random, so that many processes don't come back in the
    /// same millisecond. If the system has no randomness to give, the pause isn't shortened.
    pub fn spread_pause(self, failures: u32) -> Duration {
        self.shortened(failures, getrandom::u32().unwrap_or(u32::MAX))
    }

    fn shortened(self, failures: u32, chance: u32) -> Duration {
        let half = self.pause(failures) / 2;
        half + half.mul_f64(f64::from(chance) / f64::from(u32::MAX))
    }
}

/// An interval that ticks at once and then every `period`. A late tick delays those after it, so that work which
/// takes long isn't followed by a burst.
pub fn every(period: Duration) -> Interval {
    every_from(Instant::now(), period)
}

/// As [`every`]; the first tick comes after `period`.
pub fn after_every(period: Duration) -> Interval {
    every_from(Instant::now() + period, period)
}

fn every_from(start: Instant, period: Duration) -> Interval {
    let mut interval = tokio::time::interval_at(start, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

#[cfg(test)]
mod tests {
    use super::*;

    const RETRY: Backoff = Backoff { first: Duration::from_millis(50), max: Duration::from_millis(500) };

    #[test]
    fn pauses_double_up_to_their_maximum() {
        let pauses = [0, 1, 3, 4, u32::MAX].map(|failures| RETRY.pause(failures).as_millis());
        assert_eq!(pauses, [50, 100, 400, 500, 500]);
    }

    #[test]
    fn spread_pauses_lie_between_half_and_whole() {
        assert_eq!(RETRY.shortened(0, 0), Duration::from_millis(25));
        assert_eq!(RETRY.shortened(0, u32::MAX), Duration::from_millis(50));
        assert_eq!(RETRY.shortened(2, u32::MAX), Duration::from_millis(200));
        assert_eq!(RETRY.shortened(1_000_000, 0), Duration::from_millis(250));
        assert_eq!(RETRY.shortened(u32::MAX, u32::MAX), Duration::from_millis(500));
    }
}
