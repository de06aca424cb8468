//! No secret is written to logs, to the database, or to the bus.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use evictd_tests::bus::NatsConnection;
use evictd_tests::http::{Client, raw};
use evictd_tests::nats_server::{Login, User};
use evictd_tests::topology::Plan;
use serde_json::json;
use toml::toml;

use crate::world::{Key, UNAVAILABLE, World, plan, wait_for_count, wait_for_readiness};

const LIVE: &str = "evictd.v1.live";

/// Opens connections that together receive all messages: requests with the publisher's login, the live feed and answers
/// with the agent's.
fn eavesdrop(world: &World) -> Result<[NatsConnection; 2]> {
    let home = &world.topology.home;
    let mut publisher = NatsConnection::connect(home.clients(), home.login(&User::Publisher)?)?;
    for kind in ["probe", "replay", "lookup", "applied"] {
        publisher.subscribe(&format!("evictd.v1.{kind}.>"), None)?;
    }
    let mut agent = NatsConnection::connect(home.clients(), home.login(&User::agent("eu", "agent-1"))?)?;
    agent.subscribe(LIVE, None)?;
    agent.subscribe("_INBOX_evictd.eu.agent-1.>", None)?;
    let errors = [publisher.sync()?, agent.sync()?].concat();
    ensure!(errors.is_empty(), "{errors:?}");
    Ok([publisher, agent])
}

/// Returns the number of messages received so far, and their subjects and payloads.
fn received(mut bus: NatsConnection) -> Result<(usize, Vec<u8>)> {
    bus.sync()?;
    let (mut messages, mut bytes) = (0, Vec::new());
    while let Some(message) = bus.next(Duration::ZERO)? {
        messages += 1;
        bytes.extend_from_slice(message.subject.as_bytes());
        bytes.extend(message.payload);
    }
    Ok((messages, bytes))
}

fn assert_absent(secrets: &[(&str, &str)], place: &str, bytes: &[u8]) {
    for (what, secret) in secrets {
        let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{what} was found in {place}");
    }
}

/// Uses secrets as users do, correctly and by mistake.
fn use_and_misuse(world: &mut World, keys: &[Key; 3]) -> Result<()> {
    let [good, deleted, erased] = keys;
    world.cache_everywhere(&[good, deleted, erased])?;
    world.delete(deleted)?;
    world.delete_permanently(erased)?;
    world.assert_gone(&[deleted, erased])?;

    let root_key = world.topology.root_key();
    let client = Client::new();
    for node in [world.publisher(), world.agent(0)] {
        // A key as an id, a key as a root key, a root key as a key, and secrets in unexpected members and headers.
        for body in
            [json!({ "keyId": good.text }), json!({ "key": root_key }), json!({ "secret": good.text })]
        {
            for operation in ["keys.deleteKey", "keys.verifyKey"] {
                world.topology.call(node, operation, &body)?;
                let url = format!("http://{}/v2/{operation}", node.http);
                client.post_json(&url, Some(&good.text), &body, &[("x-secret", root_key)])?;
            }
        }
        let garbage =
            format!("POST /v2/{root_key} HTTP/1.1\r\nauthorization: {root_key}\r\n{root_key}\r\n\r\n");
        raw(node.http, garbage.as_bytes())?;
    }

    // The bus is lost while a lookup is in flight.
    world.topology.home.kill()?;
    let late = Key { id: String::new(), text: format!("{}x", good.text) };
    assert_eq!(world.code(world.agent(0), &late)?, UNAVAILABLE);
    world.topology.home.restart()?;
    wait_for_readiness(world.agent(0), 200)?;
    world.assert_works()
}

/// Failure: a log, a page or a file contains a secret. The daemons log at level trace here, not only what they log by
/// default.
#[test]
fn no_key_root_key_or_password_is_written_anywhere() -> Result<()> {
    let verbose = toml! { log = { filter = "trace" } };
    let mut world = World::start(&Plan { publisher: verbose.clone(), agents: verbose, ..plan(&["eu"]) })?;
    // Long keys, so that the part that may be shown is small.
    let key = || world.create_key_with(json!({ "prefix": "prod", "byteLength": 32, "name": "ci" }));
    let keys = [key()?, key()?, key()?];
    use_and_misuse(&mut world, &keys).context("using the secrets")?;

    let password = |user| world.topology.home.login(&user).map(|Login { password, .. }| password.clone());
    let passwords = [password(User::Publisher)?, password(User::agent("eu", "agent-1"))?];
    // Of a key, the prefix and four characters may be shown.
    let shown = "prod_1234".len();
    let mut secrets: Vec<(&str, &str)> = keys.iter().map(|key| ("a key", &key.text[shown..])).collect();
    secrets.push(("the root key", &world.topology.root_key()["unkey_1234".len()..]));
    secrets.extend(passwords.iter().map(|password| ("a password", password.as_str())));

    let logs = world.logs()?;
    ensure!(logs.contains("TRACE") && logs.contains("applied"), "the daemons logged too little");
    assert_absent(&secrets, "a log", logs.as_bytes());
    for node in [world.publisher(), world.agent(0)] {
        for page in ["status", "metrics", "readyz"] {
            let text = Client::new().get(&format!("http://{}/{page}", node.admin))?.text;
            assert_absent(&secrets, &format!("/{page} of {}", node.daemon.name()), text.as_bytes());
        }
    }
    let mut files = 0;
    for file in fs::read_dir(world.dir())? {
        let path = file?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("home.db")) {
            assert_absent(&secrets, &path.display().to_string(), &fs::read(&path)?);
            files += 1;
        }
    }
    ensure!(files >= 2, "the database or its write-ahead log is missing");
    Ok(())
}

/// Failure: the bus carries keys, so that read access to it is access to the keys.
#[test]
fn bus_carries_only_hashes_of_keys() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let buses = eavesdrop(&world)?;
    let [key, erased] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&key, &erased])?;
    world.delete(&key)?;
    world.delete_permanently(&erased)?;
    world.assert_gone(&[&key, &erased])?;
    wait_for_count(world.publisher(), "evictd_publisher_confirmed_seconds_count", &[], 2)?;

    let root_key = &world.topology.root_key()["unkey_".len()..];
    let secrets = [("a key", key.text.as_str()), ("a key", &erased.text), ("the root key", root_key)];
    for bus in buses {
        let (messages, bytes) = received(bus)?;
        ensure!(messages > 4, "only {messages} messages were received");
        assert_absent(&secrets, "a message", &bytes);
    }
    Ok(())
}
