//! Several publishers, of which some are killed or paused at any point of their work.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use evictd_tests::proxy::{Way, WireMode};
use evictd_tests::random::Random;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::json;
use toml::toml;

use super::clients::Clients;
use super::{Settled, Site};
use crate::bad_days::{DeleteAnswer, DeletionRequest, check_log, check_receipts};
use crate::world::{
    ApiClient, Key, SOON, World, breakable, flushes, plan, repairs, wait_for_count, with_bound,
};

/// How a publisher drops out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Out {
    /// SIGKILL.
    Killed,
    /// SIGSTOP: its connections stay open, and it keeps its locks on the server.
    Frozen,
}

impl Out {
    const ALL: [Self; 2] = [Self::Killed, Self::Frozen];

    fn drops(self, publisher: &mut Node) -> Result<()> {
        match self {
            Self::Killed => publisher.daemon.kill().map(drop),
            Self::Frozen => publisher.daemon.pause(),
        }
    }

    fn returns(self, publisher: &mut Node) -> Result<()> {
        match self {
            Self::Killed => publisher.daemon.restart()?,
            Self::Frozen => publisher.daemon.resume()?,
        }
        publisher.wait_until_ready()
    }
}

fn wait_until_all_is_numbered(world: &World) -> Result<()> {
    try_eventually("every row to be numbered", SOON, || {
        let waiting = world.sql("SELECT count(*) FROM invalidations WHERE position IS NULL")?;
        Ok((waiting == "0").then_some(()))
    })
}

/// Checks all guarantees, also at the publisher that had dropped out.
fn check(site: &Site, deleted: &[&Key]) -> Result<()> {
    let world = &site.world;
    world.wait_until_caught_up()?;
    world.assert_gone(deleted)?;
    check_log(world)?;
    check_receipts(world, std::iter::empty())?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0, "a publisher's failure flushed an agent's cache");
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: rows that one publisher has committed wait until that publisher numbers them. A paused publisher that waits
/// for the head's lock even gets and keeps it.
#[test]
fn neighbors_number_what_a_lost_publisher_committed() -> Result<()> {
    let mut site = Site::start(3, plan(&["eu", "us"]))?;
    for out in Out::ALL {
        let keys = site.world.create_keys(24)?;
        let doomed: Vec<&Key> = keys.iter().collect();
        site.world.cache_everywhere(&doomed)?;
        // No publisher can lock the head of the log, but the deletions are committed.
        let mut lock = site.session()?;
        lock.query("BEGIN; SELECT FROM log_head FOR UPDATE")?;
        site.world.delete_all(&keys)?;
        let waiting = site.world.sql("SELECT count(*) FROM invalidations WHERE position IS NULL")?;
        ensure!(waiting == "24", "{waiting} rows wait");
        out.drops(&mut site.world.topology.publisher)?;
        lock.query("COMMIT")?;

        site.world.assert_gone(&doomed).with_context(|| format!("{out:?}"))?;
        wait_until_all_is_numbered(&site.world)?;
        out.returns(&mut site.world.topology.publisher)?;
        check(&site, &doomed).with_context(|| format!("{out:?}"))?;
    }
    Ok(())
}

/// Failure: only the publisher that numbered a row can send it, and it never does. Or it sends the row much later, and
/// agents take it for a new one.
#[test]
fn neighbors_send_what_a_lost_publisher_numbered() -> Result<()> {
    // Without polling, only the publisher that made a change numbers it.
    let publisher = toml! { sequencer = { poll_interval = "1h" } };
    let mut site = Site::start(3, Plan { publisher, ..breakable(&["eu", "us"]) })?;
    for out in Out::ALL {
        let keys = site.world.create_keys(24)?;
        let doomed: Vec<&Key> = keys.iter().collect();
        site.world.cache_everywhere(&doomed)?;
        let repaired = |world: &World| -> Result<u64> {
            world.topology.agents().map(|agent| Ok(repairs(agent, "tick")? + repairs(agent, "probe")?)).sum()
        };
        let before = repaired(&site.world)?;
        let wire = site.world.publisher().wire.as_ref().context("the wire is direct")?;
        wire.set(WireMode::BlackHole(Way::ToServer));
        site.world.delete_all(&keys)?;
        wait_until_all_is_numbered(&site.world)?;
        out.drops(&mut site.world.topology.publisher)?;

        site.world.assert_gone(&doomed).with_context(|| format!("{out:?}"))?;
        ensure!(repaired(&site.world)? > before, "nothing was missing ({out:?})");
        let wire = site.world.publisher().wire.as_ref().context("the wire is direct")?;
        if out == Out::Killed {
            // Its messages are lost with its connection. Those of a paused publisher arrive now.
            wire.reset();
        }
        wire.set(WireMode::Pass);
        out.returns(&mut site.world.topology.publisher)?;
        check(&site, &doomed).with_context(|| format!("{out:?}"))?;
    }
    Ok(())
}

