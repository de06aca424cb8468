//! Connection URLs, of PostgreSQL, NATS and HTTP: parsed by the `url` crate, shown without their secrets.
//!
//! Nothing else takes a URL apart or decides which parts of it may be shown.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use evictd_wire::api::secret::Secret;
use url::{Host, Position, Url};

/// Stands in for a secret.
pub(crate) const REDACTED: &str = "[redacted]";

/// A connection URL, which may hold a password. `Display` and `Debug` show neither user nor parameters.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectionUrl {
    /// As written: drivers parse it themselves.
    text: Secret,
    url: Url,
}

/// Why a URL can't be used. No message repeats a secret.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    #[error("can't read {}, which should hold the URL of a database", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("it isn't a URL: {0}")]
    Malformed(#[from] url::ParseError),
    #[error("it must be a PostgreSQL URL, such as postgres://user:password@host:5432/database")]
    NotPostgres,
    /// Where the password ends is unclear, so a part of it could be shown.
    #[error("special characters of its user and password must be percent-encoded (`/` as %2F)")]
    NotEncoded,
    /// Otherwise the user's name or the environment would select the database.
    #[error("it must name a database after the host, as in postgres://user:password@host:5432/database")]
    NoDatabase,
    /// Programs that log URLs mask only the password before the host.
    #[error(
        "its password must stand before the host (postgres://user:password@host), not among the parameters"
    )]
    PasswordInParameters,
    #[error("`{0}` isn't a NATS URL such as nats://host:4222")]
    NotNats(String),
    #[error("`{0}` must not hold a user or password; set `nats.user` and `nats.password_file`")]
    NatsUser(ConnectionUrl),
    #[error("no PostgreSQL URL is configured")]
    NotSet,
    #[error("the API URL '{0}' is not a URL; write it like http://127.0.0.1:7070")]
    NotHttp(String),
}

impl ConnectionUrl {
    /// Parses the URL of a PostgreSQL database.
    pub fn postgres(text: &str) -> Result<Self, UrlError> {
        let rest = text.strip_prefix("postgres://").or_else(|| text.strip_prefix("postgresql://"));
        let rest = rest.ok_or(UrlError::NotPostgres)?;
        // A password with an unescaped `/`, `?` or `#` ends there, and its rest is taken for something else.
        if rest.split_once(['/', '?', '#']).is_some_and(|(_, behind)| behind.contains('@')) {
            return Err(UrlError::NotEncoded);
        }
        let url = Url::parse(text)?;
        if url.query_pairs().any(|(name, _)| name.to_ascii_lowercase().contains("password")) {
            return Err(UrlError::PasswordInParameters);
        }
        let database = url.path().strip_prefix('/').unwrap_or_default();
        let is_parameter = url.query_pairs().any(|(name, value)| name == "dbname" && !value.is_empty());
        if database.contains('/') || (database.is_empty() && !is_parameter) {
            return Err(UrlError::NoDatabase);
        }
        Ok(Self { text: Secret::new(text), url })
    }

    /// Parses `url`, or the URL in `file`, which is read anew each time. `None` if neither is set.
    pub fn configured_postgres(url: &Secret, file: &Path) -> Result<Option<Self>, UrlError> {
        if !file.as_os_str().is_empty() {
            let read = std::fs::read_to_string(file);
            let url = read.map_err(|source| UrlError::File { path: file.to_owned(), source })?;
            return Self::postgres(url.trim()).map(Some);
        }
        Some(url.expose()).filter(|url| !url.is_empty()).map(Self::postgres).transpose()
    }

    /// Returns a function that reads `url`, or the URL in `file`, at each call. It returns the URL as written.
    pub fn postgres_source(
        url: &Secret,
        file: &Path,
    ) -> impl Fn() -> Result<String, Box<dyn std::error::Error + Send + Sync>> + Send + Sync + use<> {
        let (url, file) = (url.clone(), file.to_owned());
        move || {
            let read = Self::configured_postgres(&url, &file)?.ok_or(UrlError::NotSet)?;
            Ok(read.expose().to_owned())
        }
    }

