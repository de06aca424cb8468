//! Many agents that reconnect at once, and caches that are suddenly empty under load.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::process::Footprint;
use evictd_tests::proxy::WireMode;
use evictd_tests::random::Random;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::{eventually, throughout, try_eventually};
use serde_json::Value;
use toml::{Table, toml};

use crate::rivals::declare_successfully;
use crate::world::{
    ApiClient, Key, SOON, UNAVAILABLE, World, assert_bounded, breakable, count, flushes, plan, wait_for_mode,
    with_bound,
};

/// The limit of concurrent loads of one agent.
const LOADS_MAX: u64 = 8;

/// Returns settings with which the publisher sheds an agent as soon as it has one load too many in flight: an agent
/// gets half of `lookups_max`.
fn limits() -> (Table, Table) {
    let publisher = toml! { authority = { lookups_max = 16 } };
    let mut agents = toml! { loads = { timeout = "5s" } };
    if let Some(loads) = agents["loads"].as_table_mut() {
        loads.insert("concurrent_max".to_owned(), (LOADS_MAX as i64).into());
    }
    (publisher, agents)
}

/// Asserts that no agent had more loads in flight than its limit.
fn assert_loads_were_bounded(world: &World) -> Result<()> {
    assert_eq!(count(world.publisher(), "evictd_publisher_lookups_total", &[("outcome", "busy")])?, 0);
    for agent in world.topology.agents() {
        let busy = count(agent, "evictd_agent_loads_total", &[("outcome", "busy")])?;
        assert_eq!(busy, 0, "{}", agent.daemon.name());
    }
    Ok(())
}

/// Returns the connections to NATS: their names, and their numbers of subscriptions.
fn connections(world: &World) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for connection in world.topology.home.connections()? {
        let name = connection["name"].as_str().unwrap_or("nameless").to_owned();
        let subscriptions = connection["subscriptions"].as_u64().context("no count of subscriptions")?;
        ensure!(found.insert(name.clone(), subscriptions).is_none(), "{name} is connected twice");
    }
    Ok(found)
}

fn footprints(world: &World) -> Result<Vec<Footprint>> {
    let nodes = world.topology.agents().chain([world.publisher()]);
    nodes.map(|node| node.daemon.footprint()).collect()
}

/// Failure: each reconnect leaks memory, files or subscriptions; or the last of many is missed; or all agents together
/// overload the publisher.
#[test]
fn ten_agents_that_flap_fifty_times_leave_nothing_behind() -> Result<()> {
    const FLAPS: usize = 50;
    const BOUND: Duration = Duration::from_secs(30);
    let names = (1..=10).map(|agent| format!("agent-{agent}")).collect();
    let (publisher, agents) = limits();
    let plan = Plan { regions: vec![("eu".to_owned(), names)], publisher, agents, ..breakable(&[]) };
    let world = World::start(&plan)?;
    let mut random = Random::draw()?;
    let repeat = random.how_to_repeat();
    let keys = world.create_keys(FLAPS)?;
    let good = world.create_key()?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    world.cache_everywhere(&[&good])?;
    let (connected, before) = (connections(&world)?, footprints(&world)?);
    ensure!(connected.len() > 10, "a connection of an agent or the publisher is missing: {connected:?}");
    let callers: Vec<ApiClient> =
        world.topology.agents().map(|agent| ApiClient::new(&world, agent)).collect();

    let eu = &world.topology.regions[0];
    let mut deleted: Vec<(&Key, Instant)> = Vec::new();
    for key in &keys {
        for mode in [WireMode::Cut, WireMode::Pass] {
            eu.set_wires(mode)?;
            // From no time at all to longer than a reconnect takes.
            throughout(Duration::from_millis(random.below(150) as u64), || {
                let agent = &callers[random.below(callers.len())];
                for (key, deleted_at) in &deleted {
                    let asked_at = Instant::now();
                    assert_bounded(asked_at, *deleted_at, BOUND, &agent.code(key)?)?;
                }
                ensure!(agent.code(&good)? == "VALID");
                Ok(())
            })
            .with_context(|| repeat.clone())?;
            if mode == WireMode::Cut {
                world.delete(key)?;
                deleted.push((key, Instant::now()));
            }
        }
    }
    let healed_at = Instant::now();
    world.wait_until_caught_up().with_context(|| repeat.clone())?;
    println!("ten agents caught up {:?} after the last of {FLAPS} flaps", healed_at.elapsed());
    world.assert_gone(&keys.iter().collect::<Vec<_>>())?;

    // The same connections as before, with as many subscriptions.
    eventually("NATS to drop closed connections", SOON, || {
        connections(&world).ok().filter(|now| *now == connected)
    })
    .with_context(|| format!("{:?}", connections(&world)))?;
    for (before, after) in before.iter().zip(footprints(&world)?) {
        ensure!(after.resident_bytes < before.resident_bytes + (24 << 20), "{before:?} {after:?}");
        ensure!(after.open_files <= before.open_files + 8, "{before:?} {after:?}");
    }
    assert_loads_were_bounded(&world)?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "live")?;
        assert_eq!(flushes(agent)?, 0);
    }
    world.assert_works()
}

/// What the clients of one agent saw.
#[derive(Default)]
struct AnswerCounts {
    valid: AtomicU64,
    unavailable: AtomicU64,
}