/// Failure: a change whose client got no answer is lost, or is made twice.
#[test]
fn changes_in_commit_at_a_publishers_kill_are_done_once() -> Result<()> {
    const KEYS: usize = 8;
    let mut site = Site::start(2, plan(&["eu", "us"]))?;
    let keys = site.world.create_keys(KEYS)?;
    let doomed: Vec<&Key> = keys.iter().collect();
    site.world.cache_everywhere(&doomed)?;
    site.world.wait_until_caught_up()?;
    // From now on no COMMIT finishes: each waits for a standby, and there is none.
    site.server.set("synchronous_standby_names = '*'")?;
    let caller = ApiClient::new(&site.world, site.world.publisher());
    thread::scope(|scope| {
        let clients: Vec<_> = doomed
            .iter()
            .map(|key| (caller.clone(), key))
            .map(|(caller, key)| {
                scope.spawn(move || caller.call("keys.deleteKey", &json!({ "keyId": key.id })))
            })
            .collect();
        let committing =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query = 'COMMIT'";
        let changes =
            "SELECT count(*) FROM pg_locks WHERE relation = 'keys'::regclass AND mode = 'RowExclusiveLock'";
        try_eventually("the deletions to be in the middle of their COMMIT", SOON, || {
            let [committing, changes]: [usize; 2] =
                [site.server.query(committing)?.parse()?, site.server.query(changes)?.parse()?];
            Ok((committing >= KEYS && changes >= KEYS).then_some(()))
        })?;
        site.world.topology.publisher.daemon.kill()?;
        for client in clients {
            let answer = client.join().map_err(|_| anyhow!("a client panicked"))?;
            ensure!(answer.is_err(), "a client was answered: {answer:?}");
        }
        Ok(())
    })?;
    site.server.set("synchronous_standby_names = ''")?;
    site.world.assert_gone(&doomed)?;
    Out::Killed.returns(&mut site.world.topology.publisher)?;
    check(&site, &doomed)
}

