//! Environment variables that look like a key's and are none's.
//!
//! A misspelled `EVICTD_LEASE_BOUNDD` would be ignored without a word, and another bound be kept than the
//! operator meant. So what begins like a variable of a section has to be one, and what is almost one isn't let pass:
//! of either daemon's keys, as both may be given the same environment.

use std::collections::BTreeSet;

use evictd_ops::config::{distance, env_name};

/// How many edits away a name of a section is still taken for a misspelled one.
const SUGGESTED_WITHIN: usize = 3;

/// How many edits away a name that belongs to no section is: others may have names of their own.
const MISSPELLED_WITHIN: usize = 2;

/// What is wrong with these variables' names: a sentence for each that no key has. Values aren't looked at.
pub(crate) fn problems(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let known = Known::of(&[evictd_publisher::config::DEFAULTS, evictd_agent::config::DEFAULTS]);
    let mut problems: Vec<String> = names.into_iter().filter_map(|name| known.problem(&name)).collect();
    problems.sort();
    problems
}

/// The names of this process's environment.
pub(crate) fn of_process() -> impl Iterator<Item = String> {
    // A name that isn't text can't begin like ours and differ only in spelling.
    std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())
}

#[derive(Default)]
struct Known {
    /// What variables of a section begin with, such as `EVICTD_LEASE_`.
    sections: BTreeSet<String>,
    variables: BTreeSet<String>,
}

impl Known {
    fn of(defaults: &[&str]) -> Self {
        let mut known = Self::default();
        // Defaults that can't be read are reported where they are loaded.
        for table in defaults.iter().filter_map(|defaults| defaults.parse::<toml::Table>().ok()) {
            for (name, value) in &table {
                match value {
                    toml::Value::Table(section) => {
                        known.sections.insert(format!("{}_", env_name(name)));
                        known.learn(name, section);
                    }
                    _ => drop(known.variables.insert(env_name(name))),
                }
            }
        }
        known
    }

    fn learn(&mut self, path: &str, section: &toml::Table) {
        for (name, value) in section {
            let key = format!("{path}.{name}");
            match value {
                toml::Value::Table(inner) => self.learn(&key, inner),
                _ => drop(self.variables.insert(env_name(&key))),
            }
        }
    }

    /// Of a name that begins like no section: it may be one of its misspelled.
    fn problem_outside(&self, name: &str) -> Option<String> {
        let of_section = name.starts_with("EVICTD_") && self.sections.contains(&format!("{name}_"));
        if of_section {
            return Some(format!(
                "{name} is a section's; a key's name follows it, as in {}",
                self.example(name)?
            ));
        }
        let (far, meant) = self.variables.iter().map(|known| (distance(name, known), known)).min()?;
        (1..=MISSPELLED_WITHIN)
            .contains(&far)
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
        let nearest = self.variables.iter().map(|known| (distance(name, known), known)).min()?;
        // The NATS servers' own configuration takes variables such as EVICTD_NATS_LISTEN and one per login,
        // named as one likes: only an obvious slip is one there.
        let within = if section == "EVICTD_NATS_" { 1 } else { SUGGESTED_WITHIN };
        match nearest {
            (far, meant) if far <= within => Some(format!("{name} matches no key; did you mean {meant}?")),
            _ if section == "EVICTD_NATS_" => None,
            _ => Some(format!("{name} matches no key; the default file names every key there is")),
        }
    }
}

/// Whether Kubernetes puts this after the name of a service, into every pod beside it.
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
    fn a_misspelled_variable_is_named_with_what_was_meant() {
        assert_eq!(
            of(&["EVICTD_STORE_XYZZY", "EVICTD_LEASE_BOUNDD", "EVICTD_NATS_URL"]),
            [
                "EVICTD_LEASE_BOUNDD matches no key; did you mean EVICTD_LEASE_BOUND?",
                "EVICTD_NATS_URL matches no key; did you mean EVICTD_NATS_URLS?",
                "EVICTD_STORE_XYZZY matches no key; the default file names every key there is",
            ]
        );
    }

    #[test]
    fn a_misspelled_section_is_noticed_as_well() {
        assert_eq!(
            of(&["EVICTD_RECEIPT_BOUND", "EVICTD_REGON", "EVICTD_RETENTION"]),
            [
                "EVICTD_RECEIPT_BOUND matches no key; did you mean EVICTD_RECEIPTS_BOUND?",
                "EVICTD_REGON matches no key; did you mean EVICTD_REGION?",
                "EVICTD_RETENTION is a section's; a key's name follows it, as in EVICTD_RETENTION_AUDIT",
            ]
        );
    }

    #[test]
    fn variables_of_either_daemon_are_known_to_both() {
        assert!(of(&["EVICTD_LEASE_BOUND", "EVICTD_STORE_PATH", "EVICTD_REGION"]).is_empty());
    }

    #[test]
    fn variables_of_others_are_left_alone() {
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
