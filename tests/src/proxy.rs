//! [`Proxy`]: a TCP proxy that injects network failures. It stands between a NATS client (or a region's server) and its
//! server. It can cut, block and delay connections, and drop, duplicate, swap or hold chosen messages.
//!
//! It forwards any other protocol unparsed. For PostgreSQL it is also the address that moves to another server
//! ([`Proxy::lead_to`]).
//!
//! Each connection has two threads per direction: one reads, applies the message rules and queues; the other takes from
//! the queue when the [`WireMode`] allows it, and writes. As in a network, bytes are lost only by a rule or with their
//! connection.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::frames::{Frame, FrameParser, subject_matches};
use crate::ports;
use crate::random::Random;

/// How long connecting to the server may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The state of the proxied connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WireMode {
    /// Bytes pass at once.
    Pass,
    /// All connections are closed, and new ones are closed as soon as they are accepted.
    Cut,
    /// Connections stay open, and bytes in that direction are held back. They arrive when the mode changes, or are
    /// lost with their connection.
    BlackHole(Way),
    /// All bytes arrive later by this duration, in both directions. Throughput doesn't change.
    Delay(Duration),
}

/// A direction of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the client.
    ToServer,
    /// To the client.
    ToClient,
    /// Both directions.
    Both,
}

/// A proxy to one server. Dropping it closes all connections.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<ProxyShared>,
}

impl Proxy {
    /// Listens on a free loopback port, and forwards connections to `server`.
    pub fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(ports::free()?).context("binding a proxy")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(ProxyShared::new(server));
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &accepting));
        Ok(Self { address, shared })
    }

    /// Returns the address to dial instead of the server's.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the mode at once.
    pub fn set(&self, mode: WireMode) {
        let mut state = self.shared.lock();
        state.mode = mode;
        if mode == WireMode::Cut {
            state.close_all();
        }
        self.shared.changed.notify_all();
    }

    /// Forwards new connections to another server. Open connections stay with theirs: see [`Proxy::reset`].
    pub fn lead_to(&self, server: SocketAddr) {
        self.shared.lock().server = server;
    }

    /// Closes all connections, and drops the bytes that are held back in them. New ones are accepted.
    pub fn reset(&self) {
        self.shared.lock().close_all();
        self.shared.changed.notify_all();
    }

    /// Returns the number of open connections.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    /// Drops the next `how_many` messages whose subject matches `subject` (`*` and `>` as in NATS), in either
    /// direction.
    pub fn drop_messages(&self, subject: &str, how_many: usize) {
        self.add_rule(subject, how_many, MessageFate::Lost);
    }

    /// Drops the next `how_many` matching messages for whose payload `chosen` is true, for subjects with several kinds
    /// of messages.
    pub fn drop_chosen(&self, subject: &str, how_many: usize, chosen: fn(&[u8]) -> bool) {
        let rule =
            MessageRule { subject: subject.to_owned(), chosen, left: how_many, fate: MessageFate::Lost };
        self.shared.lock().rules.push(rule);
    }

    /// Delivers the next `how_many` matching messages twice.
    pub fn duplicate_messages(&self, subject: &str, how_many: usize) {
        self.add_rule(subject, how_many, MessageFate::Doubled);
    }

    /// Holds the next matching message back until another one has passed on the same connection.
    pub fn swap_messages(&self, subject: &str) {
        self.add_rule(subject, 2, MessageFate::Swapped { held: None });
    }

    /// Holds back all matching messages until [`Proxy::release`]; the others overtake them.
    pub fn hold_messages(&self, subject: &str) {
        self.add_rule(subject, usize::MAX, MessageFate::Held);
    }

    /// Delivers the messages that [`Proxy::hold_messages`] has held back, in order, and ends the holding.
    pub fn release(&self) {
        let mut state = self.shared.lock();
        state.rules.retain(|rule| !matches!(rule.fate, MessageFate::Held));
        for (queue, bytes) in std::mem::take(&mut state.held) {
            // If this fails, the connection is closed.
            let _ = queue.send(Parcel::Bytes { arrived: Instant::now(), bytes });
        }
    }

    /// As [`Proxy::release`], but every message arrives twice, in random order.
    pub fn release_jumbled(&self, random: &mut Random) {
        let mut state = self.shared.lock();
        let twice = state.held.clone();
        state.held.extend(twice);
        random.shuffle(&mut state.held);
        drop(state);
        self.release();
    }

    /// Returns how many messages [`Proxy::hold_messages`] has held back.
    pub fn held(&self) -> usize {
        self.shared.lock().held.len()
    }

    /// Removes all message rules. Messages that are held back are lost.
    pub fn clear_rules(&self) {
        let mut state = self.shared.lock();
        state.rules.clear();
        state.held.clear();
    }

    /// Returns how many messages [`Proxy::drop_messages`] has dropped since the start.
    pub fn dropped(&self) -> usize {
        self.shared.lock().dropped
    }

    fn add_rule(&self, subject: &str, left: usize, fate: MessageFate) {
        let rule = MessageRule { subject: subject.to_owned(), chosen: |_| true, left, fate };
        self.shared.lock().rules.push(rule);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.over = true;
        state.close_all();
        drop(state);
        self.shared.changed.notify_all();
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT);
    }
}

