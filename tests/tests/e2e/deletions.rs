//! Deleted keys and APIs are evicted from every region. Disabled and expired keys grant nothing in any region.

use anyhow::Result;
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::json;

use crate::world::{A_WHILE, Key, SOON, World, count, plan, wait_for_count, wait_until_applied, wall_millis};

const INVALIDATIONS: &str = "evictd_agent_invalidations_total";

/// Failure: a cached key stays valid after its deletion, as in a cache without invalidation.
#[test]
fn deleted_key_is_gone_in_every_region_cached_or_not() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    for permanently in [false, true] {
        let [hot, cold, unread] = [world.create_key()?, world.create_key()?, world.create_key()?];
        world.cache_everywhere(&[&hot])?;
        world.wait_for_codes(&[&cold], "VALID")?;
        for key in [&hot, &cold, &unread] {
            let delete = if permanently { World::delete_permanently } else { World::delete };
            delete(&world, key)?;
        }
        world.assert_gone(&[&hot, &cold, &unread])?;

        for operation in ["keys.getKey", "keys.deleteKey"] {
            let answer = world.topology.call(world.publisher(), operation, &json!({ "keyId": hot.id }))?;
            assert_eq!(answer.status, 404, "{operation}: {}", answer.text);
        }
    }
    // Each region has confirmed each deletion.
    for region in ["eu", "us"] {
        let labels = [("region", region)];
        wait_for_count(world.publisher(), "evictd_publisher_confirmed_seconds_count", &labels, 6)?;
    }
    wait_for_count(world.publisher(), "evictd_publisher_unconfirmed_deletions", &[], 0)
}

/// Failure: deleting an API costs work, messages or memory for each of its keys, or misses some of them.
#[test]
fn an_api_with_500_cached_keys_is_gone_by_one_row_and_one_floor() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let api = world.create_api()?;
    let keys: Vec<Key> =
        (0..500).map(|_| world.create_key_with(json!({ "apiId": api }))).collect::<Result<_>>()?;
    let keys: Vec<&Key> = keys.iter().collect();
    let bystander = world.create_key()?;
    world.cache_everywhere(&keys)?;
    world.cache_everywhere(&[&bystander])?;
    let head = world.wait_until_caught_up()?;
    let mut before = Vec::new();
    for agent in world.topology.agents() {
        before.push((count(agent, INVALIDATIONS, &[])?, agent.status()?["floors"].clone()));
    }

    world.call("apis.deleteApi", &json!({ "apiId": api }))?;
    world.assert_gone(&keys)?;
    world.cache_everywhere(&[&bystander])?;

    assert_eq!(world.wait_until_caught_up()?, head + 1);
    for (agent, (applied, floors)) in world.topology.agents().zip(before) {
        assert_eq!(count(agent, INVALIDATIONS, &[])?, applied + 1);
        assert_eq!(agent.status()?["floors"]["keys"], floors["keys"]);
        assert_eq!(agent.status()?["floors"]["scopes"], floors["scopes"]);
        assert_eq!(crate::world::flushes(agent)?, 0);
    }
    Ok(())
}

/// Failure: a disabled key is VALID because it exists, or because it is cached.
#[test]
fn a_key_that_is_switched_off_is_disabled_in_every_region() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key_with(json!({ "enabled": false }))?;
    for agent in world.topology.agents() {
        for _ in 0..2 {
            assert_eq!(world.code(agent, &key)?, "DISABLED");
        }
    }
    Ok(())
}

/// Failure: a key expires only after a new load, or at a different time in each region.
#[test]
fn key_expires_at_the_same_time_in_every_region() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let expires = wall_millis()? + 3_000;
    let key = world.create_key_with(json!({ "expires": expires }))?;
    let lasting = world.create_key_with(json!({ "expires": expires + 3_600_000 }))?;
    world.cache_everywhere(&[&key, &lasting])?;
    assert!(wall_millis()? < expires, "this machine is too slow for the test: the key has already expired");

    for agent in world.topology.agents() {
        try_eventually("the key to expire", SOON, || {
            let (code, now) = (world.code(agent, &key)?, wall_millis()?);
            assert!(code == "VALID" || now > expires - 200, "{code} {} ms too early", expires - now);
            Ok((code == "EXPIRED").then_some(()))
        })?;
        // Not by the agent's clock alone: home's expiry row has arrived too.
        wait_until_applied(agent, &key.id, "expired")?;
    }
    throughout(A_WHILE, || {
        for agent in world.topology.agents() {
            assert_eq!(world.code(agent, &key)?, "EXPIRED");
            assert_eq!(world.code(agent, &lasting)?, "VALID");
        }
        Ok(())
    })
}
