//! A connection to NATS with the settings that the bound needs.
//!
//! The client's defaults suit a program that may lose minutes: it would notice a silent network after three minutes, and
//! ten thousand agents would reconnect in the same millisecond. See [`connect`].

mod faults;
mod login;

use std::collections::HashMap;
use std::fmt;
use std::future::Ready;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::{
    Client, ClientError, ConnectError, ConnectErrorKind, ConnectOptions, Event, PublishError,
    ReconnectToServer, Server, ServerInfo,
};
use bytes::Bytes;
use evictd_wire::api::secret::Secret;
use metrics::{Counter, Gauge};
use parking_lot::Mutex;
use serde::Deserialize;

use self::faults::TlsSettings;
use crate::config::Validate;
use crate::connection_url::ConnectionUrl;
use crate::log_limit;
use crate::readiness::{Condition, Readiness};
use crate::time::Backoff;

/// A silent connection is given up after three pings without an answer: 6 s, well within the bound.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// The pause before an attempt to connect: short enough to be back within a second after the network is.
const RETRY: Backoff = Backoff { first: Duration::from_millis(50), max: Duration::from_millis(500) };

/// How long an attempt may take. In a network that drops everything, TCP retries at growing intervals, so that a new
/// attempt succeeds sooner than an old one.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long a check of one server may take, name resolution included.
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// How long leaving a server that is about to shut down may take to be queued.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// The section `[nats]` of a configuration: how to reach NATS. An empty string means "not set".
#[derive(Deserialize, Clone, Default)]
#[serde(deny_unknown_fields)]
pub struct BusConfig {
    /// Servers in the order in which they are tried.
    pub urls: Vec<String>,
    pub user: String,
    pub password: Secret,
    /// Read at each connect, so that the password can be rotated.
    pub password_file: String,
    /// A file with a user's JWT and nkey seed, read at each connect.
    pub credentials_file: String,
    /// A file with a user's nkey seed, read at each connect.
    pub nkey_seed_file: String,
    /// Certificates of the authorities that sign the servers' certificates. Requires TLS.
    pub ca_file: String,
    /// The client's certificate, which needs [`Self::key_file`]. Requires TLS.
    pub cert_file: String,
    pub key_file: String,
}

impl fmt::Debug for BusConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusConfig")
            .field("urls", &self.urls.iter().map(|url| ConnectionUrl::nats(url)).collect::<Vec<_>>())
            .field("user", &self.user)
            .field("password", &self.password)
            .field("password_file", &self.password_file)
            .field("credentials_file", &self.credentials_file)
            .field("nkey_seed_file", &self.nkey_seed_file)
            .field("ca_file", &self.ca_file)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .finish()
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
            if let Err(error) = ConnectionUrl::nats(url) {
                problem(true, &format!("`nats.urls`: {error}"));
            }
        }
        let (password, file) = (!self.password.expose().is_empty(), set(&self.password_file));
        problem(password && file, "`nats.password` and `nats.password_file` exclude each other; set one");
        problem((password || file) && !set(&self.user), "a password needs its user: set `nats.user`");
        problem(
            set(&self.user) && !password && !file,
            "`nats.user` needs a password: set `nats.password_file` or `nats.password`",
        );
        let has_user = set(&self.user) || password || file;
        problem(
            set(&self.credentials_file) && has_user,
            "`nats.credentials_file` and `nats.user` exclude each other; set one",
        );
        problem(
            set(&self.nkey_seed_file) && (has_user || set(&self.credentials_file)),
            "`nats.nkey_seed_file` excludes `nats.user` and `nats.credentials_file`; set one",
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
    /// As the servers' monitoring shows it.
    pub name: String,
    /// The prefix of the subjects of answers, to which an agent's permissions are tied (R13). `_INBOX` if `None`.
    pub inbox_prefix: Option<String>,
    /// Messages that a subscription holds before it drops some and [`Event::SlowConsumer`] follows.
    pub subscription_capacity: usize,
}

/// The metrics of a connection.
#[derive(Clone, Debug)]
pub struct BusMetrics {
    /// 1 while connected.
    pub connected: Gauge,
    pub connects: Counter,
    /// Messages that a full subscription dropped.
    pub slow_consumer: Counter,
    pub server_errors: Counter,
}

