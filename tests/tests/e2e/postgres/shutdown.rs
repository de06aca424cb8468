//! A publisher is shut down while its server is silent. It exits before its supervisor kills it, and the next publisher
//! completes its work.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use evictd_tests::http::Connection;
use evictd_tests::wait::throughout;
use serde_json::json;

use super::Site;
use crate::bad_days::{ClientHistory, DeleteAnswer, DeletionRequest};
use crate::world::{ApiClient, SOON, plan};

/// The time for requests in flight. Later steps of the shutdown don't count against it.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Returns the time after which systemd kills the publisher.
fn stop_timeout_of_systemd() -> Result<Duration> {
    const UNIT: &str = include_str!("../../../../deploy/systemd/evictd-publisher.service");
    let limit = UNIT.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")?.strip_suffix('s'));
    Ok(Duration::from_secs(limit.context("the unit has no TimeoutStopSec in seconds")?.parse()?))
}

/// Failure: the last transactions wait for the server one after the other, until systemd kills the publisher. Or
/// deletions that were already answered are lost with them.
#[test]
fn a_silent_server_delays_shutdown_only_for_seconds() -> Result<()> {
    let mut site = Site::start(1, plan(&["eu", "us"]))?;
    let keys = site.world.create_keys(9)?;
    let (good, doomed) = keys.split_first().context("no keys")?;
    site.world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

    // From here on, deletions can be committed and answered, but not numbered.
    let mut lock = site.session()?;
    lock.query("BEGIN; SELECT head FROM log_head FOR UPDATE")?;
    let publisher = ApiClient::new(&site.world, site.world.publisher());
    let story =
        ClientHistory(doomed.iter().map(|key| DeletionRequest::of(&publisher, key)).collect::<Result<_>>()?);
    assert_eq!(story.count(DeleteAnswer::Deleted), doomed.len());
    // A client that never finishes its request makes the drain last until its limit.
    let mut endless = Connection::open(site.world.publisher().http)?;
    endless.send(
        b"POST /v2/keys.deleteKey HTTP/1.1\r\nhost: test\r\nauthorization: Bearer x\r\ncontent-length: 100\r\n\r\n{",
    )?;
    // A later request that is answered shows that this one was accepted.
    site.world.call("keys.getKey", &json!({ "keyId": good.id }))?;

    let signaled_at = Instant::now();
    site.world.topology.publisher.daemon.terminate()?;
    // Late enough that statements which wait for the server still wait at the end of the drain.
    let daemon = &mut site.world.topology.publisher.daemon;
    throughout(Duration::from_secs(8).saturating_sub(signaled_at.elapsed()), || {
        ensure!(daemon.exit_status()?.is_none(), "it didn't wait for the request in flight");
        Ok(())
    })?;
    site.server.freeze()?;
    let daemon = &mut site.world.topology.publisher.daemon;
    let ended = daemon.wait_exit(DRAIN_LIMIT + SOON)?;
    let took = signaled_at.elapsed();
    println!("it ended {took:?} after the signal");
    ensure!(ended.success(), "it ended with {ended}\n{}", daemon.log_tail());
    ensure!(took >= DRAIN_LIMIT, "the drain ended before its limit, after {took:?}");
    ensure!(took < stop_timeout_of_systemd()?, "it would have been killed: {took:?}\n{}", daemon.log_tail());
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
