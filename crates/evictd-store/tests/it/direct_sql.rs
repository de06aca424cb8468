//! One suite for both stores: changes by direct SQL, with the statements that the README recommends.

#[macro_use]
mod macros;
mod rows;
mod triggers;

use std::time::Duration;

use evictd_core::ids::{ApiId, KeyHash, KeyId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::{Record, RecordState};
use evictd_core::time::StoreTime;
use evictd_store::audit::{AuditQuery, AuditRecord, Purge, Purged};
use evictd_store::change::{ChangeError, DeleteMode, KeyUpdate, Reroll};
use evictd_store::history::ROUND_TOKENS_KEPT;
use evictd_store::operator::NewRootKey;
use evictd_store::postgres::{PostgresOptions, PostgresStore};
use evictd_store::receipt::{FinalReceipt, StoredOutcome};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore, StoreError};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};

use crate::fixture::{
    PostgresFixture, SqliteFixture, actor, api_id, asking, key, key_scope, news, operator, populate, receipt,
    root_key, run_round, workspace,
};

/// A store whose database other clients change.
trait DirectSql {
    /// Disables triggers that write the log.
    const TRIGGERS_OFF: &str;

    /// Ends the checks of foreign keys for the session.
    const NO_FOREIGN_KEYS: &str;

    /// Ends the checks of values in the log.
    const NO_CHECKS: &str;

    fn store(&self) -> &dyn HomeStore;

    /// Opens the store once more.
    async fn open(&self) -> Box<dyn HomeStore>;

    /// Runs statements in a session of another client.
    async fn run(&self, sql: &str);

    /// Writes bytes in the database's SQL.
    fn literal(hex: &str) -> String;
}

impl DirectSql for SqliteFixture {
    const TRIGGERS_OFF: &str = "
        DROP TRIGGER keys_after_insert; DROP TRIGGER keys_after_update; DROP TRIGGER keys_after_delete;
        DROP TRIGGER root_keys_after_insert; DROP TRIGGER root_keys_after_update; DROP TRIGGER apis_after_update";

    const NO_FOREIGN_KEYS: &str = "PRAGMA foreign_keys = OFF";

    const NO_CHECKS: &str = "PRAGMA ignore_check_constraints = ON";

    fn store(&self) -> &dyn HomeStore {
        &self.store
    }

    async fn open(&self) -> Box<dyn HomeStore> {
        Box::new(SqliteStore::open(&self.path()).await.unwrap())
    }

    async fn run(&self, sql: &str) {
        let options = SqliteConnectOptions::new().filename(self.path()).foreign_keys(false);
        let mut connection = options.connect().await.unwrap();
        connection.execute(AssertSqlSafe(sql)).await.unwrap();
        connection.close().await.unwrap();
    }

    fn literal(hex: &str) -> String {
        format!("x'{hex}'")
    }
}

impl DirectSql for PostgresFixture {
    const TRIGGERS_OFF: &str = "
        ALTER TABLE keys DISABLE TRIGGER ALL; ALTER TABLE root_keys DISABLE TRIGGER ALL;
        ALTER TABLE apis DISABLE TRIGGER ALL";

    const NO_FOREIGN_KEYS: &str = "SET session_replication_role = replica";

    const NO_CHECKS: &str = "DO $$ DECLARE c name; BEGIN
        FOR c IN SELECT conname FROM pg_constraint WHERE conrelid = 'invalidations'::regclass AND contype = 'c'
        LOOP EXECUTE format('ALTER TABLE invalidations DROP CONSTRAINT %I', c); END LOOP; END $$";

    fn store(&self) -> &dyn HomeStore {
        &self.store
    }

    async fn open(&self) -> Box<dyn HomeStore> {
        let options = PostgresOptions::new(&self.url).unwrap();
        Box::new(PostgresStore::connect(options).await.unwrap())
    }