/// Failure: requests go to the nearest publisher, which is paused and answers none of them (R14).
#[test]
fn agents_stay_live_beside_a_frozen_publisher() -> Result<()> {
    // More than the five seconds for which the server waits for a publisher that was paused during a round.
    const BOUND: Duration = Duration::from_secs(9);
    let mut site = Site::start(2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let keys = site.world.create_keys(5)?;
    let [meanwhile @ .., good] = &keys[..] else { bail!("no keys") };
    site.world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    Out::Frozen.drops(&mut site.world.topology.publisher)?;
    for key in meanwhile {
        let settled = Settled::of(&site.world, site.publisher(1)?, key)?;
        assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
    }
    throughout(BOUND + Duration::from_secs(1), || {
        for agent in site.world.topology.agents() {
            ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
            assert_eq!(site.world.code(agent, good)?, "VALID");
        }
        Ok(())
    })?;
    Out::Frozen.returns(&mut site.world.topology.publisher)?;
    check(&site, &meanwhile.iter().collect::<Vec<_>>())
}

/// Failure: a publisher that can't reach its database still takes its share of the agents' requests. Or its clients
/// wait forever, or get a wrong answer.
#[test]
fn agents_stay_live_beside_a_publisher_whose_database_is_silent() -> Result<()> {
    // Half of the probes are answered only at their second try. A lease lasts for several of them on a busy machine.
    const BOUND: Duration = Duration::from_secs(6);
    let site = Site::start(2, with_bound(BOUND, breakable(&["eu", "us"])))?;
    let world = &site.world;
    let keys = world.create_keys(4)?;
    let [refused, doomed, uncached, good] = &keys[..] else { bail!("no keys") };
    world.cache_everywhere(&[refused, doomed, good])?;
    let wire = world.publisher().store_wire.as_ref().context("the wire is direct")?;
    wire.set(WireMode::BlackHole(Way::Both));
    let silent = ApiClient::new(world, world.publisher());
    thread::scope(|scope| {
        let client = scope.spawn(|| DeletionRequest::of(&silent, refused));
        throughout(BOUND * 3, || {
            for agent in world.topology.agents() {
                ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
                assert_eq!(world.code(agent, good)?, "VALID");
            }
            Ok(())
        })?;
        wait_for_count(world.publisher(), "evictd_publisher_stalled", &[], 1)?;
        let settled = Settled::of(world, site.publisher(1)?, doomed)?;
        assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
        world.wait_for_codes(&[uncached], "VALID")?;
        let request = client.join().map_err(|_| anyhow!("a client panicked"))??;
        // Not even its root key could be looked up.
        assert_eq!(request.answer, DeleteAnswer::Unchanged);
        ensure!(request.took < Duration::from_secs(15), "it was answered after {:?}", request.took);
        Ok(())
    })?;
    wire.set(WireMode::Pass);
    wait_for_count(world.publisher(), "evictd_publisher_stalled", &[], 0)?;
    world.wait_for_codes(&[refused], "VALID")?;
    check(&site, &[doomed])
}

/// Failure: two publishers delete the same key, and both answer success, or neither does.
#[test]
fn a_key_deleted_at_two_publishers_is_deleted_once() -> Result<()> {
    const CLIENTS: usize = 4;
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(60)?;
    let doomed: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&doomed)?;
    let publishers: Vec<ApiClient> =
        world.topology.publishers().map(|node| ApiClient::new(world, node)).collect();
    let answers = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (publisher, keys) = (&publishers[client % publishers.len()], &keys);
                scope.spawn(move || {
                    keys.iter().map(|key| DeletionRequest::of(publisher, key)).collect::<Result<Vec<_>>>()
                })
            })
            .collect();
        let answers =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        answers.collect::<Result<Vec<_>>>()
    })?;
    for (n, key) in keys.iter().enumerate() {
        let of_key: Vec<DeleteAnswer> = answers.iter().map(|by_client| by_client[n].answer).collect();
        let deleted = of_key.iter().filter(|answer| **answer == DeleteAnswer::Deleted).count();
        let found_none = of_key.iter().filter(|answer| **answer == DeleteAnswer::NotFound).count();
        assert_eq!((deleted, found_none), (1, CLIENTS - 1), "{}: {of_key:?}", key.id);
    }
    check(&site, &doomed)
}

/// Failure: changes of the same records at several publishers abort each other, or leave agents with records that
/// differ from the store's.
#[test]
fn concurrent_changes_of_the_same_records_converge() -> Result<()> {
    let mut random = Random::draw()?;
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let pool =
        Pool { apis: Mutex::new(vec![world.create_api()?, world.create_api()?]), keys: Mutex::default() };
    let publishers: Vec<ApiClient> =
        world.topology.publishers().map(|node| ApiClient::new(world, node)).collect();
    let over = Instant::now() + Duration::from_secs(4);
    let changed = thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|client| {
                let (publisher, pool) = (&publishers[client % publishers.len()], &pool);
                let mut random = Random::new(random.below(usize::MAX) as u64);
                scope.spawn(move || {
                    let mut changes = 0;
                    while Instant::now() < over {
                        pool.change(publisher, &mut random)?;
                        changes += 1;
                    }
                    Ok(changes)
                })
            })
            .collect();
        let changed =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        changed.sum::<Result<usize>>()
    });
    let changed = changed.with_context(|| random.how_to_repeat())?;
    world.wait_until_caught_up()?;
    let keys = pool.keys.into_inner().map_err(|_| anyhow!("a client panicked"))?;
    println!("{changed} changes of {} keys", keys.len());
    for key in keys.iter().rev().take(100) {
        let in_store = world.sql(&format!(
            "SELECT CASE WHEN k.deleted_at_m IS NOT NULL OR a.deleted_at_m IS NOT NULL THEN 'NOT_FOUND'
                    WHEN k.enabled THEN 'VALID' ELSE 'DISABLED' END
             FROM keys k JOIN apis a ON a.id = k.api_id WHERE k.id = '{}'",
            key.id
        ))?;
        for agent in world.topology.agents() {
            assert_eq!(world.code(agent, key)?, in_store, "{}", key.id);
        }
    }
    check(&site, &[])
}

