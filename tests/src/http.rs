//! A small blocking HTTP client: every status is an answer, connections are kept alive.

use std::fmt::Display;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use ureq::http;

/// Longer than any answer that is allowed to wait (`Prefer: wait=30`).
const TIMEOUT: Duration = Duration::from_secs(45);

/// One answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// All headers.
    pub headers: http::HeaderMap,
    /// The body as JSON; `Null` if it is none.
    pub body: Value,
    /// The body as text.
    pub text: String,
    /// From before the request was sent until the body was read.
    pub elapsed: Duration,
}

impl Response {
    /// A header's value, if it is there and text.
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
    /// A client that waits for an answer as long as the daemons may take.
    pub fn new() -> Self {
        Self::with_timeout(TIMEOUT)
    }

    /// A client that gives up after `timeout`, for daemons that stand still.
    pub fn with_timeout(timeout: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_global(Some(timeout))
            .build();
        Self { agent: config.new_agent() }
    }

    /// POSTs `body` as it prints (a [`Value`] prints as JSON, a `str` as itself, well-formed or not) with
    /// the content type of JSON.
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

    /// GETs `url`.
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

/// Sends `bytes`, however malformed, and returns all that comes back until the server closes. The
/// server learns that no more is coming, and may take that for the client's farewell.
pub fn raw(server: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    exchange(server, bytes, Some(Shutdown::Write))
}

/// As [`raw`], for a whole request, after which the server closes by itself (`connection: close`).
pub fn raw_request(server: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    exchange(server, bytes, None)
}

fn exchange(server: SocketAddr, bytes: &[u8], then: Option<Shutdown>) -> Result<Vec<u8>> {
    let mut stream =
        TcpStream::connect_timeout(&server, TIMEOUT).with_context(|| format!("connecting to {server}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    // A server that refuses early may close before it has read all: what it answered still counts.
    let _ = stream.write_all(bytes).and_then(|()| then.map_or(Ok(()), |how| stream.shutdown(how)));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if answer.is_empty() => Err(error).with_context(|| format!("reading from {server}")),
        _ => Ok(answer),
    }
}

/// A connection that does exactly what a test says: what [`Client`] hides is what is tested with it.
pub struct Connection {
    stream: TcpStream,
    /// Received, and not read as an answer yet.
    received: Vec<u8>,
}

/// An answer as it came over a [`Connection`].
#[derive(Clone, Debug)]
pub struct RawAnswer {
    /// The HTTP status.
    pub status: u16,
    /// The status line and the headers.
    pub head: String,
    /// The body as JSON; `Null` if it is none.
    pub body: Value,
}

impl RawAnswer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields.filter(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }
}

impl Connection {
    /// Connects.
    pub fn open(server: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, TIMEOUT)
            .with_context(|| format!("connecting to {server}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// Sends `bytes`, for as long as the server takes them.
    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.set_write_timeout(Some(TIMEOUT))?;
        self.stream.write_all(bytes)
    }

    /// Sends what the server and its system take within `patience`, and tells how many bytes that were.
    pub fn send_some(&mut self, bytes: &[u8], patience: Duration) -> Result<usize> {
        self.stream.set_write_timeout(Some(patience))?;
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

    /// The next answer, whole; `None` if the server closes the connection instead of giving one. Half an answer
    /// is an error, and so is none within the time that any may take.
    pub fn answer(&mut self) -> Result<Option<RawAnswer>> {
        match self.hear(TIMEOUT)? {
            Heard::Answer(answer) => Ok(Some(answer)),
            Heard::Closed => Ok(None),
            Heard::Nothing => bail!("no answer within {TIMEOUT:?}"),
        }
    }

    /// What comes from the server within `patience`.
    pub fn hear(&mut self, patience: Duration) -> Result<Heard> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some((answer, end)) = parse_answer(&self.received)? {
                self.received.drain(..end);
                return Ok(Heard::Answer(answer));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Heard::Nothing);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 16 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) if self.received.is_empty() => return Ok(Heard::Closed),
                Ok(0) => bail!("half an answer: {}", String::from_utf8_lossy(&self.received)),
                Ok(read) => self.received.extend_from_slice(&buffer[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                // A way to close, too.
                Err(error) if error.kind() == ErrorKind::ConnectionReset && self.received.is_empty() => {
                    return Ok(Heard::Closed);
                }
                Err(error) => return Err(error).context("reading an answer"),
            }
        }
    }
}

/// What came over a [`Connection`].
#[derive(Clone, Debug)]
pub enum Heard {
    /// A whole answer.
    Answer(RawAnswer),
    /// The server has closed the connection.
    Closed,
    /// Nothing yet, or not all of it.
    Nothing,
}

/// The answer that `bytes` begin with, and where it ends, once they hold all of it.
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

    /// Answers one connection's requests with `answers`, and returns what was asked.
    fn serve(answers: &'static [&'static str]) -> Result<(SocketAddr, thread::JoinHandle<String>)> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut asked = String::new();
            for answer in answers {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).expect("a request");
                asked += &String::from_utf8_lossy(&buffer[..read]);
                stream.write_all(answer.as_bytes()).expect("a client that listens");
            }
            asked
        });
        Ok((address, server))
    }

    #[test]
    fn a_refusal_is_an_answer_and_the_connection_is_kept() -> Result<()> {
        let (server, asked) = serve(&[
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
        let asked = asked.join().expect("the server");
        assert!(asked.contains("GET /one") && asked.contains("POST /two"), "{asked}");
        assert!(asked.contains("authorization: Bearer k") && asked.contains("x-b: c"), "{asked}");
        Ok(())
    }

    #[test]
    fn a_connection_tells_a_whole_answer_from_half_a_one_and_from_none() -> Result<()> {
        let (server, asked) = serve(&[
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}HTTP/1.1 204 No Content\r\n",
            "content-length: 0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        ])?;
        let mut connection = Connection::open(server)?;
        assert!(matches!(connection.hear(Duration::from_millis(10))?, Heard::Nothing));
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
        assert!(asked.join().expect("the server").contains("authorization: Bearer k"));
        let (server, _) = serve(&[])?;
        assert!(Connection::open(server)?.answer()?.is_none());
        Ok(())
    }

    #[test]
    fn malformed_requests_are_sent_as_they_are() -> Result<()> {
        let (server, asked) = serve(&["HTTP/1.1 400 Bad Request\r\n\r\n"])?;
        assert_eq!(raw(server, b"\x00 nonsense\r\n")?, b"HTTP/1.1 400 Bad Request\r\n\r\n");
        assert_eq!(asked.join().expect("the server"), "\0 nonsense\r\n");
        Ok(())
    }
}
