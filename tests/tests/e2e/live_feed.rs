//! Messages of the live feed are lost, doubled and swapped on their way to one region; another one hears
//! everything.
//!
//! What a region may find out by is chosen per test: a later message, a tick, or a probe. The others are
//! switched off, so that none of them can do the work of the one that is looked at.

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::Proxy;
use evictd_tests::random::Random;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::throughout;
use evictd_wire::live::{Live, LiveEvent};
use toml::{Table, toml};

use crate::world::{A_WHILE, Caller, Key, World, breakable, count, flushes, repairs, wait_for_count};

const LIVE: &str = "evictd.v1.live";

const NO_TICKS: &str = "1h";

/// Two regions, of which the first will miss something.
fn start(tick_interval: &str, agents: Table) -> Result<World> {
    let publisher = toml! { sequencer = { tick_interval = tick_interval } };
    let world = World::start(&Plan { publisher, agents, ..breakable(&["eu", "us"]) })?;
    Ok(world)
}

fn wire(world: &World) -> Result<&Proxy> {
    world.agent(0).wire.as_ref().context("the wire is direct")
}

/// From now on `eu` gets no answers to its probes. Its lease outlives the test by far.
fn lose_probe_answers(world: &World) -> Result<()> {
    wire(world)?.drop_messages("_INBOX_evictd.eu.agent-1.*.probe", usize::MAX);
    Ok(())
}

/// A message with invalidations, not a tick.
fn is_invalidation(payload: &[u8]) -> bool {
    Live::decode(payload).is_ok_and(|live| matches!(live.event, LiveEvent::Invalidations(_)))
}

fn lose_invalidations(world: &World, how_many: usize) -> Result<()> {
    wire(world)?.drop_chosen(LIVE, how_many, is_invalidation);
    Ok(())
}

/// Failure: what a lost message said is never learnt.
#[test]
fn a_gap_is_repaired_as_soon_as_a_later_message_shows_it() -> Result<()> {
    let world = start(NO_TICKS, Table::new())?;
    let [lost, later] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&lost, &later])?;
    world.wait_until_caught_up()?;
    lose_probe_answers(&world)?;
    lose_invalidations(&world, 1)?;

    world.delete(&lost)?;
    world.wait_for_code(world.agent(1), &lost, "NOT_FOUND")?;
    throughout(A_WHILE, || {
        ensure!(world.code(world.agent(0), &lost)? == "VALID", "who has told eu?");
        Ok(())
    })?;

    world.delete(&later)?;
    world.assert_gone(&[&lost, &later])?;
    world.wait_until_caught_up()?;
    assert_eq!((repairs(world.agent(0), "gap")?, flushes(world.agent(0))?), (1, 0));
    assert_eq!((repairs(world.agent(1), "gap")?, flushes(world.agent(1))?), (0, 0));
    Ok(())
}

/// Failure: the last message before a silence is lost, and nothing comes after it.
#[test]
fn a_tick_shows_that_the_last_message_was_lost() -> Result<()> {
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

/// Failure: as above, and the ticks are lost too.
#[test]
fn a_probe_shows_that_the_last_message_was_lost() -> Result<()> {
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

/// Failure: the answer to a repair is lost like everything else.
#[test]
fn a_repair_whose_answer_is_lost_is_asked_for_again() -> Result<()> {
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

/// Failure: a message that comes twice is counted as two, or brings back what was between them.
#[test]
fn messages_that_come_twice_change_nothing() -> Result<()> {
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

/// Failure: the earlier message is taken for old news because the later one came first.
#[test]
fn messages_that_come_in_the_wrong_order_change_nothing() -> Result<()> {
    // A hole that closes by itself needs no repair, however slow this machine is.
    let world = start(NO_TICKS, toml! { lease = { gap_patience = "20s" } })?;
    let keys = [world.create_key()?, world.create_key()?];
    let keys = keys.each_ref();
    world.cache_everywhere(&keys)?;
    world.wait_until_caught_up()?;
    lose_probe_answers(&world)?;
    wire(&world)?.swap_messages(LIVE);

    world.delete(keys[0])?;
    world.wait_for_code(world.agent(1), keys[0], "NOT_FOUND")?;
    assert_eq!(world.code(world.agent(0), keys[0])?, "VALID", "it isn't held back");
    world.delete(keys[1])?;
    world.assert_gone(&keys)?;
    world.wait_until_caught_up()?;
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// Failure: few misses are taken for none, or one costs more than it is.
#[test]
fn one_lost_message_among_two_thousand_deletions_is_repaired_and_nothing_else_is() -> Result<()> {
    const KEYS: usize = 2_000;
    let mut world = start("200ms", Table::new())?;
    let keys = world.create_keys(KEYS)?;
    world.wait_until_caught_up()?;
    for agent in world.topology.agents() {
        let caller = Caller::new(&world, agent);
        for key in &keys {
            ensure!(caller.code(key)? == "VALID", "{}", key.id);
        }
    }
    lose_probe_answers(&world)?;
    let news = |agent: &Node, via| count(agent, "evictd_agent_invalidations_total", &[("via", via)]);
    let before = [news(world.agent(0), "live")?, news(world.agent(1), "live")?];

    world.delete_all(&keys[..KEYS / 2])?;
    lose_invalidations(&world, 1)?;
    world.delete_all(&keys[KEYS / 2..])?;
    world.wait_until_caught_up()?;
    for agent in world.topology.agents() {
        let caller = Caller::new(&world, agent);
        for key in &keys {
            ensure!(caller.code(key)? == "NOT_FOUND", "{}", key.id);
        }
    }
    // Each deletion was news once, and only those of the lost message had to be asked for.
    let (live, replayed) = (news(world.agent(0), "live")? - before[0], news(world.agent(0), "replay")?);
    assert_eq!(live + replayed, KEYS as u64);
    ensure!((1..=64).contains(&replayed), "{replayed} were replayed");
    assert_eq!(news(world.agent(1), "live")? - before[1], KEYS as u64);
    assert_eq!((repairs(world.agent(1), "gap")?, flushes(world.agent(0))?), (0, 0));

    // Whoever joins now begins at the end of the log, and asks for nothing of it.
    wire(&world)?.clear_rules();
    let head = world.wait_until_caught_up()?;
    world.agent_mut(0).restart()?;
    assert_eq!(world.agent(0).status()?["appliedPosition"], head);
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(count(world.agent(0), "evictd_agent_invalidations_total", &[])?, 0);
    ensure!(head > 2 * KEYS as u64);
    world.assert_works()
}

/// Failure: disorder and repetition are each harmless, and together they aren't.
#[test]
fn messages_that_are_doubled_and_jumbled_at_once_change_nothing() -> Result<()> {
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
    ensure!(wire(&world)?.held() > 10, "too few messages to be jumbled");
    wire(&world)?.release_jumbled(&mut random);
    world.wait_until_caught_up().context(repeat)?;
    world.assert_gone(&keys)?;
    assert_eq!(count(world.agent(0), "evictd_agent_invalidations_total", &[])?, applied + KEYS as u64);
    assert_eq!(count(world.agent(0), "evictd_agent_repairs_total", &[])?, 0);
    assert_eq!(flushes(world.agent(0))?, 0);
    Ok(())
}

/// Failure: nobody notices that the feed has stopped, because everything else works.
#[test]
fn a_feed_that_has_fallen_silent_is_reported_and_costs_no_correctness() -> Result<()> {
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
