//! The store against real databases.

mod conformance;
mod fixture;
mod postgres;
mod sqlite;
