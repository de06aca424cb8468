//! The store's disk is full, and later has room again.

use anyhow::{Context, Result, bail, ensure};
use evictd_tests::disk::{SmallDisk, in_private_mounts};
use evictd_tests::http::Client;
use evictd_tests::wait::try_eventually;
use serde_json::json;

use super::{ClientHistory, DeleteAnswer, DeletionRequest, wait_for_log, with_store_in};
use crate::world::{ApiClient, Key, SOON, World, count, wait_for_readiness};

/// Failure: a deletion without room on the disk is answered with success, or is half done. Or the publisher looks
/// ready, or needs a restart when there is room again.
#[test]
fn a_full_disk_refuses_only_changes_until_there_is_room() -> Result<()> {
    const THIS: &str = "bad_days::store_full::a_full_disk_refuses_only_changes_until_there_is_room";
    in_private_mounts(THIS, || {
        let dir = tempfile::tempdir()?;
        let disk = SmallDisk::mount(&dir.path().join("disk"), 16 * 1024)?;
        let world = World::start(&with_store_in(disk.dir())?)?;
        let (keys, uncached) = (world.create_keys(400)?, world.create_key()?);
        world.cache_everywhere(&keys.iter().collect::<Vec<_>>())?;

        disk.fill()?;
        let refused = fill_the_store(&world)?;
        let story = delete_until_it_is_known_to_be_full(&world, &keys)?;
        println!("{} deletions still found room", story.count(DeleteAnswer::Deleted));
        assert_eq!(
            story.count(DeleteAnswer::Unknown),
            0,
            "a full disk has stored nothing, so no result is unknown"
        );
        assert_only_changes_suffer(&world, &story, refused, &uncached)?;

        disk.make_room()?;
        wait_for_readiness(world.publisher(), 200)?;
        wait_for_log(&world, "home store works again")?;
        let caller = ApiClient::new(&world, world.publisher());
        let again =
            story.keys(DeleteAnswer::Unchanged).into_iter().map(|key| DeletionRequest::of(&caller, key));
        let again = again.collect::<Result<Vec<_>>>()?;
        ensure!(
            again.iter().all(|request| request.answer == DeleteAnswer::Deleted),
            "there is room, and a deletion was refused"
        );
        ClientHistory(story.0.into_iter().chain(again).collect()).check(&world)?;
        world.assert_works()
    })
}

/// Creates large keys until several are refused, and returns how many were. The store's own files have free space for
/// thousands of deletions, and this uses it up.
fn fill_the_store(world: &World) -> Result<u64> {
    let large = json!({ "apiId": world.api, "meta": { "what": "x".repeat(16_000) } });
    let mut refused = 0;
    for _ in 0..2_000 {
        let answer = world.topology.call(world.publisher(), "keys.createKey", &large)?;
        refused += u64::from(answer.status == 500);
        ensure!([200, 500].contains(&answer.status), "{}", answer.text);
        if refused == 5 {
            return Ok(refused);
        }
    }
    bail!("the disk is never full")
}

/// Deletes keys one after the other until several are refused and the publisher isn't ready. A single deletion may
/// still find room; then it succeeds, and the publisher is ready again.
fn delete_until_it_is_known_to_be_full<'k>(world: &World, keys: &'k [Key]) -> Result<ClientHistory<'k>> {
    let (caller, client) = (ApiClient::new(world, world.publisher()), Client::new());
    let readyz = format!("http://{}/readyz", world.publisher().admin);
    let mut left = keys.iter();
    let mut story = ClientHistory::default();
    try_eventually("the publisher to detect that its disk is full", SOON, || {
        let key = left.next().context("the publisher is ready although its disk is full")?;
        story.0.push(DeletionRequest::of(&caller, key)?);
        let unready = client.get(&readyz)?;
        let known = unready.status == 503 && unready.body["waitingFor"][0]["condition"] == "store";
        Ok((known && story.count(DeleteAnswer::Unchanged) >= 5).then_some(()))
    })?;
    Ok(story)
}

/// While the disk is full, reads succeed, and logs and metrics show the cause.
fn assert_only_changes_suffer(
    world: &World,
    story: &ClientHistory,
    other_refusals: u64,
    uncached: &Key,
) -> Result<()> {
    wait_for_log(world, "database or disk is full")?;
    let refused = count(world.publisher(), "evictd_publisher_requests_total", &[("class", "5xx")])?;
    assert_eq!(refused, other_refusals + story.count(DeleteAnswer::Unchanged) as u64);
    ensure!(count(world.publisher(), "evictd_publisher_store_failures_total", &[])? > 0);
    world.call("keys.getKey", &json!({ "keyId": uncached.id }))?;
    world.wait_for_codes(&[uncached], "VALID")?;
    world.wait_for_codes(&story.keys(DeleteAnswer::Unchanged), "VALID")?;
    for agent in world.topology.agents() {
        wait_for_readiness(agent, 200)?;
    }
    Ok(())
}
