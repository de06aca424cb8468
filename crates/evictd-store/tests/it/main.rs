//! The store against real databases.

mod by_hand;
mod conformance;
mod copies;
mod fixture;
mod postgres;
mod sqlite;
mod upgrades;
