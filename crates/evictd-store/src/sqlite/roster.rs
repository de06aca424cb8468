//! The roster: who may hold a lease (R11).

use evictd_core::ids::Identity;
use evictd_core::roster::Instance;
use evictd_core::time::StoreTime;
use serde_json::{Value, json};
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::write::{Write, failed};
use crate::StoreError;
use crate::roster::{Roster, RosterEntry};
use crate::rows::{ROSTER_REFRESH, RosterColumns};

/// Writes the instances that the roster lacks, or knows differently, or hasn't heard of for a while.
///
/// What one round changes shares one revision. Rounds have the write lock, so revisions follow commits:
/// nobody sees one before those below it.
pub(super) async fn register(
    write: &mut Write,
    instances: &[Instance],
    now: StoreTime,
) -> Result<(), StoreError> {
    if instances.is_empty() {
        return Ok(());
    }
    let presented: Vec<Value> = instances
        .iter()
        .map(|Instance { identity, policy, bound }| {
            let bound_ms = i64::try_from(bound.as_millis()).unwrap_or(i64::MAX);
            let (region, agent) = (identity.region.as_str(), identity.agent.as_str());
            json!([region, agent, identity.instance.to_string(), policy.label(), bound_ms])
        })
        .collect();
    // One statement however many they are; a known instance costs a lookup and no write.
    let upsert = sqlx::query(
        "INSERT INTO roster (region, agent, instance, policy, bound_ms, first_seen, last_seen, revision)
         SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, ?2, ?2, roster_revision + 1
         FROM json_each(?1), log_head WHERE true
         ON CONFLICT (region, agent, instance) DO UPDATE
         SET policy = excluded.policy, bound_ms = excluded.bound_ms, last_seen = excluded.last_seen,
             revision = excluded.revision, departed = 0
         WHERE (policy, bound_ms, departed) IS NOT (excluded.policy, excluded.bound_ms, 0)
            OR abs(excluded.last_seen - last_seen) >= ?3",
    )
    .bind(Value::from(presented).to_string())
    .bind(now.0)
    .bind(ROSTER_REFRESH.as_micros() as i64);
    if write.run(upsert).await? > 0 {
        revise(write).await?;
    }
    Ok(())
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
    let departed: Vec<Value> = departed.iter().map(|identity| json!(key(identity))).collect();
    let mark = sqlx::query(
        "UPDATE roster SET departed = 1, revision = (SELECT roster_revision + 1 FROM log_head)
         WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))
           AND departed = 0",
    );
    if write.run(mark.bind(Value::from(departed).to_string())).await? > 0 {
        revise(write).await?;
    }
    Ok(())
}

/// Keeps up when instances were last seen. Who isn't in the roster stays out: it has no lease.
pub(super) async fn touch(write: &mut Write, heard: &[Identity], now: StoreTime) -> Result<(), StoreError> {
    if heard.is_empty() {
        return Ok(());
    }
    let heard: Vec<Value> = heard.iter().map(|identity| json!(key(identity))).collect();
    let refresh = sqlx::query(
        "UPDATE roster SET last_seen = ?2
         WHERE (region, agent, instance) IN (SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1))
           AND abs(?2 - last_seen) >= ?3",
    )
    .bind(Value::from(heard).to_string())
    .bind(now.0)
    .bind(ROSTER_REFRESH.as_micros() as i64);
    write.run(refresh).await?;
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

fn key(identity: &Identity) -> [String; 3] {
    let Identity { region, agent, instance } = identity;
    [region.to_string(), agent.to_string(), instance.to_string()]
}

/// What has a revision above `since`, and the present one, in one snapshot.
pub(super) async fn changed(readers: &SqlitePool, since: u64) -> Result<Roster, StoreError> {
    const ACTION: &str = "read its roster";
    let rows = sqlx::query(
        "SELECT roster_revision, roster_complete, region, agent, instance, policy, bound_ms, last_seen, departed
         FROM log_head LEFT JOIN roster ON roster.revision > ?1",
    )
    .bind(i64::try_from(since).unwrap_or(i64::MAX))
    .fetch_all(readers)
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
