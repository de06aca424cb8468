//! R3: the log has a row for every change of a column that verifications read, whatever client made it.

use std::collections::HashSet;
use std::fmt::Write;

use evictd_core::ids::{ApiId, WorkspaceId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::RecordState;
use evictd_store::HomeStore;
use evictd_store::change::DeleteMode;

use super::{DirectSql, PostgresFixture, SqliteFixture, after, hash, key_in, root_scope, state};
use crate::fixture::{actor, api_id, key, key_scope, populate, run_round, said, workspace};

direct_sql!(
    change_of_a_key_is_logged,
    change_that_verifications_do_not_read_is_not_logged,
    moved_key_is_logged_under_the_old_and_the_new_place,
    change_of_a_root_key_is_logged,
    change_of_an_api_is_one_row_however_many_keys_it_has,
    change_of_a_workspace_reaches_everything_in_it,
    change_is_dated_and_changes_the_version,
    bulk_deletion_is_logged_for_each_key,
    huge_bulk_deletion_is_one_change_of_its_api,
    statement_over_2000_keys_covers_each_by_its_api_or_itself,
    statement_over_all_apis_is_a_row_for_each,
    statement_over_2000_root_keys_is_a_row_for_each,
);

/// What a scope is about.
fn named(scope: &Scope) -> &str {
    match scope {
        Scope::Key { key_id: Some(key), .. } => key.as_str(),
        Scope::Api(api) => api.as_str(),
        other => panic!("neither a key nor an API: {other:?}"),
    }
}

/// Inserts `count` keys `bulk_1`, `bulk_2`, ..., each into the API that `api` gives.
fn insert_keys<H: DirectSql>(count: u32, api: impl Fn(u32) -> &'static str) -> String {
    let mut sql = "INSERT INTO keys (id, api_id, workspace_id, hash, start) VALUES ".to_owned();
    for n in 1..=count {
        let (api, hash) = (api(n), H::literal(&format!("{n:064x}")));
        write!(sql, "('bulk_{n}', '{api}', 'ws_1', {hash}, 'abcd'),").unwrap();
    }
    sql.pop();
    sql
}

async fn change_of_a_key_is_logged(home: &impl DirectSql) {
    populate(home.store(), 1).await;
    let cases = [
        ("UPDATE keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE keys SET enabled = FALSE", Cause::Changed),
        ("UPDATE keys SET enabled = TRUE, name = 'other'", Cause::Changed),
        ("UPDATE keys SET meta = NULL", Cause::Changed),
        ("UPDATE keys SET external_id = NULL", Cause::Changed),
        ("UPDATE keys SET permissions = '[]'", Cause::Changed),
        ("UPDATE keys SET expires = 1", Cause::Changed),
        ("UPDATE keys SET expired = TRUE", Cause::Expired),
        ("DELETE FROM keys", Cause::Erased),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(home, sql).await, [(key_scope(1), cause)], "{sql}");
    }
}

async fn change_that_verifications_do_not_read_is_not_logged(home: &impl DirectSql) {
    populate(home.store(), 1).await;
    for sql in [
        "UPDATE keys SET enabled = enabled, name = name, meta = meta, hash = hash",
        "UPDATE keys SET start = 'x', updated_at_m = 5",
        "UPDATE apis SET name = 'x', delete_protection = TRUE",
        "UPDATE root_keys SET name = 'x'",
        "UPDATE workspaces SET created_at_m = 5",
        "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'new')",
        "INSERT INTO workspaces (id) VALUES ('ws_2')",
        "UPDATE keys SET enabled = FALSE WHERE id = 'key_none'",
        "BEGIN; UPDATE keys SET enabled = FALSE; ROLLBACK",
    ] {
        assert_eq!(after(home, sql).await, [], "{sql}");
    }
}

