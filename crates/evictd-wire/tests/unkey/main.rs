//! Unkey's HTTP contract, specified a second time and compared with the implementation.
//!
//! * [`table`]: every field of every endpoint, with its limits.
//! * [`fields`]: requests at those limits.
//! * [`errors`]: what clients see of each kind of error.
//! * [`openapi`]: the OpenAPI document states the same.
//! * [`page`]: docs/unkey-compatibility.md states the same, and names existing tests.
//! * [`receipts`]: docs/receipts.md has every field of evictd's own addition.

mod errors;
mod fields;
mod openapi;
mod page;
mod receipts;
mod table;
