//! Sending a request, and sending it again when that can help.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evictd_wire::api::error::JSON;
use evictd_wire::api::prefer::{self, PREFER};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, DefaultConnector, NextTimeout, Transport,
};

use super::settings::{Server, Settings};

/// How long a request is tried again, counted from its first attempt, as Unkey's SDKs do.
const RETRY_FOR: Duration = Duration::from_secs(10);

/// The first pause between attempts; each further one is half as long again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How long one attempt may take.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long one attempt may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A request, ready to be sent.
#[derive(Debug)]
pub(super) struct Call {
    /// The endpoint.
    pub(super) path: &'static str,
    /// The JSON.
    pub(super) body: Vec<u8>,
    /// Who answers it.
    pub(super) server: Server,
    /// What comes of sending it twice.
    pub(super) repeat: Repeat,
    /// How long the server may hold the answer back until every region has forgotten the old state. With it, the
    /// answer says how far the change has come.
    pub(super) prefer: Option<Duration>,
}

/// What comes of sending a request again after it had been carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Repeat {
    /// The same answer.
    Harmless,
    /// "Not found": the thing is deleted already.
    FindsNothing,
    /// One more thing was created.
    Duplicates,
}

/// An answer, whatever its status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Answer {
    /// The HTTP status.
    pub(super) status: u16,
    /// The body.
    pub(super) body: Vec<u8>,
    /// When to come again, if the server says so.
    pub(super) retry_after: Option<Duration>,
}

/// No answer.
#[derive(Debug)]
pub(super) struct Lost {
    /// How far the request came.
    pub(super) progress: Progress,
    /// What happened.
    pub(super) why: String,
}

/// How far a request without an answer came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// It couldn't even be written down: the URL or the root key isn't one. Trying again is no use.
    Impossible,
    /// The server never received it.
    NotSent,
    /// The server may have received it, and carried it out.
    MaybeDone,
}

/// What came of a request.
#[derive(Debug)]
pub(super) struct Sent {
    /// The last attempt's outcome.
    pub(super) result: Result<Answer, Lost>,
    /// Whether an earlier attempt may have been carried out.
    pub(super) maybe_done_before: bool,
}

/// What sending needs of the world; tests bring their own.
pub(super) trait World {
    /// Sends once.
    fn attempt(&mut self, call: &Call) -> Result<Answer, Lost>;
    /// Time since some fixed moment before the first attempt.
    fn elapsed(&self) -> Duration;
    /// Waits before the next attempt, and says why if that goes on for long: `why` tells what the server did.
    fn pause(&mut self, pause: Duration, why: &str);
    /// Waits. False if that was cut short, because the user wants no more.
    fn rest(&mut self, pause: Duration) -> bool;
}

/// Sends, and sends again on 5XX and lost connections, for ten seconds.
///
/// A request that would create a second thing isn't repeated once the server may have received it. Nor is it
/// on 5XX: the server, or a proxy before it, may fail after the thing was created.
pub(super) fn send(world: &mut impl World, call: &Call) -> Sent {
    let mut maybe_done_before = false;
    let (give_up_at, mut pause) = (world.elapsed() + RETRY_FOR, FIRST_PAUSE);
    loop {
        let result = world.attempt(call);
        let (why, progress) = match &result {
            Ok(answer) if answer.status >= 500 => {
                (format!("answered {}", answer.status), Progress::MaybeDone)
            }
            Ok(_) => return Sent { result, maybe_done_before },
            Err(lost) => (format!("doesn't answer ({})", lost.why), lost.progress),
        };
        let again = match progress {
            Progress::Impossible => false,
            Progress::NotSent => true,
            Progress::MaybeDone => call.repeat != Repeat::Duplicates,
        };
        if !again || world.elapsed() + pause > give_up_at {
            return Sent { result, maybe_done_before };
        }
        maybe_done_before |= progress == Progress::MaybeDone;
        world.pause(pause, &why);
        pause = (pause * 3 / 2).min(LONGEST_PAUSE);
    }
}

/// The real world.
pub(super) struct Http<'a> {
    agent: ureq::Agent,
    /// Whether anything of the request under way has left.
    departed: Departed,
    settings: &'a Settings,
    started: Instant,
    said: bool,
}

