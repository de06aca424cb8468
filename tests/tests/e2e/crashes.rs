//! Daemons and servers are killed in random order while clients create, delete and verify keys.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::random::Random;
use evictd_tests::topology::{Plan, Servers, Topology};
use evictd_tests::wait::throughout;
use serde_json::json;

use crate::world::{ApiClient, Key, World, assert_bounded, plan, with_bound};

const BOUND: Duration = Duration::from_secs(2);
const RUN: Duration = Duration::from_secs(20);

/// A key, and when its deletion was answered.
#[derive(Clone)]
struct TrackedKey {
    key: Key,
    deleted_at: Option<Instant>,
    /// Whether a client has requested its deletion, with any outcome.
    doomed: bool,
}

#[derive(Default)]
struct Workload {
    keys: Mutex<Vec<TrackedKey>>,
    over: AtomicBool,
}

impl Workload {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn keys(&self) -> Result<Vec<TrackedKey>> {
        Ok(self.keys.lock().map_err(|_| anyhow!("a client panicked"))?.clone())
    }

    /// Creates keys and deletes every other one until the workload is over. Repeats a deletion that was not answered
    /// because the publisher was dead.
    fn create_and_delete(&self, publisher: &ApiClient, api: &str) -> Result<()> {
        while !self.is_over() {
            self.create(publisher, api)?;
            self.create(publisher, api)?;
            let index =
                self.keys()?.iter().position(|tracked| tracked.deleted_at.is_none() && tracked.doomed);
            // An unanswered deletion comes first, then the newest key.
            if let Some(index) = index.or(self.keys()?.len().checked_sub(1)) {
                self.delete(publisher, index)?;
            }
        }
        Ok(())
    }

    fn create(&self, publisher: &ApiClient, api: &str) -> Result<()> {
        // Without an answer, the key's id is unknown, and so is whether the key exists.
        let Ok(answer) = publisher.call("keys.createKey", &json!({ "apiId": api })) else { return Ok(()) };
        let text = |member: &str| answer.body["data"][member].as_str().map(str::to_owned);
        if let (200, Some(id), Some(text)) = (answer.status, text("keyId"), text("key")) {
            let tracked = TrackedKey { key: Key { id, text }, deleted_at: None, doomed: false };
            self.keys.lock().map_err(|_| anyhow!("a client panicked"))?.push(tracked);
        }
        Ok(())
    }

    fn delete(&self, publisher: &ApiClient, index: usize) -> Result<()> {
        let id = {
            let mut keys = self.keys.lock().map_err(|_| anyhow!("a client panicked"))?;
            keys[index].doomed = true;
            keys[index].key.id.clone()
        };
        let Ok(answer) = publisher.call("keys.deleteKey", &json!({ "keyId": id })) else { return Ok(()) };
        // 404: an earlier attempt succeeded without an answer.
        if [200, 404].contains(&answer.status) {
            self.keys.lock().map_err(|_| anyhow!("a client panicked"))?[index].deleted_at =
                Some(Instant::now());
        }
        Ok(())
    }

    /// Verifies the keys at one agent in a loop, and checks each answer against the guarantee G1. Returns the number
    /// of answers.
    fn verify(&self, agent: &ApiClient) -> Result<usize> {
        let mut answers = 0;
        while !self.is_over() {
            // Only the newest hundred, so that each is verified often enough to be cached.
            for tracked in self.keys()?.iter().rev().take(100) {
                let asked_at = Instant::now();
                let Ok(code) = agent.code(&tracked.key) else { continue };
                answers += 1;
                if let Some(deleted_at) = tracked.deleted_at {
                    assert_bounded(asked_at, deleted_at, BOUND, &code).context(tracked.key.id.clone())?;
                } else if code == "NOT_FOUND" {
                    // When this request was sent, no deletion had been answered. One must have been requested.
                    let doomed = self.keys()?.iter().any(|now| now.key.id == tracked.key.id && now.doomed);
                    ensure!(doomed, "{} is NOT_FOUND", tracked.key.id);
                }
            }
        }
        Ok(answers)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Publisher,
    Home,
    Agent(usize),
    Nats(usize),
}

impl Victim {
    const ALL: [Self; 6] =
        [Self::Publisher, Self::Home, Self::Agent(0), Self::Agent(1), Self::Nats(0), Self::Nats(1)];

