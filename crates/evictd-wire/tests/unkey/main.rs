//! Unkey's contract over HTTP, written down a second time and held against the first.
//!
//! * [`table`]: every field of every endpoint, with its limits.
//! * [`fields`]: requests at those limits.
//! * [`errors`]: what a client sees of each way to fail.
//! * [`page`]: docs/unkey-compatibility.md says the same, and names tests that exist.

mod errors;
mod fields;
mod page;
mod table;
