//! A long outage of NATS, during which clients delete keys.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::process::Footprint;
use evictd_tests::topology::{Node, Plan, Servers};
use evictd_tests::wait::{eventually, throughout, try_eventually};

use super::{ClientHistory, DeleteAnswer, DeletionRequest, with_store_in};
use crate::world::{
    ApiClient, Key, SOON, UNAVAILABLE, World, assert_bounded, count, flushes, plan, wait_for_count,
    wait_for_mode, wait_for_readiness, wait_for_warning, wait_until_settled, with_bound,
};

/// Short, so that the test also covers the time after it.
const BOUND: Duration = Duration::from_secs(2);

/// The memory that an outage may cost a daemon.
const MEMORY_MAX: u64 = 48 << 20;

/// The least number of deletions that must be answered during an outage.
const DELETIONS_MIN: usize = 100;

/// The shortest timeout of sends to NATS: that of a live feed message. A deletion takes some milliseconds. One that
/// waited for a message would take this long.
const SEND_TIMEOUT: Duration = Duration::from_millis(250);

/// Plans regions with their own servers, so that agents stay connected to a server without a link to home.
fn regions() -> Plan {
    with_bound(BOUND, Plan { servers: Servers::PerRegion, ..plan(&["eu", "us"]) })
}

fn footprints(world: &World) -> Result<Vec<Footprint>> {
    let nodes = world.topology.agents().chain([world.publisher()]);
    nodes.map(|node| node.daemon.footprint()).collect()
}

fn assert_bounded_memory(before: &[Footprint], world: &World) -> Result<()> {
    for (before, after) in before.iter().zip(footprints(world)?) {
        println!("{} KiB before, {} KiB after", before.resident_bytes >> 10, after.resident_bytes >> 10);
        ensure!(after.resident_bytes < before.resident_bytes + MEMORY_MAX, "{before:?} {after:?}");
        ensure!(after.open_files <= before.open_files + 8, "{before:?} {after:?}");
    }
    Ok(())
}

/// Returns how many rows an agent has applied by replays since its start.
fn replayed(agent: &Node) -> Result<u64> {
    count(agent, "evictd_agent_invalidations_total", &[("via", "replay")])
}

/// Deletes `keys` one after the other, about fifty a second, until `over`.
fn delete_steadily<'k>(
    publisher: &ApiClient,
    keys: &'k [Key],
    deleted: &AtomicUsize,
    over: &AtomicBool,
) -> Result<ClientHistory<'k>> {
    let mut story = ClientHistory::default();
    for key in keys.iter().take_while(|_| !over.load(Ordering::Relaxed)) {
        story.0.push(DeletionRequest::of(publisher, key)?);
        deleted.fetch_add(1, Ordering::Relaxed);
        throughout(Duration::from_millis(15), || Ok(()))?;
    }
    Ok(story)
}

/// Kills home's server for three bounds and until enough keys were `deleted`, and restarts it. Agents that receive
/// nothing deny by then.
fn outage(world: &mut World, [good, doomed]: [&Key; 2], deleted: &AtomicUsize) -> Result<()> {
    world.topology.home.kill()?;
    let before = deleted.load(Ordering::Relaxed);
    world.delete(doomed)?;
    let deleted_at = Instant::now();
    throughout(BOUND * 3, || {
        for agent in world.topology.agents() {
            let sent_at = Instant::now();
            assert_bounded(sent_at, deleted_at, BOUND, &world.code(agent, doomed)?)?;
        }
        Ok(())
    })?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
        assert_eq!(world.code(agent, good)?, UNAVAILABLE, "{}", agent.daemon.name());
        wait_for_readiness(agent, 503)?;
    }
    wait_for_warning(world.publisher(), "a connection to nats://")?;
    ensure!(count(world.publisher(), "evictd_publisher_live_messages_total", &[("outcome", "unsent")])? > 0);
    // A deletion that waited for NATS would never be answered: NATS stays down until these are.
    let enough = format!("{DELETIONS_MIN} deletions to be answered without NATS");
    eventually(&enough, SOON, || (deleted.load(Ordering::Relaxed) >= before + DELETIONS_MIN).then_some(()))?;
    world.topology.home.restart()
}

fn median(requests: &[DeletionRequest]) -> Result<Duration> {
    let mut took: Vec<Duration> = requests.iter().map(|request| request.took).collect();
    took.sort_unstable();
    took.get(took.len() / 2).copied().context("nothing was measured")
}

