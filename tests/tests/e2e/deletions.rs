//! Keys and APIs that everybody has cached are gone everywhere; keys that are switched off or at their
//! end grant nothing anywhere.

use anyhow::Result;
use evictd_tests::wait::{throughout, try_eventually};
use serde_json::json;

use crate::world::{A_WHILE, Key, SOON, World, count, plan, wait_for_count, wait_until_applied, wall_millis};

const INVALIDATIONS: &str = "evictd_agent_invalidations_total";

/// Failure: a cache that keeps what it has, as one without invalidation does.
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
    // Each region has confirmed each deletion, and none of them waits any more.
    for region in ["eu", "us"] {
        let labels = [("region", region)];
        wait_for_count(world.publisher(), "evictd_publisher_confirmed_seconds_count", &labels, 6)?;
    }
    wait_for_count(world.publisher(), "evictd_publisher_unconfirmed_deletions", &[], 0)
}

/// Failure: work, messages or memory in proportion to the keys of an API; and keys that are forgotten.
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

/// Failure: a key that is taken for good because it is known.
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

/// Failure: an end that only comes when somebody asks again, or that each region sees at another time.
#[test]
fn key_expires_at_the_same_time_in_every_region() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let expires = wall_millis()? + 3_000;
    let key = world.create_key_with(json!({ "expires": expires }))?;
    let lasting = world.create_key_with(json!({ "expires": expires + 3_600_000 }))?;
    world.cache_everywhere(&[&key, &lasting])?;
    assert!(wall_millis()? < expires, "this machine is too slow for the test: the key has ended already");

    for agent in world.topology.agents() {
        try_eventually("the key's end", SOON, || {
            let (code, now) = (world.code(agent, &key)?, wall_millis()?);
            assert!(code == "VALID" || now > expires - 200, "{code} {} ms too early", expires - now);
            Ok((code == "EXPIRED").then_some(()))
        })?;
        // Not by this machine's clock alone: home has said so.
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
