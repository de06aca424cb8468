//! Accepts connections, makes room for them, serves them, and drains them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::io::InspectReader;
use tokio_util::sync::CancellationToken;

use super::body::RequestBody;
use super::watch::ConnectionWatch;
use super::{Handler, HttpLimits, Reply, Request, StatusCode, framing, header, text};
use crate::log_limit;
use crate::shutdown::Shutdown;
use crate::time::Backoff;

/// How long an API that shuts down waits for requests in flight.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Most bytes buffered per connection while headers arrive. hyper's default of 400 KiB, times ten thousand
/// connections, would be a way to exhaust memory.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Connections at once that get a 503 because there are too many. Further ones are closed without an answer.
const REFUSALS_MAX: usize = 64;

/// How long such a connection may take to send its request and to receive the 503.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);

/// One of so many connections makes room at once, so that a stream of new ones doesn't search for each anew.
const ROOM_SHARE: usize = 64;

/// How long to wait for a connection that makes room. It has nothing left to do but to end.
const ROOM_LIMIT: Duration = Duration::from_millis(100);

/// The system probes the peer of a silent connection after a minute, and closes the connection about a minute later if no
/// probe is answered. The server doesn't notice the probes.
const PEER_PROBES: fn() -> TcpKeepalive = || {
    let (after, between) = (Duration::from_mins(1), Duration::from_secs(15));
    TcpKeepalive::new().with_time(after).with_interval(between).with_retries(4)
};

/// The pause after the system refused a connection because a resource ran out.
const ACCEPT_BACKOFF: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_secs(1) };

/// Serves `handler` until `shutdown` closes it. Then it stops accepting, lets requests in flight finish, and returns
/// when the last connection has ended, or after [`HttpLimits::drain`].
///
/// From when the end is requested, each answer announces that its connection closes. So connections that are in use
/// move to another server, or are made anew, before the idle ones are closed, which gives no occasion to announce it.
///
/// Dropping the returned future ends all its connections.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    handler: H,
    limits: HttpLimits,
    shutdown: impl Into<Shutdown>,
) {
    let Shutdown { requested, closing } = shutdown.into();
    let is_ending = Arc::new(AtomicBool::new(false));
    let mut server = HttpServer {
        handler,
        limits,
        is_ending: is_ending.clone(),
        closing: closing.clone(),
        connections: JoinSet::new(),
        watches: HashMap::new(),
        refusals: JoinSet::new(),
    };
    let announce = async {
        requested.cancelled().await;
        is_ending.store(true, Ordering::Relaxed);
        closing.cancelled().await;
    };
    tokio::select! {
        () = announce => {}
        never = server.accept(&listener) => match never {},
    }
    drop(listener);
    let drained = async {
        while server.connections.join_next().await.is_some() {}
        while server.refusals.join_next().await.is_some() {}
    };
    if timeout(limits.drain, drained).await.is_err() {
        let open = server.connections.len() + server.refusals.len();
        tracing::warn!(open, "drain took too long; closing the connections that are left");
    }
    // What is left in the sets is aborted as it is dropped.
}

/// The answer to a request that a proxy may have read differently. Nothing more is read from its connection.
fn refused(ambiguity: &str) -> Reply {
    let mut reply = text(StatusCode::BAD_REQUEST, &format!("the request has {ambiguity}\n"));
    announce_close(&mut reply);
    reply
}

struct HttpServer<H> {
    handler: H,
    limits: HttpLimits,
    /// Whether answers announce that their connection closes.
    is_ending: Arc<AtomicBool>,
    closing: CancellationToken,
    connections: JoinSet<()>,
    watches: HashMap<Id, Arc<ConnectionWatch>>,
    refusals: JoinSet<()>,
}

