//! R3: whatever a verification reads, and whoever changes it, the log says so.

use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::{Record, RecordState};
use evictd_store::{HomeStore, LogStore, RecordStore, StoreError};

use super::{after, populated, run};
use crate::fixture::{api_id, key_scope, news, root_key, workspace};

fn key_in(n: u8, id: &str, api: &str) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(KeyId::new(id)), api_id: Some(ApiId::new(api)) }
}

fn root_scope(n: u8) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(root_key().id), api_id: None }
}

/// The hash `n n n ...` as an SQL literal.
fn hash(n: u8) -> String {
    format!(r"'\x{}'", format!("{n:02x}").repeat(32))
}

#[tokio::test]
async fn direct_sql_on_a_key_lands_in_the_log() {
    let fixture = populated(1).await;
    let cases = [
        ("UPDATE keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE keys SET enabled = false", Cause::Changed),
        ("UPDATE keys SET enabled = true, name = 'other'", Cause::Changed),
        ("UPDATE keys SET meta = NULL", Cause::Changed),
        ("UPDATE keys SET external_id = NULL", Cause::Changed),
        ("UPDATE keys SET permissions = '[]'", Cause::Changed),
        ("UPDATE keys SET expires = 1", Cause::Changed),
        ("UPDATE keys SET expired = true", Cause::Expired),
        (
            "INSERT INTO keys SELECT * FROM keys ON CONFLICT (id) DO UPDATE SET expired = false",
            Cause::Changed,
        ),
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
        "UPDATE apis SET name = 'x', delete_protection = true",
        "UPDATE root_keys SET name = 'x'",
        "UPDATE workspaces SET created_at_m = 5",
        "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'new')",
        "INSERT INTO workspaces (id) VALUES ('ws_2')",
        "UPDATE keys SET enabled = false WHERE id = 'nobody'",
        "BEGIN; UPDATE keys SET enabled = false; ROLLBACK",
    ] {
        assert_eq!(after(&fixture, sql).await, [], "{sql}");
    }
}

#[tokio::test]
async fn a_key_that_gets_another_hash_api_or_workspace_is_news_under_the_old_and_the_new() {
    let fixture = populated(1).await;
    let sql = format!("UPDATE keys SET hash = {}", hash(9));
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_scope(1), Cause::Changed), (key_in(9, "key_1", "api_1"), Cause::Created)]
    );
    let sql = "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'new');
               UPDATE keys SET api_id = 'api_2'";
    assert_eq!(
        after(&fixture, sql).await,
        [(key_in(9, "key_1", "api_1"), Cause::Changed), (key_in(9, "key_1", "api_2"), Cause::Changed)]
    );
    let sql = "INSERT INTO workspaces (id) VALUES ('ws_2'); UPDATE keys SET workspace_id = 'ws_2'";
    assert_eq!(after(&fixture, sql).await.len(), 2);
}

#[tokio::test]
async fn direct_sql_on_a_root_key_lands_in_the_log() {
    let fixture = populated(0).await;
    let cases = [
        ("UPDATE root_keys SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE root_keys SET deleted_at_m = NULL", Cause::Restored),
        ("UPDATE root_keys SET permissions = '[]'", Cause::Changed),
        ("UPDATE root_keys SET enabled = false", Cause::Changed),
        ("UPDATE root_keys SET expires = 1", Cause::Changed),
        ("UPDATE root_keys SET expired = true", Cause::Expired),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(&fixture, sql).await, [(root_scope(255), cause)], "{sql}");
    }
    let sql = format!("UPDATE root_keys SET hash = {}", hash(254));
    assert_eq!(
        after(&fixture, &sql).await,
        [(root_scope(255), Cause::Changed), (root_scope(254), Cause::Created)]
    );
    assert_eq!(after(&fixture, "DELETE FROM root_keys").await, [(root_scope(254), Cause::Erased)]);
}

#[tokio::test]
async fn direct_sql_on_an_api_is_one_row_however_many_keys_it_has() {
    let fixture = populated(5).await;
    let api = Scope::Api(api_id());
    let cases = [
        ("UPDATE apis SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE apis SET deleted_at_m = 2", Cause::Changed),
        ("UPDATE apis SET deleted_at_m = NULL", Cause::Restored),
        // Only where nobody checks foreign keys can an API go from under its keys, and come back.
        ("SET session_replication_role = replica; DELETE FROM apis", Cause::Erased),
        ("INSERT INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_1', 'back')", Cause::Restored),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(&fixture, sql).await, [(api.clone(), cause)], "{sql}");
    }
}

#[tokio::test]
async fn direct_sql_on_a_workspace_reaches_everything_in_it() {
    let fixture = populated(1).await;
    let scope = Scope::Workspace(workspace());
    assert_eq!(
        after(&fixture, "UPDATE workspaces SET enabled = false").await,
        [(scope.clone(), Cause::Changed)]
    );
    let lookup = fixture.store.lookup(KeyHash([1; 32])).await.unwrap();
    assert!(matches!(lookup.record, Record::Key(key) if key.state == RecordState::WorkspaceDisabled));

    let gone = "SET session_replication_role = replica; DELETE FROM workspaces";
    assert_eq!(after(&fixture, gone).await, [(scope.clone(), Cause::Erased)]);
    let lookup = fixture.store.lookup(KeyHash([1; 32])).await.unwrap();
    assert!(matches!(lookup.record, Record::Key(key) if key.state == RecordState::Deleted));
    let root = fixture.store.root_key(root_key().hash).await.unwrap().unwrap();
    assert_eq!(root.state, RecordState::Deleted);
    let back = "INSERT INTO workspaces (id) VALUES ('ws_1')";
    assert_eq!(after(&fixture, back).await, [(scope.clone(), Cause::Restored)]);
    let renamed = "SET session_replication_role = replica; UPDATE workspaces SET id = 'ws_2'";
    assert_eq!(
        after(&fixture, renamed).await,
        [(scope, Cause::Erased), (Scope::Workspace(WorkspaceId::new("ws_2")), Cause::Restored)]
    );
}

