//! The log: numbering, rounds, replays, and the store's history.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use evictd_core::history::{BeginCause, History, Incarnation, LogToken, RoundToken};
use evictd_core::ids::{Identity, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation};
use evictd_core::position::LogPosition;
use evictd_core::roster::Instance;
use evictd_core::time::StoreTime;

use crate::error::StoreError;
use crate::history::VoucherKey;

/// The sizes of a store's files, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreFiles {
    pub database: u64,
    /// What isn't copied into the database yet, or was and isn't overwritten yet.
    pub write_ahead_log: u64,
}

/// The log and the store's history, for the tasks that number and prove.
#[async_trait]
pub trait LogStore: Debug + Send + Sync + 'static {
    /// Whether no other publisher can use the store meanwhile.
    fn is_exclusive(&self) -> bool;

    /// Fails if the last write failed and none has succeeded since, or if the next one is known to fail: reading
    /// alone doesn't show that. Costs nothing. Only a write that succeeds clears the failure.
    fn writable(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Returns the sizes of the store's files, if it has files of its own. Costs next to nothing.
    fn files(&self) -> Option<StoreFiles> {
        None
    }

    /// Checks that the log's triggers are in place and unaltered (R3), and that publishers have all rights they need.
    async fn check_triggers(&self) -> Result<(), StoreError>;

    /// Gives committed rows without a position the next ones, at most `limit` (R1). The rows of one request are never
    /// split, so that there may be a few more.
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError>;

    /// Runs one probe round (R7) in one durable transaction:
    ///
    /// * writes the `instances` that the roster lacks (R11);
    /// * begins an epoch if the database's server has another history than the head (R2);
    /// * numbers every committed row;
    /// * draws a round token, which a demoted primary can't write.
    ///
    /// Leases depend on rounds. A round waits for the control API's change that is running, and for no other.
    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError>;

    /// Returns the rows `from..=to` of `epoch`, or a prefix of at most `limit`. Refuses if the store doesn't have
    /// the first one (R5).
    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError>;

    async fn head(&self) -> Result<Head, StoreError>;

    /// Begins an incarnation: a copy of the store won't know what is given out from here on (R15). `cause` is one that
    /// begins no epoch. Begins an epoch first if one is due.
    async fn begin_incarnation(&self, cause: BeginCause, evidence: Option<&str>) -> Result<Head, StoreError>;

    /// Notes an epoch of another history that an agent has proved to have seen. An epoch that an operator declares
    /// begins above it (R15).
    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError>;

    /// The history of the store (R15).
    async fn history(&self) -> Result<History, StoreError>;

    /// The key of its vouchers (R16).
    async fn voucher_key(&self) -> Result<VoucherKey, StoreError>;

    /// The token of the row at exactly `at`, or of the incarnation that began there; `None` if neither is kept.
    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError>;

    /// Whether one of the last [`ROUND_TOKENS_KEPT`](crate::history::ROUND_TOKENS_KEPT) rounds drew `token`.
    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError>;

    /// Returns what waits for a position.
    async fn backlog(&self) -> Result<Backlog, StoreError>;

    /// Returns a number that changes with every commit of any connection: the sequencer's cue for changes made
    /// outside the API.
    async fn version(&self) -> Result<i64, StoreError>;

    /// Completes when the store signals a commit made outside the API. Stores without notifications never complete.
    /// Signals can be lost, so [`LogStore::version`] must be polled as well.
    async fn change_notified(&self);
}

/// The end of the log, and what distinguishes it from a copy's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The last position that was given out.
    pub at: LogPosition,
    /// The current incarnation.
    pub incarnation: Incarnation,
    /// The token of the row at this position; that of the incarnation's beginning if it has no row yet.
    pub token: LogToken,
    /// The token of the newest probe round.
    pub round: RoundToken,
}

/// Rows that just got their positions. They have not been sent yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Numbered {
    /// The head after numbering.
    pub head: Head,
    /// The rows, dense and ascending. The last one is at `head`.
    pub rows: Vec<Invalidation>,
    /// Those that requests of the control API wrote, in the same order: receipts are due for these.
    pub requests: Vec<NumberedRequest>,
}

impl Numbered {
    /// Nothing waited for a position.
    pub(crate) fn none(head: Head) -> Self {
        Self { head, rows: Vec::new(), requests: Vec::new() }
    }
}

/// A numbered row that a request of the control API wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NumberedRequest {
    /// The request, `req_...`.
    pub request_id: String,
    pub workspace_id: WorkspaceId,
    pub position: LogPosition,
    pub cause: Cause,
    /// On the store's clock.
    pub committed_at: StoreTime,
}

/// The input of a probe round.
#[derive(Clone, Copy, Default, Debug)]
pub struct RoundRequest<'a> {
    /// The instances that probed. They enter the roster before they get a lease (R11).
    pub instances: &'a [Instance],
    /// Instances that sent something else since the last round (announcements, lookups). The roster updates when they
    /// were last seen. Those that it lacks don't enter it.
    pub touched: &'a [Identity],
    /// The highest epoch that the instances have proved to have seen; 0 if none did. It begins no epoch, but one that
    /// begins anyway begins above it.
    pub seen_epoch: u32,
}

/// The outcome of a probe round.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Round {
    /// The head, and the rows that this round numbered.
    pub numbered: Numbered,
    /// The store's clock, read in the transaction.
    pub clock: ClockReading,
    /// Why this round began an epoch; `None` if it didn't.
    pub began: Option<BeginCause>,
    /// Why changes may miss the log at present; `None` if none can (R3). With a fault, the round proves nothing to an
    /// agent, only that the store is still the primary.
    pub schema_fault: Option<String>,
}

/// The store's clock, as this process read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClockReading {
    /// What it showed.
    pub store_time: StoreTime,
    /// By when it had been read, on this process's clock.
    pub read_by: Instant,
    /// It was read at most this long before that: the answer may have been delayed.
    pub within: Duration,
}

impl ClockReading {
    /// The store's time now, at least. At most `within` more.
    pub fn store_time_now(&self) -> StoreTime {
        self.store_time.after(self.read_by.elapsed())
    }
}

/// The answer to a repair request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Replay {
    /// Every row from the first requested position on, without a gap. The last ones may be left out.
    Rows {
        rows: Vec<Invalidation>,
        /// The token of the last row.
        token: LogToken,
    },
    /// The store doesn't have the whole range: the agent must flush.
    Refused {
        /// Where to start over.
        head: Head,
    },
}

/// Rows that are committed but not numbered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backlog {
    pub rows: u64,
    /// The age of the oldest row.
    pub oldest: Duration,
}

impl Backlog {
    pub(crate) fn new(rows: i64, oldest_micros: i64) -> Self {
        let [rows, oldest] = [rows, oldest_micros].map(|number| u64::try_from(number).unwrap_or(0));
        Self { rows, oldest: Duration::from_micros(oldest) }
    }
}
