//! A change past the control API wakes the publishers; the control API's own needn't.

use std::sync::Arc;
use std::time::Duration;

use evictd_postgres_server::Postgres;
use evictd_store::change::DeleteMode;
use evictd_store::{ChangeStore, HomeStore, LogStore, OperatorStore};
use sqlx::postgres::PgListener;
use tokio::time::timeout;

use super::{DEADLINE, connect, populated, run};
use crate::fixture::{actor, key, news, operator, populate, root_key};

async fn notified(store: &dyn HomeStore) {
    timeout(DEADLINE, store.change_notified()).await.expect("no notification");
}

#[tokio::test]
async fn change_outside_the_api_is_notified_also_without_a_waiter() {
    let fixture = populated(1).await;
    notified(&fixture.store).await;
    run(&fixture.url, "UPDATE keys SET enabled = false").await;
    notified(&fixture.store).await;
    assert_eq!(news(&fixture.store).await.len(), 1);
    // A caller that asks again and again, as one in a select does, misses nothing.
    run(&fixture.url, "UPDATE keys SET enabled = true").await;
    let ask =
        async { while timeout(Duration::from_micros(1), fixture.store.change_notified()).await.is_err() {} };
    timeout(DEADLINE, ask).await.expect("no notification");
}

#[tokio::test]
async fn the_control_api_sends_no_notification_and_an_operator_does() {
    let fixture = populated(1).await;
    let mut listener = PgListener::connect(&fixture.url).await.unwrap();
    listener.listen("evictd_log").await.unwrap();
    let store = &fixture.store;
    store.create_key(&actor(), key(2)).await.unwrap();
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    news(store).await;
    run(&fixture.url, "NOTIFY evictd_log, 'nothing before'").await;
    assert_eq!(listener.recv().await.unwrap().payload(), "nothing before");
    store.revoke_root_key(&operator(), &root_key().id).await.unwrap();
    assert_eq!(listener.recv().await.unwrap().payload(), "");
    // The same connections, and their order is kept.
    store.create_key(&actor(), key(3)).await.unwrap();
    run(&fixture.url, "NOTIFY evictd_log, 'nothing between'").await;
    assert_eq!(listener.recv().await.unwrap().payload(), "nothing between");
}

#[tokio::test(flavor = "multi_thread")]
async fn listener_reconnects_and_signals_a_possible_change() {
    let mut server = Postgres::start().unwrap();
    let store = Arc::new(connect(&server.url()).await);
    populate(&*store, 1).await;
    notified(&*store).await;
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.change_notified().await }
    });
    tokio::task::block_in_place(|| {
        server.kill().unwrap();
        server.start_again().unwrap();
    });
    timeout(DEADLINE, waiting).await.expect("no notification").unwrap();
    run(&server.url(), "UPDATE keys SET enabled = false").await;
    notified(&*store).await;
    store.close().await;
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'evictd'";
    super::wait_for(&server, connections, "0");
}
