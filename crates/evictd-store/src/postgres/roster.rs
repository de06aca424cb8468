//! The roster (R11). All that writes it holds the lock on the head of the log, so that revisions follow commits:
//! nobody sees one before those below it.

use evictd_core::ids::Identity;
use evictd_core::roster::Instance;
use evictd_core::time::StoreTime;
use sqlx::Row;
use sqlx::postgres::PgRow;

use super::connections::{Lane, failed};
use super::write::Write;
use crate::StoreError;
use crate::roster::{Roster, RosterEntry};
use crate::rows::{ROSTER_REFRESH, RosterColumns};

/// Writes the instances that the roster lacks, or knows differently, or hasn't heard of for a while.
///
/// What one round changes shares one revision.
pub(super) async fn register(
    write: &mut Write,
    instances: &[Instance],
    now: StoreTime,
) -> Result<(), StoreError> {
    if instances.is_empty() {
        return Ok(());
    }
    let [regions, agents, ids] = columns(instances.iter().map(|instance| &instance.identity));
    let policies: Vec<&str> = instances.iter().map(|instance| instance.policy.label()).collect();
    let bounds: Vec<i64> = instances
        .iter()
        .map(|instance| i64::try_from(instance.bound.as_millis()).unwrap_or(i64::MAX))
        .collect();
    // One statement however many they are; a known instance costs a lookup and no write. Whoever is told of twice
    // counts as the last says.
    let upsert = sqlx::query(
        "INSERT INTO roster AS known (region, agent, instance, policy, bound_ms, first_seen, last_seen, revision)
         SELECT DISTINCT ON (region, agent, instance)
                region, agent, instance, policy, bound_ms, $6, $6, roster_revision + 1
         FROM unnest($1, $2, $3, $4, $5) WITH ORDINALITY
                  AS presented (region, agent, instance, policy, bound_ms, place),
              ONLY log_head
         ORDER BY region, agent, instance, place DESC
         ON CONFLICT (region, agent, instance) DO UPDATE
         SET policy = excluded.policy, bound_ms = excluded.bound_ms, last_seen = excluded.last_seen,
             revision = excluded.revision, departed = false
         WHERE (known.policy, known.bound_ms, known.departed) <> (excluded.policy, excluded.bound_ms, false)
            OR abs(excluded.last_seen - known.last_seen) >= $7",
    )
    .bind(regions)
    .bind(agents)
    .bind(ids)
    .bind(policies)
    .bind(bounds)
    .bind(now.0)
    .bind(ROSTER_REFRESH.as_micros() as i64);
    if write.run(upsert).await? > 0 {
        revise(write).await?;
    }
    Ok(())
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

/// Keeps up when instances were last seen. Who isn't in the roster stays out: it has no lease.
pub(super) async fn touch(write: &mut Write, heard: &[Identity], now: StoreTime) -> Result<(), StoreError> {
    if heard.is_empty() {
        return Ok(());
    }
    let [regions, agents, instances] = columns(heard);
    let refresh = sqlx::query(
        "UPDATE ONLY roster SET last_seen = $4
         WHERE (region, agent, instance) IN (SELECT * FROM unnest($1, $2, $3)) AND abs($4 - last_seen) >= $5",
    )
    .bind(regions)
    .bind(agents)
    .bind(instances)
    .bind(now.0)
    .bind(ROSTER_REFRESH.as_micros() as i64);
    write.run(refresh).await?;
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

/// What has a revision above `since`, and the present one, in one snapshot.
pub(super) async fn changed(log: &Lane, since: u64) -> Result<Roster, StoreError> {
    const ACTION: &str = "read its roster";
    let ask = || {
        sqlx::query(
            "SELECT roster_revision, roster_complete, region, agent, instance, policy, bound_ms, last_seen, departed
             FROM ONLY log_head LEFT JOIN ONLY roster ON roster.revision > $1
             ORDER BY region, agent, instance",
        )
        .bind(i64::try_from(since).unwrap_or(i64::MAX))
    };
    let rows = log.rows(ACTION, ask).await?;
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
