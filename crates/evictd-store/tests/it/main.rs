//! The store against real databases.

#[path = "../fixture/mod.rs"]
mod fixture;
mod postgres;
