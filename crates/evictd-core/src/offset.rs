//! When a change was committed, on this machine's lease clock.
//!
//! Changes are dated by the store's clock, which may be wrong by any amount. The answer to each
//! probe brings a reading of it, taken between the sending of the probe and the arrival of the
//! answer. So the offset, the store's clock less the lease clock, lies in an interval. The
//! intervals of several probes intersect in a narrower one. This machine's wall clock is not used.
//!
//! The head in a probe's answer bounds a commit without any clock: a position above it was
//! committed after the probe was sent. If it contradicts the interval, the store's clock was set,
//! and the head counts. A step of the store's clock that is smaller than the interval isn't
//! noticed, and its error is no larger than the interval.
//!
//! The offset informs. Safety depends on it in one direction only: a key expires early rather than
//! late (the upper one of [`ClockOffset::bounds`]).

use std::collections::VecDeque;
use std::time::Duration;

use crate::limits::PROBES_OUTSTANDING_MAX;
use crate::position::LogPosition;
use crate::time::{LeaseTime, StoreTime, signed_micros};

/// What the answer to a probe says about time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measurement {
    pub sent_at: LeaseTime,
    pub received_at: LeaseTime,
    /// How long the publisher held the probe before it answered.
    pub held: Duration,
    /// The store's clock when the answer left.
    pub store_time: StoreTime,
    /// Every change that was committed before the probe was sent is at or below this position.
    pub head: LogPosition,
}

/// A duration that is known up to an error: it lies within, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DurationRange {
    pub low: Duration,
    pub high: Duration,
}

impl DurationRange {
    /// The range without what lies above `max`.
    #[must_use]
    pub fn at_most(self, max: Duration) -> Self {
        Self { low: self.low.min(max), high: self.high.min(max) }
    }

    /// The best guess.
    pub fn middle(&self) -> Duration {
        self.low + self.high.saturating_sub(self.low) / 2
    }
}

/// When a change was committed, on this machine's lease clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CommitWindow {
    pub earliest: LeaseTime,
    pub latest: LeaseTime,
}

impl CommitWindow {
    /// How long ago the commit was.
    pub fn age(&self, now: LeaseTime) -> DurationRange {
        DurationRange { low: now.since(self.latest), high: now.since(self.earliest) }
    }
}

/// The store's clock less this machine's lease clock, in microseconds.
#[derive(Clone, Copy, Debug)]
struct OffsetInterval {
    low: i64,
    high: i64,
    measured_at: LeaseTime,
}

/// The offset, as measured by probes.
#[derive(Clone, Default, Debug)]
pub struct ClockOffset {
    interval: Option<OffsetInterval>,
    /// When probes were sent, and the heads that answered them; rising.
    heads: VecDeque<(LeaseTime, LogPosition)>,
}

impl ClockOffset {
    /// How far two clocks may drift apart between two probes, at least.
    pub const DRIFT: Duration = Duration::from_micros(500);
    /// Over longer times they drift apart by one part in so many (100 ppm).
    const DRIFT_PART: u32 = 10_000;

    /// Takes in a probe's answer. Returns whether it contradicts the earlier ones: then a clock was
    /// set, and only this answer counts.
    pub fn measured(&mut self, measurement: Measurement) -> bool {
        let Measurement { sent_at, received_at, held, store_time, head } = measurement;
        if self.heads.len() == PROBES_OUTSTANDING_MAX {
            self.heads.pop_front();
        }
        self.heads.push_back((sent_at, head));
        let travelled = received_at.since(sent_at).saturating_sub(held);
        let low = store_time.0.saturating_sub(signed(received_at));
        let new = OffsetInterval {
            low,
            high: low.saturating_add(signed_micros(travelled)),
            measured_at: received_at,
        };
        let met = self.at(received_at).map(|old| OffsetInterval {
            low: old.low.max(new.low),
            high: old.high.min(new.high),
            measured_at: received_at,
        });
        let contradicts = met.is_some_and(|met| met.low > met.high);
        self.interval = met.filter(|_| !contradicts).or(Some(new));
        contradicts
    }

    /// The lowest and the highest offset at `now`, in microseconds; `None` before the first answer.
    pub fn bounds(&self, now: LeaseTime) -> Option<(i64, i64)> {
        self.at(now).map(|interval| (interval.low, interval.high))
    }