async fn moved_key_is_logged_under_the_old_and_the_new_place<H: DirectSql>(home: &H) {
    populate(home.store(), 1).await;
    let sql = format!("UPDATE keys SET hash = {}", hash::<H>(9));
    assert_eq!(
        after(home, &sql).await,
        [(key_scope(1), Cause::Changed), (key_in(9, "key_1", "api_1"), Cause::Created)]
    );
    let sql = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'new');
               UPDATE keys SET api_id = 'api_2'";
    assert_eq!(
        after(home, sql).await,
        [(key_in(9, "key_1", "api_1"), Cause::Changed), (key_in(9, "key_1", "api_2"), Cause::Changed)]
    );
    let sql = "INSERT INTO workspaces (id) VALUES ('ws_2'); UPDATE keys SET workspace_id = 'ws_2'";
    assert_eq!(after(home, sql).await.len(), 2);
}

async fn change_of_a_root_key_is_logged<H: DirectSql>(home: &H) {
    populate(home.store(), 0).await;
    let cases = [
        ("UPDATE root_keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE root_keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE root_keys SET permissions = '[]'", Cause::Changed),
        ("UPDATE root_keys SET enabled = FALSE", Cause::Changed),
        ("UPDATE root_keys SET expires = 1", Cause::Changed),
        ("UPDATE root_keys SET expired = TRUE", Cause::Expired),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(home, sql).await, [(root_scope(255), cause)], "{sql}");
    }
    let sql = format!("UPDATE root_keys SET hash = {}", hash::<H>(254));
    assert_eq!(
        after(home, &sql).await,
        [(root_scope(255), Cause::Changed), (root_scope(254), Cause::Created)]
    );
    assert_eq!(after(home, "DELETE FROM root_keys").await, [(root_scope(254), Cause::Erased)]);
}

/// An API can be removed while it has keys, and come back, only where foreign keys aren't checked.
async fn change_of_an_api_is_one_row_however_many_keys_it_has<H: DirectSql>(home: &H) {
    populate(home.store(), 5).await;
    let api = Scope::Api(api_id());
    let erase = format!("{}; DELETE FROM apis", H::NO_FOREIGN_KEYS);
    let cases = [
        ("UPDATE apis SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE apis SET deleted_at_m = 2", Cause::Changed),
        ("UPDATE apis SET deleted_at_m = NULL", Cause::Restored),
        (&*erase, Cause::Erased),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(home, sql).await, [(api.clone(), cause)], "{sql}");
    }
    assert_eq!(state(home, 1).await, Some(RecordState::Deleted), "its keys are deleted with it");
    let sql = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_1', 'back')";
    assert_eq!(after(home, sql).await, [(api, Cause::Restored)], "it has keys");
}

async fn change_of_a_workspace_reaches_everything_in_it<H: DirectSql>(home: &H) {
    populate(home.store(), 1).await;
    let scope = Scope::Workspace(workspace());
    assert_eq!(after(home, "UPDATE workspaces SET enabled = FALSE").await, [(scope.clone(), Cause::Changed)]);
    assert_eq!(state(home, 1).await, Some(RecordState::WorkspaceDisabled));

    let erase = format!("{}; DELETE FROM workspaces", H::NO_FOREIGN_KEYS);
    assert_eq!(after(home, &erase).await, [(scope.clone(), Cause::Erased)]);
    assert_eq!(state(home, 1).await, Some(RecordState::Deleted));
    assert_eq!(state(home, 255).await, Some(RecordState::Deleted));
    let sql = "INSERT INTO workspaces (id) VALUES ('ws_1')";
    assert_eq!(after(home, sql).await, [(scope.clone(), Cause::Restored)]);
    let rename = format!("{}; UPDATE workspaces SET id = 'ws_2'", H::NO_FOREIGN_KEYS);
    assert_eq!(
        after(home, &rename).await,
        [(scope, Cause::Erased), (Scope::Workspace(WorkspaceId::new("ws_2")), Cause::Restored)]
    );
}

async fn change_is_dated_and_changes_the_version(home: &impl DirectSql) {
    let store = home.store();
    populate(store, 1).await;
    let version = store.version().await.unwrap();
    let micros =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as i64;
    let before = micros();
    home.run("UPDATE keys SET enabled = FALSE").await;
    assert_ne!(store.version().await.unwrap(), version);
    let committed_at = store.number(1).await.unwrap().rows[0].committed_at.0;
    // SQLite's clock counts milliseconds.
    assert!(before - 1_000 <= committed_at && committed_at <= micros() + 1_000);
}

