//! Rows that somebody wrote by hand, purged, or left old.

use evictd_core::invalidation::{Cause, Scope};
use evictd_core::roster::{Instance, PartitionPolicy};
use evictd_store::log::{Replay, RoundRequest};
use evictd_store::{LogStore, RosterStore, StoreError};
use sqlx::Row;

use super::{after, populated, run, stranger};
use crate::fixture::{api_id, instance, run_round, workspace};

#[tokio::test]
async fn a_row_that_does_not_say_what_it_means_is_widened() {
    let fixture = populated(1).await;
    let long = "x".repeat(300);
    let unchecked = "DO $$ DECLARE c name; BEGIN
             FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'invalidations'::regclass AND contype = 'c'
             LOOP EXECUTE format('ALTER TABLE invalidations DROP CONSTRAINT %I', c); END LOOP; END $$;";
    let rows = after(
        &fixture,
        &format!(
            "{unchecked}
             INSERT INTO invalidations (scope, api_id, cause) VALUES ('key', 'api_1', 'erased');
             INSERT INTO invalidations (scope, api_id, workspace_id, cause)
             VALUES ('api', '{long}', 'ws_1', 'odd');
             INSERT INTO invalidations (scope, workspace_id, cause) VALUES ('workspace', '{long}', 'erased');
             INSERT INTO invalidations (scope, workspace_id, cause) VALUES ('galaxy', 'ws_1', 'changed');"
        ),
    )
    .await;
    assert_eq!(
        rows,
        [
            (Scope::Api(api_id()), Cause::Erased),
            (Scope::Workspace(workspace()), Cause::Changed),
            (Scope::All, Cause::Erased),
            (Scope::All, Cause::Changed),
        ]
    );
}

#[tokio::test]
async fn a_purged_position_is_refused_and_cuts_a_replay_short() {
    let fixture = populated(5).await;
    let head = fixture.store.head().await.unwrap();
    after(&fixture, "DELETE FROM invalidations WHERE position IN (1, 4)").await;
    assert_eq!(fixture.store.replay(1, 1, 3, 10).await.unwrap(), Replay::Refused { head });
    let Replay::Rows { rows, .. } = fixture.store.replay(1, 2, 6, 10).await.unwrap() else {
        panic!("2 and 3 are there")
    };
    assert_eq!(rows.iter().map(|row| row.position.position()).collect::<Vec<_>>(), [2, 3]);
}

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

#[tokio::test]
async fn an_instance_that_is_heard_is_refreshed_once_a_minute() {
    let fixture = populated(0).await;
    run_round(&fixture.store, &[instance(1), instance(2), instance(3)]).await;
    let before = fixture.store.roster(0).await.unwrap();
    run(
        &fixture.url,
        "UPDATE roster SET last_seen = last_seen - CASE WHEN instance LIKE '%1' THEN 59000000 ELSE 60000000 END",
    )
    .await;
    let touched = [instance(1).identity, instance(2).identity];
    let request = RoundRequest { touched: &touched, ..RoundRequest::default() };
    let round = fixture.store.round(request).await.unwrap();
    let entries = fixture.store.roster(0).await.unwrap().entries;
    let ages: Vec<i64> = entries.iter().map(|entry| round.clock.store_time.0 - entry.last_seen.0).collect();
    assert!(ages[0] >= 59_000_000 && ages[1] == 0 && ages[2] >= 60_000_000, "{ages:?}");
    assert_eq!(fixture.store.roster(before.revision).await.unwrap().entries, [], "that is no news");
    run_round(&fixture.store, &[instance(3)]).await;
    assert_eq!(fixture.store.roster(before.revision).await.unwrap().entries.len(), 1, "who asks is");
}

#[tokio::test]
async fn an_instance_that_makes_no_sense_is_an_error_and_not_left_out() {
    let fixture = populated(0).await;
    for sql in ["UPDATE roster SET instance = 'x'", "UPDATE roster SET bound_ms = -1"] {
        run_round(&fixture.store, &[instance(1)]).await;
        run(&fixture.url, sql).await;
        let error = fixture.store.roster(0).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
        run(&fixture.url, "DELETE FROM roster").await;
    }
}
