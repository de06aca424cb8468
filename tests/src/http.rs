//! A small blocking HTTP client. No status is an error, and connections are kept alive.

use std::fmt::Display;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use ureq::http;

/// Longer than any answer may take (`Prefer: wait=30`).
const TIMEOUT: Duration = Duration::from_secs(45);

/// One answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// All headers.
    pub headers: http::HeaderMap,
    /// The body as JSON; `Null` if it isn't JSON.
    pub body: Value,
    /// The body as text.
    pub text: String,
    /// From before the request was sent until the body was read.
    pub elapsed: Duration,
}

impl Response {
    /// Returns a header's value if it is present and text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// A client with its own connections.
#[derive(Clone, Debug)]
pub struct Client {
    agent: ureq::Agent,
}

impl Client {
    /// Creates a client that waits as long as the daemons may take to answer.
    pub fn new() -> Self {
        Self::with_timeout(TIMEOUT)
    }

    /// Creates a client that gives up after `timeout`, for daemons that may be frozen.
    pub fn with_timeout(timeout: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_global(Some(timeout))
            .build();
        Self { agent: config.new_agent() }
    }

    /// POSTs `body` as its `Display` prints it, with the content type of JSON. A `str` is sent as it is, well-formed or
    /// not.
    pub fn post_json(
        &self,
        url: &str,
        bearer: Option<&str>,
        body: &(impl Display + ?Sized),
        headers: &[(&str, &str)],
    ) -> Result<Response> {
        let mut request = self.agent.post(url).content_type("application/json");
        if let Some(key) = bearer {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let started = Instant::now();
        let answer = request.send(body.to_string()).with_context(|| format!("POST {url}"))?;
        read(answer, started).with_context(|| format!("reading the answer to POST {url}"))
    }

    pub fn get(&self, url: &str) -> Result<Response> {
        let started = Instant::now();
        let answer = self.agent.get(url).call().with_context(|| format!("GET {url}"))?;
        read(answer, started).with_context(|| format!("reading the answer to GET {url}"))
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

fn read(mut answer: http::Response<ureq::Body>, started: Instant) -> Result<Response> {
    let text = answer.body_mut().read_to_string()?;
    Ok(Response {
        status: answer.status().as_u16(),
        headers: answer.headers().clone(),
        body: serde_json::from_str(&text).unwrap_or_default(),
        text,
        elapsed: started.elapsed(),
    })
}

/// Sends `bytes`, malformed or not, shuts down the writing side, and returns everything that arrives until the server
/// closes the connection. The server may take the shutdown for the client's end.
pub fn raw(server: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    exchange(server, bytes, Some(Shutdown::Write))
}

/// As [`raw`], without the shutdown, for a request after which the server closes by itself (`connection: close`).
pub fn raw_request(server: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    exchange(server, bytes, None)
}

fn exchange(server: SocketAddr, bytes: &[u8], then: Option<Shutdown>) -> Result<Vec<u8>> {
    let mut stream =
        TcpStream::connect_timeout(&server, TIMEOUT).with_context(|| format!("connecting to {server}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    // A server that refuses early may close before it has read everything. Its answer still counts.
    let _ = stream.write_all(bytes).and_then(|()| then.map_or(Ok(()), |how| stream.shutdown(how)));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if answer.is_empty() => Err(error).with_context(|| format!("reading from {server}")),
        _ => Ok(answer),
    }
}

/// A connection under full control of the test, for what [`Client`] hides.
pub struct Connection {
    stream: TcpStream,
    /// Received bytes that aren't parsed yet.
    received: Vec<u8>,
}

/// An answer received on a [`Connection`].
#[derive(Clone, Debug)]
pub struct RawAnswer {
    /// The HTTP status.
    pub status: u16,
    /// The status line and the headers.
    pub head: String,
    /// The body as JSON; `Null` if it isn't JSON.
    pub body: Value,
}

impl RawAnswer {
    /// Returns a header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields.filter(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }
}

impl Connection {
    /// Connects to `server`.
    pub fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, TIMEOUT)
            .with_context(|| format!("connecting to {server}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// Sends all of `bytes`.
    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.set_write_timeout(Some(TIMEOUT))?;
        self.stream.write_all(bytes)
    }

    /// Sends as much of `bytes` as the connection accepts within `timeout`. Returns the number of bytes sent.
    pub fn send_some(&mut self, bytes: &[u8], timeout: Duration) -> Result<usize> {
        self.stream.set_write_timeout(Some(timeout))?;
        match self.stream.write(bytes) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(0),
            sent => sent.context("sending"),
        }
    }

    /// POSTs JSON to `path` with a root key.
    pub fn post_json(&mut self, path: &str, root_key: &str, body: &Value) -> std::io::Result<()> {
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {root_key}\r\n\
             content-type: application/json\r\naccept: */*\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body.as_bytes()].concat())
    }

    /// Returns the next complete answer, or `None` if the server closes the connection instead. A partial answer and a
    /// timeout are errors.
    pub fn answer(&mut self) -> Result<Option<RawAnswer>> {
        match self.receive(TIMEOUT)? {
            Received::Answer(answer) => Ok(Some(answer)),
            Received::Closed => Ok(None),
            Received::Nothing => bail!("no answer within {TIMEOUT:?}"),
        }
    }

    /// Waits up to `timeout` for an answer or the end of the connection.
    pub fn receive(&mut self, timeout: Duration) -> Result<Received> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((answer, end)) = parse_answer(&self.received)? {
                self.received.drain(..end);
                return Ok(Received::Answer(answer));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Received::Nothing);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) if self.received.is_empty() => return Ok(Received::Closed),
                Ok(0) => bail!("half an answer: {}", String::from_utf8_lossy(&self.received)),
                Ok(read) => self.received.extend_from_slice(&buffer[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                // The server may also close with a reset.
                Err(error) if error.kind() == ErrorKind::ConnectionReset && self.received.is_empty() => {
                    return Ok(Received::Closed);
                }
                Err(error) => return Err(error).context("reading an answer"),
            }
        }
    }
}

/// The result of [`Connection::receive`].
#[derive(Clone, Debug)]
pub enum Received {
    /// A complete answer.
    Answer(RawAnswer),
    /// The server has closed the connection.
    Closed,
    /// No complete answer yet.
    Nothing,
}

/// Parses the answer at the start of `bytes`, once it is complete. Also returns where it ends.
fn parse_answer(bytes: &[u8]) -> Result<Option<(RawAnswer, usize)>> {
    let Some(head_end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8(bytes[..head_end].to_vec()).context("headers that aren't text")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("no status: {head}"))?;
    let mut answer = RawAnswer { status, head, body: Value::Null };
    let length = match answer.header("content-length") {
        Some(length) => length.parse().context("the length of a body")?,
        None if status < 200 => 0,
        None => bail!("an answer without a length: {}", answer.head),
    };
    let end = head_end + 4 + length;
    let Some(body) = bytes.get(head_end + 4..end) else { return Ok(None) };
    answer.body = serde_json::from_slice(body).unwrap_or_default();
    Ok(Some((answer, end)))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use serde_json::json;

    use super::*;

    /// Answers the requests of one connection with `answers`. The thread returns the requests.
    fn serve(answers: &'static [&'static str]) -> Result<(SocketAddr, thread::JoinHandle<String>)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut requests = String::new();
            for answer in answers {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).expect("a request");
                requests += &String::from_utf8_lossy(&buffer[..read]);
                stream.write_all(answer.as_bytes()).expect("a client that reads");
            }
            requests
        });
        Ok((address, server))
    }

    #[test]
    fn refusals_are_answers_and_keep_the_connection() -> Result<()> {
        let (server, requests) = serve(&[
            "HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\nno",
            "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 14\r\nx-a: b\r\n\r\n{\"a\":[1,true]}",
        ])?;
        let client = Client::new();
        let first = client.get(&format!("http://{server}/one"))?;
        assert_eq!((first.status, first.text.as_str(), &first.body), (401, "no", &Value::Null));
        let body = json!({"keyId": "key_1"});
        let second = client.post_json(&format!("http://{server}/two"), Some("k"), &body, &[("x-b", "c")])?;
        assert_eq!((second.status, second.header("x-a")), (503, Some("b")));
        assert_eq!(second.body["a"][1], true);
        let requests = requests.join().expect("the server");
        assert!(requests.contains("GET /one") && requests.contains("POST /two"), "{requests}");
        assert!(requests.contains("authorization: Bearer k") && requests.contains("x-b: c"), "{requests}");
        Ok(())
    }

    #[test]
    fn partial_and_missing_answers_are_distinguished() -> Result<()> {
        let (server, requests) = serve(&[
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}HTTP/1.1 204 No Content\r\n",
            "content-length: 0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        ])?;
        let mut connection = Connection::open(server)?;
        assert!(matches!(connection.receive(Duration::from_millis(10))?, Received::Nothing));
        connection.post_json("/one", "k", &json!({}))?;
        let answer = connection.answer()?.context("closed")?;
        assert_eq!(
            (answer.status, answer.header("connection"), &answer.body),
            (200, Some("close"), &json!({}))
        );
        connection.send(b"more")?;
        assert_eq!(connection.answer()?.map(|answer| answer.status), Some(204));
        let failure = connection.answer().unwrap_err().to_string();
        assert!(failure.contains("half an answer"), "{failure}");
        assert!(requests.join().expect("the server").contains("authorization: Bearer k"));
        let (server, _) = serve(&[])?;
        assert!(Connection::open(server)?.answer()?.is_none());
        Ok(())
    }

    #[test]
    fn malformed_requests_are_sent_as_they_are() -> Result<()> {
        let (server, requests) = serve(&["HTTP/1.1 400 Bad Request\r\n\r\n"])?;
        assert_eq!(raw(server, b"\x00 nonsense\r\n")?, b"HTTP/1.1 400 Bad Request\r\n\r\n");
        assert_eq!(requests.join().expect("the server"), "\0 nonsense\r\n");
        Ok(())
    }
}
