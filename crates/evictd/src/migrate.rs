//! `evictd migrate`: brings the home store's schema up to date.
//!
//! `evictd publisher` does the same when it starts. This is for whoever wants it done before: with a database user
//! that may change the schema, say, while the publisher's may not.

use crate::daemon::ConfigArgs;
use crate::home_store::Place;
use crate::output_format::print_line;

pub(crate) fn run(config: &ConfigArgs) -> anyhow::Result<()> {
    let place = Place::of(config)?;
    place.with(async |store| Ok(store.check_triggers().await?))?;
    print_line(&format!("the home store {place} is up to date"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_store_is_made_and_an_existing_one_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("evictd.db");
        let config = ConfigArgs::default().and_set("store.path", path.display().to_string());
        run(&config).unwrap();
        assert!(path.exists());
        run(&config).unwrap();
    }
}
