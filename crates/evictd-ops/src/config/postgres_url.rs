//! Where a PostgreSQL database is. The URL holds a password, so it is a secret from the moment it is read: no
//! `Debug` output and no message shows it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use evictd_wire::api::secret::Secret;

/// The URL of a PostgreSQL database, with its password.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PostgresUrl(Secret);

/// Why a URL can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PostgresUrlError {
    /// The file with the URL can't be read.
    #[error("can't read {}, which should hold the URL of a database", path.display())]
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
    /// Which database is meant would be left to the user's name, or to the environment.
    #[error("it must name a database after the host, as in postgres://user:password@host:5432/database")]
    NoDatabase,
    /// A password among the parameters would be shown, too.
    #[error(
        "its password must stand before the host (postgres://user:password@host), not among the parameters"
    )]
    PasswordInParameters,
}

impl PostgresUrl {
    /// The URL itself, or the one in `file`, which is read anew each time. An empty one isn't set.
    pub fn configured(url: &Secret, file: &Path) -> Result<Option<Self>, PostgresUrlError> {
        if !file.as_os_str().is_empty() {
            let read = std::fs::read_to_string(file);
            let url = read.map_err(|source| PostgresUrlError::File { path: file.to_owned(), source })?;
            return Self::parse(url.trim()).map(Some);
        }
        Some(url.expose()).filter(|url| !url.is_empty()).map(Self::parse).transpose()
    }

    /// Checks what matters before anybody connects: that it is one, and that it can be shown without its secret.
    pub fn parse(url: &str) -> Result<Self, PostgresUrlError> {
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let rest = rest.filter(|rest| !rest.is_empty()).ok_or(PostgresUrlError::NotPostgres)?;
        let authority_ends = rest.find(['/', '?', '#', ' ', ',']).unwrap_or(rest.len());
        if rest[authority_ends..].contains('@') {
            return Err(PostgresUrlError::NotEncoded);
        }
        let parameters = rest.split_once('?').map_or("", |(_, parameters)| parameters);
        let parameters = || parameters.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        if parameters().any(|(name, _)| name.to_ascii_lowercase().contains("password")) {
            return Err(PostgresUrlError::PasswordInParameters);
        }
        let path = rest.split('?').next().and_then(|rest| rest.split_once('/')).map_or("", |(_, path)| path);
        let is_named =
            !path.is_empty() || parameters().any(|(name, value)| name == "dbname" && !value.is_empty());
        if !is_named || path.contains('/') {
            return Err(PostgresUrlError::NoDatabase);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_one_database() {
        for url in [
            "postgres://evictd:hunter2@db:5432/evictd",
            "postgresql://db/evictd?sslmode=require",
            "postgres:///evictd?host=/run/postgresql",
            "postgres://db?dbname=evictd",
            "postgres://db/?dbname=evictd",
        ] {
            PostgresUrl::parse(url).unwrap();
        }
        for url in [
            "postgres://evictd:hunter2@db:5432",
            "postgres://evictd:hunter2@db:5432/",
            "postgres://db?sslmode=require",
            "postgres://db/?dbname=",
            "postgres://db/one/two",
            "postgres://db//evictd",
            "postgres://db/evictd/",
        ] {
            let error = PostgresUrl::parse(url).unwrap_err();
            assert!(matches!(error, PostgresUrlError::NoDatabase), "{url}: {error}");
        }
    }
}
