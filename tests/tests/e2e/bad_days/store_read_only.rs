//! The store's disk becomes read-only under the publisher, as a kernel makes it after an error, and back.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use evictd_tests::disk::ReadOnly;
use evictd_tests::wait::try_eventually;
use serde_json::json;

use super::{DeletionRequest, ClientHistory, DeleteAnswer, wait_for_log, with_store_in};
use crate::world::{Caller, Key, SOON, World, count, wait_for_readiness};

/// Everything of the store that is on its disk.
fn files(world: &World) -> Result<Vec<PathBuf>> {
    let store = world.store();
    let dir = store.parent().map(PathBuf::from).unwrap_or_default();
    let inside = std::fs::read_dir(&dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(inside.into_iter().chain([dir]).collect())
}

/// Failure: a change that couldn't be written is answered with success; the publisher looks well; when the disk can
/// be written to again, it has to be restarted.
#[test]
fn a_read_only_disk_refuses_changes_until_it_is_writable() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let (keys, uncached) = (world.create_keys(6)?, world.create_key()?);
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let read_only = ReadOnly::make(&files(&world)?)?;
    let caller = Caller::new(&world, world.publisher());
    let story = ClientHistory(keys.iter().map(|key| DeletionRequest::of(&caller, key)).collect::<Result<_>>()?);
    println!("{:?}", story.0.iter().map(|asked| asked.answer).collect::<Vec<_>>());
    assert_eq!(story.count(DeleteAnswer::Deleted), 0, "a deletion that was written nowhere");
    tell_the_truth(&world, &keys, &uncached)?;

    drop(read_only);
    wait_for_readiness(world.publisher(), 200)?;
    let mut again = Vec::new();
    for key in &keys {
        again.push(try_eventually("a deletion to be written", SOON, || {
            let asked = DeletionRequest::of(&caller, key)?;
            Ok((asked.answer == DeleteAnswer::Deleted).then_some(asked))
        })?);
    }
    ClientHistory(story.0.into_iter().chain(again).collect()).check(&world)?;
    world.assert_works()?;

    // One that starts there says what to do, and ends.
    let read_only = ReadOnly::make(&files(&world)?)?;
    world.topology.publisher.daemon.restart()?;
    let ended = world.topology.publisher.daemon.wait_exit(SOON)?;
    ensure!(!ended.success(), "it started on a disk that it can't write to");
    wait_for_log(&world, "must be writable")?;
    drop(read_only);
    world.topology.publisher.restart()?;
    world.assert_works()
}

/// While the disk is read-only: reads go on, and everybody who looks sees what is wrong.
fn tell_the_truth(world: &World, keys: &[Key], uncached: &Key) -> Result<()> {
    let unready = wait_for_readiness(world.publisher(), 503)?;
    ensure!(unready["waitingFor"][0]["condition"] == "store", "{unready}");
    ensure!(count(world.publisher(), "evictd_publisher_requests_total", &[("class", "5xx")])? > 0);
    world.call("keys.getKey", &json!({ "keyId": uncached.id }))?;
    world.wait_for_codes(&[uncached], "VALID")?;
    world.wait_for_codes(&keys.iter().collect::<Vec<_>>(), "VALID")?;
    for agent in world.topology.agents() {
        wait_for_readiness(agent, 200)?;
    }
    Ok(())
}
