//! R3: what triggers don't see begins an epoch in the next round, and nothing else does; and no table of another schema,
//! no child and no rule stands in for the store's own.

use evictd_core::ids::KeyHash;
use evictd_core::record::{Lookup, Record, RecordState};
use evictd_store::change::{ChangeError, DeleteMode};
use evictd_store::log::{Head, Round};
use evictd_store::postgres::{PostgresReader, PostgresStore};
use evictd_store::{ChangeStore, HomeStore, LogStore, OperatorStore, RecordStore, StoreError};
use sqlx::Executor;

use super::{connect, options, populated, run};
use crate::fixture::{actor, instance, key, run_round};

const DELETE: &str = "DELETE FROM keys WHERE id = 'key_1';";
const RESTORE: &str =
    "ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed, ENABLE ALWAYS TRIGGER keys_truncated;";

async fn round(store: &dyn HomeStore) -> Round {
    run_round(store, &[instance(1)]).await
}

/// Runs `sql`, then rounds: the first begins an epoch, and no later one does. Returns what is wrong with the schema.
async fn fault_after(sql: &str) -> Option<String> {
    let fixture = populated(3).await;
    let before = round(&fixture.store).await;
    assert_eq!((before.began.is_some(), before.schema_fault), (false, None));
    run(&fixture.url, sql).await;
    // What numbers doesn't look, and hides nothing.
    fixture.store.number(10).await.unwrap();
    let after = round(&fixture.store).await;
    assert!(after.began.is_some(), "{sql}");
    assert!(after.numbered.head.at.epoch() > before.numbered.head.at.epoch());
    let again = round(&fixture.store).await;
    assert_eq!((again.began.is_some(), &again.schema_fault), (false, &after.schema_fault), "{sql}");
    fixture.store.close().await;
    after.schema_fault
}

/// Failure: a check once a minute finds all triggers in place, and the key stays valid for ever.
#[tokio::test]
async fn change_that_no_trigger_saw_begins_an_epoch() {
    for sql in [
        format!(
            "ALTER TABLE keys DISABLE TRIGGER ALL; {DELETE} ALTER TABLE keys ENABLE TRIGGER ALL; {RESTORE}"
        ),
        format!("BEGIN; ALTER TABLE keys DISABLE TRIGGER keys_changed; {DELETE} {RESTORE} COMMIT"),
        format!("ALTER TABLE keys DISABLE TRIGGER USER; TRUNCATE keys; {RESTORE}"),
        "ALTER TABLE keys ALTER COLUMN enabled TYPE boolean USING false".to_owned(),
        format!(
            "DO $do$
             DECLARE was text := pg_get_functiondef('evictd_keys_changed'::regproc);
             BEGIN
                 EXECUTE 'CREATE OR REPLACE FUNCTION evictd_keys_changed() RETURNS trigger LANGUAGE plpgsql
                          SECURITY DEFINER AS $$ BEGIN RETURN NULL; END $$';
                 {DELETE}
                 EXECUTE was;
             END $do$"
        ),
        "TRUNCATE invalidations".to_owned(),
    ] {
        assert_eq!(fault_after(&sql).await, None, "{sql}");
    }
}

#[tokio::test]
async fn schema_with_a_bypass_begins_an_epoch_and_is_reported() {
    for (sql, reported) in [
        ("ALTER TABLE keys DISABLE TRIGGER ALL", "trigger keys_changed"),
        // As pg_restore --disable-triggers leaves them.
        ("ALTER TABLE keys ENABLE TRIGGER ALL", "trigger keys_changed"),
        (
            "ALTER TABLE keys RENAME TO old; CREATE TABLE keys (LIKE old INCLUDING ALL);
             INSERT INTO keys SELECT * FROM old WHERE id <> 'key_1'",
            "trigger keys_changed",
        ),
        (
            "CREATE TABLE restored AS SELECT * FROM keys; DROP TABLE keys; ALTER TABLE restored RENAME TO keys",
            "trigger keys_changed",
        ),
        ("DROP TRIGGER keys_changed ON keys", "trigger keys_changed"),
        ("CREATE TABLE more () INHERITS (keys)", "ALTER TABLE more NO INHERIT keys"),
        ("CREATE RULE kept AS ON DELETE TO keys DO INSTEAD NOTHING", "DROP RULE kept ON keys"),
        (
            "CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
             CREATE TRIGGER keep_out BEFORE INSERT ON invalidations FOR EACH ROW EXECUTE FUNCTION keep_out()",
            "DROP TRIGGER keep_out ON invalidations",
        ),
    ] {
        let fault = fault_after(sql).await.unwrap_or_default();
        assert!(fault.contains(reported), "{sql}: {fault}");
    }
}

