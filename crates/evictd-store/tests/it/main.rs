//! The store against real databases.

mod by_hand;
mod conformance;
mod fixture;
mod postgres;
mod sqlite;
