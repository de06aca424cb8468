//! A deletion, whichever publisher numbers it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::process::evictd_command;
use evictd_tests::sql::Session;
use evictd_tests::topology::Plan;
use evictd_tests::wait::try_eventually;

use super::{Settled, Site, reading};
use crate::bad_days::check_log;
use crate::world::{Key, SOON, count, flushes, plan};

#[test]
fn a_deletion_is_confirmed_by_three_regions() -> Result<()> {
    let site = Site::start(1, plan(&["ap", "eu", "us"]))?;
    let world = &site.world;
    let [doomed, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&doomed, &good])?;
    let settled = Settled::of(world, world.publisher(), &doomed)?;
    // A confirmed receipt guarantees that from here on no agent answers VALID.
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

/// Counts the sessions that wait for a lock on the server.
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";

/// Deletes `key` at the first publisher so that the second one numbers it: the second one already waits for the lock on
/// the log's head when the deletion is committed. The returned time counts from when the head was unlocked.
fn delete_for_the_neighbor(site: &Site, key: &Key, neighbors: &Key) -> Result<Settled> {
    let world = &site.world;
    let [first, second] = [site.publisher(0)?, site.publisher(1)?];
    let mut head = site.session()?;
    head.query("BEGIN; SELECT FROM log_head FOR UPDATE")?;
    thread::scope(|scope| {
        let theirs = scope.spawn(|| Settled::of(world, second, neighbors));
        try_eventually("a session to wait for the head", SOON, || {
            Ok((site.server.query(WAITING)? != "0").then_some(()))
        })?;
        let mine = scope.spawn(|| Settled::of(world, first, key));
        let is_committed =
            format!("SELECT count(*) FROM keys WHERE id = '{}' AND deleted_at_m IS NOT NULL", key.id);
        try_eventually("the deletion to be committed", SOON, || {
            Ok((site.server.query(&is_committed)? == "1").then_some(()))
        })?;
        let unlocked_at = Instant::now();
        head.query("COMMIT")?;
        let [theirs, mine] =
            [theirs, mine].map(|deletion| deletion.join().map_err(|_| anyhow!("a panic"))?);
        let (theirs, mine) = (theirs?, mine?);
        assert_eq!(theirs.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", theirs.receipt);
        Ok(Settled { took: unlocked_at.elapsed(), ..mine })
    })
}

/// Failure: a client waits for its receipt until its publisher polls for rows that another publisher has numbered.
#[test]
fn receipts_are_prompt_when_another_publisher_numbered_the_row() -> Result<()> {
    const DELETIONS: usize = 20;
    // Publishers poll the store for open receipts every five seconds. A client that has to wait for that starts just
    // after each poll, and so waits for nearly all of it.
    const PROMPT: Duration = Duration::from_secs(1);
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(DELETIONS * 4)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

    let first = world.publisher();
    let sent = || count(first, "evictd_publisher_live_messages_total", &[]);
    let mut took = Vec::new();
    for pair in keys.chunks_exact(2) {
        let [key, neighbors] = pair else { bail!("no pair") };
        let before = sent()?;
        let settled = delete_for_the_neighbor(&site, key, neighbors)?;
        world.assert_none_valid(&[key, neighbors])?;
        assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
        // Sometimes the first publisher waited for the head, for a probe. Such a deletion isn't counted.
        if sent()? == before {
            took.push(settled.took);
        }
        if took.len() == DELETIONS {
            break;
        }
    }
    ensure!(took.len() == DELETIONS, "the neighbor has numbered only {} of {}", took.len(), keys.len() / 2);
    took.sort();
    let (median, last) = (took[DELETIONS / 2], took[DELETIONS - 1]);
    println!("{DELETIONS} were numbered by the neighbor; median {median:?}, last {last:?}");
    ensure!(median < PROMPT, "the receipts took {median:?}");
    check_log(world)?;
    site.assert_no_rule_was_broken()
}

/// Failure: something works for the database's owner, but not for users with the documented rights.
#[test]
fn publishers_and_agents_need_only_the_documented_rights() -> Result<()> {
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
            "the agent didn't read the database"
        );
        assert_eq!(count(agent, "evictd_agent_database_reads_total", &[("outcome", "failed")])?, 0);
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}