/// Failure: triggers stay off for minutes, the rows go in between, and rounds prove that all is well.
#[tokio::test]
async fn no_round_proves_anything_while_a_trigger_is_off() {
    let fixture = populated(2).await;
    let store = &fixture.store;
    run(&fixture.url, "ALTER TABLE keys DISABLE TRIGGER keys_changed").await;
    assert!(round(store).await.began.is_some());
    run(&fixture.url, DELETE).await;
    let meanwhile = round(store).await;
    assert!(meanwhile.began.is_none() && meanwhile.schema_fault.is_some());
    // It stays so when an epoch begins for another reason, or the store is opened anew.
    store.begin_epoch(&crate::fixture::operator()).await.unwrap();
    let other = connect(&fixture.url).await;
    assert!(round(&other).await.schema_fault.is_some());
    run(&fixture.url, RESTORE).await;
    let after = round(store).await;
    assert_eq!((after.began.is_some(), after.schema_fault), (true, None));
    let after = round(&other).await;
    assert_eq!((after.began.is_some(), after.schema_fault), (false, None));
    other.close().await;
}

#[tokio::test]
async fn what_changes_nothing_unseen_begins_no_epoch() {
    let fixture = populated(3).await;
    let before = round(&fixture.store).await.numbered.head;
    let mut other = connect(&fixture.url).await;
    for sql in [
        "VACUUM",
        "VACUUM FREEZE",
        "ANALYZE",
        "REINDEX TABLE keys",
        "CREATE INDEX mine ON keys (name)",
        "DROP INDEX mine",
        "CREATE TABLE mine (id TEXT REFERENCES keys (id) ON DELETE CASCADE)",
        "CREATE INDEX elsewhere ON mine (id)",
        "CREATE VIEW seen AS SELECT id FROM keys",
        "GRANT SELECT ON keys TO PUBLIC",
        "ALTER TABLE keys SET (fillfactor = 50); ALTER TABLE keys ALTER COLUMN id SET STATISTICS 7",
        "VACUUM FULL pg_class, pg_trigger, pg_proc, pg_attribute",
        "UPDATE keys SET enabled = NOT enabled; DELETE FROM keys WHERE id = 'key_3'",
        // Not in a table of the store.
        "CREATE TABLE more () INHERITS (keys); INSERT INTO more SELECT * FROM keys; DROP TABLE more",
        // A change that was rolled back was none.
        "BEGIN; ALTER TABLE keys DISABLE TRIGGER ALL; DELETE FROM keys; ROLLBACK",
    ] {
        run(&fixture.url, sql).await;
        for store in [&fixture.store, &other] {
            let round = round(store).await;
            assert_eq!((round.began.is_some(), round.schema_fault), (false, None), "{sql}");
            assert_eq!(round.numbered.head.at.epoch(), before.at.epoch());
        }
        other.close().await;
        other = connect(&fixture.url).await;
    }
    other.close().await;
}

#[tokio::test]
async fn store_without_fingerprint_is_migrated_without_an_epoch() {
    let fixture = populated(1).await;
    let before = fixture.store.head().await.unwrap();
    fixture.store.close().await;
    let older = "ALTER TABLE log_head DROP COLUMN schema_fingerprint, DROP COLUMN schema_intact;
                 DELETE FROM _sqlx_migrations WHERE version = 3";
    run(&fixture.url, older).await;
    let store = connect(&fixture.url).await;
    let after = round(&store).await;
    // A round draws a token of its own.
    let before = Head { round: after.numbered.head.round, ..before };
    assert_eq!((after.numbered.head, after.began.is_some(), after.schema_fault), (before, false, None));
    store.close().await;
}

/// What both read of key `n`.
async fn lookups(store: &PostgresStore, reader: &PostgresReader, n: u8) -> [Lookup; 2] {
    let hash = KeyHash([n; 32]);
    [store.lookup(hash).await.unwrap(), reader.lookup(hash).await.unwrap()]
}

