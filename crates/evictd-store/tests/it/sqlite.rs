//! What only SQLite has: direct SQL from other processes, the file, and its triggers.

mod schema;

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::position::LogPosition;
use evictd_core::record::{Record, RecordState};
use evictd_core::roster::{Instance, PartitionPolicy};
use evictd_store::audit::{AuditQuery, Purge};
use evictd_store::change::{DeleteMode, Edit, KeyUpdate};
use evictd_store::log::{Replay, RoundRequest};
use evictd_store::receipt::StoredOutcome;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{
    ChangeStore, HomeStore, LogStore, OperatorStore, ReceiptStore, RecordStore, RosterStore, StoreError,
};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};

use crate::fixture::{
    SqliteFixture, actor, api_id, asking, instance, key, key_scope, news, operator, populate, receipt,
    root_key, run_round, workspace,
};

/// A connection as any other program would open it: SQLite's defaults, none of the store's settings.
async fn stranger(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(path).foreign_keys(false).connect().await.unwrap()
}

/// Runs `sql` as a stranger, and returns what the log says of it.
async fn after(fixture: &SqliteFixture, sql: &str) -> Vec<(Scope, Cause)> {
    let mut connection = stranger(&fixture.path()).await;
    connection.execute(AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
    news(&fixture.store).await
}

async fn populated(keys: u8) -> SqliteFixture {
    let fixture = SqliteFixture::new().await;
    populate(&fixture.store, keys).await;
    fixture
}

fn key_in(n: u8, id: &str, api: &str) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(KeyId::new(id)), api_id: Some(ApiId::new(api)) }
}

fn root_scope(n: u8) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(root_key().id), api_id: None }
}

/// What a scope is about.
fn named(scope: &Scope) -> &str {
    match scope {
        Scope::Key { key_id: Some(key), .. } => key.as_str(),
        Scope::Api(api) => api.as_str(),
        other => panic!("neither a key nor an API: {other:?}"),
    }
}

/// The hash `n n n ...` as an SQL literal.
fn hash(n: u8) -> String {
    format!("x'{}'", format!("{n:02x}").repeat(32))
}

#[tokio::test]
async fn direct_sql_on_a_key_lands_in_the_log() {
    let fixture = populated(1).await;
    let cases = [
        ("UPDATE keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE keys SET enabled = 0", Cause::Changed),
        ("UPDATE keys SET enabled = 1, name = 'other'", Cause::Changed),
        ("UPDATE keys SET meta = NULL", Cause::Changed),
        ("UPDATE keys SET expires = 1", Cause::Changed),
        ("UPDATE keys SET expired = 1", Cause::Expired),
        ("DELETE FROM keys", Cause::Erased),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(&fixture, sql).await, [(key_scope(1), cause)], "{sql}");
    }
}

#[tokio::test]
async fn direct_sql_that_no_verification_notices_is_not_news() {
    let fixture = populated(1).await;
    for sql in [
        "UPDATE keys SET enabled = enabled, name = name, meta = meta, hash = hash",
        "UPDATE keys SET start = 'x', updated_at_m = 5",
        "UPDATE apis SET name = 'x', delete_protection = 1",
        "UPDATE root_keys SET name = 'x'",
        "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'new')",
        "INSERT INTO workspaces (id) VALUES ('ws_2')",
        "UPDATE keys SET enabled = 0 WHERE id = 'nobody'",
    ] {
        assert_eq!(after(&fixture, sql).await, [], "{sql}");
    }
}

#[tokio::test]
async fn a_changed_hash_is_news_under_the_old_and_the_new_one() {
    let fixture = populated(1).await;
    let sql = format!("UPDATE keys SET hash = {}", hash(9));
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_scope(1), Cause::Changed), (key_in(9, "key_1", "api_1"), Cause::Created)]
    );
}

