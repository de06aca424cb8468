//! A daemon is shut down while it is busy.

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::http::{Connection, RawAnswer};
use evictd_tests::process::Daemon;
use evictd_tests::topology::Plan;
use evictd_tests::wait::{eventually, try_eventually};
use serde_json::json;
use toml::toml;

use super::store_locked::Lock;
use super::{ClientHistory, DeleteAnswer, DeletionRequest};
use crate::world::{Key, SOON, UNAVAILABLE, World, plan, wait_for_readiness};

/// How long a daemon waits for requests in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The number of concurrent clients.
const CLIENTS: usize = 16;

/// Sends the deletion of `key` on a new connection, and doesn't wait for the answer.
fn send_deletion<'k>(world: &World, key: &'k Key) -> Result<(&'k Key, Connection)> {
    let mut connection = Connection::open(world.publisher().http)?;
    let body = json!({ "keyId": key.id });
    connection.post_json("/v2/keys.deleteKey", world.topology.root_key(), &body)?;
    Ok((key, connection))
}

/// Reads the answer to a deletion, which must be a success.
fn succeeded<'k>(key: &'k Key, answer: &RawAnswer) -> Result<DeletionRequest<'k>> {
    ensure!(answer.status == 200, "{} {}", answer.head, answer.body);
    let request = answer.body["meta"]["requestId"].as_str().context("no request id")?.to_owned();
    Ok(DeletionRequest { key, answer: DeleteAnswer::Deleted, request, took: Duration::ZERO })
}

/// Returns a deletion whose connection was closed without an answer.
fn unanswered(key: &Key) -> DeletionRequest<'_> {
    DeletionRequest { key, answer: DeleteAnswer::Unknown, request: String::new(), took: Duration::ZERO }
}

/// Waits until the daemon accepts no more connections.
fn wait_until_closed(address: SocketAddr) -> Result<()> {
    eventually("new connections to be refused", SOON, || TcpStream::connect(address).is_err().then_some(()))
}

fn assert_ended_well(daemon: &mut Daemon, signaled_at: Instant) -> Result<()> {
    let ended = daemon.wait_exit(DRAIN_LIMIT + SOON)?;
    ensure!(ended.success(), "{} ended with {ended}\n{}", daemon.name(), daemon.log_tail());
    println!("{} ended {:?} after the signal", daemon.name(), signaled_at.elapsed());
    Ok(())
}

/// Failure: the shutdown cuts off a request in flight, perhaps after its commit. Or it accepts a new connection, or
/// waits for an idle one.
#[test]
fn shutdown_answers_changes_in_flight_and_accepts_no_new_ones() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let keys = world.create_keys(CLIENTS)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let (http, root_key) = (world.publisher().http, world.topology.root_key().to_owned());
    let mut idle = Connection::open(http)?;
    idle.post_json("/v2/keys.getKey", &root_key, &json!({ "keyId": keys[0].id }))?;
    ensure!(idle.answer()?.is_some_and(|answer| answer.status == 200));
    let lock = Lock::take(&world)?;
    let in_flight = keys.iter().map(|key| send_deletion(&world, key)).collect::<Result<Vec<_>>>()?;
    // A later request that is answered shows that the earlier ones were accepted.
    world.call("keys.getKey", &json!({ "keyId": keys[0].id }))?;

    let signaled_at = Instant::now();
    world.topology.publisher.daemon.terminate()?;
    wait_until_closed(http)?;
    let unready = wait_for_readiness(world.publisher(), 503)?;
    ensure!(unready["waitingFor"].to_string().contains("shutting down"), "{unready}");
    ensure!(idle.answer()?.is_none(), "the shutdown waits for an idle connection");
    lock.release()?;
    let mut story = ClientHistory::default();
    for (key, mut connection) in in_flight {
        let answer = connection.answer()?.with_context(|| format!("{} was in flight: no answer", key.id))?;
        story.0.push(succeeded(key, &answer)?);
        assert_eq!(answer.header("connection"), Some("close"), "{}", answer.head);
        ensure!(connection.answer()?.is_none(), "the daemon announced a close, and didn't close");
    }
    assert_ended_well(&mut world.topology.publisher.daemon, signaled_at)?;

    world.topology.publisher.restart()?;
    story.check(&world)?;
    world.assert_works()
}

