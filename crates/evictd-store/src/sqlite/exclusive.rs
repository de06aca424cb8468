//! One publisher per file: a lock beside it, which the kernel releases when the process ends, however it
//! ends.
//!
//! Two publishers would number each other's rows and send only their own part of the log. Tools and direct SQL
//! don't number, and don't need the lock.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Held by the publisher. The file stays when the lock goes: whoever deleted it could let two publishers lock
/// two files of that name.
#[derive(Debug)]
pub(super) struct Exclusive(File);

impl Exclusive {
    /// Takes the lock of the store at `store`, which must exist; `None` if somebody has it.
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

    /// Gives it back before the process ends.
    pub(super) fn release(&self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "can't release the home store's lock; it goes when this process ends");
        }
    }
}
