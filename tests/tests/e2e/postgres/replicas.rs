//! Agents that read a replica. It serves the loads that it may, and the authority serves the rest (R6, R8, R10).

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use evictd_postgres_server::Postgres;
use evictd_tests::proxy::WireMode;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::{throughout, try_eventually};
use toml::Table;

use super::{Settled, Site, delete_as_soon_as_possible, reading, reading_for};
use crate::world::{
    Key, SOON, UNAVAILABLE, World, assert_bounded, breakable, count, flushes, plan, wait_for_mode,
    wait_until_applied, with_bound,
};

/// A deployment whose agents read a real streaming replica.
struct Replicated {
    site: Site,
    replica: Postgres,
}

impl Replicated {
    fn start(plan: Plan) -> Result<Self> {
        Self::start_with(reading, plan)
    }

    fn start_with(agents: impl FnOnce(&str) -> Table, plan: Plan) -> Result<Self> {
        let server = Postgres::start()?;
        let replica = server.standby()?;
        let agents = agents(&replica.url());
        let site = Site::start_on(server, 2, Plan { agents, ..plan })?;
        Ok(Self { site, replica })
    }

    fn world(&self) -> &World {
        &self.site.world
    }

    /// Waits until the replica has replayed everything that was written.
    fn wait_until_replicated(&self) -> Result<()> {
        let written = self.site.server.query("SELECT pg_current_wal_insert_lsn()")?;
        let shown = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
        try_eventually("the replica to replay everything", SOON, || {
            Ok((self.replica.query(&shown)? == "t").then_some(()))
        })
    }
}

/// Returns how many of an agent's reads of the replica had this outcome.
fn reads(agent: &Node, outcome: &str) -> Result<u64> {
    count(agent, "evictd_agent_database_reads_total", &[("outcome", outcome)])
}

/// Waits until an agent reads its replica again after a failure. Agents retry it now and then; uncached keys cause
/// loads.
fn wait_until_read_again(world: &World, agent: &Node) -> Result<()> {
    let (read_before, mut verified) = (reads(agent, "ok")?, 0);
    try_eventually("the replica to be read again", SOON, || {
        verified += 1;
        let unknown = Key { id: String::new(), text: format!("unknown_{verified}") };
        ensure!(world.code(agent, &unknown)? == "NOT_FOUND", "without a replica the authority answers");
        Ok((reads(agent, "ok")? > read_before).then_some(()))
    })
}

/// Returns how many lookups the publishers have answered.
fn lookups(world: &World) -> Result<u64> {
    world.topology.publishers().map(|node| count(node, "evictd_publisher_lookups_total", &[])).sum()
}

/// Failure: agents accept a deleted key from a replica that lags. Or they don't use a replica that lags at all.
#[test]
fn a_lagging_replica_answers_only_what_has_not_changed() -> Result<()> {
    let replicated = Replicated::start(plan(&["eu", "us"]))?;
    let world = replicated.world();
    let keys = world.create_keys(24)?;
    let [doomed, changed, uncached @ ..] = &keys[..] else { bail!("no keys") };
    world.cache_everywhere(&[doomed, changed])?;
    world.wait_until_caught_up()?;
    replicated.wait_until_replicated()?;
    replicated.replica.pause_replay()?;

    let settled = Settled::of(world, world.publisher(), doomed)?;
    assert_eq!(settled.regions(), [("eu", "confirmed"), ("us", "confirmed")], "{}", settled.receipt);
    world.assert_none_valid(&[doomed])?;
    world.sql(&format!("UPDATE keys SET enabled = false WHERE id = '{}'", changed.id))?;
    for agent in world.topology.agents() {
        wait_until_applied(agent, &changed.id, "changed")?;
        assert_eq!(world.code(agent, changed)?, "DISABLED");
        ensure!(reads(agent, "too_old")? > 0, "the replica wasn't read");
    }
    let still = replicated
        .replica
        .query(&format!("SELECT count(*) FROM keys WHERE id = '{}' AND deleted_at_m IS NULL", doomed.id))?;
    assert_eq!(still, "1", "the replica doesn't lag");

    let lookups_before = lookups(world)?;
    for agent in world.topology.agents() {
        let read_before = reads(agent, "ok")?;
        for key in uncached {
            assert_eq!(world.code(agent, key)?, "VALID");
        }
        assert_eq!(reads(agent, "ok")? - read_before, uncached.len() as u64);
    }
    assert_eq!(lookups(world)?, lookups_before, "the replica must serve all records that haven't changed");

    replicated.replica.resume_replay()?;
    world.assert_gone(&[doomed])?;
    world.assert_works()?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    replicated.site.assert_no_rule_was_broken()
}

/// Failure: a new key is rejected for as long as the replica lags.
#[test]
fn a_created_key_is_valid_before_the_replica_has_it() -> Result<()> {
    let replicated = Replicated::start(plan(&["eu", "us"]))?;
    let world = replicated.world();
    replicated.replica.pause_replay()?;
    for _ in 0..10 {
        let key = world.create_key()?;
        // The agent may not have received the creation yet. It may cache "not found", but only until it has.
        let first: Vec<String> =
            world.topology.agents().map(|agent| world.code(agent, &key)).collect::<Result<_>>()?;
        ensure!(first.iter().all(|code| ["VALID", "NOT_FOUND"].contains(&code.as_str())), "{first:?}");
        for agent in world.topology.agents() {
            wait_until_applied(agent, &key.id, "created")?;
            assert_eq!(world.code(agent, &key)?, "VALID");
        }
    }
    replicated.site.assert_no_rule_was_broken()
}

