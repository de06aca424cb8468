//! Where the server is, and what its connections are like.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Executor, Row};
use tokio::time::timeout;

use super::errors::{refuses_login, timed_out};
use crate::error::StoreError;

/// The oldest server that has what the schema and the statements use.
const VERSION_MIN: u32 = 150_000;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the server waits for a publisher that vanished or froze in a transaction. Other publishers wait for its locks
/// meanwhile, and their agents wait too.
const IDLE_IN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(5);

/// The default number of connections: 8 for changes, 4 for the log, 3 for lookups, 2 each for replays and records, 1 for
/// authentication.
const CONNECTIONS: u32 = 20;

/// The default.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// What to do about a database that can't store every name.
const ENCODING: &str = "not every name can be stored there; create a database with ENCODING 'UTF8' TEMPLATE template0, \
                        and name that one";

/// What to do about a pooler that doesn't keep sessions together.
const POOLER: &str = "a pooler in between lends one connection of the server to several clients in turn; let it keep \
                      sessions together (pool_mode = session), or connect to the server itself";

/// The parameters that a URL may have. Others are refused: the driver would ignore a misspelled `password`, and log it.
const PARAMETERS: [&str; 18] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
];

/// What to do about a URL that can't be read.
const FORM: &str = "write it as postgres://user:password@host:5432/database, and what is special in a password in \
                    percent: %40 for @, %2F for /, %3F for ?, %23 for #";

/// Returns the URL of the database, each time as it is now: its password may be rotated.
pub type UrlSource = Arc<dyn Fn() -> Result<String, Box<dyn Error + Send + Sync>> + Send + Sync>;

/// How to connect to a home store on PostgreSQL. `Debug` shows no password.
#[derive(Clone)]
pub struct PostgresOptions {
    connect: PgConnectOptions,
    /// Read for each connection, in place of `connect`. It must name the same database.
    source: Option<UrlSource>,
    /// The schema of the store once it is known. Connections look for tables in it alone.
    schema: Option<String>,
    /// At most so many connections, and one more that listens. At least 10.
    pub connections: u32,
    /// For each statement, waiting for locks included. The outcome of a COMMIT that takes longer is unknown (R4).
    pub statement_timeout: Duration,
}

impl fmt::Debug for PostgresOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connect: _, source: _, schema, connections, statement_timeout } = self;
        f.debug_struct("PostgresOptions")
            .field("place", &self.place())
            .field("schema", schema)
            .field("connections", connections)
            .field("statement_timeout", statement_timeout)
            .finish()
    }
}