#[tokio::test]
async fn a_moved_key_is_news_in_the_old_and_the_new_api() {
    let fixture = populated(1).await;
    after(&fixture, "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'new')").await;
    assert_eq!(
        after(&fixture, "UPDATE keys SET api_id = 'api_2'").await,
        [(key_scope(1), Cause::Changed), (key_in(1, "key_1", "api_2"), Cause::Changed)]
    );
}

#[tokio::test]
async fn a_replaced_key_is_news_under_every_hash_it_had() {
    let fixture = populated(3).await;
    // Key 1 gets a new hash; its old one disappears without a delete trigger.
    let sql = format!(
        "INSERT OR REPLACE INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_1', 'api_1', 'ws_1', {}, 'abcd')",
        hash(9)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_scope(1), Cause::Erased), (key_in(9, "key_1", "api_1"), Cause::Created)]
    );
    // A row that takes key 2's id and key 3's hash removes both.
    let sql = format!(
        "REPLACE INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_2', 'api_1', 'ws_1', {}, 'abcd')",
        hash(3)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_scope(2), Cause::Erased), (key_in(3, "key_2", "api_1"), Cause::Created)]
    );
    // The same hash in another API: floors of keys may have been merged into the old API's.
    let sql = format!(
        "REPLACE INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_2', 'api_2', 'ws_1', {}, 'abcd')",
        hash(3)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_in(3, "key_2", "api_1"), Cause::Erased), (key_in(3, "key_2", "api_2"), Cause::Created)]
    );
}

#[tokio::test]
async fn a_key_that_an_update_replaces_is_news() {
    let fixture = populated(2).await;
    assert_eq!(
        after(&fixture, "UPDATE OR REPLACE keys SET id = 'key_2' WHERE id = 'key_1'").await,
        [(key_scope(2), Cause::Erased), (key_in(1, "key_2", "api_1"), Cause::Changed)]
    );
}

#[tokio::test]
async fn a_bulk_deletion_is_news_for_each_key() {
    let fixture = populated(100).await;
    let rows = after(&fixture, "DELETE FROM keys").await;
    assert_eq!(rows.len(), 100);
    assert!((1..=100).all(|n| rows.contains(&(key_scope(n), Cause::Erased))));
}

#[tokio::test]
async fn a_huge_bulk_deletion_is_one_change_of_its_api() {
    let fixture = populated(1).await;
    let many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 1500)
                INSERT INTO keys (id, api_id, workspace_id, hash, start)
                SELECT 'bulk_' || n, 'api_1', 'ws_1', randomblob(32), 'abcd' FROM n";
    let created = after(&fixture, many).await;
    assert_eq!(created, [(Scope::Api(api_id()), Cause::Created)], "an import is one change as well");

    fixture.store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    assert_eq!(
        after(&fixture, "DELETE FROM keys WHERE id LIKE 'bulk_%'").await,
        [(key_scope(1), Cause::Deleted), (Scope::Api(api_id()), Cause::Erased)],
        "and a deletion that a request waits for keeps its own row"
    );
}

#[tokio::test]
async fn one_statement_over_2000_keys_covers_each_of_them_by_its_api_or_itself() {
    let fixture = populated(0).await;
    let many = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'small');
                WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 2003)
                INSERT INTO keys (id, api_id, workspace_id, hash, start)
                SELECT 'bulk_' || n, iif(n <= 2000, 'api_1', 'api_2'), 'ws_1', randomblob(32), 'abcd' FROM n";
    after(&fixture, many).await;
    let cases = [
        ("UPDATE keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE keys SET enabled = 0", Cause::Changed),
        ("UPDATE keys SET enabled = 1 WHERE id LIKE 'bulk_%'", Cause::Changed),
        ("UPDATE keys SET expired = 1", Cause::Expired),
        ("DELETE FROM keys", Cause::Erased),
    ];
    for (sql, cause) in cases {
        let rows = after(&fixture, sql).await;
        assert!(rows.iter().all(|(_, said)| *said == cause), "{sql}: {rows:?}");
        let mut covered: Vec<&str> = rows.iter().map(|(scope, _)| named(scope)).collect();
        covered.sort_unstable();
        assert_eq!(covered, ["api_1", "bulk_2001", "bulk_2002", "bulk_2003"], "{sql}");
    }
}

