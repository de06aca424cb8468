//! Messages of the live feed are lost, duplicated and reordered on their way to one region. Another region receives
//! everything.
//!
//! Each test chooses what reveals the loss: a later message, a tick, or a probe. The other ways are switched off, so
//! that none of them can do the work of the one under test.

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::Proxy;
use evictd_tests::random::Random;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::throughout;
use evictd_wire::live::{Live, LiveEvent};
use toml::{Table, toml};

use crate::world::{A_WHILE, ApiClient, Key, World, breakable, count, flushes, repairs, wait_for_count};

const LIVE: &str = "evictd.v1.live";

const NO_TICKS: &str = "1h";

/// Starts two regions. The first one will miss something.
fn start(tick_interval: &str, agents: Table) -> Result<World> {
    let publisher = toml! { sequencer = { tick_interval = tick_interval } };
    let world = World::start(&Plan { publisher, agents, ..breakable(&["eu", "us"]) })?;
    Ok(world)
}

fn wire(world: &World) -> Result<&Proxy> {
    world.agent(0).wire.as_ref().context("the wire is direct")
}

/// Drops all further answers to probes of `eu`. Its lease outlives the test by far.
fn lose_probe_answers(world: &World) -> Result<()> {
    wire(world)?.drop_messages("_INBOX_evictd.eu.agent-1.*.probe", usize::MAX);
    Ok(())
}

/// Returns whether the message carries invalidations, and isn't a tick.
fn is_invalidation(payload: &[u8]) -> bool {
    Live::decode(payload).is_ok_and(|live| matches!(live.event, LiveEvent::Invalidations(_)))
}

fn lose_invalidations(world: &World, how_many: usize) -> Result<()> {
    wire(world)?.drop_chosen(LIVE, how_many, is_invalidation);
    Ok(())
}

/// Failure: the content of a lost message never reaches the region.
#[test]
fn gap_is_repaired_on_the_next_message() -> Result<()> {
    let world = start(NO_TICKS, Table::new())?;
    let [lost, later] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&lost, &later])?;
    world.wait_until_caught_up()?;
    lose_probe_answers(&world)?;
    lose_invalidations(&world, 1)?;

    world.delete(&lost)?;
    world.wait_for_code(world.agent(1), &lost, "NOT_FOUND")?;
    throughout(A_WHILE, || {
        ensure!(world.code(world.agent(0), &lost)? == "VALID", "eu received it early");
        Ok(())
    })?;

    world.delete(&later)?;
    world.assert_gone(&[&lost, &later])?;
    world.wait_until_caught_up()?;
    assert_eq!((repairs(world.agent(0), "gap")?, flushes(world.agent(0))?), (1, 0));
    assert_eq!((repairs(world.agent(1), "gap")?, flushes(world.agent(1))?), (0, 0));
    Ok(())
}

/// Failure: the last message before a silence is lost, and no later message reveals the gap.
#[test]
fn tick_reveals_that_the_last_message_was_lost() -> Result<()> {
    let world = start("200ms", Table::new())?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.wait_until_caught_up()?;
    lose_probe_answers(&world)?;
    lose_invalidations(&world, 1)?;

    world.delete(&key)?;
    world.assert_gone(&[&key])?;
    assert_eq!((repairs(world.agent(0), "tick")?, flushes(world.agent(0))?), (1, 0));
    Ok(())
}

/// Failure: the last message before a silence is lost, and so are all ticks.
#[test]
fn probe_reveals_that_the_last_message_was_lost() -> Result<()> {
    let world = start(NO_TICKS, toml! { lease = { probe_interval = "500ms" } })?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.wait_until_caught_up()?;
    wire(&world)?.drop_messages(LIVE, usize::MAX);

    world.delete(&key)?;
    world.assert_gone(&[&key])?;
    assert_eq!((repairs(world.agent(0), "probe")?, flushes(world.agent(0))?), (1, 0));
    assert_eq!(count(world.agent(0), "evictd_agent_invalidations_total", &[("via", "replay")])?, 1);
    Ok(())
}

/// Failure: the answer to a repair is lost too, and the agent doesn't repeat the request.
#[test]
fn repair_whose_answer_is_lost_is_requested_again() -> Result<()> {
    let world = start("200ms", toml! { lease = { request_timeout = "200ms" } })?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.wait_until_caught_up()?;
    lose_probe_answers(&world)?;
    lose_invalidations(&world, 1)?;
    wire(&world)?.drop_messages("_INBOX_evictd.eu.agent-1.*.replay", 2);

    world.delete(&key)?;
    world.assert_gone(&[&key])?;
    assert_eq!((repairs(world.agent(0), "tick")?, flushes(world.agent(0))?), (3, 0));
    Ok(())
}