impl<'a> Http<'a> {
    /// Connects only when something is sent.
    pub(super) fn new(settings: &'a Settings) -> Self {
        let mut config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(ATTEMPT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .accept(JSON)
            .user_agent(concat!("evictd/", env!("CARGO_PKG_VERSION")));
        if is_loopback(&settings.url) {
            // The environment's proxy isn't meant for this machine, nor is the root key for the proxy.
            config = config.proxy(None);
        }
        let departed = Departed::default();
        let connector = DefaultConnector::new().chain(departed.clone());
        let agent = ureq::Agent::with_parts(config.build(), connector, DefaultResolver::default());
        Self { agent, departed, settings, started: Instant::now(), said: false }
    }
}

impl World for Http<'_> {
    fn attempt(&mut self, call: &Call) -> Result<Answer, Lost> {
        let mut request = self
            .agent
            .post(format!("{}{}", self.settings.url, call.path))
            .header("Content-Type", JSON)
            .header("Authorization", format!("Bearer {}", self.settings.root_key.expose()));
        if let Some(prefer) = call.prefer {
            request = request.header(PREFER, prefer::applied(prefer));
        }
        self.departed.0.store(false, Ordering::Relaxed);
        let mut response = request
            .send(call.body.as_slice())
            .map_err(|error| lost(&error, self.departed.0.load(Ordering::Relaxed)))?;
        let status = response.status().as_u16();
        let retry_after =
            response.headers().get("retry-after").and_then(|value| seconds(value.to_str().ok()?));
        let body = response.body_mut().read_to_vec().map_err(|error| lost(&error, true))?;
        Ok(Answer { status, body, retry_after })
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    fn pause(&mut self, pause: Duration, why: &str) {
        // Ten silent seconds look like a hang.
        if !self.said && self.started.elapsed() > Duration::from_secs(1) {
            self.said = true;
            eprintln!("{} {why}; trying for up to {} s", self.settings.url, RETRY_FOR.as_secs());
        }
        self.rest(pause);
    }

    fn rest(&mut self, pause: Duration) -> bool {
        std::thread::sleep(pause);
        true
    }
}

/// The form of `Retry-After` that APIs send; the other one is a date.
fn seconds(retry_after: &str) -> Option<Duration> {
    retry_after.trim().parse().ok().map(Duration::from_secs)
}

/// Whether anything was written to a connection once it was there: to find the host, to connect and to agree on TLS
/// come before, and an error doesn't tell which of them failed.
#[derive(Clone, Default, Debug)]
struct Departed(Arc<AtomicBool>);

impl<Out: Transport> Connector<Out> for Departed {
    type Out = Watched<Out>;

    fn connect(
        &self,
        _: &ConnectionDetails<'_>,
        chained: Option<Out>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        Ok(chained.map(|inner| Watched { inner, departed: self.clone() }))
    }
}

/// A connection that notes when something is written to it.
#[derive(Debug)]
struct Watched<Inner> {
    inner: Inner,
    departed: Departed,
}

impl<Inner: Transport> Transport for Watched<Inner> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        // Before it is known to work: a part may have left.
        self.departed.0.store(true, Ordering::Relaxed);
        self.inner.transmit_output(amount, timeout)
    }

    fn maybe_await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.inner.maybe_await_input(timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}

fn lost(error: &ureq::Error, departed: bool) -> Lost {
    let progress = match error {
        _ if departed => Progress::MaybeDone,
        ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => Progress::Impossible,
        _ => Progress::NotSent,
    };
    let why = match error {
        // What rustls says names neither itself nor what it was about.
        ureq::Error::Io(error) if !departed && error.kind() == io::ErrorKind::InvalidData => {
            format!("no agreement on TLS, is it an http:// URL? ({error})")
        }
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    };
    Lost { progress, why }
}

