//! What goes when, of rows that the tests make older.

use evictd_core::ids::{KeyHash, KeyId, WorkspaceId};
use evictd_ops::metrics::Registry;
use evictd_store::audit::AuditQuery;
use evictd_store::log::Replay;
use evictd_store::operator::{NewRootKey, Operator};
use evictd_store::receipt::{FinalReceipt, StoredOutcome};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{LogStore, OperatorStore, ReceiptStore};
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use super::*;
use crate::metrics;

const REQUEST: &str = "req_operator";

/// A store with one change, its audit record and its receipt.
struct RetentionFixture {
    store: Arc<SqliteStore>,
    retention: Retention,
    registry: Registry,
    directory: tempfile::TempDir,
    /// How much older than it is everything was made.
    age: Duration,
}

impl RetentionFixture {
    async fn new(audit: Keep) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(&directory.path().join("home.db")).await.unwrap());
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        let config = RetentionConfig {
            log: Duration::from_hours(1).into(),
            receipts: Duration::from_hours(2).into(),
            audit,
        };
        let retention =
            Retention { config, store: store.clone(), metrics: Arc::new(PublisherMetrics::new(&registry)) };
        let root_key = NewRootKey {
            id: KeyId::new("root_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            hash: KeyHash([1; 32]),
            start: "unkey_abcd".to_owned(),
            name: None,
            permissions: Vec::new(),
            expires_at: None,
        };
        let operator = Operator { name: "ops".to_owned(), request_id: REQUEST.to_owned() };
        store.create_root_key(&operator, root_key).await.unwrap();
        let numbered = store.number(10).await.unwrap();
        let [request] = &numbered.requests[..] else { panic!("one request: {numbered:?}") };
        let receipt = FinalReceipt {
            request_id: request.request_id.clone(),
            workspace_id: request.workspace_id.clone(),
            position: request.position,
            committed_at: request.committed_at,
            final_at: request.committed_at,
            body: "{}".to_owned(),
        };
        store.record_receipts(&[receipt]).await.unwrap();
        Self { store, retention, registry, directory, age: Duration::ZERO }
    }

    async fn connect(&self) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(self.directory.path().join("home.db"));
        SqliteConnection::connect_with(&options).await.unwrap()
    }

    /// Sweeps as if so much time had passed since the beginning, and returns whether the log row, the receipt and the
    /// audit record are still there.
    async fn after(&mut self, time: Duration) -> [bool; 3] {
        let older = i64::try_from(time.checked_sub(self.age).unwrap().as_millis()).unwrap();
        self.age = time;
        let mut connection = self.connect().await;
        for ageing in [
            "UPDATE invalidations SET committed_at = committed_at - 1000 * ?1",
            "UPDATE receipts SET final_at = final_at - 1000 * ?1",
            "UPDATE audit_log SET time = time - ?1",
        ] {
            sqlx::query(ageing).bind(older).execute(&mut connection).await.unwrap();
        }
        self.retention.sweep().await.unwrap();
        let replay = self.store.replay(1, 1, 1, 1).await.unwrap();
        let receipt = self.store.receipt(&WorkspaceId::new("ws_1"), REQUEST).await.unwrap();
        let query = AuditQuery { request_id: Some(REQUEST.to_owned()), limit: 1, ..AuditQuery::default() };
        [
            matches!(replay, Replay::Rows { rows, .. } if !rows.is_empty()),
            matches!(receipt, Some(StoredOutcome::Final { .. })),
            !self.store.audit(&query).await.unwrap().is_empty(),
        ]
    }

    fn purged(&self) -> [u64; 3] {
        let scrape = self.registry.render();
        ["log", "receipts", "audit"].map(|kind| {
            let series = format!("evictd_publisher_purged_rows_total{{kind=\"{kind}\"}} ");
            scrape.lines().find_map(|line| line.strip_prefix(&series)).unwrap().parse().unwrap()
        })
    }
}

#[tokio::test]
async fn each_kind_of_row_goes_when_its_own_time_is_over() {
    let mut home = RetentionFixture::new(Keep::For(Duration::from_hours(3).into())).await;
    for (minutes, left) in [
        (59, [true; 3]),
        (61, [false, true, true]),
        (119, [false, true, true]),
        (121, [false, false, true]),
        (179, [false, false, true]),
        (181, [false; 3]),
    ] {
        assert_eq!(home.after(Duration::from_mins(minutes)).await, left, "after {minutes} minutes");
    }
    assert_eq!(home.purged(), [1; 3]);
}

#[tokio::test]
async fn audit_records_can_be_kept_forever() {
    let mut home = RetentionFixture::new(Keep::Forever).await;
    assert_eq!(home.after(Duration::from_hours(24 * 365 * 100)).await, [false, false, true]);
    assert_eq!(home.purged(), [1, 1, 0]);
}

#[tokio::test]
async fn a_retention_beyond_the_calendar_deletes_nothing() {
    let mut home = RetentionFixture::new(Keep::For(Duration::MAX.into())).await;
    home.retention.config.log = Duration::MAX.into();
    home.retention.config.receipts = Duration::MAX.into();
    assert_eq!(home.after(Duration::from_hours(24 * 365 * 100)).await, [true; 3]);
}

#[tokio::test]
async fn much_that_is_old_goes_little_by_little_and_all_of_it() {
    const ROWS: u64 = 2 * BATCH as u64 + 1;
    let mut home = RetentionFixture::new(Keep::For(Duration::from_hours(3).into())).await;
    let mut connection = home.connect().await;
    let insert = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < ?1)
                  INSERT INTO audit_log (time, workspace_id, event, actor_type, actor_id, targets, description)
                  SELECT 0, '', '', '', '', '[]', '' FROM n";
    sqlx::query(insert).bind(i64::try_from(ROWS).unwrap()).execute(&mut connection).await.unwrap();
    assert_eq!(home.after(Duration::ZERO).await, [true; 3]);
    assert_eq!(home.purged(), [0, 0, ROWS]);
}
