//! Finds the schema that holds the store's tables, and detects changes of it (R3).
//!
//! Triggers write the log, and the owner of the tables can bypass them: disable a trigger, delete a row, enable it again;
//! rename a table and put another one in its place; rewrite it. Afterwards everything looks right. So each round compares a
//! digest of the catalog's rows about the tables with the one in `log_head`. Most ways to bypass a trigger leave a new
//! `xmin`, `oid` or `relfilenode` for good. If the digests differ, any row may have changed unseen: an epoch begins, and
//! agents flush.
//!
//! Only rounds compare: leases depend on rounds, and a digest costs more than numbering. Comparing locks no table, and
//! doesn't see uncommitted changes.

use sqlx::Executor;
use sqlx::postgres::PgConnection;

use super::errors::failed;
use super::options::PostgresOptions;
use super::rights;
use super::write::PostgresWrite;
use crate::error::StoreError;

/// Returns the first schema of the connection's search path that has a `log_head`.
async fn find(connection: &mut PgConnection) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(
        "SELECT n.nspname::text
         FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (schema, place)
         JOIN pg_namespace n ON n.nspname = path.schema
         JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'log_head'
         ORDER BY place LIMIT 1",
    )
    .fetch_optional(connection)
    .await
}

/// Pins `options` and the connection to the schema of the store if there is one.
pub(super) async fn pin_to_home(
    connection: &mut PgConnection,
    options: PostgresOptions,
) -> Result<PostgresOptions, StoreError> {
    let pin = async {
        let Some(schema) = find(&mut *connection).await? else { return Ok(options.clone()) };
        let options = options.clone().pinned_to(schema);
        sqlx::raw_sql(sqlx::AssertSqlSafe(options.pin())).execute(connection).await?;
        Ok(options)
    };
    pin.await.map_err(|source| options.unreadable(source))
}

/// Fails unless the pinned schema has all of the store's tables.
pub(super) async fn assert_complete(
    connection: &mut PgConnection,
    options: &PostgresOptions,
) -> Result<(), StoreError> {
    let missing: Option<String> = sqlx::query_scalar(
        "SELECT string_agg(needed, ', ') FROM unnest($1::text[]) AS needed
         WHERE NOT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                           WHERE c.relname = needed AND c.relkind = 'r' AND n.nspname = $2)",
    )
    .bind(rights::tables())
    .bind(options.schema())
    .fetch_one(connection)
    .await
    .map_err(|source| options.unreadable(source))?;
    match missing {
        None => Ok(()),
        Some(tables) => Err(StoreError::TablesMissing {
            place: options.place(),
            schema: options.schema().unwrap_or_default().to_owned(),
            tables,
        }),
    }
}

/// Returns a digest of everything in the catalog by which rows of these tables could change unseen:
///
/// * a table's identity, file and row security. Not the file and columns of `log_head`, which may be rewritten: its content
///   proves itself;
/// * its columns, triggers, rules, parents and children. Not the triggers of foreign keys, which depend on other tables;
/// * the triggers' functions.
pub(super) async fn fingerprint(write: &mut PostgresWrite) -> Result<Vec<u8>, StoreError> {
    let digest: Option<Option<Vec<u8>>> = write.value(sqlx::query(FINGERPRINT)).await?;
    digest.flatten().ok_or_else(|| failed("read its schema")(sqlx::Error::RowNotFound))
}

