//! A load is in flight while its key is deleted. Its record was correct when it was read, and is outdated when it
//! arrives.
//!
//! The answer is held back on the wire until the agent has applied the deletion, so the order of events is the same in
//! every run.

use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use evictd_tests::http::Client;
use evictd_tests::proxy::Proxy;
use evictd_tests::topology::Plan;
use evictd_tests::wait::{eventually, throughout};
use serde_json::json;
use toml::toml;

use crate::world::{
    A_WHILE, ApiClient, Key, SOON, World, breakable, count, wait_for_count, wait_until_applied,
};

const MISSES: &str = "evictd_agent_cache_misses_total";

/// Starts one region, whose agent waits longer for a load than any test holds it back.
fn start() -> Result<World> {
    World::start(&Plan { agents: toml! { loads = { timeout = "60s" } }, ..breakable(&["eu"]) })
}

fn wire(world: &World) -> Result<&Proxy> {
    world.agent(0).wire.as_ref().context("the wire is direct")
}

/// Holds back the answers to the agent's loads. The root key is cached before, so only the key is loaded.
fn hold_loads(world: &World) -> Result<()> {
    let other = world.create_key()?;
    world.cache_everywhere(&[&other])?;
    wire(world)?.hold_messages("_INBOX_evictd.eu.agent-1.*.lookup.>");
    Ok(())
}

fn wait_until_held(world: &World, how_many: usize) -> Result<()> {
    let wire = wire(world)?;
    eventually("the load's answer to be held back", SOON, || (wire.held() == how_many).then_some(()))
}

type Verification<'scope> = ScopedJoinHandle<'scope, Result<String>>;

fn verify<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    world: &World,
    key: &Key,
) -> Verification<'scope> {
    let (caller, key) = (ApiClient::new(world, world.agent(0)), key.clone());
    scope.spawn(move || caller.code(&key))
}

fn code_of(verification: Verification<'_>) -> Result<String> {
    verification.join().map_err(|_| anyhow!("a verification panicked"))?
}

/// Runs `delete` while a load of `key` is in flight. The load must not restore the key.
fn assert_late_load_is_rejected(delete: impl Fn(&World, &Key) -> Result<()>) -> Result<()> {
    let world = start()?;
    let key = world.create_key()?;
    hold_loads(&world)?;
    let stale = count(world.agent(0), "evictd_agent_stale_loads_rejected_total", &[])?;
    let head = world.wait_until_caught_up()?;
    thread::scope(|scope| {
        let early = verify(scope, &world, &key);
        wait_until_held(&world, 1)?;
        delete(&world, &key)?;
        assert_eq!(world.wait_until_caught_up()?, head + 1, "eu has applied exactly one change");

        // It must not share the load in flight: it began after the agent had applied the deletion.
        let misses = count(world.agent(0), MISSES, &[])?;
        let late = verify(scope, &world, &key);
        wait_for_count(world.agent(0), MISSES, &[], misses + 1)?;
        wire(&world)?.release();

        // The early one began before the deletion, so both codes are correct.
        let early = code_of(early)?;
        assert!(["VALID", "NOT_FOUND"].contains(&early.as_str()), "{early}");
        assert_eq!(code_of(late)?, "NOT_FOUND");
        Ok::<_, anyhow::Error>(())
    })?;
    let rejected = count(world.agent(0), "evictd_agent_stale_loads_rejected_total", &[])?;
    assert_eq!(rejected, stale + 1, "the load that was held back was cached");
    throughout(A_WHILE, || {
        assert_eq!(world.code(world.agent(0), &key)?, "NOT_FOUND");
        Ok(())
    })
}

/// Failure: the late load puts the old record into the cache after the invalidation has emptied it.
#[test]
fn load_read_before_a_deletion_does_not_restore_the_key() -> Result<()> {
    assert_late_load_is_rejected(World::delete)
}

/// Failure: the late load caches an erased key, because no record is left to compare it with.
#[test]
fn load_read_before_an_erasure_does_not_restore_the_key() -> Result<()> {
    assert_late_load_is_rejected(World::delete_permanently)
}

