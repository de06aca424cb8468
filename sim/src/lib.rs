//! Deterministic simulation of evictd: many real cores, a modelled world, checkers from outside.
//!
//! The agents' followers, floors, stamps and leases and the publishers' rounds and receipts are
//! evictd-core's own. What surrounds them is modelled: the store, core NATS, clocks, processes, people. A
//! scenario and a seed decide everything that happens; the same seed gives the same trace, byte by byte.
//!
//! In reading order:
//!
//! * [`time`], [`rng`], [`queue`]: real time and clocks, chance, what happens next.
//! * [`net`], [`store`]: the two things that everybody shares.
//! * [`process`], [`agent`], [`publisher`]: who works.
//! * [`workload`]: what is asked of them.
//! * [`fault`], [`scenario`]: what goes wrong, as data.
//! * [`checker`], [`health`]: the truth, and what may be demanded when.
//! * [`world`], [`ctx`]: all of it together; [`trace`]: what happened.
//! * [`controls`]: a checker that finds nothing proves nothing.
//! * [`alone`]: the store by itself, for comparing it with those that ship.
//! * [`report`], [`histogram`], [`cli`]: runs in bulk, and what is told of them.

pub mod agent;
pub mod alone;
pub mod assumption;
pub mod checker;
pub mod cli;
pub mod controls;
pub mod ctx;
pub mod fault;
pub mod health;
pub mod histogram;
pub mod net;
pub mod process;
pub mod publisher;
pub mod queue;
pub mod report;
pub mod rng;
pub mod scenario;
pub mod store;
pub mod time;
pub mod trace;
pub mod workload;
pub mod world;
