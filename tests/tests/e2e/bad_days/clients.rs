//! Clients that send too much, too slowly or nothing at all, or that never read their answers.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::http::{Connection, RawAnswer, Received};
use evictd_tests::process::allow_open_files;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::{Value, json};
use toml::toml;

use crate::world::{Key, SOON, World, plan, wait_for_readiness};

/// The longest wait of other clients on a machine that is busy with tests.
const SOON_ENOUGH: Duration = Duration::from_secs(3);

/// Plans a region whose daemons have short timeouts.
fn short_timeouts() -> Plan {
    let http = toml! { http = { header_timeout = "1s", body_timeout = "2s", idle_timeout = "3s" } };
    Plan { publisher: http.clone(), agents: http, ..plan(&["eu"]) }
}

/// Returns the path and the body of a request that either daemon answers with 200.
fn valid_request(world: &World, node: &Node, key: &Key) -> (&'static str, Value) {
    if node.http == world.publisher().http {
        ("/v2/keys.getKey", json!({ "keyId": key.id }))
    } else {
        ("/v2/keys.verifyKey", json!({ "key": key.text }))
    }
}

/// Sends a request over a new connection, and returns how long its answer took. Any status but 200 is an error.
fn send_request(world: &World, node: &Node, key: &Key) -> Result<Duration> {
    let (path, body) = valid_request(world, node, key);
    let sent_at = Instant::now();
    let mut connection = Connection::open(node.http)?;
    connection.post_json(path, world.topology.root_key(), &body)?;
    let answer = connection.answer()?.with_context(|| format!("{}: no answer", node.daemon.name()))?;
    ensure!(answer.status == 200, "{}: {} {}", node.daemon.name(), answer.head, answer.body);
    Ok(sent_at.elapsed())
}

/// Sends requests to both daemons while `event` runs, and checks that misbehaving clients don't delay them.
fn beside_others<T>(world: &World, key: &Key, event: impl FnOnce() -> Result<T>) -> Result<T> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients = [world.publisher(), world.agent(0)].map(|node| {
            let over = &over;
            scope.spawn(move || {
                let mut waited = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    waited.push(send_request(world, node, key)?);
                }
                Ok::<_, anyhow::Error>(waited)
            })
        });
        let outcome = event();
        over.store(true, Ordering::Relaxed);
        for (client, node) in clients.into_iter().zip([world.publisher(), world.agent(0)]) {
            let waited = client.join().map_err(|_| anyhow!("a client panicked"))??;
            assert_not_starved(waited, node)?;
        }
        outcome
    })
}

/// Checks that a client didn't spend most of its time in slow requests. A client that has to wait for a slow one waits
/// for the second until that one times out, again and again. A busy machine makes only some requests as slow.
fn assert_not_starved(mut waited: Vec<Duration>, node: &Node) -> Result<()> {
    const STARVED: Duration = Duration::from_millis(500);
    waited.sort_unstable();
    let whole: Duration = waited.iter().sum();
    let mut until_then = Duration::ZERO;
    // During half of the time, the request in flight takes at most this long.
    let usual = waited.iter().find(|request| {
        until_then += **request;
        until_then * 2 >= whole
    });
    let (usual, slowest) = usual.zip(waited.last()).context("no other client sent a request")?;
    let (name, requests) = (node.daemon.name(), waited.len());
    println!(
        "others waited for {name} usually {usual:?} and at most {slowest:?}, {requests} times in {whole:?}"
    );
    ensure!(*usual < STARVED, "others waited for {name} {usual:?} most of the time");
    ensure!(*slowest < SOON, "others waited for {name} {slowest:?}");
    Ok(())
}

/// Checks that an answer is an error in Unkey's form, with this status and type.
fn assert_error(answer: &RawAnswer, status: u16, kind: &str) -> Result<()> {
    let error = &answer.body["error"];
    let url = error["type"].as_str().unwrap_or_default();
    ensure!(
        answer.status == status
            && error["status"] == status
            && url == format!("https://unkey.com/docs/errors/{kind}")
            && error["errors"].is_array()
            && answer.body["meta"]["requestId"].as_str().is_some_and(|id| id.starts_with("req_")),
        "{} {}",
        answer.head,
        answer.body
    );
    Ok(())
}