const FINGERPRINT: &str =
    "WITH ours AS MATERIALIZED (
         SELECT c.oid, c.relnamespace, c.relname, c.relkind, c.relpersistence, c.relrowsecurity,
                c.relforcerowsecurity, CASE WHEN c.relname <> 'log_head' THEN c.relfilenode END AS file
         FROM pg_class head JOIN pg_class c ON c.relnamespace = head.relnamespace
         WHERE head.oid = to_regclass('log_head')
           AND c.relname IN ('workspaces', 'root_keys', 'apis', 'keys', 'log_head', 'invalidations')
     ), lines AS (
         SELECT concat_ws('|', 'table', oid, relname, file, relkind, relpersistence, relrowsecurity,
                          relforcerowsecurity) AS line
         FROM ours
         UNION ALL
         SELECT concat_ws('|', 'column', attrelid, attnum, attname, atttypid, atttypmod, attnotnull, atthasdef,
                          attgenerated, attidentity)
         FROM ours JOIN pg_attribute ON attrelid = ours.oid
         WHERE attnum > 0 AND NOT attisdropped AND file IS NOT NULL
         UNION ALL
         SELECT concat_ws('|', 'trigger', t.oid, t.xmin, tgrelid, tgfoid, tgenabled)
         FROM ours JOIN pg_trigger t ON tgrelid = ours.oid WHERE NOT tgisinternal
         UNION ALL
         SELECT concat_ws('|', 'rule', r.oid, r.xmin, ev_class)
         FROM ours JOIN pg_rewrite r ON ev_class = ours.oid
         UNION ALL
         SELECT concat_ws('|', 'child', i.xmin, inhrelid, inhparent)
         FROM ours JOIN pg_inherits i ON inhparent = ours.oid OR inhrelid = ours.oid
         UNION ALL
         SELECT concat_ws('|', 'function', p.oid, p.xmin, proname)
         FROM ours JOIN pg_proc p ON pronamespace = relnamespace
         WHERE relname = 'log_head' AND proname >= 'evictd_' AND proname < 'evictd`'
     )
     SELECT sha256(convert_to(string_agg(line, chr(10) ORDER BY line COLLATE \"C\"), 'UTF8')) FROM lines";

/// Returns whether the schema before a migration is the one that rounds noted. True if they noted none. Until the
/// transaction ends, no round begins and no other transaction alters the schema.
pub(super) async fn begin_migration(connection: &mut PgConnection) -> sqlx::Result<bool> {
    let exists = "SELECT to_regclass('log_head') IS NOT NULL";
    if !sqlx::query_scalar(exists).fetch_one(&mut *connection).await? {
        return Ok(true);
    }
    let tables = "LOCK TABLE workspaces, root_keys, apis, keys, invalidations IN SHARE UPDATE EXCLUSIVE MODE";
    connection.execute(tables).await?;
    // The migration runs in a savepoint, which has another `xmin`.
    let head = "UPDATE ONLY log_head SET is_original = is_original AND xmin = written_by,
                                         written_by = pg_current_xact_id()::xid";
    connection.execute(head).await?;
    let column = "SELECT EXISTS (SELECT FROM pg_attribute
                                 WHERE attrelid = to_regclass('log_head') AND attname = 'schema_fingerprint')";
    if !sqlx::query_scalar(column).fetch_one(&mut *connection).await? {
        return Ok(true);
    }
    let noted = "SELECT schema_fingerprint FROM ONLY log_head";
    let noted: Option<Vec<u8>> = sqlx::query_scalar(noted).fetch_one(&mut *connection).await?;
    let found: Option<Vec<u8>> = sqlx::query_scalar(FINGERPRINT).fetch_one(connection).await?;
    Ok(noted.is_none() || noted == found)
}

/// Notes the schema that the migration made, unless the one before was unknown.
pub(super) async fn end_migration(connection: &mut PgConnection, was_known: bool) -> sqlx::Result<()> {
    let made: Option<Vec<u8>> = sqlx::query_scalar(FINGERPRINT).fetch_one(&mut *connection).await?;
    let note = "UPDATE ONLY log_head SET written_by = pg_current_xact_id()::xid, schema_intact = false,
                    schema_fingerprint = CASE WHEN $1 THEN $2 ELSE schema_fingerprint END";
    sqlx::query(note).bind(was_known).bind(made).execute(connection).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sqlx::Connection;

    use super::*;
    use crate::HomeStore;
    use crate::log::{LogStore, RoundRequest};
    use crate::postgres::PostgresStore;

    /// Failure: a statement reads a child table's rows, which no trigger of its parent sees.
    #[test]
    fn statements_read_only_the_stores_own_tables() {
        let sources = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/postgres")).unwrap();
        let mut sources: Vec<_> = sources.map(|entry| entry.unwrap().path()).collect();
        sources.push(concat!(env!("CARGO_MANIFEST_DIR"), "/src/postgres.rs").into());
        for path in sources {
            let source = fs::read_to_string(&path).unwrap();
            let source = source.split("#[cfg(test)]").next().unwrap_or_default();
            let words: Vec<&str> = source.split_whitespace().collect();
            for pair in words.windows(2) {
                let table = pair[1].trim_end_matches(|end: char| !end.is_alphanumeric());
                let reads =
                    matches!(pair[0].trim_start_matches(['"', '(']), "FROM" | "JOIN" | "UPDATE" | "USING");
                assert!(
                    !(reads && rights::tables().contains(&table)),
                    "{path:?}: {} {} without ONLY",
                    pair[0],
                    pair[1]
                );
            }
        }
    }

    async fn round(store: &PostgresStore) -> bool {
        store.round(RoundRequest::default()).await.unwrap().began.is_some()
    }

    #[tokio::test]
    async fn later_migration_begins_no_epoch_and_hides_none() {
        let server = evictd_postgres_server::shared().unwrap();
        let url = server.create_database("later_migration").unwrap();
        let store = PostgresStore::connect(PostgresOptions::new(&url).unwrap()).await.unwrap();
        assert!(!round(&store).await);
        let mut owner = PgConnection::connect(&url).await.unwrap();
        for is_altered in [false, true] {
            if is_altered {
                let unseen = "ALTER TABLE keys DISABLE TRIGGER keys_changed; DELETE FROM keys;
                              ALTER TABLE keys ENABLE ALWAYS TRIGGER keys_changed";
                owner.execute(unseen).await.unwrap();
            }
            let mut whole = owner.begin().await.unwrap();
            let was_known = begin_migration(&mut whole).await.unwrap();
            assert_eq!(was_known, !is_altered);
            let mut migration = whole.begin().await.unwrap();
            let sql = "ALTER TABLE keys ADD COLUMN later TEXT; UPDATE log_head SET rounds = rounds";
            let sql = if is_altered { "ALTER TABLE keys DROP COLUMN later" } else { sql };
            migration.execute(sql).await.unwrap();
            migration.commit().await.unwrap();
            end_migration(&mut whole, was_known).await.unwrap();
            whole.commit().await.unwrap();
            assert_eq!(round(&store).await, is_altered);
        }
        store.close().await;
    }
}
