//! A connection to NATS with the settings the bound needs.
//!
//! The client's defaults suit a program that may lose minutes: it would notice a silent network after
//! three minutes, and ten thousand agents would come back in the same millisecond. See [`connect`].

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::{Client, ConnectError, ConnectOptions, Event, PublishError, ServerAddr};
use bytes::Bytes;
use metrics::{Counter, Gauge};
use parking_lot::Mutex;
use serde::Deserialize;

use crate::config::Validate;
use crate::readiness::{Condition, Readiness};

/// A silent connection is given up after three pings without an answer: 6 s, well inside the bound.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// Bounds of the pause before an attempt to connect. It doubles from one to the other, which is short enough
/// to be back within a second after a network is.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_millis(500);

/// How long an attempt may take. One that began in a network that swallows everything is worth no waiting
/// for: its next sign of life comes later and later, and another attempt's comes at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long leaving a server that is about to shut down may take to be queued.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// How to reach NATS: the section `[nats]` of a configuration. An empty string means "not set".
#[derive(Deserialize, Clone, Default)]
#[serde(deny_unknown_fields)]
pub struct BusConfig {
    /// Servers, as `nats://host:port` or `tls://host:port`, the nearest first: they are tried in
    /// this order.
    pub urls: Vec<String>,
    /// User name.
    pub user: String,
    /// The user's password.
    pub password: String,
    /// A file with the user's password. It is read at each connect, so that it can be rotated.
    pub password_file: String,
    /// A file with a user's JWT and nkey seed. It is read once.
    pub credentials_file: String,
    /// Certificates of the authorities that sign the servers' certificates. Requires TLS.
    pub ca_file: String,
    /// The client's certificate, and with it [`Self::key_file`]. Requires TLS.
    pub cert_file: String,
    /// The private key of the client's certificate.
    pub key_file: String,
}

impl fmt::Debug for BusConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusConfig")
            .field("urls", &self.urls.iter().map(|url| without_user_info(url)).collect::<Vec<_>>())
            .field("user", &self.user)
            .field("password", &if self.password.is_empty() { "" } else { "[redacted]" })
            .field("password_file", &self.password_file)
            .field("credentials_file", &self.credentials_file)
            .field("ca_file", &self.ca_file)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .finish()
    }
}

/// A URL that is safe to show. What stands before the last `@` may be a password.
fn without_user_info(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, host)) => format!("[redacted]@{host}"),
        None => url.to_owned(),
    }
}

impl Validate for BusConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        let mut problem = |wrong: bool, text: &str| {
            if wrong {
                problems.push(text.to_owned());
            }
        };
        let set = |text: &String| !text.is_empty();
        problem(self.urls.is_empty(), "`nats.urls` must name at least one NATS server");
        for url in &self.urls {
            let shown = without_user_info(url);
            match url.parse::<ServerAddr>() {
                Ok(address) => problem(
                    address.has_user_pass(),
                    &format!(
                        "`nats.urls`: `{shown}` must not hold a user or password; \
                         set `nats.user` and `nats.password_file`"
                    ),
                ),
                Err(error) => {
                    problem(
                        true,
                        &format!("`nats.urls`: `{shown}` isn't a NATS URL such as nats://host:4222: {error}"),
                    );
                }
            }
        }
        let (password, file) = (set(&self.password), set(&self.password_file));
        problem(password && file, "`nats.password` and `nats.password_file` exclude each other; set one");
        problem((password || file) && !set(&self.user), "a password needs its user: set `nats.user`");
        problem(
            set(&self.user) && !password && !file,
            "`nats.user` needs a password: set `nats.password_file` or `nats.password`",
        );
        problem(
            set(&self.credentials_file) && (set(&self.user) || password || file),
            "`nats.credentials_file` and `nats.user` exclude each other; set one",
        );
        problem(
            set(&self.cert_file) != set(&self.key_file),
            "`nats.cert_file` and `nats.key_file` belong together; set both or none",
        );
    }
}

