//! What is confirmed, with publishers and agents that come and go: nobody answers from it any more, whichever publisher
//! says so (G2, R11, R12).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::random::Random;
use evictd_tests::wait::{eventually, throughout};
use serde_json::json;

use super::{Publishers, Site};
use crate::bad_days::{check_log, check_receipts};
use crate::world::{Caller, SOON, plan, with_bound};

const BOUND: Duration = Duration::from_secs(3);
const RUN: Duration = Duration::from_secs(9);

/// So many are confirmed before anybody goes.
const CONFIRMED_MIN: usize = 20;

/// The run goes on until so many were final, as long as it isn't ten times as long. Elapsed ones count as well, because
/// they promise the same; and chance may have it that there are no others: nobody has heard a goodbye, or the agent's last
/// probe is answered after it, so that everybody waits for somebody who is gone.
const FINAL_MIN: usize = 50;

/// What receipts said.
#[derive(Default, Debug)]
struct Said {
    confirmed: AtomicUsize,
    elapsed: AtomicUsize,
    /// Not final when the wait was over, or never heard.
    open: AtomicUsize,
}

impl Said {
    fn finals(&self) -> usize {
        self.confirmed.load(Ordering::Relaxed) + self.elapsed.load(Ordering::Relaxed)
    }
}

/// Creates keys, has all agents cache them, deletes them, and asks every agent as soon as the receipt is final.
fn hold_receipts_against_agents(
    publishers: &Publishers,
    api: &str,
    agents: &[Caller],
    mut turn: usize,
    said: &Said,
    over: &AtomicBool,
) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        turn += 1;
        let key = publishers.create_key(turn, api)?;
        for agent in agents {
            // One that isn't there caches nothing.
            drop(agent.code(&key));
        }
        let body = json!({ "keyId": key.id });
        let answer = publishers.call(turn + 1, "keys.deleteKey", &body, &[("Prefer", "wait=5")])?;
        ensure!([200, 404].contains(&answer.status), "{}: {}", answer.status, answer.text);
        let told = &answer.body["meta"]["propagation"];
        match told["state"].as_str() {
            Some("confirmed") if told["final"] == true => &said.confirmed,
            Some("elapsed") if told["final"] == true => &said.elapsed,
            _ => {
                said.open.fetch_add(1, Ordering::Relaxed);
                continue;
            }
        }
        .fetch_add(1, Ordering::Relaxed);
        for (n, agent) in agents.iter().enumerate() {
            if let Ok(code) = agent.code(&key) {
                ensure!(code != "VALID", "{} is VALID at agent {n}: {told}", key.id);
            }
        }
    }
    Ok(())
}

/// Publishers are killed and stand still, and agents say goodbye and are started anew, until enough has happened.
fn come_and_go(site: &mut Site, random: &mut Random, events: &mut Vec<String>, said: &Said) -> Result<()> {
    eventually("receipts to be confirmed", SOON, || {
        (said.confirmed.load(Ordering::Relaxed) >= CONFIRMED_MIN).then_some(())
    })?;
    let began = Instant::now();
    while began.elapsed() < RUN || said.finals() < FINAL_MIN {
        ensure!(began.elapsed() < 10 * RUN, "too few receipts were final: {said:?}");
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

/// Failure: an agent that started a moment ago at one publisher's word is unknown to the other, which confirms without
/// it; or one that a publisher hasn't heard of for a while is forgotten by it, and served by another.
#[test]
fn no_agent_accepts_a_key_that_any_publisher_confirmed() -> Result<()> {
    Random::lived_through(live_through)
}

fn live_through(random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let mut plan = with_bound(BOUND, plan(&["eu", "us"]));
    plan.regions[0].1.push("agent-2".to_owned());
    let mut site = Site::start(3, plan)?;
    let (publishers, api) = (Publishers::of(&site.world), site.world.api.clone());
    let agents: Vec<Caller> =
        site.world.topology.agents().map(|agent| Caller::new(&site.world, agent)).collect();
    let (said, over) = (Said::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let clients = [0, 1, 2, 3].map(|turn| {
            let (publishers, api, agents, said, over) = (&publishers, &api, &agents, &said, &over);
            scope.spawn(move || hold_receipts_against_agents(publishers, api, agents, turn, said, over))
        });
        let outcome = come_and_go(&mut site, random, events, &said);
        over.store(true, Ordering::Relaxed);
        let held = clients.map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        outcome?;
        held.into_iter().collect::<Result<()>>()
    })?;
    println!("{said:?}");
    for node in site.world.topology.publishers_mut() {
        node.wait_until_ready()?;
    }
    site.world.wait_until_caught_up()?;
    check_log(&site.world)?;
    check_receipts(&site.world, std::iter::empty())?;
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}
