//! The wire contract of evictd.
//!
//! Publishers and agents exchange protobuf messages; `proto/evictd/v1` is the specification.
//!
//! * [`subject`]: which process sends on which subject.
//! * [`live`], [`probe`], [`replay`], [`lookup`], [`applied`], [`publisher`]: one module per message. Each converts
//!   between bytes and core types. Decoding checks every limit, so that later code needs no check.
//!
//! The HTTP API is Unkey's v2 JSON:
//!
//! * [`api`]: requests, answers, errors, ids, secrets.

// These macros panic when their stream can't be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod api;
pub mod applied;
mod codec;
mod generated;
pub mod live;
pub mod lookup;
pub mod probe;
pub mod publisher;
pub mod replay;
pub mod subject;

pub use codec::DecodeError;

#[cfg(test)]
mod tests;
