//! Another server takes over, with all commits or without the latest (R2, R7).
//!
//! Publishers reach the server at an address that moves, like that of HAProxy or a virtual IP: the driver connects to a
//! single host.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use evictd_postgres_server::{self as postgres, Postgres};
use evictd_tests::process::evictd_command;
use evictd_tests::proxy::WireMode;
use evictd_tests::topology::Node;
use evictd_tests::wait::{throughout, try_eventually};
use evictd_wire::subject::LIVE;

use super::clients::Clients;
use super::{Settled, Site, delete_as_soon_as_possible, list};
use crate::bad_days::{DeleteAnswer, DeletionRequest, check_log, check_receipts};
use crate::rivals::wait_until_silent;
use crate::world::{
    ApiClient, Key, SOON, World, assert_bounded, breakable, count, flushes, wait_for_count, wait_for_mode,
    wait_for_readiness, with_bound,
};

const BOUND: Duration = Duration::from_secs(3);

/// The number of epochs per timeline. A primary that was never promoted is on the first timeline.
const EPOCHS_PER_TIMELINE: u64 = 256;

/// Returns the first epoch after this number of fail-overs.
fn epoch_after(failovers: u64) -> u64 {
    failovers * EPOCHS_PER_TIMELINE + 1
}

fn start() -> Result<Site> {
    Site::start(2, with_bound(BOUND, breakable(&["eu", "us"])))
}

/// Waits until a standby has received and replayed everything that was written on its primary.
pub(super) fn wait_until_received(primary: &Postgres, standby: &Postgres) -> Result<()> {
    let written = primary.query("SELECT pg_current_wal_insert_lsn()")?;
    let shown = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
    try_eventually("the standby to have everything", SOON, || {
        Ok((standby.query(&shown)? == "t").then_some(()))
    })
}

/// Disconnects the standby from its primary. It is restarted for that: a standby that is about to change its source of
/// WAL ignores the setting.
pub(super) fn cut_off(standby: &mut Postgres) -> Result<()> {
    standby.set("primary_conninfo = ''")?;
    standby.restart(postgres::StopMode::Fast)
}

/// Makes the standby follow another primary.
fn follow(standby: &Postgres, primary: &Postgres) -> Result<()> {
    standby.set(&format!("primary_conninfo = 'host=127.0.0.1 port={} user=evictd'", primary.port()))?;
    wait_until_received(primary, standby)
}

fn wait_for_epoch(world: &World, epoch: u64) -> Result<()> {
    for agent in world.topology.agents() {
        wait_for_count(agent, "evictd_agent_epoch", &[], epoch)?;
        wait_for_mode(agent, "live")?;
    }
    Ok(())
}

fn assert_flushed_once(agent: &Node) -> Result<()> {
    let of_epochs = count(agent, "evictd_agent_flushes_total", &[("reason", "new_epoch")])?;
    assert_eq!((flushes(agent)?, of_epochs), (1, 1), "{}", agent.daemon.log_tail());
    Ok(())
}

/// Drops the next messages of the live feed to each agent. Agents still receive replies to their requests.
fn lose_the_next_messages(world: &World) {
    for wire in world.topology.agents().filter_map(|agent| agent.wire.as_ref()) {
        wire.clear_rules();
        wire.drop_messages(LIVE, 10);
    }
}

/// Checks that no agent answers VALID for `keys` after the bound, and waits until all agents reject them.
fn watch_until_gone(world: &World, keys: &[&Key], deleted_at: Instant) -> Result<()> {
    throughout(BOUND + BOUND / 4, || {
        for agent in world.topology.agents() {
            for key in keys {
                let sent_at = Instant::now();
                assert_bounded(sent_at, deleted_at, BOUND, &world.code(agent, key)?)?;
            }
        }
        Ok(())
    })?;
    world.assert_gone(keys)
}