/// Waits until `node` has at most a few more open files than before.
fn wait_until_closed(node: &Node, open_files: usize) -> Result<()> {
    let what = format!("{} to close its connections", node.daemon.name());
    try_eventually(&what, SOON, || Ok((node.daemon.footprint()?.open_files <= open_files + 4).then_some(())))
}

const LARGE: usize = 10 << 20;

/// Returns a request of 10 MiB with its length, and one in chunks.
fn large_requests(path: &str, root_key: &str) -> [Vec<u8>; 2] {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {root_key}\r\naccept: application/json\r\n"
    );
    let body = vec![b' '; LARGE];
    let whole = [format!("{head}content-length: {LARGE}\r\n\r\n").as_bytes(), &body].concat();
    let mut pieces = format!("{head}transfer-encoding: chunked\r\n\r\n").into_bytes();
    for piece in body.chunks(64 * 1024) {
        pieces.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        pieces.extend_from_slice(piece);
        pieces.extend_from_slice(b"\r\n");
    }
    pieces.extend_from_slice(b"0\r\n\r\n");
    [whole, pieces]
}

/// Failure: a client that sends too much is disconnected before it can read the error, or its request fills the memory.
/// Or the rest of its request is parsed as the next one.
#[test]
fn a_10_mib_body_is_refused_with_an_answer() -> Result<()> {
    const SENDERS: usize = 8;
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    for node in [world.publisher(), world.agent(0)] {
        let before = node.daemon.footprint()?;
        let (path, good) = valid_request(&world, node, &key);
        let root_key = world.topology.root_key();
        let requests = large_requests(path, root_key);
        beside_others(&world, &key, || {
            thread::scope(|scope| {
                let senders: Vec<_> = (0..SENDERS)
                    .map(|sender| (&requests[sender % requests.len()], &good))
                    .map(|(request, good)| {
                        scope.spawn(move || send_large(node, request, path, root_key, good))
                    })
                    .collect();
                senders.into_iter().try_for_each(|sender| sender.join().map_err(|_| anyhow!("a panic"))?)
            })
        })?;
        let after = node.daemon.footprint()?;
        ensure!(after.peak_bytes < before.peak_bytes + (24 << 20), "{before:?} {after:?}");
        expect_to_continue(node, path, root_key)?;
    }
    world.assert_works()
}

/// Sends the whole request before it reads the answer, as most clients do.
fn send_large(node: &Node, request: &[u8], path: &str, root_key: &str, good: &Value) -> Result<()> {
    let mut connection = Connection::open(node.http)?;
    connection.send(request).context("disconnected while it was still sending")?;
    let answer = connection.answer()?.context("no answer")?;
    assert_error(&answer, 413, "user/bad_request/request_body_too_large")?;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    if answer.header("connection") == Some("close") {
        ensure!(connection.answer()?.is_none(), "the daemon announced a close, and didn't close");
        return Ok(());
    }
    connection.post_json(path, root_key, good)?;
    let next = connection.answer()?.context("the daemon closed without announcing it")?;
    ensure!(next.status == 200, "{} {}", next.head, next.body);
    Ok(())
}

/// A client that expects 100 Continue gets the error before it sends the body.
fn expect_to_continue(node: &Node, path: &str, root_key: &str) -> Result<()> {
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {root_key}\r\nexpect: 100-continue\r\n\
         accept: application/json\r\ncontent-length: {LARGE}\r\n\r\n"
    );
    let mut connection = Connection::open(node.http)?;
    connection.send(head.as_bytes())?;
    let answer = connection.answer()?.context("no answer")?;
    assert_error(&answer, 413, "user/bad_request/request_body_too_large")
}

/// Sends `bytes` one by one, ten in a second, until the daemon answers or closes. Returns how long that took, and the
/// result.
fn trickle(node: &Node, start: &str, bytes: u8) -> Result<(Duration, Received)> {
    // Not after the server starts its timeout.
    let began = Instant::now();
    let mut connection = Connection::open(node.http)?;
    connection.send(start.as_bytes())?;
    let received = (0..200).try_for_each(|_| match connection.receive(Duration::from_millis(100)) {
        // A connection that was just closed may still accept a byte.
        Ok(Received::Nothing) => {
            connection.send(&[bytes]).map_or(ControlFlow::Continue(()), ControlFlow::Continue)
        }
        other => ControlFlow::Break(other),
    });
    match received {
        ControlFlow::Break(received) => Ok((began.elapsed(), received?)),
        ControlFlow::Continue(()) => Ok((began.elapsed(), Received::Nothing)),
    }
}

