//! Generated from `proto/evictd/v1` and checked in; `cargo xtask generate` rewrites it.
#![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub, unused_qualifications)]

include!("generated/evictd.v1.rs");
