//! Reads the machine's clocks, so that other code can take time as an argument.

use std::time::{SystemTime, UNIX_EPOCH};

use evictd_core::time::{LeaseTime, StoreTime};
use rustix::time::{ClockId, clock_gettime};

/// The lease clock: on Linux it counts the time the machine was suspended.
#[cfg(any(target_os = "linux", target_os = "android"))]
const LEASE_CLOCK: ClockId = ClockId::Boottime;

/// Weaker: this clock may stop while the machine sleeps, so an agent on such a system keeps the bound only while the
/// machine stays awake. Good enough for development.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const LEASE_CLOCK: ClockId = ClockId::Monotonic;

/// Added to each reading. The clock itself starts at 0 at boot, so that on a machine that has just started "never" would
/// look recent. With this it lies 35 years back.
const ORIGIN_US: u64 = 1 << 50;

/// Reads the lease clock (R8): `CLOCK_BOOTTIME` on Linux, elsewhere the weaker `CLOCK_MONOTONIC`.
pub fn lease_now() -> LeaseTime {
    let now = clock_gettime(LEASE_CLOCK);
    LeaseTime(ORIGIN_US + now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000)
}

/// Reads the wall clock, which dates things and decides nothing about safety. Before 1970 it is negative.
pub fn wall_now() -> StoreTime {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(after) => StoreTime::default().after(after),
        Err(before) => StoreTime::default().before(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_clock_never_goes_back() {
        let readings: Vec<LeaseTime> = (0..1_000).map(|_| lease_now()).collect();
        assert!(readings.is_sorted());
    }

    #[test]
    fn never_is_long_ago_on_a_freshly_booted_machine() {
        let year = std::time::Duration::from_hours(8760);
        assert!(lease_now().since(LeaseTime(0)) > year * 30);
    }

    #[test]
    fn wall_clock_is_in_microseconds_since_1970() {
        let year_2020 = StoreTime(1_577_836_800_000_000);
        let year_2200 = StoreTime(7_258_118_400_000_000);
        assert!((year_2020..year_2200).contains(&wall_now()));
    }
}
