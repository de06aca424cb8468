//! The configured home store, for commands that work on it directly, also beside a running publisher.

use std::path::{Path, PathBuf};

use anyhow::Context;
use evictd_store::sqlite::SqliteStore;

use crate::daemon::{ConfigArgs, runtime};

/// Where the configured store is, whatever directory that was said relative to.
pub(crate) fn path(config: &ConfigArgs) -> anyhow::Result<PathBuf> {
    let path = config.publisher()?.config.store.path;
    std::path::absolute(&path).with_context(|| format!("can't find out where {} is", path.display()))
}

/// As [`path`], of a store that must be there: opening would create it, and hide that it is the wrong one.
pub(crate) fn existing_path(config: &ConfigArgs) -> anyhow::Result<PathBuf> {
    let path = path(config)?;
    anyhow::ensure!(
        path.try_exists().with_context(|| format!("can't look for the home store {}", path.display()))?,
        "there is no home store at {}: start the publisher first, or give its configuration (--config FILE or \
         --set store.path=FILE)",
        path.display()
    );
    Ok(path)
}

/// Opens the store, works on it, and closes it.
pub(crate) fn with<T>(
    path: &Path,
    work: impl AsyncFnOnce(&SqliteStore) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    runtime()?.block_on(async {
        let store = SqliteStore::open(path).await?;
        let done = work(&store).await;
        store.close().await;
        done
    })
}
