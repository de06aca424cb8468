//! Receipts: what they report about a deletion, compared with what clients see (G4, R12).

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::process::evictd_command;
use evictd_tests::proxy::WireMode;
use evictd_tests::random::Random;
use evictd_tests::topology::Topology;
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::{Value, json};

use crate::world::{
    ApiClient, Key, SOON, World, breakable, count, plan, wait_for_mode, wall_millis, with_bound,
};

/// Short enough to wait for.
const BOUND: Duration = Duration::from_secs(3);

const REGIONS: [&str; 2] = ["eu", "us"];

/// Deletes a key and waits for its receipt. Returns the answer's body.
fn delete_and_wait(world: &World, key: &Key, seconds: u64) -> Result<Value> {
    let prefer = format!("respond-async, wait={seconds}");
    let headers = [("Prefer", prefer.as_str())];
    let body = json!({ "keyId": key.id });
    let answer = world.topology.call_with(world.publisher(), "keys.deleteKey", &body, &headers)?;
    ensure!(answer.status == 200, "the answer was {}: {}", answer.status, answer.text);
    assert_eq!(answer.header("preference-applied"), Some(format!("wait={seconds}").as_str()));
    assert_eq!(answer.body["data"], json!({}));
    Ok(answer.body)
}

fn receipt(world: &World, request: &str) -> Result<Value> {
    world.call("propagation.getReceipt", &json!({ "requestId": request }))
}

fn wait_until_final(world: &World, request: &str) -> Result<Value> {
    try_eventually("the receipt to be final", SOON, || {
        let receipt = receipt(world, request)?;
        Ok((receipt["final"] == true).then_some(receipt))
    })
}

fn states(receipt: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let regions = receipt["regions"].as_array().cloned().unwrap_or_default();
    regions.iter().map(|region| (text(&region["region"]), text(&region["state"]))).collect()
}

fn pairs(of: [(&str, &str); 2]) -> Vec<(String, String)> {
    of.map(|(region, state)| (region.to_owned(), state.to_owned())).to_vec()
}

/// Runs `evictd api <line>`. Returns its exit code and its standard output.
fn evictd(world: &World, line: &str) -> Result<(Option<i32>, String)> {
    let mut command = evictd_command()?;
    command.arg("api").args(line.split_ascii_whitespace()).env("HOME", world.dir());
    command.env("EVICTD_ROOT_KEY", world.topology.root_key());
    command.env("EVICTD_API_URL", format!("http://{}", world.publisher().http));
    let output = command.output().context("running evictd")?;
    Ok((output.status.code(), String::from_utf8(output.stdout)?))
}

#[test]
fn awaited_deletion_is_answered_once_every_region_confirmed() -> Result<()> {
    let world = World::start(&plan(&REGIONS))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let answer = delete_and_wait(&world, &key, 30)?;
    // A confirmed receipt says that no agent answers VALID any more.
    world.assert_none_valid(&[&key])?;
    let (reported, request) = (&answer["meta"]["propagation"], answer["meta"]["requestId"].as_str());
    assert_eq!(states(reported), pairs([("eu", "confirmed"), ("us", "confirmed")]));
    assert_eq!(
        (&reported["state"], &reported["final"], &reported["measuredFrom"]),
        (&json!("confirmed"), &json!(true), &json!("request"))
    );
    assert_eq!((&reported["cause"], &reported["boundMs"]), (&json!("deleted"), &json!(30_000)));
    // The receipt stays the same, also once it is stored.
    let request = request.context("no request id")?;
    assert_eq!(receipt(&world, request)?, *reported);
    let stored = format!("SELECT count(*) FROM receipts WHERE request_id = '{request}'");
    try_eventually("the receipt to be stored", SOON, || Ok((world.sql(&stored)? == "1").then_some(())))?;
    assert_eq!(receipt(&world, request)?, *reported);
    Ok(())
}