/// Whether a URL names this machine.
fn is_loopback(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::net::TcpListener;

    use evictd_wire::api::secret::Secret;

    use super::*;

    /// A world that plays what it was given, the last of it for ever. Attempts take no time.
    struct FakeWorld {
        outcomes: VecDeque<Result<u16, Progress>>,
        now: Duration,
        attempts: usize,
    }

    impl FakeWorld {
        /// Statuses, and losses by how far the request came.
        fn playing(outcomes: impl IntoIterator<Item = Result<u16, Progress>>) -> Self {
            Self { outcomes: outcomes.into_iter().collect(), now: Duration::ZERO, attempts: 0 }
        }
    }

    impl World for FakeWorld {
        fn attempt(&mut self, _: &Call) -> Result<Answer, Lost> {
            self.attempts += 1;
            let next = if self.outcomes.len() > 1 {
                self.outcomes.pop_front()
            } else {
                self.outcomes.front().copied()
            };
            match next.unwrap() {
                Ok(status) => Ok(Answer { status, body: Vec::new(), retry_after: None }),
                Err(progress) => Err(Lost { progress, why: "lost".into() }),
            }
        }

        fn elapsed(&self) -> Duration {
            self.now
        }

        fn pause(&mut self, pause: Duration, _: &str) {
            self.rest(pause);
        }

        fn rest(&mut self, pause: Duration) -> bool {
            self.now += pause;
            true
        }
    }

    fn call(repeat: Repeat) -> Call {
        Call { path: "/v2/test", body: b"{}".to_vec(), server: Server::Publisher, repeat, prefer: None }
    }

    #[test]
    fn an_answer_ends_the_attempts() {
        for status in [200, 400, 401, 404, 412, 429] {
            let mut world = FakeWorld::playing([Ok(status)]);
            let sent = send(&mut world, &call(Repeat::Harmless));
            assert_eq!(
                (sent.result.unwrap().status, world.attempts, sent.maybe_done_before),
                (status, 1, false)
            );
        }
    }

    #[test]
    fn failures_of_the_server_are_retried_for_ten_seconds() {
        for repeat in [Repeat::Harmless, Repeat::FindsNothing] {
            let mut world = FakeWorld::playing([Ok(500)]);
            let sent = send(&mut world, &call(repeat));
            assert_eq!(sent.result.unwrap().status, 500);
            assert!(world.now <= RETRY_FOR && world.now + LONGEST_PAUSE > RETRY_FOR, "{:?}", world.now);
            assert!((14..=18).contains(&world.attempts), "{}", world.attempts);
        }
    }

    #[test]
    fn a_server_that_comes_back_is_reached() {
        let mut world = FakeWorld::playing([Err(Progress::NotSent), Err(Progress::NotSent), Ok(200)]);
        let sent = send(&mut world, &call(Repeat::Duplicates));
        assert_eq!((sent.result.unwrap().status, sent.maybe_done_before), (200, false));
    }

    #[test]
    fn a_deletion_remembers_that_it_may_have_been_carried_out() {
        for first in [Err(Progress::MaybeDone), Ok(503)] {
            let mut world = FakeWorld::playing([first, Ok(404)]);
            let sent = send(&mut world, &call(Repeat::FindsNothing));
            assert_eq!((sent.result.unwrap().status, sent.maybe_done_before), (404, true));
        }
    }

    #[test]
    fn nothing_is_created_twice_because_an_answer_was_lost() {
        let mut world = FakeWorld::playing([Err(Progress::MaybeDone), Ok(200)]);
        let sent = send(&mut world, &call(Repeat::Duplicates));
        assert_eq!(sent.result.unwrap_err().progress, Progress::MaybeDone);
        assert_eq!(world.attempts, 1);
    }

    #[test]
    fn nothing_is_created_twice_because_the_server_failed_after_creating_it() {
        for status in [500, 502, 503, 504] {
            let mut world = FakeWorld::playing([Ok(status), Ok(200)]);
            let sent = send(&mut world, &call(Repeat::Duplicates));
            assert_eq!((sent.result.unwrap().status, world.attempts), (status, 1));
        }
    }

    #[test]
    fn what_cant_be_sent_is_tried_once_and_never_shown() {
        for (url, root_key) in [("http://a b", "unkey_hunter2"), ("http://127.0.0.1:1", "unkey_\nhunter2")] {
            let settings = Settings { root_key: Secret::new(root_key), ..settings(url.to_owned()) };
            let sent = send(&mut Http::new(&settings), &call(Repeat::Harmless));
            let lost = sent.result.unwrap_err();
            assert_eq!(lost.progress, Progress::Impossible, "{lost:?}");
            assert!(!lost.why.contains("hunter2"), "{lost:?}");
        }
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for url in ["http://127.0.0.1:7070", "http://localhost", "https://LOCALHOST:1/x", "http://[::1]:7070"]
        {
            assert!(is_loopback(url), "{url}");
        }
        for url in
            ["http://localhost.example.com", "http://10.0.0.1:7070", "http://[::2]", "https://127.example"]
        {
            assert!(!is_loopback(url), "{url}");
        }
    }

    fn settings(url: String) -> Settings {
        Settings { root_key: Secret::new("unkey_1"), url, server: Server::Publisher, json: false }
    }

    #[test]
    fn a_request_is_what_the_servers_expect() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(reader.read_line(&mut head).unwrap(), 0);
            }
            let mut body = [0; 2];
            reader.read_exact(&mut body).unwrap();
            stream
                .write_all(
                    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nabc",
                )
                .unwrap();
            (head.to_ascii_lowercase(), body)
        });
        let held = Call { prefer: Some(Duration::from_secs(5)), ..call(Repeat::Harmless) };
        let answer = Http::new(&settings).attempt(&held).unwrap();
        let retry_after = Some(Duration::from_secs(7));
        assert_eq!(answer, Answer { status: 429, body: b"abc".to_vec(), retry_after });
        let (head, body) = server.join().unwrap();
        assert_eq!(&body, b"{}");
        assert!(head.starts_with("post /v2/test http/1.1\r\n"), "{head}");
        for header in [
            "authorization: bearer unkey_1",
            "content-type: application/json",
            "accept: application/json",
            "prefer: wait=5",
        ] {
            assert!(head.contains(&format!("\r\n{header}\r\n")), "{head}");
        }
    }

    #[test]
    fn when_to_come_again_is_read_where_it_is_a_number() {
        assert_eq!(seconds(" 12 "), Some(Duration::from_secs(12)));
        for other in ["", "-1", "1.5", "Wed, 21 Oct 2026 07:28:00 GMT"] {
            assert_eq!(seconds(other), None, "{other}");
        }
    }

    #[test]
    fn a_refused_connection_means_that_nothing_was_done() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        drop(listener);
        let lost = Http::new(&settings).attempt(&call(Repeat::Harmless)).unwrap_err();
        assert_eq!(lost.progress, Progress::NotSent, "{lost:?}");
    }

    #[test]
    fn a_host_that_isnt_found_means_that_nothing_was_done() {
        let lost = Http::new(&settings("http://nope.invalid".into())).attempt(&call(Repeat::Duplicates));
        assert_eq!(lost.unwrap_err().progress, Progress::NotSent);
    }

    #[test]
    fn a_connection_without_tls_means_that_nothing_was_done() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("https://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").unwrap();
            drop(stream.shutdown(std::net::Shutdown::Write));
            io::copy(&mut stream, &mut io::sink()).unwrap_or_default()
        });
        let lost = Http::new(&settings).attempt(&call(Repeat::Duplicates)).unwrap_err();
        server.join().unwrap();
        assert_eq!(lost.progress, Progress::NotSent, "{lost:?}");
        assert!(lost.why.contains("http://"), "{lost:?}");
    }

    #[test]
    fn a_connection_that_was_used_before_can_lose_a_request_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for answer in ["HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", ""] {
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert_ne!(reader.read_line(&mut head).unwrap(), 0, "the connection is used once more");
                }
                reader.read_exact(&mut [0; 2]).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut http = Http::new(&settings);
        http.attempt(&call(Repeat::Duplicates)).unwrap();
        let lost = http.attempt(&call(Repeat::Duplicates)).unwrap_err();
        server.join().unwrap();
        assert_eq!(lost.progress, Progress::MaybeDone, "{lost:?}");
    }

    #[test]
    fn a_connection_that_ends_without_an_answer_leaves_it_open() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let settings = settings(format!("http://{}", listener.local_addr().unwrap()));
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(stream).read_line(&mut String::new()).unwrap();
        });
        let lost = Http::new(&settings).attempt(&call(Repeat::Harmless)).unwrap_err();
        server.join().unwrap();
        assert_eq!(lost.progress, Progress::MaybeDone, "{lost:?}");
    }
}
