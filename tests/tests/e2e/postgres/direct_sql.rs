//! Changes by direct SQL reach publishers by NOTIFY, and are found by polling without it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use evictd_tests::process::evictd_command;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::json;
use toml::toml;

use super::Site;
use crate::world::{
    Key, SOON, World, count, flushes, plan, wait_for_mode, wait_for_readiness, wait_until_applied, with_bound,
};

/// Plans publishers that don't poll and agents that probe seldom. Rounds also number rows, so they must be rare.
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

/// Failure: a change past the API is found only by the next poll.
#[test]
fn changes_by_sql_reach_all_agents_at_once() -> Result<()> {
    // Together, the agents cause a round every six seconds.
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

/// Failure: TRUNCATE fires no row triggers, and so reaches no agent.
#[test]
fn truncated_keys_are_rejected_everywhere_at_once() -> Result<()> {
    let site = Site::start(2, without_polling())?;
    let world = &site.world;
    let keys = world.create_keys(20)?;
    let keys: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&keys)?;
    world.sql("TRUNCATE keys")?;
    world.assert_gone(&keys)?;
    // Everything else still exists: the root key and the API.
    world.assert_works()?;
    for agent in world.topology.agents() {
        // A round also finds that the table has a new file, and can't know that a trigger has logged the TRUNCATE.
        ensure!(flushes(agent)? <= 1, "{}", agent.daemon.log_tail());
    }
    site.assert_no_rule_was_broken()
}

/// Failure: publishers rely on notifications alone, and a notification can be lost.
#[test]
fn a_change_without_a_notification_is_found_by_polling() -> Result<()> {
    let site = Site::start(2, plan(&["eu", "us"]))?;
    let world = &site.world;
    let [doomed, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&doomed, &good])?;
    // The control API's own sessions set this, because they wake the publishers themselves.
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