    async fn run(&self, sql: &str) {
        let mut connection = sqlx::PgConnection::connect(&self.url).await.unwrap();
        connection.execute(AssertSqlSafe(sql)).await.unwrap();
        connection.close().await.unwrap();
    }

    fn literal(hex: &str) -> String {
        format!(r"'\x{hex}'")
    }
}

direct_sql!(
    change_without_a_log_row_is_undone,
    change_by_sql_gets_its_audit_record_when_numbered,
    expiry_is_audited_as_the_systems_change,
    a_bulk_change_by_sql_has_one_audit_record_for_its_api,
    a_crowd_of_changes_by_sql_has_one_audit_record_for_each_api,
    an_operators_new_epoch_has_its_audit_record,
    a_rounds_token_gives_way_to_that_of_a_much_later_one,
    what_happened_to_one_target_is_found_however_often_it_is_one,
    what_was_soft_deleted_is_restored_by_one_statement,
    a_soft_deleted_key_is_erased_by_one_statement,
    the_same_key_text_is_created_anew_by_one_statement,
    root_keys_and_workspaces_are_disabled_by_one_statement,
    rows_from_the_future_stop_no_purge,
    receipts_count_as_purged_only_as_far_as_they_were,
);

/// The hash `n n n ...` in the database's SQL.
fn hash<H: DirectSql>(n: u8) -> String {
    H::literal(&format!("{n:02x}").repeat(32))
}

fn key_in(n: u8, id: &str, api: &str) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(KeyId::new(id)), api_id: Some(ApiId::new(api)) }
}

fn root_scope(n: u8) -> Scope {
    Scope::Key { hash: KeyHash([n; 32]), key_id: Some(root_key().id), api_id: None }
}

/// Runs statements, and returns what the log has of them.
async fn after(home: &impl DirectSql, sql: &str) -> Vec<(Scope, Cause)> {
    home.run(sql).await;
    news(home.store()).await
}

async fn state(home: &impl DirectSql, n: u8) -> Option<RecordState> {
    match home.store().lookup(KeyHash([n; 32])).await.unwrap().record {
        Record::Key(key) => Some(key.state),
        Record::RootKey(root_key) => Some(root_key.state),
        Record::Absent => None,
    }
}

/// The audit records from the `skip`th on, the oldest first.
async fn audited(home: &impl DirectSql, skip: usize) -> Vec<AuditRecord> {
    let query = AuditQuery { limit: 1_000, ..AuditQuery::default() };
    home.store().audit(&query).await.unwrap().into_iter().rev().skip(skip).collect()
}

/// Event, description and actor.
fn summaries(records: &[AuditRecord]) -> Vec<(&str, &str, &str, &str)> {
    records
        .iter()
        .map(|record| (&*record.event, &*record.description, &*record.actor_type, &*record.actor_id))
        .collect()
}

fn reroll() -> Reroll {
    let new = key(101);
    Reroll { key: key(1).id, grace: Duration::ZERO, new_id: new.id, hash: new.hash, start: new.start }
}

