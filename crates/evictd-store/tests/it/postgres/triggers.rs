//! R3: what only PostgreSQL's triggers face: upserts, TRUNCATE, replication, roles and search paths.

use evictd_core::invalidation::{Cause, Scope};
use evictd_store::{HomeStore, LogStore, StoreError};

use super::{after, populated, run};
use crate::fixture::{key_scope, news};

#[tokio::test]
async fn upsert_of_a_key_is_logged() {
    let fixture = populated(1).await;
    after(&fixture, "UPDATE keys SET expired = true").await;
    let sql = "INSERT INTO keys SELECT * FROM keys ON CONFLICT (id) DO UPDATE SET expired = false";
    assert_eq!(after(&fixture, sql).await, [(key_scope(1), Cause::Changed)]);
}

#[tokio::test]
async fn truncated_table_flushes_everything() {
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
async fn user_with_rights_to_keys_only_cannot_misdirect_the_log() {
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
