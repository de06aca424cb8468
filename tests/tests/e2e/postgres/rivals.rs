//! Copies of the home database on one bus, and agents that read a database other than home's (R15).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::home_store::HomeStoreAddress;
use evictd_tests::nats_server::{Listen, NatsServer, User};
use evictd_tests::process::evictd_command;
use evictd_tests::proxy::Proxy;
use evictd_tests::sql::{by_way_of, server_of};
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::throughout;

use super::failover::{cut_off, wait_until_received};
use super::{Site, reading};
use crate::rivals::{
    BOUND, Footing, Watch, assert_no_rule_was_broken, assert_receipt_is_open, assert_refuses_changes,
    assert_untouched, delete_and_pause, delete_confirmed, heal, names_of, rival_messages, split_off,
    start_rival, start_together, wait_for_epoch, wait_until_named, wait_until_serving, wait_until_silent,
    wait_until_yielded, wire,
};
use crate::world::{Key, SOON, World, breakable, count, flushes, wait_for_count, wait_for_mode, with_bound};

/// Begins a new epoch in the store of this database, as an operator does.
fn declare(url: &str) -> Result<()> {
    let output =
        evictd_command()?.args(["new-epoch", "--yes", "--set", &format!("store.url={url}")]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn start() -> Result<(Site, Key, Key)> {
    let site = Site::start(1, with_bound(BOUND, breakable(&["eu", "us"])))?;
    let [doomed, good] = [site.world.create_key()?, site.world.create_key()?];
    site.world.cache_everywhere(&[&doomed, &good])?;
    site.world.wait_until_caught_up()?;
    Ok((site, doomed, good))
}

/// The identity of a server's history and of its store.
const IDENTITY: &str =
    "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), control.system_identifier,
    store_id, incarnation FROM pg_control_system() AS control, log_head";

/// Failure: a copied server has the same ids, timeline and incarnation as the one that serves. So its publisher is
/// taken for one of the original's, and proves positions that its store doesn't hold.
#[test]
fn copied_server_yields_by_its_round_tokens() -> Result<()> {
    let (mut site, doomed, good) = start()?;
    let copy = site.server.copy()?;
    assert_eq!(copy.query(IDENTITY)?, site.server.query(IDENTITY)?);
    let world = &site.world;
    let footing = Footing::of(world)?;
    let rival = start_rival(world, &HomeStoreAddress::Postgres(copy.url()), wire(world)?)?;
    wait_until_silent(&rival, "yielding", &names_of(world.publisher())?)?;
    assert_refuses_changes(world, &rival, &good)?;
    let watch = Watch::start(world, &doomed);
    let confirmed_at = delete_confirmed(world, world.publisher(), &doomed)?;
    assert_untouched(world, &footing, &good)?;
    wait_until_serving(world.publisher())?;
    for agent in world.topology.agents() {
        assert_eq!(rival_messages(agent)?, 0, "a publisher that yields sends agents nothing");
    }

    // The copy lacks rows that agents have applied.
    ensure!(site.world.topology.publisher.daemon.stop(SOON)?.success());
    wait_until_silent(&rival, "behind", &["this home store is an older copy: ".to_owned()])?;
    assert_eq!(Footing::of(&site.world)?, footing);
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(&site.world, &rival)
}

/// Failure: a server and its copy that start together are taken for the same store.
#[test]
fn server_and_copy_that_start_together_fall_silent() -> Result<()> {
    let (mut site, doomed, good) = start()?;
    let copy = site.server.copy()?;
    let mut rival = start_together(&mut site.world, &HomeStoreAddress::Postgres(copy.url()))?;
    let world = &site.world;
    wait_until_silent(world.publisher(), "conflicting", &names_of(&rival)?)?;
    wait_until_silent(&rival, "conflicting", &names_of(world.publisher())?)?;
    for node in [world.publisher(), &rival] {
        assert_refuses_changes(world, node, &good)?;
    }
    ensure!(rival.daemon.stop(SOON)?.success());
    wait_until_serving(world.publisher())?;
    let watch = Watch::start(world, &doomed);
    let confirmed_at = delete_confirmed(world, world.publisher(), &doomed)?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "live")?;
        assert_eq!(flushes(agent)?, 0);
    }
    world.assert_works()?;
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(world, &rival)
}

