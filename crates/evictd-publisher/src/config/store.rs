//! Which home store: an SQLite file, or a PostgreSQL database.
//!
//! The database's URL holds a password, so it is a secret from the moment it is read: no `Debug` output and no
//! message shows it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use evictd_ops::config::{HumanDuration, Validate, check_count};
use evictd_wire::api::secret::Secret;
use serde::Deserialize;

/// The home store: the section `[store]`. An empty string means "not set".
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// The SQLite file, which is the store unless there is a URL.
    pub path: PathBuf,
    /// The PostgreSQL database.
    pub url: Secret,
    /// A file that holds the URL.
    pub url_file: PathBuf,
    /// Connections to PostgreSQL, at most.
    pub connections: usize,
    /// How long PostgreSQL may take for a statement.
    pub statement_timeout: HumanDuration,
}

/// Where the home store is. Shown, it is without user and password.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreLocation {
    /// In this file.
    Sqlite(PathBuf),
    /// In this database.
    Postgres(PostgresUrl),
}

/// The URL of a PostgreSQL database, with its password.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PostgresUrl(Secret);

/// Why a store's URL can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreUrlError {
    /// The file with the URL can't be read.
    #[error("store.url_file: can't read {}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It isn't one of PostgreSQL.
    #[error("it must be a PostgreSQL URL, such as postgres://user:password@host:5432/database")]
    NotPostgres,
    /// Where the password ends couldn't be told, and a part of it would be shown wherever the URL is.
    #[error("special characters of its user and password must be percent-encoded (`/` as %2F)")]
    NotEncoded,
    /// A password among the parameters would be shown, too.
    #[error(
        "its password must stand before the host (postgres://user:password@host), not among the parameters"
    )]
    PasswordInParameters,
}

impl StoreConfig {
    /// Where the store is. Reads [`Self::url_file`], anew each time.
    pub fn location(&self) -> Result<StoreLocation, StoreUrlError> {
        let url = if is_set(&self.url_file) {
            let read = std::fs::read_to_string(&self.url_file);
            read.map_err(|source| StoreUrlError::File { path: self.url_file.clone(), source })?
        } else if self.url.expose().is_empty() {
            return Ok(StoreLocation::Sqlite(self.path.clone()));
        } else {
            self.url.expose().to_owned()
        };
        PostgresUrl::parse(url.trim()).map(StoreLocation::Postgres)
    }
}

fn is_set(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

impl PostgresUrl {
    /// Checks what matters before anybody connects: that it is one, and that it can be shown without its secret.
    pub fn parse(url: &str) -> Result<Self, StoreUrlError> {
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let rest = rest.filter(|rest| !rest.is_empty()).ok_or(StoreUrlError::NotPostgres)?;
        let authority_ends = rest.find(['/', '?', '#', ' ', ',']).unwrap_or(rest.len());
        if rest[authority_ends..].contains('@') {
            return Err(StoreUrlError::NotEncoded);
        }
        let parameters = rest.split_once('?').map_or("", |(_, parameters)| parameters);
        let names = parameters.split('&').map(|parameter| parameter.split('=').next().unwrap_or_default());
        if names.into_iter().any(|name| name.to_ascii_lowercase().contains("password")) {
            return Err(StoreUrlError::PasswordInParameters);
        }
        Ok(Self(Secret::new(url)))
    }

    /// All of it. Each call is a place where the password could leak.
    pub fn expose(&self) -> &str {
        self.0.expose()
    }
}

impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, rest) = self.expose().split_once("://").unwrap_or_default();
        let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
        write!(f, "postgres://{}", host.split('?').next().unwrap_or_default())
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
        if !url.is_empty() && is_set(&self.url_file) {
            problems.push("store.url: excludes store.url_file; set one of them".to_owned());
        }
        if let Some(error) = (!url.is_empty()).then(|| PostgresUrl::parse(url).err()).flatten() {
            problems.push(format!("store.url: {error}"));
        }
        if !is_set(&self.path) {
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
        assert_eq!(missing.to_string(), "store.url_file: can't read /nonexistent/url");
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
