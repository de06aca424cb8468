//! An agent that receives nothing, can send nothing, or is paused for longer than the bound.
//!
//! The bound is small, except in one test.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::{Way, WireMode};
use evictd_tests::topology::{Node, Plan, Servers};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::json;
use toml::toml;

use crate::world::{
    Key, SOON, UNAVAILABLE, World, assert_bounded, breakable, connects, count, flushes, wait_for_mode,
    wait_for_readiness, wait_for_warning, wait_until_settled, with_bound,
};

const BOUND: Duration = Duration::from_secs(2);

/// Returns the conditions that `/readyz` of `node` waits for.
fn conditions(node: &Node, status: u16) -> Result<Vec<String>> {
    let body = wait_for_readiness(node, status)?;
    let waiting = body["waitingFor"].as_array().cloned().unwrap_or_default();
    for condition in &waiting {
        ensure!(condition["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "no reason: {body}");
    }
    Ok(waiting.iter().filter_map(|condition| Some(condition["condition"].as_str()?.to_owned())).collect())
}

/// Failure: a region that receives no deletions goes on accepting the keys. Each way to cut it off is tried.
#[test]
fn cut_off_region_denies_within_the_bound_and_recovers() -> Result<()> {
    let ways = [
        WireMode::Cut,
        WireMode::BlackHole(Way::ToClient),
        WireMode::BlackHole(Way::ToServer),
        WireMode::BlackHole(Way::Both),
    ];
    let world = World::start(&with_bound(BOUND, breakable(&["cut", "deaf", "mute", "lost", "near"])))?;
    wait_until_settled(world.agent(0))?;
    let near = world.agent(ways.len());
    let far = || (0..ways.len()).map(|region| world.agent(region));
    let [good, doomed] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&good, &doomed])?;
    let head = world.wait_until_caught_up()?;

    for (site, way) in world.topology.regions.iter().zip(ways) {
        site.set_wires(way)?;
    }
    world.delete(&doomed)?;
    let deleted_at = Instant::now();
    world.wait_for_code(near, &doomed, "NOT_FOUND")?;
    throughout(BOUND * 3, || {
        for agent in far() {
            let asked_at = Instant::now();
            assert_bounded(asked_at, deleted_at, BOUND, &world.code(agent, &doomed)?)?;
        }
        Ok(())
    })?;
    for agent in far() {
        // Both are denied because the agent has no proof, not because it received the deletion.
        assert_eq!(world.code(agent, &good)?, UNAVAILABLE, "{}", agent.daemon.name());
        assert_eq!(world.code(agent, &doomed)?, UNAVAILABLE, "{}", agent.daemon.name());
        wait_for_mode(agent, "expired")?;
        assert_eq!(count(agent, "evictd_agent_lease_remaining_seconds", &[])?, 0);
        ensure!(count(agent, "evictd_agent_verifications_total", &[("code", UNAVAILABLE)])? > 0);
        ensure!(conditions(agent, 503)?.contains(&"lease".to_owned()));
    }
    let cut = wait_for_readiness(world.agent(0), 503)?;
    ensure!(
        cut["warnings"].to_string().contains("a connection to"),
        "the missing connection isn't named: {cut}"
    );
    wait_for_mode(near, "live")?;
    world.wait_for_code(near, &good, "VALID")?;

    for site in &world.topology.regions {
        site.set_wires(WireMode::Pass)?;
    }
    assert_recovers_quickly(&world)?;
    for agent in far() {
        wait_for_mode(agent, "live")?;
        assert_eq!(conditions(agent, 200)?, Vec::<String>::new());
    }
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")?;
    assert_eq!(world.wait_until_caught_up()?, head + 1);
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0, "{}: a gap must not cause a flush", agent.daemon.name());
    }
    Ok(())
}

/// Failure: a region whose server is cut off from home doesn't notice, because its agents are still connected to that
/// server; or it recovers late.
#[test]
fn region_whose_server_is_cut_off_denies_and_recovers() -> Result<()> {
    let ways = [WireMode::Cut, WireMode::BlackHole(Way::Both)];
    let plan = Plan { servers: Servers::PerRegion, ..breakable(&["cut", "lost", "near"]) };
    let world = World::start(&with_bound(BOUND, plan))?;
    let near = world.agent(ways.len());
    let [good, doomed] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&good, &doomed])?;
    for (site, way) in world.topology.regions.iter().zip(ways) {
        site.set_wires(way)?;
    }
    world.delete(&doomed)?;
    let deleted_at = Instant::now();
    world.wait_for_code(near, &doomed, "NOT_FOUND")?;
    throughout(BOUND * 3, || {
        for region in 0..ways.len() {
            let asked_at = Instant::now();
            assert_bounded(asked_at, deleted_at, BOUND, &world.code(world.agent(region), &doomed)?)?;
        }
        Ok(())
    })?;
    for region in 0..ways.len() {
        wait_for_mode(world.agent(region), "expired")?;
        let connected = count(world.agent(region), "evictd_agent_nats_connected", &[])?;
        assert_eq!(connected, connects(world.agent(region))?, "the agent itself was disconnected");
    }
    for site in &world.topology.regions {
        site.set_wires(WireMode::Pass)?;
    }
    assert_recovers_quickly(&world)?;
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0, "{}: a gap must not cause a flush", agent.daemon.name());
    }
    Ok(())
}