/// Failure: a client that sends a byte now and then keeps its connection forever, and many of them occupy all
/// connections.
#[test]
fn slow_requests_time_out_and_delay_no_other_client() -> Result<()> {
    const SLOW: usize = 40;
    let world = World::start(&short_timeouts())?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let nodes = [world.publisher(), world.agent(0)];
    let before = nodes.map(|node| node.daemon.footprint());
    let (heads, bodies) = beside_others(&world, &key, || {
        thread::scope(|scope| {
            let slow = nodes.iter().flat_map(|node| (0..SLOW).map(move |n| (*node, n)));
            let slow = slow.map(|(node, n)| {
                let path = valid_request(&world, node, &key).0;
                let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\naccept: application/json\r\n");
                if n % 2 == 0 {
                    return (true, scope.spawn(move || trickle(node, &format!("{head}x: "), b'x')));
                }
                let start = format!("{head}authorization: Bearer x\r\ncontent-length: 1000\r\n\r\n");
                (false, scope.spawn(move || trickle(node, &start, b' ')))
            });
            let slow: Vec<_> = slow.collect();
            let (mut heads, mut bodies) = (Vec::new(), Vec::new());
            for (is_head, slow) in slow {
                let ended = slow.join().map_err(|_| anyhow!("a client panicked"))??;
                if is_head { heads.push(ended) } else { bodies.push(ended) }
            }
            Ok((heads, bodies))
        })
    })?;
    for (after, received) in heads {
        ensure!(matches!(received, Received::Closed), "slow headers: {received:?} after {after:?}");
        ensure!((1..4).contains(&after.as_secs()), "closed after {after:?} instead of 1 s");
    }
    for (after, received) in bodies {
        let Received::Answer(answer) = received else {
            anyhow::bail!("a slow body: {received:?} after {after:?}")
        };
        assert_error(&answer, 408, "user/bad_request/request_timeout")?;
        ensure!((2..5).contains(&after.as_secs()), "answered after {after:?} instead of 2 s");
    }
    for (node, before) in nodes.iter().zip(before) {
        wait_until_closed(node, before?.open_files)?;
    }
    world.assert_works()
}

/// Failure: answers that no client reads fill the memory, or block the tasks that send them.
#[test]
fn clients_that_never_read_are_closed_and_cost_little() -> Result<()> {
    const NON_READERS: usize = 16;
    let world = World::start(&short_timeouts())?;
    // Makes each answer this large.
    let meta = json!({ "what": "x".repeat(16_000) });
    let key = world.create_key_with(json!({ "meta": meta }))?;
    world.cache_everywhere(&[&key])?;
    for node in [world.publisher(), world.agent(0)] {
        let before = node.daemon.footprint()?;
        let (path, body) = valid_request(&world, node, &key);
        let body = body.to_string();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            world.topology.root_key(),
            body.len()
        );
        let clients = beside_others(&world, &key, || {
            let clients = (0..NON_READERS).map(|_| send_and_never_read(node, &request.repeat(100)));
            let clients = clients.collect::<Result<Vec<_>>>()?;
            wait_until_closed(node, before.open_files + 4)?;
            Ok(clients)
        })?;
        let requests: usize = clients.iter().map(|(_, sent)| sent / request.len()).sum();
        let after = node.daemon.footprint()?;
        println!(
            "{requests} requests at {}, {} KiB",
            node.daemon.name(),
            (after.peak_bytes - before.peak_bytes) >> 10
        );
        // Otherwise the answers fit into the sockets' buffers.
        ensure!(requests * 16_000 > NON_READERS * (8 << 20), "too few requests to block the daemon");
        ensure!(after.peak_bytes < before.peak_bytes + (24 << 20), "{before:?} {after:?}");
    }
    world.assert_works()
}

/// Sends the same requests repeatedly until the connection accepts no more.
fn send_and_never_read(node: &Node, requests: &str) -> Result<(Connection, usize)> {
    let mut connection = Connection::open(node.http)?;
    let (mut sent, mut at) = (0, 0);
    loop {
        let taken = connection.send_some(&requests.as_bytes()[at..], Duration::from_millis(50))?;
        if taken == 0 {
            return Ok((connection, sent));
        }
        sent += taken;
        at = (at + taken) % requests.len();
    }
}