impl PostgresOptions {
    /// Parses a URL, `postgres://user:password@host:5432/database?sslmode=verify-full`. Missing parts come from the
    /// environment variables and the password file that psql uses.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        let refused = |advice, source| StoreError::Open {
            place: "that PostgreSQL URL names".to_owned(),
            advice,
            is_permanent: true,
            source,
        };
        let wrong = |what: &str| refused(FORM, sqlx::Error::InvalidArgument(what.to_owned()));
        let scheme = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let rest = scheme.ok_or_else(|| wrong("the URL doesn't begin with postgres://"))?;
        let (path, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        // The driver would take what follows a / in a password for the database, and show it. It would drop what follows
        // a #.
        if path.split_once('/').is_some_and(|(_, database)| database.contains('@')) || rest.contains('#') {
            return Err(wrong("an @ follows the first /, or there is a #"));
        }
        let names = parameters.split('&').filter_map(|parameter| parameter.split('=').next());
        if let Some(unknown) = names.filter(|name| !name.is_empty()).find(|name| !is_known(name)) {
            let is_a_name = unknown.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
            let unknown = if is_a_name { unknown } else { "(not shown)" };
            return Err(wrong(&format!("there is no parameter {unknown}")));
        }
        let connect = PgConnectOptions::from_str(url).map_err(|source| refused(FORM, source))?;
        let connect = match connect.get_application_name() {
            Some(_) => connect,
            None => connect.application_name("evictd"),
        };
        Ok(Self {
            connect,
            source: None,
            schema: None,
            connections: CONNECTIONS,
            statement_timeout: STATEMENT_TIMEOUT,
        })
    }

    /// As [`Self::new`], with a URL that is read again for each connection, and at once when the server refuses the
    /// login. User, password and parameters may change. A URL that names another server or database is refused: some
    /// connections would go on to use the first one.
    pub fn from_source(source: UrlSource) -> Result<Self, StoreError> {
        let url = source().map_err(|source| StoreError::Open {
            place: "the configured PostgreSQL URL".to_owned(),
            advice: "see the cause",
            is_permanent: true,
            source: sqlx::Error::Configuration(source),
        })?;
        Ok(Self { source: Some(source), ..Self::new(&url)? })
    }

    /// Where the database is, without secrets.
    pub fn place(&self) -> String {
        let connect = &self.connect;
        let host = connect.get_socket().map_or(connect.get_host().into(), |socket| socket.to_string_lossy());
        let (user, port) = (connect.get_username(), connect.get_port());
        let database = connect.get_database().unwrap_or(user);
        format!("postgres://{user}@{host}:{port}/{database}")
    }

    /// The same options for connections that look for tables in `schema` alone.
    pub(super) fn pinned_to(self, schema: String) -> Self {
        Self { schema: Some(schema), ..self }
    }

    pub(super) fn schema(&self) -> Option<&str> {
        self.schema.as_deref()
    }

    /// The statement that has a connection look for tables in the store's schema alone, whatever its user's search path
    /// is. Temporary tables come last, so that none can replace the store's.
    pub(super) fn pin(&self) -> String {
        self.set_search_path("SET")
    }

    /// The same for one transaction.
    pub(super) fn pin_transaction(&self) -> String {
        self.set_search_path("SET LOCAL")
    }

    /// PostgreSQL searches `pg_catalog` first, because it isn't named.
    fn set_search_path(&self, set: &str) -> String {
        self.schema().map_or_else(String::new, |schema| {
            format!("{set} search_path = \"{}\", pg_temp", schema.replace('"', "\"\""))
        })
    }

    /// Returns the error of a store whose schema version can't be read.
    pub(super) fn unreadable(&self, source: sqlx::Error) -> StoreError {
        let advice = "its table _sqlx_migrations can't be read; GRANT SELECT on it, and USAGE on its schema";
        StoreError::Open { place: self.place(), advice, is_permanent: false, source }
    }

    /// The driver's form of the options, as of now.
    pub(super) async fn driver(&self) -> sqlx::Result<PgConnectOptions> {
        Ok(self.read().await?.0)
    }

    /// Returns the driver's options, and the URL they come from if there is a source.
    async fn read(&self) -> sqlx::Result<(PgConnectOptions, Option<String>)> {
        let Some(source) = self.source.clone() else { return Ok((self.connect.clone(), None)) };
        let read = tokio::task::spawn_blocking(move || source()).await;
        let url = read.map_err(sqlx::Error::config)?.map_err(sqlx::Error::Configuration)?;
        let now = Self::new(&url).map_err(sqlx::Error::config)?;
        if now.database() != self.database() {
            return Err(sqlx::Error::InvalidArgument(format!(
                "the URL names {} now, and {} at the start; restart to use another database",
                now.place(),
                self.place()
            )));
        }
        Ok((now.connect, Some(url)))
    }

    /// What must stay the same for as long as a store is open.
    fn database(&self) -> (Option<&Path>, &str, u16, &str) {
        let connect = &self.connect;
        let database = connect.get_database().unwrap_or_else(|| connect.get_username());
        (connect.get_socket().map(PathBuf::as_path), connect.get_host(), connect.get_port(), database)
    }

    /// Logs in. If the server refuses that, and the URL has changed since it was read, tries the newer one.
    async fn log_in(&self) -> sqlx::Result<PgConnection> {
        let (options, url) = self.read().await?;
        match options.connect().await {
            Err(refusal) if refuses_login(&refusal) => match self.read().await? {
                (newer, newer_url) if newer_url != url => newer.connect().await,
                _ => Err(refusal),
            },
            outcome => outcome,
        }
    }

    /// Opens the first connection. The error says what to do.
    pub(super) async fn open(&self) -> Result<PgConnection, StoreError> {
        let refused = |advice, source| {
            // Other errors come from a server that may change, or from the way to it.
            let is_permanent = matches!(source, sqlx::Error::InvalidArgument(_));
            StoreError::Open { place: self.place(), advice, is_permanent, source }
        };
        let mut connection = self.connect().await.map_err(|source| refused(advice(&source), source))?;
        let (encoding, process) =
            introduction(&mut connection).await.map_err(|source| refused(advice(&source), source))?;
        let wrong = match connection.server_version_num() {
            Some(version) if version < VERSION_MIN => {
                Some(("PostgreSQL 15 or newer is needed", format!("the server's version is {version}")))
            }
            _ if encoding != "UTF8" => Some((ENCODING, format!("its encoding is {encoding}"))),
            _ if self.shares(process).await => {
                Some((POOLER, format!("two connections were one and the same process, {process}")))
            }
            _ => None,
        };
        match wrong {
            Some((advice, cause)) => Err(refused(advice, sqlx::Error::InvalidArgument(cause))),
            None => Ok(connection),
        }
    }

    /// Whether another connection is served by the same process of the server while the first one is open. Only a pooler
    /// in transaction mode does that. A busy one may use another process, and isn't recognized.
    async fn shares(&self, process: i32) -> bool {
        // If this connection fails, the store's own will report why.
        let Ok(mut another) = self.connect().await else { return false };
        let shares = introduction(&mut another).await.is_ok_and(|(_, other)| other == process);
        drop(timeout(CONNECT_TIMEOUT, another.close()).await);
        shares
    }

    /// Opens a connection in bounded time, and configures it:
    ///
    /// * statements have a time limit;
    /// * a row that the user may not see is an error and not absent (R5);
    /// * warnings are reported;
    /// * indexes are used, although the planner's statistics of a log that always changes are wrong;
    /// * statements aren't compiled, because all of them are short.
    ///
    /// Each transaction sets what its durability needs.
    pub(super) async fn connect(&self) -> sqlx::Result<PgConnection> {
        let connect = async {
            let mut connection = self.log_in().await?;
            let statement = self.statement_timeout.as_millis();
            let idle = IDLE_IN_TRANSACTION_TIMEOUT.as_millis();
            let settings = format!(
                "SET statement_timeout = {statement}; SET lock_timeout = {statement};
                 SET idle_in_transaction_session_timeout = {idle};
                 SET row_security = off;
                 SET client_min_messages = warning;
                 SET enable_seqscan = off; SET jit = off;
                 {}",
                self.pin()
            );
            connection.execute(sqlx::AssertSqlSafe(settings)).await?;
            Ok(connection)
        };
        timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| Err(timed_out()))
    }
}