#[test]
fn receipt_elapses_and_names_the_agent_of_a_frozen_region() -> Result<()> {
    let mut world = World::start(&with_bound(BOUND, plan(&REGIONS)))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.agent_mut(1).daemon.pause()?;
    let asked = Instant::now();
    let answer = delete_and_wait(&world, &key, 0)?;
    assert_eq!(answer["meta"]["propagation"]["state"], "pending");
    let request = answer["meta"]["requestId"].as_str().context("no request id")?;
    let reported = wait_until_final(&world, request)?;
    assert!(asked.elapsed() >= BOUND, "{:?}", asked.elapsed());
    assert_eq!(states(&reported), pairs([("eu", "confirmed"), ("us", "elapsed")]));
    assert_eq!(reported["regions"][1]["missing"][0]["agent"], "agent-1");
    // The bound has elapsed: the agent doesn't answer from its cache.
    world.agent_mut(1).daemon.resume()?;
    assert_ne!(world.code(world.agent(1), &key)?, "VALID");
    Ok(())
}

/// Failure: an agent that left the roster returns and holds a lease again, and receipts don't wait for it.
#[test]
fn agent_that_left_the_roster_and_returned_is_waited_for() -> Result<()> {
    let mut world = World::start(&with_bound(BOUND, plan(&REGIONS)))?;
    let key = world.create_key()?;
    world.agent_mut(1).daemon.pause()?;
    try_eventually("the publisher to remove the silent agent", SOON, || {
        let status = world.publisher().status()?;
        Ok((status["agents"].as_array().map(Vec::len) == Some(1)).then_some(()))
    })?;
    world.agent_mut(1).daemon.resume()?;
    wait_for_mode(world.agent(1), "live")?;
    world.cache_everywhere(&[&key])?;
    let answer = delete_and_wait(&world, &key, 30)?;
    assert_ne!(world.code(world.agent(1), &key)?, "VALID");
    assert_eq!(states(&answer["meta"]["propagation"]), pairs([("eu", "confirmed"), ("us", "confirmed")]));
    Ok(())
}

#[test]
fn receipt_survives_a_kill_of_the_publisher() -> Result<()> {
    let mut world = World::start(&plan(&REGIONS))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.agent_mut(1).daemon.pause()?;
    let answer = delete_and_wait(&world, &key, 0)?;
    let request = answer["meta"]["requestId"].as_str().context("no request id")?.to_owned();
    world.topology.publisher.restart()?;
    let reported = receipt(&world, &request)?;
    assert_eq!((&reported["final"], &reported["measuredFrom"]), (&json!(false), &json!("first_sight")));
    world.agent_mut(1).daemon.resume()?;
    let reported = wait_until_final(&world, &request)?;
    assert_eq!(states(&reported), pairs([("eu", "confirmed"), ("us", "confirmed")]));
    world.assert_none_valid(&[&key])
}

#[test]
fn receipt_elapses_without_nats() -> Result<()> {
    let mut world = World::start(&with_bound(BOUND, plan(&REGIONS)))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.topology.home.kill()?;
    let answer = delete_and_wait(&world, &key, 20)?;
    let reported = &answer["meta"]["propagation"];
    assert_eq!(states(reported), pairs([("eu", "elapsed"), ("us", "elapsed")]));
    // The agents didn't receive the deletion. Their leases have expired.
    world.assert_none_valid(&[&key])
}

#[test]
fn command_line_shows_each_region_as_it_confirms() -> Result<()> {
    let mut world = World::start(&plan(&REGIONS))?;
    let [piped, whole, late] = [world.create_key()?, world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&piped, &whole, &late])?;

    let (exit, out) = evictd(&world, &format!("keys delete-key --key-id={} --wait", piped.id))?;
    assert_eq!(exit, Some(0), "{out}");
    assert!(!out.contains('\x1b'), "{out}");
    for region in REGIONS {
        let lines = out.lines().filter(|line| line.starts_with(&format!("{region}  confirmed  ")));
        assert_eq!(lines.count(), 1, "{out}");
    }
    assert!(out.lines().last().is_some_and(|line| line.starts_with("confirmed after ")), "{out}");

    let (exit, out) =
        evictd(&world, &format!("keys delete-key --key-id={} --wait=10s --output=json", whole.id))?;
    let reported: Value = serde_json::from_str(&out).with_context(|| out.clone())?;
    assert_eq!((exit, &reported["data"]), (Some(0), &json!({})));
    assert_eq!(states(&reported["meta"]["propagation"]), pairs([("eu", "confirmed"), ("us", "confirmed")]));
    let request = reported["meta"]["requestId"].as_str().context("no request id")?;
    let (exit, out) = evictd(&world, &format!("propagation get-receipt --request-id={request}"))?;
    assert!(exit == Some(0) && out.contains("\"state\": \"confirmed\""), "{out}");

    world.agent_mut(1).daemon.pause()?;
    let (exit, out) = evictd(&world, &format!("keys delete-key --key-id={} --wait=300ms", late.id))?;
    assert_eq!(exit, Some(3), "committed, but not confirmed everywhere: {out}");
    assert!(out.contains("eu  confirmed") && !out.contains("us  confirmed"), "{out}");
    assert!(out.contains("get-receipt --request-id=req_"), "{out}");
    world.agent_mut(1).daemon.resume()
}

