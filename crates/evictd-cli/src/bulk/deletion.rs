//! The flags of a bulk deletion, and the outcome of each deletion.

use std::time::Duration;

use evictd_wire::api::propagation::Propagation;

/// The default of `--concurrency`.
pub(crate) const DEFAULT_CONCURRENCY: usize = 8;

#[derive(PartialEq, Eq, Debug)]
pub(crate) struct BulkDeletion {
    pub(crate) permanent: bool,
    pub(crate) concurrency: usize,
    /// Whether a missing key is a failure.
    pub(crate) strict: bool,
    /// How long to wait for the regions after each deletion.
    pub(crate) wait: Option<Duration>,
}

/// What happened to one id.
#[derive(PartialEq, Debug)]
pub(super) enum DeletionOutcome {
    Deleted {
        request_id: String,
        /// The latest receipt, if the run waits for the regions.
        receipt: Option<Box<Propagation>>,
    },
    NotFound {
        /// Whether an earlier attempt of this run may have deleted it.
        is_maybe_done: bool,
    },
    /// The deletion failed, or its result is unknown. With the reason.
    Failed(String),
    /// The request was never sent, or the rate limit refused it.
    NotStarted,
}