    /// When the change at `position` was committed, which arrived here by `now`. `None` before the
    /// first answer.
    pub fn commit_of(
        &self,
        position: LogPosition,
        committed_at: StoreTime,
        now: LeaseTime,
    ) -> Option<CommitWindow> {
        let interval = self.at(now)?;
        // The last probe whose head didn't include it. Without one, only the clocks bound the
        // commit.
        let unknown_at =
            self.heads.iter().rev().find(|(_, head)| *head < position).map(|(sent_at, _)| *sent_at);
        let after = unknown_at.unwrap_or_default();
        let earliest = unsigned(committed_at.0.saturating_sub(interval.high)).max(after);
        let latest = unsigned(committed_at.0.saturating_sub(interval.low)).min(now);
        Some(if earliest <= latest {
            CommitWindow { earliest, latest }
        } else {
            CommitWindow { earliest: after, latest: now }
        })
    }

    /// The interval, widened by the possible drift since it was measured.
    fn at(&self, now: LeaseTime) -> Option<OffsetInterval> {
        let interval = self.interval?;
        let drift = signed_micros((now.since(interval.measured_at) / Self::DRIFT_PART).max(Self::DRIFT));
        let (low, high) = (interval.low.saturating_sub(drift), interval.high.saturating_add(drift));
        Some(OffsetInterval { low, high, ..interval })
    }
}

fn signed(time: LeaseTime) -> i64 {
    i64::try_from(time.0).unwrap_or(i64::MAX)
}