/// Failure: the late load caches the key, because the deletion names its API and not the key.
#[test]
fn load_read_before_an_api_deletion_does_not_restore_its_key() -> Result<()> {
    assert_late_load_is_rejected(|world, _| {
        world.call("apis.deleteApi", &json!({ "apiId": world.api })).map(drop)
    })
}

/// Failure: a load whose client has given up is no longer checked, and its outdated record is cached.
#[test]
fn abandoned_load_does_not_restore_a_deleted_key() -> Result<()> {
    let world = start()?;
    let key = world.create_key()?;
    hold_loads(&world)?;
    world.wait_until_caught_up()?;
    let impatient = Client::with_timeout(A_WHILE);
    let url = format!("http://{}/v2/keys.verifyKey", world.agent(0).http);
    let abandoned =
        impatient.post_json(&url, Some(world.topology.root_key()), &json!({ "key": key.text }), &[]);
    ensure!(abandoned.is_err(), "the client got an answer although the load was held back");
    wait_until_held(&world, 1)?;
    world.delete(&key)?;
    wait_until_applied(world.agent(0), &key.id, "deleted")?;
    wire(&world)?.release();
    wait_for_count(world.agent(0), "evictd_agent_stale_loads_rejected_total", &[], 1)?;
    throughout(A_WHILE, || {
        assert_eq!(world.code(world.agent(0), &key)?, "NOT_FOUND");
        Ok(())
    })
}

/// Failure: a load is repeated because its answer was lost, and restores a key that was deleted between the two
/// requests.
#[test]
fn repeated_load_does_not_restore_a_deleted_key() -> Result<()> {
    let agents = toml! { loads = { timeout = "500ms" } };
    let world = World::start(&Plan { agents, ..breakable(&["eu"]) })?;
    let [other, key] = [world.create_key()?, world.create_key()?];
    world.cache_everywhere(&[&other])?;
    world.wait_until_caught_up()?;
    wire(&world)?.drop_messages("_INBOX_evictd.eu.agent-1.*.lookup.>", 1);
    let lost = wire(&world)?.dropped();
    thread::scope(|scope| {
        let early = verify(scope, &world, &key);
        eventually("the answer to be lost", SOON, || {
            wire(&world).is_ok_and(|wire| wire.dropped() > lost).then_some(())
        })?;
        world.delete(&key)?;
        let early = code_of(early)?;
        assert!(["VALID", "NOT_FOUND"].contains(&early.as_str()), "{early}");
        Ok::<_, anyhow::Error>(())
    })?;
    world.assert_gone(&[&key])
}

/// Failure: "not found" is cached for a key that was restored meanwhile, and nothing corrects it.
#[test]
fn load_that_found_nothing_does_not_hide_a_restored_key() -> Result<()> {
    let world = start()?;
    let key = world.create_key()?;
    world.delete(&key)?;
    hold_loads(&world)?;
    world.wait_until_caught_up()?;
    thread::scope(|scope| {
        let early = verify(scope, &world, &key);
        wait_until_held(&world, 1)?;
        world.sql(&format!("UPDATE keys SET deleted_at_m = NULL WHERE id = '{}'", key.id))?;
        wait_until_applied(world.agent(0), &key.id, "restored")?;
        wire(&world)?.release();
        code_of(early)?;
        Ok::<_, anyhow::Error>(())
    })?;
    throughout(A_WHILE, || {
        assert_eq!(world.code(world.agent(0), &key)?, "VALID");
        Ok(())
    })
}

/// Failure: each request for a key that isn't cached sends a lookup of its own.
#[test]
fn verifications_of_one_key_share_one_load() -> Result<()> {
    let world = start()?;
    let key = world.create_key()?;
    hold_loads(&world)?;
    let loads = |outcome| count(world.agent(0), "evictd_agent_loads_total", &[("outcome", outcome)]);
    let before = loads("ok")?;
    let misses = count(world.agent(0), MISSES, &[])?;
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..20).map(|_| verify(scope, &world, &key)).collect();
        wait_for_count(world.agent(0), MISSES, &[], misses + 20)?;
        wait_until_held(&world, 1)?;
        wire(&world)?.release();
        for verification in waiting {
            assert_eq!(code_of(verification)?, "VALID");
        }
        Ok::<_, anyhow::Error>(())
    })?;
    assert_eq!(loads("ok")?, before + 1);
    Ok(())
}
