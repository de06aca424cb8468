//! The roster (R11). All writes to it hold the lock on the head of the log, so that revisions follow commits: no reader sees
//! one before those below it.

use async_trait::async_trait;
use evictd_core::ids::Identity;
use evictd_core::roster::{self, Instance, RosterEntry, RosterUpdate};
use evictd_core::time::StoreTime;

use super::PostgresStore;
use super::head::lock_head;
use super::write::PostgresWrite;
use crate::error::StoreError;
use crate::roster::{Roster, RosterStore, bound_ms, read_entry};

#[async_trait]
impl RosterStore for PostgresStore {
    async fn roster(&self, since: u64) -> Result<Roster, StoreError> {
        let read = || {
            sqlx::query(
                "SELECT roster_revision, roster_complete, region, agent, instance, policy, bound_ms, last_seen, departed
                 FROM ONLY log_head LEFT JOIN ONLY roster ON roster.revision > $1
                 ORDER BY region, agent, instance",
            )
            .bind(i64::try_from(since).unwrap_or(i64::MAX))
        };
        Roster::read(&self.lanes.log.rows("read its roster", read).await?)
    }

    async fn mark_roster_complete(&self, epoch: u32) -> Result<(), StoreError> {
        let mut write = self.log("mark its roster as complete").await?;
        lock_head(&mut write).await?;
        let mark = sqlx::query("UPDATE ONLY log_head SET roster_complete = true WHERE epoch = $1");
        write.run(mark.bind(i32::try_from(epoch).unwrap_or(i32::MAX))).await?;
        write.commit().await
    }

    async fn mark_departed(&self, departed: &[Identity]) -> Result<(), StoreError> {
        if departed.is_empty() {
            return Ok(());
        }
        let mut write = self.log("mark departed instances").await?;
        lock_head(&mut write).await?;
        let [regions, agents, instances] = columns(departed);
        let mark = sqlx::query(
            "UPDATE ONLY roster SET departed = true, revision = roster_revision + 1 FROM ONLY log_head
             WHERE (region, agent, instance) IN (SELECT * FROM unnest($1, $2, $3)) AND NOT departed",
        );
        if write.run(mark.bind(regions).bind(agents).bind(instances)).await? > 0 {
            advance_revision(&mut write).await?;
        }
        write.commit().await
    }

    async fn remove_instances(&self, gone: &[(Identity, StoreTime)]) -> Result<(), StoreError> {
        if gone.is_empty() {
            return Ok(());
        }
        let mut write = self.log("remove instances").await?;
        lock_head(&mut write).await?;
        let [regions, agents, instances] = columns(gone.iter().map(|(identity, _)| identity));
        let times: Vec<i64> = gone.iter().map(|(_, last_seen)| last_seen.0).collect();
        let delete = sqlx::query(
            "DELETE FROM ONLY roster WHERE (region, agent, instance, last_seen) IN
                 (SELECT * FROM unnest($1, $2, $3, $4))",
        );
        write.run(delete.bind(regions).bind(agents).bind(instances).bind(times)).await?;
        write.commit().await
    }
}

/// Writes what a round changes, under one revision. A known instance costs a lookup and no write.
pub(super) async fn update(
    write: &mut PostgresWrite,
    probing: &[Instance],
    seen: &[Identity],
    now: StoreTime,
) -> Result<(), StoreError> {
    if probing.is_empty() && seen.is_empty() {
        return Ok(());
    }
    let identities = probing.iter().map(|instance| &instance.identity).chain(seen);
    let [regions, agents, instances] = columns(identities);
    let find = sqlx::query(
        "SELECT region, agent, instance, policy, bound_ms, last_seen, departed FROM ONLY roster
         WHERE (region, agent, instance) IN (SELECT * FROM unnest($1, $2, $3))",
    );
    let known = write.rows(find.bind(regions).bind(agents).bind(instances)).await?;
    let known = known.iter().map(read_entry).collect::<Result<Vec<_>, _>>()?;
    let RosterUpdate { entries, seen } = roster::update(&known, probing, seen, now);
    if !entries.is_empty() {
        upsert(write, &entries).await?;
        advance_revision(write).await?;
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

async fn upsert(write: &mut PostgresWrite, entries: &[RosterEntry]) -> Result<(), StoreError> {
    let [regions, agents, instances] = columns(entries.iter().map(|entry| &entry.instance.identity));
    let policies: Vec<&str> = entries.iter().map(|entry| entry.instance.policy.label()).collect();
    let bounds: Vec<i64> = entries.iter().map(bound_ms).collect();
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

/// Makes the rows that were written above the head's revision visible.
async fn advance_revision(write: &mut PostgresWrite) -> Result<(), StoreError> {
    let advance = sqlx::query("UPDATE ONLY log_head SET roster_revision = roster_revision + 1");
    write.run(advance).await.map(drop)
}

/// The identities as three columns.
fn columns<'a>(identities: impl IntoIterator<Item = &'a Identity>) -> [Vec<String>; 3] {
    let mut columns = [const { Vec::new() }; 3];
    for Identity { region, agent, instance } in identities {
        columns[0].push(region.to_string());
        columns[1].push(agent.to_string());
        columns[2].push(instance.to_string());
    }
    columns
}
