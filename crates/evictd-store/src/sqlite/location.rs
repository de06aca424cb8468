//! Detects that the database file, or a file that belongs to it, was moved, replaced or removed while it is open.
//!
//! SQLite keeps using the files that it has open, wherever they are. What it commits to them then is missing where the
//! store belongs, for example at the next start of the publisher. So nothing is committed unless the files are where
//! they were opened.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::StoreError;
use crate::log::StoreFiles;

/// The files beside an open database: the write-ahead log, and its index, which processes lock against each other.
const COMPANIONS: [&str; 2] = ["-wal", "-shm"];

/// SQLite goes without these files where processes can't share memory, and commits differently then.
const NO_COMPANIONS: &str =
    "SQLite keeps no write-ahead log on this file system; put the home store on a local one";

/// Where an open store's files are.
#[derive(Debug)]
pub(super) struct FileLocation {
    files: Vec<(PathBuf, FileIdentity)>,
}

/// Device and inode: another file under the same name has others.
type FileIdentity = (u64, u64);

impl FileLocation {
    /// Returns the location of the store at `store`, which must be open.
    pub(super) fn of(store: &Path) -> io::Result<Self> {
        // SQLite follows a link, and has the other files beside its target.
        let target = fs::canonicalize(store)?;
        let beside = |suffix: &str| {
            let mut path = OsString::from(&target);
            path.push(suffix);
            PathBuf::from(path)
        };
        let mut files = vec![(store.to_owned(), identity(store)?)];
        for path in COMPANIONS.map(beside) {
            let identity = identity(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => io::Error::new(io::ErrorKind::Unsupported, NO_COMPANIONS),
                _ => error,
            })?;
            files.push((path, identity));
        }
        Ok(Self { files })
    }

    /// Returns the sizes of the database and of its write-ahead log, as far as they can be read.
    pub(super) fn sizes(&self) -> Option<StoreFiles> {
        let size = |index: usize| Some(fs::metadata(&self.files.get(index)?.0).ok()?.len());
        Some(StoreFiles { database: size(0)?, write_ahead_log: size(1)? })
    }

    /// Returns [`StoreError::Misplaced`] unless all files are in place. Takes microseconds, where a commit takes
    /// milliseconds.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let moved = |(path, opened): &&(PathBuf, FileIdentity)| identity(path).ok() != Some(*opened);
        match self.files.iter().find(moved) {
            Some((path, _)) => Err(StoreError::Misplaced { path: path.clone() }),
            None => Ok(()),
        }
    }
}

fn identity(path: &Path) -> io::Result<FileIdentity> {
    fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HomeStore;
    use crate::log::{LogStore, RoundRequest};
    use crate::operator::{Operator, OperatorStore};
    use crate::sqlite::SqliteStore;

    fn is_misplaced<T>(outcome: &Result<T, StoreError>) -> bool {
        matches!(outcome, Err(StoreError::Misplaced { .. }))
    }

    #[tokio::test]
    async fn moved_store_refuses_changes_until_it_is_back() {
        let directory = tempfile::tempdir().unwrap();
        for (name, away) in [("home.db", "away.db"), ("home.db-wal", "wal"), ("home.db-shm", "shm")] {
            let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
            let (here, away) = (directory.path().join(name), directory.path().join(away));
            let fence = store.round(RoundRequest::default()).await.unwrap().numbered.head;

            fs::rename(&here, &away).unwrap();
            assert!(is_misplaced(&store.round(RoundRequest::default()).await), "{name}");
            assert!(is_misplaced(&store.writable()), "{name}");
            assert_eq!(store.head().await.unwrap(), fence, "reading goes on");
            assert!(!here.exists(), "{name} was created anew");

            // Another file in its place.
            fs::copy(&away, &here).unwrap();
            assert!(is_misplaced(&store.round(RoundRequest::default()).await), "{name}");

            fs::rename(&away, &here).unwrap();
            store.writable().unwrap();
            store.round(RoundRequest::default()).await.unwrap();
            store.close().await;
        }
    }

    #[tokio::test]
    async fn readers_keep_the_store_that_was_opened() {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("home.db")).await.unwrap();
        for name in ["home.db", "home.db-wal", "home.db-shm"] {
            fs::remove_file(directory.path().join(name)).unwrap();
        }
        // All connections of a kind at once, so that each of them is asked.
        let pools = [&store.pools.lookups, &store.pools.records, &store.pools.replays];
        for pool in pools {
            let mut connections = Vec::new();
            for _ in 0..pool.options().get_max_connections() {
                connections.push(pool.acquire().await.unwrap());
            }
            for connection in &mut connections {
                sqlx::query("SELECT * FROM log_head").fetch_one(&mut **connection).await.unwrap();
            }
        }
    }

    #[test]
    fn file_system_without_write_ahead_logs_is_explained() {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("home.db");
        fs::write(&store, "").unwrap();
        let error = FileLocation::of(&store).unwrap_err();
        assert!(error.to_string().contains("put the home store on a local one"), "{error}");
    }

    fn operator() -> Operator {
        Operator { name: "ops".to_owned(), request_id: "req_operator".to_owned() }
    }

    #[tokio::test]
    async fn refused_change_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let (here, away) = (directory.path().join("home.db"), directory.path().join("away.db"));
        let store = SqliteStore::open(&here).await.unwrap();
        let before = store.begin_epoch(&operator()).await.unwrap();
        fs::rename(&here, &away).unwrap();
        assert!(is_misplaced(&store.begin_epoch(&operator()).await));
        fs::rename(&away, &here).unwrap();
        assert_eq!(store.head().await.unwrap(), before);
        store.begin_epoch(&operator()).await.unwrap();
    }
}
