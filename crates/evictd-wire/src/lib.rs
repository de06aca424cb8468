//! The wire contract of evictd.
//!
//! On the bus, between publishers and agents, it is protobuf; `proto/evictd/v1` is the specification.
//!
//! * [`subject`]: who speaks where.
//! * [`live`], [`probe`], [`replay`], [`lookup`], [`applied`], [`publisher`]: one module a message, bytes to core types
//!   and back. Decoding checks every limit, so that nothing behind it has to.
//!
//! Over HTTP it is Unkey's v2 JSON:
//!
//! * [`api`]: requests, answers, errors, ids, secrets.

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
