//! Wall clocks that are wrong by an hour, or set while the daemons run. They only provide dates: no guarantee
//! depends on them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::WireMode;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::{throughout, try_eventually};
use evictd_tests::wall_clock::WallClock;
use serde_json::json;
use toml::toml;

use crate::world::{
    ApiClient, Key, SOON, UNAVAILABLE, World, assert_bounded, breakable, count, flushes, wait_for_count,
    wait_for_mode, wall_millis, with_bound,
};

const BOUND: Duration = Duration::from_secs(2);
const HOUR: i64 = 3600;
const OFFSET: &str = "evictd_agent_clock_offset_seconds";
const LAG: &str = "evictd_agent_propagation_lag_seconds";
const CONFIRMED: &str = "evictd_publisher_confirmed_seconds_count";

fn plan(regions: &[&str]) -> Plan {
    let publisher = toml! { sequencer = { expiry_interval = "100ms" } };
    with_bound(BOUND, Plan { publisher, ..breakable(regions) })
}

/// Restarts `node` with a wall clock that is wrong by `seconds`.
fn restart_with_clock(node: &mut Node, dir: &Path, seconds: i64) -> Result<WallClock> {
    let clock = WallClock::give_to(&mut node.daemon, dir, seconds)?;
    // It says that it leaves, so that no receipt waits for the old process.
    ensure!(node.daemon.stop(SOON)?.success(), "{}", node.daemon.log_tail());
    node.restart()?;
    Ok(clock)
}

/// Waits until `agent` has measured that home's clock is ahead of its own by `seconds`.
fn wait_for_offset(agent: &Node, seconds: i64) -> Result<()> {
    let what = format!("{} to measure that home is {seconds} s ahead", agent.daemon.name());
    let mut last = None;
    let outcome = try_eventually(&what, SOON, || {
        last = agent.metrics()?.value(OFFSET, &[]);
        Ok(last.filter(|offset| (offset - seconds as f64).abs() < 0.5).map(drop))
    });
    outcome.with_context(|| format!("it measured {last:?}"))
}

/// Asserts every guarantee about deletions and expiry, as if all clocks were right. Home's clock is ahead of this
/// machine's by `home` seconds.
fn assert_guarantees(world: &World, home: i64) -> Result<()> {
    let good = world.create_key()?;
    let doomed: Vec<Key> = (0..5).map(|_| world.create_key()).collect::<Result<_>>()?;
    world.cache_everywhere(&[&good])?;
    world.cache_everywhere(&doomed.iter().collect::<Vec<_>>())?;
    assert_deletions_are_quick_and_dated(world, &doomed)?;

    let expires = wall_millis()? + home * 1_000 + 2_500;
    let ending = world.create_key_with(json!({ "expires": expires }))?;
    let lasting = world.create_key_with(json!({ "expires": expires + 60_000 }))?;
    world.cache_everywhere(&[&lasting, &ending])?;
    for agent in world.topology.agents() {
        try_eventually("the key to expire", SOON, || {
            let (code, now) = (world.code(agent, &ending)?, wall_millis()? + home * 1_000);
            ensure!(code == "VALID" || now > expires - 200, "{code} {} ms too early", expires - now);
            ensure!(code != "VALID" || now < expires + 2_000, "VALID {} ms after its expiry", now - expires);
            Ok((code == "EXPIRED").then_some(()))
        })?;
    }
    // Longer than a lease, which must be renewed without a denied request in between.
    throughout(BOUND + BOUND / 2, || {
        for agent in world.topology.agents() {
            let name = agent.daemon.name();
            ensure!(world.code(agent, &good)? == "VALID", "the good key at {name}");
            ensure!(world.code(agent, &lasting)? == "VALID", "the lasting key at {name}");
            ensure!(agent.status()?["mode"] == "live", "{name} isn't live");
        }
        Ok(())
    })?;
    for agent in world.topology.agents() {
        assert_eq!((flushes(agent)?, count(agent, "evictd_agent_bound_breaches_total", &[])?), (0, 0));
    }
    Ok(())
}

fn assert_deletions_are_quick_and_dated(world: &World, doomed: &[Key]) -> Result<()> {
    let lags = || -> Result<Vec<_>> {
        let lag = |agent: &Node| agent.metrics()?.histogram(LAG, &[]).context("no lag");
        world.topology.agents().map(lag).collect()
    };
    // Until then, receipts may wait for the old process of a restarted agent.
    let regions = world.topology.regions.len() as u64;
    wait_for_count(world.publisher(), "evictd_publisher_agents", &[("state", "live")], regions)?;
    let before = lags()?;
    let confirmed = count(world.publisher(), CONFIRMED, &[])?;
    for key in doomed {
        world.delete(key)?;
        world.wait_for_codes(&[key], "NOT_FOUND")?;
    }
    for (before, after) in before.iter().zip(lags()?) {
        let quick = after.at_most(1.0).context("no edge at 1 s")? - before.at_most(1.0).unwrap_or(0.0);
        assert_eq!((quick, after.count - before.count), (doomed.len() as f64, doomed.len() as f64));
        ensure!(
            after.sum - before.sum < doomed.len() as f64,
            "the lags add up to {} s",
            after.sum - before.sum
        );
    }
    wait_for_count(world.publisher(), CONFIRMED, &[], confirmed + doomed.len() as u64 * regions)?;
    wait_for_count(world.publisher(), "evictd_publisher_unconfirmed_deletions", &[], 0)
}

