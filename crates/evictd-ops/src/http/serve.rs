//! Accepts connections, makes room for them, serves them, and lets them leave.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{Id, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::body::Body;
use super::watch::{Watch, WatchedStream};
use super::{Handler, HttpLimits, Reply, Request, StatusCode, header, text};

/// How long a server that shuts down waits for requests in flight.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Most bytes buffered per connection while headers arrive. hyper's default of 400 KiB, times ten
/// thousand connections, would be a way to exhaust memory.
const BUFFER_BYTES_MAX: usize = 64 * 1024;

/// Connections at once that are told that there are too many. Further ones are closed without a word.
const REFUSALS_MAX: usize = 64;

/// How long a connection may take to be told that.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);

/// One of so many connections makes room at once, so that a stream of new ones doesn't look for each anew.
const ROOM_SHARE: usize = 64;

/// How long to wait for a connection that makes room. It has nothing to do but to end.
const ROOM_LIMIT: Duration = Duration::from_millis(100);

/// First pause after the system refused a connection for lack of something; doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Serves `handler` until `shutdown` is cancelled; then stops accepting, lets requests in flight
/// finish, and returns when the last connection has ended, or after [`DRAIN_LIMIT`].
///
/// Dropping the returned future ends all its connections.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    handler: H,
    limits: HttpLimits,
    shutdown: CancellationToken,
) {
    let mut connections = JoinSet::new();
    shutdown.run_until_cancelled(accept(&listener, handler, limits, &shutdown, &mut connections)).await;
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_LIMIT, drained).await.is_err() {
        tracing::warn!(open = connections.len(), "connections were cut off: the drain took too long");
    }
    // What is left in the set is aborted as it is dropped.
}

async fn accept<H: Handler>(
    listener: &TcpListener,
    handler: H,
    limits: HttpLimits,
    shutdown: &CancellationToken,
    connections: &mut JoinSet<()>,
) -> Infallible {
    let mut places = Places::new(limits);
    let mut pause = FIRST_PAUSE;
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) if is_about_one_connection(&error) => {
                tracing::debug!(%error, "a connection ended before it was accepted");
                continue;
            }
            Err(error) => {
                tracing::warn!(%error, ?pause, "can't accept connections; is the limit of open files too low?");
                places.make_room(Instant::now());
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
                continue;
            }
        };
        pause = FIRST_PAUSE;
        while let Some(ended) = connections.try_join_next_with_id() {
            places.leave(ended.map_or_else(|error| error.id(), |(id, ())| id));
        }
        let watch = Arc::new(Watch::new());
        // A token per connection: polling a shared one would make all of them meet at one lock.
        let draining = shutdown.child_token();
        let connection = Connection { remote, limits, watch: Arc::clone(&watch), draining };
        match places.take().await {
            Place::Free(permit) => {
                let task = connections.spawn(connection.run(stream, handler.clone(), permit));
                places.enter(task.id(), watch);
            }
            Place::ToBeRefused(permit) => {
                let limits =
                    HttpLimits { header_timeout: REFUSAL_LIMIT, idle_timeout: REFUSAL_LIMIT, ..limits };
                let refusal = Refusal(handler.clone());
                connections.spawn(Connection { limits, ..connection }.run(stream, refusal, permit));
            }
            Place::None => {}
        }
    }
}

/// How many connections there may be, and who could make room.
struct Places {
    limits: HttpLimits,
    free: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    taken: HashMap<Id, Arc<Watch>>,
    /// That there are too many was logged.
    complained: bool,
}

/// Where a new connection goes.
enum Place {
    Free(OwnedSemaphorePermit),
    ToBeRefused(OwnedSemaphorePermit),
    None,
}

impl Places {
    fn new(limits: HttpLimits) -> Self {
        Self {
            limits,
            free: Arc::new(Semaphore::new(limits.connections_max)),
            refusals: Arc::new(Semaphore::new(REFUSALS_MAX)),
            taken: HashMap::new(),
            complained: false,
        }
    }

    fn enter(&mut self, connection: Id, watch: Arc<Watch>) {
        self.taken.insert(connection, watch);
    }

    fn leave(&mut self, connection: Id) {
        self.taken.remove(&connection);
    }