/// Failure: a client that waits for a receipt delays the shutdown, or gets no answer to its finished deletion.
#[test]
fn shutdown_answers_waiting_clients_with_the_current_receipt() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    // Prevents the confirmation.
    world.agent_mut(1).daemon.pause()?;
    let mut waiting = Connection::open(world.publisher().http)?;
    let body = json!({ "keyId": key.id }).to_string();
    let request = format!(
        "POST /v2/keys.deleteKey HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\nprefer: wait=30\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        world.topology.root_key(),
        body.len()
    );
    waiting.send(request.as_bytes())?;
    try_eventually("the deletion to be committed", SOON, || {
        let deleted = format!("SELECT deleted_at_m IS NOT NULL FROM keys WHERE id = '{}'", key.id);
        Ok((world.sql(&deleted)? == "1").then_some(()))
    })?;
    let signaled_at = Instant::now();
    world.topology.publisher.daemon.terminate()?;
    let answer = waiting.answer()?.context("a committed deletion was not answered")?;
    let receipt = &answer.body["meta"]["propagation"];
    assert_eq!((&receipt["final"], &receipt["state"]), (&json!(false), &json!("pending")), "{receipt}");
    assert_ended_well(&mut world.topology.publisher.daemon, signaled_at)?;
    ensure!(signaled_at.elapsed() < DRAIN_LIMIT, "the shutdown waited for the receipt");

    world.topology.publisher.restart()?;
    world.agent_mut(1).daemon.resume()?;
    ClientHistory(vec![succeeded(&key, &answer)?]).check(&world)?;
    world.assert_works()
}

/// Deletes `keys` one after the other on one connection until it is closed. Also returns whether the daemon announced
/// the close.
fn delete_until_closed<'k>(
    publisher: SocketAddr,
    root_key: &str,
    keys: &'k [Key],
    answered: &AtomicUsize,
) -> Result<(ClientHistory<'k>, bool)> {
    let mut connection = Connection::open(publisher)?;
    let mut story = ClientHistory::default();
    for key in keys {
        let sent = connection.post_json("/v2/keys.deleteKey", root_key, &json!({ "keyId": key.id }));
        // A partial answer is an error. A request that is sent while the daemon closes the connection gets none.
        let Some(answer) = sent.map_or(Ok(None), |()| connection.answer())? else {
            story.0.push(unanswered(key));
            return Ok((story, false));
        };
        story.0.push(succeeded(key, &answer)?);
        answered.fetch_add(1, Ordering::Relaxed);
        if answer.header("connection") == Some("close") {
            ensure!(connection.answer()?.is_none(), "the daemon announced a close, and didn't close");
            return Ok((story, true));
        }
    }
    Ok((story, false))
}

/// Failure: as above, for requests at any moment of a shutdown. Or a deletion without an answer was carried out.
#[test]
fn a_shutdown_under_load_answers_all_that_it_carries_out() -> Result<()> {
    const KEYS: usize = 60 * CLIENTS;
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let keys = world.create_keys(KEYS)?;
    world.wait_until_caught_up()?;
    world.cache_everywhere(&keys.iter().step_by(40).collect::<Vec<_>>())?;
    let (http, root_key) = (world.publisher().http, world.topology.root_key().to_owned());
    let answered = AtomicUsize::new(0);
    let results = thread::scope(|scope| {
        let clients: Vec<_> = keys
            .chunks(KEYS / CLIENTS)
            .map(|keys| (keys, &root_key, &answered))
            .map(|(keys, root_key, answered)| {
                scope.spawn(move || delete_until_closed(http, root_key, keys, answered))
            })
            .collect();
        eventually("deletions to be in flight", SOON, || {
            (answered.load(Ordering::Relaxed) >= KEYS / 8).then_some(())
        })?;
        let signaled_at = Instant::now();
        world.topology.publisher.daemon.terminate()?;
        let results =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        let results = results.collect::<Result<Vec<_>>>()?;
        assert_ended_well(&mut world.topology.publisher.daemon, signaled_at)?;
        ensure!(signaled_at.elapsed() < DRAIN_LIMIT, "the drain took as long as its limit");
        Ok::<_, anyhow::Error>(results)
    })?;
    let announced = results.iter().filter(|(_, is_announced)| *is_announced).count();
    let story = ClientHistory(results.into_iter().flat_map(|(story, _)| story.0).collect());
    println!(
        "{} answered, {announced} of {CLIENTS} connections ended with an announced close",
        story.count(DeleteAnswer::Deleted)
    );
    ensure!(story.0.len() < KEYS, "it ended too late to interrupt anything");
    ensure!(announced > 0, "no answer announced that the connection closes");

    world.topology.publisher.restart()?;
    for key in story.keys(DeleteAnswer::Unknown) {
        world.wait_for_codes(&[key], "VALID").context("a deletion without an answer was carried out")?;
    }
    story.check(&world)?;
    world.assert_works()
}

