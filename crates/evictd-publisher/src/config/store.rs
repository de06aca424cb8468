//! Which home store: an SQLite file, or a PostgreSQL database.

use std::fmt;
use std::path::{Path, PathBuf};

use evictd_ops::config::{HumanDuration, Validate, check_count};
use evictd_ops::connection_url::{ConnectionUrl, UrlError};
use evictd_wire::api::secret::Secret;
use serde::Deserialize;

/// The section `[store]`. An empty string means "not set".
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// The SQLite file; used unless there is a URL.
    pub path: PathBuf,
    /// The PostgreSQL database.
    pub url: Secret,
    /// A file that holds the URL.
    pub url_file: PathBuf,
    /// The most connections to PostgreSQL.
    pub connections: usize,
    /// How long PostgreSQL may take for a statement.
    pub statement_timeout: HumanDuration,
}

/// Where the home store is. Displayed without user and password.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreLocation {
    /// In this file.
    Sqlite(PathBuf),
    /// In this database.
    Postgres(ConnectionUrl),
}

impl StoreConfig {
    /// Returns where the store is. Reads [`Self::url_file`] at each call.
    pub fn location(&self) -> Result<StoreLocation, UrlError> {
        let url = ConnectionUrl::configured_postgres(&self.url, &self.url_file)?;
        Ok(url.map_or_else(|| StoreLocation::Sqlite(self.path.clone()), StoreLocation::Postgres))
    }
}

impl fmt::Display for StoreLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => path.display().fmt(f),
            Self::Postgres(url) => url.fmt(f),
        }
    }
}

impl Validate for StoreConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        let url = self.url.expose();
        if !(url.is_empty() || self.url_file.as_os_str().is_empty()) {
            problems.push("store.url: excludes store.url_file; set one of them".to_owned());
        }
        if let Some(error) = ConnectionUrl::configured_postgres(&self.url, Path::new("")).err() {
            problems.push(format!("store.url: {error}"));
        }
        if self.path.as_os_str().is_empty() {
            problems.push("store.path: must name a file; with store.url it isn't used".to_owned());
        }
        check_count("store.connections", self.connections, problems);
        if self.statement_timeout.is_zero() {
            problems.push("store.statement_timeout: must be above zero".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "postgres://db.internal:5432/evictd";

    fn config(url: &str, url_file: &str) -> StoreConfig {
        StoreConfig {
            path: PathBuf::from("evictd.db"),
            url: Secret::new(url),
            url_file: PathBuf::from(url_file),
            connections: 20,
            statement_timeout: std::time::Duration::from_secs(5).into(),
        }
    }

    #[test]
    fn without_a_url_the_store_is_the_file() {
        let location = config("", "").location().unwrap();
        assert_eq!(location, StoreLocation::Sqlite(PathBuf::from("evictd.db")));
        assert_eq!(location.to_string(), "evictd.db");
    }

    #[test]
    fn a_url_is_never_shown_with_its_password() {
        for url in [
            "postgres://evictd:hunter2@db.internal:5432/evictd",
            "postgresql://evictd:hunter2@db.internal:5432/evictd?sslmode=verify-full",
            "postgres://evictd:hunter2%2F@@db.internal:5432/evictd?sslmode=require",
        ] {
            let location = config(url, "").location().unwrap();
            assert_eq!(location.to_string(), SHOWN, "{url}");
            assert!(!format!("{location:?} {:?}", config(url, "")).contains("hunter2"));
            assert!(matches!(location, StoreLocation::Postgres(read) if read.expose() == url));
        }
    }

    #[test]
    fn a_url_can_come_from_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "postgres://evictd:hunter2@db.internal:5432/evictd\n").unwrap();
        let path = file.path().to_str().unwrap();
        let location = config("", path).location().unwrap();
        assert_eq!(location.to_string(), SHOWN);
        assert!(matches!(location, StoreLocation::Postgres(url) if url.expose().ends_with("/evictd")));
        let missing = config("", "/nonexistent/url").location().unwrap_err();
        assert_eq!(
            missing.to_string(),
            "can't read /nonexistent/url, which should hold the URL of a database"
        );
    }

    #[test]
    fn what_is_no_url_of_postgres_is_refused_without_being_shown() {
        for url in [
            "hunter2",
            "mysql://evictd:hunter2@db",
            "postgres://",
            "postgres://evictd:hun/ter2@db/x",
            "postgres://db/x?sslmode=require&password=hunter2",
        ] {
            let mut problems = Vec::new();
            config(url, "").validate(&mut problems);
            assert!(matches!(&problems[..], [problem] if problem.starts_with("store.url: ")), "{problems:?}");
            assert!(!problems[0].contains("ter2"), "{problems:?}");
        }
    }

    #[test]
    fn what_excludes_each_other_or_is_nothing_is_refused() {
        let nothing = StoreConfig {
            path: PathBuf::new(),
            connections: 0,
            statement_timeout: HumanDuration::default(),
            ..config("postgres://db/evictd", "/run/secrets/store")
        };
        let mut problems = Vec::new();
        nothing.validate(&mut problems);
        let named: Vec<_> = problems.iter().filter_map(|problem| problem.split(": ").next()).collect();
        assert_eq!(named, ["store.url", "store.path", "store.connections", "store.statement_timeout"]);
    }
}
