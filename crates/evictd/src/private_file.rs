//! Files that are their owner's alone: what lies in them opens doors.

use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use evictd_wire::api::ids;

/// Writes beside `path` first, so that it never holds half of it.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_added_extension(ids::new_id("new"));
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    let done = written.and_then(|()| std::fs::rename(&beside, path));
    if done.is_err() {
        // The first error is the one to tell.
        drop(std::fs::remove_file(&beside));
    }
    done
}

/// Makes the directory that `path` lies in, where there is none.
pub(crate) fn directory(path: &Path) -> io::Result<()> {
    let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) else {
        return Ok(());
    };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}
