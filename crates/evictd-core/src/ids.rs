//! Identities. Each is a type of its own, so that none can stand in for another.

use std::fmt;
use std::sync::Arc;

/// SHA-256 of a key's full text. Keys themselves never reach a cache, a log, the bus or the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyHash(pub [u8; 32]);

impl fmt::Debug for KeyHash {
    /// Prints four bytes only: enough to distinguish hashes in a test failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]);
        write!(f, "KeyHash({start:08x}..)")
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Wraps an id. Ids are opaque: their form is checked where they enter the system.
            pub fn new(id: impl Into<Arc<str>>) -> Self {
                Self(id.into())
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

id! {
    /// Names a key without revealing it (`key_...`). Nothing else remains of a key after a
    /// permanent deletion.
    KeyId
}
id! {
    /// Names an API, the namespace of keys (`api_...`).
    ApiId
}
id! {
    /// Names a workspace, the tenant (`ws_...`).
    WorkspaceId
}
id! {
    /// Names a region, as configured (`eu-central-1`).
    Region
}
id! {
    /// Names an agent within its region, as configured.
    AgentName
}

/// Names one run of an agent process: drawn at random at each start (R11).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub u64);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InstanceId({self})")
    }
}

/// An agent process. Region and agent are bound to NATS permissions, the instance to one run.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Identity {
    /// From the request's subject.
    pub region: Region,
    /// From the request's subject.
    pub agent: AgentName,
    /// From the request's body.
    pub instance: InstanceId,
}
