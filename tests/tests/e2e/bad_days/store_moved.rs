//! The store's files are moved away while the publisher runs, and moved back.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use evictd_tests::wait::try_eventually;
use serde_json::json;

use super::{ClientHistory, DeleteAnswer, DeletionRequest, wait_for_log, with_store_in};
use crate::world::{ApiClient, Key, SOON, World, wait_for_readiness};

/// Deletes `keys` while the store isn't at its path. Each deletion is refused, and the key stays VALID. The publisher
/// isn't ready, and still answers reads.
fn assert_refused<'k>(world: &World, keys: &'k [Key]) -> Result<ClientHistory<'k>> {
    let caller = ApiClient::new(world, world.publisher());
    let story =
        ClientHistory(keys.iter().map(|key| DeletionRequest::of(&caller, key)).collect::<Result<_>>()?);
    assert_eq!(
        story.count(DeleteAnswer::Unchanged),
        keys.len(),
        "a deletion was written to a file that is no longer the store"
    );
    let created = world.topology.call(world.publisher(), "keys.createKey", &json!({ "apiId": world.api }))?;
    assert_eq!(created.status, 500, "{}", created.text);
    try_eventually("the store's condition to be unmet", SOON, || {
        let unready = wait_for_readiness(world.publisher(), 503)?;
        let unmet = unready["waitingFor"].as_array().cloned().unwrap_or_default();
        let store = unmet.iter().find(|unmet| unmet["condition"] == "store");
        Ok(store.and_then(|store| store["detail"].as_str()?.contains("put it back").then_some(())))
    })?;
    wait_for_log(world, "put it back")?;
    world.call("keys.getKey", &json!({ "keyId": keys[0].id }))?;
    world.wait_for_codes(&keys.iter().collect::<Vec<_>>(), "VALID")?;
    Ok(story)
}

/// The store is back: the publisher recovers without help, and the refused deletions succeed.
fn assert_healed(world: &World, story: ClientHistory<'_>) -> Result<()> {
    wait_for_readiness(world.publisher(), 200)?;
    let caller = ApiClient::new(world, world.publisher());
    let again = story.keys(DeleteAnswer::Unchanged).into_iter().map(|key| DeletionRequest::of(&caller, key));
    let again = again.collect::<Result<Vec<_>>>()?;
    let all_deleted = again.iter().all(|request| request.answer == DeleteAnswer::Deleted);
    ensure!(all_deleted, "the store is back, and a deletion was refused");
    ClientHistory(story.0.into_iter().chain(again).collect()).check(world)?;
    world.assert_works()
}

/// Failure: the publisher continues to write to a file that was moved away, and the changes are lost.
#[test]
fn changes_are_refused_while_the_store_file_is_moved_away() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let keys = world.create_keys(4)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let away = dir.path().join("away.db");
    fs::rename(world.store(), &away)?;
    let story = assert_refused(&world, &keys)?;
    ensure!(!world.store().exists(), "a new store was created in its place");
    fs::rename(&away, world.store())?;
    assert_healed(&world, story)
}

/// Failure: as above, for the whole directory.
#[test]
fn changes_are_refused_while_the_directory_is_moved_away() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (store, away) = (dir.path().join("store"), dir.path().join("away"));
    let world = World::start(&with_store_in(&store)?)?;
    let keys = world.create_keys(4)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    fs::rename(&store, &away)?;
    let story = assert_refused(&world, &keys)?;
    ensure!(!store.exists(), "something was created in its place");
    fs::rename(&away, &store)?;
    assert_healed(&world, story)
}

/// Failure: a copy replaces the file while the publisher runs, as in a restore. The publisher continues to write to the
/// replaced file.
#[test]
fn a_replaced_store_file_refuses_changes_until_a_restart() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let keys = world.create_keys(4)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    // A backup holds everything that is committed.
    let copy = dir.path().join("copy.db");
    world.sql(&format!("VACUUM INTO '{}'", copy.display()))?;
    fs::rename(&copy, world.store())?;
    let story = assert_refused(&world, &keys)?;

    for suffix in ["-wal", "-shm"] {
        let leftover = PathBuf::from(format!("{}{suffix}", world.store().display()));
        world.topology.publisher.daemon.stop(SOON)?;
        if leftover.exists() {
            fs::remove_file(&leftover).with_context(|| format!("removing {}", leftover.display()))?;
        }
    }
    world.topology.publisher.restart()?;
    assert_healed(&world, story)
}

/// Failure: the write-ahead log is removed while the publisher runs, and all later commits are lost at the next start.
#[test]
fn a_store_without_its_wal_refuses_changes_and_loses_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let keys = world.create_keys(6)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let before = DeletionRequest::of(&ApiClient::new(&world, world.publisher()), &keys[5])?;
    assert_eq!(before.answer, DeleteAnswer::Deleted);
    fs::remove_file(format!("{}-wal", world.store().display()))?;
    let mut story = assert_refused(&world, &keys[..5])?;
    story.0.push(before);
    // At its shutdown, it writes the log that it still has open back into the file.
    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    world.topology.publisher.restart()?;
    try_eventually("the log to be complete", SOON, || {
        let deleted = format!("SELECT deleted_at_m IS NOT NULL FROM keys WHERE id = '{}'", keys[5].id);
        Ok((world.sql(&deleted)? == "1").then_some(()))
    })?;
    assert_healed(&world, story)
}
