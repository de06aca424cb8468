//! The store against real databases.

mod conformance;
mod copies;
mod direct_sql;
mod fixture;
mod log_conformance;
#[cfg(evictd_negative_controls)]
mod negative_controls;
mod postgres;
mod sqlite;
mod upgrades;
