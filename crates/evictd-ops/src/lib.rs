//! What both daemons of evictd need to be operated, and nothing of what they do.
//!
//! In reading order:
//!
//! * [`config`]: defaults, file, environment and flags become one checked configuration.
//! * [`logging`], [`shutdown`], [`tasks`]: how a process speaks, is told to end, and holds together.
//! * [`clock`], [`vm_clock`]: the two clocks of the protocol, read from the machine; and whether the machine
//!   itself was stopped and went on.
//! * [`bus`]: a connection to NATS with the settings the bound needs.
//! * [`http`]: the thin shell that serves every HTTP surface, the verify hot path included.
//! * [`rpc`]: calls in Unkey's form on top of it, shared by the control API and the verify surface.
//! * [`metrics`], [`readiness`], [`admin`]: what an operator sees, served on one port.
//! * [`invariants`]: what must never be seen, counted when it is.

pub mod admin;
pub mod bus;
pub mod clock;
pub mod config;
pub mod host;
pub mod http;
pub mod invariants;
pub mod logging;
pub mod metrics;
pub mod readiness;
pub mod rpc;
pub mod shutdown;
pub mod tasks;
pub mod vm_clock;
