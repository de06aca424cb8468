//! Everything is killed, in an order that chance decides, while keys come and go.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::random::Random;
use evictd_tests::topology::{Plan, Servers, Topology};
use evictd_tests::wait::throughout;
use serde_json::json;

use crate::world::{Caller, Key, World, assert_bounded, plan, with_bound};

const BOUND: Duration = Duration::from_secs(2);
const RUN: Duration = Duration::from_secs(20);

/// A key, and since when it is known to be deleted.
#[derive(Clone)]
struct Fate {
    key: Key,
    /// When the deletion was answered.
    deleted_at: Option<Instant>,
    /// Whether somebody has asked for its deletion, with whatever outcome.
    doomed: bool,
}

#[derive(Default)]
struct Story {
    fates: Mutex<Vec<Fate>>,
    over: AtomicBool,
}

impl Story {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn fates(&self) -> Result<Vec<Fate>> {
        Ok(self.fates.lock().map_err(|_| anyhow!("somebody panicked"))?.clone())
    }

    /// Creates keys and deletes every other one, for as long as the story goes on. A publisher that is
    /// dead answers nothing, and the same deletion is asked for again.
    fn create_and_delete(&self, publisher: &Caller, api: &str) -> Result<()> {
        while !self.is_over() {
            self.create(publisher, api)?;
            self.create(publisher, api)?;
            let index = self.fates()?.iter().position(|fate| fate.deleted_at.is_none() && fate.doomed);
            // One that was left over, or else the newest.
            if let Some(index) = index.or(self.fates()?.len().checked_sub(1)) {
                self.delete(publisher, index)?;
            }
        }
        Ok(())
    }

    fn create(&self, publisher: &Caller, api: &str) -> Result<()> {
        // Whether it was created is unknown if there is no answer; nobody knows its name then.
        let Ok(answer) = publisher.call("keys.createKey", &json!({ "apiId": api })) else { return Ok(()) };
        let text = |member: &str| answer.body["data"][member].as_str().map(str::to_owned);
        if let (200, Some(id), Some(text)) = (answer.status, text("keyId"), text("key")) {
            let fate = Fate { key: Key { id, text }, deleted_at: None, doomed: false };
            self.fates.lock().map_err(|_| anyhow!("somebody panicked"))?.push(fate);
        }
        Ok(())
    }

    fn delete(&self, publisher: &Caller, index: usize) -> Result<()> {
        let id = {
            let mut fates = self.fates.lock().map_err(|_| anyhow!("somebody panicked"))?;
            fates[index].doomed = true;
            fates[index].key.id.clone()
        };
        let Ok(answer) = publisher.call("keys.deleteKey", &json!({ "keyId": id })) else { return Ok(()) };
        // 404: an earlier try had worked although it wasn't answered.
        if [200, 404].contains(&answer.status) {
            self.fates.lock().map_err(|_| anyhow!("somebody panicked"))?[index].deleted_at =
                Some(Instant::now());
        }
        Ok(())
    }

    /// Verifies all keys at one agent, again and again, and holds each answer against the promise (G1).
    /// Returns how many there were.
    fn verify(&self, agent: &Caller) -> Result<usize> {
        let mut answers = 0;
        while !self.is_over() {
            // The newest hundred, so that each comes up often enough to be cached.
            for fate in self.fates()?.iter().rev().take(100) {
                let asked_at = Instant::now();
                let Ok(code) = agent.code(&fate.key) else { continue };
                answers += 1;
                if let Some(deleted_at) = fate.deleted_at {
                    assert_bounded(asked_at, deleted_at, BOUND, &code).context(fate.key.id.clone())?;
                } else if code == "NOT_FOUND" {
                    // Nobody had asked for it when this was sent.
                    let doomed = self.fates()?.iter().any(|now| now.key.id == fate.key.id && now.doomed);
                    ensure!(doomed, "{} is NOT_FOUND", fate.key.id);
                }
            }
        }
        Ok(answers)
    }
}

/// What can be killed.
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

    /// Starts it again; whether it can be of use yet is another matter.
    fn start(self, topology: &mut Topology) -> Result<()> {
        match self {
            Self::Publisher => topology.publisher.daemon.restart(),
            Self::Home => topology.home.restart(),
            Self::Agent(region) => topology.regions[region].agents[0].daemon.restart(),
            Self::Nats(region) => topology.regions[region].nats.as_mut().context("no server")?.restart(),
        }
    }
}

/// Kills one to three at once, and starts them again in another order, until the time is over.
fn kill_in_any_order(topology: &mut Topology, random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let started = Instant::now();
    // Long enough for something to recover, and short enough for many a crash to meet a recovery.
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

/// Failure: two crashes together undo what each of them alone does not.
#[test]
fn guarantees_hold_when_everything_is_killed_in_any_order() -> Result<()> {
    Random::lived_through(live_through)
}

fn live_through(random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let plan = Plan { servers: Servers::PerRegion, ..plan(&["eu", "us"]) };
    let mut world = World::start(&with_bound(BOUND, plan))?;
    let publisher = Caller::new(&world, world.publisher());
    let agents = [0, 1].map(|region| Caller::new(&world, world.agent(region)));
    let (story, api) = (Story::default(), world.api.clone());
    let answers = thread::scope(|scope| {
        let changing = scope.spawn(|| story.create_and_delete(&publisher, &api));
        let verifying = agents.each_ref().map(|agent| scope.spawn(|| story.verify(agent)));
        let killed = kill_in_any_order(&mut world.topology, random, events);
        story.over.store(true, Ordering::Relaxed);
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
    let fates = story.fates()?;
    // What was asked for and not answered has happened or not; now it has.
    for fate in fates.iter().filter(|fate| fate.doomed && fate.deleted_at.is_none()) {
        let answer = publisher.call("keys.deleteKey", &json!({ "keyId": fate.key.id }))?;
        ensure!([200, 404].contains(&answer.status), "{}", answer.text);
    }
    let (deleted, good): (Vec<&Fate>, Vec<&Fate>) = fates.iter().partition(|fate| fate.doomed);
    println!(
        "{} keys, of which {} were deleted; {answers} answers during {} kills and starts",
        fates.len(),
        deleted.len(),
        events.len()
    );
    ensure!(deleted.len() > 20 && answers > 500, "too little has happened for a test");
    world.wait_until_caught_up()?;
    world.assert_gone(&deleted.iter().map(|fate| &fate.key).collect::<Vec<_>>())?;
    world.wait_for_codes(&good.iter().map(|fate| &fate.key).collect::<Vec<_>>(), "VALID")?;
    world.assert_works()
}