/// Failure: while triggers are off, a deletion is answered with success and reaches no agent.
async fn change_without_a_log_row_is_undone<H: DirectSql>(home: &H) {
    let store = home.store();
    populate(store, 2).await;
    let ended = KeyUpdate { enabled: Some(false), ..KeyUpdate::default() };
    home.run("UPDATE keys SET expires = 1 WHERE id = 'key_2'").await;
    store.number(100).await.unwrap();
    let before = audited(home, 0).await;
    home.run(H::TRIGGERS_OFF).await;

    let unlogged = |outcome: Result<(), ChangeError>| {
        assert!(matches!(outcome, Err(ChangeError::Store(StoreError::Unlogged { .. }))), "{outcome:?}");
    };
    let (id, may) = (key(1).id, &|_: &ApiId| true);
    unlogged(store.create_key(&actor(), key(3)).await);
    unlogged(store.update_key(&actor(), &id, ended, may).await);
    unlogged(store.reroll_key(&actor(), reroll(), may).await);
    unlogged(store.delete_key(&actor(), &id, DeleteMode::Soft, may).await);
    unlogged(store.delete_key(&actor(), &id, DeleteMode::Permanent, may).await);
    unlogged(store.delete_api(&actor(), &api_id()).await);
    let another = NewRootKey { id: KeyId::new("root_2"), hash: KeyHash([254; 32]), ..root_key() };
    unlogged(store.create_root_key(&operator(), another).await.map_err(ChangeError::Store));
    let revoked = store.revoke_root_key(&operator(), &root_key().id).await;
    unlogged(revoked.map(drop).map_err(ChangeError::Store));
    unlogged(store.expire(10).await.map(drop).map_err(ChangeError::Store));

    assert_eq!(audited(home, 0).await, before);
    assert_eq!(state(home, 1).await, Some(RecordState::Active));
    assert_eq!(state(home, 255).await, Some(RecordState::Active));
    assert_eq!((state(home, 3).await, state(home, 101).await, state(home, 254).await), (None, None, None));
    assert!(store.api(&workspace(), &api_id()).await.unwrap().is_some());
    store.update_key(&actor(), &id, KeyUpdate::default(), may).await.unwrap();
    assert_eq!(audited(home, before.len()).await.len(), 1, "what changes nothing needs no row");
}

async fn change_by_sql_gets_its_audit_record_when_numbered(home: &impl DirectSql) {
    populate(home.store(), 2).await;
    let known = audited(home, 0).await.len();
    let statements = [
        "UPDATE keys SET enabled = FALSE WHERE id = 'key_1'",
        "UPDATE keys SET deleted_at_m = 1 WHERE id = 'key_1'",
        "UPDATE keys SET deleted_at_m = NULL WHERE id = 'key_1'",
        "DELETE FROM keys WHERE id = 'key_2'",
        "UPDATE apis SET deleted_at_m = 1",
        "UPDATE root_keys SET enabled = FALSE",
        "UPDATE workspaces SET enabled = FALSE",
    ];
    let mut numbered = Vec::new();
    for statement in statements {
        home.run(statement).await;
        numbered.extend(home.store().number(100).await.unwrap().rows);
    }
    let records = audited(home, known).await;
    assert_eq!(
        summaries(&records),
        [
            ("key.update", "Updated key key_1", "database", "sql"),
            ("key.delete", "Deleted key key_1", "database", "sql"),
            ("key.restore", "Restored key key_1", "database", "sql"),
            ("key.delete", "Permanently deleted key key_2", "database", "sql"),
            ("api.delete", "Deleted API api_1", "database", "sql"),
            ("root_key.update", "Updated root key root_1", "database", "sql"),
            ("workspace.update", "Updated workspace ws_1", "database", "sql"),
        ]
    );
    for (record, row) in records.iter().zip(&numbered) {
        assert_eq!(record.time.as_millis(), row.committed_at.as_millis(), "the store's time of the change");
        assert_eq!((&record.workspace_id, &record.request_id), (&Some(workspace()), &None));
        assert!(record.event_id.starts_with("log_"), "{}", record.event_id);
    }
    let targets = |record: &AuditRecord| {
        record.targets.iter().map(|target| format!("{} {}", target.kind, target.id)).collect::<Vec<_>>()
    };
    assert_eq!(targets(&records[3]), ["key key_2", "api api_1"]);
    assert_eq!(targets(&records[5]), ["rootkey root_1"]);
    home.store().number(100).await.unwrap();
    assert_eq!(audited(home, known).await.len(), statements.len(), "each once");
}

