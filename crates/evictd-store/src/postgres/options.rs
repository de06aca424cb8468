//! Where the server is, and what its connections are like.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Executor, Row};
use tokio::time::timeout;

use super::connections::timed_out;
use super::schema;
use crate::error::StoreError;

/// The oldest server that has what the schema and the statements use.
const VERSION_MIN: u32 = 150_000;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a server waits for a publisher that went away or froze in the middle of a transaction: the others
/// wait for its locks meanwhile, and their agents for them.
const IDLE_IN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections of a store that isn't told how many: 8 for changes, 4 each for lookups and the log.
const CONNECTIONS: u32 = 20;

/// What a statement may take that isn't told how long.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// What to do about a database that can't hold every name.
const ENCODING: &str = "not every name can be stored there; create a database with ENCODING 'UTF8' TEMPLATE template0, \
                        and name that one";

/// What to do about a pooler that doesn't keep sessions together.
const POOLER: &str = "a pooler in between lends one connection of the server to several clients in turn; let it keep \
                      sessions together (pool_mode = session), or connect to the server itself";

/// What a URL may say behind its `?`. Anything else is refused, or a misspelt password would be ignored, and
/// told in a log.
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

/// How to reach a home store on PostgreSQL. Shows no password.
#[derive(Clone)]
pub struct PostgresOptions {
    connect: PgConnectOptions,
    /// The schema of the store, once it is known: where every connection looks for tables, and nowhere else.
    schema: Option<String>,
    /// How many connections at most, but for the one that listens: at least 9.
    pub connections: u32,
    /// How long a statement may take, waiting for locks included. A COMMIT that takes longer is unknown (R4).
    pub statement_timeout: Duration,
}

impl fmt::Debug for PostgresOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { connect: _, schema, connections, statement_timeout } = self;
        f.debug_struct("PostgresOptions")
            .field("place", &self.place())
            .field("schema", schema)
            .field("connections", connections)
            .field("statement_timeout", statement_timeout)
            .finish()
    }
}

impl PostgresOptions {
    /// Reads a URL, `postgres://user:password@host:5432/database?sslmode=verify-full`. What it doesn't say comes
    /// from the environment variables and the password file that psql uses, too.
    pub fn new(url: &str) -> Result<Self, StoreError> {
        let refused = |advice, source| StoreError::Open {
            place: "that PostgreSQL URL names".to_owned(),
            advice,
            source,
        };
        let wrong = |what: &str| refused(FORM, sqlx::Error::InvalidArgument(what.to_owned()));
        let scheme = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
        let rest = scheme.ok_or_else(|| wrong("the URL doesn't begin with postgres://"))?;
        let (path, parameters) = rest.split_once('?').unwrap_or((rest, ""));
        // What follows a / in a password would be taken for the database, and shown; what follows a #, for nothing.
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
        Ok(Self { connect, schema: None, connections: CONNECTIONS, statement_timeout: STATEMENT_TIMEOUT })
    }

    /// Where the database is, for people; without secrets.
    pub fn place(&self) -> String {
        let connect = &self.connect;
        let host = connect.get_socket().map_or(connect.get_host().into(), |socket| socket.to_string_lossy());
        let (user, port) = (connect.get_username(), connect.get_port());
        let database = connect.get_database().unwrap_or(user);
        format!("postgres://{user}@{host}:{port}/{database}")
    }

    /// The same for connections that look for tables in `schema` alone.
    pub(super) fn pinned_to(self, schema: String) -> Self {
        Self { schema: Some(schema), ..self }
    }

    /// The schema that connections look for tables in.
    pub(super) fn schema(&self) -> Option<&str> {
        self.schema.as_deref()
    }

    /// As the driver takes it.
    pub(super) fn driver(&self) -> &PgConnectOptions {
        &self.connect
    }

    /// The first connection, whose failure is explained.
    pub(super) async fn open(&self) -> Result<PgConnection, StoreError> {
        let refused = |advice, source| StoreError::Open { place: self.place(), advice, source };
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

    /// Whether another connection is served by the same process of the server, while the first one is still there.
    /// Only a pooler does that which lends the server's connections for one transaction at a time; while it is busy
    /// it may lend another one, and isn't recognised.
    async fn shares(&self, process: i32) -> bool {
        // Where there is no second connection, the store's own will say why.
        let Ok(mut another) = self.connect().await else { return false };
        let shares = introduction(&mut another).await.is_ok_and(|(_, other)| other == process);
        drop(timeout(CONNECT_TIMEOUT, another.close()).await);
        shares
    }

    /// A connection in bounded time, made ready: each of its statements has a limit, a row that it may not see is
    /// an error and not absent (R5), and a warning is told. No table is read whole where an index can serve,
    /// whatever the planner believes of a log that changes all the time; and no statement is long enough to be
    /// compiled. What durability rests on is set by each transaction itself.
    pub(super) async fn connect(&self) -> sqlx::Result<PgConnection> {
        let connect = async {
            let mut connection = self.connect.connect().await?;
            let statement = self.statement_timeout.as_millis();
            let idle = IDLE_IN_TRANSACTION_TIMEOUT.as_millis();
            let settings = format!(
                "SET statement_timeout = {statement}; SET lock_timeout = {statement};
                 SET idle_in_transaction_session_timeout = {idle};
                 SET row_security = off;
                 SET client_min_messages = warning;
                 SET enable_seqscan = off; SET jit = off;
                 {}",
                self.schema().map_or_else(String::new, schema::pin)
            );
            connection.execute(sqlx::AssertSqlSafe(settings)).await?;
            Ok(connection)
        };
        timeout(CONNECT_TIMEOUT, connect).await.unwrap_or_else(|_| Err(timed_out()))
    }
}

/// The encoding of a connection's database, and which process of the server works for it. Nothing is prepared for
/// that: a pooler may not know what was.
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
    const TLS: &str = "TLS failed; see the cause, and sslmode and sslrootcert in the URL";
    match error {
        sqlx::Error::Io(error) => match error.kind() {
            ErrorKind::ConnectionRefused => {
                "no server listens there; start it, or correct host and port of the URL"
            }
            ErrorKind::TimedOut => "the server didn't answer; see whether it and the way to it work",
            ErrorKind::NotFound => {
                "there is no such socket or certificate file; start the server, or correct the URL"
            }
            // What the driver's TLS says is an error of the stream.
            ErrorKind::InvalidData => TLS,
            _ => "the server can't be reached; see the cause",
        },
        sqlx::Error::Tls(_) => TLS,
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

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "postgres://app:hunter2@db.example:6543/home?sslmode=require";

    #[test]
    fn a_place_and_what_is_printed_for_debugging_show_no_password() {
        let options = PostgresOptions::new(URL).unwrap();
        assert_eq!(options.place(), "postgres://app@db.example:6543/home");
        assert!(!format!("{options:?}").contains("hunter2"));
    }

    #[test]
    fn a_parameter_that_nobody_knows_is_refused_by_its_name_alone() {
        let error = PostgresOptions::new("postgres://db/home?passwrd=hunter2").unwrap_err();
        let told = format!("{error} {error:?}");
        assert!(told.contains("passwrd") && !told.contains("hunter2"), "{told}");
        for known in
            ["options[search_path]=evictd", "options=-c%20search_path%3Devictd", "password=x&sslmode=prefer"]
        {
            PostgresOptions::new(&format!("postgres://db/home?{known}")).unwrap();
        }
    }

    #[test]
    fn what_is_no_url_is_refused_without_repeating_it() {
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
