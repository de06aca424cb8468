//! A server that is killed, or stands still: every call ends, and afterwards everything works again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evictd_core::ids::KeyHash;
use evictd_core::record::{Record, RecordState};
use evictd_postgres_server::{Postgres, StopMode};
use evictd_store::change::{ChangeError, DeleteMode};
use evictd_store::log::RoundRequest;
use evictd_store::postgres::PostgresStore;
use evictd_store::{ChangeStore, LogStore, RecordStore, StoreError};

use super::{connect, options};
use crate::fixture::{actor, key, populate, run_round, workspace};

#[tokio::test(flavor = "multi_thread")]
async fn first_call_of_each_kind_succeeds_after_a_server_restart() {
    let mut server = Postgres::start().unwrap();
    let store = connect(&server.url()).await;
    populate(&store, 3).await;
    for n in 1..=3 {
        store.lookup(KeyHash([1; 32])).await.unwrap();
        store.key(&workspace(), &key(n).id).await.unwrap();
        store.replay(1, 1, 2, 10).await.unwrap();
        tokio::task::block_in_place(|| match n {
            1 => server.restart(StopMode::Fast).unwrap(),
            2 => server.restart(StopMode::Immediate).unwrap(),
            _ => {
                server.kill().unwrap();
                server.start_again().unwrap();
            }
        });
        assert!(store.key(&workspace(), &key(n).id).await.unwrap().is_some());
        store.delete_key(&actor(), &key(n).id, DeleteMode::Soft, &|_| true).await.unwrap();
        run_round(&store, &[]).await;
        store.replay(1, 1, 2, 10).await.unwrap();
        store.lookup(KeyHash([1; 32])).await.unwrap();
        store.number(10).await.unwrap();
        store.check_triggers().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_loses_no_deletion_that_was_answered() {
    let mut server = Postgres::start().unwrap();
    let store = Arc::new(connect(&server.url()).await);
    populate(&*store, 200).await;
    let done = Arc::new(tokio::sync::Notify::new());
    let deletions: Vec<_> = (1..=200)
        .map(|n| {
            let (store, done) = (store.clone(), done.clone());
            tokio::spawn(async move {
                let outcome = store.delete_key(&actor(), &key(n).id, DeleteMode::Soft, &|_| true).await;
                done.notify_one();
                (n, outcome)
            })
        })
        .collect();
    done.notified().await;
    tokio::task::block_in_place(|| {
        server.kill().unwrap();
        server.start_again().unwrap();
    });
    let mut deleted = 0;
    for deletion in deletions {
        let (n, outcome) = deletion.await.unwrap();
        let Record::Key(record) = store.lookup(KeyHash([n; 32])).await.unwrap().record else { panic!("{n}") };
        deleted += u64::from(record.state == RecordState::Deleted);
        match outcome {
            Ok(()) => assert_eq!(record.state, RecordState::Deleted, "key {n}"),
            Err(ChangeError::Store(StoreError::Unknown { .. })) => {}
            Err(ChangeError::Store(StoreError::Database { .. })) => {
                assert_eq!(record.state, RecordState::Active, "key {n}");
            }
            Err(error) => panic!("key {n}: {error:?}"),
        }
    }
    assert!(deleted > 0);
    let start = store.head().await.unwrap().at.position();
    let numbered = store.number(1000).await.unwrap();
    assert_eq!(numbered.rows.len() as u64, deleted, "each has its row");
    assert_eq!(numbered.head.at.position(), start + deleted);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_to_a_frozen_server_end_and_work_after_the_thaw() {
    let server = Postgres::start().unwrap();
    let mut options = options(&server.url());
    options.statement_timeout = Duration::from_millis(500);
    let store = Arc::new(PostgresStore::connect(options).await.unwrap());
    populate(&*store, 2).await;
    store.lookup(KeyHash([1; 32])).await.unwrap();
    tokio::task::block_in_place(|| server.freeze().unwrap());

    for round in 0..2 {
        let began = Instant::now();
        let (actor, id) = (actor(), key(1).id);
        let (proof, lookup, change, numbered) = tokio::join!(
            store.round(RoundRequest::default()),
            store.lookup(KeyHash([1; 32])),
            store.delete_key(&actor, &id, DeleteMode::Soft, &|_| true),
            store.number(10),
        );
        assert!(proof.is_err() && lookup.is_err() && change.is_err() && numbered.is_err());
        // A statement's time and two seconds, or the five that connecting may take.
        assert!(began.elapsed() < Duration::from_secs(8), "attempt {round}: {:?}", began.elapsed());
    }
    tokio::task::block_in_place(|| server.thaw().unwrap());
    run_round(&*store, &[]).await;
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    store.lookup(KeyHash([1; 32])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn publisher_frozen_in_a_round_delays_others_for_seconds_only() {
    let server = Postgres::start().unwrap();
    let store = connect(&server.url()).await;
    populate(&store, 1).await;
    // As a publisher that is stopped between two statements leaves it.
    let mut frozen = super::stranger(&server.url()).await;
    let middle =
        "SET idle_in_transaction_session_timeout = 1000; BEGIN; UPDATE log_head SET rounds = rounds + 1";
    sqlx::raw_sql(middle).execute(&mut frozen).await.unwrap();
    run_round(&store, &[]).await;
}
