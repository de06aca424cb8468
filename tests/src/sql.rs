//! [`Session`]: a session on a PostgreSQL server besides the publishers', with transactions that stay open for as long
//! as a test wants.
//!
//! A small client: the simple query protocol, everything as text, no TLS, no password. It shares no code with what it
//! tests.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an answer may take: no test waits for longer.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// Version 3.0 of the protocol.
const PROTOCOL: i32 = 3 << 16;

/// A session. Dropping it ends it, and rolls back its open transaction.
pub struct Session {
    stream: TcpStream,
}

/// A database as its URL names it: `postgres://user@127.0.0.1:5432/database`.
struct Place<'a> {
    user: &'a str,
    server: SocketAddr,
    database: &'a str,
}

impl<'a> Place<'a> {
    fn parse(url: &'a str) -> Result<Self> {
        let parts = || {
            let (user, rest) = url.strip_prefix("postgres://")?.split_once('@')?;
            let (server, database) = rest.split_once('/')?;
            Some(Self { user, server: server.parse().ok()?, database })
        };
        parts().with_context(|| format!("{url} isn't of the form postgres://user@127.0.0.1:5432/database"))
    }
}

/// Returns the server's address from a URL.
pub fn server_of(url: &str) -> Result<SocketAddr> {
    Ok(Place::parse(url)?.server)
}

/// Returns the URL of the same database through another address.
pub fn by_way_of(url: &str, address: SocketAddr) -> Result<String> {
    let Place { user, database, .. } = Place::parse(url)?;
    Ok(format!("postgres://{user}@{address}/{database}"))
}

impl Session {
    /// Connects to the database of a URL.
    pub fn connect(url: &str) -> Result<Self> {
        let Place { user, server, database } = Place::parse(url)?;
        let stream = TcpStream::connect_timeout(&server, CONNECT_TIMEOUT).context("reaching PostgreSQL")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let mut session = Self { stream };
        let mut hello = PROTOCOL.to_be_bytes().to_vec();
        for word in ["user", user, "database", database, "application_name", "test", ""] {
            hello.extend(word.bytes().chain([0]));
        }
        session.send(&hello)?;
        session.receive().context("connecting to PostgreSQL")?;
        Ok(session)
    }

    /// Runs the statements, and returns rows as lines, with columns separated by `|`. Without BEGIN they are one
    /// transaction.
    pub fn query(&mut self, sql: &str) -> Result<String> {
        self.begin(sql)?;
        self.finish().with_context(|| sql.to_owned())
    }

    /// Sends statements without waiting for their result: for those that wait for a lock.
    pub fn begin(&mut self, sql: &str) -> Result<()> {
        self.stream.write_all(b"Q")?;
        self.send(&[sql.as_bytes(), &[0]].concat())
    }

    /// Waits for the result of [`Session::begin`].
    pub fn finish(&mut self) -> Result<String> {
        self.receive()
    }

    /// Sends a message's body, with its length before it.
    fn send(&mut self, body: &[u8]) -> Result<()> {
        let length = i32::try_from(body.len() + 4)?;
        Ok(self.stream.write_all(&[&length.to_be_bytes()[..], body].concat())?)
    }

    /// Reads until the server is ready for the next query.
    fn receive(&mut self) -> Result<String> {
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            let mut head = [0; 5];
            if let Err(error) = self.stream.read_exact(&mut head) {
                // An error that the server sent before it closed the connection explains more.
                return Err(failure.unwrap_or_else(|| anyhow!(error).context("reading from PostgreSQL")));
            }
            let [kind, length @ ..] = head;
            let length = usize::try_from(i32::from_be_bytes(length))?;
            let mut body = vec![0; length.checked_sub(4).context("a message without a length")?];
            self.stream.read_exact(&mut body)?;
            match kind {
                b'D' => rows.push(row(&body)?),
                b'E' => failure = Some(anyhow!("PostgreSQL: {}", error_text(&body))),
                b'R' if body != [0; 4] => bail!("PostgreSQL wants a password"),
                b'Z' => return failure.map_or_else(|| Ok(rows.join("\n")), Err),
                _ => {}
            }
        }
    }
}

/// Returns a row's columns as text. NULL is empty.
fn row(mut body: &[u8]) -> Result<String> {
    let mut take = |length: usize| {
        let (taken, rest) = body.split_at_checked(length).context("a row that ends in its middle")?;
        body = rest;
        Ok::<_, anyhow::Error>(taken)
    };
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(take(2)?.try_into()?) {
        // -1 stands for NULL.
        let length = usize::try_from(i32::from_be_bytes(take(4)?.try_into()?)).unwrap_or(0);
        columns.push(String::from_utf8_lossy(take(length)?).into_owned());
    }
    Ok(columns.join("|"))
}

/// Returns the message of an error, and its code.
fn error_text(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0).filter_map(|field| field.split_first());
    let mut shown: Vec<_> = fields.filter(|(kind, _)| [b'C', b'M'].contains(kind)).collect();
    shown.sort_by_key(|(kind, _)| std::cmp::Reverse(**kind));
    let texts = shown.iter().map(|(_, text)| String::from_utf8_lossy(text));
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use evictd_postgres_server::shared;

    use super::*;

    #[test]
    fn statements_return_rows_or_the_cause_of_failure() -> Result<()> {
        let mut session = Session::connect(&shared()?.url())?;
        assert_eq!(session.query("SELECT 1, 'a', NULL UNION ALL SELECT 2, 'b', 'c'")?, "1|a|\n2|b|c");
        let failure = session.query("SELECT 1/0").unwrap_err();
        assert!(format!("{failure:#}").contains("division by zero, 22012"), "{failure:#}");
        assert_eq!(session.query("SELECT 3")?, "3", "the session works after a failure");
        let nowhere = by_way_of("postgres://evictd@127.0.0.1:1/nowhere", server_of(&shared()?.url())?)?;
        let failure = Session::connect(&nowhere).err().context("there is no such database")?;
        assert!(format!("{failure:#}").contains("3D000"), "{failure:#}");
        Ok(())
    }

    #[test]
    fn an_open_transaction_blocks_until_its_session_ends() -> Result<()> {
        let url = shared()?.create_database("held_up")?;
        let [mut first, mut second] = [Session::connect(&url)?, Session::connect(&url)?];
        first.query("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")?;
        first.query("BEGIN; UPDATE t SET n = n + 10")?;
        second.begin("UPDATE t SET n = n + 100; SELECT n FROM t")?;
        assert_eq!(Session::connect(&url)?.query("SELECT n FROM t")?, "1");
        drop(first);
        assert_eq!(second.finish()?, "101");
        Ok(())
    }
}
