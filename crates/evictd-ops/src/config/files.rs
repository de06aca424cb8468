//! The files that a configuration names: the keys that end with `_file`. Daemons read them when they start, or when
//! they connect.

use std::io;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::reference::join;

/// A file that a configuration names.
#[derive(Debug)]
pub struct NamedFile {
    /// The key that names it.
    pub key: String,
    /// Which one.
    pub path: PathBuf,
    /// Whether there is something in it that this process may read.
    pub read: io::Result<()>,
}

/// Reads every file that the effective configuration names.
pub fn named_files(effective: &Table) -> Vec<NamedFile> {
    let mut files = Vec::new();
    find("", effective, &mut files);
    files
}

fn find(path: &str, table: &Table, files: &mut Vec<NamedFile>) {
    for (name, value) in table {
        let key = join(path, name);
        match value {
            Value::Table(section) => find(&key, section, files),
            Value::String(file) if name.ends_with("_file") && !file.is_empty() => {
                let path = PathBuf::from(file);
                files.push(NamedFile { key, read: read(&path), path });
            }
            _ => {}
        }
    }
}

/// To read is more than to open: a directory can be opened.
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
    fn each_file_that_is_named_is_read() {
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
        let told: Vec<_> = named_files(&effective.parse().unwrap())
            .into_iter()
            .map(|file| (file.key, file.read.err().map(|error| error.kind())))
            .collect();
        assert_eq!(
            told,
            [
                ("nats.ca_file".to_owned(), Some(io::ErrorKind::NotFound)),
                ("nats.password_file".to_owned(), None),
                ("store.key_file".to_owned(), Some(io::ErrorKind::UnexpectedEof)),
                ("store.url_file".to_owned(), Some(io::ErrorKind::IsADirectory)),
            ]
        );
    }
}
