//! Long transactions, and transactions that commit in another order than they began.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::wait::throughout;

use super::{Settled, Site};
use crate::bad_days::check_log;
use crate::world::{Key, assert_bounded, count, flushes, plan, with_bound};

const BOUND: Duration = Duration::from_secs(2);

/// Returns the position of a key's deletion.
fn position(site: &Site, key: &Key) -> Result<String> {
    let rows = "SELECT position FROM invalidations WHERE cause = 'deleted' AND key_id";
    site.world.sql(&format!("{rows} = '{}'", key.id))
}

/// Failure: a cursor over ids or times has already passed the row of a transaction that commits late.
#[test]
fn a_long_transaction_counts_from_its_commit() -> Result<()> {
    let site = Site::start(2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let world = &site.world;
    let keys = world.create_keys(6)?;
    let [late, others @ .., good] = &keys[..] else { unreachable!("six keys") };
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

    let mut session = site.session()?;
    session.query(&format!("BEGIN; UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'", late.id))?;
    for (n, key) in others.iter().enumerate() {
        let settled = Settled::of(world, site.publisher(n % 2)?, key)?;
        assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
    }
    // The row isn't visible yet, so no agent misses it.
    throughout(BOUND * 2, || {
        for agent in world.topology.agents() {
            assert_eq!(world.code(agent, late)?, "VALID");
            assert_eq!(agent.status()?["mode"], "live");
        }
        Ok(())
    })?;
    session.query("COMMIT")?;
    let committed = Instant::now();
    throughout(BOUND + BOUND / 2, || {
        for agent in world.topology.agents() {
            let sent_at = Instant::now();
            assert_bounded(sent_at, committed, BOUND, &world.code(agent, late)?)?;
        }
        Ok(())
    })?;
    world.assert_gone(&[late])?;
    world.assert_gone(&others.iter().collect::<Vec<_>>())?;
    world.wait_for_codes(&[good], "VALID")?;
    // Its row has the lowest id of them, and the last position of the log.
    assert_eq!(position(&site, late)?, world.sql("SELECT head FROM log_head")?);
    check_log(world)?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
        assert_eq!(count(agent, "evictd_agent_bound_breaches_total", &[])?, 0);
    }
    site.assert_no_rule_was_broken()
}

/// Failure: a row that commits after rows with higher ids were numbered gets no position.
#[test]
fn transactions_are_numbered_in_commit_order() -> Result<()> {
    const OPEN: usize = 5;
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let keys = world.create_keys(OPEN + 1)?;
    let (rolled_back, doomed) = keys.split_last().context("there are no keys")?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let mut sessions = Vec::new();
    for key in &keys {
        let mut session = site.session()?;
        session.query(&format!("BEGIN; UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'", key.id))?;
        sessions.push(session);
    }
    // The last one rolls back. It leaves a gap in the ids, but none in the positions.
    drop(sessions.pop());
    let mut positions: Vec<u64> = Vec::new();
    for (key, session) in doomed.iter().zip(&mut sessions).rev() {
        session.query("COMMIT")?;
        world.assert_gone(&[key])?;
        positions.push(position(&site, key)?.parse()?);
    }
    ensure!(positions.windows(2).all(|pair| pair[1] == pair[0] + 1), "their positions are {positions:?}");
    world.wait_for_codes(&[rolled_back], "VALID")?;
    check_log(world)?;
    site.assert_no_rule_was_broken()
}
