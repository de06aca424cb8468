//! One checked configuration out of four layers: built-in defaults, a file, the environment, flags.
//!
//! The documented default file that a daemon includes with `include_str!` *is* its defaults: it names
//! every key there is, gives each its value and its type, and explains it. Nothing else does. A key
//! that isn't in it doesn't exist, and a mistake anywhere is an error that names the key, where the
//! value came from, and what was expected. All mistakes are reported at once.
//!
//! The target type should be `#[serde(deny_unknown_fields)]`, so that a key of the default file that
//! the program doesn't read is found by the first test that loads the defaults.

mod files;
mod layers;
mod listen;
mod postgres_url;
mod redact;
mod reference;
mod suggest;
mod text;
mod units;

pub use files::{NamedFile, named_files};
pub use layers::{Layers, Loaded};
pub use postgres_url::{PostgresUrl, PostgresUrlError};
pub use redact::print_effective;
pub use reference::reference;
pub use suggest::distance;
pub use units::{ByteSize, HumanDuration, UnitError};

/// What is wrong with a configuration: every problem, one per line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}", .problems.join("\n"))]
pub struct ConfigError {
    /// Each names the key, where its value came from, and what was expected. Never empty.
    pub problems: Vec<String>,
}

/// Checks what types can't say: how values relate, and which exclude each other.
pub trait Validate {
    /// Adds a sentence for each problem, which names the keys involved. Sections validate
    /// themselves; whoever owns them calls each.
    ///
    /// A value that couldn't be read stands here with its default.
    fn validate(&self, problems: &mut Vec<String>);
}

/// The environment variable of a key: `EVICTD_LEASE_BOUND` of `lease.bound`.
pub fn env_name(key: &str) -> String {
    format!("EVICTD_{}", key.replace(['.', '-'], "_").to_ascii_uppercase())
}

/// Refuses a number of things at once that is zero, or more than any machine has.
pub fn check_count(key: &str, count: usize, problems: &mut Vec<String>) {
    if !(1..=1_000_000).contains(&count) {
        problems.push(format!("{key}: must be between 1 and 1000000, not {count}"));
    }
}