/// Failure: a gateway that follows readiness loses requests, because a daemon that was asked to end refuses them before
/// the gateway has noticed.
#[test]
fn lame_duck_serves_until_its_time_has_passed() -> Result<()> {
    let brief = toml! { shutdown = { delay = "2s" } };
    let endless = toml! { shutdown = { delay = "10m" } };
    let mut world = World::start(&Plan { agents: brief, publisher: endless, ..plan(&["eu"]) })?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let root_key = world.topology.root_key().to_owned();

    let agent = world.agent(0).http;
    let verify = json!({ "key": key.text });
    world.agent_mut(0).daemon.terminate()?;
    let mut served = 0;
    loop {
        // A new connection for each.
        let Ok(mut connection) = Connection::open(agent) else { break };
        connection.post_json("/v2/keys.verifyKey", &root_key, &verify)?;
        let Some(answer) = connection.answer()? else { break };
        assert_eq!(answer.body["data"]["code"], "VALID", "{}", answer.body);
        if served == 0 {
            let unready = wait_for_readiness(world.agent(0), 503)?;
            ensure!(unready["waitingFor"].to_string().contains("draining"), "{unready}");
        }
        served += 1;
    }
    ensure!(served > 1, "it was served {served} times");
    assert_ended_well(&mut world.agent_mut(0).daemon, Instant::now())?;

    world.topology.publisher.daemon.terminate()?;
    wait_for_readiness(world.publisher(), 503)?;
    let mut connection = Connection::open(world.publisher().http)?;
    connection.post_json("/v2/keys.getKey", &root_key, &json!({ "keyId": key.id }))?;
    let answer = connection.answer()?.context("no answer")?;
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "{}", answer.head);
    let publisher = &mut world.topology.publisher.daemon;
    publisher.terminate()?;
    assert_eq!(publisher.wait_exit(SOON)?.code(), Some(143), "a second signal ends it at once");
    world.agent_mut(0).daemon.restart()?;
    world.topology.publisher.restart()?;
    world.agent_mut(0).wait_until_ready()?;
    world.assert_works()
}

/// Failure: a change that never finishes keeps the process alive until SIGKILL.
#[test]
fn a_second_signal_ends_the_publisher_at_once() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let keys = world.create_keys(4)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let lock = Lock::take(&world)?;
    let in_flight = keys.iter().map(|key| send_deletion(&world, key)).collect::<Result<Vec<_>>>()?;
    let daemon = &mut world.topology.publisher.daemon;
    daemon.terminate()?;
    wait_until_closed(world.topology.publisher.http)?;
    let daemon = &mut world.topology.publisher.daemon;
    let again_at = Instant::now();
    daemon.terminate()?;
    let ended = daemon.wait_exit(SOON)?;
    assert_eq!(ended.code(), Some(143), "what shells report for SIGTERM");
    ensure!(again_at.elapsed() < Duration::from_secs(2), "it took {:?}", again_at.elapsed());
    ensure!(daemon.stderr()?.contains("exiting without a drain"), "{}", daemon.log_tail());
    drop(in_flight);
    lock.release()?;

    world.topology.publisher.restart()?;
    ClientHistory(keys.iter().map(unanswered).collect()).check(&world)?;
    world.assert_works()
}

