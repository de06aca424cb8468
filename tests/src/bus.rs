//! [`NatsConnection`]: a small NATS client that observes the bus and tries what is forbidden.
//!
//! The daemons' own client hides the server's permission errors; this one returns them.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::frames::{Frame, FrameParser};
use crate::nats_server::Login;

/// How long a server may take to answer a PING on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// One message, as received.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// The subject it was published on.
    pub subject: String,
    /// The subject for a reply.
    pub reply: Option<String>,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// A connection to a NATS server, as a client or (for tests of permissions) as a leaf node.
pub struct NatsConnection {
    stream: TcpStream,
    parser: FrameParser,
    /// Received while waiting for something else.
    messages: VecDeque<Message>,
    /// Errors that the server has sent since the last [`NatsConnection::sync`].
    errors: Vec<String>,
    subscriptions: u32,
}

impl NatsConnection {
    /// Connects as a client. A refused login is an error with the server's message.
    pub fn connect(server: SocketAddr, login: &Login) -> Result<Self> {
        // No headers: the server then sends every message in the plain form.
        let options = json!({
            "user": login.user, "pass": login.password, "verbose": false, "pedantic": false,
            "headers": false, "no_responders": false, "lang": "evictd-tests", "version": "1",
        });
        Self::open(server, &options)
    }

    /// Connects as a region's server. A real server filters what it sends; this one doesn't.
    #[cfg(test)]
    pub(crate) fn connect_leaf(server: SocketAddr, login: &Login) -> Result<Self> {
        let options = json!({
            "user": login.user, "pass": login.password, "name": login.user, "cluster": login.user,
            "server_id": format!("TEST{}", login.user), "version": "2.15.1", "protocol": 1,
            "remote_account": "EVICTD", "headers": false, "compress_mode": "off",
        });
        Self::open(server, &options)
    }

    fn open(server: SocketAddr, options: &Value) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, DEADLINE)
            .with_context(|| format!("connecting to the NATS server at {server}"))?;
        stream.set_nodelay(true)?;
        let mut bus = Self {
            stream,
            parser: FrameParser::default(),
            messages: VecDeque::new(),
            errors: Vec::new(),
            subscriptions: 0,
        };
        bus.send_line(&format!("CONNECT {options}"))?;
        let errors = bus.sync().context("logging in")?;
        if !errors.is_empty() {
            bail!("the NATS server at {server} refused: {}", errors.join("; "));
        }
        Ok(bus)
    }

    /// Subscribes to `subject`, as a member of the queue group `queue` if given.
    pub fn subscribe(&mut self, subject: &str, queue: Option<&str>) -> Result<()> {
        self.subscriptions += 1;
        let queue = queue.map_or(String::new(), |queue| format!(" {queue}"));
        self.send_line(&format!("SUB {subject}{queue} {}", self.subscriptions))
    }

    pub fn publish(&mut self, subject: &str, reply: Option<&str>, payload: &[u8]) -> Result<()> {
        self.send_message("PUB", subject, reply, payload)
    }

    /// Waits until the server has processed everything that was sent, and returns its errors since the last
    /// call. A connection that it closed is an error that ends with its last message.
    pub fn sync(&mut self) -> Result<Vec<String>> {
        // A connection that is being closed may refuse this write; earlier messages can still be read.
        let sent = self.send_line("PING");
        let deadline = Instant::now() + DEADLINE;
        loop {
            let Some(frame) = self.receive(deadline)? else { bail!("the server answers no PING") };
            if frame.verb() == "PONG" {
                sent?;
                return Ok(std::mem::take(&mut self.errors));
            }
            self.dispatch(&frame)?;
        }
    }

    /// Returns the next message, or `None` if none arrives within `deadline`.
    pub fn next(&mut self, deadline: Duration) -> Result<Option<Message>> {
        let deadline = Instant::now() + deadline;
        while self.messages.is_empty() {
            let Some(frame) = self.receive(deadline)? else { return Ok(None) };
            self.dispatch(&frame)?;
        }
        Ok(self.messages.pop_front())
    }

    pub(crate) fn send_message(
        &mut self,
        verb: &str,
        subject: &str,
        reply: Option<&str>,
        payload: &[u8],
    ) -> Result<()> {
        let reply = reply.map_or(String::new(), |reply| format!(" {reply}"));
        let mut bytes = format!("{verb} {subject}{reply} {}\r\n", payload.len()).into_bytes();
        bytes.extend_from_slice(payload);
        bytes.extend_from_slice(b"\r\n");
        self.stream.write_all(&bytes).context("sending to the NATS server")
    }

    pub(crate) fn send_line(&mut self, line: &str) -> Result<()> {
        self.stream.write_all(format!("{line}\r\n").as_bytes()).context("sending to the NATS server")
    }

    /// Handles a frame that may arrive at any time: queues messages and errors, and answers PINGs.
    fn dispatch(&mut self, frame: &Frame) -> Result<()> {
        match frame.verb() {
            "PING" => self.send_line("PONG")?,
            "-ERR" => self.errors.push(frame.line().trim_start_matches("-ERR ").to_owned()),
            _ => {}
        }
        if let Some(subject) = frame.subject() {
            self.messages.push_back(Message {
                subject: subject.to_owned(),
                reply: frame.reply().map(str::to_owned),
                payload: frame.payload().to_vec(),
            });
        }
        Ok(())
    }

    /// Returns the next frame, or `None` at the deadline.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Frame>> {
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(frame) = self.parser.next_frame() {
                return Ok(Some(frame));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the NATS server closed the connection: {}", self.errors.join("; ")),
                Ok(read) => self.parser.push(&buffer[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => {
                    bail!("the connection to the NATS server broke ({error}): {}", self.errors.join("; "))
                }
            }
        }
    }
}
