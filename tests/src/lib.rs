//! The harness: real servers and processes, and every way to break them.
//!
//! The end-to-end tests and the demo stand on it. It is plain blocking code: a test reads from top to
//! bottom, and waits only by [`wait::eventually`], never for a fixed time.
//!
//! In reading order:
//!
//! * [`wait`]: polling with a deadline; the only place that sleeps.
//! * [`ports`]: loopback ports that nobody else takes.
//! * [`process`]: [`process::Daemon`], a child that is killed, stopped, paused and restarted, and never
//!   outlives the test.
//! * [`nats_server`]: real NATS servers with the configuration of `deploy/nats`.
//! * [`frames`]: the NATS protocol, cut into frames.
//! * [`bus`]: a NATS client of a hundred lines, which also says what it may not.
//! * [`proxy`]: a wire that can be cut, blocked and delayed, and lose chosen messages.
//! * [`sql`]: somebody else's session on a PostgreSQL server.
//! * [`wall_clock`]: a daemon's wrong date.
//! * [`disk`]: disks that are small, and that can no longer be written to.
//! * [`random`]: chance that can be repeated.
//! * [`http`], [`metrics`]: what a user sees of the daemons.
//! * [`topology`]: a whole deployment, as tests and the demo start it.
//! * [`home_store`]: what holds of the log, the audit log and the receipts, whatever has happened.
//! * [`crash_run`]: many deletions, while publishers are killed.

pub mod bus;
pub mod crash_run;
pub mod disk;
pub mod frames;
pub mod home_store;
pub mod http;
pub mod metrics;
pub mod nats_server;
pub mod process;
pub mod proxy;
pub mod random;
pub mod sql;
pub mod topology;
pub mod wall_clock;

// What tests of the store need as well, without the rest.
use evictd_postgres_server::python_package;
pub use evictd_postgres_server::{ports, wait};

#[cfg(test)]
mod permissions_test;