#[tokio::test]
async fn one_statement_over_all_apis_is_a_row_for_each() {
    let fixture = populated(2).await;
    let more =
        "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'b'), ('api_3', 'ws_1', 'c')";
    after(&fixture, more).await;
    let cases = [
        ("UPDATE apis SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE apis SET deleted_at_m = NULL", Cause::Restored),
        ("DELETE FROM apis", Cause::Erased),
    ];
    for (sql, cause) in cases {
        let expected: Vec<_> =
            ["api_1", "api_2", "api_3"].map(|api| (Scope::Api(ApiId::new(api)), cause)).into();
        assert_eq!(after(&fixture, sql).await, expected, "{sql}");
    }
}

/// Root keys belong to no API, so that there is nothing to merge them into.
#[tokio::test]
async fn one_statement_over_2000_root_keys_is_a_row_for_each() {
    let fixture = populated(0).await;
    let many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 2000)
                INSERT INTO root_keys (id, workspace_id, hash, start)
                SELECT 'bulk_' || n, 'ws_1', randomblob(32), 'unkey_' FROM n";
    assert_eq!(after(&fixture, many).await.len(), 2000);
    let cases = [
        ("UPDATE root_keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE root_keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE root_keys SET enabled = 0", Cause::Changed),
        ("DELETE FROM root_keys", Cause::Erased),
    ];
    for (sql, cause) in cases {
        let rows = after(&fixture, sql).await;
        assert!(rows.iter().all(|(_, said)| *said == cause), "{sql}");
        let covered: HashSet<&str> = rows.iter().map(|(scope, _)| named(scope)).collect();
        assert_eq!((rows.len(), covered.len()), (2001, 2001), "{sql}");
    }
}

#[tokio::test]
async fn text_that_is_not_utf8_widens_its_row_and_stops_nothing() {
    let fixture = populated(2).await;
    let broken = "UPDATE keys SET api_id = CAST(x'6be979' AS TEXT), enabled = 0 WHERE id = 'key_1'";
    let rows = after(&fixture, &format!("PRAGMA foreign_keys = OFF; {broken}")).await;
    assert!(!rows.is_empty());
    let head = run_round(&fixture.store, &[]).await.numbered.head;
    assert!(head.at > LogPosition::ZERO);
    let ok = after(&fixture, "DELETE FROM keys WHERE id = 'key_2'").await;
    assert_eq!(ok, [(key_scope(2), Cause::Erased)], "the log goes on");
}

#[tokio::test]
async fn direct_sql_on_an_api_is_one_row_however_many_keys_it_has() {
    let fixture = populated(5).await;
    let api = Scope::Api(api_id());
    let cases = [
        ("UPDATE apis SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE apis SET deleted_at_m = 2", Cause::Changed),
        ("UPDATE apis SET deleted_at_m = NULL", Cause::Restored),
        ("REPLACE INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_1', 'x')", Cause::Restored),
        ("DELETE FROM apis", Cause::Erased),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(&fixture, sql).await, [(api.clone(), cause)], "{sql}");
    }
    let lookup = fixture.store.lookup(KeyHash([1; 32])).await.unwrap();
    assert!(
        matches!(lookup.record, Record::Key(key) if key.state == RecordState::Deleted),
        "its keys went along"
    );
    let sql = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_1', 'back')";
    assert_eq!(after(&fixture, sql).await, [(api, Cause::Restored)], "keys were waiting for it");
}