/// Failure: a paused publisher continues where it was, although a copy of its server has taken over its agents.
#[test]
fn thawed_publisher_yields_to_the_copy_that_took_over() -> Result<()> {
    let (mut site, doomed, good) = start()?;
    let undone = site.world.create_key()?;
    site.world.wait_until_caught_up()?;
    let copy = site.server.copy()?;
    let request = delete_and_pause(&mut site.world, &undone)?;
    declare(&copy.url())?;
    let world = &mut site.world;
    let mut rival = start_rival(world, &HomeStoreAddress::Postgres(copy.url()), wire(world)?)?;
    rival.wait_until_ready()?;
    wait_for_epoch(world, 2)?;
    let watch = Watch::start(world, &doomed);
    let confirmed_at = delete_confirmed(world, &rival, &doomed)?;
    let footing = Footing::of(world)?;

    world.topology.publisher.daemon.resume()?;
    wait_until_silent(world.publisher(), "yielding", &names_of(&rival)?)?;
    assert_refuses_changes(world, world.publisher(), &good)?;
    assert_untouched(world, &footing, &good)?;
    world.wait_for_codes(&[&undone], "VALID")?;
    assert_receipt_is_open(world, &request)?;
    watch.assert_none_valid_since(confirmed_at)?;
    wait_until_serving(&rival)?;
    assert_no_rule_was_broken(world, &rival)
}

/// Failure: a server and its copy have served on the two sides of a partition. When it heals, one of them wins by
/// chance, and undoes the deletions of the other.
#[test]
fn server_and_copy_fall_silent_after_a_partition() -> Result<()> {
    let (mut site, doomed, good) = start()?;
    let copy = site.server.copy()?;
    let world = &mut site.world;
    let (_site, link, mut rival) = split_off(world, |_| Ok(HomeStoreAddress::Postgres(copy.url())))?;
    let watch = Watch::start(world, &doomed);
    let confirmed_at = delete_confirmed(world, world.publisher(), &doomed)?;
    let footing = Footing::of(world)?;

    heal(&link);
    wait_until_silent(world.publisher(), "conflicting", &names_of(&rival)?)?;
    wait_until_silent(&rival, "conflicting", &names_of(world.publisher())?)?;
    link.release();
    for node in [world.publisher(), &rival] {
        assert_refuses_changes(world, node, &good)?;
    }
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
    }
    assert_eq!(Footing::of(world)?, footing);

    ensure!(rival.daemon.stop(SOON)?.success());
    wait_until_serving(world.publisher())?;
    world.topology.agents().try_for_each(|agent| wait_for_mode(agent, "live"))?;
    assert_eq!(Footing::of(world)?, footing);
    world.wait_for_codes(&[&good], "VALID")?;
    world.assert_works()?;
    watch.assert_none_valid_since(confirmed_at)?;
    assert_no_rule_was_broken(world, &rival)
}

/// Failure: a database that was created with the store's as its template begins an epoch, and production's agents
/// follow it, at once or when production is restarted.
#[test]
fn template_copy_yields_while_its_original_serves() -> Result<()> {
    let (mut site, doomed, good) = start()?;
    // No client may be connected to the database that is copied.
    ensure!(site.world.topology.publisher.daemon.stop(SOON)?.success());
    let copy = site.server.copy_database("evictd", "staging")?;
    let url = copy.clone();
    site.world.topology.publisher.restart()?;
    let world = &site.world;
    world.topology.agents().try_for_each(|agent| wait_for_mode(agent, "live"))?;
    let footing = Footing::of(world)?;
    let mut rival = start_rival(world, &HomeStoreAddress::Postgres(copy), wire(world)?)?;
    wait_until_silent(&rival, "yielding", &names_of(world.publisher())?)?;
    let watch = Watch::start(world, &doomed);
    let confirmed_at = delete_confirmed(world, world.publisher(), &doomed)?;
    assert_untouched(world, &footing, &good)?;
    wait_until_serving(world.publisher())?;
    wait_until_named(world.publisher(), &rival, "yielding")?;
    wait_until_yielded(&rival)?;

    // The epoch that it began as a copy replaces nothing once agents have followed the original for a bound.
    ensure!(site.world.topology.publisher.daemon.stop(SOON)?.success());
    wait_until_silent(&rival, "behind", &["this home store is an older copy: ".to_owned()])?;
    assert_eq!(Footing::of(&site.world)?, footing);
    watch.assert_none_valid_since(confirmed_at)?;
    declare(&url)?;
    rival.wait_until_ready()?;
    for agent in site.world.topology.agents() {
        wait_for_count(agent, "evictd_agent_epoch", &[], 3)?;
        wait_for_mode(agent, "live")?;
        assert_eq!(flushes(agent)?, 1);
    }
    site.world.wait_for_codes(&[&good], "VALID")?;
    assert_no_rule_was_broken(&site.world, &rival)
}