/// Failure: an agent keeps its cache although commits may have been lost, or accepts a key that was deleted before the
/// fail-over. Or receipts that were open stay open forever.
#[test]
fn a_fail_over_that_loses_nothing_costs_one_flush() -> Result<()> {
    let mut site = start()?;
    let standby = site.server.standby()?;
    let keys = site.world.create_keys(5)?;
    let [before, open, after, later, good] = &keys[..] else { bail!("no keys") };
    site.world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    site.world.delete(before)?;
    site.world.assert_gone(&[before])?;
    site.world.agent_mut(1).daemon.pause()?;
    let request = DeletionRequest::of(&ApiClient::new(&site.world, site.publisher(1)?), open)?;
    assert_eq!(request.answer, DeleteAnswer::Deleted);
    wait_until_received(&site.server, &standby)?;

    site.server.kill()?;
    standby.promote()?;
    drop(site.move_to(standby)?);
    site.world.agent_mut(1).daemon.resume()?;
    let world = &site.world;
    let deleted_at = delete_as_soon_as_possible(world, site.publisher(0)?, after)?;
    watch_until_gone(world, &[after], deleted_at)?;
    delete_as_soon_as_possible(world, site.publisher(1)?, later)?;
    wait_for_epoch(world, epoch_after(1))?;
    world.assert_gone(&[before, open, after, later])?;
    world.wait_for_codes(&[good], "VALID")?;
    world.topology.agents().try_for_each(assert_flushed_once)?;
    world.topology.publishers().try_for_each(|publisher| wait_for_readiness(publisher, 200).map(drop))?;
    check_receipts(world, [request.request.as_str()].into_iter())?;
    check_log(world)?;
    world.assert_works()?;
    world.topology.agents().try_for_each(assert_flushed_once)?;
    site.assert_no_rule_was_broken()
}

/// Failure: the new primary numbers rows from where the lost commits began. Agents that have applied the lost ones take
/// the new rows for duplicates.
#[test]
fn commits_in_the_place_of_lost_ones_are_applied() -> Result<()> {
    let mut site = start()?;
    let mut standby = site.server.standby()?;
    let keys = site.world.create_keys(12)?;
    let (lost, rest) = keys.split_at(4);
    let (after, good) = rest.split_at(7);
    let [lost, after, good]: [Vec<&Key>; 3] = [lost, after, good].map(|keys| keys.iter().collect());
    site.world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    site.world.wait_until_caught_up()?;
    wait_until_received(&site.server, &standby)?;
    cut_off(&mut standby)?;
    for key in &lost {
        site.world.delete(key)?;
    }
    site.world.assert_gone(&lost)?;
    site.world.wait_until_caught_up()?;

    site.server.kill()?;
    standby.promote()?;
    // More deletions than were lost, before any publisher reaches the server. Their messages are lost as well.
    standby.query(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id IN ({})", list(&after)))?;
    let deleted_at = Instant::now();
    lose_the_next_messages(&site.world);
    drop(site.move_to(standby)?);
    let world = &site.world;
    watch_until_gone(world, &after, deleted_at)?;
    wait_for_epoch(world, epoch_after(1))?;
    world.wait_until_caught_up()?;
    // The store's current content is authoritative.
    world.wait_for_codes(&lost, "VALID")?;
    world.wait_for_codes(&good, "VALID")?;
    world.topology.agents().try_for_each(assert_flushed_once)?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a publisher on the old primary proves positions that it reads there, or answers that a change was made or
/// wasn't.
#[test]
fn a_publisher_on_the_demoted_primary_falls_silent() -> Result<()> {
    let mut site = start()?;
    let standby = site.server.standby()?;
    // Needed wherever a fail-over must lose nothing.
    site.server.set("synchronous_standby_names = '*'")?;
    let keys = site.world.create_keys(6)?;
    let [before, unknown, after, later, restarted, good] = &keys[..] else { bail!("no keys") };
    site.world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    site.world.delete(before)?;
    site.world.assert_gone(&[before])?;

    // Neither the old primary nor the first publisher learns of it.
    standby.promote()?;
    site.lead(1, &standby)?;
    site.world.database = Some(standby.url());
    let world = &site.world;
    let (old, new) = (site.publisher(0)?, site.publisher(1)?);
    let client_of_the_old_one = ApiClient::new(world, old);
    let request = thread::scope(|scope| {
        let client = scope.spawn(|| DeletionRequest::of(&client_of_the_old_one, unknown));
        let deleted_at = delete_as_soon_as_possible(world, new, after)?;
        watch_until_gone(world, &[before, after], deleted_at)?;
        client.join().map_err(|_| anyhow!("a client panicked"))?
    })?;
    assert_eq!(request.answer, DeleteAnswer::Unknown);
    ensure!(request.took < Duration::from_secs(12), "it was answered after {:?}", request.took);
    wait_for_count(old, "evictd_publisher_stalled", &[], 1)?;
    wait_for_epoch(world, epoch_after(1))?;
    // Agents use only the new publisher's proofs, and load only from it.
    let deleted_at = delete_as_soon_as_possible(world, new, restarted)?;
    site.world.agent_mut(1).restart()?;
    let world = &site.world;
    watch_until_gone(world, &[before, after, restarted], deleted_at)?;
    world.wait_for_codes(&[good, unknown], "VALID")?;
    for agent in world.topology.agents() {
        ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
    }

    // Now the first publisher reaches the new primary.
    site.lead(0, &standby)?;
    let world = &site.world;
    wait_for_count(site.publisher(0)?, "evictd_publisher_stalled", &[], 0)?;
    wait_for_readiness(site.publisher(0)?, 200)?;
    // The receipt waits for the process that was killed in "us": a publisher may have received from it lately.
    let settled = Settled::of(world, site.publisher(0)?, later)?;
    assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "elapsed")], "{}", settled.receipt);
    world.assert_gone(&[before, after, later])?;
    world.wait_for_codes(&[good, unknown], "VALID")?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a publisher that reaches a standby looks ready there, reads from it, and proves what it reads.
