//! Rounds and the rows that they write.

use evictd_core::roster::{Instance, PartitionPolicy};
use sqlx::Row;

use super::{populated, stranger};
use crate::fixture::{instance, run_round};

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