/// Failure: a duplicate is applied as a second message, or undoes what came between the two.
#[test]
fn duplicated_messages_change_nothing() -> Result<()> {
    let world = start("200ms", Table::new())?;
    let keys = [world.create_key()?, world.create_key()?, world.create_key()?];
    let keys = keys.each_ref();
    world.cache_everywhere(&keys)?;
    world.wait_until_caught_up()?;
    let applied = count(world.agent(0), "evictd_agent_invalidations_total", &[])?;
    wire(&world)?.duplicate_messages(LIVE, usize::MAX);

    for key in keys {
        world.delete(key)?;
    }
    world.assert_gone(&keys)?;
    world.wait_until_caught_up()?;
    assert_eq!(count(world.agent(0), "evictd_agent_invalidations_total", &[])?, applied + 3);
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// Failure: the earlier message is dropped as outdated because the later one came first.
#[test]
fn reordered_messages_change_nothing() -> Result<()> {
    // A gap that closes by itself needs no repair, however slow this machine is.
    let world = start(NO_TICKS, toml! { lease = { gap_patience = "20s" } })?;
    let keys = [world.create_key()?, world.create_key()?];
    let keys = keys.each_ref();
    world.cache_everywhere(&keys)?;
    world.wait_until_caught_up()?;
    lose_probe_answers(&world)?;
    wire(&world)?.swap_messages(LIVE);

    world.delete(keys[0])?;
    world.wait_for_code(world.agent(1), keys[0], "NOT_FOUND")?;
    assert_eq!(world.code(world.agent(0), keys[0])?, "VALID", "the message wasn't held back");
    world.delete(keys[1])?;
    world.assert_gone(&keys)?;
    world.wait_until_caught_up()?;
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// Failure: one lost message among many goes unnoticed, or its repair replays far more than it.
#[test]
fn only_the_lost_message_of_2000_deletions_is_repaired() -> Result<()> {
    const KEYS: usize = 2_000;
    let mut world = start("200ms", Table::new())?;
    let keys = world.create_keys(KEYS)?;
    world.wait_until_caught_up()?;
    for agent in world.topology.agents() {
        let caller = ApiClient::new(&world, agent);
        for key in &keys {
            ensure!(caller.code(key)? == "VALID", "{}", key.id);
        }
    }
    lose_probe_answers(&world)?;
    let applied = |agent: &Node, via| count(agent, "evictd_agent_invalidations_total", &[("via", via)]);
    let before = [applied(world.agent(0), "live")?, applied(world.agent(1), "live")?];

    world.delete_all(&keys[..KEYS / 2])?;
    lose_invalidations(&world, 1)?;
    world.delete_all(&keys[KEYS / 2..])?;
    world.wait_until_caught_up()?;
    for agent in world.topology.agents() {
        let caller = ApiClient::new(&world, agent);
        for key in &keys {
            ensure!(caller.code(key)? == "NOT_FOUND", "{}", key.id);
        }
    }
    // Each deletion was applied once, and only those of the lost message were replayed.
    let (live, replayed) = (applied(world.agent(0), "live")? - before[0], applied(world.agent(0), "replay")?);
    assert_eq!(live + replayed, KEYS as u64);
    ensure!((1..=64).contains(&replayed), "{replayed} were replayed");
    assert_eq!(applied(world.agent(1), "live")? - before[1], KEYS as u64);
    assert_eq!((repairs(world.agent(1), "gap")?, flushes(world.agent(0))?), (0, 0));

    // An agent that joins now begins at the end of the log, and requests no replay.
    wire(&world)?.clear_rules();
    let head = world.wait_until_caught_up()?;
    world.agent_mut(0).restart()?;
    assert_eq!(world.agent(0).status()?["appliedPosition"], head);
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(count(world.agent(0), "evictd_agent_invalidations_total", &[])?, 0);
    ensure!(head > 2 * KEYS as u64);
    world.assert_works()
}

/// Failure: reordering and duplication are each harmless, but not together.
#[test]
fn duplicated_and_shuffled_messages_change_nothing() -> Result<()> {
    const KEYS: usize = 100;
    let world = start("200ms", toml! { lease = { gap_patience = "20s" } })?;
    let mut random = Random::draw()?;
    let repeat = random.how_to_repeat();
    let keys = world.create_keys(KEYS)?;
    let keys: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&keys)?;
    world.wait_until_caught_up()?;
    let applied = count(world.agent(0), "evictd_agent_invalidations_total", &[])?;
    lose_probe_answers(&world)?;
    wire(&world)?.hold_messages(LIVE);

    for key in &keys {
        world.delete(key)?;
    }
    world.wait_for_code(world.agent(1), keys[KEYS - 1], "NOT_FOUND")?;
    ensure!(wire(&world)?.held() > 10, "too few messages to shuffle");
    wire(&world)?.release_jumbled(&mut random);
    world.wait_until_caught_up().context(repeat)?;
    world.assert_gone(&keys)?;
    assert_eq!(count(world.agent(0), "evictd_agent_invalidations_total", &[])?, applied + KEYS as u64);
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// Failure: no report says that the feed has stopped, because everything else works.
#[test]
fn silent_feed_is_reported_and_deletions_still_arrive() -> Result<()> {
    let world = start("200ms", toml! { lease = { probe_interval = "500ms" } })?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    wait_for_count(world.agent(0), "evictd_agent_feed_silent", &[], 0)?;
    wire(&world)?.drop_messages(LIVE, usize::MAX);
    wait_for_count(world.agent(0), "evictd_agent_feed_silent", &[], 1)?;
    assert_eq!(world.agent(0).status()?["mode"], "live");

    world.delete(&key)?;
    world.assert_gone(&[&key])?;
    assert_eq!((repairs(world.agent(0), "probe")?, flushes(world.agent(0))?), (1, 0));
    wire(&world)?.clear_rules();
    wait_for_count(world.agent(0), "evictd_agent_feed_silent", &[], 0)?;
    world.assert_none_valid(&[&key])
}
