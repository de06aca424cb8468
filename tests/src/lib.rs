//! The harness: real servers and processes, and every way to break them.
//!
//! The end-to-end tests and the demo use it. It is plain blocking code: a test reads from top to
//! bottom, and waits only by [`wait::eventually`], never for a fixed time.
//!
//! In reading order:
//!
//! * [`wait`]: polling with a deadline; the only place that sleeps.
//! * [`ports`]: loopback ports that no other process takes.
//! * [`process`]: [`process::Daemon`], a child that is killed, stopped, paused and restarted, and never
//!   outlives the test.
//! * [`nats_server`]: real NATS servers with the configuration of `deploy/nats`.
//! * [`frames`]: the NATS protocol, split into frames.
//! * [`bus`]: a small NATS client, which can also try what is forbidden.
//! * [`proxy`]: a TCP proxy that can cut, block and delay connections, and lose chosen messages.
//! * [`sql`]: a session on a PostgreSQL server besides the publishers'.
//! * [`wall_clock`]: a wrong wall clock for one daemon.
//! * [`disk`]: small disks and read-only disks.
//! * [`random`]: reproducible randomness.
//! * [`http`], [`metrics`]: clients for the daemons' HTTP interfaces.
//! * [`topology`]: a whole deployment, as tests and the demo start it.
//! * [`home_store`]: invariants of the log, the audit log and the receipts.
//! * [`crash_run`]: many deletions while publishers are killed.

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

// The store's tests need these without the rest.
use evictd_postgres_server::python_package;
pub use evictd_postgres_server::{ports, wait};

#[cfg(test)]
mod permissions_test;