/// Failure: a client that never finishes its request keeps the process alive.
#[test]
fn an_unfinished_request_delays_shutdown_by_the_drain_limit() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let mut endless = Connection::open(world.publisher().http)?;
    endless.send(
        b"POST /v2/keys.deleteKey HTTP/1.1\r\nhost: test\r\nauthorization: Bearer x\r\ncontent-length: 100\r\n\r\n{",
    )?;
    world.call("keys.getKey", &json!({ "keyId": key.id }))?;
    let signaled_at = Instant::now();
    world.topology.publisher.daemon.terminate()?;
    assert_ended_well(&mut world.topology.publisher.daemon, signaled_at)?;
    ensure!(signaled_at.elapsed() >= DRAIN_LIMIT, "the drain ended before its limit");
    let daemon = &world.topology.publisher.daemon;
    ensure!(daemon.stderr()?.contains("drain took too long"), "{}", daemon.log_tail());
    ensure!(endless.answer()?.is_none());
    world.topology.publisher.restart()?;
    world.wait_for_codes(&[&key], "VALID")?;
    world.assert_works()
}

/// Failure: a gateway that waits for a code gets none, and perhaps accepts the key.
#[test]
fn agent_shutdown_answers_verifications_in_flight() -> Result<()> {
    let agents = toml! { loads = { timeout = "5s" } };
    let mut world = World::start(&Plan { agents, ..plan(&["eu", "us"]) })?;
    let (cached, uncached) = (world.create_key()?, world.create_keys(CLIENTS)?);
    world.cache_everywhere(&[&cached])?;
    // An uncached key must be loaded from the paused publisher.
    world.topology.publisher.daemon.pause()?;
    let (http, root_key) = (world.agent(0).http, world.topology.root_key().to_owned());
    let verifying = uncached
        .iter()
        .map(|key| {
            let mut connection = Connection::open(http)?;
            connection.post_json("/v2/keys.verifyKey", &root_key, &json!({ "key": key.text }))?;
            Ok(connection)
        })
        .collect::<Result<Vec<_>>>()?;
    assert_eq!(world.code(world.agent(0), &cached)?, "VALID", "a cached key needs no load");

    let signaled_at = Instant::now();
    world.agent_mut(0).daemon.terminate()?;
    wait_until_closed(http)?;
    world.topology.publisher.daemon.resume()?;
    for mut connection in verifying {
        let answer = connection.answer()?.context("a verification in flight: no answer")?;
        let outcome = (answer.status, answer.body["data"]["code"].as_str());
        assert_eq!(outcome, (200, Some("VALID")), "{} {}", answer.head, answer.body);
        assert_eq!(answer.header("connection"), Some("close"), "{}", answer.head);
    }
    assert_ended_well(&mut world.agent_mut(0).daemon, signaled_at)?;
    world.wait_for_code(world.agent(1), &uncached[0], "VALID")?;
    world.agent_mut(0).restart()?;
    world.assert_works()
}

/// Failure: as above, when no publisher answers the agent.
#[test]
fn agent_shutdown_denies_verifications_it_cannot_decide() -> Result<()> {
    let mut world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    world.topology.publisher.daemon.pause()?;
    let mut connection = Connection::open(world.agent(0).http)?;
    connection.post_json("/v2/keys.verifyKey", world.topology.root_key(), &json!({ "key": key.text }))?;
    let signaled_at = Instant::now();
    world.agent_mut(0).daemon.terminate()?;
    let answer = connection.answer()?.context("no answer")?;
    assert_eq!(answer.status, 503, "{UNAVAILABLE}: {} {}", answer.head, answer.body);
    assert_ended_well(&mut world.agent_mut(0).daemon, signaled_at)?;
    world.topology.publisher.daemon.resume()?;
    world.agent_mut(0).restart()?;
    world.assert_works()
}
