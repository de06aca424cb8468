//! Several agents in one region, and daemons that start before NATS does.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use evictd_tests::http::Client;
use evictd_tests::process::{Daemon, Launch, evictd_binary};
use evictd_tests::topology::{Plan, Topology};
use evictd_tests::wait::{throughout, try_eventually};

use crate::world::{
    A_WHILE, UNAVAILABLE, World, count, plan, wait_for_count, wait_for_mode, wait_for_readiness,
};

const CONFIRMED: &str = "evictd_publisher_confirmed_seconds_count";

/// `eu` with two agents.
fn two_agents() -> Plan {
    let names = ["agent-1", "agent-2"].map(str::to_owned).to_vec();
    Plan { regions: vec![("eu".to_owned(), names)], ..plan(&[]) }
}

/// Failure: only one agent of a region receives a message, or one agent confirms for another.
#[test]
fn region_confirms_when_all_of_its_agents_have() -> Result<()> {
    let mut world = World::start(&two_agents())?;
    let [one, other] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&one, &other])?;
    wait_for_count(world.publisher(), "evictd_publisher_agents", &[("state", "live")], 2)?;
    let eu = [("region", "eu")];

    world.delete(&one)?;
    world.assert_gone(&[&one])?;
    wait_for_count(world.publisher(), CONFIRMED, &eu, 1)?;

    second(&mut world.topology).pause()?;
    world.delete(&other)?;
    world.wait_for_code(world.agent(0), &other, "NOT_FOUND")?;
    throughout(A_WHILE * 5, || {
        ensure!(count(world.publisher(), CONFIRMED, &eu)? == 1, "one of two agents has confirmed");
        Ok(())
    })?;
    wait_for_count(world.publisher(), "evictd_publisher_unconfirmed_deletions", &[], 1)?;
    second(&mut world.topology).resume()?;
    world.assert_gone(&[&other])?;
    wait_for_count(world.publisher(), CONFIRMED, &eu, 2)?;
    wait_for_count(world.publisher(), "evictd_publisher_unconfirmed_deletions", &[], 0)
}

fn second(topology: &mut Topology) -> &mut Daemon {
    &mut topology.regions[0].agents[1].daemon
}

/// Failure: two processes share a name, and the current one hides that the other lags.
#[test]
fn two_processes_under_one_name_are_reported() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let duplicate = [("region", "eu"), ("state", "duplicate")];
    wait_for_count(world.publisher(), "evictd_publisher_agents", &[("state", "live")], 1)?;
    assert_eq!(count(world.publisher(), "evictd_publisher_agents", &duplicate)?, 0);

    let config = world.agent(0).config.to_str().context("the path isn't UTF-8")?;
    let launch = Launch::new("twin", evictd_binary()?, world.dir()).args(["agent", "--config", config]);
    let _twin = Daemon::start(launch.args([
        "--set",
        "http.listen=127.0.0.1:0",
        "--set",
        "admin.listen=127.0.0.1:0",
    ]))?;
    wait_for_count(world.publisher(), "evictd_publisher_agents", &duplicate, 2)?;
    world.assert_works()
}

/// Failure: agents of several places that were never configured count as one region.
#[test]
fn an_agent_whose_region_was_not_set_warns_of_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (region, warns) in [("local", true), ("eu", false)] {
        let nowhere = ["http.listen=127.0.0.1:0", "admin.listen=127.0.0.1:0", "nats.urls=nats://127.0.0.1:1"];
        let settings = nowhere.map(str::to_owned).into_iter().chain([format!("region={region}")]);
        let flags = settings.flat_map(|setting| ["--set".to_owned(), setting]);
        let launch = Launch::new(region, evictd_binary()?, dir.path()).args(["agent"]).args(flags);
        let mut agent = Daemon::start(launch)?;
        let log = |agent: &Daemon| Ok::<_, anyhow::Error>(agent.stdout()? + &agent.stderr()?);
        try_eventually("the agent to start", crate::world::SOON, || {
            Ok(log(&agent)?.contains("agent started").then_some(()))
        })?;
        if warns {
            try_eventually("a warning", crate::world::SOON, || {
                Ok(log(&agent)?.contains("`region` is the default's").then_some(()))
            })?;
        }
        agent.kill()?;
        ensure!(log(&agent)?.contains("`region` is the default's") == warns, "{}", log(&agent)?);
    }
    Ok(())
}

/// Failure: an agent that starts without NATS exits, answers verifications, or never connects.
#[test]
fn agent_started_before_nats_reports_why_and_becomes_live() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let [good, doomed] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&good, &doomed])?;
    world.topology.home.kill()?;
    world.agent_mut(0).daemon.restart()?;

    let admin = world.agent(0).admin;
    let client = Client::with_timeout(Duration::from_secs(5));
    let get = |page: &str| client.get(&format!("http://{admin}/{page}")).ok();
    let ready =
        world.agent_mut(0).daemon.wait_until("its admin port", crate::world::SOON, || get("readyz"))?;
    assert_eq!(ready.status, 503, "{}", ready.text);
    for reason in ["\"nats\"", "\"lease\"", "first proof"] {
        assert!(ready.text.contains(reason), "{reason} is missing: {}", ready.text);
    }
    assert_eq!(get("livez").context("no /livez")?.status, 200, "restarting it wouldn't help");
    assert_eq!(world.agent(0).status()?["mode"], "starting");
    assert_eq!(world.code(world.agent(0), &good)?, UNAVAILABLE);
    world.delete(&doomed)?;

    world.topology.home.restart()?;
    world.agent_mut(0).wait_until_ready()?;
    wait_for_mode(world.agent(0), "live")?;
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")
}

/// Failure: a publisher that starts without NATS refuses deletions, or never emits them.
#[test]
fn publisher_started_before_nats_accepts_deletions() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let doomed = world.create_key()?;
    world.cache_everywhere(&[&doomed])?;
    world.topology.home.kill()?;
    world.topology.publisher.daemon.restart()?;
    let admin = world.publisher().admin;
    let client = Client::with_timeout(Duration::from_secs(5));
    let ready = || client.get(&format!("http://{admin}/readyz")).ok();
    let daemon = &mut world.topology.publisher.daemon;
    let ready = daemon.wait_until("its admin port", crate::world::SOON, ready)?;
    assert!(ready.status == 503 && ready.text.contains("\"nats\""), "{}", ready.text);
    let liveness = format!("http://{}/v2/liveness", world.publisher().http);
    let daemon = &mut world.topology.publisher.daemon;
    daemon.wait_until("its control API", crate::world::SOON, || client.get(&liveness).ok())?;
    world.delete(&doomed)?;

    world.topology.home.restart()?;
    world.assert_gone(&[&doomed])?;
    wait_for_readiness(world.publisher(), 200)?;
    world.assert_works()
}
