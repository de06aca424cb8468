//! Misspelled environment variables.
//!
//! A misspelled `EVICTD_LEASE_BOUNDD` would be ignored, and another bound apply than the operator intended. So a
//! variable with the prefix of a section must be a key's, and a variable that is almost a key's is refused. The keys
//! of both daemons count, because both may get the same environment.

use std::collections::BTreeSet;

use evictd_ops::config::env_name;
use strsim::levenshtein;

/// The most edits between a variable with a section's prefix and the key that is suggested for it.
const SUGGESTED_WITHIN: usize = 3;

/// The most edits between a misspelled key and a variable without a section's prefix, which may be another program's.
const MISSPELLED_WITHIN: usize = 2;

/// Returns a sentence for each misspelled name.
pub(crate) fn problems(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let known = KnownVariables::of(&[evictd_publisher::config::DEFAULTS, evictd_agent::config::DEFAULTS]);
    let mut problems: Vec<String> = names.into_iter().filter_map(|name| known.problem(&name)).collect();
    problems.sort();
    problems
}

/// Returns the names of this process's variables.
pub(crate) fn of_process() -> impl Iterator<Item = String> {
    // A name that is not UTF-8 is no misspelling.
    std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())
}

#[derive(Default)]
struct KnownVariables {
    /// The prefixes of sections, such as `EVICTD_LEASE_`.
    sections: BTreeSet<String>,
    variables: BTreeSet<String>,
}

impl KnownVariables {
    fn of(defaults: &[&str]) -> Self {
        let mut known = Self::default();
        // Malformed defaults are reported when they are loaded.
        for table in defaults.iter().filter_map(|defaults| defaults.parse::<toml::Table>().ok()) {
            for (name, value) in &table {
                match value {
                    toml::Value::Table(section) => {
                        known.sections.insert(format!("{}_", env_name(name)));
                        known.add(name, section);
                    }
                    _ => drop(known.variables.insert(env_name(name))),
                }
            }
        }
        known
    }

    fn add(&mut self, path: &str, section: &toml::Table) {
        for (name, value) in section {
            let key = format!("{path}.{name}");
            match value {
                toml::Value::Table(inner) => self.add(&key, inner),
                _ => drop(self.variables.insert(env_name(&key))),
            }
        }
    }

    /// Checks a name without the prefix of a section.
    fn problem_outside(&self, name: &str) -> Option<String> {
        let is_section = name.starts_with("EVICTD_") && self.sections.contains(&format!("{name}_"));
        if is_section {
            return Some(format!(
                "{name} is a section; add the name of a key, as in {}",
                self.example(name)?
            ));
        }
        let (edits, meant) = self.variables.iter().map(|known| (levenshtein(name, known), known)).min()?;
        (1..=MISSPELLED_WITHIN)
            .contains(&edits)
            .then(|| format!("{name} matches no key; did you mean {meant}?"))
    }

    fn example(&self, section: &str) -> Option<&str> {
        let begins = |name: &&String| name.strip_prefix(section).is_some_and(|rest| rest.starts_with('_'));
        self.variables.iter().find(begins).map(String::as_str)
    }

    fn problem(&self, name: &str) -> Option<String> {
        let Some(section) = self.sections.iter().find(|section| name.starts_with(*section)) else {
            return self.problem_outside(name);
        };
        if self.variables.contains(name) || is_kubernetes(&name[section.len()..]) {
            return None;
        }
        let nearest = self.variables.iter().map(|known| (levenshtein(name, known), known)).min()?;
        // The NATS servers' configuration uses variables such as EVICTD_NATS_LISTEN and one per login with a free
        // name, so only an obvious misspelling counts there.
        let within = if section == "EVICTD_NATS_" { 1 } else { SUGGESTED_WITHIN };
        match nearest {
            (edits, meant) if edits <= within => {
                Some(format!("{name} matches no key; did you mean {meant}?"))
            }
            _ if section == "EVICTD_NATS_" => None,
            _ => Some(format!("{name} matches no key; the default file lists every key")),
        }
    }
}

/// Returns whether Kubernetes sets a variable with this suffix, for each service, in every pod of its namespace.
fn is_kubernetes(rest: &str) -> bool {
    rest == "PORT" || ["PORT_", "SERVICE_HOST", "SERVICE_PORT"].iter().any(|start| rest.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str]) -> Vec<String> {
        problems(names.iter().map(|name| (*name).to_owned()))
    }

    #[test]
    fn misspelled_variable_gets_a_suggestion() {
        assert_eq!(
            of(&["EVICTD_STORE_XYZZY", "EVICTD_LEASE_BOUNDD", "EVICTD_NATS_URL"]),
            [
                "EVICTD_LEASE_BOUNDD matches no key; did you mean EVICTD_LEASE_BOUND?",
                "EVICTD_NATS_URL matches no key; did you mean EVICTD_NATS_URLS?",
                "EVICTD_STORE_XYZZY matches no key; the default file lists every key",
            ]
        );
    }

    #[test]
    fn misspelled_section_gets_a_suggestion() {
        assert_eq!(
            of(&["EVICTD_RECEIPT_BOUND", "EVICTD_REGON", "EVICTD_RETENTION"]),
            [
                "EVICTD_RECEIPT_BOUND matches no key; did you mean EVICTD_RECEIPTS_BOUND?",
                "EVICTD_REGON matches no key; did you mean EVICTD_REGION?",
                "EVICTD_RETENTION is a section; add the name of a key, as in EVICTD_RETENTION_AUDIT",
            ]
        );
    }

    #[test]
    fn variables_of_either_daemon_are_valid_for_both() {
        assert!(of(&["EVICTD_LEASE_BOUND", "EVICTD_STORE_PATH", "EVICTD_REGION"]).is_empty());
    }

    #[test]
    fn variables_of_other_programs_are_ignored() {
        let client =
            ["EVICTD_ROOT_KEY", "EVICTD_API_URL", "EVICTD_VERIFY_URL", "EVICTD_OUTPUT", "LEASE_BOUND"];
        let nats_server =
            ["EVICTD_NATS_SERVER", "EVICTD_NATS_LISTEN", "EVICTD_NATS_US", "EVICTD_NATS_PUBLISHER"];
        let kubernetes = [
            "EVICTD_HTTP_SERVICE_HOST",
            "EVICTD_HTTP_PORT",
            "EVICTD_HTTP_PORT_80_TCP_ADDR",
            "EVICTD_PORT",
            "EVICTD_AGENT_PORT",
        ];
        assert!(of(&[client.as_slice(), &nats_server, &kubernetes].concat()).is_empty());
    }
}