#[test]
fn unknown_receipt_is_not_found_and_a_creation_has_no_regions() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let unknown = json!({ "requestId": "req_unknown" });
    let answer = world.topology.call(world.publisher(), "propagation.getReceipt", &unknown)?;
    let kind = answer.body["error"]["type"].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        (answer.status, kind.ends_with("evictd/data/receipt_not_found")),
        (404, true),
        "{}",
        answer.text
    );
    let answer =
        ApiClient::new(&world, world.publisher()).call("apis.createApi", &json!({ "name": "empty" }))?;
    let request = answer.body["meta"]["requestId"].as_str().context("no request id")?;
    let reported = receipt(&world, request)?;
    assert_eq!(
        (&reported["state"], &reported["final"], &reported["regions"]),
        (&json!("confirmed"), &json!(true), &json!([]))
    );
    Ok(())
}

/// A deletion that was answered with success.
struct AnsweredDeletion {
    key: Key,
    request: String,
    /// When the client had the answer.
    answered: Instant,
}

/// What the clients share.
#[derive(Default)]
struct DeletionWorkload {
    keys: Mutex<Vec<Key>>,
    over: AtomicBool,
}

/// For each key, when the last verification began that was VALID.
type Sightings = HashMap<String, Instant>;

impl DeletionWorkload {
    /// Verifies the newest keys until the workload is over.
    fn verify(&self, agent: &ApiClient) -> Result<Sightings> {
        let mut sightings = Sightings::new();
        while !self.over.load(Ordering::Relaxed) {
            let keys = self.keys.lock().map_err(|_| anyhow!("a client panicked"))?.clone();
            for key in keys.iter().rev().take(20) {
                let started = Instant::now();
                let Ok(code) = agent.code(key) else { continue };
                if code == "VALID" {
                    sightings.insert(key.id.clone(), started);
                }
            }
        }
        Ok(sightings)
    }

    /// Creates keys, lets agents cache them, and deletes them one by one. Returns the deletions that were answered: the
    /// others have no request id to query a receipt by.
    fn delete(&self, publisher: &ApiClient, api: &str) -> Result<Vec<AnsweredDeletion>> {
        let mut deletions = Vec::new();
        while !self.over.load(Ordering::Relaxed) {
            let Ok(answer) = publisher.call("keys.createKey", &json!({ "apiId": api })) else { continue };
            let text = |member: &str| answer.body["data"][member].as_str().map(str::to_owned);
            let (Some(id), Some(text)) = (text("keyId"), text("key")) else { continue };
            let key = Key { id, text };
            self.keys.lock().map_err(|_| anyhow!("a client panicked"))?.push(key.clone());
            throughout(Duration::from_millis(60), || Ok(()))?;
            let Ok(answer) = publisher.call("keys.deleteKey", &json!({ "keyId": key.id })) else { continue };
            let request = answer.body["meta"]["requestId"].as_str().unwrap_or_default().to_owned();
            if answer.status == 200 {
                deletions.push(AnsweredDeletion { key, request, answered: Instant::now() });
            }
        }
        Ok(deletions)
    }
}

/// Kills the publisher and agents, and slows down wires, in random order.
fn disturb(topology: &mut Topology, random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let started = Instant::now();
    // Receipts wait for a killed agent. Without these quiet seconds, none might be confirmed.
    throughout(Duration::from_secs(2), || Ok(()))?;
    while started.elapsed() < Duration::from_secs(15) {
        let region = random.below(2);
        let what = random.below(4);
        events.push(format!("{:?} {what} in {region}", started.elapsed()));
        match what {
            0 => topology.publisher.restart()?,
            1 => topology.regions[region].agents[0].restart()?,
            _ => topology.regions[region].set_wires(WireMode::Delay(Duration::from_millis(200)))?,
        }
        throughout(Duration::from_millis(300 + random.below(700) as u64), || Ok(()))?;
        topology.regions[region].set_wires(WireMode::Pass)?;
    }
    Ok(())
}