/// Asserts that every agent is live again soon after the wires healed: on an idle machine within a second.
fn assert_recovers_quickly(world: &World) -> Result<()> {
    const ON_A_BUSY_MACHINE: Duration = Duration::from_secs(5);
    let healed_at = Instant::now();
    let mut live: Vec<(String, Duration)> = Vec::new();
    try_eventually("all agents to be live again", ON_A_BUSY_MACHINE, || {
        for agent in world.topology.agents() {
            let name = agent.daemon.name();
            if live.iter().all(|(other, _)| other != name) && agent.status()?["mode"] == "live" {
                live.push((name.to_owned(), healed_at.elapsed()));
            }
        }
        Ok((live.len() == world.topology.agents().count()).then_some(()))
    })
    .with_context(|| format!("so far: {live:?}"))?;
    println!("live again after the heal: {live:?}");
    Ok(())
}

/// Failure: a deletion is lost in a cut that is too short for either end to notice.
#[test]
fn cuts_shorter_than_a_heartbeat_lose_nothing() -> Result<()> {
    const CUTS: usize = 20;
    let bound = Duration::from_secs(30);
    let world = World::start(&breakable(&["eu", "us"]))?;
    let keys = world.create_keys(CUTS)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let eu = &world.topology.regions[0];
    let connected = connects(world.agent(0))?;
    let mut slowest = Duration::ZERO;
    for key in &keys {
        eu.set_wires(WireMode::Cut)?;
        world.delete(key)?;
        world.wait_for_code(world.agent(1), key, "NOT_FOUND")?;
        assert_eq!(world.code(world.agent(0), key)?, "VALID", "eu received it early");
        eu.set_wires(WireMode::Pass)?;
        let healed_at = Instant::now();
        world.wait_for_code(world.agent(0), key, "NOT_FOUND")?;
        slowest = slowest.max(healed_at.elapsed());
    }
    println!("missed deletions arrived at most {slowest:?} after a short cut");
    ensure!(slowest < bound / 5, "no faster than waiting for the next probe: {slowest:?}");
    world.assert_gone(&keys.iter().collect::<Vec<_>>())?;
    assert_eq!(flushes(world.agent(0))?, 0);
    assert_eq!(connects(world.agent(0))?, connected * (CUTS as u64 + 1));
    Ok(())
}

/// Failure: an agent that was paused answers its next request as if no time had passed.
#[test]
fn paused_agent_serves_nothing_deleted_during_the_pause() -> Result<()> {
    const REQUESTS: usize = 16;
    let mut world = World::start(&with_bound(BOUND, breakable(&["eu", "us"])))?;
    let [good, doomed] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&good, &doomed])?;
    let hits = count(world.agent(0), "evictd_agent_cache_hits_total", &[])?;

    world.agent_mut(0).daemon.pause()?;
    world.delete(&doomed)?;
    let deleted_at = Instant::now();
    throughout(BOUND + BOUND / 4, || world.wait_for_code(world.agent(1), &doomed, "NOT_FOUND"))?;
    ensure!(deleted_at.elapsed() > BOUND);
    // These wait in the sockets. The agent reads them first when it resumes.
    let body = json!({ "key": doomed.text }).to_string();
    let request = format!(
        "POST /v2/keys.verifyKey HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        world.topology.root_key(),
        body.len()
    );
    let waiting: Vec<TcpStream> = (0..REQUESTS)
        .map(|_| {
            let mut stream = TcpStream::connect(world.agent(0).http)?;
            stream.write_all(request.as_bytes())?;
            Ok(stream)
        })
        .collect::<Result<_>>()?;
    world.agent_mut(0).daemon.resume()?;
    for mut stream in waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let denied = answer.starts_with("HTTP/1.1 503 ") || answer.contains(r#""code":"NOT_FOUND""#);
        assert!(denied, "{answer}");
    }

    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")?;
    wait_for_mode(world.agent(0), "live")?;
    assert_eq!(flushes(world.agent(0))?, 0);
    ensure!(count(world.agent(0), "evictd_agent_cache_hits_total", &[])? > hits);
    Ok(())
}