impl<H: Handler> HttpServer<H> {
    async fn accept(&mut self, listener: &TcpListener) -> Infallible {
        let mut failures = 0;
        loop {
            match listener.accept().await {
                Ok((stream, remote)) => {
                    failures = 0;
                    self.admit(stream, remote).await;
                }
                Err(error) if concerns_one_connection(&error) => {
                    tracing::debug!(%error, "connection ended before it was accepted");
                }
                Err(error) => {
                    let pause = ACCEPT_BACKOFF.pause(failures);
                    if let Some(unlogged) = log_limit!(1, "") {
                        let unlogged = unlogged.field();
                        tracing::warn!(
                            %error, unlogged,
                            "cannot accept connections; is the limit of open files too low?"
                        );
                    }
                    failures = failures.saturating_add(1);
                    make_room(&self.watches, &self.limits, Instant::now());
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Serves a connection if there is room, refuses it if not, and closes it if even refusals are too many.
    async fn admit(&mut self, stream: TcpStream, remote: SocketAddr) {
        let watch = Arc::new(ConnectionWatch::new());
        if self.has_room().await {
            let handler = self.handler.clone();
            let connection = self.connection(remote, self.limits, watch.clone());
            let task = self.connections.spawn(connection.serve(stream, handler));
            self.watches.insert(task.id(), watch);
            return;
        }
        if let Some(unlogged) = log_limit!(1, "") {
            let (connections_max, unlogged) = (self.limits.connections_max, unlogged.field());
            tracing::warn!(connections_max, unlogged, "all connections are busy; refusing further ones");
        }
        while self.refusals.try_join_next().is_some() {}
        if self.refusals.len() < REFUSALS_MAX {
            let (header_timeout, idle_timeout) = (REFUSAL_LIMIT, REFUSAL_LIMIT);
            let limits = HttpLimits { header_timeout, idle_timeout, ..self.limits };
            let connection = self.connection(remote, limits, watch);
            self.refusals.spawn(connection.serve(stream, OverloadRefusal(self.handler.clone())));
        }
    }

    fn connection(
        &self,
        remote: SocketAddr,
        limits: HttpLimits,
        watch: Arc<ConnectionWatch>,
    ) -> HttpConnection {
        // A token per connection: if all polled one token, they would meet at its lock.
        let draining = self.closing.child_token();
        HttpConnection { remote, limits, watch, is_ending: self.is_ending.clone(), draining }
    }

    /// Whether one more connection can be served, if need be in the place of one that waits for its client.
    async fn has_room(&mut self) -> bool {
        while let Some(ended) = self.connections.try_join_next_with_id() {
            self.remove_watch(ended);
        }
        if self.connections.len() < self.limits.connections_max {
            return true;
        }
        if make_room(&self.watches, &self.limits, Instant::now()) == 0 {
            return false;
        }
        match timeout(ROOM_LIMIT, self.connections.join_next_with_id()).await {
            Ok(Some(ended)) => {
                self.remove_watch(ended);
                true
            }
            Ok(None) | Err(_) => false,
        }
    }

    fn remove_watch(&mut self, ended: Result<(Id, ()), JoinError>) {
        self.watches.remove(&ended.map_or_else(|error| error.id(), |(id, ())| id));
    }
}

/// Ends the connections that have waited longest for a request. Returns how many.
fn make_room(watches: &HashMap<Id, Arc<ConnectionWatch>>, limits: &HttpLimits, now: Instant) -> usize {
    let mut waiting: Vec<(Instant, &ConnectionWatch)> = watches
        .values()
        .filter_map(|watch| Some((watch.waiting_since()?, &**watch)))
        .filter(|(since, _)| now.duration_since(*since) >= limits.spared_idle)
        .collect();
    let share = limits.connections_max.div_ceil(ROOM_SHARE).min(waiting.len());
    if share < waiting.len() {
        waiting.select_nth_unstable_by_key(share, |(since, _)| *since);
    }
    for (_, watch) in &waiting[..share] {
        watch.make_room();
    }
    share
}

/// Answers a client for whose connection there is no room.
#[derive(Clone)]
struct OverloadRefusal<H>(H);

impl<H: Handler> Handler for OverloadRefusal<H> {
    async fn handle(&self, _: Request) -> Reply {
        let mut reply = text(StatusCode::SERVICE_UNAVAILABLE, "too many connections; try again\n");
        announce_close(&mut reply);
        reply.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        reply
    }

    fn answered(&self, status: StatusCode) {
        self.0.answered(status);
    }
}

/// Has hyper close the connection after this answer, and the client expect it.
fn announce_close(reply: &mut Reply) {
    reply.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
}

/// Whether the next connection can probably be accepted at once.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

struct HttpConnection {
    remote: SocketAddr,
    limits: HttpLimits,
    watch: Arc<ConnectionWatch>,
    is_ending: Arc<AtomicBool>,
    draining: CancellationToken,
}

impl HttpConnection {
    async fn serve<H: Handler>(self, stream: TcpStream, handler: H) {
        set_options(&stream);
        let Self { remote, limits, watch, is_ending, draining } = self;
        let service = service_fn(|request: hyper::Request<Incoming>| {
            watch.begin();
            let (handler, watch, is_ending) = (handler.clone(), Arc::clone(&watch), is_ending.clone());
            async move {
                let (parts, body) = request.into_parts();
                let body = RequestBody::new(body, &parts);
                let mut reply = match framing::ambiguity(&parts) {
                    None => handler.handle(Request { parts, remote, body, limits }).await,
                    Some(ambiguity) => refused(ambiguity),
                };
                if is_ending.load(Ordering::Relaxed) {
                    announce_close(&mut reply);
                }
                handler.answered(reply.status());
                watch.finish();
                Ok::<_, Infallible>(reply)
            }
        });
        let reading = Arc::clone(&watch);
        let stream = InspectReader::new(stream, move |bytes: &[u8]| reading.received(bytes));
        let connection = http1::Builder::new()
            .header_read_timeout(None) // see `ConnectionWatch`
            .max_buf_size(BUFFER_BYTES_MAX)
            // A client that shuts down its side after its request still waits for the answer.
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let mut draining = std::pin::pin!(draining.cancelled());
        let mut overstayed = std::pin::pin!(watch.overstayed(&limits));
        let mut is_draining = false;
        loop {
            tokio::select! {
                // The connection comes first, so that a drain doesn't discard a request that has arrived. hyper-util's
                // `GracefulShutdown` does.
                biased;
                ended = &mut connection => {
                    let Err(error) = ended else { return };
                    if let Some(status) = status_sent_by_hyper(&error) {
                        handler.answered(status);
                    }
                    tracing::debug!(%remote, %error, "connection ended with an error");
                    return;
                }
                () = &mut draining, if !is_draining => {
                    is_draining = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = &mut overstayed => {
                    tracing::debug!(%remote, "closed a connection that was idle or too slow, or made room");
                    return;
                }
            }
        }
    }
}

fn set_options(stream: &TcpStream) {
    // Otherwise an answer would wait until the client has acknowledged those before it.
    let nodelay = stream.set_nodelay(true);
    // Otherwise the connection of a client that disappeared would stay open for the whole idle timeout.
    let keepalive = SockRef::from(stream).set_tcp_keepalive(&PEER_PROBES());
    if let Err(error) = nodelay.and(keepalive) {
        tracing::debug!(%error, "cannot set the options of a connection");
    }
}

/// The status that hyper itself has answered to what it can't read as a request.
fn status_sent_by_hyper(error: &hyper::Error) -> Option<StatusCode> {
    if error.is_parse_too_large() {
        // Or 414, which counts as the same class.
        Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
    } else {
        (error.is_parse() && !error.is_parse_version_h2()).then_some(StatusCode::BAD_REQUEST)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::sync::{Notify, watch};
    use tokio::task::JoinHandle;

    use super::super::{bind, json};
    use super::*;

    /// Answers `/wait` when [`Echo::go_on`] is notified, and everything else with the length of the body.
    #[derive(Clone, Default)]
    struct Echo {
        served: Arc<AtomicUsize>,
        waiting: Arc<Notify>,
        go_on: Arc<Notify>,
        /// Of all answers.
        statuses: watch::Sender<Vec<u16>>,
    }

    impl Echo {
        async fn counted(&self, answers: usize) -> Vec<u16> {
            self.statuses.subscribe().wait_for(|statuses| statuses.len() >= answers).await.unwrap().clone()
        }
    }

    impl Handler for Echo {
        async fn handle(&self, mut request: Request) -> Reply {
            self.served.fetch_add(1, Ordering::SeqCst);
            if request.parts.uri.path() == "/wait" {
                self.waiting.notify_one();
                self.go_on.notified().await;
            }
            match request.body().await {
                Ok(body) => json(StatusCode::OK, body.len().to_string().into_bytes()),
                Err(error) => text(error.status(), &error.to_string()),
            }
        }

        fn answered(&self, status: StatusCode) {
            self.statuses.send_modify(|statuses| statuses.push(status.as_u16()));
        }
    }

    struct TestServer {
        address: SocketAddr,
        echo: Echo,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    async fn server(limits: HttpLimits) -> TestServer {
        server_until(limits, CancellationToken::new()).await
    }

    async fn server_until(limits: HttpLimits, shutdown: impl Into<Shutdown>) -> TestServer {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (echo, shutdown) = (Echo::default(), shutdown.into());
        let task = tokio::spawn(serve(listener, echo.clone(), limits, shutdown.clone()));
        TestServer { address, echo, shutdown: shutdown.closing, task }
    }

    struct TestClient(BufReader<TcpStream>);

    impl TestClient {
        async fn connect(address: SocketAddr) -> Self {
            Self(BufReader::new(TcpStream::connect(address).await.unwrap()))
        }

        async fn send(&mut self, request: &str) {
            self.0.write_all(request.as_bytes()).await.unwrap();
        }

        /// The next answer: its head in one string, and its body.
        async fn answer(&mut self) -> (String, String) {
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(self.0.read_line(&mut head).await.unwrap(), 0, "closed after {head:?}");
            }
            let length = head
                .to_lowercase()
                .split_once("content-length: ")
                .map_or(0, |(_, rest)| rest.lines().next().unwrap().parse().unwrap());
            let mut body = vec![0; length];
            self.0.read_exact(&mut body).await.unwrap();
            (head, String::from_utf8(body).unwrap())
        }

        /// Waits until the server has closed the connection; a reset is a way to close, too.
        async fn closed(&mut self) {
            let mut rest = Vec::new();
            let _ = self.0.read_to_end(&mut rest).await;
            assert_eq!(rest, b"");
        }
    }

    fn post(length: usize, body: &str) -> String {
        format!("POST / HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n{body}")
    }

    const WAIT: &str = "GET /wait HTTP/1.1\r\nhost: test\r\n\r\n";

    #[tokio::test]
    async fn connection_serves_one_request_after_another() {
        let server = server(HttpLimits::default()).await;
        let mut client = TestClient::connect(server.address).await;
        for body in ["", "four", "seven.."] {
            client.send(&post(body.len(), body)).await;
            let (head, answer) = client.answer().await;
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert_eq!(answer, body.len().to_string());
        }
    }

    #[tokio::test]
    async fn half_closed_client_still_gets_its_answer() {
        let server = server(HttpLimits::default()).await;
        let mut client = TestClient::connect(server.address).await;
        client.send(&post(4, "four")).await;
        client.0.get_mut().shutdown().await.unwrap();
        assert_eq!(client.answer().await.1, "4");
    }

    #[tokio::test]
    async fn body_in_many_pieces_is_put_together() {
        let server = server(HttpLimits::default()).await;
        let mut client = TestClient::connect(server.address).await;
        client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n").await;
        for _ in 0..50 {
            client.send("4\r\nfour\r\n").await;
        }
        client.send("0\r\n\r\n").await;
        assert_eq!(client.answer().await.1, "200");
    }

    #[tokio::test]
    async fn oversized_body_is_refused_by_its_announcement() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = TestClient::connect(server.address).await;
        client.send(&post(5, "")).await;
        let (head, body) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 413"), "{head}");
        assert_eq!(body, "the request's body is larger than 4 bytes");
    }

    #[tokio::test]
    async fn oversized_body_without_announcement_is_refused() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = TestClient::connect(server.address).await;
        client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n").await;
        client.send("3\r\nabc\r\n2\r\nde\r\n").await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
    }

    #[tokio::test]
    async fn malformed_request_is_refused_and_reaches_no_handler() {
        let server = server(HttpLimits::default()).await;
        let path = |length: usize| format!("GET /{} HTTP/1.1\r\nhost: test\r\n\r\n", "x".repeat(length));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(101));
        let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(2 * BUFFER_BYTES_MAX));
        for (request, statuses) in [
            ("GET / HTTP/9.9\r\n\r\n", &[400][..]),
            ("GET /\u{7f} HTTP/1.1\r\n\r\n", &[400]),
            ("GET / HTTP/1.1\r\na b: c\r\n\r\n", &[400]),
            ("POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", &[400]),
            (&path(BUFFER_BYTES_MAX - 100), &[200]),
            // Which one depends on whether the path's end arrives before there is no room for more.
            (&path(BUFFER_BYTES_MAX), &[414, 431]),
            (&many, &[431]),
            (&long, &[431]),
        ] {
            let mut client = TestClient::connect(server.address).await;
            client.send(request).await;
            let (head, body) = client.answer().await;
            let shown = &request[..request.len().min(40)];
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
            assert!(status.is_some_and(|status| statuses.contains(&status)), "{shown:?}: {head}");
            assert_eq!(body, if status == Some(200) { "0" } else { "" }, "{shown:?}");
        }
        assert_eq!(server.echo.served.load(Ordering::SeqCst), 1);
        assert_eq!(server.echo.counted(8).await, [400, 400, 400, 400, 200, 431, 431, 431]);
    }

    #[tokio::test]
    async fn slow_body_times_out() {
        let limits = HttpLimits { body_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let server = server(limits).await;
        let mut client = TestClient::connect(server.address).await;
        client.send(&post(100, "the rest never comes")).await;
        let (head, body) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 408"), "{head}");
        assert_eq!(body, "the request's body didn't arrive within 20ms");
        assert_eq!(server.echo.counted(1).await, [408]);
    }

    #[tokio::test]
    async fn slow_headers_are_cut_off() {
        let limits = HttpLimits { header_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let server = server(limits).await;
        let mut client = TestClient::connect(server.address).await;
        client.send("GET / HTTP/1.1\r\nhost: te").await;
        client.closed().await;
        assert_eq!(server.echo.served.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn idle_connection_is_closed() {
        let limits = HttpLimits { idle_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let server = server(limits).await;
        let mut client = TestClient::connect(server.address).await;
        client.send(&post(0, "")).await;
        client.answer().await;
        client.closed().await;
    }

    /// One place, and connections that are idle make room at once.
    const ONE: fn() -> HttpLimits =
        || HttpLimits { connections_max: 1, spared_idle: Duration::ZERO, ..HttpLimits::default() };

    #[tokio::test]
    async fn surplus_connection_replaces_an_idle_one() {
        let server = server(ONE()).await;
        let mut idle = TestClient::connect(server.address).await;
        idle.send(&post(0, "")).await;
        idle.answer().await;
        let mut silent = TestClient::connect(server.address).await;
        idle.closed().await;
        let mut half = TestClient::connect(server.address).await;
        silent.closed().await;
        half.send("POST / HTTP/1.1\r\nhost: te").await;
        let mut last = TestClient::connect(server.address).await;
        half.closed().await;
        last.send(&post(4, "four")).await;
        assert_eq!(last.answer().await.1, "4");
    }

    #[tokio::test]
    async fn surplus_connection_is_refused_when_all_are_busy() {
        let server = server(ONE()).await;
        let mut busy = TestClient::connect(server.address).await;
        busy.send(WAIT).await;
        server.echo.waiting.notified().await;
        for _ in 0..REFUSALS_MAX * 2 {
            let mut refused = TestClient::connect(server.address).await;
            refused.send(&post(4, "four")).await;
            let (head, body) = refused.answer().await;
            assert!(head.starts_with("HTTP/1.1 503"), "{head}");
            assert!(head.contains("retry-after: 1") && head.contains("connection: close"), "{head}");
            assert_eq!(body, "too many connections; try again\n");
            refused.closed().await;
        }
        server.echo.go_on.notify_one();
        assert_eq!(busy.answer().await.1, "0");
        assert_eq!(server.echo.served.load(Ordering::SeqCst), 1);
        let statuses = server.echo.counted(REFUSALS_MAX * 2 + 1).await;
        assert_eq!(statuses.iter().filter(|status| **status == 503).count(), REFUSALS_MAX * 2);
    }

    #[tokio::test]
    async fn new_connection_is_spared() {
        let server = server(HttpLimits { spared_idle: Duration::from_mins(1), ..ONE() }).await;
        let mut first = TestClient::connect(server.address).await;
        let mut second = TestClient::connect(server.address).await;
        second.send(&post(0, "")).await;
        assert!(second.answer().await.0.starts_with("HTTP/1.1 503"));
        first.send(&post(4, "four")).await;
        assert_eq!(first.answer().await.1, "4");
    }

    #[tokio::test(start_paused = true)]
    async fn longest_idle_connections_make_room_first() {
        let limits = HttpLimits { connections_max: 200, ..HttpLimits::default() };
        let mut places = HashMap::new();
        let watches: Vec<_> = (0..10).map(|_| Arc::new(ConnectionWatch::new())).collect();
        for watch in &watches {
            places.insert(tokio::spawn(async {}).id(), Arc::clone(watch));
            // In this order they fall idle, a second apart; the first one is being answered.
            tokio::time::advance(Duration::from_secs(1)).await;
            watch.finish();
        }
        watches[0].begin();
        assert_eq!(make_room(&places, &limits, Instant::now()), 4, "one of 64, rounded up");
        let mut ended = Vec::new();
        for (n, watch) in watches.iter().enumerate() {
            if timeout(Duration::ZERO, watch.overstayed(&limits)).await.is_ok() {
                ended.push(n);
            }
        }
        assert_eq!(ended, [1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn client_that_is_still_sending_receives_its_refusal() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = TestClient::connect(server.address).await;
        // More than the system buffers for a server that doesn't read.
        let body = "x".repeat(32 << 20);
        client.send(&post(body.len(), &body)).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
        client.send(&post(4, "four")).await;
        assert_eq!(client.answer().await.1, "4", "the connection goes on");
    }

    #[tokio::test]
    async fn client_that_awaits_continue_is_refused_without_it() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = TestClient::connect(server.address).await;
        let expect = "POST / HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
        client.send(expect).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
        client.closed().await;
    }

    #[tokio::test]
    async fn silent_client_with_a_refused_body_is_closed_soon() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = TestClient::connect(server.address).await;
        client.send(&post(5, "")).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
        timeout(HttpLimits::default().idle_timeout / 2, client.closed()).await.unwrap();
    }

    #[tokio::test]
    async fn drain_closes_idle_connections_and_finishes_requests() {
        let server = server(HttpLimits::default()).await;
        let mut idle = TestClient::connect(server.address).await;
        idle.send(&post(0, "")).await;
        idle.answer().await;
        let mut busy = TestClient::connect(server.address).await;
        busy.send(WAIT).await;
        server.echo.waiting.notified().await;

        server.shutdown.cancel();
        idle.closed().await;
        assert!(!server.task.is_finished());

        server.echo.go_on.notify_one();
        let (head, body) = busy.answer().await;
        assert!(head.to_lowercase().contains("connection: close"), "{head}");
        assert_eq!(body, "0");
        server.task.await.unwrap();
    }

    /// Failure: a gateway loses requests that it sends on connections which the end of the lame-duck time closes.
    #[tokio::test]
    async fn lame_duck_serves_and_announces_each_close() {
        let shutdown = Shutdown::after(CancellationToken::new());
        let server = server_until(HttpLimits::default(), shutdown.clone()).await;
        let mut kept = TestClient::connect(server.address).await;
        kept.send(&post(0, "")).await;
        assert!(!kept.answer().await.0.to_lowercase().contains("connection: close"));

        shutdown.requested.cancel();
        for mut client in [kept, TestClient::connect(server.address).await] {
            loop {
                client.send(&post(4, "four")).await;
                let (head, body) = client.answer().await;
                assert_eq!(body, "4");
                // The server may not have noticed yet.
                if head.to_lowercase().contains("connection: close") {
                    break;
                }
            }
            client.closed().await;
        }
        assert!(!server.task.is_finished());
        shutdown.closing.cancel();
        server.task.await.unwrap();
        assert!(TcpStream::connect(server.address).await.is_err());
    }

    #[tokio::test]
    async fn endless_request_is_cut_off_after_the_drain_limit() {
        let server = server(HttpLimits::default()).await;
        let mut client = TestClient::connect(server.address).await;
        client.send(WAIT).await;
        server.echo.waiting.notified().await;
        // From here only time passes, so it may run ahead.
        tokio::time::pause();
        server.shutdown.cancel();
        server.task.await.unwrap();
        client.closed().await;
    }

    /// Failure: connections of clients that disappeared fill the server until the idle timeout.
    #[tokio::test]
    async fn peers_of_silent_connections_are_probed() {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        set_options(&stream);
        let options = SockRef::from(&stream);
        assert!(options.keepalive().unwrap() && options.tcp_nodelay().unwrap());
        let (after, between) =
            (options.tcp_keepalive_time().unwrap(), options.tcp_keepalive_interval().unwrap());
        let noticed = after + between * options.tcp_keepalive_retries().unwrap();
        assert!(noticed <= Duration::from_mins(2), "{noticed:?}");
    }

    #[test]
    fn errors_of_one_connection_cause_no_pause() {
        assert!(concerns_one_connection(&io::ErrorKind::ConnectionAborted.into()));
        let too_many_open_files = io::Error::from_raw_os_error(24);
        assert!(!concerns_one_connection(&too_many_open_files));
    }

    #[tokio::test]
    async fn taken_address_says_what_to_do() {
        let holder = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let taken = holder.local_addr().unwrap();
        let error = bind(taken).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("can't listen on {taken}; ")), "{error}");
        assert!(error.ends_with("or configure another port (0 picks a free one)"), "{error}");
    }

    #[tokio::test]
    async fn foreign_address_says_what_to_do() {
        let foreign = SocketAddr::from(([203, 0, 113, 1], 0));
        let error = bind(foreign).await.unwrap_err().to_string();
        assert!(error.contains("203.0.113.1 isn't an address of this machine"), "{error}");
    }
}