/// Failure: deletions get slower, fail or are lost while they can't be announced. Or agents use caches without a proof.
/// Or receipts stay open until NATS is back.
#[test]
fn deletions_are_as_fast_during_a_long_outage_of_nats() -> Result<()> {
    let mut world = World::start(&regions())?;
    wait_until_settled(world.publisher())?;
    let keys = world.import_keys(3_000)?;
    let (good, doomed) = (world.create_key()?, world.create_key()?);
    let cached = keys.iter().step_by(50).chain([&good, &doomed]);
    world.cache_everywhere(&cached.collect::<Vec<_>>())?;
    let before = footprints(&world)?;
    let caller = ApiClient::new(&world, world.publisher());
    let (deleted, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (story, range) = thread::scope(|scope| {
        let deleting = scope.spawn(|| delete_steadily(&caller, &keys, &deleted, &over));
        let outcome = (|| {
            throughout(BOUND / 2, || Ok(()))?;
            let from = deleted.load(Ordering::Relaxed);
            outage(&mut world, [&good, &doomed], &deleted)?;
            Ok::<_, anyhow::Error>(from..deleted.load(Ordering::Relaxed))
        })();
        over.store(true, Ordering::Relaxed);
        let story = deleting.join().map_err(|_| anyhow!("a client panicked"))??;
        Ok::<_, anyhow::Error>((story, outcome?))
    })?;
    let (usual, during) = (median(&story.0[..range.start])?, median(&story.0[range.clone()])?);
    println!("{} deletions during the outage, {during:?} each; {usual:?} before it", range.len());
    assert_eq!(story.count(DeleteAnswer::Deleted), story.0.len(), "a deletion was refused");
    ensure!(during < SEND_TIMEOUT, "{during:?} instead of {usual:?}: each waits for a timeout");

    for agent in world.topology.agents() {
        wait_for_mode(agent, "live")?;
    }
    story.check(&world)?;
    world.wait_for_codes(&[&good], "VALID")?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0, "the agent must replay the missed rows without a flush");
    }
    assert_bounded_memory(&before, &world)?;
    world.assert_works()
}

/// Failure: the backlog of an hour without NATS fills the memory of a daemon, or is too large for agents to catch up.
#[test]
fn agents_catch_up_with_an_hour_of_deletions_without_nats() -> Result<()> {
    // Five or six per second for an hour.
    const MANY: usize = 20_000;
    // In memory: this test is about the backlog, not about the speed of a disk.
    let dir = tempfile::tempdir_in("/dev/shm").context("a directory in memory")?;
    let publisher = with_store_in(dir.path())?.publisher;
    let mut world = World::start(&Plan { publisher, ..regions() })?;
    let keys = world.import_keys(MANY)?;
    let good = world.create_key()?;
    let cached: Vec<&Key> = keys.iter().step_by(200).collect();
    world.cache_everywhere(&cached)?;
    world.cache_everywhere(&[&good])?;
    let before = footprints(&world)?;

    world.topology.home.kill()?;
    let began = Instant::now();
    let story = ClientHistory(world.by_all_clients(&keys, DeletionRequest::of)?);
    println!("{MANY} deletions took {:?}", began.elapsed());
    assert_eq!(story.count(DeleteAnswer::Deleted), MANY, "a deletion was refused");
    world.topology.home.restart()?;
    let back_at = Instant::now();
    world.wait_until_caught_up()?;
    println!("all agents had caught up after {:?}", back_at.elapsed());
    for agent in world.topology.agents() {
        wait_for_mode(agent, "live")?;
        println!("{}: {} replayed, {} flushes", agent.daemon.name(), replayed(agent)?, flushes(agent)?);
    }
    assert_bounded_memory(&before, &world)?;

    let mut sample: Vec<DeletionRequest> = story.0;
    sample.retain(|request| cached.iter().any(|key| key.id == request.key.id));
    ClientHistory(sample).check(&world)?;
    wait_for_count(world.publisher(), "evictd_publisher_unconfirmed_deletions", &[], 0)?;
    try_eventually("the good key to be VALID", SOON, || {
        let codes = world.topology.agents().map(|agent| world.code(agent, &good));
        Ok(codes.collect::<Result<Vec<_>>>()?.iter().all(|code| code == "VALID").then_some(()))
    })?;
    world.assert_works()
}