/// Failure: agents go on serving while their publisher is paused, or never recover after it resumes.
#[test]
fn agents_of_a_paused_publisher_deny_and_recover() -> Result<()> {
    let mut world = World::start(&with_bound(BOUND, breakable(&["eu", "us"])))?;
    let good = world.create_key()?;
    world.cache_everywhere(&[&good])?;
    world.topology.publisher.daemon.pause()?;
    for agent in world.topology.agents() {
        world.wait_for_code(agent, &good, UNAVAILABLE)?;
        wait_for_mode(agent, "expired")?;
    }
    world.topology.publisher.daemon.resume()?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "live")?;
        assert_eq!(flushes(agent)?, 0);
    }
    world.wait_for_codes(&[&good], "VALID")?;
    world.assert_works()
}

/// Failure: with the policy `serve_stale`, stale answers are not marked, or a key is accepted whose deletion was
/// applied.
#[test]
fn stale_answers_require_the_policy_and_are_marked() -> Result<()> {
    let plan = with_bound(BOUND, breakable(&["eu"]));
    let agents = toml! {
        loads = { timeout = "300ms" }
        partition = { policy = "serve_stale" }
    };
    let world = World::start(&Plan { agents, ..plan })?;
    let agent = world.agent(0);
    let [good, deleted, lost] = [world.create_key()?, world.create_key()?, world.create_key()?];
    wait_until_settled(agent)?;
    world.cache_everywhere(&[&good, &deleted, &lost])?;
    world.delete(&deleted)?;
    world.assert_gone(&[&deleted])?;
    let fresh = world.topology.call(agent, "keys.verifyKey", &json!({ "key": good.text }))?;
    ensure!(
        fresh.body["meta"]["stale"].is_null() && fresh.header("evictd-stale").is_none(),
        "{}",
        fresh.text
    );

    world.topology.regions[0].set_wires(WireMode::Cut)?;
    world.delete(&lost)?;
    wait_for_mode(agent, "expired")?;
    for key in [&good, &lost] {
        let answer = world.topology.call(agent, "keys.verifyKey", &json!({ "key": key.text }))?;
        assert_eq!(answer.body["data"]["code"], "VALID", "{}", answer.text);
        let age = answer.body["meta"]["stale"]["ageSeconds"].as_u64();
        ensure!(age.is_some(), "the answer is not marked: {}", answer.text);
        assert_eq!(answer.header("evictd-stale").and_then(|seconds| seconds.parse().ok()), age);
    }
    ensure!(world.code(agent, &deleted)? != "VALID", "its deletion had been applied");
    // It stays ready: a load balancer that took it out of service would defeat the policy.
    wait_for_warning(agent, "a proof from a publisher")?;
    ensure!(count(agent, "evictd_agent_stale_answers_total", &[("code", "VALID")])? >= 2);

    world.topology.regions[0].set_wires(WireMode::Pass)?;
    world.assert_gone(&[&deleted, &lost])?;
    world.wait_for_codes(&[&good], "VALID")
}

/// Failure: with the default configuration, a region that is cut off accepts a deleted key for more than 30 seconds, or
/// denies long before.
#[test]
fn with_the_default_configuration_the_bound_is_30_seconds() -> Result<()> {
    const DEFAULT_BOUND: Duration = Duration::from_secs(30);
    let world = World::start(&breakable(&["eu", "us"]))?;
    let doomed: Key = world.create_key()?;
    world.cache_everywhere(&[&doomed])?;
    assert_eq!(count(world.agent(0), "evictd_agent_propagation_bound_seconds", &[])?, 30);

    world.topology.regions[0].set_wires(WireMode::BlackHole(Way::Both))?;
    world.delete(&doomed)?;
    let deleted_at = Instant::now();
    world.wait_for_code(world.agent(1), &doomed, "NOT_FOUND")?;
    let mut last_valid = Duration::ZERO;
    throughout(DEFAULT_BOUND + SOON / 10, || {
        let asked_at = Instant::now();
        let code = world.code(world.agent(0), &doomed)?;
        if code == "VALID" {
            last_valid = asked_at.duration_since(deleted_at);
        }
        assert_bounded(asked_at, deleted_at, DEFAULT_BOUND, &code)
    })?;
    // Probes are 5 s apart and the margin is 3 s, so a lease lasts 22 s at least.
    ensure!(last_valid > Duration::from_secs(20), "the lease ended after only {last_valid:?}");
    wait_for_mode(world.agent(0), "expired")?;
    assert_eq!(world.code(world.agent(0), &doomed)?, UNAVAILABLE);

    world.topology.regions[0].set_wires(WireMode::Pass)?;
    world.assert_gone(&[&doomed])?;
    wait_for_mode(world.agent(0), "live")
}
