//! Copies of the home database that an agent must not read: their head may come before what it vouches for.

use evictd_core::ids::KeyHash;
use evictd_core::record::Record;
use evictd_postgres_server::{Postgres, StopMode};
use evictd_store::StoreError;
use evictd_store::postgres::{PostgresReader, PostgresStore};

use super::{connect, options, wait_for};
use crate::fixture::{populate, run_round};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_reads_no_logical_replica() {
    let mut home = Postgres::start().unwrap();
    home.set("wal_level = logical").unwrap();
    tokio::task::block_in_place(|| home.restart(StopMode::Fast).unwrap());
    let store: PostgresStore = connect(&home.url()).await;
    populate(&store, 3).await;
    home.query("CREATE PUBLICATION everything FOR TABLE log_head, keys, root_keys, apis, workspaces")
        .unwrap();

    let copy = Postgres::start().unwrap();
    connect(&copy.url()).await;
    let reader = PostgresReader::connect(options(&copy.url())).await.unwrap();
    assert_eq!(reader.lookup(KeyHash([1; 32])).await.unwrap().record, Record::Absent, "its own log");
    copy.query("TRUNCATE log_head").unwrap();
    let subscribe = format!(
        "CREATE SUBSCRIPTION mine CONNECTION 'host=127.0.0.1 port={} user=evictd dbname=evictd' PUBLICATION everything",
        home.port()
    );
    copy.query(&subscribe).unwrap();
    wait_for(&copy, "SELECT count(*) FROM keys", "3");
    wait_for(&copy, "SELECT count(*) FROM log_head", "1");

    let own = PostgresReader::connect(options(&home.url())).await.unwrap();
    assert!(matches!(own.lookup(KeyHash([1; 32])).await.unwrap().record, Record::Key(_)));
    // Also a connection from before there was a subscription.
    let later = PostgresReader::connect(options(&copy.url())).await.unwrap();
    for reader in [&reader, &later] {
        let error = reader.lookup(KeyHash([1; 32])).await.unwrap_err();
        assert!(matches!(error, StoreError::NotAReplica), "{error:?}");
        assert!(error.to_string().contains("streaming replica"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn promoted_standby_is_no_replica() {
    let home = Postgres::start().unwrap();
    let store = PostgresStore::connect(options(&home.url())).await.unwrap();
    populate(&store, 1).await;
    run_round(&store, &[]).await;
    let standby = home.standby().unwrap();
    wait_for(&standby, "SELECT count(*) FROM keys", "1");
    let reader = PostgresReader::connect(options(&standby.url())).await.unwrap();
    assert!(matches!(reader.lookup(KeyHash([1; 32])).await.unwrap().record, Record::Key(_)));

    standby.promote().unwrap();
    standby.query("UPDATE keys SET enabled = NOT enabled").unwrap();
    let error = reader.lookup(KeyHash([1; 32])).await.unwrap_err();
    assert!(matches!(error, StoreError::NotAReplica), "{error:?}");
}
