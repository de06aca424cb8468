//! Changes past the API are told by NOTIFY, and found without.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use evictd_tests::topology::Plan;
use evictd_tests::wait::try_eventually;
use toml::toml;

use super::Site;
use crate::world::{Key, SOON, World, flushes, plan, wait_until_applied};

/// Publishers that look for nothing by themselves, and agents that ask seldom: a round numbers rows as well.
fn without_polling() -> Plan {
    Plan {
        publisher: toml! { sequencer = { poll_interval = "1h" } },
        agents: toml! { lease = { probe_interval = "13s" } },
        ..plan(&["eu", "us"])
    }
}

fn wait_until_applied_everywhere(world: &World, id: &str, cause: &str) -> Result<()> {
    world.topology.agents().try_for_each(|agent| wait_until_applied(agent, id, cause))
}

/// Failure: what isn't done through the API is noticed by the next poll, whenever that is.
#[test]
fn what_is_changed_by_sql_is_told_to_everybody_at_once() -> Result<()> {
    // Agents ask for a round every six seconds, taken together.
    const AT_ONCE: Duration = Duration::from_secs(5);
    let site = Site::start(2, without_polling())?;
    let world = &site.world;
    let [key, erased, good] = [world.create_key()?, world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&key, &erased, &good])?;

    let began = Instant::now();
    let change = |what: &str, key: &Key, cause: &str| {
        world.sql(&format!("{what} WHERE id = '{}'", key.id))?;
        wait_until_applied_everywhere(world, &key.id, cause)
    };
    change("UPDATE keys SET deleted_at_m = 1", &key, "deleted")?;
    world.assert_none_valid(&[&key])?;
    change("UPDATE keys SET deleted_at_m = NULL", &key, "restored")?;
    change("UPDATE keys SET enabled = false", &key, "changed")?;
    change("DELETE FROM keys", &erased, "erased")?;
    ensure!(began.elapsed() < AT_ONCE, "four changes took {:?}", began.elapsed());

    world.assert_gone(&[&erased])?;
    world.wait_for_codes(&[&key], "DISABLED")?;
    world.wait_for_codes(&[&good], "VALID")?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    site.assert_no_rule_was_broken()
}

/// Failure: TRUNCATE tells no rows, and so nobody.
#[test]
fn keys_that_are_truncated_are_gone_everywhere_at_once() -> Result<()> {
    let site = Site::start(2, without_polling())?;
    let world = &site.world;
    let keys = world.create_keys(20)?;
    let keys: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&keys)?;
    world.sql("TRUNCATE keys")?;
    world.assert_gone(&keys)?;
    // Everything else is there still: the root key, and the API.
    world.assert_works()?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    site.assert_no_rule_was_broken()
}

/// Failure: a notification is all that there is, and nobody is sure to hear it.
#[test]
fn a_change_that_nobody_is_told_of_is_found_by_polling() -> Result<()> {
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let [doomed, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&doomed, &good])?;
    // What the control API's own sessions say of themselves: somebody else will wake the publishers.
    let mut session = site.session()?;
    session.query(&format!(
        "SET evictd.control_api = on; UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'",
        doomed.id
    ))?;
    wait_until_applied_everywhere(world, &doomed.id, "deleted")?;
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")?;
    site.assert_no_rule_was_broken()
}

/// Failure: who lost the connection on which it listens has missed what was said meanwhile, and doesn't look.
#[test]
fn who_was_cut_off_while_it_was_told_looks_as_soon_as_it_listens_again() -> Result<()> {
    const LISTENING: &str = "FROM pg_stat_activity WHERE query ILIKE 'LISTEN%'";
    let site = Site::start(2, without_polling())?;
    let world = &site.world;
    let keys = world.create_keys(3)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let began = Instant::now();
    for key in &keys {
        try_eventually("both publishers to listen", SOON, || {
            Ok((world.sql(&format!("SELECT count(*) {LISTENING}"))? == "2").then_some(()))
        })?;
        // Their connections are gone when the change commits, and the notification with them.
        world.sql(&format!(
            "SELECT pg_terminate_backend(pid, 10000) {LISTENING};
             UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'",
            key.id
        ))?;
        wait_until_applied_everywhere(world, &key.id, "deleted")?;
    }
    ensure!(began.elapsed() < Duration::from_secs(9), "three changes took {:?}", began.elapsed());
    world.assert_gone(&keys.iter().collect::<Vec<_>>())?;
    site.assert_no_rule_was_broken()
}