#[test]
fn a_publisher_on_a_standby_refuses_changes_and_falls_silent() -> Result<()> {
    let site = start()?;
    let standby = site.server.standby()?;
    let world = &site.world;
    let keys = world.create_keys(4)?;
    let [refused, doomed, later, good] = &keys[..] else { bail!("no keys") };
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    wait_until_received(&site.server, &standby)?;
    site.lead(0, &standby)?;
    let (misled, other) = (site.publisher(0)?, site.publisher(1)?);
    let request = DeletionRequest::of(&ApiClient::new(world, misled), refused)?;
    assert_eq!(request.answer, DeleteAnswer::Unchanged);
    ensure!(request.took < Duration::from_secs(2), "it was answered after {:?}", request.took);
    wait_for_count(misled, "evictd_publisher_stalled", &[], 1)?;
    wait_for_readiness(misled, 503)?;
    let settled = Settled::of(world, other, doomed)?;
    assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
    throughout(BOUND * 2, || {
        for agent in world.topology.agents() {
            ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
            assert_eq!(world.code(agent, good)?, "VALID");
            assert_eq!(world.code(agent, doomed)?, "NOT_FOUND");
        }
        Ok(())
    })?;
    site.lead(0, &site.server)?;
    wait_for_count(misled, "evictd_publisher_stalled", &[], 0)?;
    wait_for_readiness(misled, 200)?;
    let settled = Settled::of(world, misled, later)?;
    assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
    world.wait_for_codes(&[refused, good], "VALID")?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Fails over to `server`, which lacks the latest commits. There `keys` are deleted before any publisher reaches it,
/// and the next live messages to agents are dropped. No agent answers VALID for `keys` after the bound.
fn fail_over_with_loss(site: &mut Site, server: Postgres, keys: &[&Key]) -> Result<()> {
    site.server.kill()?;
    server.promote()?;
    server.query(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id IN ({})", list(keys)))?;
    let deleted_at = Instant::now();
    lose_the_next_messages(&site.world);
    drop(site.move_to(server)?);
    watch_until_gone(&site.world, keys, deleted_at)
}

/// Deletes `keys` on a server whose latest commits will be lost, and waits until every agent has applied the deletions.
fn delete_to_be_lost(site: &Site, keys: &[&Key]) -> Result<()> {
    for key in keys {
        site.world.delete(key)?;
    }
    site.world.assert_gone(keys)?;
    site.world.wait_until_caught_up().map(drop)
}

/// Failure: the second server to take over lacks the commit that began an epoch, and begins the same epoch again.
#[test]
fn a_fail_over_that_lost_an_epoch_begins_another() -> Result<()> {
    let mut site = start()?;
    let [mut first, mut second] = [site.server.standby()?, site.server.standby()?];
    let keys = site.world.create_keys(16)?;
    let keys: Vec<&Key> = keys.iter().collect();
    let (lost, after_first, lost_again, after_second) =
        (&keys[..3], &keys[3..7], &keys[7..10], &keys[10..15]);
    site.world.cache_everywhere(&keys)?;
    // In this order, the second standby has nothing that the first one lacks, and can follow it.
    for standby in [&mut second, &mut first] {
        wait_until_received(&site.server, standby)?;
        cut_off(standby)?;
    }
    delete_to_be_lost(&site, lost)?;
    // The second one follows the first one's timeline until just before the epoch begins there.
    site.server.kill()?;
    first.promote()?;
    follow(&second, &first)?;
    cut_off(&mut second)?;
    first.query(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id IN ({})", list(after_first)))?;
    let deleted_at = Instant::now();
    drop(site.move_to(first)?);
    watch_until_gone(&site.world, after_first, deleted_at)?;
    wait_for_epoch(&site.world, epoch_after(1))?;
    delete_to_be_lost(&site, lost_again)?;

    fail_over_with_loss(&mut site, second, after_second)?;
    let world = &site.world;
    wait_for_epoch(world, epoch_after(2))?;
    world.wait_for_codes(lost, "VALID")?;
    world.wait_for_codes(after_first, "VALID")?;
    world.wait_for_codes(lost_again, "VALID")?;
    world.wait_for_codes(&keys[15..], "VALID")?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: two standbys that were promoted independently have the same timeline number, and so the same epochs. Only
/// agents still have the rows of the first one, and publishers use their positions too late.
#[test]
fn two_standbys_promoted_in_turn_are_distinguished() -> Result<()> {
    let mut site = start()?;
    let [mut first, mut second] = [site.server.standby()?, site.server.standby()?];
    let keys = site.world.create_keys(16)?;
    let keys: Vec<&Key> = keys.iter().collect();
    let (after_first, after_second, good) = (&keys[..5], &keys[5..15], &keys[15..]);
    site.world.cache_everywhere(&keys)?;
    site.world.wait_until_caught_up()?;
    for standby in [&mut first, &mut second] {
        wait_until_received(&site.server, standby)?;
        cut_off(standby)?;
    }
    fail_over_with_loss(&mut site, first, after_first)?;
    wait_for_epoch(&site.world, epoch_after(1))?;
    site.world.cache_everywhere(after_second)?;
    site.world.wait_until_caught_up()?;

    // The whole site is lost, and the second server takes over before any agent or publisher detects it.
    site.world.topology.regions.iter().try_for_each(|region| region.set_wires(WireMode::Cut))?;
    for publisher in site.world.topology.publishers_mut() {
        publisher.daemon.kill()?;
    }
    site.server.kill()?;
    second.promote()?;
    second.query(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id IN ({})", list(after_second)))?;
    let deleted_at = Instant::now();
    drop(site.move_to(second)?);
    for publisher in site.world.topology.publishers_mut() {
        publisher.daemon.restart()?;
    }
    try_eventually("the deletions to be numbered", SOON, || {
        let waiting = site.world.sql("SELECT count(*) FROM invalidations WHERE position IS NULL")?;
        Ok((waiting == "0").then_some(()))
    })?;
    lose_the_next_messages(&site.world);
    site.world.topology.regions.iter().try_for_each(|region| region.set_wires(WireMode::Pass))?;
    let world = &site.world;
    // Both began the same epoch, and the second one's history lacks the rows that agents have applied. An operator must
    // decide. Until then, agents accept no deleted key, and no other key for longer than the bound.
    for publisher in world.topology.publishers() {
        wait_until_silent(publisher, "behind", &["this home store is an older copy: ".to_owned()])?;
    }
    let begun =
        evictd_command()?.args(["new-epoch", "--yes", "--config"]).arg(&world.publisher().config).output()?;
    ensure!(begun.status.success(), "{}", String::from_utf8_lossy(&begun.stderr));
    world.topology.agents().try_for_each(|agent| wait_for_mode(agent, "live"))?;
    watch_until_gone(world, after_second, deleted_at)?;
    world.wait_for_codes(after_first, "VALID")?;
    world.wait_for_codes(good, "VALID")?;
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: a synchronous standby takes over under load, and an answered change is lost. Or an agent uses the old
/// server's proof for longer than the bound.
#[test]
fn fail_overs_under_load_lose_no_answered_change() -> Result<()> {
    let mut site = start()?;
    let mut standby = site.server.standby()?;
    site.server.set("synchronous_standby_names = '*'")?;
    let clients = Clients::new(&site.world, BOUND);
    // The last standby stays until the end: without one nothing can be committed.
    let _standby = clients.work_while(|| {
        for _ in 0..2 {
            throughout(Duration::from_secs(1), || Ok(()))?;
            site.server.kill()?;
            standby.promote()?;
            drop(site.move_to(standby)?);
            standby = site.server.standby()?;
            // Earlier commits are in the base backup; from here on, each commit waits for the standby.
            site.server.set("synchronous_standby_names = '*'")?;
        }
        throughout(Duration::from_secs(1), || Ok(()))?;
        Ok(standby)
    })?;
    let world = &site.world;
    world.topology.publishers().try_for_each(|publisher| wait_for_readiness(publisher, 200).map(drop))?;
    wait_for_epoch(world, epoch_after(2))?;
    world.wait_until_caught_up()?;
    let fates = clients.fates()?;
    world.assert_gone(&fates.doomed())?;
    world.wait_for_codes(&fates.good(), "VALID")?;
    check_log(world)?;
    check_receipts(world, std::iter::empty())?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 2, "one flush for each fail-over");
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}

/// Failure: the new primary's roster lacks an agent, and so deletions are confirmed without it (R11).
#[test]
fn an_agent_unknown_to_the_new_primary_delays_receipts() -> Result<()> {
    let mut site = start()?;
    let mut standby = site.server.standby()?;
    let key = site.world.create_key()?;
    // The standby's roster has no agent in the second region.
    ensure!(site.world.agent_mut(1).daemon.stop(SOON)?.success());
    try_eventually("the stopped agent to be marked as departed", SOON, || {
        Ok((site.world.sql("SELECT count(*) FROM roster WHERE region = 'us' AND NOT departed")? == "0")
            .then_some(()))
    })?;
    wait_until_received(&site.server, &standby)?;
    cut_off(&mut standby)?;
    site.world.agent_mut(1).restart()?;
    site.world.cache_everywhere(&[&key])?;
    site.world.agent_mut(1).daemon.pause()?;
    // Restarted publishers don't have it either.
    site.server.kill()?;
    standby.promote()?;
    drop(site.move_to(standby)?);
    let moved = Instant::now();
    for publisher in site.world.topology.publishers_mut() {
        publisher.daemon.restart()?;
    }
    for publisher in site.world.topology.publishers_mut() {
        publisher.wait_until_ready()?;
    }
    let settled = Settled::of(&site.world, site.publisher(0)?, &key)?;
    ensure!(settled.receipt["final"] == true, "{}", settled.receipt);
    // By then, every lease from the old primary's time has expired.
    ensure!(moved.elapsed() >= BOUND, "it was final after {:?}: {}", settled.took, settled.receipt);
    site.world.agent_mut(1).daemon.resume()?;
    site.world.assert_none_valid(&[&key])?;
    site.world.assert_works()?;
    site.assert_no_rule_was_broken()
}
