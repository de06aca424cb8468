//! The roster: who may hold a lease (R11).

use async_trait::async_trait;
use evictd_core::ids::Identity;
use evictd_core::roster::{self, Instance, RosterEntry, RosterUpdate};
use evictd_core::time::StoreTime;
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::write::{Write, failed};
use crate::error::StoreError;
use crate::roster::{Roster, RosterStore};
use crate::rows::RosterColumns;

#[async_trait]
impl RosterStore for SqliteStore {
    async fn roster(&self, since: u64) -> Result<Roster, StoreError> {
        const ACTION: &str = "read its roster";
        let rows = sqlx::query(
            "SELECT roster_revision, roster_complete, region, agent, instance, policy, bound_ms, last_seen, departed
             FROM log_head LEFT JOIN roster ON roster.revision > ?1",
        )
        .bind(i64::try_from(since).unwrap_or(i64::MAX))
        .fetch_all(&self.connections.log)
        .await
        .map_err(failed(ACTION))?;
        let Some(first) = rows.first() else {
            return Err(StoreError::Corrupt { what: "log_head", value: "no row".to_owned() });
        };
        let revision: i64 = first.try_get("roster_revision").map_err(failed(ACTION))?;
        let none = first.try_get::<Option<&str>, _>("instance").map_err(failed(ACTION))?.is_none();
        let rows = if none { &[] } else { &rows[..] };
        Ok(Roster {
            is_complete: first.try_get("roster_complete").map_err(failed(ACTION))?,
            revision: u64::try_from(revision)
                .map_err(|_| StoreError::Corrupt { what: "roster revision", value: revision.to_string() })?,
            entries: rows.iter().map(entry).collect::<Result<_, _>>()?,
        })
    }

    async fn mark_roster_complete(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = Write::begin(&self.connections.writer, "trust its roster").await?;
        trust(&mut write, epoch).await?;
        write.commit().await
    }

    async fn mark_departed(&self, departed: &[Identity]) -> Result<(), StoreError> {
        if departed.is_empty() {
            return Ok(());
        }
        let mut write = Write::begin(&self.connections.writer, "part with instances").await?;
        part(&mut write, departed).await?;
        write.commit().await
    }

    async fn remove_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut write = Write::begin(&self.connections.writer, "forget instances").await?;
        forget(&mut write, gone).await?;
        write.commit().await
    }
}

/// Writes what a round changes. A known instance costs a lookup and no write.
///
/// What one round changes shares one revision. Rounds have the write lock, so revisions follow commits:
/// nobody sees one before those below it.
pub(super) async fn update(
    write: &mut Write,
    probing: &[Instance],
    seen: &[Identity],
    now: StoreTime,
) -> Result<(), StoreError> {
    let asked: Vec<&Identity> = probing.iter().map(|instance| &instance.identity).chain(seen).collect();
    if asked.is_empty() {
        return Ok(());
    }
    let find = sqlx::query(
        "SELECT region, agent, instance, policy, bound_ms, last_seen, departed FROM roster
         WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))",
    );
    let known = write.rows(find.bind(keys(asked))).await?;
    let known = known.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
    let RosterUpdate { entries, seen } = roster::update(&known, probing, seen, now);
    if !entries.is_empty() {
        upsert(write, &entries).await?;
        revise(write).await?;
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

async fn upsert(write: &mut Write, entries: &[RosterEntry]) -> Result<(), StoreError> {
    let entries: Value = entries
        .iter()
        .map(|RosterEntry { instance: Instance { identity, policy, bound }, last_seen, departed }| {
            let bound_ms = i64::try_from(bound.as_millis()).unwrap_or(i64::MAX);
            let [region, agent, instance] = key(identity);
            json!([region, agent, instance, policy.label(), bound_ms, last_seen.0, *departed])
        })
        .collect();
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

/// The head's revision follows those of the rows.
async fn revise(write: &mut Write) -> Result<(), StoreError> {
    let revise = sqlx::query(
        "UPDATE log_head SET roster_revision = max(roster_revision, (SELECT max(revision) FROM roster))",
    );
    write.run(revise).await.map(drop)
}

/// Notes that instances said goodbye.
pub(super) async fn part(write: &mut Write, departed: &[Identity]) -> Result<(), StoreError> {
    let mark = sqlx::query(
        "UPDATE roster SET departed = 1, revision = (SELECT roster_revision + 1 FROM log_head)
         WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))
           AND departed = 0",
    );
    if write.run(mark.bind(keys(departed))).await? > 0 {
        revise(write).await?;
    }
    Ok(())
}

/// A bound has passed since `epoch` began: whoever holds a lease has been written since.
pub(super) async fn trust(write: &mut Write, epoch: u32) -> Result<(), StoreError> {
    let trust = sqlx::query("UPDATE log_head SET roster_complete = 1 WHERE epoch = ?1").bind(epoch);
    write.run(trust).await.map(drop)
}

/// Deletes those that haven't been seen since.
pub(super) async fn forget(write: &mut Write, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
    let gone: Vec<Value> = gone
        .iter()
        .map(|(identity, last_seen)| {
            let [region, agent, instance] = key(identity);
            json!([region, agent, instance, last_seen.0])
        })
        .collect();
    let delete = sqlx::query(
        "DELETE FROM roster WHERE (region, agent, instance, last_seen) IN
             (SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3 FROM json_each(?1))",
    );
    write.run(delete.bind(Value::from(gone).to_string())).await?;
    Ok(())
}

/// As a parameter of a statement.
fn keys<'a>(identities: impl IntoIterator<Item = &'a Identity>) -> String {
    identities.into_iter().map(|identity| json!(key(identity))).collect::<Value>().to_string()
}

fn key(identity: &Identity) -> [String; 3] {
    let Identity { region, agent, instance } = identity;
    [region.to_string(), agent.to_string(), instance.to_string()]
}

fn entry(row: &SqliteRow) -> Result<RosterEntry, StoreError> {
    let read = || -> sqlx::Result<_> {
        Ok(RosterColumns {
            region: row.try_get("region")?,
            agent: row.try_get("agent")?,
            instance: row.try_get("instance")?,
            policy: row.try_get("policy")?,
            bound_ms: row.try_get("bound_ms")?,
            last_seen: row.try_get("last_seen")?,
            departed: row.try_get("departed")?,
        })
    };
    read().map_err(failed("read its roster"))?.read()
}
