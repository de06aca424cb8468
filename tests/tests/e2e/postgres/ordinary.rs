//! A deletion, and that it doesn't matter who numbers it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::process::evictd_command;
use evictd_tests::proxy::Mode;
use evictd_tests::sql::Session;
use evictd_tests::topology::{Node, Plan};

use super::{Settled, Site, reading};
use crate::bad_days::check_log;
use crate::world::{breakable, count, flushes, plan};

#[test]
fn a_deletion_is_confirmed_by_three_regions() -> Result<()> {
    let site = Site::start(1, plan(&["ap", "eu", "us"]))?;
    let world = &site.world;
    let [doomed, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&doomed, &good])?;
    let settled = Settled::of(world, world.publisher(), &doomed)?;
    // From here on, nobody answers VALID any more: that is what it says.
    world.assert_none_valid(&[&doomed])?;
    assert_eq!(settled.regions(), [("ap", "confirmed"), ("eu", "confirmed"), ("us", "confirmed")]);
    world.assert_gone(&[&doomed])?;
    world.wait_for_codes(&[&good], "VALID")?;
    world.assert_works()?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    check_log(world)?;
    site.assert_no_rule_was_broken()
}

/// Failure: who waits for its receipt waits until its publisher finds, by itself, what another one has numbered.
#[test]
fn a_receipt_comes_as_soon_when_another_publisher_has_numbered_the_change() -> Result<()> {
    const DELETIONS: usize = 50;
    // Publishers look for what is open in the store every five seconds.
    const PROMPT: Duration = Duration::from_secs(2);
    let site = Site::start(2, breakable(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(DELETIONS)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

    // The first learns last of its own commits: its neighbour finds and numbers them before.
    let wire = world.publisher().store_wire.as_ref().context("the wire is direct")?;
    wire.set(Mode::Delay(Duration::from_millis(15)));
    let sent = |node: &Node| count(node, "evictd_publisher_live_messages_total", &[]);
    let neighbour = site.publisher(1)?;
    let before = sent(neighbour)?;
    let mut took = Vec::new();
    for (n, key) in keys.iter().enumerate() {
        let settled = Settled::of(world, site.publisher(n % 2)?, key)?;
        world.assert_none_valid(&[key])?;
        assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
        ensure!(settled.took < PROMPT, "the receipt of deletion {n} came after {:?}", settled.took);
        took.push(settled.took);
    }
    took.sort();
    let numbered = sent(neighbour)? - before;
    println!(
        "the neighbour has numbered {numbered} of {DELETIONS}; median {:?}, last {:?}",
        took[DELETIONS / 2],
        took[DELETIONS - 1]
    );
    ensure!(
        numbered as usize > DELETIONS * 3 / 5,
        "the neighbour has numbered only {numbered}: its own, mostly"
    );
    check_log(world)?;
    site.assert_no_rule_was_broken()
}

/// Failure: what works for the owner of a database doesn't for those who have the documented rights.
#[test]
fn publishers_and_agents_need_no_more_than_the_documented_rights() -> Result<()> {
    let server = Postgres::start()?;
    server.query("CREATE ROLE publisher LOGIN; CREATE ROLE agent LOGIN; CREATE ROLE clerk LOGIN")?;
    let store = format!("store.url={}", server.url());
    let migrated = evictd_command()?.args(["migrate", "--set", store.as_str()]).output()?;
    ensure!(migrated.status.success(), "{}", String::from_utf8_lossy(&migrated.stderr));
    server.query(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO publisher;
         GRANT SELECT ON log_head, keys, root_keys, apis, workspaces, _sqlx_migrations TO agent;
         GRANT SELECT, UPDATE ON keys TO clerk",
    )?;
    let agents = reading(&server.url_as("agent"));
    let mut site = Site::start_as("publisher", server, 2, Plan { agents, ..plan(&["eu", "us"]) })?;
    let world = &mut site.world;
    let keys = world.create_keys(4)?;
    let [doomed, by_clerk, erased, good] = &keys[..] else { bail!("no keys") };
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let settled = Settled::of(world, world.publisher(), doomed)?;
    assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
    world.delete_permanently(erased)?;
    let mut clerk = Session::connect(&site.server.url_as("clerk"))?;
    clerk.query(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'", by_clerk.id))?;
    world.assert_gone(&[doomed, by_clerk, erased])?;
    world.wait_for_codes(&[good], "VALID")?;
    for agent in world.topology.agents() {
        ensure!(
            count(agent, "evictd_agent_database_reads_total", &[("outcome", "ok")])? > 0,
            "it wasn't read"
        );
        assert_eq!(count(agent, "evictd_agent_database_reads_total", &[("outcome", "failed")])?, 0);
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}