/// Returns the encoding of the database, and the process of the server that serves the connection. Prepares no statement,
/// because a pooler may not support that.
async fn introduction(connection: &mut PgConnection) -> sqlx::Result<(String, i32)> {
    let ask = async {
        let ask =
            sqlx::raw_sql("SELECT current_setting('server_encoding') AS encoding, pg_backend_pid() AS pid");
        let row = ask.fetch_one(connection).await?;
        Ok((row.try_get("encoding")?, row.try_get("pid")?))
    };
    timeout(CONNECT_TIMEOUT, ask).await.unwrap_or_else(|_| Err(timed_out()))
}

fn is_known(parameter: &str) -> bool {
    PARAMETERS.contains(&parameter)
        || parameter.starts_with("options[")
        || parameter.starts_with("options%5B")
}

/// What to do about a server that can't be used.
fn advice(error: &sqlx::Error) -> &'static str {
    use std::io::ErrorKind;
    const ELSE: &str = "see the cause";
    match error {
        sqlx::Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused => {
                "no server listens there; start it, or correct host and port of the URL"
            }
            ErrorKind::TimedOut => "the server didn't answer; see whether it and the way to it work",
            ErrorKind::NotFound => {
                "there is no such socket or certificate file; start the server, or correct the URL"
            }
            // The driver reports TLS errors as errors of the stream.
            ErrorKind::InvalidData => tls_advice(&error.to_string()),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                "the server closed the connection; does a PostgreSQL server listen on this port?"
            }
            _ => "the server can't be reached; see the cause",
        },
        sqlx::Error::Tls(error) => tls_advice(&error.to_string()),
        sqlx::Error::Protocol(_) => {
            "what listens there doesn't speak as PostgreSQL; check host and port of the URL"
        }
        sqlx::Error::Database(error) if error.message().contains("client certificate") => {
            "the server requires a client certificate; set sslcert and sslkey in the URL"
        }
        sqlx::Error::Database(error) if error.message().contains("no encryption") => {
            "the server admits this user only with TLS, or not at all; set sslmode=verify-full in the URL, or correct its \
             pg_hba.conf"
        }
        sqlx::Error::Database(error) => match error.code().as_deref() {
            Some("28P01") => "the password is wrong, or there is no such user",
            Some("28000") => {
                "the server's pg_hba.conf admits no such user, address or connection without TLS (sslmode in the URL)"
            }
            Some("3D000") => "there is no such database; create it (CREATE DATABASE), or correct the URL",
            Some("42501") => "the user may not connect to this database; GRANT CONNECT",
            Some("53300") => {
                "the server has no connection left; raise its max_connections, or lower the store's connections"
            }
            Some("57P03") => "the server is starting or stopping; try again",
            _ => ELSE,
        },
        _ => ELSE,
    }
}