/// The state of a connection, according to its events.
///
/// The client's own state lags behind its events, so that what is sent right after a connect would be held back.
#[derive(Clone, Debug)]
pub struct BusLink {
    up: Arc<AtomicBool>,
    /// What the server reported last on this connection; often it closes it next.
    server_error: Arc<Mutex<Option<String>>>,
    servers: Arc<str>,
    tls: TlsSettings,
    metrics: BusMetrics,
    condition: Condition,
    /// In the log.
    name: &'static str,
}

impl BusLink {
    /// Not connected yet to any of `config`'s servers. The condition `nats` is met while it is. It is one of the start: a
    /// settled daemon does what it can without NATS, and `/readyz` warns.
    pub fn new(config: &BusConfig, metrics: BusMetrics, readiness: &Readiness) -> Self {
        Self::named("nats", config, metrics, readiness)
    }

    /// A further connection, whose condition has a name of its own.
    pub fn named(name: &'static str, config: &BusConfig, metrics: BusMetrics, readiness: &Readiness) -> Self {
        let servers: Arc<str> = config.urls.join(", ").into();
        let condition = readiness.condition_at_start(name, format!("a connection to {servers}"));
        let tls = TlsSettings::of(config);
        Self { up: Arc::default(), server_error: Arc::default(), servers, tls, metrics, condition, name }
    }

    /// Whether there is a connection to send on.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Counts and logs an event, and updates the condition. Returns whether the connection has just been made. The
    /// condition is also unmet from a permission error of NATS until the next connection.
    pub fn note(&self, event: Event) -> bool {
        let connection = self.name;
        match event {
            Event::Connected => {
                if let Some(unlogged) = log_limit!(5, connection) {
                    tracing::info!(connection, unlogged = unlogged.field(), "connected to NATS");
                }
                self.up.store(true, Ordering::Release);
                *self.server_error.lock() = None;
                self.metrics.connected.set(1.0);
                self.metrics.connects.increment(1);
                self.condition.met();
                return true;
            }
            Event::Disconnected => {
                let error = self.server_error.lock().take();
                if let Some(unlogged) = log_limit!(5, connection) {
                    let unlogged = unlogged.field();
                    tracing::warn!(connection, error, unlogged, "connection to NATS lost; reconnecting");
                }
                self.up.store(false, Ordering::Release);
                self.metrics.connected.set(0.0);
                let cause = error.map(|error| format!(": {error}")).unwrap_or_default();
                self.condition.unmet(format!("a connection to {}, which was lost{cause}", self.servers));
            }
            Event::SlowConsumer(_) => self.metrics.slow_consumer.increment(1),
            Event::ServerError(error) => {
                let is_permission = error.to_string().to_lowercase().contains("permission");
                let error = self.tls.explain(&error.to_string());
                if let Some(unlogged) = log_limit!(1, format_args!("{connection} {error}")) {
                    let message = if is_permission {
                        "NATS denied a permission; give this user the permissions of deploy/nats"
                    } else {
                        "NATS reported an error"
                    };
                    tracing::warn!(connection, error, unlogged = unlogged.field(), "{message}");
                }
                if is_permission {
                    // A daemon that starts without a permission must not look healthy, even if the rest works. The
                    // next connection requests everything anew.
                    self.condition.unmet(format!("permissions as those of deploy/nats: {error}"));
                } else {
                    *self.server_error.lock() = Some(error);
                }
                self.metrics.server_errors.increment(1);
            }
            Event::ClientError(error) => {
                let error = match error {
                    ClientError::Other(error) => error,
                    other => other.to_string(),
                };
                tracing::debug!(connection, error, "NATS client reported an error");
                if !self.is_up() {
                    self.condition.unmet(format!("a connection to {}: {error}", self.servers));
                    // Attempts to reconnect fail many times a second.
                    if let Some(unlogged) = log_limit!(1, format_args!("{connection} {error}")) {
                        let unlogged = unlogged.field();
                        tracing::warn!(
                            connection, servers = %self.servers, error, unlogged,
                            "cannot connect to NATS; retrying"
                        );
                    }
                }
            }
            Event::LameDuckMode | Event::Draining | Event::Closed => {}
        }
        false
    }
}

