//! Many clients delete the same objects at the same time.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::thread;

use anyhow::{Result, anyhow};
use serde_json::json;

use super::{ClientHistory, DeleteAnswer, DeletionRequest, check_log, check_receipts};
use crate::world::{ApiClient, Key, World, plan};

/// Makes each of `calls` on its own thread and connection, all at the same moment. Returns the answers in the order of
/// the calls.
fn at_once<T: Sync, R: Send>(calls: &[T], call: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let start = Barrier::new(calls.len());
    thread::scope(|scope| {
        let clients: Vec<_> = calls
            .iter()
            .map(|item| {
                let (call, start) = (&call, &start);
                scope.spawn(move || {
                    start.wait();
                    call(item)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

/// Failure: two clients get success for the deletion of one key, or the log has it twice.
#[test]
fn one_of_a_hundred_concurrent_deletions_of_a_key_succeeds() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    let caller = ApiClient::new(&world, world.publisher());
    let story = ClientHistory(at_once(&[&key; 100], |key| DeletionRequest::of(&caller, key))?);
    assert_eq!((story.count(DeleteAnswer::Deleted), story.count(DeleteAnswer::NotFound)), (1, 99));
    let rows =
        format!("SELECT count(*) FROM invalidations WHERE key_id = '{}' AND cause = 'deleted'", key.id);
    assert_eq!(world.sql(&rows)?, "1");
    let records = "SELECT count(*) FROM audit_log WHERE event = 'key.delete'";
    assert_eq!(world.sql(records)?, "1");
    story.check(&world)?;
    world.assert_works()
}

/// The object that a client deletes.
enum DeletionTarget<'k> {
    Key(&'k Key),
    Api,
}

/// Failure: a key's deletion and that of its API block each other, or one deletion is reported twice or not at all.
#[test]
fn keys_and_their_api_deleted_together_are_deleted_once() -> Result<()> {
    let world = World::start(&plan(&["eu", "us"]))?;
    let (api, bystander) = (world.create_api()?, world.create_key()?);
    let keys = (0..50).map(|_| world.create_key_with(json!({ "apiId": api }))).collect::<Result<Vec<_>>>()?;
    let keys: Vec<&Key> = keys.iter().collect();
    world.cache_everywhere(&keys)?;
    let caller = ApiClient::new(&world, world.publisher());
    // Alternating, so that neither kind starts before the other.
    let deletions: Vec<DeletionTarget> =
        keys.iter().flat_map(|key| [DeletionTarget::Key(key), DeletionTarget::Api]).collect();
    let answers = at_once(&deletions, |deletion| match deletion {
        DeletionTarget::Key(key) => caller.call("keys.deleteKey", &json!({ "keyId": key.id })),
        DeletionTarget::Api => caller.call("apis.deleteApi", &json!({ "apiId": api })),
    })?;
    let (mut of_api, mut of_keys) = (BTreeMap::new(), BTreeMap::new());
    for (deletion, answer) in deletions.iter().zip(&answers) {
        let counts = if matches!(deletion, DeletionTarget::Api) { &mut of_api } else { &mut of_keys };
        *counts.entry(DeleteAnswer::by(answer).map(|answer| format!("{answer:?}"))?).or_insert(0) += 1;
    }
    println!("keys: {of_keys:?}, their API: {of_api:?}");
    assert_eq!(of_api, BTreeMap::from([("Deleted".to_owned(), 1), ("NotFound".to_owned(), 49)]));
    assert_eq!(of_keys.values().sum::<i32>(), 50);

    world.assert_gone(&keys)?;
    world.wait_until_caught_up()?;
    check_log(&world)?;
    // One row, one record and one receipt for each request that got success, and none for the others.
    let done = answers.iter().filter(|answer| answer.status == 200);
    let done: Vec<&str> = done.filter_map(|answer| answer.body["meta"]["requestId"].as_str()).collect();
    for request in &done {
        let rows = format!("SELECT count(*) FROM invalidations WHERE request_id = '{request}'");
        assert_eq!(world.sql(&rows)?, "1", "{request}");
    }
    check_receipts(&world, done.iter().copied())?;
    let deletions = world.sql("SELECT count(*) FROM invalidations WHERE cause = 'deleted'")?;
    assert_eq!(deletions, done.len().to_string());
    world.wait_for_codes(&[&bystander], "VALID")?;
    world.assert_works()
}