/// Failure: a table of the same name comes first for the user of a publisher, or of an agent, and holds what was deleted.
#[tokio::test]
async fn a_table_of_the_same_name_in_another_schema_is_not_read() {
    let fixture = populated(2).await;
    let decoy = "CREATE SCHEMA evictd; CREATE TABLE evictd.keys AS SELECT * FROM public.keys;
                 CREATE TABLE evictd.invalidations (LIKE public.invalidations INCLUDING ALL)";
    run(&fixture.url, decoy).await;
    let later = connect(&fixture.url).await;
    let reader = PostgresReader::connect(options(&fixture.url)).await.unwrap();
    later.delete_key(&actor(), &key(1).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    assert_eq!(round(&later).await.numbered.rows.len(), 1);
    fixture.store.delete_key(&actor(), &key(2).id, DeleteMode::Soft, &|_| true).await.unwrap();
    assert_eq!(round(&fixture.store).await.numbered.rows.len(), 1);
    for store in [&fixture.store, &later] {
        for found in lookups(store, &reader, 1).await {
            assert_eq!(found.record, Record::Absent);
        }
        for found in lookups(store, &reader, 2).await {
            assert!(matches!(found.record, Record::Key(key) if key.state == RecordState::Deleted));
        }
        store.check_triggers().await.unwrap();
    }
    reader.close().await;
    later.close().await;
}

#[tokio::test]
async fn a_log_head_without_the_other_tables_is_refused() {
    let fixture = populated(1).await;
    let decoy = "CREATE SCHEMA evictd; CREATE TABLE evictd.log_head AS SELECT * FROM public.log_head;
                 CREATE TABLE evictd._sqlx_migrations AS SELECT * FROM public._sqlx_migrations";
    run(&fixture.url, decoy).await;
    let publisher = PostgresStore::connect(options(&fixture.url)).await.unwrap_err();
    let reader = PostgresReader::connect(options(&fixture.url)).await.unwrap_err();
    for error in [publisher, reader] {
        let StoreError::TablesMissing { schema, tables, .. } = &error else { panic!("{error:?}") };
        assert_eq!(schema, "evictd");
        assert!(tables.contains("keys") && tables.contains("invalidations"), "{tables}");
        assert!(error.to_string().contains("search_path"), "{error}");
    }
    // With the right search path, publishers work.
    round(&fixture.store).await;
    let url = format!("{}?options[search_path]=public", fixture.url);
    connect(&url).await.close().await;
}

/// Failure: rows of a child table are read as the parent's, and no trigger of the parent's fires for them.
#[tokio::test]
async fn rows_of_a_child_table_are_not_the_stores() {
    let fixture = populated(1).await;
    let reader = PostgresReader::connect(options(&fixture.url)).await.unwrap();
    let child =
        "CREATE TABLE more () INHERITS (keys); INSERT INTO more SELECT * FROM keys; DELETE FROM ONLY keys";
    run(&fixture.url, child).await;
    for found in lookups(&fixture.store, &reader, 1).await {
        assert_eq!(found.record, Record::Absent);
    }
    reader.close().await;
}

/// Failure: a trigger on the log that was there for a moment has kept rows out, and left no trace.
#[tokio::test]
async fn a_change_whose_row_is_kept_out_of_the_log_fails() {
    for keep_out in [
        "CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER keep_out BEFORE INSERT ON invalidations FOR EACH ROW EXECUTE FUNCTION keep_out()",
        "CREATE RULE keep_out AS ON INSERT TO invalidations DO INSTEAD NOTHING",
    ] {
        let fixture = populated(1).await;
        let mut client = super::stranger(&fixture.url).await;
        client.execute(keep_out).await.unwrap();
        let refused = client.execute("DELETE FROM keys").await.unwrap_err();
        assert!(refused.to_string().contains("invalidations"), "{refused}");
        let refused = fixture.store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await;
        assert!(matches!(refused, Err(ChangeError::Store(StoreError::Database { .. }))), "{refused:?}");
    }
}

/// Each is removed as the message says.
#[tokio::test]
async fn foreign_objects_are_reported_with_what_removes_them() {
    let fixture = populated(0).await;
    for sql in [
        "CREATE TABLE more () INHERITS (keys)",
        "CREATE RULE \"A rule\" AS ON DELETE TO keys DO INSTEAD NOTHING",
        "CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
         CREATE TRIGGER keep_out BEFORE INSERT ON invalidations FOR EACH ROW EXECUTE FUNCTION keep_out()",
        "CREATE TRIGGER keep_out BEFORE UPDATE ON log_head FOR EACH ROW EXECUTE FUNCTION keep_out()",
    ] {
        run(&fixture.url, sql).await;
        let error = fixture.store.check_triggers().await.unwrap_err();
        let StoreError::ForeignObject { remedy, .. } = error else { panic!("{sql}: {error:?}") };
        run(&fixture.url, &remedy).await;
        fixture.store.check_triggers().await.unwrap();
    }
    // On a table of records it changes nothing that goes past the log.
    run(&fixture.url, "CREATE TRIGGER mine BEFORE UPDATE ON keys FOR EACH ROW EXECUTE FUNCTION keep_out()")
        .await;
    fixture.store.check_triggers().await.unwrap();
}
