//! [`Proxy`]: a TCP connection's bad day. It stands between a NATS client (or a region's server) and its
//! server, and can cut, block and delay the wire, and lose, double, swap or hold chosen messages.
//!
//! It carries any other protocol as well, of which it understands nothing: PostgreSQL's, say, for which it is also
//! the address that moves to another server ([`Proxy::lead_to`]).
//!
//! Per connection and direction, one thread reads, applies the rules for messages and queues; another
//! takes from the queue when the [`Mode`] allows it and writes. Nothing is lost but by a rule or with its
//! connection, as in a network.

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

/// How long the proxy tries to reach the server behind it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What happens to the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Bytes pass at once.
    Pass,
    /// All connections are closed, and new ones as soon as they come.
    Cut,
    /// Connections stay open and bytes that way stand still. They arrive when the mode changes, or are
    /// lost when their connection is given up.
    BlackHole(Way),
    /// All bytes arrive that much later, in both directions. Nothing else changes, not even throughput.
    Delay(Duration),
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From whoever dialled.
    ToServer,
    /// To whoever dialled.
    ToClient,
    /// Either way.
    Both,
}

/// A wire to one server. Dropping it closes all connections.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free loopback port, and connects whoever comes to `server`.
    pub fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(ports::free()?).context("binding a proxy")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::leading_to(server));
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &accepting));
        Ok(Self { address, shared })
    }

    /// Where to dial instead of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens to the wire, now.
    pub fn set(&self, mode: Mode) {
        let mut state = self.shared.lock();
        state.mode = mode;
        if mode == Mode::Cut {
            state.close_all();
        }
        self.shared.changed.notify_all();
    }

    /// From now on connects whoever comes to another server. Connections that stand go on: see
    /// [`Proxy::reset`].
    pub fn lead_to(&self, server: SocketAddr) {
        self.shared.lock().server = server;
    }

    /// Closes all connections, with everything that stands still in them. New ones are welcome.
    pub fn reset(&self) {
        self.shared.lock().close_all();
        self.shared.changed.notify_all();
    }

    /// How many connections stand.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections.len()
    }

    /// Loses the next `how_many` messages whose subject matches `subject` (`*` and `>` as in NATS),
    /// whichever way they go.
    pub fn drop_messages(&self, subject: &str, how_many: usize) {
        self.add_rule(subject, how_many, Fate::Lost);
    }

    /// Loses the next `how_many` matching messages whose payload is `chosen`, for subjects that carry
    /// messages of several kinds.
    pub fn drop_chosen(&self, subject: &str, how_many: usize, chosen: fn(&[u8]) -> bool) {
        let rule = Rule { subject: subject.to_owned(), chosen, left: how_many, fate: Fate::Lost };
        self.shared.lock().rules.push(rule);
    }

    /// Delivers the next `how_many` matching messages twice.
    pub fn duplicate_messages(&self, subject: &str, how_many: usize) {
        self.add_rule(subject, how_many, Fate::Doubled);
    }

    /// Holds the next matching message back until another matching one has passed on its connection.
    pub fn swap_messages(&self, subject: &str) {
        self.add_rule(subject, 2, Fate::Swapped { held: None });
    }

    /// Holds back all matching messages until [`Proxy::release`]; the others overtake them.
    pub fn hold_messages(&self, subject: &str) {
        self.add_rule(subject, usize::MAX, Fate::Held);
    }

    /// Delivers what [`Proxy::hold_messages`] has held back, in order, and holds back no more.
    pub fn release(&self) {
        let mut state = self.shared.lock();
        state.rules.retain(|rule| !matches!(rule.fate, Fate::Held));
        for (queue, bytes) in std::mem::take(&mut state.held) {
            // If nobody takes it, its connection is gone.
            let _ = queue.send(Parcel::Bytes { arrived: Instant::now(), bytes });
        }
    }

    /// As [`Proxy::release`], but every message comes twice, and in an order that chance decides.
    pub fn release_jumbled(&self, random: &mut Random) {
        let mut state = self.shared.lock();
        let twice = state.held.clone();
        state.held.extend(twice);
        random.shuffle(&mut state.held);
        drop(state);
        self.release();
    }

    /// How many messages are held back by [`Proxy::hold_messages`].
    pub fn held(&self) -> usize {
        self.shared.lock().held.len()
    }

    /// Forgets all rules about messages. What is held back is lost.
    pub fn clear_rules(&self) {
        let mut state = self.shared.lock();
        state.rules.clear();
        state.held.clear();
    }

    /// How many messages were lost by [`Proxy::drop_messages`] since the start.
    pub fn dropped(&self) -> usize {
        self.shared.lock().dropped
    }

    fn add_rule(&self, subject: &str, left: usize, fate: Fate) {
        let rule = Rule { subject: subject.to_owned(), chosen: |_| true, left, fate };
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
        // The accepting thread looks up when somebody comes.
        let _ = TcpStream::connect_timeout(&self.address, CONNECT_TIMEOUT);
    }
}