fn unsigned(micros: i64) -> LeaseTime {
    LeaseTime(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000;
    const HOUR: i64 = 3_600_000_000;
    /// As a real clock, which is never near 0.
    const START: u64 = 1 << 50;

    fn at(position: u64) -> LogPosition {
        LogPosition::new(1, position).unwrap()
    }

    /// Two machines, whose clocks differ by `offset`.
    struct TwoClocks {
        now: u64,
        offset: i64,
        head: u64,
        estimate: ClockOffset,
    }

    impl TwoClocks {
        fn new(offset: i64) -> Self {
            Self { now: START, offset, head: 1, estimate: ClockOffset::default() }
        }

        fn store_time(&self) -> StoreTime {
            StoreTime(self.now as i64 + self.offset)
        }

        /// A probe; its three parts take so many microseconds.
        fn probe(&mut self, there: u64, held: u64, back: u64) -> bool {
            let sent_at = LeaseTime(self.now);
            self.now += there + held;
            let (store_time, head) = (self.store_time(), at(self.head));
            self.now += back;
            let held = Duration::from_micros(held);
            let received_at = LeaseTime(self.now);
            self.estimate.measured(Measurement { sent_at, received_at, held, store_time, head })
        }

        /// Commits a change that arrives after `lag`. Returns its measured lag.
        fn change(&mut self, lag: u64) -> DurationRange {
            self.head += 1;
            let committed_at = self.store_time();
            self.now += lag;
            let now = LeaseTime(self.now);
            self.estimate.commit_of(at(self.head), committed_at, now).unwrap().age(now)
        }
    }

    fn holds(span: DurationRange, lag: u64) -> bool {
        (span.low..=span.high).contains(&Duration::from_micros(lag))
    }

    #[test]
    fn nothing_is_known_before_the_first_probe() {
        let offset = ClockOffset::default();
        assert_eq!(offset.bounds(LeaseTime(START)), None);
        assert_eq!(offset.commit_of(at(1), StoreTime(0), LeaseTime(START)), None);
    }

    #[test]
    fn quick_probe_dates_a_change_to_its_way_and_the_drift() {
        let mut world = TwoClocks::new(5 * HOUR);
        world.probe(100, 250_000, 300);
        let span = world.change(20_000);
        assert_eq!(span.high, span.low + Duration::from_micros(400) + ClockOffset::DRIFT * 2);
        assert!(holds(span, 20_000), "{span:?}");
        assert!((19_000..21_000).contains(&span.middle().as_micros()), "{span:?}");
    }

    #[test]
    fn slow_probe_does_not_widen_the_interval() {
        let mut world = TwoClocks::new(-HOUR);
        world.probe(100, 0, 100);
        world.now += 5 * SECOND;
        world.probe(10, 0, 800_000);
        let span = world.change(2_000);
        assert!(span.high < Duration::from_millis(4), "{span:?}");
        assert!(holds(span, 2_000), "{span:?}");
    }

    #[test]
    fn interval_widens_without_probes() {
        let mut world = TwoClocks::new(0);
        world.probe(0, 0, 0);
        world.now += 3600 * SECOND;
        let (low, high) = world.estimate.bounds(LeaseTime(world.now)).unwrap();
        assert_eq!((low, high), (-360_000, 360_000));
    }

    #[test]
    fn step_of_the_stores_clock_is_noticed_at_the_next_probe() {
        for step in [-HOUR, -2_000_000, 2_000_000, HOUR] {
            let mut world = TwoClocks::new(HOUR);
            world.probe(200, 0, 200);
            world.now += SECOND;
            world.offset += step;
            assert!(world.probe(200, 0, 200), "{step}");
            assert!(holds(world.change(7_000), 7_000), "{step}");
            assert!(!world.probe(200, 0, 200), "once");
        }
    }

    #[test]
    fn log_bounds_a_commit_after_a_clock_step() {
        for step in [-HOUR, -8_000_000, 8_000_000, HOUR] {
            let mut world = TwoClocks::new(HOUR);
            world.probe(200, 0, 200);
            world.now += SECOND;
            world.offset += step;
            let span = world.change(7_000);
            assert!(holds(span, 7_000), "{step}: {span:?}");
            assert!(span.high < Duration::from_secs(2), "{step}: committed after the last probe: {span:?}");
        }
    }

    /// A control: the tests would notice a clock that drifts too fast.
    #[test]
    fn faster_drift_is_not_covered() {
        let mut world = TwoClocks::new(0);
        world.probe(0, 0, 0);
        world.now += SECOND;
        world.offset += 20_000;
        assert!(!holds(world.change(100_000), 100_000));
    }

    #[test]
    fn extreme_times_do_not_overflow() {
        for micros in [i64::MIN, -1, 0, i64::MAX] {
            for time in [0, u64::MAX] {
                let mut offset = ClockOffset::default();
                let (sent_at, received_at) = (LeaseTime(0), LeaseTime(time));
                let (held, head) = (Duration::MAX, at(1));
                for store_time in [StoreTime(micros), StoreTime(0)] {
                    offset.measured(Measurement { sent_at, received_at, held, store_time, head });
                }
                let commit = offset.commit_of(at(2), StoreTime(micros), received_at).unwrap();
                assert!(commit.age(received_at).low <= commit.age(received_at).high);
                offset.bounds(LeaseTime(u64::MAX));
            }
        }
    }

    /// A pause with drift, a probe, and a change.
    #[derive(Clone, Debug)]
    struct ProbeAndChange {
        pause: u64,
        drift: i64,
        probe: (u64, u64, u64),
        lag: u64,
    }

    fn any_step() -> impl Strategy<Value = ProbeAndChange> {
        let way = prop_oneof![0..2_000u64, 0..400_000u64];
        let probe = (way.clone(), 0..300_000u64, way);
        // The drift of the whole step, ways and lag included, stays within the limit.
        (0..4_000_000u64, -250i64..=250, probe, 0..200_000u64)
            .prop_map(|(pause, drift, probe, lag)| ProbeAndChange { pause, drift, probe, lag })
    }

    proptest! {
        #[test]
        fn truth_lies_within_for_any_offset_and_drift(
            offset in -12 * HOUR..12 * HOUR,
            steps in prop::collection::vec(any_step(), 1..40),
        ) {
            let mut world = TwoClocks::new(offset);
            for ProbeAndChange { pause, drift, probe: (there, held, back), lag } in steps {
                world.now += pause;
                world.offset += drift;
                prop_assert!(!world.probe(there, held, back), "no clock was set");
                let (low, high) = world.estimate.bounds(LeaseTime(world.now)).unwrap();
                prop_assert!((low..=high).contains(&world.offset));
                prop_assert!(world.now as i64 + high >= world.store_time().0);
                world.offset += drift;
                let span = world.change(lag);
                prop_assert!(holds(span, lag), "{span:?} {lag}");
            }
        }

        #[test]
        fn truth_lies_within_again_after_a_step_and_a_probe(
            offset in -12 * HOUR..12 * HOUR,
            step in prop_oneof![-12 * HOUR..-2_000_000, 2_000_000..12 * HOUR],
            before in prop::collection::vec(any_step(), 1..10),
            (there, held, back) in (0..400_000u64, 0..300_000u64, 0..400_000u64),
            lag in 0..200_000u64,
        ) {
            let mut world = TwoClocks::new(offset);
            for ProbeAndChange { pause, probe: (there, held, back), .. } in before {
                world.now += pause;
                world.probe(there, held, back);
            }
            world.offset += step;
            prop_assert!(world.probe(there, held, back), "a step larger than the interval");
            prop_assert!(holds(world.change(lag), lag));
        }
    }
}
