//! A permanent deletion leaves the opaque id, and nothing else.

use std::path::Path;

use evictd_core::position::LogPosition;
use evictd_core::time::StoreTime;
use evictd_postgres_server::Postgres;
use evictd_store::HomeStore;
use evictd_store::audit::Purge;
use evictd_store::change::{DeleteMode, Edit, KeyUpdate};

use super::connect;
use crate::fixture::{actor, asking, key, populate, receipt};

/// Whether any file below `directory` contains `trace`.
fn contains(directory: &Path, trace: &[u8]) -> bool {
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return contains(&path, trace);
        }
        std::fs::read(path).unwrap().windows(trace.len()).any(|window| window == trace)
    })
}

#[tokio::test]
async fn what_was_permanently_deleted_is_gone_from_the_tables_files_once_the_log_is_purged() {
    let server = Postgres::start().unwrap();
    let store = connect(&server.url()).await;
    populate(&store, 0).await;
    let mut secret = key(1);
    let hash: Vec<u8> = (100..132).collect();
    secret.hash.0.copy_from_slice(&hash);
    secret.name = Some("Jane-Q-Example".to_owned());
    secret.meta = Some(r#"{"email":"jane@example.com"}"#.to_owned());
    secret.external_id = Some("customer-of-old".to_owned());
    store.create_key(&actor(), secret.clone()).await.unwrap();
    let update = KeyUpdate { name: Edit::Set("John-Q-Example".to_owned()), ..KeyUpdate::default() };
    store.update_key(&actor(), &secret.id, update, &|_| true).await.unwrap();
    store.delete_key(&asking("req_d"), &secret.id, DeleteMode::Permanent, &|_| true).await.unwrap();
    store.number(100).await.unwrap();
    let open = store.open_requests(LogPosition::ZERO, 100).await.unwrap();
    let receipts: Vec<_> =
        open.iter().map(|row| receipt(&row.request_id, row.position, r#"{"keyId":"key_1"}"#)).collect();
    store.record_receipts(&receipts).await.unwrap();

    let traces: [&[u8]; 5] =
        [&hash, b"Jane-Q-Example", b"John-Q-Example", b"jane@example.com", b"customer-of-old"];
    let files = server.data_dir().join("base");
    server.query("CHECKPOINT").unwrap();
    assert!(traces.iter().all(|trace| contains(&files, trace)), "or this test would see nothing");

    let everything = Purge {
        log_before: StoreTime(i64::MAX),
        receipts_before: StoreTime(0),
        audit_before: None,
        limit: 1_000,
    };
    assert!(store.purge(everything).await.unwrap().log > 0);
    store.close().await;
    // Each on its own: VACUUM runs in no transaction with others.
    server.query("VACUUM FULL").unwrap();
    server.query("CHECKPOINT").unwrap();
    for trace in traces {
        assert!(!contains(&files, trace), "{} is still there", String::from_utf8_lossy(trace));
    }
    assert!(contains(&files, b"key_1"), "the audit log knows which it was");
}