/// Names a connection of one proxy.
type ConnectionId = u64;

struct Shared {
    state: Mutex<State>,
    /// The mode changed or connections were closed.
    changed: Condvar,
}

struct State {
    /// Where whoever comes is connected to.
    server: SocketAddr,
    mode: Mode,
    over: bool,
    /// Both sockets of each connection: the dialler's, and the one to the server.
    connections: BTreeMap<ConnectionId, [TcpStream; 2]>,
    accepted: ConnectionId,
    rules: Vec<Rule>,
    /// Messages held back, and where they go when they are released.
    held: Vec<(Sender<Parcel>, Vec<u8>)>,
    dropped: usize,
}

struct Rule {
    subject: String,
    /// Of the messages with that subject, it applies to those with such a payload.
    chosen: fn(&[u8]) -> bool,
    /// How many more messages it applies to.
    left: usize,
    fate: Fate,
}

enum Fate {
    Lost,
    Doubled,
    Swapped { held: Option<(ConnectionId, Vec<u8>)> },
    Held,
}

/// What a reader hands to its writer.
enum Parcel {
    Bytes {
        arrived: Instant,
        bytes: Vec<u8>,
    },
    /// The sender has closed its half.
    End {
        arrived: Instant,
    },
}

impl Shared {
    fn leading_to(server: SocketAddr) -> Self {
        let state = State {
            server,
            mode: Mode::Pass,
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

    /// Waits until something that arrived then may leave. False: its connection is gone.
    fn wait_for_passage(&self, id: ConnectionId, way: Way, arrived: Instant) -> bool {
        let mut state = self.lock();
        while state.connections.contains_key(&id) {
            state = match state.mode {
                Mode::Pass | Mode::Cut => return true,
                Mode::BlackHole(blocked) if blocked != way && blocked != Way::Both => return true,
                Mode::BlackHole(_) => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Mode::Delay(delay) => {
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

    /// What becomes of a frame on its way to `queue`: the bytes to send on, if any.
    fn apply_rules(&mut self, id: ConnectionId, queue: &Sender<Parcel>, frame: Frame) -> Vec<u8> {
        let rule = frame.subject().and_then(|subject| {
            let mut rules = self.rules.iter_mut().filter(|rule| rule.left > 0);
            rules.find(|rule| subject_matches(&rule.subject, subject) && (rule.chosen)(frame.payload()))
        });
        let Some(rule) = rule else { return frame.into_bytes() };
        match &mut rule.fate {
            Fate::Lost => {
                rule.left -= 1;
                self.dropped += 1;
                Vec::new()
            }
            Fate::Doubled => {
                rule.left -= 1;
                frame.bytes().repeat(2)
            }
            Fate::Held => {
                self.held.push((queue.clone(), frame.into_bytes()));
                Vec::new()
            }
            Fate::Swapped { held } => match held.take() {
                Some((owner, earlier)) if owner == id => {
                    rule.left = 0;
                    [frame.into_bytes(), earlier].concat()
                }
                // The first of the two, or the first on another connection than the one held back,
                // whose connection is gone: only one is held at a time.
                _ => {
                    *held = Some((id, frame.into_bytes()));
                    Vec::new()
                }
            },
        }
    }
}

/// Closes both sockets; whoever reads or writes them is woken.
fn close(sockets: &[TcpStream; 2]) {
    for socket in sockets {
        let _ = socket.shutdown(Shutdown::Both);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        let state = shared.lock();
        if state.over {
            return;
        }
        let (cut, server) = (state.mode == Mode::Cut, state.server);
        drop(state);
        // A client that is turned away sees its connection closed, as behind a load balancer.
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
fn connect(client: TcpStream, server: SocketAddr, shared: &Arc<Shared>) -> std::io::Result<()> {
    let server = TcpStream::connect_timeout(&server, CONNECT_TIMEOUT)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let lanes = [
        (Way::ToServer, client.try_clone()?, server.try_clone()?),
        (Way::ToClient, server.try_clone()?, client.try_clone()?),
    ];
    let mut state = shared.lock();
    if state.over || state.mode == Mode::Cut {
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

fn read(mut from: TcpStream, queue: &Sender<Parcel>, id: ConnectionId, shared: &Shared) {
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
    // If nobody takes it, the connection is gone already.
    let _ = queue.send(Parcel::End { arrived: Instant::now() });
}

fn write(mut to: TcpStream, arrivals: &Receiver<Parcel>, id: ConnectionId, way: Way, shared: &Shared) {
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
    use crate::bus::Bus;
    use crate::nats_server::{Listen, NatsServer, User};
    use crate::wait::eventually;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// Returns every line as it came.
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

        fn say(&mut self, words: &str) -> Result<()> {
            Ok(self.0.get_mut().write_all(format!("{words}\n").as_bytes())?)
        }

        /// The next line, empty if the connection was closed.
        fn hear(&mut self) -> Result<String> {
            let mut line = String::new();
            match self.0.read_line(&mut line) {
                Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error.into()),
                _ => Ok(line.trim_end().to_owned()),
            }
        }

        fn nothing_comes(&mut self) -> Result<bool> {
            self.0.get_mut().set_read_timeout(Some(Duration::from_millis(100)))?;
            let silent = self.0.fill_buf().is_err();
            self.0.get_mut().set_read_timeout(Some(DEADLINE))?;
            Ok(silent)
        }
    }

    #[test]
    fn a_cut_closes_what_stands_and_refuses_what_comes() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        let mut line = Line::dial(&proxy)?;
        line.say("a")?;
        assert_eq!(line.hear()?, "a");
        assert_eq!(proxy.connections(), 1);

        proxy.set(Mode::Cut);
        assert_eq!((line.hear()?.as_str(), proxy.connections()), ("", 0));
        assert_eq!(Line::dial(&proxy)?.hear()?, "");

        proxy.set(Mode::Pass);
        let mut line = Line::dial(&proxy)?;
        line.say("b")?;
        assert_eq!(line.hear()?, "b");
        Ok(())
    }

    /// Says `name` to whoever comes.
    fn server_that_says(name: &'static str) -> Result<SocketAddr> {
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
    fn who_comes_after_the_server_was_changed_reaches_the_new_one() -> Result<()> {
        let proxy = Proxy::start(server_that_says("old")?)?;
        let mut before = Line::dial(&proxy)?;
        assert_eq!(before.hear()?, "old");
        proxy.lead_to(server_that_says("new")?);
        assert_eq!((Line::dial(&proxy)?.hear()?.as_str(), before.nothing_comes()?), ("new", true));
        proxy.reset();
        assert_eq!(before.hear()?, "");
        Ok(())
    }

    #[test]
    fn a_black_hole_keeps_bytes_until_it_ends() -> Result<()> {
        for way in [Way::ToServer, Way::ToClient, Way::Both] {
            let proxy = Proxy::start(echo_server()?)?;
            let mut line = Line::dial(&proxy)?;
            proxy.set(Mode::BlackHole(way));
            line.say("a")?;
            assert!(line.nothing_comes()?, "{way:?}");
            proxy.set(Mode::Pass);
            assert_eq!(line.hear()?, "a", "{way:?}");
        }
        Ok(())
    }

    #[test]
    fn a_black_hole_swallows_what_was_in_a_connection_that_is_given_up() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        let mut line = Line::dial(&proxy)?;
        line.say("before")?;
        assert_eq!(line.hear()?, "before");
        proxy.set(Mode::BlackHole(Way::Both));
        line.say("lost")?;
        proxy.reset();
        assert_eq!(line.hear()?, "");
        proxy.set(Mode::Pass);
        let mut line = Line::dial(&proxy)?;
        line.say("kept")?;
        assert_eq!(line.hear()?, "kept");
        Ok(())
    }

    #[test]
    fn a_delay_counts_once_each_way_and_keeps_the_order() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        let mut line = Line::dial(&proxy)?;
        let delay = Duration::from_millis(60);
        proxy.set(Mode::Delay(delay));
        let started = Instant::now();
        for word in ["a", "b", "c"] {
            line.say(word)?;
        }
        assert_eq!([line.hear()?, line.hear()?, line.hear()?], ["a", "b", "c"]);
        assert!(started.elapsed() >= delay * 2);
        Ok(())
    }

    #[test]
    fn a_connection_ends_for_one_side_when_the_other_leaves() -> Result<()> {
        let proxy = Proxy::start(echo_server()?)?;
        drop(Line::dial(&proxy)?);
        let mut line = Line::dial(&proxy)?;
        line.say("a")?;
        assert_eq!(line.hear()?, "a");
        eventually("the first connection to be forgotten", DEADLINE, || {
            (proxy.connections() == 1).then_some(())
        })
    }

    /// A real server, a publisher beside it and an agent behind the proxy, subscribed to the live feed.
    fn feed(proxied: impl FnOnce(&Proxy)) -> Result<Vec<String>> {
        let dir = tempfile::tempdir()?;
        let server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let proxy = Proxy::start(server.clients())?;
        let mut agent = Bus::connect(proxy.address(), server.login(&User::agent("eu", "a1"))?)?;
        agent.subscribe("evictd.v1.live", None)?;
        agent.subscribe("_INBOX_evictd.eu.a1.>", None)?;
        assert_eq!(agent.sync()?, Vec::<String>::new());
        proxied(&proxy);
        let mut publisher = Bus::connect(server.clients(), server.login(&User::Publisher)?)?;
        for payload in ["1", "2", "3", "4"] {
            publisher.publish("evictd.v1.live", None, payload.as_bytes())?;
        }
        publisher.publish("_INBOX_evictd.eu.a1.x", None, b"end")?;
        publisher.sync()?;
        let mut heard = Vec::new();
        while heard.last().is_none_or(|last| last != "end") {
            let message = agent.next(DEADLINE)?.context("the last message never came")?;
            heard.push(String::from_utf8(message.payload)?);
        }
        Ok(heard)
    }

    #[test]
    fn chosen_messages_are_lost_doubled_and_swapped_and_no_others() -> Result<()> {
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
    fn held_messages_are_overtaken_and_come_when_they_are_released() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let proxy = Proxy::start(server.clients())?;
        let mut agent = Bus::connect(proxy.address(), server.login(&User::agent("eu", "a1"))?)?;
        agent.subscribe("evictd.v1.live", None)?;
        agent.subscribe("_INBOX_evictd.eu.a1.>", None)?;
        agent.sync()?;
        proxy.hold_messages("evictd.v1.live");
        let mut publisher = Bus::connect(server.clients(), server.login(&User::Publisher)?)?;
        for (subject, payload) in
            [("evictd.v1.live", "1"), ("evictd.v1.live", "2"), ("_INBOX_evictd.eu.a1.x", "3")]
        {
            publisher.publish(subject, None, payload.as_bytes())?;
        }
        let mut hear = || Ok::<_, anyhow::Error>(agent.next(DEADLINE)?.context("silence")?.payload);
        assert_eq!((hear()?, proxy.held()), (b"3".to_vec(), 2));
        proxy.release();
        assert_eq!((hear()?, hear()?, proxy.held()), (b"1".to_vec(), b"2".to_vec(), 0));
        publisher.publish("evictd.v1.live", None, b"4")?;
        assert_eq!(hear()?, b"4", "nothing is held back any more");

        proxy.hold_messages("evictd.v1.live");
        for digit in b'0'..=b'9' {
            publisher.publish("evictd.v1.live", None, &[digit])?;
        }
        eventually("ten to be held back", DEADLINE, || (proxy.held() == 10).then_some(()))?;
        proxy.release_jumbled(&mut Random::new(1));
        let mut jumbled = (0..20).map(|_| hear()).collect::<Result<Vec<_>>>()?;
        assert!(!jumbled.is_sorted());
        jumbled.sort();
        let twice: Vec<_> = (b'0'..=b'9').flat_map(|digit| [[digit], [digit]]).collect();
        assert_eq!(jumbled, twice);
        Ok(())
    }

    #[test]
    fn lost_messages_are_counted() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let server = NatsServer::start_single(dir.path(), Listen::free()?, &[])?;
        let proxy = Proxy::start(server.clients())?;
        let mut publisher = Bus::connect(proxy.address(), server.login(&User::Publisher)?)?;
        proxy.drop_messages("evictd.v1.live", 1);
        publisher.publish("evictd.v1.live", None, b"1")?;
        publisher.publish("evictd.v1.live", None, b"2")?;
        publisher.sync()?;
        assert_eq!(proxy.dropped(), 1);
        Ok(())
    }
}
