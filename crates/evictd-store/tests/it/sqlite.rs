//! What only SQLite has: REPLACE, text that isn't UTF-8, the file, and the lock on it.

mod schema;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use evictd_core::ids::{ApiId, KeyHash, KeyId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::position::LogPosition;
use evictd_core::roster::{Instance, PartitionPolicy};
use evictd_store::audit::{AuditQuery, Purge};
use evictd_store::change::{DeleteMode, Edit, KeyUpdate};
use evictd_store::log::RoundRequest;
use evictd_store::receipt::StoredOutcome;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{ChangeStore, HomeStore, LogStore, OperatorStore, ReceiptStore, StoreError};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};

use crate::fixture::{
    SqliteFixture, actor, api_id, asking, instance, key, key_scope, news, operator, populate, receipt,
    root_key, run_round, workspace,
};

/// A connection of another program: SQLite's defaults, none of the store's settings.
async fn stranger(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(path).foreign_keys(false).connect().await.unwrap()
}

/// Runs `sql` as a stranger, and returns what the log has of it.
async fn after(fixture: &SqliteFixture, sql: &str) -> Vec<(Scope, Cause)> {
    let mut connection = stranger(&fixture.path()).await;
    connection.execute(AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
    news(&fixture.store).await
}

async fn populated(keys: u8) -> SqliteFixture {
    let fixture = SqliteFixture::new().await;
    populate(&fixture.store, keys).await;
    fixture
}

fn key_in(n: u8, id: &str, api: &str) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(KeyId::new(id)), api_id: Some(ApiId::new(api)) }
}

fn root_scope(n: u8) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(root_key().id), api_id: None }
}

/// The hash `n n n ...` as an SQL literal.
fn hash(n: u8) -> String {
    format!("x'{}'", format!("{n:02x}").repeat(32))
}

#[tokio::test]
async fn replaced_key_is_logged_under_every_hash_it_had() {
    let fixture = populated(3).await;
    // Key 1 gets a new hash; its old one disappears without a delete trigger.
    let sql = format!(
        "INSERT OR REPLACE INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_1', 'api_1', 'ws_1', {}, 'abcd')",
        hash(9)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_scope(1), Cause::Erased), (key_in(9, "key_1", "api_1"), Cause::Created)]
    );
    // A row that takes key 2's id and key 3's hash removes both.
    let sql = format!(
        "REPLACE INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_2', 'api_1', 'ws_1', {}, 'abcd')",
        hash(3)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_scope(2), Cause::Erased), (key_in(3, "key_2", "api_1"), Cause::Created)]
    );
    // The same hash in another API: floors of keys may have been merged into the old API's.
    let sql = format!(
        "REPLACE INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_2', 'api_2', 'ws_1', {}, 'abcd')",
        hash(3)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(key_in(3, "key_2", "api_1"), Cause::Erased), (key_in(3, "key_2", "api_2"), Cause::Created)]
    );
}

#[tokio::test]
async fn key_that_an_update_replaces_is_logged() {
    let fixture = populated(2).await;
    assert_eq!(
        after(&fixture, "UPDATE OR REPLACE keys SET id = 'key_2' WHERE id = 'key_1'").await,
        [(key_scope(2), Cause::Erased), (key_in(1, "key_2", "api_1"), Cause::Changed)]
    );
}

#[tokio::test]
async fn text_that_is_not_utf8_widens_its_row_and_stops_nothing() {
    let fixture = populated(2).await;
    let broken = "UPDATE keys SET api_id = CAST(x'6be979' AS TEXT), enabled = 0 WHERE id = 'key_1'";
    let rows = after(&fixture, &format!("PRAGMA foreign_keys = OFF; {broken}")).await;
    assert!(!rows.is_empty());
    let head = run_round(&fixture.store, &[]).await.numbered.head;
    assert!(head.at > LogPosition::ZERO);
    let ok = after(&fixture, "DELETE FROM keys WHERE id = 'key_2'").await;
    assert_eq!(ok, [(key_scope(2), Cause::Erased)], "the log goes on");
}

