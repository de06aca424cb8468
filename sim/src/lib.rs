//! Deterministic simulation of evictd: many real cores in a modeled world, judged by checkers from outside.
//!
//! The agents' followers, floors, validities and leases and the publishers' rounds and receipts are
//! evictd-core's own. Their surroundings are modeled: the store, core NATS, clocks, processes, operators. A
//! scenario and a seed decide everything that happens; the same seed gives the same trace, byte by byte.
//!
//! In reading order:
//!
//! * [`time`], [`rng`], [`queue`]: real time and clocks, randomness, scheduled events.
//! * [`node`], [`rows`], [`message`], [`event`]: the data that the parts exchange.
//! * [`net`], [`transport`], [`store`]: the network and the store, which all processes share.
//! * [`process`], [`agent`], [`cached`], [`steps`], [`publisher`]: the processes.
//! * [`workload`]: changes and verifications.
//! * [`fault`], [`assumption`], [`scenario`]: the faults, as data.
//! * [`checker`], [`health`]: the judgment of answers, and when liveness may be demanded.
//! * [`world`], [`ctx`]: all of it together; [`trace`]: the record of a run.
//! * [`controls`]: negative controls, which show that the checkers can fail.
//! * [`alone`]: the store by itself, for comparison with those that ship.
//! * [`report`], [`histogram`], [`cli`]: runs in bulk, and their results.

pub mod agent;
pub mod alone;
pub mod assumption;
pub mod cached;
pub mod checker;
pub mod cli;
pub mod controls;
pub mod ctx;
pub mod event;
pub mod fault;
pub mod health;
pub mod histogram;
pub mod message;
pub mod net;
pub mod node;
pub mod process;
pub mod publisher;
pub mod queue;
pub mod report;
pub mod rng;
pub mod rows;
pub mod scenario;
pub mod steps;
pub mod store;
pub mod time;
pub mod trace;
pub mod transport;
pub mod workload;
pub mod world;