    /// Parses the URL of a NATS server. As for the client, the scheme is `nats` if there is none.
    pub fn nats(text: &str) -> Result<Self, UrlError> {
        let wrong = || UrlError::NotNats(without_user(text));
        let whole = if text.contains("://") { text.to_owned() } else { format!("nats://{text}") };
        let url = Url::parse(&whole).map_err(|_| wrong())?;
        if !matches!(url.scheme(), "nats" | "tls" | "ws" | "wss") {
            return Err(wrong());
        }
        let parsed = Self { text: Secret::new(text), url };
        if parsed.url.username().is_empty() && parsed.url.password().is_none() {
            Ok(parsed)
        } else {
            Err(UrlError::NatsUser(parsed))
        }
    }

    /// Parses the URL of an HTTP API. Slashes at its end are dropped, since paths are appended to it.
    pub fn http(text: &str) -> Result<Self, UrlError> {
        let text = text.trim().trim_end_matches('/');
        match Url::parse(text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") => Ok(Self { text: Secret::new(text), url }),
            _ => Err(UrlError::NotHttp(without_user(text))),
        }
    }

    /// The URL as written, with its secrets. Each call is a place where they could leak.
    pub fn expose(&self) -> &str {
        self.text.expose()
    }

    /// Whether it names this machine.
    pub fn is_loopback(&self) -> bool {
        match self.url.host() {
            Some(Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        }
    }
}

impl fmt::Display for ConnectionUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = &self.url[Position::BeforeHost..Position::AfterPath];
        // One database has one name, whichever of PostgreSQL's schemes was written.
        let scheme = self.url.scheme().replace("postgresql", "postgres");
        write!(f, "{scheme}://{}", place.trim_end_matches('/'))
    }
}

impl fmt::Debug for ConnectionUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What of a text that isn't a URL may be shown: what stands before the last `@` may be a password.
fn without_user(text: &str) -> String {
    text.rsplit_once('@').map_or_else(|| text.to_owned(), |(_, host)| format!("{REDACTED}@{host}"))
}

