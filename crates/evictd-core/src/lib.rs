//! The rules of evictd, as values in and values out.
//!
//! Nothing here does I/O, reads a clock, draws randomness, logs or counts: time is an argument and
//! effects are return values, so that the agent, the publisher and a simulator run the same code.
//!
//! In reading order:
//!
//! * [`limits`]: every bound on a size, and how the bounds relate.
//! * [`ids`], [`position`], [`time`]: the vocabulary. No bare integer crosses a module border.
//! * [`history`]: which store speaks, and which pasts it knows (R15, R16).
//! * [`record`]: what the store says of a key, and the verdict that follows from it.
//! * [`invalidation`]: one row of the log, as it travels.
//! * [`roster`]: agent processes and their policies (R11).
//! * [`floors`]: what an agent remembers of invalidations (R6).
//! * [`lease`]: until when a cached answer may be given (R8).
//! * [`entry`]: the two together, for one cached record (R9).
//! * [`followed_history`]: which history an agent follows (R15).
//! * [`follower`]: the agent's side of the protocol: gaps, repair, probes, proof (R5, R7).
//! * [`service`]: whether a publisher may vouch for its store (R15).
//! * [`serving`]: what the agent's threads share, and the steps of a hit, a load and an invalidation (R9, R10).
//! * [`authority`]: the publisher's side: pacing of probe rounds (R7, R14).
//! * [`epochs`]: when a store begins a new epoch, and which (R2).
//! * [`log`]: which positions rows get, which rows answer a replay, how long they are kept (R1, R5).
//!
//! * [`exposure`]: until when the old state was answered from.
//! * [`offset`]: when something was committed at home, told on the agent's lease clock.
//! * [`receipts`]: what is known of each change's way through the regions (R12).
//! * [`rules`], [`protection`]: the ids of guarantees and rules, and their negative controls.
//!
//! The rule numbers are those of ARCHITECTURE.md.

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