/// A deployment whose agents read a database through a proxy. At first it is the home store's.
struct Reading {
    site: Site,
    database: Proxy,
}

impl Reading {
    fn start() -> Result<Self> {
        let server = Postgres::start()?;
        let database = Proxy::start(server_of(&server.url())?)?;
        let agents = reading(&by_way_of(&server.url(), database.address())?);
        let plan = Plan { agents, ..with_bound(BOUND, breakable(&["eu", "us"])) };
        Ok(Self { site: Site::start_on(server, 1, plan)?, database })
    }

    fn world(&self) -> &World {
        &self.site.world
    }

    /// Makes agents read `server`.
    fn lead_to(&self, server: &Postgres) -> Result<()> {
        self.database.lead_to(server_of(&server.url())?);
        self.database.reset();
        Ok(())
    }

    /// Creates two keys to delete, of which the first is cached, and one to keep.
    fn keys(&self) -> Result<[Key; 3]> {
        let world = self.world();
        let keys = [world.create_key()?, world.create_key()?, world.create_key()?];
        world.cache_everywhere(&[&keys[0], &keys[2]])?;
        world.wait_until_caught_up()?;
        Ok(keys)
    }

    /// Deletes keys at home. Checks that no agent accepts them after their receipts, not even a restarted one, and that
    /// `good` stays VALID.
    fn assert_deletions_hold(&mut self, doomed: [&Key; 2], good: &Key) -> Result<()> {
        let reads_before = self.reads()?;
        let mut watches = Vec::new();
        for key in doomed {
            let watch = Watch::start(self.world(), key);
            watches.push((watch, delete_confirmed(self.world(), self.world().publisher(), key)?));
        }
        throughout(BOUND, || self.world().assert_none_valid(&doomed))?;
        self.site.world.agent_mut(0).restart()?;
        throughout(BOUND, || self.world().assert_none_valid(&doomed))?;
        self.world().wait_for_codes(&[good], "VALID")?;
        ensure!(self.reads()? > reads_before, "no agent has read the database");
        for (watch, confirmed_at) in watches {
            watch.assert_none_valid_since(confirmed_at)?;
        }
        self.site.assert_no_rule_was_broken()
    }

    /// Returns the number of reads of the database, with any outcome, by the agent that isn't restarted.
    fn reads(&self) -> Result<u64> {
        count(self.world().agent(1), "evictd_agent_database_reads_total", &[])
    }
}

/// Failure: an agent accepts records of a standby that was promoted by mistake, because its log is ahead.
#[test]
fn wrongly_promoted_standby_restores_no_deleted_key() -> Result<()> {
    let mut home = Reading::start()?;
    let standby = home.site.server.standby()?;
    home.lead_to(&standby)?;
    let [cached, uncached, good] = home.keys()?;
    wait_until_received(&home.site.server, &standby)?;
    standby.promote()?;
    declare(&standby.url())?;
    home.assert_deletions_hold([&cached, &uncached], &good)
}

/// Starts a copy of home's server, which agents read, with its own publisher on its own bus.
fn copy_elsewhere(home: &Reading) -> Result<(Postgres, NatsServer, Node)> {
    let copy = home.site.server.copy()?;
    home.lead_to(&copy)?;
    let dir = home.world().dir().join("elsewhere");
    let bus = NatsServer::start_single(&dir, Listen::free()?, &[])?;
    let wire = Proxy::start(bus.clients())?;
    let (store, login) = (HomeStoreAddress::Postgres(copy.url()), bus.login(&User::Publisher)?);
    let mut publisher = home.world().topology.start_rival(&dir, "elsewhere", &store, wire, login)?;
    publisher.wait_until_ready()?;
    Ok((copy, bus, publisher))
}

