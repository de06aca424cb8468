//! Failures of the home store: all are counted, and each kind is logged now and then.
//!
//! In an outage every request and every task fails for the same reason, many times a second. The operator needs the first
//! line of each kind, and a sign that it goes on. The log must not fill the disk.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::mem::{Discriminant, discriminant};
use std::time::Duration;

use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::logging::with_causes;
use evictd_store::StoreError;
use metrics::Counter;
use parking_lot::Mutex;

/// One kind of failure is logged this often.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// Counts failures, and decides which are logged.
#[derive(Debug)]
pub(crate) struct StoreFailures {
    counter: Counter,
    throttle: Mutex<Throttle>,
}

impl StoreFailures {
    pub(crate) fn new(counter: Counter) -> Self {
        Self { counter, throttle: Mutex::default() }
    }

    /// Counts a failure; to be called once for each.
    pub(crate) fn note(&self, error: &StoreError) {
        self.counter.increment(1);
        let Some(unlogged) = self.throttle.lock().admit(kind(error), clock::lease_now()) else { return };
        let unlogged = (unlogged > 0).then_some(unlogged);
        tracing::error!(error = with_causes(error), unlogged_failures = unlogged, "home store failed");
    }

    /// Returns how many failures were not logged, nor counted in a log line yet.
    pub(crate) fn take_unlogged(&self) -> u64 {
        self.throttle.lock().take_unlogged()
    }
}

/// Failures that are logged as one: the same variant, about the same thing. The code names all of them, so there are few.
type FailureKind = (Discriminant<StoreError>, &'static str);

fn kind(error: &StoreError) -> FailureKind {
    let about = match error {
        StoreError::Database { action, .. } | StoreError::Unknown { action, .. } => action,
        StoreError::Corrupt { what, .. } => what,
        _ => "",
    };
    (discriminant(error), about)
}

/// When each kind was logged last, and how many of it weren't since.
#[derive(Default, Debug)]
struct Throttle(HashMap<FailureKind, FailureSeries>);

#[derive(Debug)]
struct FailureSeries {
    logged_at: LeaseTime,
    unlogged: u64,
}

impl Throttle {
    /// Returns how many of this kind weren't logged before, if this one is to be logged.
    fn admit(&mut self, kind: FailureKind, now: LeaseTime) -> Option<u64> {
        match self.0.entry(kind) {
            Entry::Vacant(first) => {
                first.insert(FailureSeries { logged_at: now, unlogged: 0 });
                Some(0)
            }
            Entry::Occupied(mut series) => {
                let series = series.get_mut();
                if now.since(series.logged_at) < LOG_EVERY {
                    series.unlogged += 1;
                    return None;
                }
                series.logged_at = now;
                Some(std::mem::take(&mut series.unlogged))
            }
        }
    }

    /// The pauses go on: a store that alternately fails and works must not fill the log either.
    fn take_unlogged(&mut self) -> u64 {
        self.0.values_mut().map(|series| std::mem::take(&mut series.unlogged)).sum()
    }
}

#[cfg(test)]
mod tests;
