//! The database is changed without the API, or restored to an earlier state.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use evictd_tests::home_store::SqliteBackup;
use evictd_tests::process::evictd_command;
use evictd_tests::proxy::WireMode;
use evictd_tests::topology::Node;
use evictd_tests::wait::{throughout, try_eventually};
use evictd_wire::subject::LIVE;
use serde_json::json;

use crate::rivals::{assert_refuses_changes, wait_until_silent};
use crate::world::{
    Key, SOON, World, breakable, count, flushes, plan, wait_for_count, wait_for_mode, wait_for_readiness,
    with_bound,
};

/// For tests in which leases expire.
const RESTORE_BOUND: Duration = Duration::from_secs(4);

/// Changes the key's row by SQL, without the API.
fn change(world: &World, key: &Key, what: &str) -> Result<()> {
    world.sql(&format!("UPDATE keys SET {what} WHERE id = '{}'", key.id)).map(drop)
}

/// Failure: only changes through the API are noticed.
#[test]
fn change_by_sql_reaches_every_region() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let [key, erased] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&key, &erased])?;

    change(&world, &key, "deleted_at_m = 1")?;
    world.assert_gone(&[&key])?;
    change(&world, &key, "deleted_at_m = NULL")?;
    world.wait_for_codes(&[&key], "VALID")?;
    change(&world, &key, "enabled = 0")?;
    world.wait_for_codes(&[&key], "DISABLED")?;
    change(&world, &key, "enabled = 1")?;
    world.wait_for_codes(&[&key], "VALID")?;
    world.sql(&format!("DELETE FROM keys WHERE id = '{}'", erased.id))?;
    world.assert_gone(&[&erased])?;

    world.sql(&format!("UPDATE apis SET deleted_at_m = 1 WHERE id = '{}'", world.api))?;
    world.assert_gone(&[&key])?;
    world.sql(&format!("UPDATE apis SET deleted_at_m = NULL WHERE id = '{}'", world.api))?;
    world.wait_for_codes(&[&key], "VALID")?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0);
    }
    world.assert_works()
}

/// Failure: a trigger is missing during one deletion. A later check finds the trigger in place, and the key stays valid
/// forever.
#[test]
fn a_deletion_without_triggers_takes_effect_within_the_bound() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(4);
    let world = World::start(&with_bound(BOUND, plan(&["eu", "us"])))?;
    let [key, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&key, &good])?;
    let trigger = world.sql("SELECT sql FROM sqlite_master WHERE name = 'keys_after_delete'")?;
    for statement in
        ["DROP TRIGGER keys_after_delete", &format!("DELETE FROM keys WHERE id = '{}'", key.id), &trigger]
    {
        world.sql(statement)?;
    }
    world.assert_gone_within(&key, Instant::now(), BOUND)?;
    world.assert_gone(&[&key])?;
    wait_for_readiness(world.publisher(), 200)?;
    world.wait_for_codes(&[&good], "VALID")?;
    for agent in world.topology.agents() {
        ensure!(new_epoch_flushes(agent)? >= 1);
        wait_for_mode(agent, "live")?;
    }
    world.assert_works()
}

/// Failure: a revoked root key still verifies keys from the agents' caches.
#[test]
fn root_key_revoked_by_sql_verifies_nothing() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let revoke = |revoked: &str| world.sql(&format!("UPDATE root_keys SET deleted_at_m = {revoked}"));
    let wait_for_status = |agent: &Node, status: u16| {
        let body = serde_json::json!({ "key": key.text });
        try_eventually(&format!("a verification to be answered {status}"), SOON, || {
            Ok((world.topology.call(agent, "keys.verifyKey", &body)?.status == status).then_some(()))
        })
    };
    revoke("1")?;
    world.topology.agents().try_for_each(|agent| wait_for_status(agent, 401))?;
    revoke("NULL")?;
    world.topology.agents().try_for_each(|agent| wait_for_status(agent, 200))?;
    world.assert_works()
}

fn stop_publisher(world: &mut World) -> Result<()> {
    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    Ok(())
}

