//! SIGHUP: the configuration is read again, and what needs no restart takes effect.

use std::fs;

use anyhow::{Context, Result, ensure};
use evictd_tests::proxy::WireMode;
use evictd_tests::topology::{Node, Plan};
use evictd_tests::wait::try_eventually;
use serde_json::json;
use toml::{Table, Value, toml};

use crate::world::{
    SOON, UNAVAILABLE, World, breakable, count, plan, wait_for_count, wait_for_mode, wait_for_readiness,
    wait_until_settled, with_bound,
};

const RELOADS: &str = "evictd_config_reloads_total";

/// Writes `changes` into the node's configuration, sends SIGHUP, and waits until it was read.
fn reload(node: &Node, changes: &Table) -> Result<()> {
    let mut config: Table = fs::read_to_string(&node.config)?.parse()?;
    for (section, values) in changes {
        let own = config.entry(section).or_insert_with(|| Table::new().into());
        let (Value::Table(own), Value::Table(values)) = (own, values) else { anyhow::bail!("not a section") };
        own.extend(values.clone());
    }
    fs::write(&node.config, config.to_string())?;
    let applied = count(node, RELOADS, &[("outcome", "applied")])?;
    node.daemon.hang_up()?;
    wait_for_count(node, RELOADS, &[("outcome", "applied")], applied + 1)
}

fn log(node: &Node) -> Result<String> {
    Ok(node.daemon.stdout()? + &node.daemon.stderr()?)
}

/// Failure: a limit or a region needs a restart, or a reload applies a part that it can't apply.
#[test]
fn publisher_takes_over_limits_regions_and_log_filter() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let publisher = world.publisher();
    let changes = toml! {
        log = { filter = "info,evictd_ops=debug" }
        receipts = { regions = ["ap", "eu"] }
        sequencer = { poll_interval = "2s" }
    };
    reload(publisher, &changes)?;
    let log_line = "needs_restart=\"sequencer.poll_interval\"";
    ensure!(log(publisher)?.contains(log_line), "{}", log(publisher)?);
    try_eventually("the regions to be shown", SOON, || {
        Ok((publisher.status()?["receipts"]["configuredRegions"] == json!(["ap", "eu"])).then_some(()))
    })?;
    let key = world.create_key()?;
    let answer = world.topology.call_with(
        publisher,
        "keys.deleteKey",
        &json!({ "keyId": key.id }),
        &[("Prefer", "wait=30")],
    )?;
    let regions = &answer.body["meta"]["propagation"]["regions"];
    ensure!(
        regions.as_array().is_some_and(|regions| regions.iter().any(|region| region["state"] == "absent"))
    );

    let one_request = toml! { rate_limit = { requests_per_minute = "1" } };
    reload(publisher, &one_request)?;
    let codes =
        [(); 3].map(|()| world.topology.call(publisher, "apis.createApi", &json!({ "name": "payments" })));
    let statuses = codes.into_iter().map(|answer| Ok(answer?.status)).collect::<Result<Vec<_>>>()?;
    assert_eq!(statuses.last(), Some(&429));
    let unlimited = toml! { rate_limit = { requests_per_minute = "unlimited" } };
    reload(publisher, &unlimited)?;
    world.assert_works()
}

/// Failure: a mistake in the file ends the daemon, or half of the file is applied.
#[test]
fn malformed_file_changes_nothing() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    for node in [world.publisher(), world.agent(0)] {
        let good = fs::read_to_string(&node.config)?;
        fs::write(&node.config, format!("{good}\n[log]\nfilter = \"debug\"\nformat = \"purple\"\n"))?;
        node.daemon.hang_up()?;
        wait_for_count(node, RELOADS, &[("outcome", "rejected")], 1)?;
        ensure!(log(node)?.contains("configuration rejected; nothing changed"));
        ensure!(!log(node)?.contains("DEBUG"), "the log filter was applied");
        fs::write(&node.config, good)?;
        reload(node, &Table::new())?;
        wait_for_readiness(node, 200)?;
    }
    world.assert_works()
}

/// Failure: the policy is in force before a publisher has it, or after an operator has withdrawn it.
#[test]
fn agent_takes_over_its_partition_policy() -> Result<()> {
    const BOUND: std::time::Duration = std::time::Duration::from_secs(3);
    let plan = with_bound(BOUND, breakable(&["eu"]));
    let agents = toml! { loads = { timeout = "300ms" } };
    let world = World::start(&Plan { agents, ..plan })?;
    let agent = world.agent(0);
    wait_until_settled(agent)?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    reload(agent, &toml! { partition = { policy = "serve_stale" } })?;
    try_eventually("the publisher to have the policy", SOON, || {
        let status = world.publisher().status()?;
        Ok((status["agents"][0]["partitionPolicy"] == "serve_stale").then_some(()))
    })?;
    // The next proof follows a probe that has reported it.
    world.delete(&world.create_key()?)?;
    world.topology.regions[0].set_wires(WireMode::Cut)?;
    wait_for_mode(agent, "expired")?;
    let answer = world.topology.call(agent, "keys.verifyKey", &json!({ "key": key.text }))?;
    assert_eq!(answer.body["data"]["code"], "VALID", "{}", answer.text);
    answer.body["meta"]["stale"]["ageSeconds"].as_u64().context("the answer is not marked")?;
    wait_for_readiness(agent, 200)?;

    reload(agent, &toml! { partition = { policy = "deny" } })?;
    assert_eq!(world.code(agent, &key)?, UNAVAILABLE);
    wait_for_readiness(agent, 503)?;
    world.topology.regions[0].set_wires(WireMode::Pass)?;
    world.wait_for_codes(&[&key], "VALID")
}