/// Why the bus can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("can't read `{key}` {}", .path.display())]
    File { key: &'static str, path: PathBuf, source: io::Error },
    #[error("can't start the connection to NATS; check `nats.urls`")]
    Connect(#[from] ConnectError),
    #[error("can't publish on `{subject}`")]
    Publish { subject: String, source: PublishError },
    /// The client's queue stayed full.
    #[error("can't publish on `{subject}`: the connection took nothing for {after:?}; is NATS reachable?")]
    PublishTimeout { subject: String, after: Duration },
}

/// Starts a connection to NATS, and returns at once. `on_event` is called when it is made, lost, and made again; it must
/// not block. Events may get lost when many come at once: count and log them, but let nothing depend on each.
///
/// Compared with the client's defaults:
///
/// * A dead connection is noticed after 6 s instead of 180.
/// * An attempt to connect ends after 2 s. The next one follows after half a second at most, at random, so that not all
///   clients meet a restarted server at once.
/// * Only the configured servers are used, in their order. The addresses that a cluster advertises may lie outside the
///   firewall's rules.
/// * The client leaves a server that announces its shutdown at once, if there are others.
///
/// With several servers, end the connection by [`Client::drain`]. Dropping all clients is enough only with one server.
pub async fn connect(
    config: &BusConfig,
    options: BusOptions,
    on_event: impl Fn(Event) + Send + Sync + 'static,
) -> Result<Client, BusError> {
    let on_event = Arc::new(on_event);
    let mut client_options = base_options(config, options.name)
        .await?
        .subscription_capacity(options.subscription_capacity)
        .ping_interval(PING_INTERVAL)
        .reconnect_delay_callback(|attempt| {
            RETRY.spread_pause(u32::try_from(attempt.saturating_sub(1)).unwrap_or(u32::MAX))
        })
        // No client needs its own messages, and a publisher that looks for others must not find itself.
        .no_echo()
        .ignore_discovered_servers()
        .retain_servers_order()
        .retry_on_initial_connect()
        .reconnect_to_server_callback(report_faults(TlsSettings::of(config), on_event.clone()));
    if let Some(prefix) = options.inbox_prefix {
        client_options = client_options.custom_inbox_prefix(prefix);
    }

    // For the client's own events: it leaves a server that shuts down for another one.
    let leaver: Arc<Mutex<Option<Client>>> = Arc::default();
    let on_client_event = {
        let leaver = Arc::clone(&leaver);
        move |event| {
            match &event {
                Event::LameDuckMode => leave(leaver.lock().clone()),
                Event::Closed => *leaver.lock() = None,
                _ => {}
            }
            // The client's own words for a failed attempt leave out the cause; `report_faults` has it.
            if !matches!(&event, Event::ClientError(ClientError::Other(kind)) if !is_complete(kind)) {
                on_event(event);
            }
            std::future::ready(())
        }
    };
    let client = client_options.event_callback(on_client_event).connect(config.urls.as_slice()).await?;
    if config.urls.len() > 1 {
        *leaver.lock() = Some(client.clone());
    }
    Ok(client)
}

/// What checks and connections have in common.
async fn base_options(config: &BusConfig, name: String) -> Result<ConnectOptions, BusError> {
    Ok(secure(login::options(config).await?, config)?.name(name).connection_timeout(CONNECT_LIMIT))
}

/// Whether the client's text for the kind of a failed attempt says all there is: no server was tried then.
fn is_complete(kind: &str) -> bool {
    kind == ConnectErrorKind::Dns.to_string()
}

/// Reports why attempts failed. The client keeps that with each server, and shows it only when it asks which server to
/// try next. That is always left to the client.
fn report_faults(
    tls: TlsSettings,
    on_event: Arc<impl Fn(Event) + Send + Sync + 'static>,
) -> impl Fn(Vec<Server>, ServerInfo) -> Ready<Option<ReconnectToServer>> + Send + Sync + 'static {
    let attempts = Mutex::new(HashMap::new());
    move |servers, _| {
        let is_alone = servers.len() == 1;
        let mut attempts = attempts.lock();
        let faults = servers.iter().filter_map(|server| {
            let before = attempts.insert(server.addr.clone(), server.failed_attempts).unwrap_or_default();
            // An older error says nothing about this attempt.
            let error = server.last_error.as_ref().filter(|_| server.failed_attempts > before)?;
            let fault = tls.explain(error);
            let (host, port) = (server.addr.host(), server.addr.port());
            Some(if is_alone { fault } else { format!("{host}:{port}: {fault}") })
        });
        let faults = faults.collect::<Vec<_>>().join("; ");
        drop(attempts);
        if !faults.is_empty() {
            on_event(Event::ClientError(ClientError::Other(faults)));
        }
        std::future::ready(None)
    }
}

