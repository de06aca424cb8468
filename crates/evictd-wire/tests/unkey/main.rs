//! Unkey's contract over HTTP, written down a second time and held against the first.
//!
//! * [`table`]: every field of every endpoint, with its limits.
//! * [`fields`]: requests at those limits.
//! * [`errors`]: what a client sees of each way to fail.
//! * [`page`]: docs/unkey-compatibility.md says the same, and names tests that exist.
//! * [`receipts`]: docs/receipts.md has every field of evictd's own addition.

mod errors;
mod fields;
mod page;
mod receipts;
mod table;
