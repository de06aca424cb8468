//! Numbered rows, rounds, replays.

use std::time::{Duration, Instant};

use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;

/// Rows that just got their positions, in order. They have not been sent yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Numbered {
    /// The head after numbering.
    pub head: LogPosition,
    /// The rows, dense and ascending, ending at `head` unless there are none.
    pub rows: Vec<Invalidation>,
}

/// The outcome of a probe round.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Round {
    /// The head, and the rows that this round numbered.
    pub numbered: Numbered,
    /// The store's clock, read in the transaction.
    pub store_time: StoreTime,
    /// When it was read, on this process's clock.
    pub read_at: Instant,
    /// Whether this round began a new epoch.
    pub epoch_began: bool,
}

impl Round {
    /// What the store's clock shows now.
    pub fn store_time_now(&self) -> StoreTime {
        let since = i64::try_from(self.read_at.elapsed().as_micros()).unwrap_or(i64::MAX);
        StoreTime(self.store_time.0.saturating_add(since))
    }
}

/// The answer to a repair request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Replay {
    /// Every row from the first position asked for on, none missing; perhaps not up to the last.
    Rows(Vec<Invalidation>),
    /// The store can't cover the range completely: the asker must flush.
    Refused {
        /// Where to start over.
        head: LogPosition,
    },
}

/// Rows that are committed but not numbered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backlog {
    /// How many.
    pub rows: u64,
    /// The age of the oldest.
    pub oldest: Duration,
}