/// Connects once to each server, and returns what is wrong with each that can't be used.
pub async fn check(config: &BusConfig) -> Result<Vec<(String, Result<(), String>)>, BusError> {
    let mut results = Vec::new();
    for url in &config.urls {
        let options = base_options(config, "evictd check-config".to_owned()).await?;
        let connected = match tokio::time::timeout(CHECK_LIMIT, options.connect(url.as_str())).await {
            Ok(Ok(client)) => {
                drop(client);
                Ok(())
            }
            Ok(Err(error)) => Err(TlsSettings::of(config).explain(&error.to_string())),
            Err(_) => Err(TlsSettings::of(config).explain("timed out")),
        };
        results
            .push((ConnectionUrl::nats(url).map_or_else(|_| url.clone(), |url| url.to_string()), connected));
    }
    Ok(results)
}

/// Moves to another server, in a task of its own: queueing that may wait, and events must not.
fn leave(client: Option<Client>) {
    let Some(client) = client else { return };
    tokio::spawn(async move {
        match tokio::time::timeout(LEAVE_LIMIT, client.force_reconnect()).await {
            Ok(Ok(())) => tracing::info!("leaving a NATS server that is shutting down"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot leave a NATS server that is shutting down"),
            Err(_) => tracing::warn!("cannot leave a NATS server that is shutting down: busy"),
        }
    });
}

/// Connects again, with the files of the configuration as they are now. It returns once that is queued.
pub async fn reconnect(client: &Client) {
    match tokio::time::timeout(LEAVE_LIMIT, client.force_reconnect()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot connect to NATS again"),
        Err(_) => tracing::warn!("cannot connect to NATS again: busy"),
    }
}

/// Publishes, with a subject for answers if there is `reply`. Waits no longer than `limit` for a place in the client's
/// queue. `Ok` means queued: a message that is under way when a connection breaks is lost without an error.
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

/// Checks that a file can be opened: the client reads it later, and would only retry.
fn readable(key: &'static str, path: &str) -> Result<PathBuf, BusError> {
    let path = Path::new(path);
    match std::fs::File::open(path) {
        Ok(_) => Ok(path.to_owned()),
        Err(source) => Err(BusError::File { key, path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use async_nats::ServerError;
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;

    use super::*;

    /// As much of a NATS server as a client needs to connect.
    struct FakeNats {
        listener: TcpListener,
    }

    struct FakeConnection {
        stream: BufReader<TcpStream>,
        /// The client's line that begins with CONNECT.
        connect: String,
    }

    impl FakeNats {
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
        async fn send(&mut self, line: &str) {
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

    async fn start(config: &BusConfig) -> (Client, mpsc::UnboundedReceiver<Event>) {
        let (sender, events) = mpsc::unbounded_channel();
        let client = connect(config, options(), move |event| drop(sender.send(event))).await.unwrap();
        (client, events)
    }

    fn to(servers: &[&FakeNats]) -> BusConfig {
        BusConfig { urls: servers.iter().map(|server| server.url()).collect(), ..BusConfig::default() }
    }

    fn problems(config: &BusConfig) -> Vec<String> {
        let mut problems = Vec::new();
        config.validate(&mut problems);
        problems
    }

    #[tokio::test]
    async fn lost_connection_comes_back_with_an_event_each() {
        let server = FakeNats::start().await;
        let (_client, mut events) = start(&to(&[&server])).await;
        let first = server.accept().await;
        assert_eq!(events.recv().await, Some(Event::Connected));
        drop(first);
        assert_eq!(events.recv().await, Some(Event::Disconnected));
        let mut second = server.accept().await;
        assert_eq!(events.recv().await, Some(Event::Connected));
        second.send("-ERR 'Permissions Violation for Publish to \"x\"'").await;
        let Some(Event::ServerError(error)) = events.recv().await else { panic!("no server error") };
        assert!(error.to_string().contains("Permissions Violation"), "{error}");
    }

    fn link(readiness: &Readiness) -> BusLink {
        let metrics = BusMetrics {
            connected: Gauge::noop(),
            connects: Counter::noop(),
            slow_consumer: Counter::noop(),
            server_errors: Counter::noop(),
        };
        BusLink::new(&BusConfig::default(), metrics, readiness)
    }

    #[tokio::test(start_paused = true)]
    async fn settled_daemon_stays_ready_without_nats_and_warns() {
        let readiness = Readiness::new();
        let link = link(&readiness);
        link.note(Event::Connected);
        tokio::time::advance(crate::readiness::SETTLES_AFTER).await;
        for (event, what) in [
            (Event::Disconnected, "was lost"),
            (Event::ServerError(ServerError::Other("nats: Permissions Violation".to_owned())), "permissions"),
        ] {
            link.note(event);
            assert!(readiness.is_ready() && readiness.warnings()[0].detail.contains(what), "{readiness:?}");
        }
    }

    #[test]
    fn denied_permission_at_start_makes_unready() {
        let readiness = Readiness::new();
        let link = link(&readiness);
        let forbidden = "nats: Permissions Violation for Subscription to \"evictd.v1.live\"";
        assert!(link.note(Event::Connected) && readiness.is_ready());
        link.note(Event::ServerError(ServerError::Other("nats: something else".to_owned())));
        assert!(readiness.is_ready());
        link.note(Event::ServerError(ServerError::Other(forbidden.to_owned())));
        assert!(link.is_up() && !readiness.is_ready());
        assert!(readiness.waiting_for()[0].detail.contains(forbidden));
        link.note(Event::Disconnected);
        link.note(Event::Connected);
        assert!(readiness.is_ready());
    }

    #[tokio::test]
    async fn unreachable_server_is_an_event_and_no_error() {
        // No test or system uses port 1.
        let config = BusConfig { urls: vec!["nats://127.0.0.1:1".to_owned()], ..BusConfig::default() };
        let (_client, mut events) = start(&config).await;
        assert!(matches!(events.recv().await, Some(Event::ClientError(_))));
    }

    #[tokio::test]
    async fn rotated_password_is_used_at_the_next_connect() {
        let server = FakeNats::start().await;
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
    async fn missing_file_is_named_with_its_key() {
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
    async fn server_that_shuts_down_is_left_for_another() {
        let (one, two) = (FakeNats::start().await, FakeNats::start().await);
        let (_client, mut events) = start(&to(&[&one, &two])).await;
        let mut connection = one.accept().await;
        assert_eq!(events.recv().await, Some(Event::Connected));
        // Like a real server, it accepts no connection from here on.
        tokio::spawn(async move {
            while let Ok((refused, _)) = one.listener.accept().await {
                drop(refused);
            }
        });
        connection.send(&format!("INFO {}", info(true))).await;
        assert_eq!(events.recv().await, Some(Event::LameDuckMode));
        assert_eq!(events.recv().await, Some(Event::Disconnected));
        let _next = two.accept().await;
        assert_eq!(events.recv().await, Some(Event::Connected));
    }

    #[tokio::test]
    async fn dropped_client_of_one_server_closes_its_connection() {
        let server = FakeNats::start().await;
        let (client, mut events) = start(&to(&[&server])).await;
        let _connection = server.accept().await;
        assert_eq!(events.recv().await, Some(Event::Connected));
        drop(client);
        assert_eq!(events.recv().await, Some(Event::Closed));
    }

    #[tokio::test]
    async fn publishing_fails_when_the_queue_stays_full() {
        // It accepts connections and sends nothing, so that the client's queue stays full.
        let mute = FakeNats::start().await;
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
    fn conflicting_settings_are_found() {
        let good = BusConfig {
            urls: vec!["nats://a:4222".to_owned(), "tls://b:4222".to_owned()],
            user: "agent".to_owned(),
            password_file: "/run/secrets/nats".to_owned(),
            ..BusConfig::default()
        };
        assert_eq!(problems(&good), Vec::<String>::new());
        let bad = BusConfig {
            password: Secret::new("hunter2"),
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
        let no_user = BusConfig { user: String::new(), ..good };
        assert_eq!(problems(&no_user), ["a password needs its user: set `nats.user`"]);
    }

    #[test]
    fn secrets_in_urls_are_refused_and_never_shown() {
        let config = BusConfig {
            urls: vec!["nats://agent:hunter2@a:4222".to_owned(), "http://agent:hunter2@b".to_owned()],
            user: "agent".to_owned(),
            password: Secret::new("hunter2"),
            ..BusConfig::default()
        };
        let problems = problems(&config);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("set `nats.user` and `nats.password_file`"), "{problems:?}");
        assert!(problems[1].contains("isn't a NATS URL"), "{problems:?}");
        assert!(!format!("{problems:?} {config:?}").contains("hunter2"));
    }
}
