//! A publisher is told to end while its server is silent: it ends before its supervisor loses patience, and what it
//! leaves undone is done by the next one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::http::Connection;
use evictd_tests::wait::throughout;
use serde_json::json;

use super::Site;
use crate::bad_days::{DeletionRequest, ClientHistory, DeleteAnswer};
use crate::world::{Caller, SOON, plan};

/// What is under way gets so much time, and nothing of it is spent on what comes after.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// When systemd kills.
fn patience_of_systemd() -> Result<Duration> {
    const UNIT: &str = include_str!("../../../../deploy/systemd/evictd-publisher.service");
    let limit = UNIT.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")?.strip_suffix('s'));
    Ok(Duration::from_secs(limit.context("the unit has no TimeoutStopSec in seconds")?.parse()?))
}

/// Failure: each of the last transactions waits for the server, one after the other, until systemd kills; or what was
/// answered before is forgotten with them.
#[test]
fn a_silent_server_delays_shutdown_only_for_seconds() -> Result<()> {
    let mut site = Site::start(1, plan(&["eu", "us"]))?;
    let keys = site.world.create_keys(9)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    site.world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

    // What is deleted from here on can be committed and answered, and not numbered.
    let mut lock = site.session()?;
    lock.query("BEGIN; SELECT head FROM log_head FOR UPDATE")?;
    let publisher = Caller::new(&site.world, site.world.publisher());
    let story = ClientHistory(doomed.iter().map(|key| DeletionRequest::of(&publisher, key)).collect::<Result<_>>()?);
    assert_eq!(story.count(DeleteAnswer::Deleted), doomed.len());
    // A client that never finishes its request makes the drain as long as it may be.
    let mut endless = Connection::open(site.world.publisher().http)?;
    endless.send(b"POST /v2/keys.deleteKey HTTP/1.1\r\nhost: test\r\ncontent-length: 100\r\n\r\n{")?;
    // Whoever comes later and is answered shows that it was let in.
    site.world.call("keys.getKey", &json!({ "keyId": good.id }))?;

    let told_at = Instant::now();
    site.world.topology.publisher.daemon.terminate()?;
    // Late enough that what waits for the server then is still waiting at the end of the drain.
    let daemon = &mut site.world.topology.publisher.daemon;
    throughout(Duration::from_secs(8).saturating_sub(told_at.elapsed()), || {
        ensure!(daemon.exit_status()?.is_none(), "it didn't wait for what is under way");
        Ok(())
    })?;
    site.server.freeze()?;
    let daemon = &mut site.world.topology.publisher.daemon;
    let ended = daemon.wait_exit(DRAIN_LIMIT + SOON)?;
    let took = told_at.elapsed();
    println!("it had ended {took:?} after it was told to");
    ensure!(ended.success(), "it ended with {ended}\n{}", daemon.log_tail());
    ensure!(took >= DRAIN_LIMIT, "what is under way gets its time, and it ended after {took:?}");
    ensure!(took < patience_of_systemd()?, "it would have been killed: {took:?}\n{}", daemon.log_tail());
    ensure!(daemon.stderr()?.contains("task aborted"), "{}", daemon.log_tail());
    ensure!(endless.answer()?.is_none());

    site.server.thaw()?;
    drop(lock);
    let unnumbered = site.world.sql("SELECT count(*) FROM invalidations WHERE position IS NULL")?;
    assert_eq!(unnumbered, doomed.len().to_string(), "they were numbered before, so this test shows nothing");
    site.world.topology.publisher.restart()?;
    story.check(&site.world)?;
    site.world.wait_for_codes(&[good], "VALID")?;
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}