#[tokio::test]
async fn direct_sql_on_a_workspace_reaches_everything_in_it() {
    let fixture = populated(1).await;
    let scope = Scope::Workspace(workspace());
    assert_eq!(after(&fixture, "DELETE FROM workspaces").await, [(scope.clone(), Cause::Erased)]);
    let lookup = fixture.store.lookup(KeyHash([1; 32])).await.unwrap();
    assert!(matches!(lookup.record, Record::Key(key) if key.state == RecordState::Deleted));
    let root = fixture.store.root_key(root_key().hash).await.unwrap().unwrap();
    assert_eq!(root.state, RecordState::Deleted);
    let sql = "INSERT INTO workspaces (id) VALUES ('ws_1')";
    assert_eq!(after(&fixture, sql).await, [(scope.clone(), Cause::Restored)]);
    assert_eq!(
        after(&fixture, "UPDATE workspaces SET id = 'ws_2'").await,
        [(scope, Cause::Erased), (Scope::Workspace(WorkspaceId::new("ws_2")), Cause::Restored)]
    );
}

#[tokio::test]
async fn direct_sql_on_a_root_key_lands_in_the_log() {
    let fixture = populated(0).await;
    let cases = [
        ("UPDATE root_keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE root_keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE root_keys SET permissions = '[]'", Cause::Changed),
        ("UPDATE root_keys SET enabled = 0", Cause::Changed),
        ("UPDATE root_keys SET expired = 1", Cause::Expired),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(&fixture, sql).await, [(root_scope(255), cause)], "{sql}");
    }
    let sql = format!(
        "REPLACE INTO root_keys (id, workspace_id, hash, start) VALUES ('root_1', 'ws_1', {}, 'unkey_')",
        hash(254)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(root_scope(255), Cause::Erased), (root_scope(254), Cause::Created)]
    );
    assert_eq!(after(&fixture, "DELETE FROM root_keys").await, [(root_scope(254), Cause::Erased)]);
}

#[tokio::test]
async fn direct_sql_is_dated_and_noticed() {
    let fixture = populated(1).await;
    let version = fixture.store.version().await.unwrap();
    let micros = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as i64;
    let before = micros();
    let mut connection = stranger(&fixture.path()).await;
    connection.execute("UPDATE keys SET enabled = 0").await.unwrap();
    assert_ne!(fixture.store.version().await.unwrap(), version);
    let committed_at = fixture.store.number(1).await.unwrap().rows[0].committed_at.0;
    // SQLite's clock counts milliseconds.
    assert!(before - 1_000 <= committed_at && committed_at <= micros() + 1_000);
}