    async fn take(&mut self) -> Place {
        if let Ok(permit) = Arc::clone(&self.free).try_acquire_owned() {
            self.complained = false;
            return Place::Free(permit);
        }
        if self.make_room(Instant::now()) > 0
            && let Ok(Ok(permit)) =
                tokio::time::timeout(ROOM_LIMIT, Arc::clone(&self.free).acquire_owned()).await
        {
            return Place::Free(permit);
        }
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(
                connections_max = self.limits.connections_max,
                "all connections are at work; further ones are refused"
            );
        }
        match Arc::clone(&self.refusals).try_acquire_owned() {
            Ok(permit) => Place::ToBeRefused(permit),
            Err(_) => Place::None,
        }
    }

    /// Asks the connections that have waited longest for a request to end, and tells how many it asked.
    fn make_room(&self, now: Instant) -> usize {
        let spared = self.limits.spared_idle;
        let mut waiting: Vec<(Instant, &Watch)> = self
            .taken
            .values()
            .filter_map(|watch| Some((watch.waiting_since()?, &**watch)))
            .filter(|(since, _)| now.duration_since(*since) >= spared)
            .collect();
        let share = self.limits.connections_max.div_ceil(ROOM_SHARE).min(waiting.len());
        if share < waiting.len() {
            waiting.select_nth_unstable_by_key(share, |(since, _)| *since);
        }
        for (_, watch) in &waiting[..share] {
            watch.make_room();
        }
        share
    }
}

/// Answers whoever came when there was no place.
#[derive(Clone)]
struct Refusal<H>(H);

impl<H: Handler> Handler for Refusal<H> {
    async fn handle(&self, _: Request) -> Reply {
        let mut reply = text(StatusCode::SERVICE_UNAVAILABLE, "too many connections; try again\n");
        reply.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        reply.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        reply
    }

    fn answered(&self, status: StatusCode) {
        self.0.answered(status);
    }
}

/// Whether the next connection may well be accepted at once.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

struct Connection {
    remote: SocketAddr,
    limits: HttpLimits,
    watch: Arc<Watch>,
    draining: CancellationToken,
}

