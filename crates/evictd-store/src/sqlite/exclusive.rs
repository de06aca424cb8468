//! One publisher per file: a lock on a file beside it. The kernel releases the lock when the process ends, in whatever
//! way.
//!
//! Two publishers would number each other's rows, and each would send only its own part of the log. Tools and direct SQL
//! don't number, and don't need the lock.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The publisher's lock. The file is never deleted: otherwise two publishers could lock two files of that name.
#[derive(Debug)]
pub(super) struct Exclusive(File);

impl Exclusive {
    /// Takes the lock of the store at `store`, which must exist; `None` if another process has it.
    pub(super) fn take(store: &Path) -> io::Result<Option<Self>> {
        // Beside the file itself, whatever links lead to it.
        let mut path = OsString::from(std::fs::canonicalize(store)?);
        path.push("-lock");
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Releases the lock before the process ends.
    pub(super) fn release(&self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "cannot release the home store's lock; it is released when this process ends");
        }
    }
}