/// What a daemon decides about its connection.
#[derive(Clone, Debug)]
pub struct BusOptions {
    /// The connection's name, as the servers' monitoring shows it.
    pub name: String,
    /// Where answers come in; an agent's permissions are tied to it (R13). `_INBOX` if `None`.
    pub inbox_prefix: Option<String>,
    /// Messages a subscription holds before it drops some, which [`BusEvent::SlowConsumer`] tells.
    pub subscription_capacity: usize,
}

/// What happened on a connection. Events may get lost when many come at once: count and log them,
/// but let nothing depend on having seen each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BusEvent {
    /// Connected, for the first time or again. Subscriptions are in place again by themselves.
    Connected,
    /// The connection was lost; the client is trying to get it back.
    Disconnected,
    /// A subscription was full and dropped a message.
    SlowConsumer,
    /// The server is about to shut down; the client moves to another one if it knows one.
    LameDuck,
    /// The server complained; a missing permission shows here and nowhere else.
    ServerError(String),
    /// An attempt to connect failed, or the client has another complaint.
    ClientError(String),
    /// The connection is being drained: what is queued goes out, then it ends.
    Draining,
    /// The connection has ended and will not come back.
    Closed,
}

/// Handles of what a daemon counts of its connection.
#[derive(Clone, Debug)]
pub struct BusMetrics {
    /// 1 while connected.
    pub connected: Gauge,
    /// Connections made.
    pub connects: Counter,
    /// Messages that a full subscription dropped.
    pub slow_consumer: Counter,
    /// Complaints of the server.
    pub server_errors: Counter,
}

/// What a daemon knows of its connection, as its events tell.
///
/// The client's own state lags behind its events, so that what is sent at once on a connection that has
/// just come about would be held back.
#[derive(Clone, Debug)]
pub struct Link {
    up: Arc<AtomicBool>,
    /// Whether this outage was logged: attempts to reconnect fail many times a second.
    complained: Arc<AtomicBool>,
    servers: Arc<str>,
    metrics: BusMetrics,
    condition: Condition,
    /// Which of several, in the log.
    name: &'static str,
}

impl Link {
    /// Not connected yet to any of `config`'s servers; the condition `nats` is met while it is. It is one of the
    /// start: who has settled does what it can without NATS, and `/readyz` remarks on it.
    pub fn new(config: &BusConfig, metrics: BusMetrics, readiness: &Readiness) -> Self {
        Self::named("nats", config, metrics, readiness)
    }

    /// A further connection, whose condition has a name of its own.
    pub fn named(name: &'static str, config: &BusConfig, metrics: BusMetrics, readiness: &Readiness) -> Self {
        let servers: Arc<str> = config.urls.join(", ").into();
        let condition = readiness.condition_at_start(name, format!("a connection to {servers}"));
        Self { up: Arc::default(), complained: Arc::default(), servers, metrics, condition, name }
    }

