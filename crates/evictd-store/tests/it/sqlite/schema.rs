//! R3: what triggers don't see begins an epoch in the next round, and nothing else does.

use evictd_store::log::Round;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore, LogStore, OperatorStore, StoreError};
use sqlx::{AssertSqlSafe, Connection, Executor};

use super::{populated, stranger};
use crate::fixture::{SqliteFixture, instance, operator, run_round};

const DROP: &str = "DROP TRIGGER keys_after_delete;";
const DELETE: &str = "DELETE FROM keys WHERE id = 'key_1';";

async fn round(store: &dyn HomeStore) -> Round {
    run_round(store, &[instance(1)]).await
}

async fn run(fixture: &SqliteFixture, sql: &str) {
    let mut connection = stranger(&fixture.path()).await;
    connection.execute(AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
}

/// The statement that makes what is called so.
async fn text_of(fixture: &SqliteFixture, name: &str) -> String {
    let text = "SELECT sql || ';' FROM sqlite_master WHERE name = ?1";
    let mut connection = stranger(&fixture.path()).await;
    sqlx::query_scalar(text).bind(name).fetch_one(&mut connection).await.unwrap()
}

/// Failure: a check once a minute finds all triggers in place, and the key stays valid for ever.
#[tokio::test]
async fn change_that_no_trigger_saw_begins_an_epoch() {
    for (first, then) in [("", ""), ("BEGIN;", "COMMIT;")] {
        let fixture = populated(2).await;
        let before = round(&fixture.store).await;
        assert_eq!((before.began.is_some(), before.schema_fault), (false, None));
        let create = text_of(&fixture, "keys_after_delete").await;
        run(&fixture, &format!("{first} {DROP} {DELETE} {create} {then}")).await;
        // What numbers doesn't look, and hides nothing.
        fixture.store.number(10).await.unwrap();
        let after = round(&fixture.store).await;
        assert_eq!((after.began.is_some(), after.schema_fault), (true, None));
        assert_eq!(after.numbered.head.at.epoch(), before.numbered.head.at.epoch() + 1);
        assert!(round(&fixture.store).await.began.is_none(), "once");
        fixture.store.check_triggers().await.unwrap();
    }
}

#[tokio::test]
async fn schema_with_a_bypass_begins_an_epoch_and_is_reported() {
    for (sql, reported) in [
        (DROP, "trigger keys_after_delete"),
        (
            "ALTER TABLE keys RENAME TO old; CREATE TABLE keys AS SELECT * FROM old WHERE id <> 'key_1'",
            // A renamed table takes the texts of other tables' triggers along: all of them are named.
            "keys_after_delete",
        ),
        (
            "CREATE TABLE kept AS SELECT * FROM keys; DROP TABLE keys; CREATE TABLE keys AS SELECT * FROM kept",
            "keys_after_delete",
        ),
        (
            "CREATE TRIGGER keep_out BEFORE INSERT ON invalidations BEGIN SELECT RAISE(IGNORE); END",
            "DROP TRIGGER \"keep_out\"",
        ),
    ] {
        let fixture = populated(2).await;
        assert!(round(&fixture.store).await.began.is_none());
        run(&fixture, sql).await;
        let after = round(&fixture.store).await;
        assert!(after.began.is_some(), "{sql}");
        let fault = after.schema_fault.unwrap_or_default();
        assert!(fault.contains(reported), "{sql}: {fault}");
        let again = round(&fixture.store).await;
        assert_eq!((again.began.is_some(), again.schema_fault), (false, Some(fault)), "{sql}");
    }
}

/// Failure: a trigger stays away for minutes, rows go in between, and rounds prove that all is well; its return is one
/// step, as an index is.
#[tokio::test]
async fn no_round_proves_anything_while_a_trigger_is_missing() {
    let fixture = populated(2).await;
    let create = text_of(&fixture, "keys_after_delete").await;
    run(&fixture, DROP).await;
    assert!(round(&fixture.store).await.began.is_some());
    run(&fixture, DELETE).await;
    let meanwhile = round(&fixture.store).await;
    assert!(meanwhile.began.is_none() && meanwhile.schema_fault.is_some());
    // It stays so when an epoch begins for another reason, or the store is opened anew.
    fixture.store.begin_epoch(&operator()).await.unwrap();
    fixture.store.close().await;
    let store = SqliteStore::open(&fixture.path()).await.unwrap();
    run(&fixture, &create).await;
    let after = round(&store).await;
    assert_eq!((after.began.is_some(), after.schema_fault), (true, None));
    assert!(round(&store).await.began.is_none(), "once");
}

#[tokio::test]
async fn what_changes_nothing_unseen_begins_no_epoch() {
    let mut fixture = populated(3).await;
    let before = round(&fixture.store).await.numbered.head;
    for sql in [
        "VACUUM",
        "ANALYZE",
        "REINDEX",
        "CREATE INDEX mine ON keys (name)",
        "DROP INDEX mine",
        "CREATE TABLE mine (id TEXT REFERENCES keys (id))",
        "CREATE VIEW seen AS SELECT id FROM keys",
        "UPDATE keys SET enabled = 1 - enabled; DELETE FROM keys WHERE id = 'key_3'",
        // A change that was rolled back was none.
        "BEGIN; DROP TRIGGER keys_after_delete; DELETE FROM keys; ROLLBACK",
    ] {
        run(&fixture, sql).await;
        for _ in 0..2 {
            let round = round(&fixture.store).await;
            assert_eq!((round.began.is_some(), round.schema_fault), (false, None), "{sql}");
            assert_eq!(round.numbered.head.at.epoch(), before.at.epoch());
        }
        fixture.store.close().await;
        fixture.store = SqliteStore::open(&fixture.path()).await.unwrap();
    }
}

/// Failure: it is restarted after the change, and takes what it finds for what always was.
#[tokio::test]
async fn change_of_a_closed_store_begins_an_epoch_at_the_start() {
    let fixture = populated(2).await;
    round(&fixture.store).await;
    fixture.store.close().await;
    let create = text_of(&fixture, "keys_after_delete").await;
    run(&fixture, &format!("{DROP} {DELETE} {create}")).await;
    let store = SqliteStore::open(&fixture.path()).await.unwrap();
    assert!(round(&store).await.began.is_some());
}

#[tokio::test]
async fn store_without_fingerprint_is_migrated_without_an_epoch() {
    let fixture = populated(1).await;
    fixture.store.close().await;
    let older =
        "ALTER TABLE log_head DROP COLUMN schema_version; ALTER TABLE log_head DROP COLUMN schema_intact;
                 DELETE FROM _sqlx_migrations WHERE version = 3";
    run(&fixture, older).await;
    let store = SqliteStore::open(&fixture.path()).await.unwrap();
    let after = round(&store).await;
    assert_eq!((after.began.is_some(), after.schema_fault), (false, None));
}

#[tokio::test]
async fn foreign_trigger_is_reported_with_what_removes_it() {
    let fixture = populated(0).await;
    for table in ["invalidations", "LOG_HEAD"] {
        run(&fixture, &format!("CREATE TRIGGER \"A trigger\" BEFORE INSERT ON {table} BEGIN SELECT 1; END"))
            .await;
        let error = fixture.store.check_triggers().await.unwrap_err();
        let StoreError::ForeignObject { remedy, .. } = error else { panic!("{error:?}") };
        run(&fixture, &remedy).await;
        fixture.store.check_triggers().await.unwrap();
    }
    run(&fixture, "CREATE TRIGGER mine AFTER DELETE ON keys BEGIN SELECT 1; END").await;
    fixture.store.check_triggers().await.unwrap();
}
