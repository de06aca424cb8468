//! The configured home store, for commands that work on it directly, also beside a running publisher.

use std::fmt;

use anyhow::Context;
use evictd_publisher::config::StoreLocation;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore, StoreError};

use crate::daemon::{ConfigArgs, runtime};

/// Where the configured store is. Shown, it is without user and password.
#[derive(Debug)]
pub(crate) struct Place(StoreLocation);

impl Place {
    /// Where the configuration says, whatever directory that was said relative to.
    pub(crate) fn of(config: &ConfigArgs) -> anyhow::Result<Self> {
        let location = config.publisher()?.config.store.location()?;
        Ok(Self(match location {
            StoreLocation::Sqlite(path) => {
                let absolute = std::path::absolute(&path);
                let absolute =
                    absolute.with_context(|| format!("can't find out where {} is", path.display()))?;
                StoreLocation::Sqlite(absolute)
            }
            database @ StoreLocation::Postgres(_) => database,
        }))
    }

    /// As [`Place::of`], of a store that must be there: opening would create the file, and hide that it is the
    /// wrong one.
    pub(crate) fn existing(config: &ConfigArgs) -> anyhow::Result<Self> {
        let place = Self::of(config)?;
        if let StoreLocation::Sqlite(path) = &place.0 {
            anyhow::ensure!(
                path.try_exists().with_context(|| format!("can't look for the home store {place}"))?,
                "there is no home store at {place}: start the publisher first, or give its configuration (--config \
                 FILE or --set store.path=FILE)"
            );
        }
        Ok(place)
    }

    /// Opens the store, works on it, and closes it.
    pub(crate) fn with<T>(
        &self,
        work: impl AsyncFnOnce(&dyn HomeStore) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let done = runtime()?.block_on(async {
            match &self.0 {
                StoreLocation::Sqlite(path) => {
                    let store = SqliteStore::open(path).await?;
                    let done = work(&store).await;
                    store.close().await;
                    done
                }
                StoreLocation::Postgres(_) => anyhow::bail!("not yet"),
            }
        });
        done.map_err(advised)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Says what to do about a store that another version has made.
pub(crate) fn advised(error: anyhow::Error) -> anyhow::Error {
    let foreign =
        error.chain().any(|cause| matches!(cause.downcast_ref::<StoreError>(), Some(StoreError::Migrate(_))));
    if !foreign {
        return error;
    }
    error.context(
        "this home store was made by another version of evictd. If that is a newer one, use it here, too. If it was \
         built between two releases, its schema was never released and can't be brought up to date: go on with that \
         version, or begin with a new store (another store.path or database) and create its keys anew. Nothing was \
         changed",
    )
}