    /// Whether what is sent now has a connection to leave by.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Counts, logs, and keeps readiness; tells whether the connection has just come about. Its condition is
    /// also unmet from when NATS forbids something until the next connection.
    pub fn note(&self, event: BusEvent) -> bool {
        let connection = self.name;
        match event {
            BusEvent::Connected => {
                tracing::info!(connection, "connected to NATS");
                self.up.store(true, Ordering::Release);
                self.complained.store(false, Ordering::Release);
                self.metrics.connected.set(1.0);
                self.metrics.connects.increment(1);
                self.condition.met();
                return true;
            }
            BusEvent::Disconnected => {
                tracing::warn!(connection, "the connection to NATS is lost; reconnecting");
                self.up.store(false, Ordering::Release);
                self.metrics.connected.set(0.0);
                self.condition.unmet(format!("a connection to {}, which was lost", self.servers));
            }
            BusEvent::SlowConsumer => self.metrics.slow_consumer.increment(1),
            BusEvent::ServerError(error) => {
                if error.to_lowercase().contains("permission") {
                    tracing::warn!(connection, %error, "NATS forbids something; are the permissions of this user those of deploy/nats?");
                    // Whoever starts and may not do what it is for must not look healthy, even if the rest works.
                    // The next connection asks for everything anew.
                    self.condition.unmet(format!("permissions as those of deploy/nats: {error}"));
                } else {
                    tracing::warn!(connection, %error, "NATS reports an error");
                }
                self.metrics.server_errors.increment(1);
            }
            BusEvent::ClientError(error) => {
                tracing::debug!(connection, %error, "NATS client");
                if !self.is_up() {
                    self.condition.unmet(format!("a connection to {}: {error}", self.servers));
                    if !self.complained.swap(true, Ordering::AcqRel) {
                        tracing::warn!(connection, servers = %self.servers, %error, "can't connect to NATS; trying on");
                    }
                }
            }
            BusEvent::LameDuck | BusEvent::Draining | BusEvent::Closed => {}
        }
        false
    }
}

/// Why the bus can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// A configured file can't be read.
    #[error("can't read `{key}` {}", .path.display())]
    File {
        /// The key that names the file.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The client refused to start.
    #[error("can't start the connection to NATS; check `nats.urls`")]
    Connect(#[from] ConnectError),
    /// The message was refused.
    #[error("can't publish on `{subject}`")]
    Publish {
        /// The message's subject.
        subject: String,
        /// What the client said.
        source: PublishError,
    },
    /// The client's queue stayed full.
    #[error("can't publish on `{subject}`: the connection took nothing for {after:?}; is NATS reachable?")]
    PublishTimeout {
        /// The message's subject.
        subject: String,
        /// How long the caller was ready to wait.
        after: Duration,
    },
}

/// Starts a connection to NATS, and returns at once: whether it comes about, and comes back after a
/// loss, is told through `on_event`, which must not block.
///
/// Compared with the client's defaults: a dead connection is noticed after 6 s instead of 180;
/// attempts to reconnect are given up after 2 s, begin at most half a second later and are spread by chance,
/// so that a server that comes back isn't met by everybody at once; only the configured servers are used, in their order, because the
/// addresses a cluster tells may lie outside the firewall's rules; a server that announces its
/// shutdown is left at once if there are others.
///
/// With several servers, end the connection by [`Client::drain`]; dropping all clients is enough only
/// with one.
pub async fn connect(
    config: &BusConfig,
    options: BusOptions,
    on_event: impl Fn(BusEvent) + Send + Sync + 'static,
) -> Result<Client, BusError> {
    let mut client_options = secure(authenticate(config).await?, config)?
        .name(options.name)
        .subscription_capacity(options.subscription_capacity)
        .ping_interval(PING_INTERVAL)
        .connection_timeout(CONNECT_LIMIT)
        .reconnect_delay_callback(|attempt| retry_delay(attempt, chance()))
        // Nobody needs what it sent itself; and a publisher that asks whether anybody else is there isn't there itself.
        .no_echo()
        .ignore_discovered_servers()
        .retain_servers_order()
        .retry_on_initial_connect();
    if let Some(prefix) = options.inbox_prefix {
        client_options = client_options.custom_inbox_prefix(prefix);
    }

    // The client as its own events need it: to leave a server that shuts down for another.
    let leaver: Arc<Mutex<Option<Client>>> = Arc::default();
    let on_client_event = {
        let leaver = Arc::clone(&leaver);
        move |event| {
            match &event {
                Event::LameDuckMode => leave(leaver.lock().clone()),
                Event::Closed => *leaver.lock() = None,
                _ => {}
            }
            on_event(BusEvent::from(event));
            std::future::ready(())
        }
    };
    let client = client_options.event_callback(on_client_event).connect(config.urls.as_slice()).await?;
    if config.urls.len() > 1 {
        *leaver.lock() = Some(client.clone());
    }
    Ok(client)
}

/// Moves to another server. Queueing that may wait, and events must not.
fn leave(client: Option<Client>) {
    let Some(client) = client else { return };
    tokio::spawn(async move {
        match tokio::time::timeout(LEAVE_LIMIT, client.force_reconnect()).await {
            Ok(Ok(())) => tracing::info!("leaving a NATS server that is about to shut down"),
            Ok(Err(error)) => tracing::warn!(%error, "can't leave a NATS server that is about to shut down"),
            Err(_) => tracing::warn!("can't leave a NATS server that is about to shut down: busy"),
        }
    });
}

impl From<Event> for BusEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Connected => Self::Connected,
            Event::Disconnected => Self::Disconnected,
            Event::LameDuckMode => Self::LameDuck,
            Event::SlowConsumer(_) => Self::SlowConsumer,
            Event::Draining => Self::Draining,
            Event::Closed => Self::Closed,
            Event::ServerError(error) => Self::ServerError(error.to_string()),
            Event::ClientError(error) => Self::ClientError(error.to_string()),
        }
    }
}

