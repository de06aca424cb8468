//! The files that a configuration names, in keys that end with `_file`. Daemons read them when they start, or when they
//! connect.

use std::io;
use std::path::{Path, PathBuf};

use toml::Table;

use super::leaves;

/// A file that a configuration names.
#[derive(Debug)]
pub struct NamedFile {
    pub key: String,
    pub path: PathBuf,
    /// Whether this process can read it, and it isn't empty.
    pub read: io::Result<()>,
}

/// Reads every file that the effective configuration names.
pub fn named_files(effective: &Table) -> Vec<NamedFile> {
    named_paths(effective).map(|(key, path)| NamedFile { key, read: read(&path), path }).collect()
}

/// Returns the keys that name files, with their paths.
pub(super) fn named_paths(effective: &Table) -> impl Iterator<Item = (String, PathBuf)> {
    let files = leaves(effective).into_iter().filter(|(key, _)| key.ends_with("_file"));
    files.filter_map(|(key, value)| {
        Some((key, PathBuf::from(value.as_str().filter(|path| !path.is_empty())?)))
    })
}

/// Opening isn't enough: a directory can be opened.
fn read(path: &Path) -> io::Result<()> {
    match std::fs::read(path)?.as_slice() {
        [] => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_named_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("password"), "hunter2").unwrap();
        std::fs::write(path("empty"), "").unwrap();
        let effective = format!(
            "[nats]\nurls = []\npassword_file = {:?}\nca_file = {:?}\ncert_file = ''\n[store]\nurl_file = {:?}\n\
             key_file = {:?}\npath = '/no/such/path'\n",
            path("password"),
            path("missing"),
            dir.path(),
            path("empty")
        );
        let failures: Vec<_> = named_files(&effective.parse().unwrap())
            .into_iter()
            .map(|file| (file.key, file.read.err().map(|error| error.kind())))
            .collect();
        assert_eq!(
            failures,
            [
                ("nats.ca_file".to_owned(), Some(io::ErrorKind::NotFound)),
                ("nats.password_file".to_owned(), None),
                ("store.key_file".to_owned(), Some(io::ErrorKind::UnexpectedEof)),
                ("store.url_file".to_owned(), Some(io::ErrorKind::IsADirectory)),
            ]
        );
    }
}
