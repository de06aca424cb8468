//! The store's files are moved away under the publisher, and back.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use evictd_tests::wait::try_eventually;
use serde_json::json;

use super::{DeletionRequest, ClientHistory, DeleteAnswer, wait_for_log, with_store_in};
use crate::world::{Caller, Key, SOON, World, wait_for_readiness};

/// Asks for the deletion of `keys` while the store isn't where it belongs: each is refused, and stays VALID. The
/// publisher says so, and goes on reading.
fn assert_refused<'k>(world: &World, keys: &'k [Key]) -> Result<ClientHistory<'k>> {
    let caller = Caller::new(world, world.publisher());
    let story = ClientHistory(keys.iter().map(|key| DeletionRequest::of(&caller, key)).collect::<Result<_>>()?);
    assert_eq!(story.count(DeleteAnswer::Unchanged), keys.len(), "a deletion that nobody will find again");
    let created = world.topology.call(world.publisher(), "keys.createKey", &json!({ "apiId": world.api }))?;
    assert_eq!(created.status, 500, "{}", created.text);
    let unready = wait_for_readiness(world.publisher(), 503)?;
    let detail = unready["waitingFor"][0]["detail"].as_str().unwrap_or_default();
    ensure!(unready["waitingFor"][0]["condition"] == "store" && detail.contains("put it back"), "{unready}");
    wait_for_log(world, "put it back")?;
    world.call("keys.getKey", &json!({ "keyId": keys[0].id }))?;
    world.wait_for_codes(&keys.iter().collect::<Vec<_>>(), "VALID")?;
    Ok(story)
}

/// It is back: the publisher goes on by itself, and what it had refused can be done.
fn assert_healed(world: &World, story: ClientHistory<'_>) -> Result<()> {
    wait_for_readiness(world.publisher(), 200)?;
    let caller = Caller::new(world, world.publisher());
    let again = story.keys(DeleteAnswer::Unchanged).into_iter().map(|key| DeletionRequest::of(&caller, key));
    let again = again.collect::<Result<Vec<_>>>()?;
    ensure!(again.iter().all(|asked| asked.answer == DeleteAnswer::Deleted), "it is back, and somebody was refused");
    ClientHistory(story.0.into_iter().chain(again).collect()).check(world)?;
    world.assert_works()
}

/// Failure: the publisher goes on writing into a file that was moved away, where nobody will find it again.
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

/// Failure: as above, with all that belongs to it.
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

/// Failure: a copy takes the file's place under the publisher, say by a restore, and the publisher writes into the
/// one that is no longer there.
#[test]
fn a_replaced_store_file_refuses_changes_until_a_restart() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let keys = world.create_keys(4)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    // As a backup is made: of all that is committed.
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

/// Failure: somebody tidies up beside the store, and all that is committed from then on is lost at the next start.
#[test]
fn a_store_without_its_wal_refuses_changes_and_loses_nothing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut world = World::start(&with_store_in(&dir.path().join("store"))?)?;
    let keys = world.create_keys(6)?;
    world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;
    let before = DeletionRequest::of(&Caller::new(&world, world.publisher()), &keys[5])?;
    assert_eq!(before.answer, DeleteAnswer::Deleted);
    fs::remove_file(format!("{}-wal", world.store().display()))?;
    let mut story = assert_refused(&world, &keys[..5])?;
    story.0.push(before);
    // At its end, it folds what it still has open back into the file.
    ensure!(world.topology.publisher.daemon.stop(SOON)?.success());
    world.topology.publisher.restart()?;
    try_eventually("the log to be complete", SOON, || {
        let deleted = format!("SELECT deleted_at_m IS NOT NULL FROM keys WHERE id = '{}'", keys[5].id);
        Ok((world.sql(&deleted)? == "1").then_some(()))
    })?;
    assert_healed(&world, story)
}