#[tokio::test]
async fn a_truncated_table_makes_everybody_forget_everything() {
    let fixture = populated(3).await;
    for sql in ["TRUNCATE keys", "TRUNCATE root_keys"] {
        assert_eq!(after(&fixture, sql).await, [(Scope::All, Cause::Erased)], "{sql}");
    }
    let rows = after(&fixture, "TRUNCATE workspaces CASCADE").await;
    assert_eq!(rows, vec![(Scope::All, Cause::Erased); 4], "once for each of the tables");
}

#[tokio::test]
async fn a_session_that_replicates_writes_the_log_as_well() {
    let fixture = populated(2).await;
    let sql = "SET session_replication_role = replica; DELETE FROM keys WHERE id = 'key_1'; TRUNCATE keys";
    assert_eq!(after(&fixture, sql).await, [(key_scope(1), Cause::Erased), (Scope::All, Cause::Erased)]);
}

#[tokio::test]
async fn somebody_who_may_change_keys_only_writes_the_log_and_cannot_lead_it_astray() {
    let fixture = populated(1).await;
    run(
        &fixture.url,
        "DO $$ BEGIN CREATE ROLE clerk; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
         GRANT SELECT, UPDATE ON keys TO clerk;
         CREATE SCHEMA decoy; CREATE TABLE decoy.invalidations (LIKE invalidations INCLUDING ALL);
         GRANT ALL ON SCHEMA decoy TO clerk; GRANT ALL ON ALL TABLES IN SCHEMA decoy TO clerk",
    )
    .await;
    let sql = "SET ROLE clerk; SET search_path = decoy, public;
               CREATE TEMP TABLE invalidations (LIKE public.invalidations);
               UPDATE keys SET enabled = false";
    let refused = "permission denied";
    let mut connection = super::stranger(&fixture.url).await;
    let error = sqlx::raw_sql("SET ROLE clerk; SELECT evictd_log('all', NULL, NULL, NULL, NULL, 'erased')")
        .execute(&mut connection)
        .await
        .unwrap_err();
    assert!(error.to_string().contains(refused), "{error}");
    run(&fixture.url, "GRANT SELECT ON invalidations TO clerk").await;
    assert_eq!(after(&fixture, sql).await, [(key_scope(1), Cause::Changed)]);
}

#[tokio::test]
async fn an_altered_disabled_or_missing_trigger_is_found() {
    let cases = [
        ("DROP TRIGGER keys_changed ON keys", "keys_changed"),
        ("ALTER TABLE apis DISABLE TRIGGER apis_truncated", "apis_truncated"),
        // As pg_restore --disable-triggers leaves them.
        ("ALTER TABLE keys DISABLE TRIGGER ALL; ALTER TABLE keys ENABLE TRIGGER ALL", "keys_changed"),
        ("ALTER TABLE root_keys ENABLE REPLICA TRIGGER root_keys_changed", "root_keys_changed"),
        (
            "DROP TRIGGER workspaces_changed ON workspaces;
             CREATE TRIGGER workspaces_changed AFTER INSERT OR DELETE ON workspaces
                 FOR EACH ROW EXECUTE FUNCTION evictd_workspaces_changed();
             ALTER TABLE workspaces ENABLE ALWAYS TRIGGER workspaces_changed",
            "workspaces_changed",
        ),
        (
            "CREATE OR REPLACE FUNCTION evictd_keys_changed() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
             SET search_path = public, pg_temp AS $$ BEGIN RETURN NULL; END $$",
            "evictd_keys_changed",
        ),
        ("ALTER FUNCTION evictd_truncated() RESET search_path", "evictd_truncated"),
        ("ALTER FUNCTION evictd_apis_changed() SECURITY INVOKER", "evictd_apis_changed"),
        ("DROP TABLE root_keys", "root_keys_changed"),
    ];
    for (sql, missing) in cases {
        let fixture = populated(0).await;
        fixture.store.check_triggers().await.unwrap();
        run(&fixture.url, sql).await;
        let error = fixture.store.check_triggers().await.unwrap_err();
        let StoreError::TriggerMissing { name } = error else { panic!("{sql}: {error:?}") };
        assert_eq!(name, missing, "{sql}");
        fixture.store.close().await;
    }
}

#[tokio::test]
async fn a_schema_of_its_own_with_an_odd_name_works_as_well() {
    let fixture = populated(0).await;
    run(&fixture.url, r#"CREATE SCHEMA "Home-1""#).await;
    let url = format!("{}?options[search_path]=%22Home-1%22", fixture.url);
    let store = super::connect(&url).await;
    store.check_triggers().await.unwrap();
    crate::fixture::populate(&store, 1).await;
    let sql = r#"UPDATE "Home-1".keys SET enabled = false"#;
    run(&fixture.url, sql).await;
    assert_eq!(news(&store).await, [(key_scope(1), Cause::Changed)], "whatever the stranger's search path");
    assert_eq!(news(&fixture.store).await, []);
    store.close().await;
}
