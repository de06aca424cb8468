//! The publisher is killed repeatedly during many deletions.

use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use evictd_tests::wait::{eventually, try_eventually};
use serde_json::json;

use super::{ClientHistory, DeleteAnswer, DeletionRequest, check_log, check_receipts};
use crate::world::{ApiClient, Key, SOON, World, flushes, plan};

/// Deletes `keys` one after the other, and waits while the publisher is down. Counts the answers in `answered`.
fn delete_all<'k>(
    caller: &ApiClient,
    publisher: SocketAddr,
    keys: &'k [Key],
    answered: &AtomicUsize,
) -> Result<ClientHistory<'k>> {
    let mut story = ClientHistory::default();
    for key in keys {
        let Ok(answer) = caller.call("keys.deleteKey", &json!({ "keyId": key.id })) else {
            // It may have been carried out.
            let (request, took) = (String::new(), Duration::ZERO);
            story.0.push(DeletionRequest { key, answer: DeleteAnswer::Unknown, request, took });
            eventually("the publisher to be back", SOON, || TcpStream::connect(publisher).ok())?;
            continue;
        };
        story.0.push(DeletionRequest::by(&answer, key)?);
        answered.fetch_add(1, Ordering::Relaxed);
    }
    Ok(story)
}

/// Failure: a deletion that was committed when the publisher was killed has no position, no message or no receipt, or
/// has one twice.
#[test]
fn deletions_are_announced_and_receipted_once_across_kills() -> Result<()> {
    const CLIENTS: usize = 8;
    const KILLS: usize = 5;
    const BETWEEN: usize = 80;
    const KEYS: usize = CLIENTS * (KILLS + 1) * BETWEEN / 4;
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let keys = world.create_keys(KEYS)?;
    world.wait_until_caught_up()?;
    let (caller, publisher) = (ApiClient::new(&world, world.publisher()), world.publisher().http);
    let answered = AtomicUsize::new(0);
    let story = thread::scope(|scope| {
        let clients: Vec<_> = keys
            .chunks(KEYS / CLIENTS)
            .map(|keys| (keys, caller.clone(), &answered))
            .map(|(keys, caller, answered)| {
                scope.spawn(move || delete_all(&caller, publisher, keys, answered))
            })
            .collect();
        for kill in 1..=KILLS {
            eventually("deletions to be in flight", SOON, || {
                (answered.load(Ordering::Relaxed) >= kill * BETWEEN).then_some(())
            })?;
            world.topology.publisher.daemon.restart()?;
        }
        let mut story = ClientHistory::default();
        for client in clients {
            story.0.extend(client.join().map_err(|_| anyhow!("a client panicked"))??.0);
        }
        Ok::<_, anyhow::Error>(story)
    })?;
    let unanswered = story.count(DeleteAnswer::Unknown);
    println!(
        "{} deletions were answered, {unanswered} met one of {KILLS} kills",
        story.count(DeleteAnswer::Deleted)
    );
    assert_eq!(story.0.len(), story.count(DeleteAnswer::Deleted) + unanswered, "a deletion was refused");
    ensure!(unanswered >= KILLS, "the kills met too few requests");
    world.topology.publisher.wait_until_ready()?;
    story.check(&world)?;
    for agent in world.topology.agents() {
        assert_eq!(flushes(agent)?, 0, "a publisher's restart flushed an agent's cache");
    }
    world.assert_works()
}

/// Failure: a publisher committed a deletion just before it was killed, and its client got no answer. The next
/// publisher announces the deletion, but it has no receipt.
#[test]
fn next_publisher_issues_receipts_of_unnumbered_deletions() -> Result<()> {
    let mut world = World::start(&plan(&["eu", "us"]))?;
    let key = world.create_key()?;
    world.cache_everywhere(&[&key])?;
    world.delete(&world.create_key()?)?;
    world.wait_until_caught_up()?;
    world.topology.publisher.daemon.kill()?;
    // This is what its last transaction leaves: the key, its row without a position, and its audit record.
    world.sql(&format!("UPDATE keys SET deleted_at_m = 1 WHERE id = '{}'", key.id))?;
    world.sql("UPDATE invalidations SET request_id = 'req_last' WHERE position IS NULL")?;
    let (columns, changed) = audit_columns(&world)?;
    world.sql(&format!(
        "INSERT INTO audit_log ({columns}) SELECT {changed} FROM audit_log WHERE event = 'key.delete'"
    ))?;

    world.topology.publisher.restart()?;
    world.assert_gone(&[&key])?;
    world.wait_until_caught_up()?;
    check_log(&world)?;
    let body = json!({ "requestId": "req_last" });
    let receipt = try_eventually("the receipt to be final", SOON, || {
        let receipt = world.call("propagation.getReceipt", &body)?;
        Ok((receipt["final"] == true).then_some(receipt))
    })?;
    assert_eq!((&receipt["state"], &receipt["measuredFrom"]), (&json!("confirmed"), &json!("first_sight")));
    check_receipts(&world, ["req_last"].into_iter())?;
    world.assert_works()
}

/// Returns the columns of an audit record, and the same list with another event id and request.
fn audit_columns(world: &World) -> Result<(String, String)> {
    let columns = world.sql("SELECT group_concat(name) FROM pragma_table_info('audit_log')")?;
    let changed = columns.replace("event_id", "'log_last'").replace("correlation_id", "'req_last'");
    Ok((columns, changed))
}