#[tokio::test]
async fn a_row_that_does_not_say_what_it_means_is_widened() {
    let fixture = populated(1).await;
    let long = "x".repeat(300);
    let rows = after(
        &fixture,
        &format!(
            "PRAGMA ignore_check_constraints = ON;
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
async fn a_round_is_counted_and_writes_the_roster() {
    let fixture = populated(0).await;
    let mut connection = stranger(&fixture.path()).await;
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
    run_round(&fixture.store, &[instance(1), instance(u64::MAX)]).await;
    let roster = "SELECT region, agent, instance, policy, bound_ms FROM roster ORDER BY instance";
    let rows: Vec<(String, String, String, String, i64)> =
        sqlx::query_as(roster).fetch_all(&mut connection).await.unwrap();
    let row = |instance: &str, policy: &str| {
        ("eu-central-1".to_owned(), "edge".to_owned(), instance.to_owned(), policy.to_owned(), 30_000)
    };
    assert_eq!(rows, [row("0000000000000001", "deny"), row("ffffffffffffffff", "deny")]);

    sqlx::query("UPDATE roster SET first_seen = first_seen - 9, last_seen = last_seen - 9")
        .execute(&mut connection)
        .await
        .unwrap();
    let seen = "SELECT last_seen - first_seen FROM roster ORDER BY instance";
    run_round(&fixture.store, &[instance(1)]).await;
    let spans: Vec<i64> = sqlx::query_scalar(seen).fetch_all(&mut connection).await.unwrap();
    assert_eq!(spans, [0, 0], "known instances cost no write");
    run_round(&fixture.store, &[stale]).await;
    let rows: Vec<(String, String, String, String, i64)> =
        sqlx::query_as(roster).fetch_all(&mut connection).await.unwrap();
    assert_eq!(rows, [row("0000000000000001", "serve_stale"), row("ffffffffffffffff", "deny")]);
    sqlx::query("UPDATE roster SET last_seen = first_seen - 60000000")
        .execute(&mut connection)
        .await
        .unwrap();
    run_round(&fixture.store, &[instance(u64::MAX)]).await;
    let spans: Vec<i64> = sqlx::query_scalar(seen).fetch_all(&mut connection).await.unwrap();
    assert!(spans[0] < 0 && spans[1] >= 0, "refreshed when it got old, and only who was there: {spans:?}");

    let rounds: i64 =
        sqlx::query_scalar("SELECT rounds FROM log_head").fetch_one(&mut connection).await.unwrap();
    assert_eq!(rounds, 4);
}

#[tokio::test]
async fn an_instance_that_is_only_heard_is_refreshed_once_a_minute() {
    let fixture = populated(0).await;
    run_round(&fixture.store, &[instance(1), instance(2), instance(3)]).await;
    let before = fixture.store.roster(0).await.unwrap();
    after(
        &fixture,
        "UPDATE roster SET last_seen = last_seen - 59000000 WHERE instance LIKE '%1';
         UPDATE roster SET last_seen = last_seen - 60000000 WHERE instance NOT LIKE '%1';",
    )
    .await;
    let touched = [instance(1).identity, instance(2).identity];
    let round =
        fixture.store.round(RoundRequest { touched: &touched, ..RoundRequest::default() }).await.unwrap();
    let ages: Vec<i64> = fixture
        .store
        .roster(0)
        .await
        .unwrap()
        .entries
        .iter()
        .map(|entry| round.clock.store_time.0 - entry.last_seen.0)
        .collect();
    assert!(ages[0] >= 59_000_000 && ages[1] == 0 && ages[2] >= 60_000_000, "{ages:?}");
    assert_eq!(fixture.store.roster(before.revision).await.unwrap().entries, [], "that is no news");
}

#[tokio::test]
async fn an_instance_that_makes_no_sense_is_an_error_and_not_left_out() {
    let fixture = populated(0).await;
    for sql in ["UPDATE roster SET instance = 'x'", "UPDATE roster SET bound_ms = -1"] {
        run_round(&fixture.store, &[instance(1)]).await;
        after(&fixture, sql).await;
        let error = fixture.store.roster(0).await.unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
        after(&fixture, "DELETE FROM roster").await;
    }
}

#[tokio::test]
async fn reopening_keeps_everything() {
    let fixture = populated(2).await;
    run_round(&fixture.store, &[instance(1)]).await;
    fixture.store.begin_epoch(&operator()).await.unwrap();
    fixture.store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let head = fixture.store.head().await.unwrap();
    fixture.store.close().await;
    assert!(matches!(fixture.store.head().await, Err(StoreError::Database { .. })), "closed is closed");

    let store = SqliteStore::open(&fixture.path()).await.unwrap();
    assert_eq!(store.head().await.unwrap(), head);
    assert_eq!(store.root_keys().await.unwrap().len(), 1);
    assert_eq!(news(&store).await, [(key_scope(1), Cause::Deleted)], "what waited still waits");
    store.check_triggers().await.unwrap();
    store.close().await;
}

#[tokio::test]
async fn two_stores_on_one_file_share_the_log() {
    let fixture = populated(2).await;
    let other = SqliteStore::open(&fixture.path()).await.unwrap();
    other.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let (here, there) = tokio::join!(fixture.store.number(10), other.number(10));
    assert_eq!(here.unwrap().rows.len() + there.unwrap().rows.len(), 1);
    assert_eq!(fixture.store.head().await.unwrap(), other.head().await.unwrap());
    other.close().await;
}

#[tokio::test]
async fn last_position_is_not_exceeded() {
    let fixture = populated(1).await;
    let last = "UPDATE log_head SET head = 17592186044414; UPDATE keys SET enabled = 0";
    assert_eq!(after(&fixture, last).await.len(), 1);
    fixture.store.create_key(&actor(), key(2)).await.unwrap();
    let error = fixture.store.number(10).await.unwrap_err();
    assert!(matches!(error, StoreError::PositionsUsedUp), "{error:?}");
    let error = fixture.store.round(RoundRequest::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::PositionsUsedUp), "no proof rather than a wrong one: {error:?}");
}

#[tokio::test]
async fn the_last_epoch_is_not_exceeded() {
    let fixture = populated(0).await;
    after(&fixture, "UPDATE log_head SET epoch = 1048575").await;
    let error = fixture.store.begin_epoch(&operator()).await.unwrap_err();
    assert!(matches!(error, StoreError::EpochsUsedUp), "{error:?}");
    assert!(error.to_string().contains("into a new store"), "{error}");
    assert_eq!(fixture.store.history().await.unwrap().begins().len(), 1, "nothing began");
}

#[tokio::test]
async fn an_altered_or_missing_trigger_is_found() {
    for sql in [
        "DROP TRIGGER keys_after_update",
        "DROP TRIGGER apis_after_delete;
         CREATE TRIGGER apis_after_delete AFTER DELETE ON apis BEGIN SELECT 1; END",
        "DROP TABLE root_keys",
    ] {
        let fixture = populated(0).await;
        after(&fixture, sql).await;
        let error = fixture.store.check_triggers().await.unwrap_err();
        let StoreError::TriggerMissing { name } = error else { panic!("{sql}: {error:?}") };
        assert!(["keys_", "apis_", "root_keys_"].iter().any(|table| name.starts_with(table)), "{name}");
    }
}

#[tokio::test]
async fn every_change_has_its_audit_record_with_ids_only() {
    let fixture = populated(2).await;
    let store = &fixture.store;
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    store.delete_key(&actor(), &key(2).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    store.delete_key(&actor(), &key(2).id, DeleteMode::Permanent, &|_| true).await.unwrap_err();
    store.delete_api(&actor(), &api_id()).await.unwrap();
    let rows: Vec<(String, String, String, String, String)> = sqlx::query_as(
        "SELECT event, description, targets, actor_id || '/' || actor_name, correlation_id
         FROM audit_log WHERE actor_type = 'rootkey' ORDER BY rowid",
    )
    .fetch_all(&mut stranger(&fixture.path()).await)
    .await
    .unwrap();
    let told: Vec<_> =
        rows.iter().map(|(event, description, ..)| (event.as_str(), description.as_str())).collect();
    assert_eq!(
        told,
        [
            ("api.create", "Created API api_1"),
            ("key.create", "Created key key_1 in API api_1"),
            ("key.create", "Created key key_2 in API api_1"),
            ("key.delete", "Deleted key key_1"),
            ("key.delete", "Permanently deleted key key_2"),
            ("api.delete", "Deleted API api_1"),
        ]
    );
    assert_eq!(rows[4].2, r#"[{"id":"key_2","name":"key_2","type":"key"}]"#);
    assert!(rows.iter().all(|row| row.3 == "root_1/ops" && row.4 == "req_1"));
}

#[tokio::test]
async fn of_a_permanently_deleted_key_only_the_id_remains_when_the_retention_ends() {
    let fixture = SqliteFixture::new().await;
    let store = &fixture.store;
    populate(store, 0).await;
    let mut secret = key(1);
    secret.hash = KeyHash(*b"the SHA-256 of a key that leaked");
    secret.name = Some("Jane-Q-Example".to_owned());
    secret.meta = Some(r#"{"email":"jane@example.com"}"#.to_owned());
    secret.external_id = Some("customer-jane".to_owned());
    secret.permissions = vec!["jane.may".to_owned()];
    // As long as somebody reads, SQLite begins its write-ahead log anew no sooner, and cuts it off by itself never.
    let mut reader = stranger(&fixture.path()).await;
    reader.execute("BEGIN; SELECT * FROM log_head").await.unwrap();
    store.create_key(&asking("req_c"), secret).await.unwrap();
    let renamed = KeyUpdate { name: Edit::Set("Jane-Renamed".to_owned()), ..KeyUpdate::default() };
    store.update_key(&asking("req_u"), &key(1).id, renamed, &|_| true).await.unwrap();
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    let rows = store.number(10).await.unwrap().requests;
    let open = store.open_requests(LogPosition::ZERO, 100).await.unwrap();
    let body = r#"{"keyId":"key_1"}"#;
    let receipts: Vec<_> = open.iter().map(|row| receipt(&row.request_id, row.position, body)).collect();
    store.record_receipts(&receipts).await.unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(traces(&fixture).len(), 6, "or this test would see nothing");
    let keeps_all = Purge { log: Duration::MAX, receipts: Duration::MAX, audit: None, limit: 100 };
    let began = Instant::now();
    store.purge(keeps_all).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "a reader isn't waited for: {:?}", began.elapsed());
    reader.close().await.unwrap();
    store.purge(keeps_all).await.unwrap();
    assert_eq!(
        traces(&fixture),
        ["the SHA-256 of a key that leaked"],
        "agents that come back must learn of it still"
    );

    let purge = Purge { log: Duration::ZERO, receipts: Duration::MAX, audit: None, limit: 100 };
    assert!(store.purge(purge).await.unwrap().log >= 3);
    assert_eq!(traces(&fixture), [""; 0]);
    let kept = store.receipt(&workspace(), "req_d").await.unwrap();
    assert_eq!(kept, Some(StoredOutcome::Final { body: body.to_owned() }), "its receipt remains");
    let of_key = AuditQuery { target: Some("key_1".to_owned()), limit: 10, ..AuditQuery::default() };
    assert_eq!(store.audit(&of_key).await.unwrap().len(), 3, "and who did what");
}

/// What of the key can be found in the files.
fn traces(fixture: &SqliteFixture) -> Vec<&'static str> {
    let files: Vec<Vec<u8>> = std::fs::read_dir(fixture.directory.path())
        .unwrap()
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    let searched = [
        "the SHA-256 of a key that leaked",
        "Jane-Q-Example",
        "Jane-Renamed",
        "jane@example.com",
        "customer-jane",
        "jane.may",
    ];
    let holds = |trace: &&str| {
        files.iter().any(|file| file.windows(trace.len()).any(|window| window == trace.as_bytes()))
    };
    searched.into_iter().filter(|trace| holds(trace)).collect()
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_file_is_readable_by_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = populated(0).await;
    for file in std::fs::read_dir(fixture.directory.path()).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", file.path());
    }
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = SqliteStore::open(&directory.path().join("none/home.db")).await.unwrap_err().to_string();
    assert!(error.contains("none/home.db") && error.contains("directory doesn't exist"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_no_database_is_named_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let text = "this is no database, but somebody may need it\n".repeat(100);
    std::fs::write(&path, &text).unwrap();
    let error = SqliteStore::open(&path).await.unwrap_err().to_string();
    assert!(error.contains("home.db") && error.contains("isn't an SQLite database"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[tokio::test]
async fn a_directory_in_the_files_place_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let error = SqliteStore::open(directory.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
}

#[tokio::test]
async fn another_schema_version_is_refused() {
    let fixture = populated(0).await;
    after(&fixture, "UPDATE _sqlx_migrations SET checksum = x'00'").await;
    assert!(matches!(SqliteStore::open(&fixture.path()).await, Err(StoreError::Migrate(_))));
}

/// In a process that a test started: the store that it is about.
const STORE_OF_OTHER_PROCESS: &str = "EVICTD_STORE_TEST_OTHER_PROCESS";

/// The path, in the other process.
fn as_other_process() -> Option<OsString> {
    std::env::var_os(STORE_OF_OTHER_PROCESS)
}

/// Runs `test` once more, in a process of its own, which ends at the latest when its input does.
fn in_another_process(test: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("sqlite::{test}"), "--nocapture"])
        .env(STORE_OF_OTHER_PROCESS, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Blocks the other process until it is told to go on, or its parent is gone.
fn wait_for_end_of_input() {
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[tokio::test]
async fn a_second_publisher_is_refused_until_the_first_one_is_gone_even_by_kill() {
    if let Some(path) = as_other_process() {
        let _store = SqliteStore::open_exclusively(Path::new(&path)).await.unwrap();
        println!("\nit is open");
        return wait_for_end_of_input();
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let name = "a_second_publisher_is_refused_until_the_first_one_is_gone_even_by_kill";
    let mut first = in_another_process(name, &path);
    let mut output = BufReader::new(first.stdout.take().unwrap()).lines();
    assert!(output.any(|line| line.unwrap() == "it is open"));

    let error = SqliteStore::open_exclusively(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error:?}");
    let error = error.to_string();
    assert!(error.contains("home.db: stop that one first") && error.contains("store.path"), "{error}");

    let tool = SqliteStore::open(&path).await.unwrap();
    tool.create_root_key(&operator(), root_key()).await.unwrap();
    tool.close().await;
    stranger(&path).await.execute("UPDATE root_keys SET enabled = 0").await.unwrap();

    first.kill().unwrap();
    first.wait().unwrap();
    let next = SqliteStore::open_exclusively(&path).await.unwrap();
    assert_eq!(news(&next).await, [(root_scope(255), Cause::Created), (root_scope(255), Cause::Changed)]);
    next.close().await;
}

#[tokio::test]
async fn a_closed_store_is_free_for_the_next_publisher_whatever_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let (path, link) = (directory.path().join("home.db"), directory.path().join("link.db"));
    let first = SqliteStore::open_exclusively(&path).await.unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(SqliteStore::open_exclusively(&link).await, Err(StoreError::InUse { .. })));
    first.close().await;
    let second = SqliteStore::open_exclusively(&link).await.unwrap();
    assert!(matches!(SqliteStore::open_exclusively(&path).await, Err(StoreError::InUse { .. })));
    drop(first);
    assert!(matches!(SqliteStore::open_exclusively(&path).await, Err(StoreError::InUse { .. })));
    second.close().await;
}

#[tokio::test]
async fn a_new_file_that_somebody_else_is_writing_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    std::fs::write(&path, "").unwrap();
    let mut other = stranger(&path).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let mut opening = Box::pin(SqliteStore::open(&path));
    let early = tokio::time::timeout(Duration::from_millis(200), &mut opening).await;
    assert!(early.is_err(), "it was refused instead: {early:?}");
    other.execute("COMMIT").await.unwrap();
    opening.await.unwrap().close().await;
}

#[tokio::test]
async fn processes_that_create_a_store_at_once_all_get_it() {
    const STORES: usize = 30;
    if let Some(path) = as_other_process() {
        for line in std::io::stdin().lines() {
            let store = SqliteStore::open(&Path::new(&path).join(line.unwrap())).await.unwrap();
            store.check_triggers().await.unwrap();
            store.close().await;
            println!("\ndone");
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let name = "processes_that_create_a_store_at_once_all_get_it";
    let mut processes: Vec<Child> = (0..3).map(|_| in_another_process(name, directory.path())).collect();
    let mut outputs: Vec<_> =
        processes.iter_mut().map(|process| BufReader::new(process.stdout.take().unwrap()).lines()).collect();
    for n in 0..STORES {
        for process in &mut processes {
            writeln!(process.stdin.as_ref().unwrap(), "{n}").unwrap();
        }
        for output in &mut outputs {
            assert!(output.any(|line| line.unwrap() == "done"), "it gave up at store {n}");
        }
    }
    for mut process in processes {
        assert!(process.wait().unwrap().success());
    }
}