/// A few records that all clients change.
struct Pool {
    apis: Mutex<Vec<String>>,
    keys: Mutex<Vec<Key>>,
}

impl Pool {
    /// Makes one change. It may fail only because another client has already deleted its object.
    fn change(&self, publisher: &ApiClient, random: &mut Random) -> Result<()> {
        // One of the newest, so that several clients change the same one.
        let key = {
            let keys = self.keys.lock().map_err(|_| anyhow!("a client panicked"))?;
            keys.iter().rev().nth(random.below(8)).map(|key| key.id.clone())
        };
        let api = {
            let apis = self.apis.lock().map_err(|_| anyhow!("a client panicked"))?;
            apis[apis.len() - 1 - random.below(2)].clone()
        };
        let key = key.unwrap_or_default();
        let (operation, body) = match random.below(20) {
            0 => ("apis.deleteApi", json!({ "apiId": api })),
            1 => ("apis.createApi", json!({ "name": "one more" })),
            2..5 => ("keys.deleteKey", json!({ "keyId": key })),
            5..8 => ("keys.rerollKey", json!({ "keyId": key, "expiration": 600_000 })),
            8..11 => ("keys.updateKey", json!({ "keyId": key, "enabled": random.below(2) == 0 })),
            _ => ("keys.createKey", json!({ "apiId": api })),
        };
        if key.is_empty() && body.get("keyId").is_some() {
            return Ok(());
        }
        let answer = publisher.call(operation, &body)?;
        let data = &answer.body["data"];
        let text = |member: &str| data[member].as_str().map(str::to_owned);
        match answer.status {
            200 if operation == "apis.createApi" => {
                let api = text("apiId").context("an API without an id")?;
                self.apis.lock().map_err(|_| anyhow!("a client panicked"))?.push(api);
            }
            200 => {
                if let Some((id, text)) = text("keyId").zip(text("key")) {
                    self.keys.lock().map_err(|_| anyhow!("a client panicked"))?.push(Key { id, text });
                }
            }
            404 => {}
            status => bail!("{operation} was answered {status}: {}", answer.text),
        }
        Ok(())
    }
}

const CHAOS: Duration = Duration::from_secs(9);
const CHAOS_BOUND: Duration = Duration::from_secs(3);

/// Publishers drop out and return, one or two at a time, until the time is over.
fn drop_in_any_order(site: &mut Site, random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let began = Instant::now();
    let pause = |random: &mut Random| throughout(Duration::from_millis(random.below(700) as u64), || Ok(()));
    while began.elapsed() < CHAOS {
        let mut victims = [0, 1, 2];
        random.shuffle(&mut victims);
        let victims: Vec<(usize, Out)> =
            victims[..=random.below(2)].iter().map(|victim| (*victim, Out::ALL[random.below(2)])).collect();
        for (victim, out) in &victims {
            events.push(format!("{:?}: {victim} is {out:?}", began.elapsed()));
            out.drops(site.world.topology.publishers_mut().nth(*victim).context("no publisher")?)?;
            pause(random)?;
        }
        for (victim, out) in &victims {
            let publisher = site.world.topology.publishers_mut().nth(*victim).context("no publisher")?;
            events.push(format!("{:?}: {victim} returns", began.elapsed()));
            // Doesn't wait until it is ready.
            match out {
                Out::Killed => publisher.daemon.restart()?,
                Out::Frozen => publisher.daemon.resume()?,
            }
            pause(random)?;
        }
    }
    Ok(())
}

/// Failure: two publishers that drop out together cause a failure that one alone doesn't. Or a publisher that returns
/// undoes what its neighbors did meanwhile.
#[test]
fn no_deletion_is_lost_when_publishers_drop_out_in_any_order() -> Result<()> {
    Random::lived_through(live_through)
}

fn live_through(random: &mut Random, events: &mut Vec<String>) -> Result<()> {
    let mut site = Site::start(3, with_bound(CHAOS_BOUND, plan(&["eu", "us"])))?;
    let clients = Clients::new(&site.world, CHAOS_BOUND);
    clients.work_while(|| drop_in_any_order(&mut site, random, events))?;
    for publisher in site.world.topology.publishers_mut() {
        publisher.wait_until_ready()?;
    }
    let fates = clients.fates()?;
    // Leases may have expired for a moment, but no cache was flushed.
    check(&site, &fates.doomed())?;
    site.world.wait_for_codes(&fates.good(), "VALID")
}