/// Declares a new epoch on the world's store, as an operator does after a restore.
fn declare(world: &World) -> Result<()> {
    let command = format!("new-epoch --yes --set store.path={}", world.store().display());
    let output = evictd_command()?.args(command.split(' ')).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Returns the lines that `evictd epochs` prints for the world's store.
fn epochs(world: &World) -> Result<Vec<String>> {
    let output = evictd_command()?.args(["epochs", "--config"]).arg(&world.publisher().config).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// Waits until the publisher reports that its store is an older copy.
fn wait_until_behind(world: &World) -> Result<()> {
    let words = [
        "this home store is an older copy: ",
        "doesn't hold; put the newer store back, or run `evictd new-epoch`",
    ];
    wait_until_silent(world.publisher(), "behind", &words.map(str::to_owned))
}

fn new_epoch_flushes(agent: &Node) -> Result<u64> {
    count(agent, "evictd_agent_flushes_total", &[("reason", "new_epoch")])
}

/// Failure: the publisher of a restored store continues by itself, and keys that were deleted after the backup are
/// valid again without an operator's decision. Or, after the decision, agents wait forever for positions that no longer
/// exist, or keep entries from the history that was undone.
#[test]
fn restored_store_is_silent_until_an_epoch_is_declared() -> Result<()> {
    let mut world = World::start(&with_bound(RESTORE_BOUND, plan(&["eu", "us"])))?;
    let [deleted_before, deleted_after, good] =
        [world.create_key()?, world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&deleted_before, &deleted_after, &good])?;
    world.delete(&deleted_before)?;
    world.assert_gone(&[&deleted_before])?;
    world.wait_until_caught_up()?;
    stop_publisher(&mut world)?;
    let backup = SqliteBackup::take(&world.store())?;

    world.topology.publisher.restart()?;
    let created_after = world.create_key()?;
    world.cache_everywhere(&[&created_after])?;
    world.delete(&deleted_after)?;
    world.assert_gone(&[&deleted_after])?;
    let undone = world.wait_until_caught_up()?;
    for agent in world.topology.agents() {
        assert_eq!((count(agent, "evictd_agent_epoch", &[])?, flushes(agent)?), (1, 0));
    }
    stop_publisher(&mut world)?;
    backup.put(&world.store())?;
    world.topology.publisher.daemon.restart()?;

    wait_until_behind(&world)?;
    assert_refuses_changes(&world, world.publisher(), &good)?;
    throughout(RESTORE_BOUND * 2, || world.assert_none_valid(&[&deleted_before, &deleted_after]))?;
    for agent in world.topology.agents() {
        wait_for_mode(agent, "expired")?;
        assert_eq!((count(agent, "evictd_agent_epoch", &[])?, flushes(agent)?), (1, 0));
    }
    assert_eq!(epochs(&world)?.len(), 1, "only the store's first epoch");

    declare(&world)?;
    for agent in world.topology.agents() {
        wait_for_count(agent, "evictd_agent_epoch", &[], 2)?;
        wait_for_mode(agent, "live")?;
    }
    wait_for_readiness(world.publisher(), 200)?;
    let head = world.wait_until_caught_up()?;
    ensure!(head < undone, "the store was not restored");
    let [epoch, _] = &epochs(&world)?[..] else { bail!("not exactly one new epoch: {:?}", epochs(&world)?) };
    ensure!(epoch.contains("  epoch 2 from position ") && epoch.contains("  declared ("), "{epoch}");
    // The restored store decides from now on.
    world.assert_gone(&[&deleted_before, &created_after])?;
    world.wait_for_codes(&[&deleted_after, &good], "VALID")?;
    world.assert_works()?;
    for agent in world.topology.agents() {
        assert_eq!((new_epoch_flushes(agent)?, flushes(agent)?), (1, 1));
    }
    Ok(())
}

/// Failure: a running publisher doesn't notice a declared epoch, or the epoch costs more than one flush.
#[test]
fn declared_epoch_makes_every_agent_flush_once() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let [deleted, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&deleted, &good])?;
    world.delete(&deleted)?;
    world.assert_gone(&[&deleted])?;

    declare(&world)?;
    for agent in world.topology.agents() {
        wait_for_count(agent, "evictd_agent_epoch", &[], 2)?;
        wait_for_mode(agent, "live")?;
    }
    world.assert_gone(&[&deleted])?;
    world.wait_for_codes(&[&good], "VALID")?;
    world.assert_works()?;
    for agent in world.topology.agents() {
        assert_eq!((new_epoch_flushes(agent)?, flushes(agent)?), (1, 1));
    }
    Ok(())
}