/// Failure: without its replica an agent denies, or never reads it again.
#[test]
fn without_its_replica_an_agent_queries_the_authority() -> Result<()> {
    let mut replicated = Replicated::start(plan(&["eu", "us"]))?;
    let keys = replicated.world().create_keys(12)?;
    let [without, with] = [&keys[..6], &keys[6..]];
    replicated.world().wait_until_caught_up()?;
    replicated.replica.kill()?;
    for agent in replicated.world().topology.agents() {
        let failed = reads(agent, "failed")?;
        for key in without {
            assert_eq!(replicated.world().code(agent, key)?, "VALID");
        }
        ensure!(reads(agent, "failed")? > failed, "the replica wasn't read");
    }
    replicated.replica.start_again()?;
    replicated.wait_until_replicated()?;
    let world = replicated.world();
    for agent in world.topology.agents() {
        wait_until_read_again(world, agent)?;
        let read_before = reads(agent, "ok")?;
        for key in with {
            assert_eq!(world.code(agent, key)?, "VALID");
        }
        assert_eq!(reads(agent, "ok")? - read_before, with.len() as u64);
    }
    world.assert_works()?;
    replicated.site.assert_no_rule_was_broken()
}

/// Failure: a frozen replica delays every load until the timeout.
#[test]
fn a_frozen_replica_delays_loads_only_briefly() -> Result<()> {
    const MOMENT: Duration = Duration::from_millis(300);
    let replicated = Replicated::start_with(|url| reading_for(url, MOMENT), plan(&["eu", "us"]))?;
    let world = replicated.world();
    let keys = world.create_keys(4)?;
    world.wait_until_caught_up()?;
    replicated.replica.freeze()?;
    for agent in world.topology.agents() {
        for key in &keys {
            let sent_at = Instant::now();
            assert_eq!(world.code(agent, key)?, "VALID");
            ensure!(sent_at.elapsed() < Duration::from_secs(2), "it took {:?}", sent_at.elapsed());
        }
        assert_eq!(agent.status()?["mode"], "live");
    }
    world.delete(&keys[0])?;
    world.assert_gone(&[&keys[0]])?;
    replicated.replica.thaw()?;
    world.assert_works()?;
    replicated.site.assert_no_rule_was_broken()
}

/// Failure: an agent that receives nothing serves what it reads from its replica, although no publisher has proved it.
#[test]
fn an_agent_cut_off_with_its_replica_denies_within_the_bound() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(2);
    let replicated = Replicated::start(with_bound(BOUND, breakable(&["eu", "us"])))?;
    let world = replicated.world();
    let keys = world.create_keys(3)?;
    let [doomed, uncached, good] = &keys[..] else { bail!("no keys") };
    world.cache_everywhere(&[doomed, good])?;
    replicated.wait_until_replicated()?;
    // The replica is in the same region, so it receives nothing either.
    replicated.replica.pause_replay()?;
    world.topology.regions[0].set_wires(WireMode::Cut)?;
    world.delete(doomed)?;
    let deleted_at = Instant::now();
    let eu = world.agent(0);
    throughout(BOUND * 2, || {
        for key in [doomed, good] {
            let sent_at = Instant::now();
            let code = world.code(eu, key)?;
            assert_bounded(sent_at, deleted_at, BOUND, &code)?;
        }
        Ok(())
    })?;
    assert_eq!(world.code(eu, good)?, UNAVAILABLE);
    assert_eq!(world.code(eu, uncached)?, UNAVAILABLE);
    wait_for_mode(eu, "expired")?;
    world.topology.regions[0].set_wires(WireMode::Pass)?;
    wait_for_mode(eu, "live")?;
    world.assert_gone(&[doomed])?;
    world.wait_for_codes(&[good, uncached], "VALID")?;
    replicated.site.assert_no_rule_was_broken()
}

/// Failure: an agent reads a primary that doesn't know that it was demoted, and serves its old records forever.
#[test]
fn readers_of_the_demoted_primary_reject_deleted_keys() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(3);
    let server = Postgres::start()?;
    let standby = server.standby()?;
    server.set("synchronous_standby_names = '*'")?;
    let agents = reading(&server.url());
    let mut site = Site::start_on(server, 2, Plan { agents, bound: BOUND, ..breakable(&["eu", "us"]) })?;
    let keys = site.world.create_keys(6)?;
    let [cached, uncached, good, others @ ..] = &keys[..] else { bail!("no keys") };
    site.world.cache_everywhere(&[cached, good])?;
    standby.promote()?;
    let demoted = site.move_to(standby)?;
    let world = &site.world;
    let mut deleted_at = Instant::now();
    for key in [cached, uncached] {
        deleted_at = delete_as_soon_as_possible(world, site.publisher(1)?, key)?;
    }
    throughout(BOUND * 2, || {
        for agent in world.topology.agents() {
            for key in [cached, uncached] {
                let sent_at = Instant::now();
                assert_bounded(sent_at, deleted_at, BOUND, &world.code(agent, key)?)?;
            }
        }
        Ok(())
    })?;
    world.assert_gone(&[cached, uncached])?;
    let in_the_old_one = demoted.query("SELECT count(*) FROM keys WHERE deleted_at_m IS NULL")?;
    assert_eq!(in_the_old_one, "6", "the demoted primary has changed");
    for key in others.iter().chain([good]) {
        world.wait_for_codes(&[key], "VALID")?;
    }
    for agent in world.topology.agents() {
        ensure!(reads(agent, "too_old")? > 0, "the demoted primary wasn't read");
    }
    world.assert_works()?;
    site.assert_no_rule_was_broken()
}
