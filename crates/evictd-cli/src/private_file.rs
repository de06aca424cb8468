//! Files with secrets, which only their owner can read.

use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use evictd_wire::api::ids;

/// Replaces the file at `path`, in one step, so that it never has half of the text.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_added_extension(ids::new_id("new"));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    let done = written.and_then(|()| std::fs::rename(&temporary, path));
    if done.is_err() {
        // The first error is the one to report.
        drop(std::fs::remove_file(&temporary));
    }
    done
}

/// Creates a directory and its parents where they are missing.
pub fn create_directory(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}