/// Identifies a connection of one proxy.
type ConnectionId = u64;

struct ProxyShared {
    state: Mutex<State>,
    /// Signals that the mode has changed or connections were closed.
    changed: Condvar,
}

struct State {
    /// The server for new connections.
    server: SocketAddr,
    mode: WireMode,
    over: bool,
    /// Both sockets of each connection: the client's, and the server's.
    connections: BTreeMap<ConnectionId, [TcpStream; 2]>,
    accepted: ConnectionId,
    rules: Vec<MessageRule>,
    /// Messages held back, with the queues for their release.
    held: Vec<(Sender<Parcel>, Vec<u8>)>,
    dropped: usize,
}

struct MessageRule {
    subject: String,
    /// The rule applies only to messages for whose payload this is true.
    chosen: fn(&[u8]) -> bool,
    /// How many more messages it applies to.
    left: usize,
    fate: MessageFate,
}

enum MessageFate {
    Lost,
    Doubled,
    Swapped { held: Option<(ConnectionId, Vec<u8>)> },
    Held,
}

/// An item in the queue from a reader to its writer.
enum Parcel {
    Bytes {
        arrived: Instant,
        bytes: Vec<u8>,
    },
    /// The sender has closed its side.
    End {
        arrived: Instant,
    },
}

impl ProxyShared {
    fn new(server: SocketAddr) -> Self {
        let state = State {
            server,
            mode: WireMode::Pass,
            over: false,
            connections: BTreeMap::new(),
            accepted: 0,
            rules: Vec::new(),
            held: Vec::new(),
            dropped: 0,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until bytes that arrived at `arrived` may pass. Returns false if their connection is closed.
    fn wait_for_passage(&self, id: ConnectionId, way: Way, arrived: Instant) -> bool {
        let mut state = self.lock();
        while state.connections.contains_key(&id) {
            state = match state.mode {
                WireMode::Pass | WireMode::Cut => return true,
                WireMode::BlackHole(blocked) if blocked != way && blocked != Way::Both => return true,
                WireMode::BlackHole(_) => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                WireMode::Delay(delay) => {
                    let left = (arrived + delay).saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return true;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        false
    }

    fn close(&self, id: ConnectionId) {
        if let Some(sockets) = self.lock().connections.remove(&id) {
            close(&sockets);
        }
        self.changed.notify_all();
    }
}

impl State {
    fn close_all(&mut self) {
        for sockets in std::mem::take(&mut self.connections).values() {
            close(sockets);
        }
    }

    /// Applies the rules to a frame on its way to `queue`. Returns the bytes to forward, if any.
    fn apply_rules(&mut self, id: ConnectionId, queue: &Sender<Parcel>, frame: Frame) -> Vec<u8> {
        let rule = frame.subject().and_then(|subject| {
            let mut rules = self.rules.iter_mut().filter(|rule| rule.left > 0);
            rules.find(|rule| subject_matches(&rule.subject, subject) && (rule.chosen)(frame.payload()))
        });
        let Some(rule) = rule else { return frame.into_bytes() };
        match &mut rule.fate {
            MessageFate::Lost => {
                rule.left -= 1;
                self.dropped += 1;
                Vec::new()
            }
            MessageFate::Doubled => {
                rule.left -= 1;
                frame.bytes().repeat(2)
            }
            MessageFate::Held => {
                self.held.push((queue.clone(), frame.into_bytes()));
                Vec::new()
            }
            MessageFate::Swapped { held } => match held.take() {
                Some((owner, earlier)) if owner == id => {
                    rule.left = 0;
                    [frame.into_bytes(), earlier].concat()
                }
                // This is the first of the two. Only one is held at a time: a message held for another connection,
                // which is closed, is lost.
                _ => {
                    *held = Some((id, frame.into_bytes()));
                    Vec::new()
                }
            },
        }
    }
}

/// Shuts both sockets down, which wakes the threads that read and write them.
fn close(sockets: &[TcpStream; 2]) {
    for socket in sockets {
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<ProxyShared>) {
    for client in listener.incoming() {
        let state = shared.lock();
        if state.over {
            return;
        }
        let (cut, server) = (state.mode == WireMode::Cut, state.server);
        drop(state);
        // A client that comes during a cut sees its connection closed, as behind a load balancer.
        if let Ok(client) = client
            && !cut
        {
            let shared = Arc::clone(shared);
            thread::spawn(move || {
                let _ = connect(client, server, &shared);
            });
        }
    }
}

/// Joins `client` to `server`. If that fails, dropping `client` closes it.
fn connect(client: TcpStream, server: SocketAddr, shared: &Arc<ProxyShared>) -> std::io::Result<()> {
    let server = TcpStream::connect_timeout(&server, CONNECT_TIMEOUT)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let lanes = [
        (Way::ToServer, client.try_clone()?, server.try_clone()?),
        (Way::ToClient, server.try_clone()?, client.try_clone()?),
    ];
    let mut state = shared.lock();
    if state.over || state.mode == WireMode::Cut {
        return Ok(());
    }
    state.accepted += 1;
    let id = state.accepted;
    state.connections.insert(id, [client, server]);
    drop(state);
    for (way, from, to) in lanes {
        let (queue, arrivals) = channel();
        let reading = Arc::clone(shared);
        thread::spawn(move || read(from, &queue, id, &reading));
        let writing = Arc::clone(shared);
        thread::spawn(move || write(to, &arrivals, id, way, &writing));
    }
    Ok(())
}

fn read(mut from: TcpStream, queue: &Sender<Parcel>, id: ConnectionId, shared: &ProxyShared) {
    let mut parser = FrameParser::default();
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let arrived = Instant::now();
        parser.push(&buffer[..count]);
        let mut bytes = Vec::new();
        let mut state = shared.lock();
        while let Some(frame) = parser.next_frame() {
            bytes.extend(state.apply_rules(id, queue, frame));
        }
        drop(state);
        if !bytes.is_empty() && queue.send(Parcel::Bytes { arrived, bytes }).is_err() {
            return;
        }
    }
    // If this fails, the connection is already closed.
    let _ = queue.send(Parcel::End { arrived: Instant::now() });
}

fn write(mut to: TcpStream, arrivals: &Receiver<Parcel>, id: ConnectionId, way: Way, shared: &ProxyShared) {
    for parcel in arrivals {
        let (Parcel::Bytes { arrived, .. } | Parcel::End { arrived }) = parcel;
        if !shared.wait_for_passage(id, way, arrived) {
            return;
        }
        let written = match parcel {
            Parcel::Bytes { bytes, .. } => to.write_all(&bytes),
            // NATS never half-closes: the end of one direction is the end of the connection.
            Parcel::End { .. } => break,
        };
        if written.is_err() {
            break;
        }
    }
    shared.close(id);
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;
    use crate::bus::NatsConnection;
    use crate::nats_server::{Listen, NatsServer, User};
    use crate::wait::eventually;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// Echoes every line.
    fn echo_server() -> Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        thread::spawn(move || {
            for client in listener.incoming().map_while(std::io::Result::ok) {
                thread::spawn(move || std::io::copy(&mut &client, &mut &client));
            }
        });
        Ok(address)
    }

    struct Line(BufReader<TcpStream>);

    impl Line {
        fn dial(proxy: &Proxy) -> Result<Self> {
            let stream = TcpStream::connect(proxy.address())?;
            stream.set_read_timeout(Some(DEADLINE))?;
            Ok(Self(BufReader::new(stream)))
        }

        fn send(&mut self, text: &str) -> Result<()> {
            Ok(self.0.get_mut().write_all(format!("{text}\n").as_bytes())?)
        }

        /// Returns the next line, or an empty string if the connection was closed.
        fn receive(&mut self) -> Result<String> {
            let mut line = String::new();
            match self.0.read_line(&mut line) {
                Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error.into()),
                _ => Ok(line.trim_end().to_owned()),
            }
        }

        fn is_silent(&mut self) -> Result<bool> {
            self.0.get_mut().set_read_timeout(Some(Duration::from_millis(100)))?;
            let silent = self.0.fill_buf().is_err();
            self.0.get_mut().set_read_timeout(Some(DEADLINE))?;
            Ok(silent)
        }
    }

    #[test]
    fn a_cut_closes_open_and_new_connections() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        let mut line = Line::dial(&proxy)?;
        line.send("a")?;
        assert_eq!(line.receive()?, "a");
        assert_eq!(proxy.connections(), 1);

        proxy.set(WireMode::Cut);
        assert_eq!((line.receive()?.as_str(), proxy.connections()), ("", 0));
        assert_eq!(Line::dial(&proxy)?.receive()?, "");

        proxy.set(WireMode::Pass);
        let mut line = Line::dial(&proxy)?;
        line.send("b")?;
        assert_eq!(line.receive()?, "b");
        Ok(())
    }

    /// Sends `name` to each client.
    fn naming_server(name: &'static str) -> Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        thread::spawn(move || {
            let mut clients = Vec::new();
            for mut client in listener.incoming().map_while(std::io::Result::ok) {
                let _ = writeln!(client, "{name}");
                clients.push(client);
            }
        });
        Ok(address)
    }

