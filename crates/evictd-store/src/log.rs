//! Numbered rows, rounds, replays.

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

/// The log: what gets which position, and what a store knows of its own history.
#[async_trait]
pub trait LogStore: std::fmt::Debug + Send + Sync + 'static {
    /// Gives every committed row without a position the next ones, at most `limit` (R1), and a few more where that
    /// would take a request's rows apart.
    async fn number(&self, limit: usize) -> Result<Numbered, StoreError>;

    /// One probe round (R7), in one durable transaction: writes `instances` that the roster lacks (R11),
    /// begins a new epoch if the database's server shows another history than the head's (R2), numbers every
    /// committed row, and draws a round token, which a demoted primary can't write. It never waits behind the
    /// control API's changes, beyond the one under way: leases depend on it.
    async fn round(&self, request: RoundRequest<'_>) -> Result<Round, StoreError>;

    /// The rows `from..=to` of `epoch`, or a prefix of at most `limit`; refused when the store can't
    /// cover even the first completely (R5).
    async fn replay(&self, epoch: u32, from: u64, to: u64, limit: usize) -> Result<Replay, StoreError>;

    /// The head, read alone.
    async fn head(&self) -> Result<Head, StoreError>;

    /// Begins an incarnation in the present epoch: what is given out from here on is taken for nothing that a copy of the
    /// store gives out (R15). An epoch, if one is due.
    async fn begin_incarnation(&self) -> Result<Head, StoreError>;

    /// Notes an epoch that an agent has proved to have seen of a history that isn't this store's: what an operator
    /// declares begins above it (R15).
    async fn note_lost_epoch(&self, epoch: u32) -> Result<(), StoreError>;

    /// Which pasts this store knows (R15).
    async fn history(&self) -> Result<History, StoreError>;

    /// The key of its vouchers (R16).
    async fn voucher_key(&self) -> Result<VoucherKey, StoreError>;

    /// The token of the row at exactly `at`, or of the incarnation that began there; `None` if neither is kept.
    async fn row_token(&self, at: LogPosition) -> Result<Option<LogToken>, StoreError>;

    /// Whether one of the last [`ROUND_TOKENS_KEPT`](crate::history::ROUND_TOKENS_KEPT) rounds drew `token`.
    async fn has_round_token(&self, token: RoundToken) -> Result<bool, StoreError>;

    /// What waits for a position.
    async fn backlog(&self) -> Result<Backlog, StoreError>;

    /// A number that changes when any connection commits anything: the sequencer's cue for changes made
    /// past the API.
    async fn version(&self) -> Result<i64, StoreError>;

    /// Returns when the store says by itself that somebody committed something past the API. One that can't
    /// say never returns; [`LogStore::version`] must be asked either way, because what is said may be lost.
    async fn change_notified(&self);

    /// Whether no other publisher can use the store meanwhile.
    fn is_exclusive(&self) -> bool;

    /// An error if the last write has failed and none has succeeded since, or if the next one is known to fail:
    /// what reading alone doesn't show. Costs nothing. Only a write that succeeds clears it.
    fn writable(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Checks that the log's triggers are in place and unaltered (R3), and that publishers have all rights they need.
    async fn check_triggers(&self) -> Result<(), StoreError>;
}

/// The end of the log, and what tells it from a copy's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// The last position that was given out.
    pub at: LogPosition,
    /// The incarnation that goes on.
    pub incarnation: Incarnation,
    /// Of the row at this position; of the incarnation's beginning, if it has given out none yet.
    pub token: LogToken,
    /// Of the newest probe round.
    pub round: RoundToken,
}

/// Rows that just got their positions, in order. They have not been sent yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Numbered {
    /// The head after numbering.
    pub head: Head,
    /// The rows, dense and ascending, ending at `head` unless there are none.
    pub rows: Vec<Invalidation>,
    /// Which of them requests of the control API wrote, in the same order: receipts are due for these.
    pub requests: Vec<NumberedRequest>,
}

/// A numbered row that a request of the control API wrote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NumberedRequest {
    /// The request, `req_...`.
    pub request_id: String,
    /// The workspace it acted for.
    pub workspace_id: WorkspaceId,
    /// The row's place in the log.
    pub position: LogPosition,
    /// Why the row was written.
    pub cause: Cause,
    /// When it was committed, on the store's clock.
    pub committed_at: StoreTime,
}

/// What a probe round is about.
#[derive(Clone, Copy, Default, Debug)]
pub struct RoundRequest<'a> {
    /// Who asked for it. They get into the roster before their lease (R11).
    pub instances: &'a [Instance],
    /// Who was heard otherwise since the last round (announcements, lookups). The roster's note of when they
    /// were last seen is kept up; those that it doesn't hold stay out.
    pub touched: &'a [Identity],
    /// The highest epoch that the askers have proved to have seen; 0 if none did. It begins nothing: an epoch that
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
    /// Why this round began a new epoch, if it did.
    pub began: Option<BeginCause>,
    /// What lets changes go past the log at present, if anything does (R3). Then this round proves nothing to an agent,
    /// and only that the store is still the primary.
    pub schema_fault: Option<String>,
}

/// The store's clock, as this process got to know of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClockReading {
    /// What it showed when it was read.
    pub store_time: StoreTime,
    /// By when it had been read, on this process's clock.
    pub read_by: Instant,
    /// How long before that at most: an answer may be long under way.
    pub within: Duration,
}

impl ClockReading {
    /// What the store's clock shows now, at least; and at most `within` more.
    pub fn store_time_now(&self) -> StoreTime {
        self.store_time.after(self.read_by.elapsed())
    }
}

/// The answer to a repair request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Replay {
    /// Every row from the first position asked for on, none missing; perhaps not up to the last.
    Rows {
        /// The rows.
        rows: Vec<Invalidation>,
        /// Of the last one.
        token: LogToken,
    },
    /// The store can't cover the range completely: the asker must flush.
    Refused {
        /// Where to start over.
        head: Head,
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