/// Held by each test that needs most of the connections that this process may have.
static CROWD: Mutex<()> = Mutex::new(());

/// Opens as many idle connections as `node` accepts. Other clients still get answers, and the daemon finally closes the
/// idle connections.
fn crowd(world: &World, node: &Node, key: &Key) -> Result<()> {
    const CONNECTIONS: usize = 10_000;
    let before = node.daemon.footprint()?;
    let began = Instant::now();
    let idle = (0..CONNECTIONS).map(|_| Connection::open(node.http)).collect::<Result<Vec<_>>>()?;
    println!("{CONNECTIONS} connections to {} took {:?}", node.daemon.name(), began.elapsed());
    // At first the daemon can't know which of them will send a request.
    try_eventually("another client to be answered", SOON, || Ok(send_request(world, node, key).ok()))?;
    let waited = (0..100).map(|_| send_request(world, node, key)).collect::<Result<Vec<_>>>()?;
    let slowest = waited.iter().max().copied().unwrap_or_default();
    let after = node.daemon.footprint()?;
    println!(
        "others waited {slowest:?} at most; {} files, {} KiB",
        after.open_files,
        after.resident_bytes >> 10
    );
    ensure!(slowest < SOON_ENOUGH, "others waited {slowest:?}");
    ensure!(after.open_files > CONNECTIONS * 9 / 10, "they are not connected: {after:?}");
    ensure!(after.open_files < CONNECTIONS + before.open_files + 200, "{before:?} {after:?}");
    ensure!(after.resident_bytes < before.resident_bytes + (256 << 20), "{before:?} {after:?}");
    wait_for_readiness(node, 200)?;
    // The daemon closes them although their clients still hold them open.
    wait_until_closed(node, before.open_files)?;
    drop(idle);
    Ok(())
}

fn crowded() -> Plan {
    let http = toml! { http = { idle_timeout = "6s" } };
    Plan { publisher: http.clone(), agents: http, ..plan(&["eu"]) }
}

/// Failure: idle connections lock out all other clients.
#[test]
fn publisher_answers_beside_ten_thousand_idle_connections() -> Result<()> {
    let _alone = CROWD.lock().unwrap_or_else(PoisonError::into_inner);
    allow_open_files(12_000)?;
    let world = World::start(&crowded())?;
    let key = world.create_key()?;
    crowd(&world, world.publisher(), &key)?;
    world.assert_works()
}

/// Failure: as above, at an agent.
#[test]
fn agent_answers_beside_ten_thousand_idle_connections() -> Result<()> {
    let _alone = CROWD.lock().unwrap_or_else(PoisonError::into_inner);
    allow_open_files(12_000)?;
    let world = World::start(&crowded())?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    crowd(&world, world.agent(0), &key)?;
    world.assert_works()
}

/// Failure: a daemon that gets no more sockets from the system stops or spins, or keeps its idle connections.
#[test]
fn idle_connections_are_closed_when_sockets_run_out() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    for node in [world.publisher(), world.agent(0)] {
        let before = node.daemon.footprint()?;
        node.daemon.limit_open_files(before.open_files as u64 + 20)?;
        let idle = (0..60).map(|_| Connection::open(node.http)).collect::<Result<Vec<_>>>()?;
        // The idle connections came first, and each has a second until it may be closed.
        let first = send_request(&world, node, &key)?;
        println!("the first request waited {first:?} for {}", node.daemon.name());
        ensure!(first < SOON, "it waited for the idle connections");
        throughout(Duration::from_secs(1), || {
            let waited = send_request(&world, node, &key)?;
            ensure!(waited < SOON_ENOUGH, "others waited {waited:?}");
            Ok(())
        })?;
        let log = node.daemon.stdout()? + &node.daemon.stderr()?;
        ensure!(log.contains("limit of open files"), "{}", node.daemon.log_tail());
        ensure!(log.matches("limit of open files").count() < 100, "it logged too many errors");
        drop(idle);
        node.daemon.limit_open_files(10_000)?;
    }
    world.assert_works()
}
