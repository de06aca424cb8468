//! R2: a store that was put back begins a new epoch, however that was done, and nothing else does.

use std::ops::RangeInclusive;
use std::time::Duration;

use evictd_core::history::{BeginCause, Milestone, Past};
use evictd_store::audit::Purge;
use evictd_store::change::DeleteMode;
use evictd_store::postgres::PostgresStore;
use evictd_store::{ChangeStore, HomeStore, LogStore, RosterStore};

use super::{connect, populated, run};
use crate::fixture::{actor, end, judgment, key, milestone, populate, run_round};

/// A database of its own with so many keys, and a store on it.
async fn home(name: &str, keys: u8) -> (String, PostgresStore) {
    let url = evictd_postgres_server::shared().unwrap().create_database(name).unwrap();
    let store = connect(&url).await;
    populate(&store, keys).await;
    (url, store)
}

/// Deletes keys and numbers that: what agents have seen of a history that is about to be lost.
async fn go_on(store: &PostgresStore, deleted: RangeInclusive<u8>) -> Milestone {
    for n in deleted {
        store.delete_key(&actor(), &key(n).id, DeleteMode::Soft, &|_| true).await.unwrap();
    }
    store.number(usize::MAX).await.unwrap();
    milestone(store).await
}

/// More changes by direct SQL than were lost. Then the sequencer numbers before any probe reports a seen position.
async fn assert_branches(url: &str, seen: Milestone) {
    run(url, "UPDATE keys SET enabled = false WHERE id > 'key_1'").await;
    let store = connect(url).await;
    let numbered = store.number(usize::MAX).await.unwrap();
    assert!(numbered.rows.len() > 5);
    let seen_to = seen.at.position();
    assert_eq!(numbered.head.at.epoch(), seen.at.epoch() + 1);
    assert!(numbered.rows.iter().all(|row| row.position > seen.at && row.position.position() > seen_to));
    assert_eq!(judgment(&store, &seen).await, Past::Superseded);
    let history = store.history().await.unwrap();
    assert_eq!((history.begins().len(), history.current().cause), (2, BeginCause::Branched));
    assert_eq!(run_round(&store, &[]).await.began, None, "once");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_that_is_loaded_where_it_came_from_begins_an_epoch() {
    let server = evictd_postgres_server::shared().unwrap();
    let (url, store) = home("restored", 20).await;
    let dump = server.dump(&url).unwrap();
    let seen = go_on(&store, 1..=5).await;
    store.close().await;
    server.query("DROP DATABASE restored").unwrap();
    server.create_database("restored").unwrap();
    server.load(&url, &dump).unwrap();
    assert_branches(&url, seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_refilled_in_place_begin_an_epoch() {
    let (url, store) = home("refilled", 20).await;
    run(&url, "CREATE SCHEMA kept; CREATE TABLE kept.log_head AS SELECT * FROM log_head").await;
    let seen = go_on(&store, 1..=5).await;
    let refill = "BEGIN; TRUNCATE log_head; INSERT INTO log_head SELECT * FROM kept.log_head;
                  DELETE FROM invalidations WHERE position > (SELECT head FROM log_head); COMMIT";
    run(&url, refill).await;
    // What doesn't begin an epoch doesn't hide that one is due either.
    store.mark_roster_complete(1).await.unwrap();
    assert_branches(&url, seen).await;
    assert_eq!(end(&store).await.epoch(), 2, "the old connections see it, too");
}

#[tokio::test]
async fn a_database_that_was_made_of_another_begins_an_epoch() {
    let server = evictd_postgres_server::shared().unwrap();
    let (url, store) = home("template_home", 20).await;
    let common = run_round(&store, &[]).await.numbered.head.round;
    store.close().await;
    server.query("CREATE DATABASE template_copy TEMPLATE template_home").unwrap();
    let store = connect(&url).await;
    let seen = go_on(&store, 1..=5).await;
    let own = run_round(&store, &[]).await.numbered.head.round;
    assert!(store.has_round_token(common).await.unwrap() && store.has_round_token(own).await.unwrap());
    store.close().await;
    server.query("DROP DATABASE template_home").unwrap();
    server.query("ALTER DATABASE template_copy RENAME TO template_home").unwrap();
    let copy = connect(&url).await;
    assert!(copy.has_round_token(common).await.unwrap());
    assert!(!copy.has_round_token(own).await.unwrap(), "a rival's");
    copy.close().await;
    assert_branches(&url, seen).await;
}

#[tokio::test]
async fn table_maintenance_and_taking_turns_begin_no_epoch() {
    let fixture = populated(3).await;
    let other = connect(&fixture.url).await;
    let before = end(&other).await;
    for upkeep in [
        "VACUUM (FULL, FREEZE) log_head",
        "ALTER TABLE log_head ADD COLUMN mine integer DEFAULT 7",
        "BEGIN; SELECT FROM log_head FOR UPDATE; SELECT FROM log_head FOR SHARE; COMMIT",
        "REINDEX TABLE log_head; ANALYZE log_head",
    ] {
        run(&fixture.url, upkeep).await;
        fixture.store.mark_roster_complete(1).await.unwrap();
        let all = Purge { log: Duration::ZERO, receipts: Duration::ZERO, audit: None, limit: 100 };
        other.purge(all).await.unwrap();
        let (one, two) = tokio::join!(run_round(&fixture.store, &[]), run_round(&other, &[]));
        assert_eq!((one.began, two.began), (None, None), "{upkeep}");
    }
    assert_eq!(end(&other).await, before);
}