async fn expiry_is_audited_as_the_systems_change(home: &impl DirectSql) {
    populate(home.store(), 1).await;
    home.run("UPDATE keys SET expires = 1; UPDATE root_keys SET expires = 1").await;
    home.store().number(100).await.unwrap();
    let known = audited(home, 0).await.len();
    assert_eq!(home.store().expire(10).await.unwrap(), 2);
    home.store().number(100).await.unwrap();
    assert_eq!(
        summaries(&audited(home, known).await),
        [
            ("root_key.expire", "Expired root key root_1", "system", "expiry"),
            ("key.expire", "Expired key key_1", "system", "expiry"),
        ]
    );
}

async fn a_bulk_change_by_sql_has_one_audit_record_for_its_api<H: DirectSql>(home: &H) {
    populate(home.store(), 0).await;
    let known = audited(home, 0).await.len();
    let row = |n: u32| format!("('bulk_{n}', 'api_1', 'ws_1', {}, 'x')", H::literal(&format!("{n:064x}")));
    let rows: Vec<String> = (1..=1_001).map(row).collect();
    let insert =
        format!("INSERT INTO keys (id, api_id, workspace_id, hash, start) VALUES {}", rows.join(","));
    assert_eq!(after(home, &insert).await.len(), 1);
    assert_eq!(after(home, "DELETE FROM keys").await.len(), 1);
    let records = audited(home, known).await;
    assert_eq!(
        summaries(&records),
        [
            ("key.create", "Created 1001 keys of API api_1", "database", "sql"),
            ("key.delete", "Permanently deleted 1001 keys of API api_1", "database", "sql"),
        ]
    );
    assert_eq!((&*records[0].targets[0].kind, &*records[0].targets[0].id), ("api", "api_1"));
}

/// Failure: a record each for keys of very many APIs takes longer than leases may wait.
async fn a_crowd_of_changes_by_sql_has_one_audit_record_for_each_api<H: DirectSql>(home: &H) {
    populate(home.store(), 0).await;
    after(home, "INSERT INTO apis (id, workspace_id, name) VALUES ('api_2', 'ws_1', 'refunds')").await;
    let known = audited(home, 0).await.len();
    let row = |n: u32| {
        format!("('bulk_{n}', 'api_{}', 'ws_1', {}, 'x')", 1 + n % 2, H::literal(&format!("{n:064x}")))
    };
    let rows: Vec<String> = (1..=1_201).map(row).collect();
    let insert =
        format!("INSERT INTO keys (id, api_id, workspace_id, hash, start) VALUES {}", rows.join(","));
    assert_eq!(after(home, &insert).await.len(), 1_201);
    let records = audited(home, known).await;
    let mut summaries: Vec<_> = summaries(&records);
    summaries.sort_unstable();
    assert_eq!(
        summaries,
        [
            ("key.create", "Created 600 keys of API api_1", "database", "sql"),
            ("key.create", "Created 601 keys of API api_2", "database", "sql"),
        ]
    );
}

async fn a_rounds_token_gives_way_to_that_of_a_much_later_one(home: &impl DirectSql) {
    let store = home.store();
    let oldest = store.head().await.unwrap().round;
    let next = run_round(store, &[]).await.numbered.head.round;
    home.run(&format!("UPDATE log_head SET rounds = {}", ROUND_TOKENS_KEPT - 1)).await;
    run_round(store, &[]).await;
    assert!(!store.has_round_token(oldest).await.unwrap());
    assert!(store.has_round_token(next).await.unwrap());
    run_round(store, &[]).await;
    assert!(!store.has_round_token(next).await.unwrap());
}

async fn an_operators_new_epoch_has_its_audit_record(home: &impl DirectSql) {
    let head = home.store().begin_epoch(&operator()).await.unwrap();
    let records = audited(home, 0).await;
    let description = format!("Began epoch {} at position 0", head.at.epoch());
    assert_eq!(summaries(&records), [("store.new_epoch", &*description, "system", "ops")]);
    assert_eq!((&records[0].workspace_id, &*records[0].targets), (&None, &[][..]));
    assert_eq!(records[0].request_id.as_deref(), Some("req_operator"));
}

