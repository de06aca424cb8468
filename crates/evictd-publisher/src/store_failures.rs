//! Failures of the home store: all are counted, and the log tells of each kind once in a while.
//!
//! In an outage every request and every task fails for the same reason, many times a second. Whoever reads the log
//! then needs the first line of each kind and a sign that it goes on, and the disk needs an end of it.

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

/// The log tells of one kind of failure this often.
const TELL_EVERY: Duration = Duration::from_secs(30);

/// Counts failures, and decides which are told.
#[derive(Debug)]
pub(crate) struct StoreFailures {
    counter: Counter,
    throttle: Mutex<Throttle>,
}

impl StoreFailures {
    pub(crate) fn new(counter: Counter) -> Self {
        Self { counter, throttle: Mutex::default() }
    }

    /// Takes note of a failure, once for each.
    pub(crate) fn note(&self, error: &StoreError) {
        self.counter.increment(1);
        let Some(left_out) = self.throttle.lock().admit(kind(error), clock::lease_now()) else { return };
        let left_out = (left_out > 0).then_some(left_out);
        tracing::error!(error = with_causes(error), left_out, "the home store failed");
    }

    /// It works again: how many failures were left out of the log and not told of yet.
    pub(crate) fn take_left_out(&self) -> u64 {
        self.throttle.lock().take_left_out()
    }
}

/// What is told as one: the same variant, about the same thing. The code names all of them, so there are few.
type Kind = (Discriminant<StoreError>, &'static str);

fn kind(error: &StoreError) -> Kind {
    let about = match error {
        StoreError::Database { action, .. } | StoreError::Unknown { action, .. } => action,
        StoreError::Corrupt { what, .. } => what,
        _ => "",
    };
    (discriminant(error), about)
}

/// When each kind was told last, and how many of it weren't since.
#[derive(Default, Debug)]
struct Throttle(HashMap<Kind, Series>);

#[derive(Debug)]
struct Series {
    told_at: LeaseTime,
    left_out: u64,
}

impl Throttle {
    /// If this failure is to be told: how many of its kind were left out before it.
    fn admit(&mut self, kind: Kind, now: LeaseTime) -> Option<u64> {
        match self.0.entry(kind) {
            Entry::Vacant(first) => {
                first.insert(Series { told_at: now, left_out: 0 });
                Some(0)
            }
            Entry::Occupied(mut series) => {
                let series = series.get_mut();
                if now.since(series.told_at) < TELL_EVERY {
                    series.left_out += 1;
                    return None;
                }
                series.told_at = now;
                Some(std::mem::take(&mut series.left_out))
            }
        }
    }

    /// The pauses go on: a store that fails and works by turns fills no log either.
    fn take_left_out(&mut self) -> u64 {
        self.0.values_mut().map(|series| std::mem::take(&mut series.left_out)).sum()
    }
}

#[cfg(test)]
mod tests;
