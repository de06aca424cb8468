//! Receipts while publishers and agents stop and start. No agent accepts a key whose deletion any publisher has
//! confirmed (G2, R11, R12).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::random::Random;
use evictd_tests::wait::{eventually, throughout};
use serde_json::json;

use super::{Publishers, Site};
use crate::bad_days::{check_log, check_receipts};
use crate::world::{ApiClient, SOON, plan, with_bound};

const BOUND: Duration = Duration::from_secs(3);
const RUN: Duration = Duration::from_secs(9);

/// The number of confirmed deletions before the first fault.
const CONFIRMED_MIN: usize = 20;

/// The run continues until this many receipts were final, for at most ten times its length. Elapsed ones count as well,
/// because they guarantee the same. In some runs there are no others: the agent's leave message was lost, or its last
/// probe was answered after it, so that receipts wait for an agent that has stopped.
const FINAL_MIN: usize = 50;

/// How many receipts were in each state.
#[derive(Default, Debug)]
struct Outcomes {
    confirmed: AtomicUsize,
    elapsed: AtomicUsize,
    /// Not final when the wait was over, or absent.
    open: AtomicUsize,
}

impl Outcomes {
    fn finals(&self) -> usize {
        self.confirmed.load(Ordering::Relaxed) + self.elapsed.load(Ordering::Relaxed)
    }
}

/// Creates keys, has all agents cache them, deletes them, and verifies them at every agent as soon as the receipt is
/// final.
fn check_receipts_against_agents(
    publishers: &Publishers,
    api: &str,
    agents: &[ApiClient],
    mut turn: usize,
    outcomes: &Outcomes,
    over: &AtomicBool,
) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        turn += 1;
        let key = publishers.create_key(turn, api)?;
        for agent in agents {
            // An agent that isn't running caches nothing.
            drop(agent.code(&key));
        }
        let body = json!({ "keyId": key.id });
        let answer = publishers.call(turn + 1, "keys.deleteKey", &body, &[("Prefer", "wait=5")])?;
        ensure!([200, 404].contains(&answer.status), "{}: {}", answer.status, answer.text);
        let receipt = &answer.body["meta"]["propagation"];
        match receipt["state"].as_str() {
            Some("confirmed") if receipt["final"] == true => &outcomes.confirmed,
            Some("elapsed") if receipt["final"] == true => &outcomes.elapsed,
            _ => {
                outcomes.open.fetch_add(1, Ordering::Relaxed);
                continue;
            }
        }
        .fetch_add(1, Ordering::Relaxed);
        for (n, agent) in agents.iter().enumerate() {
            if let Ok(code) = agent.code(&key) {
                ensure!(code != "VALID", "{} is VALID at agent {n}: {receipt}", key.id);
            }
        }
    }
    Ok(())
}

/// Kills and pauses publishers, and stops and restarts an agent, until enough receipts were final.
fn stop_and_start(
    site: &mut Site,
    random: &mut Random,
    events: &mut Vec<String>,
    outcomes: &Outcomes,
) -> Result<()> {
    eventually("receipts to be confirmed", SOON, || {
        (outcomes.confirmed.load(Ordering::Relaxed) >= CONFIRMED_MIN).then_some(())
    })?;
    let began = Instant::now();
    while began.elapsed() < RUN || outcomes.finals() < FINAL_MIN {
        ensure!(began.elapsed() < 10 * RUN, "too few receipts were final: {outcomes:?}");
        let (what, publisher) = (random.below(4), random.below(3));
        events.push(format!("{:?}: {what}, publisher {publisher}", began.elapsed()));
        let publisher = site.world.topology.publishers_mut().nth(publisher).context("no publisher")?;
        match what {
            0 => publisher.daemon.restart()?,
            1 => {
                publisher.daemon.pause()?;
                throughout(Duration::from_millis(300 + random.below(700) as u64), || Ok(()))?;
                publisher.daemon.resume()?;
            }
            _ => {
                let agent = &mut site.world.topology.regions[0].agents[1].daemon;
                agent.stop(SOON)?;
                agent.restart()?;
            }
        }
        throughout(Duration::from_millis(random.below(500) as u64), || Ok(()))?;
    }
    Ok(())
}

/// Failure: an agent has just got its first lease from one publisher, and another publisher doesn't have it and
/// confirms without it. Or a publisher drops an agent from which it has received nothing for a while, and another one
/// serves it.
#[test]
fn no_agent_accepts_a_key_that_any_publisher_confirmed() -> Result<()> {
    Random::lived_through(live_through)
}

fn live_through(random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let mut plan = with_bound(BOUND, plan(&["eu", "us"]));
    plan.regions[0].1.push("agent-2".to_owned());
    let mut site = Site::start(3, plan)?;
    let (publishers, api) = (Publishers::of(&site.world), site.world.api.clone());
    let agents: Vec<ApiClient> =
        site.world.topology.agents().map(|agent| ApiClient::new(&site.world, agent)).collect();
    let (outcomes, over) = (Outcomes::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let clients = [0, 1, 2, 3].map(|turn| {
            let (publishers, api, agents, outcomes, over) = (&publishers, &api, &agents, &outcomes, &over);
            scope.spawn(move || check_receipts_against_agents(publishers, api, agents, turn, outcomes, over))
        });
        let outcome = stop_and_start(&mut site, random, events, &outcomes);
        over.store(true, Ordering::Relaxed);
        let held = clients.map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        outcome?;
        held.into_iter().collect::<Result<()>>()
    })?;
    println!("{outcomes:?}");
    for node in site.world.topology.publishers_mut() {
        node.wait_until_ready()?;
    }
    site.world.wait_until_caught_up()?;
    check_log(&site.world)?;
    check_receipts(&site.world, std::iter::empty())?;
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}