/// An API may be among the targets of most records, a key of few.
async fn what_happened_to_one_target_is_found_however_often_it_is_one(home: &impl DirectSql) {
    let row = |n: u32| {
        format!(
            r#"({n}, 'e', 'd', 'a', 'a', '[{{"type":"key","id":"k_{n}"}},{{"type":"api","id":"api_9"}}]')"#
        )
    };
    let rows: Vec<String> = (1..=10_001).map(row).collect();
    let insert = "INSERT INTO audit_log (time, event, description, actor_type, actor_id, targets) VALUES";
    home.run(&format!("{insert} {}", rows.join(","))).await;
    let times = async |target: &str| {
        let query = AuditQuery { target: Some(target.to_owned()), limit: 2, ..AuditQuery::default() };
        let found = home.store().audit(&query).await.unwrap();
        found.iter().map(|record| record.time.as_millis()).collect::<Vec<_>>()
    };
    assert_eq!(times("api_9").await, [10_001, 10_000]);
    assert_eq!(times("k_77").await, [77]);
    assert_eq!(times("k_none").await, [0; 0]);
}

async fn what_was_soft_deleted_is_restored_by_one_statement(home: &impl DirectSql) {
    let store = home.store();
    populate(store, 1).await;
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    store.delete_api(&actor(), &api_id()).await.unwrap();
    store.revoke_root_key(&operator(), &root_key().id).await.unwrap();
    store.number(100).await.unwrap();
    let restored = |scope| vec![(scope, Cause::Restored)];
    let sql = "UPDATE keys SET deleted_at_m = NULL WHERE id = 'key_1'";
    assert_eq!(after(home, sql).await, restored(key_scope(1)));
    let sql = "UPDATE apis SET deleted_at_m = NULL WHERE id = 'api_1'";
    assert_eq!(after(home, sql).await, restored(Scope::Api(api_id())));
    assert_eq!(state(home, 1).await, Some(RecordState::Active));
    assert_eq!(state(home, 255).await, Some(RecordState::Deleted));
    let sql = "UPDATE root_keys SET deleted_at_m = NULL WHERE id = 'root_1'";
    assert_eq!(after(home, sql).await.len(), 1);
    assert_eq!(state(home, 255).await, Some(RecordState::Active));
}

async fn a_soft_deleted_key_is_erased_by_one_statement(home: &impl DirectSql) {
    const ERASE: &str = "DELETE FROM keys WHERE id = 'key_1' AND deleted_at_m IS NOT NULL";
    let store = home.store();
    populate(store, 1).await;
    assert_eq!(after(home, ERASE).await, [], "a live key is none of its business");
    store.delete_key(&actor(), &key(1).id, DeleteMode::Soft, &|_| true).await.unwrap();
    let again = store.delete_key(&actor(), &key(1).id, DeleteMode::Permanent, &|_| true).await;
    assert!(matches!(again, Err(ChangeError::KeyNotFound)), "{again:?}");
    store.number(100).await.unwrap();
    assert_eq!(after(home, ERASE).await, [(key_scope(1), Cause::Erased)]);
    assert_eq!(state(home, 1).await, None);
}

async fn the_same_key_text_is_created_anew_by_one_statement<H: DirectSql>(home: &H) {
    let store = home.store();
    populate(store, 1).await;
    store.delete_key(&actor(), &key(1).id, DeleteMode::Permanent, &|_| true).await.unwrap();
    store.number(100).await.unwrap();
    let insert = format!(
        "INSERT INTO keys (id, api_id, workspace_id, hash, start)
         VALUES ('key_new', 'api_1', 'ws_1', {}, 'abcd')",
        H::literal(&"01".repeat(32))
    );
    let scope = Scope::Key { hash: key(1).hash, key_id: Some(KeyId::new("key_new")), api_id: Some(api_id()) };
    assert_eq!(after(home, &insert).await, [(scope, Cause::Created)]);
    assert_eq!(state(home, 1).await, Some(RecordState::Active));
    let details = store.key(&workspace(), &KeyId::new("key_new")).await.unwrap().unwrap();
    assert!(details.enabled && details.permissions.is_empty() && details.created_at > StoreTime(0));
}

