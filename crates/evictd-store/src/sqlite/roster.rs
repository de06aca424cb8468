//! The roster (R11).

use async_trait::async_trait;
use evictd_core::ids::Identity;
use evictd_core::roster::{self, Instance, RosterEntry, RosterUpdate};
use evictd_core::time::StoreTime;
use serde_json::{Value, json};

use super::SqliteStore;
use super::write::{SqliteWrite, failed};
use crate::error::StoreError;
use crate::roster::{Roster, RosterStore, bound_ms, read_entry};

#[async_trait]
impl RosterStore for SqliteStore {
    async fn roster(&self, since: u64) -> Result<Roster, StoreError> {
        let rows = sqlx::query(
            "SELECT roster_revision, roster_complete, region, agent, instance, policy, bound_ms, last_seen, departed
             FROM log_head LEFT JOIN roster ON roster.revision > ?1",
        )
        .bind(i64::try_from(since).unwrap_or(i64::MAX))
        .fetch_all(&self.pools.log)
        .await
        .map_err(failed("read its roster"))?;
        Roster::read(&rows)
    }

    async fn mark_roster_complete(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = SqliteWrite::begin(&self.pools.writer, "mark its roster as complete").await?;
        write
            .run(sqlx::query("UPDATE log_head SET roster_complete = 1 WHERE epoch = ?1").bind(epoch))
            .await?;
        write.commit().await
    }

    async fn mark_departed(&self, departed: &[Identity]) -> Result<(), StoreError> {
        if departed.is_empty() {
            return Ok(());
        }
        let mut write = SqliteWrite::begin(&self.pools.writer, "mark departed instances").await?;
        let mark = sqlx::query(
            "UPDATE roster SET departed = 1, revision = (SELECT roster_revision + 1 FROM log_head)
             WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))
               AND departed = 0",
        );
        if write.run(mark.bind(keys(departed))).await? > 0 {
            advance_revision(&mut write).await?;
        }
        write.commit().await
    }

    async fn remove_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut write = SqliteWrite::begin(&self.pools.writer, "remove instances").await?;
        let row = |(identity, last_seen): &(Identity, StoreTime)| {
            let [region, agent, instance] = key(identity);
            json!([region, agent, instance, last_seen.0])
        };
        let gone: Value = gone.iter().map(row).collect();
        let delete = sqlx::query(
            "DELETE FROM roster WHERE (region, agent, instance, last_seen) IN
                 (SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(?1))",
        );
        write.run(delete.bind(gone.to_string())).await?;
        write.commit().await
    }
}

/// Writes what a round changes, under one revision. A known instance costs a lookup and no write.
///
/// Rounds hold the write lock, so revisions follow commits: no reader sees one before those below it.
pub(super) async fn update(
    write: &mut SqliteWrite,
    probing: &[Instance],
    seen: &[Identity],
    now: StoreTime,
) -> Result<(), StoreError> {
    if probing.is_empty() && seen.is_empty() {
        return Ok(());
    }
    let identities = probing.iter().map(|instance| &instance.identity).chain(seen);
    let find = sqlx::query(
        "SELECT region, agent, instance, policy, bound_ms, last_seen, departed FROM roster
         WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))",
    );
    let known = write.rows(find.bind(keys(identities))).await?;
    let known = known.iter().map(read_entry).collect::<Result<Vec<_>, _>>()?;
    let RosterUpdate { entries, seen } = roster::update(&known, probing, seen, now);
    if !entries.is_empty() {
        upsert(write, &entries).await?;
        advance_revision(write).await?;
    }
    if !seen.is_empty() {
        let refresh = sqlx::query(
            "UPDATE roster SET last_seen = ?2
             WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))",
        );
        write.run(refresh.bind(keys(&seen)).bind(now.0)).await?;
    }
    Ok(())
}

async fn upsert(write: &mut SqliteWrite, entries: &[RosterEntry]) -> Result<(), StoreError> {
    let row = |entry: &RosterEntry| {
        let [region, agent, instance] = key(&entry.instance.identity);
        let policy = entry.instance.policy.label();
        json!([region, agent, instance, policy, bound_ms(entry), entry.last_seen.0, entry.departed])
    };
    let entries: Value = entries.iter().map(row).collect();
    let upsert = sqlx::query(
        "INSERT INTO roster (region, agent, instance, policy, bound_ms, first_seen, last_seen, departed, revision)
         SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 5,
                value ->> 6, roster_revision + 1
         FROM json_each(?1), log_head WHERE true
         ON CONFLICT (region, agent, instance) DO UPDATE
         SET policy = excluded.policy, bound_ms = excluded.bound_ms, last_seen = excluded.last_seen,
             departed = excluded.departed, revision = excluded.revision",
    );
    write.run(upsert.bind(entries.to_string())).await.map(drop)
}

/// Makes the head's revision that of the rows.
async fn advance_revision(write: &mut SqliteWrite) -> Result<(), StoreError> {
    let advance = sqlx::query(
        "UPDATE log_head SET roster_revision = max(roster_revision, (SELECT max(revision) FROM roster))",
    );
    write.run(advance).await.map(drop)
}

/// The identities as a parameter of a statement.
fn keys<'a>(identities: impl IntoIterator<Item = &'a Identity>) -> String {
    identities.into_iter().map(|identity| json!(key(identity))).collect::<Value>().to_string()
}

fn key(Identity { region, agent, instance }: &Identity) -> [String; 3] {
    [region.to_string(), agent.to_string(), instance.to_string()]
}
