//! Which agent processes there are, and what each promises (R11).

use std::time::Duration;

use crate::ids::Identity;

/// An agent process as it presents itself to the authority.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    /// Who it is.
    pub identity: Identity,
    /// What it does when its lease has run out.
    pub policy: PartitionPolicy,
    /// The bound it keeps.
    pub bound: Duration,
}

/// What an agent answers when neither its lease nor the authority vouches for an entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PartitionPolicy {
    /// It denies.
    Deny,
    /// It answers from the old entry, marked and counted.
    ServeStale,
}

impl PartitionPolicy {
    /// The name in the configuration, the roster and the metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::ServeStale => "serve_stale",
        }
    }
}