/// Publishes, asking for answers at `reply` if there is one, but waits no longer than `limit` for a place in the client's queue. `Ok` means queued:
/// what is on its way when a connection breaks is lost without a word.
pub async fn publish_within(
    client: &Client,
    subject: impl Into<String>,
    reply: Option<String>,
    payload: Bytes,
    limit: Duration,
) -> Result<(), BusError> {
    let subject = subject.into();
    let publish = async {
        match reply {
            Some(reply) => client.publish_with_reply(subject.clone(), reply, payload).await,
            None => client.publish(subject.clone(), payload).await,
        }
    };
    match tokio::time::timeout(limit, publish).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(BusError::Publish { subject, source }),
        Err(_) => Err(BusError::PublishTimeout { subject, after: limit }),
    }
}

/// How the connection proves who it is.
async fn authenticate(config: &BusConfig) -> Result<ConnectOptions, BusError> {
    if !config.credentials_file.is_empty() {
        let path = readable("nats.credentials_file", &config.credentials_file)?;
        return ConnectOptions::with_credentials_file(&path).await.map_err(|source| BusError::File {
            key: "nats.credentials_file",
            path,
            source,
        });
    }
    if !config.password_file.is_empty() {
        let path = readable("nats.password_file", &config.password_file)?;
        let user = config.user.clone();
        return Ok(ConnectOptions::with_auth_callback(move |_nonce| password_of(user.clone(), path.clone())));
    }
    if !config.user.is_empty() {
        return Ok(ConnectOptions::with_user_and_password(config.user.clone(), config.password.clone()));
    }
    Ok(ConnectOptions::new())
}

async fn password_of(user: String, path: PathBuf) -> Result<async_nats::Auth, async_nats::AuthError> {
    let read = tokio::task::spawn_blocking(move || std::fs::read_to_string(path)).await;
    let content = read.map_err(io::Error::other).flatten().map_err(async_nats::AuthError::new)?;
    let mut auth = async_nats::Auth::new();
    auth.username = Some(user);
    // Editors and `echo` end files with a line break that no password has.
    auth.password = Some(content.trim_end_matches(['\r', '\n']).to_owned());
    Ok(auth)
}

fn secure(mut options: ConnectOptions, config: &BusConfig) -> Result<ConnectOptions, BusError> {
    if !config.ca_file.is_empty() {
        options = options.add_root_certificates(readable("nats.ca_file", &config.ca_file)?).require_tls(true);
    }
    if !config.cert_file.is_empty() {
        let certificate = readable("nats.cert_file", &config.cert_file)?;
        let key = readable("nats.key_file", &config.key_file)?;
        options = options.add_client_certificate(certificate, key).require_tls(true);
    }
    Ok(options)
}

