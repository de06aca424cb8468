//! Stores that an older version left.

use evictd_core::history::{BeginCause, Past};
use evictd_core::position::LogPosition;
use evictd_store::HomeStore;
use evictd_store::log::Replay;
use evictd_store::postgres::PostgresStore;
use evictd_store::sqlite::SqliteStore;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, Executor, PgConnection};

use crate::fixture::{judgment, milestone, run_round};

static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");

/// Two rows have positions, and one waits.
const ROWS: &str = "
    INSERT INTO workspaces (id) VALUES ('ws_1');
    INSERT INTO apis (id, workspace_id, name) VALUES ('api_1', 'ws_1', 'payments');
    INSERT INTO invalidations (epoch, position, scope, api_id, workspace_id, cause)
    VALUES (3, 1, 'api', 'api_1', 'ws_1', 'changed'), (3, 2, 'api', 'api_1', 'ws_1', 'changed'),
           (NULL, NULL, 'api', 'api_1', 'ws_1', 'deleted');
    UPDATE log_head SET epoch = 3, head = 2, roster_revision = 7";

/// It goes on where it was, and no agent can have a past from before.
async fn assert_upgraded(store: &dyn HomeStore) {
    let head = store.head().await.unwrap();
    assert_eq!(head.at, LogPosition::new(3, 2).unwrap());
    assert_eq!(store.roster(0).await.unwrap().revision, 7);
    let history = store.history().await.unwrap();
    let created = &history.begins()[0];
    assert_eq!((created.cause, created.after, created.at), (BeginCause::Created, LogPosition::ZERO, head.at));
    for number in [history.store().0, head.incarnation.0, head.token.0, head.round.0] {
        assert_ne!(number, 0);
    }
    let replay = store.replay(3, 1, 9, 10).await.unwrap();
    assert!(matches!(replay, Replay::Rows { rows, token } if rows.len() == 2 && token == head.token));
    assert_eq!(store.row_token(head.at).await.unwrap(), Some(head.token));

    let past = milestone(store).await;
    let round = run_round(store, &[]).await;
    assert_eq!((round.began, round.numbered.rows.len()), (None, 1), "an upgrade costs no flush");
    assert_ne!(round.numbered.head.token, head.token);
    assert_eq!(judgment(store, &past).await, Past::Known);
    store.check_triggers().await.unwrap();
    store.begin_epoch(&crate::fixture::operator()).await.unwrap();
}

#[tokio::test]
async fn an_older_sqlite_store_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("home.db");
    let options = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
    let mut older: SqliteConnection = options.connect().await.unwrap();
    SQLITE.run_to(1, &mut older).await.unwrap();
    older.execute(ROWS).await.unwrap();
    older.close().await.unwrap();
    let store = SqliteStore::open_exclusively(&path).await.unwrap();
    assert_upgraded(&store).await;
    store.close().await;
}

#[tokio::test]
async fn an_older_postgres_store_goes_on() {
    let url = evictd_postgres_server::shared().unwrap().create_database("older").unwrap();
    let mut older = PgConnection::connect(&url).await.unwrap();
    POSTGRES.run_to(1, &mut older).await.unwrap();
    older.execute(ROWS).await.unwrap();
    // As an older publisher leaves it; what is changed by hand looks like a restore.
    older.execute("UPDATE log_head SET written_by = pg_current_xact_id()::xid").await.unwrap();
    older.close().await.unwrap();
    let store = PostgresStore::connect(super::postgres::options(&url)).await.unwrap();
    assert_upgraded(&store).await;
    store.close().await;
}
