//! Failures of the home store: all are counted, and each kind is logged now and then.
//!
//! In an outage every request and every task fails for the same reason, many times a second. The operator needs the first
//! line of each kind, and a sign that it goes on. The log must not fill the disk.

use std::mem::{Discriminant, discriminant};

use evictd_ops::logging::{LogLimit, Unlogged, with_causes};
use evictd_store::StoreError;
use metrics::Counter;

/// Counts failures, and decides which are logged.
#[derive(Debug)]
pub(crate) struct StoreFailures {
    counter: Counter,
    limit: LogLimit<FailureKind>,
}

impl StoreFailures {
    pub(crate) fn new(counter: Counter) -> Self {
        Self { counter, limit: LogLimit::new(1) }
    }

    /// Counts a failure; to be called once for each.
    pub(crate) fn note(&self, error: &StoreError) {
        self.counter.increment(1);
        let Some(unlogged) = self.limit.admit(kind(error)) else { return };
        tracing::error!(
            error = with_causes(error),
            unlogged_failures = unlogged.field(),
            "home store failed"
        );
    }

    /// Returns how many failures were not logged, nor counted in a log line yet.
    pub(crate) fn take_unlogged(&self) -> Unlogged {
        self.limit.take_unlogged()
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

#[cfg(test)]
mod tests;
