//! Notices that the file was put back (R2).
//!
//! An older copy of the file looks like any other. So beside it lies a note of how far the log has come; a
//! store that opens behind its note went back, and begins a new epoch before it numbers anything.
//!
//! The note is written after each commit that numbers rows, and never synced: one that is too old or missing
//! means only that agents, who tell what they have seen with every probe, have to notice instead.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use evictd_core::position::LogPosition;

/// The note beside one store's file.
#[derive(Debug)]
pub(super) struct Lineage {
    path: PathBuf,
    file: OnceLock<Option<File>>,
}

impl Lineage {
    /// The note of the store at `store`.
    pub(super) fn beside(store: &Path) -> Self {
        let mut path = OsString::from(store);
        path.push("-lineage");
        Self { path: path.into(), file: OnceLock::new() }
    }

    /// How far the log had come. A note that can't be read says nothing.
    pub(super) fn read(&self) -> LogPosition {
        let parse = |text: &str| {
            let (epoch, position) = text.trim().split_once('.')?;
            LogPosition::new(epoch.parse().ok()?, position.parse().ok()?)
        };
        fs::read_to_string(&self.path).ok().and_then(|text| parse(&text)).unwrap_or(LogPosition::ZERO)
    }

    /// The log has come to `head`. Not being able to write it is no reason to stop.
    pub(super) fn note(&self, head: LogPosition) {
        let file = self.file.get_or_init(|| self.create().map_err(|error| self.complain(&error)).ok());
        let Some(file) = file else { return };
        // Fixed width, in one write: a reader never sees half of an older, longer one.
        let text = format!("{:>10}.{:<20}\n", head.epoch(), head.position());
        if let Err(error) = file.write_all_at(text.as_bytes(), 0) {
            self.complain(&error);
        }
    }

    fn create(&self) -> io::Result<File> {
        File::options().write(true).create(true).truncate(false).mode(0o600).open(&self.path)
    }

    fn complain(&self, error: &io::Error) {
        tracing::warn!(%error, path = %self.path.display(), "can't note how far the log has come");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let store = directory.path().join("home.db");
        assert_eq!(Lineage::beside(&store).read(), LogPosition::ZERO);
        for (epoch, position) in [(1, 1_000_000), (2, 7)] {
            let head = LogPosition::new(epoch, position).unwrap();
            Lineage::beside(&store).note(head);
            assert_eq!(Lineage::beside(&store).read(), head);
        }
        fs::write(directory.path().join("home.db-lineage"), "nonsense").unwrap();
        assert_eq!(Lineage::beside(&store).read(), LogPosition::ZERO);
    }
}
