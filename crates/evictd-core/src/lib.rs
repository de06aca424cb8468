//! The rules of evictd, as values in and values out.
//!
//! The core does no I/O, reads no clock, draws no randomness, and neither logs nor counts. Time is
//! an argument and effects are return values, so that the agent, the publisher and the simulator
//! run the same code.
//!
//! In reading order:
//!
//! * [`limits`]: every bound on a size, and how the bounds relate.
//! * [`ids`], [`position`], [`time`]: the vocabulary. No bare integer crosses a module border.
//! * [`history`]: which store a message is of, and which pasts a store has (R15, R16).
//! * [`record`]: what the store holds for a key, and the verdict that follows from it.
//! * [`invalidation`]: one row of the log.
//! * [`roster`]: the agent processes and their policies (R11).
//! * [`floors`]: the positions below which nothing is served (R6).
//! * [`lease`]: how long a cached answer may be served (R8).
//! * [`entry`]: floors and lease together, for one cached record (R9).
//! * [`followed_history`]: which history an agent follows (R15).
//! * [`follower`]: the agent's side of the protocol: gaps, repair, probes, proofs (R5, R7).
//! * [`serving`]: what the agent's threads share, and the steps of a hit, a load and an
//!   invalidation (R9, R10).
//! * [`authority`]: the publisher's side: when a round of probes runs (R7, R14).
//! * [`service`]: whether a publisher may vouch for its store (R15).
//! * [`epochs`]: when a store begins a new epoch, and which (R2).
//! * [`log`]: which positions rows get, which rows answer a replay, and how long rows are kept (R1,
//!   R5).
//! * [`offset`]: when a change was committed, on the agent's lease clock.
//! * [`exposure`]: how long after a change the old state was served.
//! * [`receipts`]: how far each change has come through the regions (R12).
//! * [`rules`], [`protection`]: the ids of guarantees and rules, and their negative controls.
//!
//! The rule numbers are those of ARCHITECTURE.md.

// These macros panic when their stream can't be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
pub mod labels;

pub mod authority;
pub mod entry;
pub mod epochs;
pub mod exposure;
pub mod floors;
pub mod followed_history;
pub mod follower;
pub mod history;
pub mod ids;
pub mod invalidation;
pub mod lease;
pub mod limits;
pub mod log;
pub mod offset;
pub mod position;
pub mod protection;
pub mod receipts;
pub mod record;
pub mod roster;
pub mod rules;
pub mod service;
pub mod serving;
mod sync;
pub mod time;