/// Asserts that the lease expires on time, neither an hour early nor an hour late.
fn assert_lease_expires_on_time(world: &World) -> Result<()> {
    let [good, doomed] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&good, &doomed])?;
    for site in &world.topology.regions {
        site.set_wires(WireMode::Cut)?;
    }
    world.delete(&doomed)?;
    let deleted_at = Instant::now();
    let callers: Vec<ApiClient> = world.topology.agents().map(|agent| ApiClient::new(world, agent)).collect();
    for caller in &callers {
        ensure!(caller.code(&good)? == "VALID", "it has a proof that is younger than the bound");
    }
    throughout(BOUND * 2, || {
        for caller in &callers {
            let asked_at = Instant::now();
            assert_bounded(asked_at, deleted_at, BOUND, &caller.code(&doomed)?)?;
        }
        Ok(())
    })?;
    for (agent, caller) in world.topology.agents().zip(&callers) {
        assert_eq!(caller.code(&good)?, UNAVAILABLE);
        wait_for_mode(agent, "expired")?;
    }
    for site in &world.topology.regions {
        site.set_wires(WireMode::Pass)?;
    }
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")
}

/// Failure: an agent uses its wall clock to order changes, to expire keys, or to time its lease.
#[test]
fn agents_with_wrong_wall_clocks_keep_every_guarantee() -> Result<()> {
    let mut world = World::start(&plan(&["ahead", "behind", "right"]))?;
    let wrong = [HOUR, -HOUR];
    let dir = world.dir().to_owned();
    let mut clocks = Vec::new();
    for (region, wrong) in wrong.into_iter().enumerate() {
        clocks.push(restart_with_clock(world.agent_mut(region), &dir, wrong)?);
    }
    let check_offsets = |world: &World, wrong: [i64; 2]| {
        wait_for_offset(world.agent(0), -wrong[0])?;
        wait_for_offset(world.agent(1), -wrong[1])?;
        wait_for_offset(world.agent(2), 0)
    };
    check_offsets(&world, wrong)?;
    assert_guarantees(&world, 0)?;
    assert_lease_expires_on_time(&world)?;

    // The clocks are corrected while the agents run, and then set wrong in the other direction.
    for wrong in [[0, 0], [-HOUR, HOUR]] {
        for (clock, wrong) in clocks.iter().zip(wrong) {
            clock.set(wrong)?;
        }
        check_offsets(&world, wrong)?;
        assert_guarantees(&world, 0)?;
    }
    Ok(())
}

/// Failure: an agent relies on the dates in messages, or the publisher on its own wall clock.
#[test]
fn publisher_with_a_wrong_wall_clock_keeps_every_guarantee() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let dir = world.dir().to_owned();
    let clock = restart_with_clock(&mut world.topology.publisher, &dir, HOUR)?;
    // Setting the clock back makes the same hour happen twice.
    for wrong in [HOUR, 0, -HOUR] {
        clock.set(wrong)?;
        for agent in world.topology.agents() {
            wait_for_offset(agent, wrong)?;
        }
        assert_guarantees(&world, wrong)?;
    }
    assert_lease_expires_on_time(&world)
}

/// Failure: a clock that is set during a deletion hides the deletion, or ends a lease or a proof.
#[test]
fn wall_clocks_set_during_deletions_change_nothing() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let dir = world.dir().to_owned();
    let clocks = [
        restart_with_clock(&mut world.topology.publisher, &dir, 0)?,
        restart_with_clock(world.agent_mut(0), &dir, 0)?,
    ];
    let good = world.create_key()?;
    world.cache_everywhere(&[&good])?;
    let wrong = [HOUR, -HOUR, 10 * HOUR, 0, -24 * HOUR, HOUR / 4];
    for (step, wrong) in wrong.into_iter().enumerate() {
        clocks[step % 2].set(wrong)?;
        // The clock library reads the new time once a second, so some deletions coincide with the change.
        throughout(Duration::from_millis(1_200), || {
            let doomed = world.create_key()?;
            world.wait_for_codes(&[&doomed], "VALID")?;
            world.delete(&doomed)?;
            let deleted_at = Instant::now();
            world.wait_for_codes(&[&doomed], "NOT_FOUND")?;
            ensure!(deleted_at.elapsed() < BOUND, "it took {:?}", deleted_at.elapsed());
            for agent in world.topology.agents() {
                ensure!(world.code(agent, &good)? == "VALID");
                ensure!(agent.status()?["mode"] == "live", "{} isn't live", agent.daemon.name());
            }
            Ok(())
        })?;
    }
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    Ok(())
}
