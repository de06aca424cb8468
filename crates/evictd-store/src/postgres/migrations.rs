//! Migrating the schema.

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::PgConnection;
use sqlx::{Connection, Executor};

use super::errors::sql_state;
use super::options::PostgresOptions;
use super::schema;
use crate::error::StoreError;

pub(super) static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// Returns the version of the newest migration of the database; `None` if there was none.
pub(super) async fn version(connection: &mut PgConnection) -> sqlx::Result<Option<i64>> {
    if !has_schema(connection).await? {
        return Ok(None);
    }
    let newest = "SELECT coalesce(max(version), 0) FROM ONLY _sqlx_migrations WHERE success";
    sqlx::query_scalar(newest).fetch_one(connection).await.map(Some)
}

/// Whether the database has exactly this version's schema. Needs no right to change it.
pub(super) async fn is_current(
    connection: &mut PgConnection,
    options: &PostgresOptions,
) -> Result<bool, StoreError> {
    let look = async {
        if !has_schema(&mut *connection).await? {
            return Ok(false);
        }
        let applied: Vec<(i64, Vec<u8>)> = sqlx::query_as(
            "SELECT version, checksum FROM ONLY _sqlx_migrations WHERE success ORDER BY version",
        )
        .fetch_all(connection)
        .await?;
        let known = MIGRATIONS.iter().map(|migration| (migration.version, migration.checksum.to_vec()));
        Ok(known.eq(applied))
    };
    look.await.map_err(|source| options.unreadable(source))
}

async fn has_schema(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL").fetch_one(connection).await
}

/// Migrates the schema in one transaction, without a time limit. Of several processes that do so at once, one migrates it
/// and the others find it done.
pub(super) async fn migrate(
    connection: &mut PgConnection,
    options: &PostgresOptions,
) -> Result<(), StoreError> {
    let refused = |error| match &error {
        MigrateError::Execute(source) | MigrateError::ExecuteMigration(source, _)
            if sql_state(source).is_some_and(|code| matches!(&*code, "42501" | "25006")) =>
        {
            // Insufficient privilege; a standby.
            StoreError::NotMigrated { place: options.place() }
        }
        _ => StoreError::Migrate(error),
    };
    let prepare = |source| refused(MigrateError::Execute(source));
    connection.execute("SET statement_timeout = 0; SET lock_timeout = 0").await.map_err(prepare)?;
    let mut whole = connection.begin().await.map_err(prepare)?;
    let turn = "SELECT pg_advisory_xact_lock(hashtextextended('evictd migrations', 0))";
    whole.execute(turn).await.map_err(prepare)?;
    let was_known = schema::begin_migration(&mut whole).await.map_err(prepare)?;
    MIGRATIONS.run(&mut *whole).await.map_err(refused)?;
    schema::end_migration(&mut whole, was_known).await.map_err(prepare)?;
    whole.commit().await.map_err(prepare)
}