/// Verifies all of `keys` continuously with many clients while `event` runs. Any code other than VALID and UNAVAILABLE
/// is a failure.
fn under_load<T>(
    world: &World,
    agent: &Node,
    keys: &[Key],
    event: impl FnOnce(&AnswerCounts) -> Result<T>,
) -> Result<T> {
    const CLIENTS: usize = 32;
    let caller = ApiClient::new(world, agent);
    let (seen, over) = (AnswerCounts::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (caller, seen, over) = (caller.clone(), &seen, &over);
                let keys = keys.iter().cycle().skip(client * keys.len() / CLIENTS);
                scope.spawn(move || {
                    for key in keys.take_while(|_| !over.load(Ordering::Relaxed)) {
                        // An agent that is being restarted answers nothing.
                        let Ok(code) = caller.code(key) else { continue };
                        match code.as_str() {
                            "VALID" => seen.valid.fetch_add(1, Ordering::Relaxed),
                            UNAVAILABLE => seen.unavailable.fetch_add(1, Ordering::Relaxed),
                            other => return Err(anyhow!("a valid key was answered {other}")),
                        };
                    }
                    Ok(())
                })
            })
            .collect();
        let outcome = event(&seen);
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        outcome
    })
}

/// Waits until all of `keys` are VALID without a load.
fn wait_until_all_is_cached(world: &World, agent: &Node, keys: &[Key]) -> Result<()> {
    let misses = || count(agent, "evictd_agent_cache_misses_total", &[]);
    let caller = ApiClient::new(world, agent);
    try_eventually("all keys to be cached again", SOON, || {
        let before = misses()?;
        for key in keys {
            if caller.code(key)? != "VALID" {
                return Ok(None);
            }
        }
        Ok((misses()? == before).then_some(()))
    })
}

const HOT: usize = 2_000;

fn hot(bound: Duration) -> Result<(World, Vec<Key>)> {
    let (publisher, agents) = limits();
    let mut plan = with_bound(bound, plan(&["eu"]));
    (plan.publisher, plan.agents) = (publisher, agents);
    let world = World::start(&plan)?;
    let keys = world.create_keys(HOT)?;
    world.wait_until_caught_up()?;
    wait_until_all_is_cached(&world, world.agent(0), &keys)?;
    Ok((world, keys))
}

/// Failure: after a flush, all keys are loaded at once, which crowds out the probes that renew the lease.
#[test]
fn cache_is_reloaded_with_bounded_loads_after_a_flush() -> Result<()> {
    let (world, keys) = hot(Duration::from_secs(2))?;
    let agent = world.agent(0);
    let loads = |outcome| count(agent, "evictd_agent_loads_total", &[("outcome", outcome)]);
    let before = loads("ok")?;
    under_load(&world, agent, &keys, |seen| {
        declare_successfully(&world.store())?;
        let flushed = || flushes(agent).is_ok_and(|flushes| flushes == 1).then_some(());
        eventually("the flush", SOON, flushed)?;
        let flushed_at = Instant::now();
        let reloaded = || {
            let status: Value = agent.status()?;
            ensure!(status["mode"] == "live", "probes were crowded out: {}", status["mode"]);
            let loaded = loads("ok")? - before;
            Ok((loaded >= HOT as u64).then_some(()))
        };
        try_eventually("everything to be loaded again", SOON, reloaded)?;
        let (valid, unavailable) =
            (seen.valid.load(Ordering::Relaxed), seen.unavailable.load(Ordering::Relaxed));
        println!(
            "{HOT} keys were loaded again {:?} after a flush; {valid} verifications were answered, \
             {unavailable} were UNAVAILABLE",
            flushed_at.elapsed()
        );
        ensure!(agent.status()?["mode"] == "live");
        Ok(())
    })?;
    wait_until_all_is_cached(&world, agent, &keys)?;
    ensure!(loads("shed")? > 0, "the limit was never reached, so it wasn't tested");
    assert_eq!(loads("timeout")?, 0);
    assert_loads_were_bounded(&world)?;
    assert_eq!(flushes(agent)?, 1);
    world.assert_works()
}

/// Failure: after a cold start, all keys are loaded at once, which crowds out the probes that renew the lease.
#[test]
fn cache_is_filled_with_bounded_loads_after_a_cold_start() -> Result<()> {
    let (mut world, keys) = hot(Duration::from_secs(2))?;
    world.agent_mut(0).daemon.kill()?;
    let restarted = |world: &mut World| {
        world.agent_mut(0).daemon.restart()?;
        world.agent_mut(0).wait_until_ready()
    };
    restarted(&mut world)?;
    let agent = world.agent(0);
    let loads = |outcome| count(agent, "evictd_agent_loads_total", &[("outcome", outcome)]);
    under_load(&world, agent, &keys, |_| {
        try_eventually("everything to be loaded", SOON, || {
            ensure!(agent.status()?["mode"] == "live", "probes were crowded out");
            Ok((loads("ok")? >= HOT as u64).then_some(()))
        })
    })?;
    wait_until_all_is_cached(&world, agent, &keys)?;
    ensure!(loads("shed")? > 0, "the limit was never reached, so it wasn't tested");
    assert_loads_were_bounded(&world)?;
    world.assert_works()
}
