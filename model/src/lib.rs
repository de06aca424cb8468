//! The protocol in small worlds, checked to exhaustion.
//!
//! A [`world::SmallWorld`] is a home store, publishers, one or two agents and a handful of changes, and everything
//! that can happen to them. The agents are the core's own `Follower`, `Floors` and `Validity`; the probe rounds
//! are its `Rounds`. The store and the bus are modelled. The checker visits every state that such a world can
//! get into, and checks in each whether the guarantees hold ([`laws`]), and whether the agents would recover
//! if faults stopped ([`recovery`]).
//!
//! Time is a clock of few ticks that all share. `trust`, the bound less its margin, is one or two of them, and
//! the laws demand the trust instead of the bound: the margin is there for clocks that drift, and here none
//! does.
//!
//! The worlds of [`history`] have two stores, one a copy of the other, and check R15 and R16.
//!
//! A build with `--cfg evictd_negative_controls` lacks one protection at a time ([`controls`]): then the
//! checker must find a violation.

pub mod agent;
pub mod check;
pub mod controls;
pub mod core_agent;
pub mod defect;
pub mod history;
mod laws;
mod recovery;
pub mod script;
pub mod state;
mod steps;
pub mod store;
pub mod world;
pub mod worlds;