async fn bulk_deletion_is_logged_for_each_key(home: &impl DirectSql) {
    populate(home.store(), 100).await;
    let rows = after(home, "DELETE FROM keys").await;
    assert_eq!(rows.len(), 100);
    assert!((1..=100).all(|n| rows.contains(&(key_scope(n), Cause::Erased))));
}

async fn huge_bulk_deletion_is_one_change_of_its_api<H: DirectSql>(home: &H) {
    populate(home.store(), 1).await;
    let created = after(home, &insert_keys::<H>(1_500, |_| "api_1")).await;
    assert_eq!(created, [(Scope::Api(api_id()), Cause::Created)], "an import is one change as well");

    home.store().delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    home.run("DELETE FROM keys WHERE id LIKE 'bulk_%'").await;
    assert_eq!(
        said(&run_round(home.store(), &[]).await.numbered.rows),
        [(key_scope(1), Cause::Deleted), (Scope::Api(api_id()), Cause::Erased)],
        "a request's row is not merged"
    );
}

async fn statement_over_2000_keys_covers_each_by_its_api_or_itself<H: DirectSql>(home: &H) {
    populate(home.store(), 0).await;
    after(home, "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'small')").await;
    after(home, &insert_keys::<H>(2_003, |n| if n <= 2_000 { "api_1" } else { "api_2" })).await;
    let cases = [
        ("UPDATE keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE keys SET enabled = FALSE", Cause::Changed),
        ("UPDATE keys SET enabled = TRUE WHERE id LIKE 'bulk_%'", Cause::Changed),
        ("UPDATE keys SET expired = TRUE", Cause::Expired),
        ("DELETE FROM keys", Cause::Erased),
    ];
    for (sql, cause) in cases {
        let rows = after(home, sql).await;
        assert!(rows.iter().all(|(_, logged)| *logged == cause), "{sql}: {rows:?}");
        let mut covered: Vec<&str> = rows.iter().map(|(scope, _)| named(scope)).collect();
        covered.sort_unstable();
        assert_eq!(covered, ["api_1", "bulk_2001", "bulk_2002", "bulk_2003"], "{sql}");
    }
}

async fn statement_over_all_apis_is_a_row_for_each<H: DirectSql>(home: &H) {
    populate(home.store(), 2).await;
    let more =
        "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'b'), ('api_3', 'ws_1', 'c')";
    after(home, more).await;
    let erase = format!("{}; DELETE FROM apis", H::NO_FOREIGN_KEYS);
    let cases = [
        ("UPDATE apis SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE apis SET deleted_at_m = NULL", Cause::Restored),
        (&*erase, Cause::Erased),
    ];
    for (sql, cause) in cases {
        let mut rows = after(home, sql).await;
        rows.sort_by_key(|(scope, _)| named(scope).to_owned());
        let expected = ["api_1", "api_2", "api_3"].map(|api| (Scope::Api(ApiId::new(api)), cause));
        assert_eq!(rows, expected, "{sql}");
    }
}

/// Root keys belong to no API, so there is nothing to merge them into.
async fn statement_over_2000_root_keys_is_a_row_for_each<H: DirectSql>(home: &H) {
    populate(home.store(), 0).await;
    let mut many = "INSERT INTO root_keys (id, workspace_id, hash, start) VALUES ".to_owned();
    for n in 1..=2_000 {
        let hash = H::literal(&format!("{n:064x}"));
        write!(many, "('bulk_{n}', 'ws_1', {hash}, 'unkey_'),").unwrap();
    }
    many.pop();
    assert_eq!(after(home, &many).await.len(), 2_000);
    let cases = [
        ("UPDATE root_keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE root_keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE root_keys SET enabled = FALSE", Cause::Changed),
        ("DELETE FROM root_keys", Cause::Erased),
    ];
    for (sql, cause) in cases {
        let rows = after(home, sql).await;
        assert!(rows.iter().all(|(_, logged)| *logged == cause), "{sql}");
        let covered: HashSet<&str> = rows.iter().map(|(scope, _)| named(scope)).collect();
        assert_eq!((rows.len(), covered.len()), (2_001, 2_001), "{sql}");
    }
}
