//! A permanent deletion leaves only the opaque id, both in the tables and in the planner's statistics.

use std::path::Path;
use std::time::Duration;

use evictd_core::position::LogPosition;
use evictd_postgres_server::Postgres;
use evictd_store::audit::Purge;
use evictd_store::change::{DeleteMode, Edit, KeyUpdate};
use evictd_store::{ChangeStore, HomeStore, LogStore, ReceiptStore};

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
async fn erased_key_is_gone_from_the_files_after_the_purge() {
    let server = Postgres::start().unwrap();
    let store = connect(&server.url()).await;
    // The planner's statistics hold values only of columns with several.
    populate(&store, 3).await;
    let mut secret = key(9);
    let hash: Vec<u8> = (100..132).collect();
    secret.hash.0.copy_from_slice(&hash);
    secret.name = Some("Jane-Q-Example".to_owned());
    secret.meta = Some(r#"{"email":"jane@example.com"}"#.to_owned());
    secret.external_id = Some("customer-of-old".to_owned());
    store.create_key(&actor(), secret.clone()).await.unwrap();
    let update = KeyUpdate { name: Edit::Set("John-Q-Example".to_owned()), ..KeyUpdate::default() };
    store.update_key(&actor(), &secret.id, update, &|_| true).await.unwrap();
    server.query("ANALYZE").unwrap();
    store.delete_key(&asking("req_d"), &secret.id, DeleteMode::Permanent, &|_| true).await.unwrap();
    store.number(100).await.unwrap();
    let open = store.open_requests(LogPosition::ZERO, 100).await.unwrap();
    let receipts: Vec<_> =
        open.iter().map(|row| receipt(&row.request_id, row.position, r#"{"keyId":"key_9"}"#)).collect();
    store.record_receipts(&receipts).await.unwrap();

    let traces: [&[u8]; 5] =
        [&hash, b"Jane-Q-Example", b"John-Q-Example", b"jane@example.com", b"customer-of-old"];
    let files = server.data_dir().join("base");
    server.query("CHECKPOINT").unwrap();
    assert!(traces.iter().all(|trace| contains(&files, trace)), "or this test would see nothing");

    let everything = Purge { log: Duration::ZERO, receipts: Duration::MAX, audit: None, limit: 1_000 };
    assert!(store.purge(everything).await.unwrap().log > 0);
    store.close().await;
    let known = "SELECT concat(most_common_vals, histogram_bounds, most_common_elems) FROM pg_stats
                 WHERE tablename IN ('keys', 'root_keys', 'invalidations', 'audit_log', 'receipts')";
    let known = server.query(known).unwrap();
    assert!(known.contains("key_2"), "or this test would see nothing: {known}");
    for trace in ["Jane-Q-Example", "John-Q-Example", "jane@example.com", "customer-of-old", "6465666768"] {
        assert!(!known.contains(trace), "{trace} is known to the planner: {known}");
    }
    // Each on its own: VACUUM runs in no transaction with others.
    server.query("VACUUM FULL").unwrap();
    server.query("CHECKPOINT").unwrap();
    for trace in traces {
        assert!(!contains(&files, trace), "{} is still there", String::from_utf8_lossy(trace));
    }
    assert!(contains(&files, b"key_9"), "the audit log knows which it was");
}
