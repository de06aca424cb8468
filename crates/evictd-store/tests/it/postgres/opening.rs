//! Why a store can't be opened, who may migrate it, and what a publisher's user needs.

use std::fs;

use evictd_postgres_server::Postgres;
use evictd_store::change::DeleteMode;
use evictd_store::postgres::{PostgresReader, PostgresStore};
use evictd_store::{ChangeStore, HomeStore, LogStore, OperatorStore, ReceiptStore, RosterStore, StoreError};

use super::{connect, options, populated, run};
use crate::fixture::{actor, api_id, asking, instance, key, news, operator, populate, receipt, run_round};

async fn refusal(url: &str) -> String {
    let error = PostgresStore::connect(options(url)).await.unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_opened_says_why_and_shows_no_password() {
    let mut server = Postgres::start().unwrap();
    let port = server.port();
    let message = refusal(&format!("postgres://evictd:hunter2@127.0.0.1:{port}/nowhere")).await;
    assert!(
        message.contains(&format!("127.0.0.1:{port}/nowhere")) && message.contains("CREATE DATABASE"),
        "{message}"
    );
    let message = refusal(&format!("{}?sslmode=require", server.url())).await;
    assert!(message.contains("TLS failed"), "{message}");

    let hba = server.data_dir().join("pg_hba.conf");
    let as_it_was = fs::read_to_string(&hba).unwrap();
    let entry = |method: &str| {
        let mine = format!("host all clerk 127.0.0.1/32 {method}\n{as_it_was}");
        fs::write(&hba, mine).unwrap();
        server.set("log_checkpoints = on").unwrap();
    };
    server.query("CREATE ROLE clerk LOGIN PASSWORD 'another'").unwrap();
    entry("scram-sha-256");
    let clerk = format!("postgres://clerk:hunter2@127.0.0.1:{port}/evictd");
    assert!(refusal(&clerk).await.contains("the password is wrong"));
    entry("reject");
    assert!(refusal(&clerk).await.contains("pg_hba.conf"));

    tokio::task::block_in_place(|| server.kill().unwrap());
    let message = refusal(&server.url().replace("evictd@", "evictd:hunter2@")).await;
    assert!(message.contains("no server listens there"), "{message}");
}

#[tokio::test]
async fn stores_opened_at_once_on_an_empty_database_all_work() {
    let server = evictd_postgres_server::shared().unwrap();
    let url = server.create_database("opened_at_once").unwrap();
    let (one, two, three) = tokio::join!(connect(&url), connect(&url), connect(&url));
    for store in [one, two, three] {
        store.check_triggers().await.unwrap();
        store.close().await;
    }
}

#[tokio::test]
async fn another_schema_version_is_refused() {
    let fixture = populated(0).await;
    run(&fixture.url, r"UPDATE _sqlx_migrations SET checksum = '\x00'").await;
    let error = PostgresStore::connect(options(&fixture.url)).await.unwrap_err();
    assert!(matches!(error, StoreError::Migrate(_)), "{error:?}");
    let error = PostgresReader::connect(options(&fixture.url)).await.unwrap_err();
    assert!(matches!(error, StoreError::NotMigrated { .. }), "{error:?}");
}

#[tokio::test]
async fn user_without_rights_to_migrate_needs_only_the_tables() {
    let server = evictd_postgres_server::shared().unwrap();
    let owners = server.create_database("least_privilege").unwrap();
    server.query("CREATE ROLE publisher LOGIN").unwrap();
    let url = owners.replace("evictd@", "publisher@");
    let error = PostgresStore::connect(options(&url)).await.unwrap_err();
    assert!(matches!(error, StoreError::NotMigrated { .. }), "{error:?}");
    assert!(error.to_string().contains("evictd migrate"), "{error}");

    connect(&owners).await.close().await;
    let error = PostgresStore::connect(options(&url)).await.unwrap_err();
    assert!(error.to_string().contains("GRANT SELECT"), "{error}");
    run(&owners, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO publisher").await;
    let store = connect(&url).await;
    populate(&store, 2).await;
    store.check_triggers().await.unwrap();
    store.delete_api(&asking("req_a"), &api_id()).await.unwrap();
    let head = run_round(&store, &[instance(1)]).await.numbered.head.at;
    store.record_receipts(&[receipt("req_a", head, "{}")]).await.unwrap();
    store.begin_epoch(&operator()).await.unwrap();
    store.expire(10).await.unwrap();
    store.create_key(&actor(), key(9)).await.unwrap_err();
    assert_eq!(news(&store).await, []);
}

#[tokio::test]
async fn missing_rights_are_reported_and_suffice() {
    let server = evictd_postgres_server::shared().unwrap();
    let owners = server.create_database("rights").unwrap();
    server.query("CREATE ROLE worker LOGIN").unwrap();
    let owner = connect(&owners).await;
    populate(&owner, 1).await;
    run(&owners, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO worker").await;
    let store = connect(&owners.replace("evictd@", "worker@")).await;

    let Err(StoreError::RightMissing { grants }) = store.check_triggers().await else {
        panic!("it has none")
    };
    assert!(grants.contains("GRANT INSERT ON audit_log TO worker"), "{grants}");
    for grant in grants.split("; ") {
        run(&owners, grant).await;
    }
    store.check_triggers().await.unwrap();
    store.create_key(&asking("req_k"), key(2)).await.unwrap();
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    store.delete_api(&asking("req_a"), &api_id()).await.unwrap();
    let head = run_round(&store, &[instance(1)]).await.numbered.head.at;
    store.record_receipts(&[receipt("req_a", head, "{}")]).await.unwrap();
    store.mark_departed(&[instance(1).identity]).await.unwrap();
    run(&owners, "UPDATE root_keys SET expires = 1; UPDATE keys SET expires = 1").await;
    assert_eq!(store.expire(10).await.unwrap(), 2);
    run(&owners, "REVOKE DELETE ON keys FROM worker").await;
    let Err(StoreError::RightMissing { grants }) = store.check_triggers().await else {
        panic!("it lacks one")
    };
    assert_eq!(grants, "GRANT DELETE ON keys TO worker");
    store.close().await;
    owner.close().await;
}
