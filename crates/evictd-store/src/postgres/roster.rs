//! The roster (R11). All that writes it holds the lock on the head of the log, so that revisions follow commits:
//! nobody sees one before those below it.

use async_trait::async_trait;
use evictd_core::ids::Identity;
use evictd_core::roster::{self, Instance, RosterEntry, RosterUpdate};
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::connections::failed;
use super::write::Write;
use super::{PostgresStore, head};
use crate::error::StoreError;
use crate::roster::{Roster, RosterStore};
use crate::rows::RosterColumns;

#[async_trait]
impl RosterStore for PostgresStore {
    async fn roster(&self, since: u64) -> Result<Roster, StoreError> {
        const ACTION: &str = "read its roster";
        let ask = || {
            sqlx::query(
                "SELECT roster_revision, roster_complete, region, agent, instance, policy, bound_ms, last_seen, departed
                 FROM ONLY log_head LEFT JOIN ONLY roster ON roster.revision > $1
                 ORDER BY region, agent, instance",
            )
            .bind(i64::try_from(since).unwrap_or(i64::MAX))
        };
        let rows = self.connections.log.rows(ACTION, ask).await?;
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
        let mut write = self.log("trust its roster").await?;
        head::lock_head(&mut write).await?;
        trust(&mut write, epoch).await?;
        write.commit().await
    }

    async fn mark_departed(&self, departed: &[Identity]) -> Result<(), StoreError> {
        if departed.is_empty() {
            return Ok(());
        }
        let mut write = self.log("part with instances").await?;
        head::lock_head(&mut write).await?;
        part(&mut write, departed).await?;
        write.commit().await
    }

    async fn remove_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut write = self.log("forget instances").await?;
        head::lock_head(&mut write).await?;
        forget(&mut write, gone).await?;
        write.commit().await
    }
}

/// Writes what a round changes. A known instance costs a lookup and no write. What one round changes shares one
/// revision.
pub(super) async fn update(
    write: &mut Write,
    probing: &[Instance],
    seen: &[Identity],
    now: StoreTime,
) -> Result<(), StoreError> {
    if probing.is_empty() && seen.is_empty() {
        return Ok(());
    }
    let asked = probing.iter().map(|instance| &instance.identity).chain(seen);
    let [regions, agents, instances] = columns(asked);
    let find = sqlx::query(
        "SELECT region, agent, instance, policy, bound_ms, last_seen, departed FROM ONLY roster
         WHERE (region, agent, instance) IN (SELECT * FROM unnest($1, $2, $3))",
    );
    let known = write.rows(find.bind(regions).bind(agents).bind(instances)).await?;
    let known = known.iter().map(entry).collect::<Result<Vec<_>, _>>()?;
    let RosterUpdate { entries, seen } = roster::update(&known, probing, seen, now);
    if !entries.is_empty() {
        upsert(write, &entries).await?;
        revise(write).await?;
    }
    if !seen.is_empty() {
        let [regions, agents, instances] = columns(&seen);
        let refresh = sqlx::query(
            "UPDATE ONLY roster SET last_seen = $4
             WHERE (region, agent, instance) IN (SELECT * FROM unnest($1, $2, $3))",
        );
        write.run(refresh.bind(regions).bind(agents).bind(instances).bind(now.0)).await?;
    }
    Ok(())
}

async fn upsert(write: &mut Write, entries: &[RosterEntry]) -> Result<(), StoreError> {
    let [regions, agents, instances] = columns(entries.iter().map(|entry| &entry.instance.identity));
    let policies: Vec<&str> = entries.iter().map(|entry| entry.instance.policy.label()).collect();
    let bounds: Vec<i64> = entries
        .iter()
        .map(|entry| i64::try_from(entry.instance.bound.as_millis()).unwrap_or(i64::MAX))
        .collect();
    let upsert = sqlx::query(
        "INSERT INTO roster
             (region, agent, instance, policy, bound_ms, first_seen, last_seen, departed, revision)
         SELECT region, agent, instance, policy, bound_ms, last_seen, last_seen, departed, roster_revision + 1
         FROM unnest($1, $2, $3, $4, $5, $6, $7)
                  AS entry (region, agent, instance, policy, bound_ms, last_seen, departed),
              ONLY log_head
         ON CONFLICT (region, agent, instance) DO UPDATE
         SET policy = excluded.policy, bound_ms = excluded.bound_ms, last_seen = excluded.last_seen,
             departed = excluded.departed, revision = excluded.revision",
    )
    .bind(regions)
    .bind(agents)
    .bind(instances)
    .bind(policies)
    .bind(bounds)
    .bind(entries.iter().map(|entry| entry.last_seen.0).collect::<Vec<_>>())
    .bind(entries.iter().map(|entry| entry.departed).collect::<Vec<_>>());
    write.run(upsert).await.map(drop)
}

/// The rows that were written above the head's revision are visible from now on.
async fn revise(write: &mut Write) -> Result<(), StoreError> {
    write.run(sqlx::query("UPDATE ONLY log_head SET roster_revision = roster_revision + 1")).await.map(drop)
}

/// Notes that instances said goodbye.
pub(super) async fn part(write: &mut Write, departed: &[Identity]) -> Result<(), StoreError> {
    let [regions, agents, instances] = columns(departed);
    let mark = sqlx::query(
        "UPDATE ONLY roster SET departed = true, revision = roster_revision + 1 FROM ONLY log_head
         WHERE (region, agent, instance) IN (SELECT * FROM unnest($1, $2, $3)) AND NOT departed",
    );
    if write.run(mark.bind(regions).bind(agents).bind(instances)).await? > 0 {
        revise(write).await?;
    }
    Ok(())
}

/// A bound has passed since `epoch` began: whoever holds a lease has been written since.
pub(super) async fn trust(write: &mut Write, epoch: u32) -> Result<(), StoreError> {
    let trust = sqlx::query("UPDATE ONLY log_head SET roster_complete = true WHERE epoch = $1");
    write.run(trust.bind(i32::try_from(epoch).unwrap_or(i32::MAX))).await.map(drop)
}

/// Deletes those that haven't been seen since.
pub(super) async fn forget(write: &mut Write, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
    let [regions, agents, instances] = columns(gone.iter().map(|(identity, _)| identity));
    let times: Vec<i64> = gone.iter().map(|(_, last_seen)| last_seen.0).collect();
    let delete = sqlx::query(
        "DELETE FROM ONLY roster WHERE (region, agent, instance, last_seen) IN
             (SELECT * FROM unnest($1, $2, $3, $4))",
    );
    write.run(delete.bind(regions).bind(agents).bind(instances).bind(times)).await?;
    Ok(())
}

/// The columns of their names.
fn columns<'a>(identities: impl IntoIterator<Item = &'a Identity>) -> [Vec<String>; 3] {
    let mut columns = [const { Vec::new() }; 3];
    for Identity { region, agent, instance } in identities {
        columns[0].push(region.to_string());
        columns[1].push(agent.to_string());
        columns[2].push(instance.to_string());
    }
    columns
}

fn entry(row: &PgRow) -> Result<RosterEntry, StoreError> {
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
