//! The store's disk becomes read-only while the publisher runs, as after a kernel error, and later writable again.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use evictd_tests::disk::ReadOnly;
use evictd_tests::wait::try_eventually;
use serde_json::json;

use super::{ClientHistory, DeleteAnswer, DeletionRequest, wait_for_log, with_store_in};
use crate::world::{ApiClient, Key, SOON, World, count, wait_for_readiness};

/// Returns the store's files and their directory.
fn files(world: &World) -> Result<Vec<PathBuf>> {
    let store = world.store();
    let dir = store.parent().map(PathBuf::from).unwrap_or_default();
    let inside = std::fs::read_dir(&dir)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(inside.into_iter().chain([dir]).collect())
}

/// Failure: a change that couldn't be written is answered with success. Or the publisher looks ready, or needs a
/// restart when the disk is writable again.
#[test]
fn a_read_only_disk_refuses_changes_until_it_is_writable() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let (keys, uncached) = (world.create_keys(6)?, world.create_key()?);
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let read_only = ReadOnly::make(&files(&world)?)?;
    let caller = ApiClient::new(&world, world.publisher());
    let story =
        ClientHistory(keys.iter().map(|key| DeletionRequest::of(&caller, key)).collect::<Result<_>>()?);
    println!("{:?}", story.0.iter().map(|request| request.answer).collect::<Vec<_>>());
    assert_eq!(story.count(DeleteAnswer::Deleted), 0, "a deletion that wasn't written got success");
    assert_outage_is_visible(&world, &keys, &uncached)?;

    drop(read_only);
    wait_for_readiness(world.publisher(), 200)?;
    let mut again = Vec::new();
    for key in &keys {
        again.push(try_eventually("a deletion to be written", SOON, || {
            let request = DeletionRequest::of(&caller, key)?;
            Ok((request.answer == DeleteAnswer::Deleted).then_some(request))
        })?);
    }
    ClientHistory(story.0.into_iter().chain(again).collect()).check(&world)?;
    world.assert_works()?;

    // A publisher that starts on a read-only disk logs what to do, and exits.
    let read_only = ReadOnly::make(&files(&world)?)?;
    world.topology.publisher.daemon.restart()?;
    let ended = world.topology.publisher.daemon.wait_exit(SOON)?;
    ensure!(!ended.success(), "it started on a read-only disk");
    wait_for_log(&world, "must be writable")?;
    drop(read_only);
    world.topology.publisher.restart()?;
    world.assert_works()
}

/// While the disk is read-only, reads succeed, and readiness and metrics show the cause.
fn assert_outage_is_visible(world: &World, keys: &[Key], uncached: &Key) -> Result<()> {
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