/// Failure: a tenant deletes very many keys at once, and every agent flushes its cache.
#[test]
fn a_bulk_deletion_of_one_api_leaves_the_others_cached() -> Result<()> {
    const MANY: usize = 2_000;
    let world = World::start(&plan(&["eu", "us"]))?;
    let crowd = world.create_keys(MANY)?;
    let other_api = world.create_api()?;
    let bystander = world.create_key_with(json!({ "apiId": other_api }))?;
    let [one, another] = [&crowd[0], &crowd[MANY - 1]];
    world.cache_everywhere(&[one, another, &bystander])?;
    let loads = |agent: &Node| count(agent, "evictd_agent_loads_total", &[]);
    let before: Vec<u64> = world.topology.agents().map(loads).collect::<Result<_>>()?;

    world.sql(&format!("UPDATE keys SET deleted_at_m = 1 WHERE api_id = '{}'", world.api))?;
    world.assert_gone(&[one, another])?;
    world.wait_for_codes(&[&bystander], "VALID")?;
    for (agent, before) in world.topology.agents().zip(before) {
        assert_eq!(loads(agent)? - before, 2, "only the two verified keys were loaded again");
        assert_eq!(flushes(agent)?, 0);
    }
    Ok(())
}

/// Failure: after a restore and a wipe of NATS, an agent compares old positions with those of the new history.
#[test]
fn wiped_nats_and_restored_store_cost_one_flush() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let [deleted_before, deleted_after, good] =
        [world.create_key()?, world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&deleted_before, &deleted_after, &good])?;
    stop_publisher(&mut world)?;
    let backup = SqliteBackup::take(&world.store())?;
    world.topology.publisher.restart()?;
    world.delete(&deleted_after)?;
    world.assert_gone(&[&deleted_after])?;

    stop_publisher(&mut world)?;
    world.topology.home.wipe()?;
    backup.put(&world.store())?;
    // The order that docs/home-store.md prescribes.
    declare(&world)?;
    world.topology.home.restart()?;
    world.topology.publisher.restart()?;
    world.delete(&deleted_before)?;
    for agent in world.topology.agents() {
        wait_for_count(agent, "evictd_agent_epoch", &[], 2)?;
        wait_for_mode(agent, "live")?;
    }
    world.assert_gone(&[&deleted_before])?;
    world.wait_for_codes(&[&deleted_after, &good], "VALID")?;
    for agent in world.topology.agents() {
        assert_eq!((new_epoch_flushes(agent)?, flushes(agent)?), (1, 1));
    }
    world.assert_works()
}

/// Failure: the restored store assigns positions a second time, and reaches those that an agent has applied before the
/// agent can report them. The agent would take the new rows for duplicates.
#[test]
fn restored_store_that_caught_up_is_still_detected() -> Result<()> {
    let mut world = World::start(&with_bound(RESTORE_BOUND, breakable(&["eu"])))?;
    let keys: Vec<Key> = (0..4).map(|_| world.create_key()).collect::<Result<_>>()?;
    let keys: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&keys)?;
    world.wait_until_caught_up()?;
    stop_publisher(&mut world)?;
    let backup = SqliteBackup::take(&world.store())?;
    world.topology.publisher.restart()?;
    world.create_key()?;
    world.create_key()?;
    world.cache_everywhere(&keys)?;
    world.wait_until_caught_up()?;

    // After the restore, four deletions get the positions of the two undone creations, and two more. The agent receives
    // no live message about them, only answers to its own requests.
    stop_publisher(&mut world)?;
    world.topology.regions[0].set_wires(WireMode::Cut)?;
    backup.put(&world.store())?;
    world.sql("UPDATE keys SET deleted_at_m = 1")?;
    world.topology.publisher.restart()?;
    try_eventually("the deletions to get their positions", SOON, || {
        let unnumbered = world.sql("SELECT count(*) FROM invalidations WHERE position IS NULL")?;
        Ok((unnumbered == "0").then_some(()))
    })?;
    let wire = world.agent(0).wire.as_ref().context("the wire is direct")?;
    wire.drop_messages(LIVE, 10);
    world.topology.regions[0].set_wires(WireMode::Pass)?;
    wait_until_behind(&world)?;
    // No agent has received these deletions, so the keys may be VALID until the lease expires.
    wait_for_mode(world.agent(0), "expired")?;
    throughout(RESTORE_BOUND, || world.assert_none_valid(&keys))?;
    declare(&world)?;
    wait_for_count(world.agent(0), "evictd_agent_epoch", &[], 2)?;
    world.assert_gone(&keys)
}
