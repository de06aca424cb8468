//! The store against real databases.

mod by_hand;
mod conformance;
mod copies;
mod fixture;
mod log_conformance;
#[cfg(evictd_negative_controls)]
mod negative_controls;
mod postgres;
mod sqlite;
mod upgrades;