/// Failure: the copied server's own publisher has numbered more rows than home's, so its records are above every floor.
#[test]
fn copy_that_is_ahead_restores_no_deleted_key() -> Result<()> {
    let mut home = Reading::start()?;
    let [cached, uncached, good] = home.keys()?;
    let (_copy, _bus, publisher) = copy_elsewhere(&home)?;
    for _ in 0..20 {
        let body = serde_json::json!({ "apiId": home.world().api });
        let created = home.world().topology.call(&publisher, "keys.createKey", &body)?;
        ensure!(created.status == 200, "{}", created.text);
    }
    home.assert_deletions_hold([&cached, &uncached], &good)
}

/// Failure: a copied server with its own publisher is taken for a replica that lags.
#[test]
fn copy_that_is_behind_restores_no_deleted_key() -> Result<()> {
    let mut home = Reading::start()?;
    let [cached, uncached, good] = home.keys()?;
    let (_copy, _bus, publisher) = copy_elsewhere(&home)?;
    for _ in 0..20 {
        home.world().create_key()?;
    }
    home.assert_deletions_hold([&cached, &uncached], &good)?;
    drop(publisher);
    Ok(())
}

/// Failure: two standbys that are promoted in turn have the same epochs, and an agent reads the one that was fenced.
#[test]
fn fenced_server_restores_no_deleted_key() -> Result<()> {
    let mut home = Reading::start()?;
    let [mut first, mut second] = [home.site.server.standby()?, home.site.server.standby()?];
    let [cached, uncached, good] = home.keys()?;
    for standby in [&mut first, &mut second] {
        wait_until_received(&home.site.server, standby)?;
        cut_off(standby)?;
    }
    home.site.server.kill()?;
    first.promote()?;
    home.lead_to(&first)?;
    drop(home.site.move_to(first)?);
    wait_for_flushes(home.world(), 1)?;
    // By now it has its own log rows, which agents have applied.
    let more = home.world().create_keys(5)?;
    home.world().cache_everywhere(&more.iter().collect::<Vec<_>>())?;

    second.promote()?;
    let fenced = home.site.move_to(second)?;
    wait_for_flushes(home.world(), 2)?;
    home.assert_deletions_hold([&cached, &uncached], &good)?;
    let there = format!("SELECT count(*) FROM keys WHERE id = '{}' AND deleted_at_m IS NULL", cached.id);
    assert_eq!(fenced.query(&there)?, "1", "the fenced server can still be read");
    Ok(())
}

fn wait_for_flushes(world: &World, flushed: u64) -> Result<()> {
    for agent in world.topology.agents() {
        let reason = [("reason", "new_epoch")];
        wait_for_count(agent, "evictd_agent_flushes_total", &reason, flushed)?;
        wait_for_mode(agent, "live")?;
    }
    Ok(())
}

/// Failure: agents accept a deleted key from a replica whose replay was paused, during the pause or after it.
#[test]
fn replica_with_paused_replay_restores_no_deleted_key() -> Result<()> {
    let mut home = Reading::start()?;
    let standby = home.site.server.standby()?;
    home.lead_to(&standby)?;
    let [cached, uncached, good] = home.keys()?;
    wait_until_received(&home.site.server, &standby)?;
    standby.pause_replay()?;
    home.assert_deletions_hold([&cached, &uncached], &good)?;
    let watch = Watch::start(home.world(), &cached);
    let resumed_at = Instant::now();
    standby.resume_replay()?;
    wait_until_received(&home.site.server, &standby)?;
    throughout(Duration::from_secs(1), || home.world().assert_none_valid(&[&cached, &uncached]))?;
    watch.assert_none_valid_since(resumed_at)?;
    home.world().assert_works()
}

/// Failure: a server on an older base backup is taken for a replica.
#[test]
fn older_base_backup_restores_no_deleted_key() -> Result<()> {
    let mut home = Reading::start()?;
    let [cached, uncached, good] = home.keys()?;
    let backup = home.site.server.copy()?;
    home.lead_to(&backup)?;
    home.world().create_keys(3)?;
    home.assert_deletions_hold([&cached, &uncached], &good)
}
