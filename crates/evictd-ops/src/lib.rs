//! What both daemons of evictd need to be operated, and nothing of what they do.
//!
//! In reading order:
//!
//! * [`config`]: defaults, file, environment and flags become one checked configuration.
//! * [`connection_url`]: URLs of servers and databases, shown without their secrets.
//! * [`logging`], [`shutdown`], [`reload`], [`tasks`]: the log, signals, and the tasks of a process.
//! * [`clock`], [`time`], [`vm_clock`]: the two clocks of the protocol; pauses and intervals; whether the machine was
//!   stopped and went on.
//! * [`bus`]: a connection to NATS with the settings that the bound needs.
//! * [`http`]: the thin shell of every HTTP server, the verify hot path included.
//! * [`rpc`]: calls in Unkey's form on top of it, shared by the control API and the verify API.
//! * [`metrics`], [`readiness`], [`admin`]: what an operator sees, served on one port.
//! * [`invariants`]: violations of guarantees and rules, counted.

pub mod admin;
pub mod bus;
pub mod clock;
pub mod config;
pub mod connection_url;
pub mod host;
pub mod http;
pub mod invariants;
pub mod logging;
pub mod metrics;
pub mod readiness;
pub mod reload;
pub mod rpc;
pub mod shutdown;
pub mod tasks;
pub mod time;
pub mod vm_clock;
