//! `evictd migrate`: brings the home store's schema up to date.
//!
//! `evictd publisher` does the same when it starts. This command does it beforehand, for example with a database
//! user that may change the schema where the publisher's may not.

use evictd_cli::print::print_line;

use crate::config_args::ConfigArgs;
use crate::home_store::ConfiguredStore;

pub(crate) fn run(config: &ConfigArgs) -> anyhow::Result<()> {
    let store = ConfiguredStore::of(config)?;
    let before = store.schema_version()?;
    store.with(async |store| Ok(store.check_triggers().await?))?;
    let result = describe(before, store.schema_version()?.unwrap_or_default());
    print_line(&format!("the home store {store} is up to date: {result}"))
}

/// Describes a migration from one version of the schema to another.
fn describe(before: Option<i64>, after: i64) -> String {
    match before {
        None => format!("it was made, with version {after} of the schema"),
        Some(before) if before == after => {
            format!("it had version {after} of the schema already, nothing was changed")
        }
        Some(before) => format!("its schema was migrated from version {before} to {after}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_store_is_made_and_existing_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = ConfigArgs::default().and_set("store.path", path.display().to_string());
        let version = || ConfiguredStore::of(&config).unwrap().schema_version().unwrap();
        assert_eq!(version(), None);
        assert!(!path.exists());
        run(&config).unwrap();
        let made = version();
        assert!(path.exists() && made.is_some_and(|version| version > 0), "{made:?}");
        run(&config).unwrap();
        assert_eq!(version(), made);
    }

    #[test]
    fn result_says_what_was_done() {
        assert_eq!(describe(None, 2), "it was made, with version 2 of the schema");
        assert_eq!(describe(Some(2), 2), "it had version 2 of the schema already, nothing was changed");
        assert_eq!(describe(Some(1), 2), "its schema was migrated from version 1 to 2");
    }
}
