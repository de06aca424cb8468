//! Rows that direct SQL wrote, altered or deleted, and a store that was closed and opened again.

use evictd_core::invalidation::{Cause, Scope};
use evictd_store::change::DeleteMode;
use evictd_store::log::{Replay, RoundRequest};
use evictd_store::{HomeStore, StoreError};

use super::{DirectSql, PostgresFixture, SqliteFixture, after};
use crate::fixture::{
    actor, api_id, instance, key, key_scope, news, operator, populate, run_round, workspace,
};

direct_sql!(
    imprecise_row_gets_a_wider_scope,
    purged_position_is_refused_and_cuts_a_replay_short,
    touched_instance_is_refreshed_once_a_minute,
    invalid_instance_is_an_error_and_not_left_out,
    reopening_keeps_everything_and_closed_is_closed,
);

async fn imprecise_row_gets_a_wider_scope<H: DirectSql>(home: &H) {
    populate(home.store(), 1).await;
    let long = "x".repeat(300);
    let rows = after(
        home,
        &format!(
            "{};
             INSERT INTO invalidations (scope, api_id, cause) VALUES ('key', 'api_1', 'erased');
             INSERT INTO invalidations (scope, api_id, workspace_id, cause)
             VALUES ('api', '{long}', 'ws_1', 'odd');
             INSERT INTO invalidations (scope, workspace_id, cause) VALUES ('workspace', '{long}', 'erased');
             INSERT INTO invalidations (scope, workspace_id, cause) VALUES ('galaxy', 'ws_1', 'changed');",
            H::NO_CHECKS
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

async fn purged_position_is_refused_and_cuts_a_replay_short(home: &impl DirectSql) {
    let store = home.store();
    populate(store, 5).await;
    let head = store.head().await.unwrap();
    home.run("DELETE FROM invalidations WHERE position IN (1, 4)").await;
    assert_eq!(store.replay(1, 1, 3, 10).await.unwrap(), Replay::Refused { head });
    let Replay::Rows { rows, .. } = store.replay(1, 2, 6, 10).await.unwrap() else {
        panic!("2 and 3 are there")
    };
    assert_eq!(rows.iter().map(|row| row.position.position()).collect::<Vec<_>>(), [2, 3]);
}

async fn touched_instance_is_refreshed_once_a_minute(home: &impl DirectSql) {
    let store = home.store();
    run_round(store, &[instance(1), instance(2), instance(3)]).await;
    let before = store.roster(0).await.unwrap();
    home.run(
        "UPDATE roster SET last_seen = last_seen - CASE WHEN instance LIKE '%1' THEN 59000000 ELSE 60000000 END",
    )
    .await;
    let touched = [instance(1).identity, instance(2).identity];
    let round = store.round(RoundRequest { touched: &touched, ..RoundRequest::default() }).await.unwrap();
    let entries = store.roster(0).await.unwrap().entries;
    let ages: Vec<i64> = entries.iter().map(|entry| round.clock.store_time.0 - entry.last_seen.0).collect();
    assert!(ages[0] >= 59_000_000 && ages[1] == 0 && ages[2] >= 60_000_000, "{ages:?}");
    assert_eq!(store.roster(before.revision).await.unwrap().entries, [], "that is no change");
    run_round(store, &[instance(3)]).await;
    assert_eq!(store.roster(before.revision).await.unwrap().entries.len(), 1, "a probe is one");
}

async fn invalid_instance_is_an_error_and_not_left_out(home: &impl DirectSql) {
    for sql in ["UPDATE roster SET instance = 'x'", "UPDATE roster SET bound_ms = -1"] {
        run_round(home.store(), &[instance(1)]).await;
        home.run(sql).await;
        let error = home.store().roster(0).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
        home.run("DELETE FROM roster").await;
    }
}

async fn reopening_keeps_everything_and_closed_is_closed(home: &impl DirectSql) {
    let store = home.store();
    populate(store, 2).await;
    run_round(store, &[instance(1)]).await;
    store.begin_epoch(&operator()).await.unwrap();
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let head = store.head().await.unwrap();
    store.close().await;
    assert!(matches!(store.head().await, Err(StoreError::Database { .. })), "closed is closed");

    let store = home.open().await;
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(store.root_keys().await.unwrap().len(), 1);
    assert_eq!(store.roster(0).await.unwrap().entries.len(), 1);
    assert_eq!(news(&*store).await, [(key_scope(1), Cause::Deleted)], "what waited still waits");
    store.check_triggers().await.unwrap();
    store.close().await;
}