/// Checks a receipt against what clients saw in each region.
fn check_against_clients(reported: &Value, deletion: &AnsweredDeletion, seen: &[Sightings; 2]) -> Result<()> {
    let answered = deletion.answered;
    for (region, seen) in reported["regions"].as_array().context("no regions")?.iter().zip(seen) {
        let Some(started) = seen.get(&deletion.key.id) else { continue };
        // G1 holds whatever the receipt reports.
        ensure!(*started < answered + BOUND, "VALID after the bound: {reported}");
        // Only measured from the request did the time begin before the answer.
        if let Some(after) = region["confirmedAfterMs"].as_f64()
            && reported["measuredFrom"] == "request"
        {
            let confirmed = answered + Duration::from_secs_f64(after / 1e3);
            ensure!(
                *started <= confirmed,
                "VALID {:?} after it was confirmed: {reported}",
                *started - confirmed
            );
        }
    }
    Ok(())
}

#[test]
fn receipts_match_what_clients_saw_across_random_kills() -> Result<()> {
    Random::lived_through(run_with_kills)
}

fn run_with_kills(random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let mut world = World::start(&with_bound(BOUND, breakable(&REGIONS)))?;
    let publisher = ApiClient::new(&world, world.publisher());
    let agents = [0, 1].map(|region| ApiClient::new(&world, world.agent(region)));
    let (workload, api) = (DeletionWorkload::default(), world.api.clone());
    let (deletions, seen) = thread::scope(|scope| {
        let deleting = scope.spawn(|| workload.delete(&publisher, &api));
        let verifying = agents.each_ref().map(|agent| scope.spawn(|| workload.verify(agent)));
        let disturbed = disturb(&mut world.topology, random, events);
        workload.over.store(true, Ordering::Relaxed);
        let deletions = deleting.join().map_err(|_| anyhow!("a client panicked"))??;
        let [eu, us] = verifying.map(|thread| thread.join().map_err(|_| anyhow!("a client panicked")));
        disturbed?;
        Ok::<_, anyhow::Error>((deletions, [eu??, us??]))
    })?;
    ensure!(deletions.len() > 20, "only {} deletions were answered", deletions.len());
    let (mut confirmed, mut exposed) = (0, 0.0);
    for deletion in &deletions {
        let reported = wait_until_final(&world, &deletion.request)?;
        check_against_clients(&reported, deletion, &seen)?;
        ensure!(reported["state"] != "unproven", "{reported}");
        confirmed += usize::from(reported["state"] == "confirmed");
        let last = |region: &Value| region["exposure"]["lastAnswerAfterMs"].as_f64().unwrap_or(0.0);
        exposed += reported["regions"].as_array().map_or(0.0, |regions| regions.iter().map(last).sum());
    }
    ensure!(confirmed > 0, "none of {} was confirmed", deletions.len());
    ensure!(exposed > 0.0, "no exposure was reported, although wires were slow");
    Ok(())
}

/// Failure: the receipt reports a smaller exposure than clients saw.
#[test]
fn exposure_is_not_smaller_than_what_clients_saw() -> Result<()> {
    let world = World::start(&breakable(&["eu"]))?;
    let agent = ApiClient::new(&world, world.agent(0));
    for _ in 0..5 {
        let key = world.create_key()?;
        world.cache_everywhere(&[&key])?;
        world.topology.regions[0].set_wires(WireMode::Delay(Duration::from_millis(150)))?;
        let (answer, last) = thread::scope(|scope| {
            let deleting = scope.spawn(|| delete_and_wait(&world, &key, 30));
            let mut last = None;
            try_eventually("the deletion to arrive", SOON, || {
                let started = wall_millis()?;
                let valid = agent.code(&key)? == "VALID";
                last = if valid { Some(started) } else { last };
                Ok((!valid).then_some(()))
            })?;
            let answer = deleting.join().map_err(|_| anyhow!("a client panicked"))??;
            Ok::<_, anyhow::Error>((answer, last.context("it was never VALID")?))
        })?;
        world.topology.regions[0].set_wires(WireMode::Pass)?;
        let reported = &answer["meta"]["propagation"];
        let exposure = &reported["regions"][0]["exposure"];
        let last_after =
            exposure["lastAnswerAfterMs"].as_f64().with_context(|| format!("none in {reported}"))?;
        // The store uses this machine's clock. Both times are truncated to milliseconds.
        let seen_after = last - reported["committedAt"].as_i64().context("no time of commit")? - 1;
        ensure!(
            last_after >= seen_after as f64,
            "a client saw VALID {seen_after} ms after the commit: {reported}"
        );
    }
    Ok(())
}

