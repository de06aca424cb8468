//! Without a protection of the store's, what it protects from goes unnoticed: so the tests that find nothing do look.
//! `cargo xtask model --negative-controls` runs this.

use evictd_core::history::{BeginCause, Milestone, Past};
use evictd_core::protection::Protection;
use evictd_store::log::Replay;
use evictd_store::{HomeStore, LogStore, OperatorStore};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Executor};

use crate::fixture::{PostgresFixture, SqliteFixture, operator, populate, run_round};

/// Has a key deleted by `delete`, which triggers don't see. Returns whether agents are notified.
async fn is_noticed(store: &dyn HomeStore, delete: impl AsyncFnOnce()) -> bool {
    populate(store, 2).await;
    run_round(store, &[]).await;
    delete().await;
    let round = run_round(store, &[]).await;
    assert_eq!(
        (&round.numbered.rows[..], round.schema_fault),
        (&[][..], None),
        "triggers saw nothing, and are back"
    );
    round.began.is_some()
}

async fn in_sqlite() -> bool {
    let fixture = SqliteFixture::new().await;
    let url = format!("sqlite://{}", fixture.path().display());
    is_noticed(&fixture.store, async || {
        let mut stranger = SqliteConnection::connect(&url).await.unwrap();
        let trigger = "SELECT sql FROM sqlite_master WHERE name = 'keys_after_delete'";
        let trigger: String = sqlx::query_scalar(trigger).fetch_one(&mut stranger).await.unwrap();
        stranger.execute("DROP TRIGGER keys_after_delete; DELETE FROM keys").await.unwrap();
        stranger.execute(sqlx::AssertSqlSafe(trigger)).await.unwrap();
    })
    .await
}

async fn in_postgres() -> bool {
    let fixture = PostgresFixture::new().await;
    is_noticed(&fixture.store, async || {
        let mut stranger = PgConnection::connect(&fixture.url).await.unwrap();
        let delete = "ALTER TABLE keys DISABLE TRIGGER keys_changed; DELETE FROM keys;
                      ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed";
        stranger.execute(delete).await.unwrap();
    })
    .await
}

/// On this thread alone, where the protection is missing.
fn run(test: impl Future<Output = bool>) -> bool {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

/// Whether a replay that begins with a row that was purged is refused.
async fn a_purged_row_is_missed() -> bool {
    let fixture = SqliteFixture::new().await;
    populate(&fixture.store, 2).await;
    let mut stranger =
        SqliteConnection::connect(&format!("sqlite://{}", fixture.path().display())).await.unwrap();
    stranger.execute("DELETE FROM invalidations WHERE position = 1").await.unwrap();
    matches!(fixture.store.replay(1, 1, 9, 100).await.unwrap(), Replay::Refused { .. })
}

#[test]
fn negative_control_of_complete_replays() {
    assert!(run(a_purged_row_is_missed()));
    Protection::ReplaysAreComplete.without(|| assert!(!run(a_purged_row_is_missed())));
}

#[test]
fn negative_control_of_schema_changes() {
    assert!(run(in_sqlite()) && run(in_postgres()));
    Protection::SchemaChangesBeginAnEpoch.without(|| {
        assert!(!run(in_sqlite()) && !run(in_postgres()));
    });
}

/// Whether an operator's declaration ends when the store's publisher yields to another history.
async fn yielding_ends_a_declaration() -> bool {
    let fixture = SqliteFixture::new().await;
    let (before, head) = (fixture.store.history().await.unwrap(), fixture.store.head().await.unwrap());
    let mut provenance = before.provenance();
    provenance.incarnation.0 ^= 1;
    let lost = Milestone { provenance, at: head.at, token: head.token };
    fixture.store.begin_epoch(&operator()).await.unwrap();
    let declared = fixture.store.history().await.unwrap();
    assert_eq!(declared.judge(&lost, head.at), Past::Superseded);
    fixture.store.begin_incarnation(BeginCause::Yielded, Some("publisher copy")).await.unwrap();
    let head = fixture.store.head().await.unwrap();
    fixture.store.history().await.unwrap().judge(&lost, head.at) == Past::Unknown
}

#[test]
fn negative_control_of_yielding() {
    assert!(run(yielding_ends_a_declaration()));
    Protection::YieldsNeedAWord.without(|| assert!(!run(yielding_ends_a_declaration())));
}
