//! The thin shell of every HTTP server: hyper, limits, and a drain.
//!
//! There is no framework and no router: the verify hot path is one request type, and each server matches on
//! `(method, path)` itself. This module owns what all of them share: how much a client may send and how slowly, how
//! many connections there may be, and how they end. `docs/adr/0001` says what that costs.
//!
//! * `serve`: accepts connections, makes room for them, and drains them.
//! * `watch`: ends connections that are idle or send their headers too slowly.
//! * `body`: request bodies, read or discarded.
//! * `framing`: requests that a proxy may read differently.

mod body;
mod framing;
mod serve;
mod watch;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use serde::Deserialize;
use tokio::net::{TcpListener, TcpSocket};

use self::body::RequestBody;
use crate::config::{HumanDuration, Validate, check_count};

pub use self::body::BodyError;
pub use hyper::http::request::Parts;
pub use hyper::{Method, StatusCode, header};
pub use serve::{DRAIN_LIMIT, serve};

/// Connections that wait in the kernel to be accepted. After a restart all clients connect at once, and one that finds
/// the queue full tries again only a second later. The kernel lowers it to its own limit.
const BACKLOG: u32 = 4_096;

/// An answer with a complete body.
pub type Reply = hyper::Response<Full<Bytes>>;

/// Answers requests. Cloned once per connection and once per request, so keep it an `Arc` or two.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Answers one request; a failure is an answer, too.
    fn handle(&self, request: Request) -> impl Future<Output = Reply> + Send;

    /// Records the status of an answer: of each that [`Self::handle`] gave, and of those that the server gives by
    /// itself, to what isn't HTTP and to surplus connections.
    fn answered(&self, _status: StatusCode) {}
}

/// What a client may demand of a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HttpLimits {
    /// From a request's first byte to the end of its headers.
    pub header_timeout: Duration,
    /// From the call of [`Request::body`] to the body's end.
    pub body_timeout: Duration,
    pub body_bytes_max: usize,
    /// A further connection replaces one that waits for its client. If all are busy, it is refused with a 503.
    pub connections_max: usize,
    /// How long a connection may stay open without a request. The client must also have received its last answer
    /// within this time.
    pub idle_timeout: Duration,
    /// How long a connection may wait for a request before it has to make room for a surplus one.
    pub spared_idle: Duration,
    /// How long a server that shuts down waits for requests in flight.
    pub drain: Duration,
}

/// The longest of any gateway: Envoy keeps its connections for an hour. A gateway that closes first never sends a
/// request into a connection that is being closed. `docs/keep-alive.md` has the others.
const IDLE_TIMEOUT: Duration = Duration::from_mins(65);

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(20),
            body_bytes_max: 10 * 1024 * 1024,
            connections_max: 10_000,
            idle_timeout: IDLE_TIMEOUT,
            spared_idle: Duration::from_secs(1),
            drain: DRAIN_LIMIT,
        }
    }
}

/// The section `[http]` of a configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    pub listen: SocketAddr,
    pub connections_max: usize,
    /// Logs a line for each answer.
    pub access_log: bool,
    pub header_timeout: HumanDuration,
    pub body_timeout: HumanDuration,
    pub idle_timeout: HumanDuration,
}

impl HttpConfig {
    pub fn limits(&self, body_bytes_max: usize) -> HttpLimits {
        HttpLimits {
            header_timeout: self.header_timeout.into(),
            body_timeout: self.body_timeout.into(),
            body_bytes_max,
            connections_max: self.connections_max,
            idle_timeout: self.idle_timeout.into(),
            ..HttpLimits::default()
        }
    }
}

impl Validate for HttpConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        check_count("http.connections_max", self.connections_max, problems);
        for (key, value) in [
            ("http.header_timeout", self.header_timeout),
            ("http.body_timeout", self.body_timeout),
            ("http.idle_timeout", self.idle_timeout),
        ] {
            if value.is_zero() {
                problems.push(format!("{key}: must be above zero"));
            }
        }
    }
}

/// A request whose headers have arrived, and whose body may still be on its way.
#[derive(Debug)]
pub struct Request {
    pub parts: Parts,
    pub remote: SocketAddr,
    body: RequestBody,
    limits: HttpLimits,
}

impl Request {
    /// Reads the whole body. A second call returns nothing more.
    ///
    /// What isn't read is discarded while the answer is on its way, so that a client which is still sending receives
    /// the answer.
    pub async fn body(&mut self) -> Result<Bytes, BodyError> {
        self.body.read(self.limits.body_bytes_max, self.limits.body_timeout).await
    }
}

/// A plain-text answer.
pub fn text(status: StatusCode, body: &str) -> Reply {
    reply(status, "text/plain; charset=utf-8", Bytes::copy_from_slice(body.as_bytes()))
}

/// A JSON answer of an already encoded body.
pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    reply(status, "application/json", body.into())
}

/// An answer of any content type.
pub fn reply(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let mut reply = Reply::new(Full::new(body));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    reply
}

/// Why a server can't listen, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on {address}; {}", advice(.source, .address))]
pub struct BindError {
    pub address: SocketAddr,
    pub source: io::Error,
}

fn advice(error: &io::Error, address: &SocketAddr) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "stop the process that uses it, or configure another port (0 picks a free one)".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("{} isn't an address of this machine; configure one that is", address.ip())
        }
        io::ErrorKind::PermissionDenied => {
            format!("port {} needs privileges; configure a port above 1023", address.port())
        }
        _ => "configure another address".to_owned(),
    }
}

/// An address of this process at which it doesn't listen yet: connections are refused, and no other process can listen.
#[derive(Debug)]
pub struct ReservedAddress {
    socket: TcpSocket,
    /// With the port that was picked.
    pub address: SocketAddr,
}

/// Reserves `address`; port 0 picks a free port.
pub fn reserve(address: SocketAddr) -> Result<ReservedAddress, BindError> {
    let reserve = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A restart needn't wait until the sockets of the last process are gone.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let address = socket.local_addr()?;
        Ok(ReservedAddress { socket, address })
    };
    reserve().map_err(|source| BindError { address, source })
}

impl ReservedAddress {
    /// Listens from now on. Must be called inside a tokio runtime.
    pub fn listen(self) -> Result<TcpListener, BindError> {
        let Self { socket, address } = self;
        socket.listen(BACKLOG).map_err(|source| BindError { address, source })
    }
}

/// Listens on `address`; port 0 picks a free port, which the listener then names.
#[allow(clippy::unused_async, reason = "it needs the runtime of its caller")]
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    reserve(address)?.listen()
}