    fn kill(self, topology: &mut Topology) -> Result<()> {
        match self {
            Self::Publisher => topology.publisher.daemon.kill(),
            Self::Home => topology.home.kill(),
            Self::Agent(region) => topology.regions[region].agents[0].daemon.kill(),
            Self::Nats(region) => topology.regions[region].nats.as_mut().context("no server")?.kill(),
        }
        .map(drop)
    }

    /// Starts it again, without waiting until it is ready.
    fn start(self, topology: &mut Topology) -> Result<()> {
        match self {
            Self::Publisher => topology.publisher.daemon.restart(),
            Self::Home => topology.home.restart(),
            Self::Agent(region) => topology.regions[region].agents[0].daemon.restart(),
            Self::Nats(region) => topology.regions[region].nats.as_mut().context("no server")?.restart(),
        }
    }
}

/// Kills one to three victims at a time and restarts them in another order, until the run is over.
fn kill_in_any_order(topology: &mut Topology, random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let started = Instant::now();
    // Long enough for some recoveries to finish, and short enough for crashes during others.
    let pause = |random: &mut Random| throughout(Duration::from_millis(random.below(900) as u64), || Ok(()));
    while started.elapsed() < RUN {
        let mut victims = Victim::ALL;
        random.shuffle(&mut victims);
        let victims = &mut victims[..=random.below(3)];
        for victim in &*victims {
            events.push(format!("{:?} {victim:?} is killed", started.elapsed()));
            victim.kill(topology)?;
            pause(random)?;
        }
        random.shuffle(victims);
        for victim in &*victims {
            events.push(format!("{:?} {victim:?} is started", started.elapsed()));
            victim.start(topology)?;
            pause(random)?;
        }
    }
    Ok(())
}

/// Failure: two crashes together lose what each of them alone does not.
#[test]
fn guarantees_hold_when_everything_is_killed_in_any_order() -> Result<()> {
    Random::lived_through(run)
}

fn run(random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let plan = Plan { servers: Servers::PerRegion, ..plan(&["eu", "us"]) };
    let mut world = World::start(&with_bound(BOUND, plan))?;
    let publisher = ApiClient::new(&world, world.publisher());
    let agents = [0, 1].map(|region| ApiClient::new(&world, world.agent(region)));
    let (workload, api) = (Workload::default(), world.api.clone());
    let answers = thread::scope(|scope| {
        let changing = scope.spawn(|| workload.create_and_delete(&publisher, &api));
        let verifying = agents.each_ref().map(|agent| scope.spawn(|| workload.verify(agent)));
        let killed = kill_in_any_order(&mut world.topology, random, events);
        workload.over.store(true, Ordering::Relaxed);
        let changed = changing.join().map_err(|_| anyhow!("a client panicked"))?;
        let mut answers = 0;
        for thread in verifying {
            answers += thread.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        changed.and(killed)?;
        Ok::<_, anyhow::Error>(answers)
    })?;

    world.topology.publisher.wait_until_ready()?;
    for region in 0..2 {
        world.agent_mut(region).wait_until_ready()?;
    }
    let keys = workload.keys()?;
    // Completes the deletions that were requested and never answered.
    for tracked in keys.iter().filter(|tracked| tracked.doomed && tracked.deleted_at.is_none()) {
        let answer = publisher.call("keys.deleteKey", &json!({ "keyId": tracked.key.id }))?;
        ensure!([200, 404].contains(&answer.status), "{}", answer.text);
    }
    let (deleted, good): (Vec<&TrackedKey>, Vec<&TrackedKey>) =
        keys.iter().partition(|tracked| tracked.doomed);
    println!(
        "{} keys, of which {} were deleted; {answers} answers during {} kills and starts",
        keys.len(),
        deleted.len(),
        events.len()
    );
    ensure!(deleted.len() > 20 && answers > 500, "too few deletions or answers for a meaningful run");
    world.wait_until_caught_up()?;
    world.assert_gone(&deleted.iter().map(|tracked| &tracked.key).collect::<Vec<_>>())?;
    world.wait_for_codes(&good.iter().map(|tracked| &tracked.key).collect::<Vec<_>>(), "VALID")?;
    world.assert_works()
}
