//! The configured home store: opened for the publisher, and for operator commands, which can run while a publisher runs.

use std::fmt;
use std::sync::Arc;

use anyhow::Context;
use evictd_ops::connection_url::ConnectionUrl;
use evictd_publisher::config::{StoreConfig, StoreLocation};
use evictd_store::postgres::{PostgresOptions, PostgresStore};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore, StoreError};

use crate::config_args::ConfigArgs;
use crate::runtime;

/// The store that a configuration names. Its `Display` omits user and password.
#[derive(Debug)]
pub(crate) struct ConfiguredStore {
    config: StoreConfig,
    location: StoreLocation,
}

impl ConfiguredStore {
    /// The store of the publisher's configuration.
    pub(crate) fn of(config: &ConfigArgs) -> anyhow::Result<Self> {
        Self::new(config.publisher()?.config.store)
    }

    /// Makes a relative path absolute, so that messages show which file it is.
    pub(crate) fn new(config: StoreConfig) -> anyhow::Result<Self> {
        let mut location = config.location()?;
        if let StoreLocation::Sqlite(path) = &mut location {
            let absolute = std::path::absolute(&*path);
            *path = absolute.with_context(|| format!("cannot resolve {}", path.display()))?;
        }
        Ok(Self { config, location })
    }

    /// As [`Self::of`], of a store that must exist. Opening would create a new one, and hide a wrong path. Only
    /// publishers, `evictd dev` and `evictd migrate` create stores.
    pub(crate) fn existing(config: &ConfigArgs) -> anyhow::Result<Self> {
        let store = Self::of(config)?;
        anyhow::ensure!(
            store.schema_version()?.is_some(),
            "there is no home store at {store}: start the publisher first (or run `evictd migrate`), or name the store \
             with --config FILE, the publisher's, or --set store.path=FILE, or --set store.url=URL"
        );
        Ok(store)
    }

    /// Returns the version of the store's schema, or `None` if there is no store. Creates none.
    pub(crate) fn schema_version(&self) -> anyhow::Result<Option<i64>> {
        let look = async {
            match &self.location {
                StoreLocation::Sqlite(path) => SqliteStore::schema_version(path).await,
                StoreLocation::Postgres(_) => PostgresStore::schema_version(&self.options()?).await,
            }
        };
        runtime::new()?.block_on(look).map_err(with_advice)
    }

    /// Refuses a malformed URL. Does not connect.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if let StoreLocation::Postgres(_) = &self.location {
            self.options()?;
        }
        Ok(())
    }

    /// Opens the store for a publisher. An SQLite file is locked against other publishers until it is closed.
    pub(crate) async fn open_for_publisher(&self) -> Result<Arc<dyn HomeStore>, StoreError> {
        self.open(true).await
    }

    /// Opens the store, runs `work`, and closes it.
    pub(crate) fn with<T>(
        &self,
        work: impl AsyncFnOnce(&dyn HomeStore) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        runtime::new()?.block_on(async {
            let store = self.open(false).await.map_err(with_advice)?;
            let done = work(&*store).await;
            store.close().await;
            done
        })
    }

    async fn open(&self, for_publisher: bool) -> Result<Arc<dyn HomeStore>, StoreError> {
        match &self.location {
            StoreLocation::Sqlite(path) => {
                let opened = if for_publisher {
                    SqliteStore::open_exclusively(path).await
                } else {
                    SqliteStore::open(path).await
                };
                opened.map(|store| Arc::new(store) as Arc<dyn HomeStore>)
            }
            StoreLocation::Postgres(_) => self.connect().await.map(|store| Arc::new(store) as _),
        }
    }

    async fn connect(&self) -> Result<PostgresStore, StoreError> {
        PostgresStore::connect(self.options()?).await
    }

    fn options(&self) -> Result<PostgresOptions, StoreError> {
        let source = ConnectionUrl::postgres_source(&self.config.url, &self.config.url_file);
        let mut options = PostgresOptions::from_source(Arc::new(source))?;
        options.connections = u32::try_from(self.config.connections).unwrap_or(u32::MAX);
        options.statement_timeout = self.config.statement_timeout.into();
        Ok(options)
    }
}

impl fmt::Display for ConfiguredStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.location.fmt(f)
    }
}

/// Adds what to do about a store of another version.
pub(crate) fn with_advice(error: StoreError) -> anyhow::Error {
    let is_foreign = error.is_foreign_schema();
    let error = anyhow::Error::from(error);
    if !is_foreign {
        return error;
    }
    error.context(
        "this home store was made by another version of evictd. If that version is newer, use it here too. If it was \
         built between two releases, its schema cannot be migrated: continue with that version, or start with a new \
         store (another store.path or database) and create its keys again. Nothing was changed",
    )
}
