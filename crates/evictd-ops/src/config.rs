//! One checked configuration out of four layers: built-in defaults, a file, the environment, flags.
//!
//! The documented default file that a daemon includes with `include_str!` *is* its defaults: it names every key, gives
//! each its value and its type, and explains it. A key that isn't in it doesn't exist. A mistake is an error that names
//! the key, the source of the value, and what was expected. All mistakes are reported at once.
//!
//! The target type should be `#[serde(deny_unknown_fields)]`, so that the first test that loads the defaults finds a
//! key of the default file that the program doesn't read.

mod files;
mod layers;
mod listen;
mod redact;
mod reference;
mod reload;
mod suggest;
mod text;
mod units;

use toml::{Table, Value};

use self::reference::join;

pub use files::{NamedFile, named_files};
pub use layers::{Layers, Loaded};
pub use redact::print_effective;
pub use reference::reference;
pub use reload::{ConfigChanges, ConfigSnapshot};
pub use units::{ByteSize, HumanDuration, UnitError};

/// All problems of a configuration, one per line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}", .problems.join("\n"))]
pub struct ConfigError {
    /// Each names the key, the source of its value, and what was expected. Never empty.
    pub problems: Vec<String>,
}

/// Checks what types can't express: how values relate, and which exclude each other.
pub trait Validate {
    /// Adds a sentence for each problem, which names the keys involved. A section validates its own keys, and calls
    /// the sections in it.
    ///
    /// A value that couldn't be parsed is replaced by its default here.
    fn validate(&self, problems: &mut Vec<String>);
}

/// Returns the environment variable of a key: `EVICTD_LEASE_BOUND` of `lease.bound`.
pub fn env_name(key: &str) -> String {
    format!("EVICTD_{}", key.replace(['.', '-'], "_").to_ascii_uppercase())
}

/// Returns the keys of a table, dotted, with their values, without the sections.
fn leaves(table: &Table) -> Vec<(String, &Value)> {
    let mut leaves = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(section) => {
                leaves
                    .extend(self::leaves(section).into_iter().map(|(key, value)| (join(name, &key), value)));
            }
            value => leaves.push((name.clone(), value)),
        }
    }
    leaves
}

/// Refuses a number that is zero, or larger than any machine can serve.
pub fn check_count(key: &str, count: usize, problems: &mut Vec<String>) {
    if !(1..=1_000_000).contains(&count) {
        problems.push(format!("{key}: must be between 1 and 1000000, not {count}"));
    }
}