#[tokio::test]
async fn replaced_api_is_logged_as_restored() {
    let fixture = populated(5).await;
    let cases = [
        ("UPDATE apis SET deleted_at_m = 1", Cause::Deleted),
        ("UPDATE apis SET deleted_at_m = NULL", Cause::Restored),
        ("REPLACE INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_1', 'x')", Cause::Restored),
    ];
    for (sql, cause) in cases {
        assert_eq!(after(&fixture, sql).await, [(Scope::Api(api_id()), cause)], "{sql}");
    }
}

#[tokio::test]
async fn replaced_root_key_is_logged_under_every_hash_it_had() {
    let fixture = populated(0).await;
    let sql = format!(
        "REPLACE INTO root_keys (id, workspace_id, hash, start) VALUES ('root_1', 'ws_1', {}, 'unkey_')",
        hash(254)
    );
    assert_eq!(
        after(&fixture, &sql).await,
        [(root_scope(255), Cause::Erased), (root_scope(254), Cause::Created)]
    );
}

#[tokio::test]
async fn a_round_is_counted_and_writes_the_roster() {
    let fixture = populated(0).await;
    let mut connection = stranger(&fixture.path()).await;
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..instance(1) };
    run_round(&fixture.store, &[instance(1), instance(u64::MAX)]).await;
    let roster = "SELECT region, agent, instance, policy, bound_ms FROM roster ORDER BY instance";
    let rows: Vec<(String, String, String, String, i64)> =
        sqlx::query_as(roster).fetch_all(&mut connection).await.unwrap();
    let row = |instance: &str, policy: &str| {
        ("eu-central-1".to_owned(), "edge".to_owned(), instance.to_owned(), policy.to_owned(), 30_000)
    };
    assert_eq!(rows, [row("0000000000000001", "deny"), row("ffffffffffffffff", "deny")]);

    sqlx::query("UPDATE roster SET first_seen = first_seen - 9, last_seen = last_seen - 9")
        .execute(&mut connection)
        .await
        .unwrap();
    let seen = "SELECT last_seen - first_seen FROM roster ORDER BY instance";
    run_round(&fixture.store, &[instance(1)]).await;
    let spans: Vec<i64> = sqlx::query_scalar(seen).fetch_all(&mut connection).await.unwrap();
    assert_eq!(spans, [0, 0], "known instances cost no write");
    run_round(&fixture.store, &[stale]).await;
    let rows: Vec<(String, String, String, String, i64)> =
        sqlx::query_as(roster).fetch_all(&mut connection).await.unwrap();
    assert_eq!(rows, [row("0000000000000001", "serve_stale"), row("ffffffffffffffff", "deny")]);
    sqlx::query("UPDATE roster SET last_seen = first_seen - 60000000")
        .execute(&mut connection)
        .await
        .unwrap();
    run_round(&fixture.store, &[instance(u64::MAX)]).await;
    let spans: Vec<i64> = sqlx::query_scalar(seen).fetch_all(&mut connection).await.unwrap();
    assert!(spans[0] < 0 && spans[1] >= 0, "refreshed when it got old, and only who was there: {spans:?}");

    let rounds: i64 =
        sqlx::query_scalar("SELECT rounds FROM log_head").fetch_one(&mut connection).await.unwrap();
    assert_eq!(rounds, 4);
}

#[tokio::test]
async fn two_stores_on_one_file_share_the_log() {
    let fixture = populated(2).await;
    let other = SqliteStore::open(&fixture.path()).await.unwrap();
    other.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let (here, there) = tokio::join!(fixture.store.number(10), other.number(10));
    assert_eq!(here.unwrap().rows.len() + there.unwrap().rows.len(), 1);
    assert_eq!(fixture.store.head().await.unwrap(), other.head().await.unwrap());
    other.close().await;
}

