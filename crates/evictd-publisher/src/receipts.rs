//! Receipts: which regions have applied each change (R11, R12).
//!
//! The rules are [`evictd_core::receipts`]. One task applies them: it owns the state, and takes everything from one queue.
//! It never waits for the store, but starts reads and writes and goes on, so that a slow store delays no announcement.
//! It ends when all senders of its queue are gone.
//!
//! * [`handle`]: what the control API and numbering call.
//! * [`membership`]: what probes and lookups call, for the agent processes behind them.
//! * [`input`]: what the queue carries.
//! * [`task`]: the task: when it reads from the store and writes to it.
//! * [`state`]: open receipts, and those that are final but not stored.
//! * [`roster`]: the roster as it was read last.
//! * [`requests`]: requests in progress, and the clients that wait for them.
//! * [`regions`]: the metrics of each region; [`snapshot`]: what `/status` shows.

mod handle;
mod input;
mod membership;
mod regions;
mod requests;
mod roster;
mod snapshot;
mod state;
mod task;

pub(crate) use self::handle::{ReceiptView, Receipts, WeakReceipts};
pub(crate) use self::membership::Membership;
pub(crate) use self::snapshot::ReceiptsSnapshot;
pub(crate) use self::task::ReceiptsTask;

#[cfg(test)]
mod tests;