impl Connection {
    /// Serves it to its end. The permit frees its place then, however it ends.
    async fn run<H: Handler>(self, stream: TcpStream, handler: H, _permit: OwnedSemaphorePermit) {
        // Without it, answers would wait for the client's acknowledgement of the ones before.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "can't set TCP_NODELAY");
        }
        let Self { remote, limits, watch, draining } = self;
        let server = handler.clone();
        let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
            watch.begin();
            let (handler, watch) = (handler.clone(), Arc::clone(&watch));
            async move {
                let (parts, body) = request.into_parts();
                let body = Body::new(body, &parts);
                let reply = handler.handle(Request { parts, remote, body, limits }).await;
                handler.answered(reply.status());
                watch.finish();
                Ok::<_, Infallible>(reply)
            }
        });
        let io = TokioIo::new(WatchedStream { stream, watch: Arc::clone(&watch) });
        let connection = http1::Builder::new()
            .header_read_timeout(None) // the watch does it
            .max_buf_size(BUFFER_BYTES_MAX)
            // A client that says "no more from me" after its request still waits for the answer.
            .half_close(true)
            .serve_connection(io, service);
        let mut connection = std::pin::pin!(connection);
        let mut draining = std::pin::pin!(draining.cancelled());
        let mut overstayed = std::pin::pin!(watch.overstayed(&limits));
        let mut told = false;
        loop {
            tokio::select! {
                biased;
                ended = &mut connection => {
                    if let Err(error) = ended {
                        if let Some(status) = answered_by_hyper(&error) {
                            server.answered(status);
                        }
                        tracing::debug!(%remote, %error, "a connection ended with an error");
                    }
                    return;
                }
                () = &mut draining, if !told => {
                    told = true;
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

/// How hyper has answered what it can't read as a request.
fn answered_by_hyper(error: &hyper::Error) -> Option<StatusCode> {
    if error.is_parse_too_large() {
        // Or 414, which comes to the same.
        Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
    } else {
        (error.is_parse() && !error.is_parse_version_h2()).then_some(StatusCode::BAD_REQUEST)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::sync::{Notify, watch};
    use tokio::task::JoinHandle;

    use super::super::{Reply, StatusCode, bind, json, text};
    use super::*;

    /// Answers `/wait` when told to, and everything else with the length of the body.
    #[derive(Clone, Default)]
    struct Echo {
        served: Arc<AtomicUsize>,
        waiting: Arc<Notify>,
        go_on: Arc<Notify>,
        /// Of all answers.
        statuses: watch::Sender<Vec<u16>>,
    }

    impl Echo {
        async fn is_told_of(&self, answers: usize) -> Vec<u16> {
            self.statuses.subscribe().wait_for(|told| told.len() >= answers).await.unwrap().clone()
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

    struct Server {
        address: SocketAddr,
        echo: Echo,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    async fn server(limits: HttpLimits) -> Server {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (echo, shutdown) = (Echo::default(), CancellationToken::new());
        let task = tokio::spawn(serve(listener, echo.clone(), limits, shutdown.clone()));
        Server { address, echo, shutdown, task }
    }

    struct Client(BufReader<TcpStream>);

    impl Client {
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
    async fn a_connection_serves_one_request_after_another() {
        let server = server(HttpLimits::default()).await;
        let mut client = Client::connect(server.address).await;
        for body in ["", "four", "seven.."] {
            client.send(&post(body.len(), body)).await;
            let (head, answer) = client.answer().await;
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert_eq!(answer, body.len().to_string());
        }
    }

    #[tokio::test]
    async fn a_client_that_has_said_all_it_will_say_still_gets_its_answer() {
        let server = server(HttpLimits::default()).await;
        let mut client = Client::connect(server.address).await;
        client.send(&post(4, "four")).await;
        client.0.get_mut().shutdown().await.unwrap();
        assert_eq!(client.answer().await.1, "4");
    }

    #[tokio::test]
    async fn a_body_in_many_pieces_is_put_together() {
        let server = server(HttpLimits::default()).await;
        let mut client = Client::connect(server.address).await;
        client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n").await;
        for _ in 0..50 {
            client.send("4\r\nfour\r\n").await;
        }
        client.send("0\r\n\r\n").await;
        assert_eq!(client.answer().await.1, "200");
    }

    #[tokio::test]
    async fn an_oversized_body_is_refused_by_its_announcement() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = Client::connect(server.address).await;
        client.send(&post(5, "")).await;
        let (head, body) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 413"), "{head}");
        assert_eq!(body, "the request's body is larger than 4 bytes");
    }

    #[tokio::test]
    async fn an_oversized_body_without_announcement_is_refused_too() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = Client::connect(server.address).await;
        client.send("POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n").await;
        client.send("3\r\nabc\r\n2\r\nde\r\n").await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
    }

    #[tokio::test]
    async fn what_is_no_http_request_is_refused_without_a_body_and_reaches_nobody() {
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
            let mut client = Client::connect(server.address).await;
            client.send(request).await;
            let (head, body) = client.answer().await;
            let shown = &request[..request.len().min(40)];
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
            assert!(status.is_some_and(|status| statuses.contains(&status)), "{shown:?}: {head}");
            assert_eq!(body, if status == Some(200) { "0" } else { "" }, "{shown:?}");
        }
        assert_eq!(server.echo.served.load(Ordering::SeqCst), 1);
        assert_eq!(server.echo.is_told_of(8).await, [400, 400, 400, 400, 200, 431, 431, 431]);
    }

    #[tokio::test]
    async fn a_slow_body_is_given_up() {
        let limits = HttpLimits { body_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let server = server(limits).await;
        let mut client = Client::connect(server.address).await;
        client.send(&post(100, "the rest never comes")).await;
        let (head, body) = client.answer().await;
        assert!(head.starts_with("HTTP/1.1 408"), "{head}");
        assert_eq!(body, "the request's body didn't arrive within 20ms");
        assert_eq!(server.echo.is_told_of(1).await, [408]);
    }

    #[tokio::test]
    async fn slow_headers_are_cut_off() {
        let limits = HttpLimits { header_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let server = server(limits).await;
        let mut client = Client::connect(server.address).await;
        client.send("GET / HTTP/1.1\r\nhost: te").await;
        client.closed().await;
        assert_eq!(server.echo.served.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed() {
        let limits = HttpLimits { idle_timeout: Duration::from_millis(20), ..HttpLimits::default() };
        let server = server(limits).await;
        let mut client = Client::connect(server.address).await;
        client.send(&post(0, "")).await;
        client.answer().await;
        client.closed().await;
    }

    /// One place, and connections that are idle make room at once.
    const ONE: fn() -> HttpLimits =
        || HttpLimits { connections_max: 1, spared_idle: Duration::ZERO, ..HttpLimits::default() };

    #[tokio::test]
    async fn a_connection_over_the_limit_takes_the_place_of_an_idle_one() {
        let server = server(ONE()).await;
        let mut idle = Client::connect(server.address).await;
        idle.send(&post(0, "")).await;
        idle.answer().await;
        let mut silent = Client::connect(server.address).await;
        idle.closed().await;
        let mut half = Client::connect(server.address).await;
        silent.closed().await;
        half.send("POST / HTTP/1.1\r\nhost: te").await;
        let mut last = Client::connect(server.address).await;
        half.closed().await;
        last.send(&post(4, "four")).await;
        assert_eq!(last.answer().await.1, "4");
    }

    #[tokio::test]
    async fn a_connection_over_the_limit_is_refused_when_all_are_at_work() {
        let server = server(ONE()).await;
        let mut busy = Client::connect(server.address).await;
        busy.send(WAIT).await;
        server.echo.waiting.notified().await;
        for _ in 0..REFUSALS_MAX * 2 {
            let mut refused = Client::connect(server.address).await;
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
        let told = server.echo.is_told_of(REFUSALS_MAX * 2 + 1).await;
        assert_eq!(told.iter().filter(|status| **status == 503).count(), REFUSALS_MAX * 2);
    }

    #[tokio::test]
    async fn a_connection_that_has_just_come_is_spared() {
        let server = server(HttpLimits { spared_idle: Duration::from_mins(1), ..ONE() }).await;
        let mut first = Client::connect(server.address).await;
        let mut second = Client::connect(server.address).await;
        second.send(&post(0, "")).await;
        assert!(second.answer().await.0.starts_with("HTTP/1.1 503"));
        first.send(&post(4, "four")).await;
        assert_eq!(first.answer().await.1, "4");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_waited_longest_makes_room_first() {
        let limits = HttpLimits { connections_max: 200, ..HttpLimits::default() };
        let mut places = Places::new(limits);
        let watches: Vec<Arc<Watch>> = (0..10).map(|_| Arc::new(Watch::new())).collect();
        for watch in &watches {
            places.enter(tokio::spawn(async {}).id(), Arc::clone(watch));
            // In this order they fall idle, a second apart; the first one is being answered.
            tokio::time::advance(Duration::from_secs(1)).await;
            watch.finish();
        }
        watches[0].begin();
        assert_eq!(places.make_room(Instant::now()), 4, "one of 64, rounded up");
        let mut asked = Vec::new();
        for (n, watch) in watches.iter().enumerate() {
            if tokio::time::timeout(Duration::ZERO, watch.overstayed(&limits)).await.is_ok() {
                asked.push(n);
            }
        }
        assert_eq!(asked, [1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn a_client_that_is_still_sending_when_it_is_refused_reads_why() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = Client::connect(server.address).await;
        // More than the system takes in for a server that doesn't read.
        let body = "x".repeat(32 << 20);
        client.send(&post(body.len(), &body)).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
        client.send(&post(4, "four")).await;
        assert_eq!(client.answer().await.1, "4", "the connection is as good as before");
    }

    #[tokio::test]
    async fn a_client_that_asks_before_it_sends_is_not_told_to() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = Client::connect(server.address).await;
        let expect = "POST / HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
        client.send(expect).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
        client.closed().await;
    }

    #[tokio::test]
    async fn a_client_that_announces_too_much_and_sends_nothing_is_not_waited_for_long() {
        let server = server(HttpLimits { body_bytes_max: 4, ..HttpLimits::default() }).await;
        let mut client = Client::connect(server.address).await;
        client.send(&post(5, "")).await;
        assert!(client.answer().await.0.starts_with("HTTP/1.1 413"));
        tokio::time::timeout(HttpLimits::default().idle_timeout / 2, client.closed()).await.unwrap();
    }

    #[tokio::test]
    async fn a_shutdown_closes_idle_connections_and_lets_requests_in_flight_finish() {
        let server = server(HttpLimits::default()).await;
        let mut idle = Client::connect(server.address).await;
        idle.send(&post(0, "")).await;
        idle.answer().await;
        let mut busy = Client::connect(server.address).await;
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

    #[tokio::test]
    async fn a_request_that_never_ends_is_cut_off_after_the_drain_limit() {
        let server = server(HttpLimits::default()).await;
        let mut client = Client::connect(server.address).await;
        client.send(WAIT).await;
        server.echo.waiting.notified().await;
        // From here nothing happens any more but time, so that it may run ahead.
        tokio::time::pause();
        server.shutdown.cancel();
        server.task.await.unwrap();
        client.closed().await;
    }

    #[test]
    fn only_errors_of_one_connection_are_passed_over_without_a_pause() {
        assert!(is_about_one_connection(&io::ErrorKind::ConnectionAborted.into()));
        let too_many_open_files = io::Error::from_raw_os_error(24);
        assert!(!is_about_one_connection(&too_many_open_files));
    }

    #[tokio::test]
    async fn a_taken_address_says_what_to_do() {
        let holder = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let taken = holder.local_addr().unwrap();
        let error = bind(taken).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("can't listen on {taken}; ")), "{error}");
        assert!(error.ends_with("or configure another port (0 picks a free one)"), "{error}");
    }

    #[tokio::test]
    async fn a_foreign_address_says_what_to_do() {
        let foreign = SocketAddr::from(([203, 0, 113, 1], 0));
        let error = bind(foreign).await.unwrap_err().to_string();
        assert!(error.contains("203.0.113.1 isn't an address of this machine"), "{error}");
    }
}
