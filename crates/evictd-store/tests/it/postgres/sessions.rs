//! What a connection must bring along: it sees every row, its commits are durable, and it is one connection.

use evictd_core::ids::KeyHash;
use evictd_store::log::RoundRequest;
use evictd_store::postgres::{PostgresReader, PostgresStore};
use evictd_store::{ChangeStore, LogStore, StoreError};
use sqlx::{Connection, Row};

use super::{between, connect, options, populated, run, stranger};
use crate::fixture::{actor, key, news, populate, run_round};

/// The URL of the same database for another user, at another port.
fn through(url: &str, port: u16, user: &str) -> String {
    let (_, database) = url.rsplit_once('/').unwrap();
    format!("postgres://{user}@127.0.0.1:{port}/{database}")
}

fn port() -> u16 {
    evictd_postgres_server::shared().unwrap().port()
}

fn assert_says_rows_are_hidden<T: std::fmt::Debug>(outcome: Result<T, StoreError>) {
    let Err(StoreError::Database { source, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(source.to_string().contains("row-level security"), "{source}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_rows_are_an_error_and_not_absent() {
    let fixture = populated(2).await;
    let server = evictd_postgres_server::shared().unwrap();
    server.query("CREATE ROLE restricted LOGIN").unwrap();
    run(
        &fixture.url,
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO restricted;
         ALTER TABLE invalidations ENABLE ROW LEVEL SECURITY",
    )
    .await;
    let url = through(&fixture.url, port(), "restricted");
    let store = connect(&url).await;
    // Also behind a pooler that drops the session's settings.
    let without_settings =
        connect(&through(&url, between::without_settings(port()).await, "restricted")).await;
    run(&fixture.url, "DELETE FROM keys WHERE id = 'key_1'").await;
    assert_says_rows_are_hidden(store.number(10).await);
    for publisher in [&store, &without_settings] {
        assert_says_rows_are_hidden(publisher.round(RoundRequest::default()).await);
    }
    run(&fixture.url, "ALTER TABLE invalidations DISABLE ROW LEVEL SECURITY").await;
    assert_eq!(news(&store).await.len(), 1);

    let reader = PostgresReader::connect(options(&url)).await.unwrap();
    reader.lookup(KeyHash([2; 32])).await.unwrap();
    for table in ["log_head", "keys", "apis", "workspaces", "root_keys"] {
        run(&fixture.url, &format!("ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")).await;
        assert_says_rows_are_hidden(reader.lookup(KeyHash([2; 32])).await);
        run(&fixture.url, &format!("ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_is_durable_whatever_the_role_and_a_pooler_say() {
    let fixture = populated(2).await;
    let server = evictd_postgres_server::shared().unwrap();
    server.query("CREATE ROLE hasty LOGIN SUPERUSER").unwrap();
    server.query("ALTER ROLE hasty SET synchronous_commit = off").unwrap();
    run(
        &fixture.url,
        "CREATE TABLE commits (setting text NOT NULL);
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO commits VALUES (current_setting(''synchronous_commit'')); RETURN NULL; END';
         CREATE TRIGGER noted AFTER UPDATE ON log_head FOR EACH ROW EXECUTE FUNCTION note();
         CREATE TRIGGER noted AFTER INSERT ON keys FOR EACH ROW EXECUTE FUNCTION note()",
    )
    .await;
    let url = through(&fixture.url, between::without_settings(port()).await, "hasty");
    let store = connect(&url).await;
    store.create_key(&actor(), key(7)).await.unwrap();
    run_round(&store, &[]).await;
    let mut connection = stranger(&fixture.url).await;
    let noted =
        sqlx::raw_sql("SELECT DISTINCT setting, (SELECT count(*) FROM commits) AS count FROM commits");
    let noted = noted.fetch_all(&mut connection).await.unwrap();
    assert_eq!(noted.len(), 1);
    assert_eq!(noted[0].get::<&str, _>("setting"), "on");
    assert!(noted[0].get::<i64, _>("count") >= 2);
    connection.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_lends_one_connection_to_several_is_refused() {
    let fixture = populated(1).await;
    let lending = through(&fixture.url, between::lending(port()).await, "evictd");
    for error in [
        PostgresStore::connect(options(&lending)).await.unwrap_err(),
        PostgresReader::connect(options(&lending)).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
        assert!(error.to_string().contains("pool_mode = session"), "{error}");
    }
    // One that keeps them together is welcome.
    let keeping = through(&fixture.url, between::without_settings(port()).await, "evictd");
    PostgresReader::connect(options(&keeping)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_hold_every_name_is_refused() {
    let server = evictd_postgres_server::shared().unwrap();
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let name = encoding.to_lowercase();
        server.query(&format!("CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")).unwrap();
        let url = format!("postgres://evictd@127.0.0.1:{}/{name}", server.port());
        let error = PostgresStore::connect(options(&url)).await.unwrap_err();
        assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
        let (message, cause) = (error.to_string(), format!("{error:?}"));
        assert!(message.contains("ENCODING 'UTF8'") && cause.contains(encoding), "{message} {cause}");
    }
    let store = connect(&server.create_database("utf8").unwrap()).await;
    populate(&store, 1).await;
}