/// Failure: a publisher that lost its listening connection misses notifications, and doesn't poll after it reconnects.
#[test]
fn a_reconnected_listener_finds_missed_changes_at_once() -> Result<()> {
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
        // Their connections are closed before the change commits, so the notification is lost.
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

/// Failure: a change by the command line is found only by the next poll.
#[test]
fn root_key_revoked_on_the_command_line_is_rejected_at_once() -> Result<()> {
    let site = Site::start(2, without_polling())?;
    let world = &site.world;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let id = world.sql("SELECT id FROM root_keys")?;
    let began = Instant::now();
    let mut command = evictd_command()?;
    command
        .args(["root-key", "revoke", "--root-key-id", id.as_str(), "--config"])
        .arg(&world.publisher().config);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    wait_until_applied_everywhere(world, &id, "deleted")?;
    ensure!(began.elapsed() < Duration::from_secs(4), "it took {:?}", began.elapsed());
    for agent in world.topology.agents() {
        let answer = world.topology.call(agent, "keys.verifyKey", &json!({ "key": key.text }))?;
        assert_eq!(answer.status, 401, "{}", answer.text);
    }
    site.assert_no_rule_was_broken()
}

/// Failure: one statement deletes all keys of a tenant, and every agent loses its lease or its cache.
#[test]
fn bulk_deletion_by_sql_keeps_agents_live_and_other_keys_cached() -> Result<()> {
    const MANY: usize = 20_000;
    const BOUND: Duration = Duration::from_secs(3);
    let site = Site::start(2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let world = &site.world;
    let bystander = world.create_key_with(json!({ "apiId": world.create_api()? }))?;
    world.sql(&format!(
        "INSERT INTO keys (id, api_id, workspace_id, hash, start)
         SELECT 'bulk_' || n, apis.id, workspace_id, sha256(convert_to('bulk_' || n, 'UTF8')), 'bulk'
         FROM apis, generate_series(1, {MANY}) AS n WHERE apis.id = '{}'",
        world.api
    ))?;
    let [one, another] = [1, MANY].map(|n| Key { id: format!("bulk_{n}"), text: format!("bulk_{n}") });
    world.cache_everywhere(&[&one, &another, &bystander])?;
    let loads = |agent: &Node| count(agent, "evictd_agent_loads_total", &[]);
    let before: Vec<u64> = world.topology.agents().map(loads).collect::<Result<_>>()?;

    let mut session = site.session()?;
    session.begin(&format!("UPDATE keys SET deleted_at_m = 1 WHERE api_id = '{}'", world.api))?;
    throughout(BOUND, || {
        for agent in world.topology.agents() {
            ensure!(agent.status()?["mode"] == "live", "{}", agent.daemon.log_tail());
            assert_eq!(world.code(agent, &bystander)?, "VALID");
        }
        Ok(())
    })?;
    session.finish()?;
    world.assert_gone(&[&one, &another])?;
    for (agent, before) in world.topology.agents().zip(before) {
        assert_eq!(loads(agent)? - before, 2, "only the two verified keys must be loaded again");
        assert_eq!(flushes(agent)?, 0);
    }
    site.assert_no_rule_was_broken()
}

/// Failure: triggers are off for less than a minute, and every check finds them in place. A deletion meanwhile is
/// confirmed, and its key stays valid forever.
#[test]
fn a_deletion_while_triggers_are_off_fails() -> Result<()> {
    let site = Site::start(1, plan(&["eu"]))?;
    let world = &site.world;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let delete = || {
        let body = json!({ "keyId": key.id });
        world.topology.call_with(world.publisher(), "keys.deleteKey", &body, &[("Prefer", "wait=5")])
    };
    world.sql("ALTER TABLE keys DISABLE TRIGGER ALL")?;
    let refused = delete()?;
    ensure!(refused.status == 500, "{refused:?}");
    let waits = wait_for_readiness(world.publisher(), 503)?;
    ensure!(waits.to_string().contains("triggers"), "{waits}");
    // The change finds the trigger off, or a round does first, or both do.
    let violations = count(world.publisher(), "evictd_invariant_violations_total", &[("id", "R3")])?;
    ensure!([1, 2].contains(&violations), "{violations}");
    world.wait_for_codes(&[&key], "VALID")?;

    world.sql("ALTER TABLE keys ENABLE TRIGGER ALL; ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed")?;
    world.sql("ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_truncated")?;
    wait_for_readiness(world.publisher(), 200)?;
    let done = delete()?;
    ensure!(done.status == 200, "{done:?}");
    world.assert_gone(&[&key])
}

/// Failure: triggers are off during one deletion. Later checks find all of them in place, and the key stays valid
/// forever.
#[test]
fn a_deletion_without_triggers_takes_effect_within_the_bound() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(4);
    let site = Site::start(2, with_bound(BOUND, plan(&["eu", "us"])))?;
    let world = &site.world;
    let [key, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&key, &good])?;
    world.sql(&format!(
        "ALTER TABLE keys DISABLE TRIGGER ALL; DELETE FROM keys WHERE id = '{}';
         ALTER TABLE keys ENABLE TRIGGER ALL;
         ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed, ENABLE ALWAYS TRIGGER keys_truncated",
        key.id
    ))?;
    world.assert_gone_within(&key, Instant::now(), BOUND)?;
    world.assert_gone(&[&key])?;
    for agent in world.topology.agents() {
        assert_eq!(count(agent, "evictd_agent_flushes_total", &[("reason", "new_epoch")])?, 1);
        wait_for_mode(agent, "live")?;
    }
    world.topology.publishers().try_for_each(|publisher| wait_for_readiness(publisher, 200).map(drop))?;
    world.wait_for_codes(&[&good], "VALID")?;
    site.assert_no_rule_was_broken()
}

/// Failure: triggers are off for long, keys are deleted meanwhile, and agents' leases are still extended.
#[test]
fn records_live_for_the_bound_while_triggers_are_off() -> Result<()> {
    const BOUND: Duration = Duration::from_secs(4);
    let site = Site::start(1, with_bound(BOUND, plan(&["eu"])))?;
    let world = &site.world;
    let [key, good] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&key, &good])?;
    world.sql("ALTER TABLE keys DISABLE TRIGGER ALL")?;
    let waits = wait_for_readiness(world.publisher(), 503)?.to_string();
    ensure!(waits.contains("keys_changed"), "{waits}");
    wait_for_mode(world.agent(0), "expired")?;
    world.wait_for_codes(&[&key, &good], "VALID")?;
    world.sql(&format!("DELETE FROM keys WHERE id = '{}'", key.id))?;
    world.assert_gone_within(&key, Instant::now(), BOUND)?;
    world.wait_for_codes(&[&good], "VALID")?;

    world.sql(
        "ALTER TABLE keys ENABLE TRIGGER ALL;
         ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed, ENABLE ALWAYS TRIGGER keys_truncated",
    )?;
    wait_for_readiness(world.publisher(), 200)?;
    wait_for_mode(world.agent(0), "live")?;
    world.assert_gone(&[&key])?;
    world.assert_works()
}
