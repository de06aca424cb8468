//! Looking up the record with a hash, in the home database or a standby of it.

use evictd_core::ids::KeyHash;
use evictd_core::record::Lookup;

use super::lanes::{Lane, Statement};
use crate::error::StoreError;
use crate::log_rows::no_head;
use crate::record::read_lookup;
use crate::rows::Columns;

const LOOK_UP: &str = "look up a key";

/// Looks up a record in the home database.
pub(super) async fn lookup(lookups: &Lane, hash: KeyHash) -> Result<Lookup, StoreError> {
    let row = lookups.row(LOOK_UP, || look_up(hash, false)).await?.ok_or_else(no_head)?;
    read_lookup(&row, row.time("now")?)
}

/// A lookup in the home database or a physical standby of it. Any other copy is refused: where tables are copied one by
/// one, the head may arrive before the records that it covers. Such a copy differs from home as other histories do (R2).
pub(super) async fn lookup_in_replica(lookups: &Lane, hash: KeyHash) -> Result<Lookup, StoreError> {
    let row = lookups.row(LOOK_UP, || look_up(hash, true)).await?.ok_or_else(no_head)?;
    if row.flag("is_own")? { read_lookup(&row, row.time("now")?) } else { Err(StoreError::NotAReplica) }
}

/// `asks_owner` adds the check whether the log is this server's own.
fn look_up(hash: KeyHash, asks_owner: bool) -> Statement {
    sqlx::query(
        "SELECT log_head.epoch, log_head.head, log_head.incarnation, log_head.token, log_head.round, log_head.store_id,
                evictd_now() AS now,
                CASE WHEN $2 THEN log_head.is_original AND log_head.xmin = log_head.written_by
                    AND log_head.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND log_head.system_identifier = (SELECT system_identifier FROM pg_control_system())
                    -- Clients may have taken a promoted standby for home, and written to it.
                    AND CASE WHEN pg_is_in_recovery() THEN true
                        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint = log_head.timeline
                        END
                END AS is_own,
                k.id AS key_id, k.api_id, k.workspace_id AS key_workspace_id, k.name, k.meta,
                k.external_id, k.permissions AS key_permissions,
                k.enabled AS key_enabled, k.expires AS key_expires, k.expired AS key_expired,
                coalesce(kw.enabled, false) AS key_workspace_enabled,
                (k.deleted_at_m IS NOT NULL OR a.id IS NULL OR a.deleted_at_m IS NOT NULL
                 OR kw.id IS NULL) AS key_deleted,
                r.id, r.workspace_id, r.permissions, r.enabled, r.expires, r.expired,
                coalesce(rw.enabled, false) AS workspace_enabled,
                (r.deleted_at_m IS NOT NULL OR rw.id IS NULL) AS deleted
         FROM ONLY log_head
         LEFT JOIN ONLY keys k ON k.hash = $1
         LEFT JOIN ONLY apis a ON a.id = k.api_id
         LEFT JOIN ONLY workspaces kw ON kw.id = k.workspace_id
         LEFT JOIN ONLY root_keys r ON r.hash = $1
         LEFT JOIN ONLY workspaces rw ON rw.id = r.workspace_id",
    )
    .bind(&hash.0[..])
    .bind(asks_owner)
}