#[tokio::test]
async fn last_position_is_not_exceeded() {
    let fixture = populated(1).await;
    let last = "UPDATE log_head SET head = 17592186044414; UPDATE keys SET enabled = 0";
    assert_eq!(after(&fixture, last).await.len(), 1);
    fixture.store.create_key(&actor(), key(2)).await.unwrap();
    let error = fixture.store.number(10).await.unwrap_err();
    assert!(matches!(error, StoreError::PositionsUsedUp), "{error:?}");
    let error = fixture.store.round(RoundRequest::default()).await.unwrap_err();
    assert!(matches!(error, StoreError::PositionsUsedUp), "no proof rather than a wrong one: {error:?}");
}

#[tokio::test]
async fn the_last_epoch_is_not_exceeded() {
    let fixture = populated(0).await;
    after(&fixture, "UPDATE log_head SET epoch = 1048575").await;
    let error = fixture.store.begin_epoch(&operator()).await.unwrap_err();
    assert!(matches!(error, StoreError::EpochsUsedUp), "{error:?}");
    assert!(error.to_string().contains("into a new store"), "{error}");
    assert_eq!(fixture.store.history().await.unwrap().begins().len(), 1, "nothing began");
}

#[tokio::test]
async fn an_altered_or_missing_trigger_is_found() {
    for sql in [
        "DROP TRIGGER keys_after_update",
        "DROP TRIGGER apis_after_delete;
         CREATE TRIGGER apis_after_delete AFTER DELETE ON apis BEGIN SELECT 1; END",
        "DROP TABLE root_keys",
    ] {
        let fixture = populated(0).await;
        after(&fixture, sql).await;
        let error = fixture.store.check_triggers().await.unwrap_err();
        let StoreError::TriggerMissing { name } = error else { panic!("{sql}: {error:?}") };
        assert!(["keys_", "apis_", "root_keys_"].iter().any(|table| name.starts_with(table)), "{name}");
    }
}

#[tokio::test]
async fn only_the_id_of_an_erased_key_survives_the_retention() {
    let fixture = SqliteFixture::new().await;
    let store = &fixture.store;
    populate(store, 0).await;
    let mut secret = key(1);
    secret.hash = KeyHash(*b"the SHA-256 of a key that leaked");
    secret.name = Some("Jane-Q-Example".to_owned());
    secret.meta = Some(r#"{"email":"jane@example.com"}"#.to_owned());
    secret.external_id = Some("customer-jane".to_owned());
    secret.permissions = vec!["jane.may".to_owned()];
    // While a reader is open, SQLite doesn't restart its write-ahead log. It never truncates it by itself.
    let mut reader = stranger(&fixture.path()).await;
    reader.execute("BEGIN; SELECT * FROM log_head").await.unwrap();
    store.create_key(&asking("req_c"), secret).await.unwrap();
    let renamed = KeyUpdate { name: Edit::Set("Jane-Renamed".to_owned()), ..KeyUpdate::default() };
    store.update_key(&asking("req_u"), &key(1).id, renamed, &|_| true).await.unwrap();
    store.delete_key(&asking("req_d"), &key(1).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    let rows = store.number(10).await.unwrap().requests;
    let open = store.open_requests(LogPosition::ZERO, 100).await.unwrap();
    let body = r#"{"keyId":"key_1"}"#;
    let receipts: Vec<_> = open.iter().map(|row| receipt(&row.request_id, row.position, body)).collect();
    store.record_receipts(&receipts).await.unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(traces(&fixture).len(), 6, "or this test would see nothing");
    let keeps_all = Purge { log: Duration::MAX, receipts: Duration::MAX, audit: None, limit: 100 };
    let began = Instant::now();
    store.purge(keeps_all).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "a reader isn't waited for: {:?}", began.elapsed());
    reader.close().await.unwrap();
    store.purge(keeps_all).await.unwrap();
    assert_eq!(
        traces(&fixture),
        ["the SHA-256 of a key that leaked"],
        "agents that come back must learn of it still"
    );

    let purge = Purge { log: Duration::ZERO, receipts: Duration::MAX, audit: None, limit: 100 };
    assert!(store.purge(purge).await.unwrap().log >= 3);
    assert_eq!(traces(&fixture), [""; 0]);
    let kept = store.receipt(&workspace(), "req_d").await.unwrap();
    assert_eq!(kept, Some(StoredOutcome::Final { body: body.to_owned() }), "its receipt remains");
    let of_key = AuditQuery { target: Some("key_1".to_owned()), limit: 10, ..AuditQuery::default() };
    assert_eq!(store.audit(&of_key).await.unwrap().len(), 3, "and who did what");
}

/// What of the key can be found in the files.
fn traces(fixture: &SqliteFixture) -> Vec<&'static str> {
    let files: Vec<Vec<u8>> = std::fs::read_dir(fixture.directory.path())
        .unwrap()
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect();
    let searched = [
        "the SHA-256 of a key that leaked",
        "Jane-Q-Example",
        "Jane-Renamed",
        "jane@example.com",
        "customer-jane",
        "jane.may",
    ];
    let holds = |trace: &&str| {
        files.iter().any(|file| file.windows(trace.len()).any(|window| window == trace.as_bytes()))
    };
    searched.into_iter().filter(|trace| holds(trace)).collect()
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_file_is_readable_by_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let fixture = populated(0).await;
    for file in std::fs::read_dir(fixture.directory.path()).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", file.path());
    }
}

