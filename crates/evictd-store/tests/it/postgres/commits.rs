//! R4: a COMMIT whose outcome isn't certain is no success.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evictd_core::invalidation::Cause;
use evictd_postgres_server::Postgres;
use evictd_store::change::{ChangeError, DeleteMode};
use evictd_store::postgres::PostgresStore;
use evictd_store::{ChangeStore, HomeStore, LogStore, StoreError};

use super::{connect, options, wait_for};
use crate::fixture::{actor, key, key_scope, news, populate, run_round};

/// Connections that wait for a synchronous standby's confirmation.
const COMMITTING: &str = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'";

/// A server that waits for a standby, which there isn't: from now on no COMMIT ends.
async fn waiting_for_a_standby() -> (Postgres, Arc<PostgresStore>) {
    let server = Postgres::start().unwrap();
    let store = connect(&server.url()).await;
    populate(&store, 3).await;
    server.set("synchronous_standby_names = 'absent'").unwrap();
    (server, Arc::new(store))
}

async fn deletion(store: Arc<PostgresStore>, n: u8) -> Result<(), ChangeError> {
    store.delete_key(&actor(), &key(n).id, DeleteMode::Soft, &|_| true).await
}

fn is_unknown(outcome: &Result<(), ChangeError>) -> bool {
    matches!(outcome, Err(ChangeError::Store(StoreError::Unknown { .. })))
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_whose_wait_for_a_standby_was_cancelled_is_unknown() {
    for ending in ["pg_cancel_backend", "pg_terminate_backend"] {
        let (server, store) = waiting_for_a_standby().await;
        let change = tokio::spawn(deletion(store.clone(), 1));
        wait_for(&server, &format!("SELECT count(*) {COMMITTING}"), "1");
        server.query(&format!("SELECT {ending}(pid) {COMMITTING}")).unwrap();
        let outcome = change.await.unwrap();
        assert!(is_unknown(&outcome), "{ending}: {outcome:?}");
        server.set("synchronous_standby_names = ''").unwrap();
        // Here it is, as it happens; at a fail-over it would have been lost.
        assert_eq!(news(&*store).await, [(key_scope(1), Cause::Deleted)]);
        let again = deletion(store.clone(), 1).await;
        assert!(matches!(again, Err(ChangeError::KeyNotFound)), "{ending}: {again:?}");
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_that_times_out_is_unknown_and_the_store_works() {
    let server = Postgres::start().unwrap();
    let mut options = options(&server.url());
    options.statement_timeout = Duration::from_millis(200);
    let store = Arc::new(PostgresStore::connect(options).await.unwrap());
    populate(&*store, 3).await;
    server.set("synchronous_standby_names = 'absent'").unwrap();
    let began = Instant::now();
    let outcome = deletion(store.clone(), 1).await;
    assert!(is_unknown(&outcome), "{outcome:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let round = store.round(evictd_store::log::RoundRequest::default()).await;
    assert!(
        matches!(round, Err(StoreError::Unknown { .. })),
        "who can't replicate gives no proof: {round:?}"
    );
    server.set("synchronous_standby_names = ''").unwrap();
    run_round(&*store, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_wait_for_standbys_against_the_databases_default() {
    let (server, before) = waiting_for_a_standby().await;
    before.close().await;
    let unreplicated = "SET synchronous_commit = local; ALTER DATABASE evictd SET synchronous_commit = local";
    server.query(unreplicated).unwrap();
    let store = Arc::new(connect(&server.url()).await);
    let change = tokio::spawn(deletion(store.clone(), 1));
    wait_for(&server, &format!("SELECT count(*) {COMMITTING}"), "1");
    server.set("synchronous_standby_names = ''").unwrap();
    change.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_caller_cancels_no_commit_but_an_open_transaction() {
    let (server, store) = waiting_for_a_standby().await;
    let change = tokio::spawn(deletion(store.clone(), 1));
    wait_for(&server, &format!("SELECT count(*) {COMMITTING}"), "1");
    change.abort();
    assert!(change.await.unwrap_err().is_cancelled());
    server.set("synchronous_standby_names = ''").unwrap();
    wait_for(&server, &format!("SELECT count(*) {COMMITTING}"), "0");
    assert_eq!(news(&*store).await, [(key_scope(1), Cause::Deleted)]);

    let mut stranger = super::stranger(&server.url()).await;
    sqlx::raw_sql("BEGIN; SELECT FROM keys FOR UPDATE").execute(&mut stranger).await.unwrap();
    let change = tokio::spawn(deletion(store.clone(), 2));
    super::wait_for_waiters(&server, &server.url(), 1);
    change.abort();
    assert!(change.await.unwrap_err().is_cancelled());
    sqlx::raw_sql("COMMIT").execute(&mut stranger).await.unwrap();
    store.close().await;
    let store = connect(&server.url()).await;
    assert_eq!(news(&store).await, []);
    store.delete_key(&actor(), &key(2).id, DeleteMode::Soft, &|_| true).await.unwrap();
}