    #[test]
    fn only_new_connections_reach_a_new_server() -> Result<()> {
        let proxy = Proxy::start(naming_server("old")?)?;
        let mut before = Line::dial(&proxy)?;
        assert_eq!(before.receive()?, "old");
        proxy.lead_to(naming_server("new")?);
        assert_eq!((Line::dial(&proxy)?.receive()?.as_str(), before.is_silent()?), ("new", true));
        proxy.reset();
        assert_eq!(before.receive()?, "");
        Ok(())
    }

    #[test]
    fn a_black_hole_holds_bytes_until_it_ends() -> Result<()> {
        for way in [Way::ToServer, Way::ToClient, Way::Both] {
            let proxy = Proxy::start(echo_server()?)?;
            let mut line = Line::dial(&proxy)?;
            proxy.set(WireMode::BlackHole(way));
            line.send("a")?;
            assert!(line.is_silent()?, "{way:?}");
            proxy.set(WireMode::Pass);
            assert_eq!(line.receive()?, "a", "{way:?}");
        }
        Ok(())
    }

    #[test]
    fn bytes_in_a_black_hole_are_lost_with_their_connection() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        let mut line = Line::dial(&proxy)?;
        line.send("before")?;
        assert_eq!(line.receive()?, "before");
        proxy.set(WireMode::BlackHole(Way::Both));
        line.send("lost")?;
        proxy.reset();
        assert_eq!(line.receive()?, "");
        proxy.set(WireMode::Pass);
        let mut line = Line::dial(&proxy)?;
        line.send("kept")?;
        assert_eq!(line.receive()?, "kept");
        Ok(())
    }

    #[test]
    fn a_delay_applies_in_each_direction_and_keeps_order() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        let mut line = Line::dial(&proxy)?;
        let delay = Duration::from_millis(60);
        proxy.set(WireMode::Delay(delay));
        let started = Instant::now();
        for word in ["a", "b", "c"] {
            line.send(word)?;
        }
        assert_eq!([line.receive()?, line.receive()?, line.receive()?], ["a", "b", "c"]);
        assert!(started.elapsed() >= delay * 2);
        Ok(())
    }

    #[test]
    fn a_connection_ends_when_either_side_closes() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        drop(Line::dial(&proxy)?);
        let mut line = Line::dial(&proxy)?;
        line.send("a")?;
        assert_eq!(line.receive()?, "a");
        eventually("the first connection to be removed", DEADLINE, || {
            (proxy.connections() == 1).then_some(())
        })
    }

    /// Sends messages from a publisher to an agent, which reaches the server through the proxy. Returns the payloads
    /// that the agent receives.
    fn feed(proxied: impl FnOnce(&Proxy)) -> Result<Vec<String>> {
        let dir = tempfile::tempdir()?;
        let server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let proxy = Proxy::start(server.clients())?;
        let mut agent = NatsConnection::connect(proxy.address(), server.login(&User::agent("eu", "a1"))?)?;
        agent.subscribe("evictd.v1.live", None)?;
        agent.subscribe("_INBOX_evictd.eu.a1.>", None)?;
        assert_eq!(agent.sync()?, Vec::<String>::new());
        proxied(&proxy);
        let mut publisher = NatsConnection::connect(server.clients(), server.login(&User::Publisher)?)?;
        for payload in ["1", "2", "3", "4"] {
            publisher.publish("evictd.v1.live", None, payload.as_bytes())?;
        }
        publisher.publish("_INBOX_evictd.eu.a1.x", None, b"end")?;
        publisher.sync()?;
        let mut received = Vec::new();
        while received.last().is_none_or(|last| last != "end") {
            let message = agent.next(DEADLINE)?.context("the last message never arrived")?;
            received.push(String::from_utf8(message.payload)?);
        }
        Ok(received)
    }

    #[test]
    fn only_matching_messages_are_dropped_doubled_or_swapped() -> Result<()> {
        assert_eq!(feed(|_| {})?, ["1", "2", "3", "4", "end"]);
        assert_eq!(feed(|proxy| proxy.drop_messages("evictd.v1.live", 2))?, ["3", "4", "end"]);
        assert_eq!(feed(|proxy| proxy.drop_messages("_INBOX.>", 2))?, ["1", "2", "3", "4", "end"]);
        assert_eq!(feed(|proxy| proxy.duplicate_messages("evictd.>", 1))?, ["1", "1", "2", "3", "4", "end"]);
        assert_eq!(feed(|proxy| proxy.swap_messages("evictd.v1.*"))?, ["2", "1", "3", "4", "end"]);
        Ok(())
    }

    #[test]
    fn messages_are_chosen_by_their_payload() -> Result<()> {
        let chosen = |proxy: &Proxy| proxy.drop_chosen("evictd.v1.live", 9, |payload| payload == b"2");
        assert_eq!(feed(chosen)?, ["1", "3", "4", "end"]);
        Ok(())
    }

    #[test]
    fn held_messages_are_overtaken_and_arrive_on_release() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let proxy = Proxy::start(server.clients())?;
        let mut agent = NatsConnection::connect(proxy.address(), server.login(&User::agent("eu", "a1"))?)?;
        agent.subscribe("evictd.v1.live", None)?;
        agent.subscribe("_INBOX_evictd.eu.a1.>", None)?;
        agent.sync()?;
        proxy.hold_messages("evictd.v1.live");
        let mut publisher = NatsConnection::connect(server.clients(), server.login(&User::Publisher)?)?;
        for (subject, payload) in
            [("evictd.v1.live", "1"), ("evictd.v1.live", "2"), ("_INBOX_evictd.eu.a1.x", "3")]
        {
            publisher.publish(subject, None, payload.as_bytes())?;
        }
        let mut receive = || Ok::<_, anyhow::Error>(agent.next(DEADLINE)?.context("no message")?.payload);
        assert_eq!((receive()?, proxy.held()), (b"3".to_vec(), 2));
        proxy.release();
        assert_eq!((receive()?, receive()?, proxy.held()), (b"1".to_vec(), b"2".to_vec(), 0));
        publisher.publish("evictd.v1.live", None, b"4")?;
        assert_eq!(receive()?, b"4", "nothing is held back after the release");

        proxy.hold_messages("evictd.v1.live");
        for digit in b'0'..=b'9' {
            publisher.publish("evictd.v1.live", None, &[digit])?;
        }
        eventually("ten to be held back", DEADLINE, || (proxy.held() == 10).then_some(()))?;
        proxy.release_jumbled(&mut Random::new(1));
        let mut jumbled = (0..20).map(|_| receive()).collect::<Result<Vec<_>>>()?;
        assert!(!jumbled.is_sorted());
        jumbled.sort();
        let twice: Vec<_> = (b'0'..=b'9').flat_map(|digit| [[digit], [digit]]).collect();
        assert_eq!(jumbled, twice);
        Ok(())
    }

    #[test]
    fn dropped_messages_are_counted() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let server = NatsServer::start_single(dir.path(), Listen::free()?, &[])?;
        let proxy = Proxy::start(server.clients())?;
        let mut publisher = NatsConnection::connect(proxy.address(), server.login(&User::Publisher)?)?;
        proxy.drop_messages("evictd.v1.live", 1);
        publisher.publish("evictd.v1.live", None, b"1")?;
        publisher.publish("evictd.v1.live", None, b"2")?;
        publisher.sync()?;
        assert_eq!(proxy.dropped(), 1);
        Ok(())
    }
}