#[tokio::test]
async fn a_missing_directory_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = SqliteStore::open(&directory.path().join("none/home.db")).await.unwrap_err().to_string();
    assert!(error.contains("none/home.db") && error.contains("directory doesn't exist"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_no_database_is_named_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let text = "this is no database, but it may be needed\n".repeat(100);
    std::fs::write(&path, &text).unwrap();
    let error = SqliteStore::open(&path).await.unwrap_err().to_string();
    assert!(error.contains("home.db") && error.contains("isn't an SQLite database"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[tokio::test]
async fn a_directory_in_the_files_place_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let error = SqliteStore::open(directory.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
}

#[tokio::test]
async fn another_schema_version_is_refused() {
    let fixture = populated(0).await;
    after(&fixture, "UPDATE _sqlx_migrations SET checksum = x'00'").await;
    assert!(matches!(SqliteStore::open(&fixture.path()).await, Err(StoreError::Migrate(_))));
}

/// In a process that a test started: the store that it is about.
const STORE_OF_OTHER_PROCESS: &str = "EVICTD_STORE_TEST_OTHER_PROCESS";

/// The path, in the other process.
fn as_other_process() -> Option<OsString> {
    std::env::var_os(STORE_OF_OTHER_PROCESS)
}

/// Runs `test` once more, in a process of its own, which ends at the latest when its input does.
fn in_another_process(test: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("sqlite::{test}"), "--nocapture"])
        .env(STORE_OF_OTHER_PROCESS, path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Blocks the other process until its input or its parent ends.
fn wait_for_end_of_input() {
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[tokio::test]
async fn second_publisher_is_refused_until_the_first_has_ended() {
    if let Some(path) = as_other_process() {
        let _store = SqliteStore::open_exclusively(Path::new(&path)).await.unwrap();
        println!("\nit is open");
        return wait_for_end_of_input();
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let name = "second_publisher_is_refused_until_the_first_has_ended";
    let mut first = in_another_process(name, &path);
    let mut output = BufReader::new(first.stdout.take().unwrap()).lines();
    assert!(output.any(|line| line.unwrap() == "it is open"));

    let error = SqliteStore::open_exclusively(&path).await.unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error:?}");
    let error = error.to_string();
    assert!(error.contains("home.db: stop that one first") && error.contains("store.path"), "{error}");

    let tool = SqliteStore::open(&path).await.unwrap();
    tool.create_root_key(&operator(), root_key()).await.unwrap();
    tool.close().await;
    stranger(&path).await.execute("UPDATE root_keys SET enabled = 0").await.unwrap();

    first.kill().unwrap();
    first.wait().unwrap();
    let next = SqliteStore::open_exclusively(&path).await.unwrap();
    assert_eq!(news(&next).await, [(root_scope(255), Cause::Created), (root_scope(255), Cause::Changed)]);
    next.close().await;
}

#[tokio::test]
async fn closed_store_is_free_for_the_next_publisher() {
    let directory = tempfile::tempdir().unwrap();
    let (path, link) = (directory.path().join("home.db"), directory.path().join("link.db"));
    let first = SqliteStore::open_exclusively(&path).await.unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(SqliteStore::open_exclusively(&link).await, Err(StoreError::InUse { .. })));
    first.close().await;
    let second = SqliteStore::open_exclusively(&link).await.unwrap();
    assert!(matches!(SqliteStore::open_exclusively(&path).await, Err(StoreError::InUse { .. })));
    drop(first);
    assert!(matches!(SqliteStore::open_exclusively(&path).await, Err(StoreError::InUse { .. })));
    second.close().await;
}

#[tokio::test]
async fn new_file_that_another_process_writes_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    std::fs::write(&path, "").unwrap();
    let mut other = stranger(&path).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let mut opening = Box::pin(SqliteStore::open(&path));
    let early = tokio::time::timeout(Duration::from_millis(200), &mut opening).await;
    assert!(early.is_err(), "it was refused instead: {early:?}");
    other.execute("COMMIT").await.unwrap();
    opening.await.unwrap().close().await;
}

#[tokio::test]
async fn processes_that_create_a_store_at_once_all_get_it() {
    const STORES: usize = 30;
    if let Some(path) = as_other_process() {
        for line in std::io::stdin().lines() {
            let store = SqliteStore::open(&Path::new(&path).join(line.unwrap())).await.unwrap();
            store.check_triggers().await.unwrap();
            store.close().await;
            println!("\ndone");
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let name = "processes_that_create_a_store_at_once_all_get_it";
    let mut processes: Vec<Child> = (0..3).map(|_| in_another_process(name, directory.path())).collect();
    let mut outputs: Vec<_> =
        processes.iter_mut().map(|process| BufReader::new(process.stdout.take().unwrap()).lines()).collect();
    for n in 0..STORES {
        for process in &mut processes {
            writeln!(process.stdin.as_ref().unwrap(), "{n}").unwrap();
        }
        for output in &mut outputs {
            assert!(output.any(|line| line.unwrap() == "done"), "it gave up at store {n}");
        }
    }
    for mut process in processes {
        assert!(process.wait().unwrap().success());
    }
}

/// Failure: the write-ahead log keeps the size that an old reader has given it.
#[tokio::test]
async fn write_ahead_log_shrinks_when_its_reader_is_gone() {
    const LARGE: u64 = 40 << 20;
    let fixture = populated(3).await;
    let log = || fixture.store.files().unwrap().write_ahead_log;
    let mut reader = stranger(&fixture.path()).await;
    reader.execute("BEGIN; SELECT count(*) FROM keys").await.unwrap();
    let mut writer = stranger(&fixture.path()).await;
    writer.execute("CREATE TABLE bulk (bytes BLOB)").await.unwrap();
    writer.execute(AssertSqlSafe(format!("INSERT INTO bulk VALUES (zeroblob({LARGE}))"))).await.unwrap();
    run_round(&fixture.store, &[]).await;
    assert!(log() > LARGE, "the reader needs what the log replaces");
    reader.execute("ROLLBACK").await.unwrap();
    // A commit copies the log into the database, and the next one begins the log anew.
    for _ in 0..3 {
        run_round(&fixture.store, &[]).await;
    }
    assert!(log() <= 16 << 20, "{} bytes are left", log());
    let database = fixture.store.files().unwrap().database;
    assert!(database > LARGE, "{database}");
}
