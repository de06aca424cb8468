//! What a configuration changes when it is read again.

use std::collections::{BTreeMap, BTreeSet};

use evictd_wire::api::secret::Secret;
use toml::{Table, Value};

use super::files::named_paths;
use super::leaves;

/// A configuration as it was read, with what the files that it names held.
#[derive(Debug)]
pub struct ConfigSnapshot {
    values: BTreeMap<String, Value>,
    files: BTreeMap<String, Option<Secret>>,
}

/// The keys that differ between two snapshots.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ConfigChanges {
    /// Keys with another value.
    pub keys: Vec<String>,
    /// Keys that name the same file, with another content.
    pub files: Vec<String>,
}

impl ConfigSnapshot {
    /// Reads the files that the effective configuration names. One that can't be read counts as changed until it can.
    pub fn take(effective: &Table) -> Self {
        let content = |path| std::fs::read_to_string(path).ok().map(Secret::new);
        Self {
            values: leaves(effective).into_iter().map(|(key, value)| (key, value.clone())).collect(),
            files: named_paths(effective).map(|(key, path)| (key, content(path))).collect(),
        }
    }

    /// Takes over what `reloadable` covers and the files' content, so that the rest stays a difference until a restart.
    pub fn take_over(&mut self, newer: Self, reloadable: &[&str]) {
        self.values.retain(|key, _| !covers(reloadable, key));
        self.values.extend(newer.values.into_iter().filter(|(key, _)| covers(reloadable, key)));
        self.files = newer.files;
    }

    /// Returns what differs in `newer`.
    pub fn changes(&self, newer: &Self) -> ConfigChanges {
        let all: BTreeSet<&String> = self.values.keys().chain(newer.values.keys()).collect();
        let keys =
            all.into_iter().filter(|key| self.values.get(*key) != newer.values.get(*key)).cloned().collect();
        let is_other = |(key, content): &(&String, &Option<Secret>)| {
            self.files.get(*key).is_some_and(|before| before != *content)
        };
        let files = newer.files.iter().filter(is_other).map(|(key, _)| key.clone());
        let mut changes = ConfigChanges { keys, files: Vec::new() };
        changes.files = files.filter(|key| !changes.keys.contains(key)).collect();
        changes
    }
}

impl ConfigChanges {
    /// Splits the changed keys into those that `reloadable` covers, and those that need a restart. A name that ends with
    /// a dot covers a section.
    pub fn split(&self, reloadable: &[&str]) -> (Vec<&str>, Vec<&str>) {
        self.keys.iter().map(String::as_str).partition(|key| covers(reloadable, key))
    }
}

fn covers(reloadable: &[&str], key: &str) -> bool {
    reloadable.iter().any(|name| *name == key || (name.ends_with('.') && key.starts_with(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> ConfigSnapshot {
        ConfigSnapshot::take(&text.parse().unwrap())
    }

    #[test]
    fn changed_keys_are_split_by_what_they_need() {
        let before =
            snapshot("[log]\nfilter = 'info'\n[http]\nlisten = 'a'\n[rate_limit.workspaces]\nws_1 = '5'");
        let after =
            snapshot("[log]\nfilter = 'debug'\n[http]\nlisten = 'b'\n[rate_limit.workspaces]\nws_2 = '5'");
        let changes = before.changes(&after);
        assert_eq!(
            changes.split(&["log.filter", "rate_limit."]),
            (
                vec!["log.filter", "rate_limit.workspaces.ws_1", "rate_limit.workspaces.ws_2"],
                vec!["http.listen"]
            )
        );
        assert_eq!(before.changes(&before), ConfigChanges::default());
        // What needs a restart is named at each reload until then.
        let mut running = before;
        running.take_over(
            snapshot("[log]\nfilter = 'debug'\n[http]\nlisten = 'b'"),
            &["log.filter", "rate_limit."],
        );
        assert_eq!(running.changes(&after).keys, ["http.listen", "rate_limit.workspaces.ws_2"]);
    }

    #[test]
    fn changed_file_is_named_by_its_key() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("[nats]\npassword_file = {:?}", file.path());
        std::fs::write(file.path(), "old").unwrap();
        let before = snapshot(&text);
        assert_eq!(before.changes(&snapshot(&text)), ConfigChanges::default());
        std::fs::write(file.path(), "new").unwrap();
        let changes = before.changes(&snapshot(&text));
        assert_eq!((changes.keys, changes.files), (vec![], vec!["nats.password_file".to_owned()]));
        assert!(!format!("{before:?}").contains("old"));
    }
}
