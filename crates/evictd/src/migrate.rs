//! `evictd migrate`: brings the home store's schema up to date.
//!
//! `evictd publisher` does the same when it starts. This is for whoever wants it done before: with a database user
//! that may change the schema, say, while the publisher's may not.

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::print_line;

pub(crate) fn run(config: &ConfigArgs) -> anyhow::Result<()> {
    let place = Place::of(config)?;
    let before = place.schema_version()?;
    place.with(async |store| Ok(store.check_triggers().await?))?;
    let done = told(before, place.schema_version()?.unwrap_or_default());
    print_line(&format!("the home store {place} is up to date: {done}"));
    Ok(())
}

/// What a migration from one version of the schema to another came to.
fn told(before: Option<i64>, after: i64) -> String {
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
    fn a_new_store_is_made_and_an_existing_one_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = ConfigArgs::default().and_set("store.path", path.display().to_string());
        let version = || Place::of(&config).unwrap().schema_version().unwrap();
        assert_eq!(version(), None);
        assert!(!path.exists());
        run(&config).unwrap();
        let made = version();
        assert!(path.exists() && made.is_some_and(|version| version > 0), "{made:?}");
        run(&config).unwrap();
        assert_eq!(version(), made);
    }

    #[test]
    fn it_is_told_what_was_done() {
        assert_eq!(told(None, 2), "it was made, with version 2 of the schema");
        assert_eq!(told(Some(2), 2), "it had version 2 of the schema already, nothing was changed");
        assert_eq!(told(Some(1), 2), "its schema was migrated from version 1 to 2");
    }
}
