//! One history (R15, R16) in small worlds: two databases, one a copy of the other, with the core's own `History`,
//! `Service`, `FollowedHistory` and `Follower`.

pub mod agent;
pub mod controls;
mod laws;
pub mod publisher;
pub mod store;
pub mod world;
pub mod worlds;
