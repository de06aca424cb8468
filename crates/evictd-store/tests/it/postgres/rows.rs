//! Rounds and the rows that they write.

use evictd_core::invalidation::Cause;
use evictd_core::roster::{Instance, PartitionPolicy};
use evictd_store::change::DeleteMode;
use evictd_store::{ChangeStore as _, ReceiptStore as _};
use sqlx::Row;

use super::{after, populated, stranger};
use crate::fixture::{asking, instance, key, key_scope, news, run_round, workspace};

#[tokio::test]
async fn each_round_is_counted_and_writes_no_instance_that_is_known() {
    let fixture = populated(0).await;
    let mut connection = stranger(&fixture.url).await;
    run_round(&fixture.store, &[instance(1), instance(u64::MAX)]).await;
    let look =
        "SELECT rounds, (SELECT string_agg(instance || policy || xmin, ' ' ORDER BY instance) FROM roster)
                FROM log_head";
    let mut before = sqlx::query(look).fetch_one(&mut connection).await.unwrap();
    let read = |row: &sqlx::postgres::PgRow| (row.get::<i64, _>(0), row.get::<String, _>(1));
    for _ in 0..3 {
        run_round(&fixture.store, &[instance(1)]).await;
        let now = sqlx::query(look).fetch_one(&mut connection).await.unwrap();
        assert!(read(&now).0 > read(&before).0);
        assert_eq!(read(&now).1, read(&before).1, "known instances cost no write");
        before = now;
    }
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
    run_round(&fixture.store, &[stale]).await;
    let now = sqlx::query(look).fetch_one(&mut connection).await.unwrap();
    assert!(read(&now).1.starts_with("0000000000000001serve_stale"), "{}", read(&now).1);
}

/// Failure: a user who may change keys evades the audit log by naming a request, or makes a receipt for it.
#[tokio::test]
async fn change_by_sql_that_names_a_request_is_recorded_as_sql() {
    let fixture = populated(3).await;
    let deleted =
        fixture.store.delete_key(&asking("req_real"), &key(1).id, DeleteMode::Soft, &|_| true).await;
    deleted.unwrap();
    news(&fixture.store).await;
    // A request of its own invention, and one that was really made.
    for (request, id) in [("req_false", 2), ("req_real", 3)] {
        let sql = format!(
            "BEGIN; SET LOCAL evictd.request_id = '{request}'; UPDATE keys SET enabled = false WHERE id = '{}'; COMMIT",
            key(id).id
        );
        assert_eq!(after(&fixture, &sql).await, [(key_scope(id), Cause::Changed)]);
    }
    let count = "SELECT count(*) FILTER (WHERE actor_type = 'database'), count(*) FILTER (WHERE correlation_id IS NOT NULL)
                 FROM audit_log WHERE event = 'key.update' OR event = 'key.delete'";
    let mut connection = stranger(&fixture.url).await;
    let row = sqlx::query(count).fetch_one(&mut connection).await.unwrap();
    assert_eq!((row.get::<i64, _>(0), row.get::<i64, _>(1)), (2, 1));
    assert!(fixture.store.receipt(&workspace(), "req_false").await.unwrap().is_none());
}
