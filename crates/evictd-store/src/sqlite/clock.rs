//! The store's clock: that of this host. SQLite has no other.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use evictd_core::time::StoreTime;

use crate::log::ClockReading;

pub(super) fn now() -> StoreTime {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    StoreTime::default().after(since_1970)
}

/// Reads the clock, and when that was on this process's own.
pub(super) fn read_clock() -> ClockReading {
    let (before, store_time, read_by) = (Instant::now(), now(), Instant::now());
    ClockReading { store_time, read_by, within: read_by.duration_since(before) }
}