/// Replaces the password of every `scheme://user:password@host` in a text.
pub(crate) fn mask_urls(text: &str) -> String {
    let Some((before, after)) = text.split_once("://") else { return text.to_owned() };
    // Where the text is one URL, its password may hold a space or a comma.
    if let Ok(url) = Url::parse(text)
        && url.password().is_some()
        && !after.contains("://")
    {
        return format!("{before}://{}:{REDACTED}@{}", url.username(), &url[Position::BeforeHost..]);
    }
    let (authority, rest) = after.split_at(after.find(['/', '?', '#', ' ', ',']).unwrap_or(after.len()));
    // A password may hold an unescaped @, so the last one counts.
    let masked = authority.rsplit_once('@').and_then(|(user_info, host)| {
        user_info.split_once(':').map(|(user, _)| format!("{user}:{REDACTED}@{host}"))
    });
    format!("{before}://{}{}", masked.as_deref().unwrap_or(authority), mask_urls(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_url_names_one_database() {
        for url in [
            "postgres://evictd:hunter2@db:5432/evictd",
            "postgresql://db/evictd?sslmode=require",
            "postgres:///evictd?host=/run/postgresql",
            "postgres://db?dbname=evictd",
            "postgres://db/?dbname=evictd",
        ] {
            assert_eq!(ConnectionUrl::postgres(url).unwrap().expose(), url);
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
            let error = ConnectionUrl::postgres(url).unwrap_err();
            assert!(matches!(error, UrlError::NoDatabase), "{url}: {error}");
        }
    }

    #[test]
    fn ambiguous_postgres_password_is_refused() {
        for user_info in ["app:1/hunter2", "app:1?hunter2", "app:1#hunter2", "app:hun/ter2"] {
            let error = ConnectionUrl::postgres(&format!("postgres://{user_info}@db/x")).unwrap_err();
            assert!(matches!(error, UrlError::NotEncoded), "{user_info}: {error}");
        }
        for parameter in ["password", "PASSWORD", "pass%77ord", "sslpassword"] {
            let error = ConnectionUrl::postgres(&format!("postgres://db/x?{parameter}=hunter2")).unwrap_err();
            assert!(matches!(error, UrlError::PasswordInParameters), "{parameter}: {error}");
        }
    }

    #[test]
    fn malformed_postgres_url_is_refused_with_the_cause() {
        let error = ConnectionUrl::postgres("postgres://u:hunter2@db:x/evictd").unwrap_err().to_string();
        assert_eq!(error, "it isn't a URL: invalid port number");
        for url in ["hunter2", "mysql://u:hunter2@db/evictd", "postgres:u:hunter2@db"] {
            let error = ConnectionUrl::postgres(url).unwrap_err();
            assert!(matches!(error, UrlError::NotPostgres), "{url}: {error}");
        }
    }

    #[test]
    fn nats_url_needs_no_scheme_and_holds_no_user() {
        for url in ["nats://a:4222", "tls://b", "a:4222", "a", "wss://c/path"] {
            assert_eq!(ConnectionUrl::nats(url).unwrap().expose(), url);
        }
        for url in ["nats://agent:hunter2@a:4222", "agent:hunter2@a", "nats://hunter2@a", "nats://:hunter2@a"]
        {
            let error = ConnectionUrl::nats(url).unwrap_err();
            assert!(matches!(error, UrlError::NatsUser(_)), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
        for url in ["http://agent:hunter2@b", "nats://agent:hunter2@b:port"] {
            let error = ConnectionUrl::nats(url).unwrap_err();
            assert!(matches!(error, UrlError::NotNats(_)), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn http_url_is_for_appending_paths() {
        for (url, kept) in [(" http://h/ ", "http://h"), ("https://h:1/base//", "https://h:1/base")] {
            let url = ConnectionUrl::http(url).unwrap();
            assert_eq!((url.expose(), url.to_string().as_str()), (kept, kept));
        }
        for url in ["127.0.0.1:7070", "http://", "ftp://u:hunter2@host", ""] {
            let error = ConnectionUrl::http(url).unwrap_err().to_string();
            assert!(error.contains("write it like http://") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn loopback_is_recognized_by_host() {
        for url in ["http://127.0.0.1:7070", "http://localhost", "https://LOCALHOST:1/x", "http://[::1]:7070"]
        {
            assert!(ConnectionUrl::http(url).unwrap().is_loopback(), "{url}");
        }
        for url in [
            "http://localhost.example.com",
            "http://10.0.0.1:7070",
            "http://[2::]",
            "http://[::2]",
            "https://127.example",
        ] {
            assert!(!ConnectionUrl::http(url).unwrap().is_loopback(), "{url}");
        }
    }

    #[test]
    fn shown_url_has_neither_user_nor_parameters() {
        let url = "postgres://evictd:hunter2%2F@@db.internal:5432/evictd?sslmode=require";
        let url = ConnectionUrl::postgres(url).unwrap();
        assert_eq!(format!("{url} {url:?}"), ["postgres://db.internal:5432/evictd"; 2].join(" "));
    }

    #[test]
    fn only_passwords_inside_urls_are_masked() {
        assert_eq!(mask_urls("no url at all: a@b"), "no url at all: a@b");
        assert_eq!(mask_urls("nats://host:4222/x@y"), "nats://host:4222/x@y");
        assert_eq!(mask_urls("nats://user@host"), "nats://user@host");
        assert_eq!(mask_urls("a://u:p@h, b://v:q@i"), "a://u:[redacted]@h, b://v:[redacted]@i");
        assert_eq!(mask_urls("a://u:p@h,b://v:q@i"), "a://u:[redacted]@h,b://v:[redacted]@i");
        assert_eq!(mask_urls("a://u:p@ss@h/d"), "a://u:[redacted]@h/d");
        assert_eq!(mask_urls("a://u:p, w@h/d"), "a://u:[redacted]@h/d");
    }
}