/// Opens a file to see whether that works. The client reads it later and would only keep retrying.
fn readable(key: &'static str, path: &str) -> Result<PathBuf, BusError> {
    let path = Path::new(path);
    match std::fs::File::open(path) {
        Ok(_) => Ok(path.to_owned()),
        Err(source) => Err(BusError::File { key, path: path.to_owned(), source }),
    }
}

/// The pause before the `attempt`th attempt (counted from 1): between half of a doubling time and
/// the whole of it, by `chance`.
fn retry_delay(attempt: usize, chance: u32) -> Duration {
    let doublings = u32::try_from(attempt.saturating_sub(1)).unwrap_or(u32::MAX).min(8);
    let longest = (FIRST_RETRY * 2_u32.pow(doublings)).min(LAST_RETRY);
    longest / 2 + (longest / 2).mul_f64(f64::from(chance) / f64::from(u32::MAX))
}

/// Spreads reconnects. If the system has no randomness to give, they are merely not spread.
fn chance() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;

    use super::*;

    /// As much of a NATS server as a client needs to connect.
    struct FakeServer {
        listener: TcpListener,
    }

    struct FakeConnection {
        stream: BufReader<TcpStream>,
        /// What the client said of itself: the line that begins with CONNECT.
        connect: String,
    }

    impl FakeServer {
        async fn start() -> Self {
            Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
        }

        fn url(&self) -> String {
            format!("nats://{}", self.listener.local_addr().unwrap())
        }

        async fn accept(&self) -> FakeConnection {
            let (stream, _) = self.listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            stream.write_all(format!("INFO {}\r\n", info(false)).as_bytes()).await.unwrap();
            let mut connect = String::new();
            stream.read_line(&mut connect).await.unwrap();
            let mut ping = String::new();
            stream.read_line(&mut ping).await.unwrap();
            assert_eq!(ping, "PING\r\n");
            stream.write_all(b"PONG\r\n").await.unwrap();
            FakeConnection { stream, connect }
        }
    }

    impl FakeConnection {
        async fn say(&mut self, line: &str) {
            self.stream.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
        }
    }

    fn info(lame_duck: bool) -> String {
        format!(
            r#"{{"server_id":"FAKE","server_name":"fake","host":"127.0.0.1","port":4222,"version":"2.15.0","proto":1,"max_payload":1048576,"client_id":1,"headers":true,"ldm":{lame_duck},"connect_urls":["127.0.0.1:1"]}}"#
        )
    }

    fn options() -> BusOptions {
        BusOptions { name: "test".to_owned(), inbox_prefix: None, subscription_capacity: 16 }
    }

    async fn start(config: &BusConfig) -> (Client, mpsc::UnboundedReceiver<BusEvent>) {
        let (tell, events) = mpsc::unbounded_channel();
        let client = connect(config, options(), move |event| drop(tell.send(event))).await.unwrap();
        (client, events)
    }

    fn to(servers: &[&FakeServer]) -> BusConfig {
        BusConfig { urls: servers.iter().map(|server| server.url()).collect(), ..BusConfig::default() }
    }

    fn problems(config: &BusConfig) -> Vec<String> {
        let mut problems = Vec::new();
        config.validate(&mut problems);
        problems
    }

    #[tokio::test]
    async fn a_lost_connection_comes_back_and_each_step_is_told() {
        let server = FakeServer::start().await;
        let (_client, mut events) = start(&to(&[&server])).await;
        let first = server.accept().await;
        assert_eq!(events.recv().await, Some(BusEvent::Connected));
        drop(first);
        assert_eq!(events.recv().await, Some(BusEvent::Disconnected));
        let mut second = server.accept().await;
        assert_eq!(events.recv().await, Some(BusEvent::Connected));
        second.say("-ERR 'Permissions Violation for Publish to \"x\"'").await;
        let Some(BusEvent::ServerError(error)) = events.recv().await else { panic!("no server error") };
        assert!(error.contains("Permissions Violation"), "{error}");
    }

    fn link(readiness: &Readiness) -> Link {
        let metrics = BusMetrics {
            connected: Gauge::noop(),
            connects: Counter::noop(),
            slow_consumer: Counter::noop(),
            server_errors: Counter::noop(),
        };
        Link::new(&BusConfig::default(), metrics, readiness)
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_settled_stays_ready_without_nats_and_says_what_is_missing() {
        let readiness = Readiness::new();
        let link = link(&readiness);
        link.note(BusEvent::Connected);
        tokio::time::advance(crate::readiness::SETTLES_AFTER).await;
        for (event, what) in [
            (BusEvent::Disconnected, "was lost"),
            (BusEvent::ServerError("nats: Permissions Violation".to_owned()), "permissions"),
        ] {
            link.note(event);
            assert!(readiness.is_ready() && readiness.remarks()[0].detail.contains(what), "{readiness:?}");
        }
    }

    #[test]
    fn who_is_forbidden_something_at_its_start_is_not_ready_until_the_next_connection() {
        let readiness = Readiness::new();
        let link = link(&readiness);
        let forbidden = "nats: Permissions Violation for Subscription to \"evictd.v1.live\"";
        assert!(link.note(BusEvent::Connected) && readiness.is_ready());
        link.note(BusEvent::ServerError("nats: something else".to_owned()));
        assert!(readiness.is_ready());
        link.note(BusEvent::ServerError(forbidden.to_owned()));
        assert!(link.is_up() && !readiness.is_ready());
        assert!(readiness.waiting_for()[0].detail.contains(forbidden));
        link.note(BusEvent::Disconnected);
        link.note(BusEvent::Connected);
        assert!(readiness.is_ready());
    }

    #[tokio::test]
    async fn a_server_that_cannot_be_reached_is_an_event_and_not_an_error() {
        // Port 1 is below the ports that tests or systems hand out, and nobody uses it.
        let config = BusConfig { urls: vec!["nats://127.0.0.1:1".to_owned()], ..BusConfig::default() };
        let (_client, mut events) = start(&config).await;
        assert!(matches!(events.recv().await, Some(BusEvent::ClientError(_))));
    }

    #[tokio::test]
    async fn a_rotated_password_file_is_read_again_at_the_next_connect() {
        let server = FakeServer::start().await;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "old\n").unwrap();
        let path = file.path().display().to_string();
        let config = BusConfig { user: "agent".to_owned(), password_file: path, ..to(&[&server]) };
        let (_client, _events) = start(&config).await;
        let first = server.accept().await;
        assert!(first.connect.contains(r#""user":"agent","pass":"old""#), "{}", first.connect);
        std::fs::write(file.path(), "new\n").unwrap();
        drop(first);
        let second = server.accept().await;
        assert!(second.connect.contains(r#""pass":"new""#), "{}", second.connect);
    }

    #[tokio::test]
    async fn a_missing_file_is_an_error_that_names_key_and_path() {
        let config = BusConfig {
            urls: vec!["nats://127.0.0.1:4222".to_owned()],
            ca_file: "/no/such/ca.pem".to_owned(),
            ..BusConfig::default()
        };
        let error = connect(&config, options(), drop).await.unwrap_err();
        assert_eq!(error.to_string(), "can't read `nats.ca_file` /no/such/ca.pem");
        assert!(std::error::Error::source(&error).is_some(), "the cause is kept");
    }

    #[tokio::test]
    async fn a_server_that_shuts_down_is_left_for_another() {
        let (one, two) = (FakeServer::start().await, FakeServer::start().await);
        let (_client, mut events) = start(&to(&[&one, &two])).await;
        let mut connection = one.accept().await;
        assert_eq!(events.recv().await, Some(BusEvent::Connected));
        // As a server does, this one takes nobody from here on.
        tokio::spawn(async move {
            while let Ok((refused, _)) = one.listener.accept().await {
                drop(refused);
            }
        });
        connection.say(&format!("INFO {}", info(true))).await;
        assert_eq!(events.recv().await, Some(BusEvent::LameDuck));
        assert_eq!(events.recv().await, Some(BusEvent::Disconnected));
        let _next = two.accept().await;
        assert_eq!(events.recv().await, Some(BusEvent::Connected));
    }

    #[tokio::test]
    async fn a_dropped_client_of_one_server_closes_its_connection() {
        let server = FakeServer::start().await;
        let (client, mut events) = start(&to(&[&server])).await;
        let _connection = server.accept().await;
        assert_eq!(events.recv().await, Some(BusEvent::Connected));
        drop(client);
        assert_eq!(events.recv().await, Some(BusEvent::Closed));
    }

    #[tokio::test]
    async fn publishing_gives_up_when_the_queue_stays_full() {
        // It accepts connections and says nothing, so that nothing leaves the client's queue.
        let mute = FakeServer::start().await;
        let (client, _events) = start(&to(&[&mute])).await;
        let error = loop {
            let limit = Duration::from_millis(20);
            if let Err(error) = publish_within(&client, "a.subject", None, Bytes::new(), limit).await {
                break error;
            }
        };
        assert!(
            matches!(&error, BusError::PublishTimeout { subject, .. } if subject == "a.subject"),
            "{error}"
        );
    }

    #[test]
    fn retries_are_spread_and_never_far_apart() {
        assert_eq!(retry_delay(1, 0), Duration::from_millis(25));
        assert_eq!(retry_delay(1, u32::MAX), Duration::from_millis(50));
        assert_eq!(retry_delay(3, u32::MAX), Duration::from_millis(200));
        assert_eq!(retry_delay(1_000_000, 0), Duration::from_millis(250));
        assert_eq!(retry_delay(usize::MAX, u32::MAX), Duration::from_millis(500));
    }

    #[test]
    fn settings_that_exclude_or_need_each_other_are_found() {
        let good = BusConfig {
            urls: vec!["nats://a:4222".to_owned(), "tls://b:4222".to_owned()],
            user: "agent".to_owned(),
            password_file: "/run/secrets/nats".to_owned(),
            ..BusConfig::default()
        };
        assert_eq!(problems(&good), Vec::<String>::new());
        let bad = BusConfig {
            password: "hunter2".to_owned(),
            credentials_file: "agent.creds".to_owned(),
            key_file: "key.pem".to_owned(),
            ..good.clone()
        };
        assert_eq!(
            problems(&bad),
            [
                "`nats.password` and `nats.password_file` exclude each other; set one",
                "`nats.credentials_file` and `nats.user` exclude each other; set one",
                "`nats.cert_file` and `nats.key_file` belong together; set both or none",
            ]
        );
        assert_eq!(problems(&BusConfig::default()), ["`nats.urls` must name at least one NATS server"]);
        let lone = BusConfig { password_file: String::new(), ..good.clone() };
        assert_eq!(
            problems(&lone),
            ["`nats.user` needs a password: set `nats.password_file` or `nats.password`"]
        );
        let nobody = BusConfig { user: String::new(), ..good };
        assert_eq!(problems(&nobody), ["a password needs its user: set `nats.user`"]);
    }

    #[test]
    fn secrets_are_neither_shown_nor_accepted_in_urls() {
        let config = BusConfig {
            urls: vec!["nats://agent:hunter2@a:4222".to_owned(), "http://agent:hunter2@b".to_owned()],
            user: "agent".to_owned(),
            password: "hunter2".to_owned(),
            ..BusConfig::default()
        };
        let problems = problems(&config);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("set `nats.user` and `nats.password_file`"), "{problems:?}");
        assert!(problems[1].contains("isn't a NATS URL"), "{problems:?}");
        assert!(!format!("{problems:?} {config:?}").contains("hunter2"));
    }
}
