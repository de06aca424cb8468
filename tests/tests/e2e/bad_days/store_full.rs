//! The disk under the store is full, and has room again.

use anyhow::{Result, ensure};
use evictd_tests::disk::{SmallDisk, in_private_mounts};
use evictd_tests::wait::try_eventually;
use serde_json::json;

use super::{Asked, Story, Told, wait_for_log, with_store_in};
use crate::world::{Caller, Key, SOON, World, count, wait_for_readiness};

/// Failure: a deletion that found no room is answered with success, or is half done; the publisher looks well; it
/// has to be restarted when there is room again.
#[test]
fn a_full_disk_refuses_changes_and_nothing_else_until_there_is_room() -> Result<()> {
    const THIS: &str =
        "bad_days::store_full::a_full_disk_refuses_changes_and_nothing_else_until_there_is_room";
    in_private_mounts(THIS, || {
        let dir = tempfile::tempdir()?;
        let disk = SmallDisk::mount(&dir.path().join("disk"), 16 * 1024)?;
        let world = World::start(&with_store_in(disk.dir())?)?;
        let (keys, uncached) = (world.create_keys(400)?, world.create_key()?);
        world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

        disk.fill()?;
        let caller = Caller::new(&world, world.publisher());
        let story = delete_until_refused(&caller, &keys)?;
        println!("{} deletions still found room", story.count(Told::Deleted));
        assert_eq!(story.count(Told::Unknown), 0, "a disk without room is known to have kept nothing");
        let refused =
            world.topology.call(world.publisher(), "keys.createKey", &json!({ "apiId": world.api }))?;
        assert_eq!(refused.status, 500, "{}", refused.text);
        tell_the_truth(&world, &story, &uncached)?;

        disk.make_room()?;
        wait_for_readiness(world.publisher(), 200)?;
        wait_for_log(&world, "the home store works again")?;
        let mut again = Vec::new();
        for key in story.keys(Told::Unchanged) {
            again.push(try_eventually("a deletion to find room", SOON, || {
                let asked = Asked::of(&caller, key)?;
                Ok((asked.told == Told::Deleted).then_some(asked))
            })?);
        }
        let story = Story(story.0.into_iter().chain(again).collect());
        story.check(&world)?;
        world.assert_works()
    })
}

/// Deletes one key after the other until a few were refused in a row: what room was left is used up.
fn delete_until_refused<'k>(caller: &Caller, keys: &'k [Key]) -> Result<Story<'k>> {
    let mut story = Story::default();
    for key in keys {
        story.0.push(Asked::of(caller, key)?);
        if story.0.len() > 5 && story.0.iter().rev().take(5).all(|asked| asked.told == Told::Unchanged) {
            return Ok(story);
        }
    }
    anyhow::bail!("{} keys were deleted, and the disk was never full", keys.len())
}

/// While the disk is full: reads go on, and everybody who looks sees what is wrong.
fn tell_the_truth(world: &World, story: &Story, uncached: &Key) -> Result<()> {
    let unready = wait_for_readiness(world.publisher(), 503)?;
    ensure!(unready["waitingFor"][0]["condition"] == "store", "{unready}");
    wait_for_log(world, "database or disk is full")?;
    ensure!(count(world.publisher(), "evictd_publisher_requests_total", &[("class", "5xx")])? > 0);
    ensure!(count(world.publisher(), "evictd_publisher_store_failures_total", &[])? > 0);
    world.call("keys.getKey", &json!({ "keyId": uncached.id }))?;
    world.wait_for_codes(&[uncached], "VALID")?;
    world.wait_for_codes(&story.keys(Told::Unchanged), "VALID")?;
    for agent in world.topology.agents() {
        wait_for_readiness(agent, 200)?;
    }
    Ok(())
}