/// What to do about a TLS connection that failed, by the words of the TLS library.
fn tls_advice(error: &str) -> &'static str {
    let error = error.to_lowercase();
    let has = |parts: &[&str]| parts.iter().any(|part| error.contains(part));
    if has(&["unknownissuer", "badsignature"]) {
        "TLS failed: the server's certificate isn't signed by the authority in sslrootcert of the URL"
    } else if has(&["not valid for name", "notvalidforname"]) {
        "TLS failed: the server's certificate isn't for the host in the URL"
    } else if has(&["expired"]) {
        "TLS failed: a certificate has expired; the cause says which"
    } else if has(&["not valid yet", "notvalidyet"]) {
        "TLS failed: the server's certificate isn't valid yet; is this machine's clock right?"
    } else if has(&["certificaterequired", "certificate required"]) {
        "TLS failed: the server requires a client certificate; set sslcert and sslkey in the URL"
    } else if has(&["received fatal alert"]) {
        "TLS failed: the server rejected the connection; check sslcert and sslkey in the URL"
    } else if has(&["does not support tls"]) {
        "TLS failed: the server speaks no TLS, which sslmode in the URL requires"
    } else {
        "TLS failed; see the cause, and sslmode and sslrootcert in the URL"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "postgres://app:hunter2@db.example:6543/home?sslmode=require";

    #[test]
    fn place_and_debug_output_show_no_password() {
        let options = PostgresOptions::new(URL).unwrap();
        assert_eq!(options.place(), "postgres://app@db.example:6543/home");
        assert!(!format!("{options:?}").contains("hunter2"));
    }

    #[test]
    fn unknown_parameter_is_refused_by_its_name_alone() {
        let error = PostgresOptions::new("postgres://db/home?passwrd=hunter2").unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains("passwrd") && !text.contains("hunter2"), "{text}");
        for known in
            ["options[search_path]=evictd", "options=-c%20search_path%3Devictd", "password=x&sslmode=prefer"]
        {
            PostgresOptions::new(&format!("postgres://db/home?{known}")).unwrap();
        }
    }

    #[test]
    fn invalid_url_is_refused_without_repeating_it() {
        for wrong in [
            "app:hunter2@db",
            "hunter2",
            "postgres://app:1/hunter2@db/home",
            "postgres://app:1?hunter2@db/home",
            "postgres://app:1#hunter2@db/home",
            "postgres://app:hunter2@db:port/home",
        ] {
            let error = PostgresOptions::new(wrong).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        }
    }
}
