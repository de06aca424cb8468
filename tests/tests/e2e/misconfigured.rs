//! NATS permissions that are wrong from the start. A daemon without a permission that it needs must not report itself
//! healthy.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use evictd_tests::http::Client;
use evictd_tests::topology::Node;
use evictd_tests::wait::{eventually, throughout};

use crate::world::{
    SOON, UNAVAILABLE, World, plan, wait_for_count, wait_for_mode, wait_for_readiness, wait_for_warning,
    wait_until_settled, with_bound,
};

const BOUND: Duration = Duration::from_secs(2);

/// Replaces `right` by `wrong` in the file of users, and restarts NATS and one daemon. Asserts that the daemon isn't
/// ready, and runs `meanwhile`. Once the file is corrected and NATS restarted, the daemon must recover without a
/// restart of its own.
fn assert_unready_while(
    (right, wrong): (&str, &str),
    node: fn(&mut World) -> &mut Node,
    meanwhile: impl FnOnce(&World) -> Result<()>,
) -> Result<()> {
    let mut world = World::start(&with_bound(BOUND, plan(&["eu"])))?;
    world.topology.home.edit_users(right, wrong)?;
    world.topology.home.restart()?;
    let node = node(&mut world);
    node.daemon.restart()?;
    let url = format!("http://{}/readyz", node.admin);
    let client = Client::with_timeout(Duration::from_secs(5));
    let errors = |node: &Node| {
        let metrics = node.metrics().ok()?;
        let of = |role| metrics.value(&format!("evictd_{role}_nats_errors_total"), &[("kind", "server")]);
        of("agent").or_else(|| of("publisher")).filter(|errors| *errors > 0.0)
    };
    let denied = eventually("NATS to deny a permission", SOON, || errors(node));
    denied.with_context(|| node.daemon.log_tail())?;
    throughout(BOUND * 2, || {
        let answer = client.get(&url)?;
        ensure!(answer.status == 503, "it reports itself ready: {}\n{}", answer.text, node.daemon.log_tail());
        Ok(())
    })?;
    let livez = client.get(&url.replace("readyz", "livez"))?;
    ensure!(livez.status == 200, "a restart of the daemon would not help: {}", livez.text);
    ensure!(node.daemon.stderr()?.contains("NATS denied a permission"), "{}", node.daemon.log_tail());
    meanwhile(&world)?;

    world.topology.home.edit_users(wrong, right)?;
    world.topology.home.restart()?;
    wait_for_readiness(world.publisher(), 200)?;
    wait_for_readiness(world.agent(0), 200)?;
    wait_for_mode(world.agent(0), "live")?;
    world.assert_works()
}

fn agent(world: &mut World) -> &mut Node {
    world.agent_mut(0)
}

fn publisher(world: &mut World) -> &mut Node {
    &mut world.topology.publisher
}

/// Failure: an agent that receives nothing from the live feed reports itself ready, because probes still work.
#[test]
fn agent_without_the_live_feed_permission_is_not_ready() -> Result<()> {
    let mistake = (r#"subscribe { allow: ["evictd.v1.live""#, r#"subscribe { allow: ["evictd.v1.feed""#);
    assert_unready_while(mistake, agent, |world| {
        // Deletions arrive later, but they arrive.
        let key = world.create_key()?;
        world.wait_for_code(world.agent(0), &key, "VALID")?;
        world.delete(&key)?;
        world.assert_gone(&[&key])?;
        wait_for_count(world.agent(0), "evictd_agent_feed_silent", &[], 1)
    })
}

/// Failure: an agent that can't obtain a proof answers.
#[test]
fn agent_without_the_probe_permission_is_not_ready() -> Result<()> {
    let mistake = (r#""evictd.v1.probe.eu.agent-1""#, r#""evictd.v1.prob.eu.agent-1""#);
    let any = (r#""evictd.v1.probe.eu.agent-1.any""#, r#""evictd.v1.prob.eu.agent-1.any""#);
    // Both subjects, or the second try would succeed.
    let mistake = (format!("{}, {}", mistake.0, any.0), format!("{}, {}", mistake.1, any.1));
    assert_unready_while((&mistake.0, &mistake.1), agent, |world| {
        assert_eq!(world.agent(0).status()?["mode"], "starting");
        Ok(())
    })
}

/// Failure: a publisher whose invalidations NATS drops reports itself ready.
#[test]
fn publisher_that_may_not_publish_the_live_feed_is_not_ready() -> Result<()> {
    let mistake = (r#"publish { allow: ["evictd.v1.live""#, r#"publish { allow: ["evictd.v1.feed""#);
    assert_unready_while(mistake, publisher, |world| {
        // Deletions arrive later: probes reveal what was missed.
        let key = world.create_key()?;
        world.wait_for_code(world.agent(0), &key, "VALID")?;
        world.delete(&key)?;
        world.assert_gone(&[&key])?;
        wait_for_count(world.agent(0), "evictd_agent_feed_silent", &[], 1)
    })
}

/// Failure: a publisher that receives no probes reports itself ready, while all agents expire.
#[test]
fn publisher_that_may_not_receive_probes_is_not_ready() -> Result<()> {
    let mistake =
        (r#""evictd.v1.probe.>", "evictd.v1.replay.>""#, r#""evictd.v1.prob.>", "evictd.v1.replay.>""#);
    assert_unready_while(mistake, publisher, |world| {
        wait_for_mode(world.agent(0), "expired")?;
        wait_for_readiness(world.agent(0), 503)?;
        Ok(())
    })
}

/// Failure: an agent that may not look up keys reports itself healthy until the first client comes, and then denies
/// everything.
#[test]
fn agent_without_the_lookup_permission_is_not_ready_and_denies() -> Result<()> {
    let mistake = (r#""evictd.v1.lookup.eu.agent-1""#, r#""evictd.v1.lokup.eu.agent-1""#);
    let any = (r#""evictd.v1.lookup.eu.agent-1.any""#, r#""evictd.v1.lokup.eu.agent-1.any""#);
    // Both subjects, or the second try would succeed.
    let mistake = (format!("{}, {}", mistake.0, any.0), format!("{}, {}", mistake.1, any.1));
    assert_unready_while((&mistake.0, &mistake.1), agent, |world| {
        let waiting = wait_for_readiness(world.agent(0), 503)?["waitingFor"].to_string();
        ensure!(
            waiting.contains("evictd.v1.lookup.eu.agent-1"),
            "the missing permission isn't named: {waiting}"
        );
        let key = world.create_key()?;
        assert_eq!(world.code(world.agent(0), &key)?, UNAVAILABLE);
        Ok(())
    })
}

/// Failure: a permission that is revoked at runtime takes a working region out of service, or is not reported.
#[test]
fn permission_revoked_at_runtime_is_a_warning() -> Result<()> {
    let mistake = (r#"subscribe { allow: ["evictd.v1.live""#, r#"subscribe { allow: ["evictd.v1.feed""#);
    let mut world = World::start(&with_bound(BOUND, plan(&["eu"])))?;
    wait_until_settled(world.agent(0))?;
    world.topology.home.edit_users(mistake.0, mistake.1)?;
    world.topology.home.restart()?;
    wait_for_mode(world.agent(0), "live")?;
    wait_for_warning(world.agent(0), "evictd.v1.live")?;
    ensure!(world.agent(0).daemon.stderr()?.contains("NATS denied a permission"));
    world.topology.home.edit_users(mistake.1, mistake.0)?;
    world.topology.home.restart()?;
    world.assert_works()
}
