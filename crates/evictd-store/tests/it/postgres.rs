//! What only PostgreSQL has: concurrent writers, fail-overs, and a server that may vanish.

mod between;
mod clock;
mod commits;
mod concurrency;
mod erasure;
mod failover;
mod notify;
mod numbering;
mod opening;
mod outages;
mod replicas;
mod restores;
mod rows;
mod schema;
mod sessions;
mod tls;
mod triggers;

use evictd_core::invalidation::{Cause, Scope};
use evictd_postgres_server::Postgres;
use evictd_postgres_server::wait::eventually;
use evictd_store::postgres::{PostgresOptions, PostgresStore};
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection, Executor};
use std::time::Duration;

use crate::fixture::{PostgresFixture, news, populate};

const DEADLINE: Duration = Duration::from_mins(1);

/// A connection of another program.
async fn stranger(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap()
}

/// Runs statements as a stranger.
async fn run(url: &str, sql: &str) {
    let mut connection = stranger(url).await;
    connection.execute(AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
}

/// Runs `sql` as a stranger, and returns what the log has of it.
async fn after(fixture: &PostgresFixture, sql: &str) -> Vec<(Scope, Cause)> {
    run(&fixture.url, sql).await;
    news(&fixture.store).await
}

async fn populated(keys: u8) -> PostgresFixture {
    let fixture = PostgresFixture::new().await;
    populate(&fixture.store, keys).await;
    fixture
}

pub(crate) fn options(url: &str) -> PostgresOptions {
    PostgresOptions::new(url).unwrap()
}

async fn connect(url: &str) -> PostgresStore {
    PostgresStore::connect(options(url)).await.unwrap()
}

/// Waits until a query returns `expected`. Only where the runtime has a thread to spare.
fn wait_for(server: &Postgres, sql: &str, expected: &str) {
    let look = || (server.query(sql).unwrap() == expected).then_some(());
    tokio::task::block_in_place(|| eventually(sql, DEADLINE, look)).unwrap();
}

/// Waits until `count` connections to the database at `url` wait for a lock.
fn wait_for_waiters(server: &Postgres, url: &str, count: usize) {
    let database = database(url);
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = '{database}'"
    );
    wait_for(server, &sql, &count.to_string());
}

/// The name of the database at `url`.
fn database(url: &str) -> &str {
    url.rsplit('/').next().unwrap()
}
