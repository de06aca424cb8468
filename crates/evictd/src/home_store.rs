//! The configured home store: opened for the publisher, and for commands that work on it directly, also beside a
//! running publisher.

use std::error::Error as _;
use std::fmt;
use std::sync::Arc;

use anyhow::Context;
use evictd_ops::config::PostgresUrl;
use evictd_publisher::config::{StoreConfig, StoreLocation};
use evictd_store::postgres::{PostgresOptions, PostgresStore};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore, StoreError};

use crate::daemon::{ConfigArgs, runtime};

/// Where the configured store is. Shown, it is without user and password.
#[derive(Debug)]
pub(crate) struct Place {
    config: StoreConfig,
    location: StoreLocation,
}

impl Place {
    /// Where the publisher's configuration says.
    pub(crate) fn of(config: &ConfigArgs) -> anyhow::Result<Self> {
        Self::configured(config.publisher()?.config.store)
    }

    /// Where `config` says, whatever directory that was said relative to.
    pub(crate) fn configured(config: StoreConfig) -> anyhow::Result<Self> {
        let mut location = config.location()?;
        if let StoreLocation::Sqlite(path) = &mut location {
            let absolute = std::path::absolute(&*path);
            *path = absolute.with_context(|| format!("can't find out where {} is", path.display()))?;
        }
        Ok(Self { config, location })
    }

    /// As [`Place::of`], of a store that must be there: opening would make a new one, and hide that it is the wrong
    /// one. Only publishers, `evictd dev` and `evictd migrate` make stores.
    pub(crate) fn existing(config: &ConfigArgs) -> anyhow::Result<Self> {
        let place = Self::of(config)?;
        anyhow::ensure!(
            place.schema_version()?.is_some(),
            "there is no home store at {place}: start the publisher first (or run `evictd migrate`), or say which \
             store is meant: --config FILE, the publisher's, or --set store.path=FILE, or --set store.url=URL"
        );
        Ok(place)
    }

    /// The version of the store's schema, if there is a store. Makes none.
    pub(crate) fn schema_version(&self) -> anyhow::Result<Option<i64>> {
        let look = async {
            match &self.location {
                StoreLocation::Sqlite(path) => SqliteStore::schema_version(path).await,
                StoreLocation::Postgres(url) => PostgresStore::schema_version(&self.options(url)?).await,
            }
        };
        runtime()?.block_on(look).map_err(advised)
    }

    /// Refuses a URL that couldn't be connected to whatever the database. Connects nowhere.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if let StoreLocation::Postgres(url) = &self.location {
            self.options(url)?;
        }
        Ok(())
    }

    /// Opens the store for a publisher: an SQLite file is this publisher's alone until it is closed.
    pub(crate) async fn open_for_publisher(&self) -> anyhow::Result<Arc<dyn HomeStore>> {
        let opened: Result<Arc<dyn HomeStore>, StoreError> = match &self.location {
            StoreLocation::Sqlite(path) => {
                SqliteStore::open_exclusively(path).await.map(|store| Arc::new(store) as _)
            }
            StoreLocation::Postgres(url) => self.connect(url).await.map(|store| Arc::new(store) as _),
        };
        opened.map_err(advised)
    }

    /// Opens the store, works on it, and closes it.
    pub(crate) fn with<T>(
        &self,
        work: impl AsyncFnOnce(&dyn HomeStore) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        runtime()?.block_on(async {
            let opened: Result<Box<dyn HomeStore>, StoreError> = match &self.location {
                StoreLocation::Sqlite(path) => {
                    SqliteStore::open(path).await.map(|store| Box::new(store) as _)
                }
                StoreLocation::Postgres(url) => self.connect(url).await.map(|store| Box::new(store) as _),
            };
            let store = opened.map_err(advised)?;
            let done = work(&*store).await;
            store.close().await;
            done
        })
    }

    async fn connect(&self, url: &PostgresUrl) -> Result<PostgresStore, StoreError> {
        PostgresStore::connect(self.options(url)?).await
    }

    fn options(&self, url: &PostgresUrl) -> Result<PostgresOptions, StoreError> {
        let mut options = PostgresOptions::new(url.expose())?;
        options.connections = u32::try_from(self.config.connections).unwrap_or(u32::MAX);
        options.statement_timeout = self.config.statement_timeout.into();
        Ok(options)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.location.fmt(f)
    }
}

/// Says what to do about a store that another version has made.
fn advised(error: StoreError) -> anyhow::Error {
    // The other failures of a migration have a cause of their own, in the database.
    let is_foreign = matches!(&error, StoreError::Migrate(migration) if migration.source().is_none());
    let error = anyhow::Error::from(error);
    if !is_foreign {
        return error;
    }
    error.context(
        "this home store was made by another version of evictd. If that is a newer one, use it here, too. If it was \
         built between two releases, its schema was never released and can't be brought up to date: go on with that \
         version, or begin with a new store (another store.path or database) and create its keys anew. Nothing was \
         changed",
    )
}
