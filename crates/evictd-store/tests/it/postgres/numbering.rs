//! R1: transactions commit in any order, and positions are dense and given once.

use std::sync::{Arc, Mutex};

use evictd_core::invalidation::Cause;
use evictd_store::log::Replay;
use evictd_store::{ChangeStore, HomeStore, LogStore, ReceiptStore, RosterStore};
use sqlx::Executor;

use super::{after, connect, populated, run, stranger, wait_for_waiters};
use crate::fixture::{actor, asking, instance, key, key_scope, news, receipt, run_round, workspace};

#[tokio::test]
async fn transactions_are_numbered_in_the_order_of_their_commits() {
    let fixture = populated(3).await;
    let (mut slow, mut slower) = (stranger(&fixture.url).await, stranger(&fixture.url).await);
    slow.execute("BEGIN; UPDATE keys SET enabled = false WHERE id = 'key_1'").await.unwrap();
    slower.execute("BEGIN; UPDATE keys SET enabled = false WHERE id = 'key_2'").await.unwrap();
    assert_eq!(
        after(&fixture, "UPDATE keys SET enabled = false WHERE id = 'key_3'").await,
        [(key_scope(3), Cause::Changed)],
        "it waits for none of those before it"
    );
    slower.execute("COMMIT").await.unwrap();
    assert_eq!(news(&fixture.store).await, [(key_scope(2), Cause::Changed)]);
    run_round(&fixture.store, &[]).await;
    slow.execute("COMMIT").await.unwrap();
    let last = fixture.store.number(10).await.unwrap();
    let Replay::Rows { rows: all, .. } = fixture.store.replay(1, 1, u64::MAX, 100).await.unwrap() else {
        panic!("nothing was purged")
    };
    assert_eq!(all.last(), last.rows.last());
    let positions: Vec<_> = all.iter().map(|row| row.position.position()).collect();
    assert_eq!(positions, (1..=last.head.at.position()).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_while_numbering_waits_for_its_lock_is_numbered() {
    let fixture = populated(2).await;
    let server = evictd_postgres_server::shared().unwrap();
    let mut other_publisher = stranger(&fixture.url).await;
    other_publisher.execute("BEGIN; SELECT FROM log_head FOR UPDATE").await.unwrap();
    run(&fixture.url, "UPDATE keys SET enabled = false WHERE id = 'key_1'").await;
    let store = Arc::new(fixture.store);
    let numbering = tokio::spawn({
        let store = store.clone();
        async move { news(&*store).await }
    });
    wait_for_waiters(server, &fixture.url, 1);
    run(&fixture.url, "UPDATE keys SET enabled = false WHERE id = 'key_2'").await;
    other_publisher.execute("COMMIT").await.unwrap();
    assert_eq!(
        numbering.await.unwrap(),
        [(key_scope(1), Cause::Changed), (key_scope(2), Cause::Changed)],
        "its snapshot is younger than its lock"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_publishers_that_number_under_load_share_the_positions() {
    let fixture = populated(0).await;
    let start = fixture.store.head().await.unwrap().at.position();
    let stores = [Arc::new(fixture.store), Arc::new(connect(&fixture.url).await)];
    let positions = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for (n, store) in stores.iter().enumerate() {
        for part in 0..4_u8 {
            let store = store.clone();
            tasks.push(tokio::spawn(async move {
                for k in 0..25 {
                    store.create_key(&actor(), key(n as u8 * 100 + part * 25 + k)).await.unwrap();
                }
            }));
        }
        let (numbering, rounds) = (store.clone(), store.clone());
        let (of_numbering, of_rounds) = (positions.clone(), positions.clone());
        tasks.push(tokio::spawn(async move {
            for _ in 0..40 {
                let rows = numbering.number(7).await.unwrap().rows;
                of_numbering.lock().unwrap().extend(rows.iter().map(|row| row.position.position()));
            }
        }));
        tasks.push(tokio::spawn(async move {
            for i in 0..10 {
                let rows = run_round(&*rounds, &[instance(i)]).await.numbered.rows;
                of_rounds.lock().unwrap().extend(rows.iter().map(|row| row.position.position()));
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let rest = stores[0].number(usize::MAX).await.unwrap().rows;
    let mut positions = positions.lock().unwrap().clone();
    positions.extend(rest.iter().map(|row| row.position.position()));
    positions.sort_unstable();
    assert_eq!(positions, (start + 1..=start + 200).collect::<Vec<_>>());
    assert_eq!(stores[0].roster(0).await.unwrap(), stores[1].roster(0).await.unwrap());
}

#[tokio::test]
async fn two_publishers_mark_what_has_expired_once() {
    let fixture = populated(0).await;
    let other = connect(&fixture.url).await;
    for n in 1..=50 {
        let ended = Some(evictd_core::time::StoreTime::from_millis(1_000));
        let key = evictd_store::change::NewKey { expires_at: ended, ..key(n) };
        fixture.store.create_key(&actor(), key).await.unwrap();
    }
    news(&fixture.store).await;
    let (here, there) = tokio::join!(fixture.store.expire(100), other.expire(100));
    let rest = fixture.store.expire(100).await.unwrap();
    assert_eq!(here.unwrap() + there.unwrap() + rest, 50);
    assert_eq!(news(&fixture.store).await.len(), 50);
}

#[tokio::test]
async fn numbering_uses_new_snapshots_against_the_databases_default() {
    let fixture = populated(0).await;
    let database = super::database(&fixture.url);
    let sql = format!(
        "ALTER DATABASE {database} SET default_transaction_isolation = 'serializable';
         ALTER DATABASE {database} SET synchronous_commit = off"
    );
    run(&fixture.url, &sql).await;
    let (here, there) = (connect(&fixture.url).await, connect(&fixture.url).await);
    for n in 1..=20 {
        here.create_key(&actor(), key(n)).await.unwrap();
        let (one, two) = tokio::join!(here.number(10), there.number(10));
        assert_eq!(one.unwrap().rows.len() + two.unwrap().rows.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_log_is_never_scanned_whatever_the_statistics() {
    const ROWS: u64 = 20_000;
    let fixture = populated(3).await;
    // Statistics from a moment when nearly all of the log was waiting.
    run(
        &fixture.url,
        "INSERT INTO invalidations (scope, workspace_id, cause)
         SELECT 'workspace', 'ws_1', 'changed' FROM generate_series(1, 20000)",
    )
    .await;
    run(&fixture.url, "ANALYZE").await;
    let head = run_round(&fixture.store, &[]).await.numbered.head.at;
    assert!(head.position() > ROWS);
    fixture.store.close().await;

    // What a session has read is counted when it has ended.
    let sessions = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'evictd' AND datname = '{}'",
        super::database(&fixture.url)
    );
    let rows_read = async || -> i64 {
        super::wait_for(evictd_postgres_server::shared().unwrap(), &sessions, "0");
        let sql =
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'invalidations'";
        sqlx::query_scalar(sql).fetch_one(&mut stranger(&fixture.url).await).await.unwrap()
    };
    let before = rows_read().await;
    let store = connect(&fixture.url).await;
    for n in 1..=10 {
        let request = asking(&format!("req_{n}"));
        store.create_key(&request, key(n + 10)).await.unwrap();
        store.version().await.unwrap();
        let numbered = store.number(10).await.unwrap();
        assert_eq!(numbered.rows.len(), 1);
        store.number(10).await.unwrap();
        store.version().await.unwrap();
        store.backlog().await.unwrap();
        run_round(&store, &[instance(1)]).await;
        assert_eq!(store.open_requests(head, 10).await.unwrap().len(), 1);
        store.record_receipts(&[receipt(&request.request_id, numbered.head.at, "{}")]).await.unwrap();
        store.receipt(&workspace(), &request.request_id).await.unwrap();
        store.replay(1, head.position(), u64::MAX, 10).await.unwrap();
    }
    store.close().await;
    let read = rows_read().await - before;
    assert!(read < 2_000, "{read} of {ROWS} rows, in ten times ten statements");
}