async fn root_keys_and_workspaces_are_disabled_by_one_statement(home: &impl DirectSql) {
    populate(home.store(), 1).await;
    for (sql, key_state, root_key_state) in [
        (
            "UPDATE root_keys SET enabled = FALSE WHERE id = 'root_1'",
            RecordState::Active,
            RecordState::Disabled,
        ),
        ("UPDATE root_keys SET enabled = TRUE WHERE id = 'root_1'", RecordState::Active, RecordState::Active),
        (
            "UPDATE workspaces SET enabled = FALSE WHERE id = 'ws_1'",
            RecordState::WorkspaceDisabled,
            RecordState::WorkspaceDisabled,
        ),
        ("UPDATE workspaces SET enabled = TRUE WHERE id = 'ws_1'", RecordState::Active, RecordState::Active),
    ] {
        assert_eq!(after(home, sql).await.len(), 1, "{sql}");
        assert_eq!(
            (state(home, 1).await, state(home, 255).await),
            (Some(key_state), Some(root_key_state)),
            "{sql}"
        );
    }
}

/// Keeps what is younger than an hour.
const AN_HOUR: Purge =
    Purge { log: Duration::from_hours(1), receipts: Duration::from_hours(1), audit: None, limit: 100 };

/// A store whose clock was ahead for a while would keep everything after that, until that time comes.
async fn rows_from_the_future_stop_no_purge(home: &impl DirectSql) {
    populate(home.store(), 4).await;
    let day = 24 * 3_600_000_000_i64;
    let sql = format!(
        "UPDATE invalidations SET receipted = TRUE, committed_at = committed_at - {day};
         UPDATE invalidations SET committed_at = 4102444800000000 WHERE key_id IN ('root_1', 'key_2');
         UPDATE invalidations SET committed_at = committed_at + {day} WHERE key_id = 'key_4'"
    );
    home.run(&sql).await;
    let purged = home.store().purge(AN_HOUR).await.unwrap();
    assert_eq!(purged, Purged { log: 4, ..Purged::default() }, "all but the last, which is young");
}

/// A purge that finds no receipt loses none: the answers about older requests stay as they were.
async fn receipts_count_as_purged_only_as_far_as_they_were(home: &impl DirectSql) {
    let store = home.store();
    populate(store, 1).await;
    // Not refused, and without a row in the log.
    store.update_key(&asking("req_same"), &key(1).id, KeyUpdate::default(), &|_| true).await.unwrap();
    let at_once = Purge { receipts: Duration::ZERO, ..AN_HOUR };
    store.purge(at_once).await.unwrap();
    let outcome = store.receipt(&workspace(), "req_same").await.unwrap();
    assert_eq!(outcome, Some(StoredOutcome::Nothing), "nothing was purged");

    // One of long ago doesn't speak of this one either.
    store.create_key(&asking("req_old"), key(2)).await.unwrap();
    store.create_key(&asking("req_young"), key(3)).await.unwrap();
    let rows = store.number(10).await.unwrap().rows;
    store.record_receipts(&[receipt("req_old", rows[0].position, "{}")]).await.unwrap();
    assert_eq!(store.purge(at_once).await.unwrap().receipts, 1);
    assert_eq!(store.receipt(&workspace(), "req_same").await.unwrap(), Some(StoredOutcome::Nothing));

    let now = StoreTime::from_millis(audited(home, 0).await.last().unwrap().time.as_millis() + 1);
    let young = receipt("req_young", rows[1].position, "{}");
    store.record_receipts(&[FinalReceipt { final_at: now, ..young }]).await.unwrap();
    while store.purge(at_once).await.unwrap().receipts == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(store.receipt(&workspace(), "req_same").await.unwrap(), None, "it may have had one");
}
