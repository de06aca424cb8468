//! A small blocking HTTP client: every status is an answer, connections are kept alive.

use std::fmt::Display;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
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
    fn malformed_requests_are_sent_as_they_are() -> Result<()> {
        let (server, asked) = serve(&["HTTP/1.1 400 Bad Request\r\n\r\n"])?;
        assert_eq!(raw(server, b"\x00 nonsense\r\n")?, b"HTTP/1.1 400 Bad Request\r\n\r\n");
        assert_eq!(asked.join().expect("the server"), "\0 nonsense\r\n");
        Ok(())
    }
}