/// Cuts the wires, for shorter or longer than the lease, and deletes a key that a client verifies throughout. Compares
/// the agent's report with what the client saw. After the heal, the key may be loaded before its deletion arrives.
fn cut_and_compare(world: &World, random: &mut Random, others: &[Key]) -> Result<()> {
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let region = &world.topology.regions[0];
    region.set_wires(WireMode::Cut)?;
    let began = Instant::now();
    let cut = Duration::from_millis(600 + random.below(5_400) as u64);
    let delete_after = Duration::from_millis(random.below(500) as u64);
    let healed = AtomicBool::new(false);
    let (answer, last) = thread::scope(|scope| {
        let verifying = scope.spawn(|| {
            let agent = ApiClient::new(world, world.agent(0));
            let mut last = None;
            try_eventually("the deletion to arrive", SOON, || {
                let started = wall_millis()?;
                let code = agent.code(&key)?;
                last = if code == "VALID" { Some(started) } else { last };
                Ok((code == "NOT_FOUND").then_some(()))
            })?;
            Ok::<_, anyhow::Error>(last)
        });
        // Other keys displace it from the cache meanwhile, as far as they can be loaded.
        let displacing = scope.spawn(|| {
            let agent = ApiClient::new(world, world.agent(0));
            for other in others.iter().cycle() {
                if healed.load(Ordering::Relaxed) {
                    break;
                }
                agent.code(other)?;
            }
            others.iter().try_for_each(|other| agent.code(other).map(drop))
        });
        throughout(delete_after, || Ok(()))?;
        let answer = delete_and_wait(world, &key, 0)?;
        throughout(cut.saturating_sub(began.elapsed()), || Ok(()))?;
        region.set_wires(WireMode::Pass)?;
        healed.store(true, Ordering::Relaxed);
        displacing.join().map_err(|_| anyhow!("a client panicked"))??;
        let last = verifying.join().map_err(|_| anyhow!("a client panicked"))??;
        Ok::<_, anyhow::Error>((answer, last))
    })?;
    let committed_at = answer["meta"]["propagation"]["committedAt"].as_i64().context("no time of commit")?;
    let reported = try_eventually("the agent to report it", SOON, || {
        let status = world.agent(0).status()?;
        let rows = status["recent"].as_array().cloned().unwrap_or_default();
        Ok(rows.into_iter().find(|row| row["id"] == key.id.as_str() && row["cause"] == "deleted"))
    })?;
    let last_after = reported["lastAnswerAfterMs"].as_f64().with_context(|| format!("none in {reported}"))?;
    // Truncated to milliseconds. An answer from before the commit counts as 0.
    let seen_after = last.map_or(0, |last| last - committed_at - 1).max(0);
    ensure!(
        last_after >= seen_after as f64,
        "VALID {seen_after} ms after the commit, in a cut of {cut:?}: {reported}"
    );
    let bound = BOUND.as_millis() as f64;
    ensure!(last_after <= bound, "{last_after} ms were reported, and the bound is {bound}: {reported}");
    Ok(())
}

/// Failure: after a long cut, a load replaces the entry that answers came from, and the exposure is reported as 0.
#[test]
fn exposure_covers_what_clients_saw_in_any_cut() -> Result<()> {
    let mut plan = with_bound(BOUND, breakable(&["eu"]));
    plan.agents.insert("cache".to_owned(), toml::toml! { size = "64KiB" }.into());
    let world = World::start(&plan)?;
    let others = world.create_keys(300)?;
    Random::lived_through(|random, _| (0..10).try_for_each(|_| cut_and_compare(&world, random, &others)))?;
    assert_eq!(count(world.agent(0), "evictd_agent_bound_breaches_total", &[])?, 0);
    Ok(())
}
