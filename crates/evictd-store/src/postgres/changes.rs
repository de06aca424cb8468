//! The changes of the control API with their audit records, and those that time makes. Triggers write the log rows.
//!
//! Changes run side by side. A change of a key locks it first, so that of several deletions only one finds it. Creating a
//! key locks its API against deletion, with the lock that the foreign key takes anyway: a stronger one would make all
//! creations in the API wait for each other.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyId};
use evictd_core::time::StoreTime;
use serde_json::json;

use super::errors::{failed, violated_unique};
use super::lanes::Statement;
use super::write::{By, PostgresWrite};
use super::{PostgresStore, audit, purge};
use crate::audit::{Purge, Purged};
use crate::audit_entry::{AuditEntry, Author, TRIAL};
use crate::change::{
    Actor, Authorize, ChangeError, ChangeStore, DeleteMode, KeyUpdate, NewApi, NewKey, Reroll,
};
use crate::error::StoreError;
use crate::rows::{Columns, sql_limit};

#[async_trait]
impl ChangeStore for PostgresStore {
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let mut write = self.change("create an API", actor).await?;
        let insert = sqlx::query("INSERT INTO apis (id, workspace_id, name) VALUES ($1, $2, $3)")
            .bind(api.id.as_str())
            .bind(actor.workspace_id.as_str())
            .bind(&api.name);
        write.run(insert).await?;
        audit::commit(write, Author::root_key(actor), &AuditEntry::api_created(&api.id)).await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let mut write = self.change("create a key", actor).await?;
        if !lock_live_api(&mut write, actor, &key.api_id).await? {
            return Err(ChangeError::ApiNotFound);
        }
        let insert = sqlx::query(
            "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, external_id, permissions,
                               enabled, expires)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(key.id.as_str())
        .bind(key.api_id.as_str())
        .bind(actor.workspace_id.as_str())
        .bind(&key.hash.0[..])
        .bind(&key.start)
        .bind(key.name.as_deref())
        .bind(key.meta.as_deref())
        .bind(key.external_id.as_deref())
        .bind(json!(key.permissions).to_string())
        .bind(key.enabled)
        .bind(key.expires_at.map(StoreTime::as_millis));
        insert_key(&mut write, insert).await?;
        let entry = AuditEntry::key_created(&key.id, &key.api_id);
        Ok(audit::commit(write, Author::root_key(actor), &entry).await?)
    }

    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("update a key", actor).await?;
        let LockedKey { api, now } = lock_live_key(&mut write, actor, key, authorize).await?;
        let (sets_name, name) = update.name.columns();
        let (sets_meta, meta) = update.meta.columns();
        let (sets_external_id, external_id) = update.external_id.columns();
        let (sets_expires, expires) = update.expires_at.columns();
        let change = sqlx::query(
            "UPDATE ONLY keys SET
                 name = CASE WHEN $2 THEN $3 ELSE keys.name END,
                 meta = CASE WHEN $4 THEN $5 ELSE keys.meta END,
                 external_id = CASE WHEN $6 THEN $7 ELSE keys.external_id END,
                 expires = CASE WHEN $8 THEN $9 ELSE keys.expires END,
                 expired = CASE WHEN $8 THEN coalesce($9 <= $12, false) ELSE keys.expired END,
                 enabled = coalesce($10, keys.enabled),
                 permissions = coalesce($11, keys.permissions),
                 updated_at_m = $12
             FROM (SELECT * FROM ONLY keys WHERE id = $1) AS before
             WHERE keys.id = before.id
             RETURNING (keys.name, keys.meta, keys.external_id, keys.expires, keys.expired, keys.enabled, keys.permissions)
                 IS DISTINCT FROM (before.name, before.meta, before.external_id, before.expires, before.expired,
                                   before.enabled, before.permissions)",
        )
        .bind(key.as_str())
        .bind(sets_name)
        .bind(name)
        .bind(sets_meta)
        .bind(meta)
        .bind(sets_external_id)
        .bind(external_id)
        .bind(sets_expires)
        .bind(expires.map(|end| end.as_millis()))
        .bind(update.enabled)
        .bind(update.permissions.as_ref().map(|permissions| json!(permissions).to_string()))
        .bind(now.as_millis());
        if write.value(change).await? == Some(true) {
            write.expect_log_row();
        }
        let entry = AuditEntry::key_updated(key, &api);
        Ok(audit::commit(write, Author::root_key(actor), &entry).await?)
    }

    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("reroll a key", actor).await?;
        let LockedKey { api, now } = lock_live_key(&mut write, actor, &reroll.key, authorize).await?;
        if !lock_live_api(&mut write, actor, &api).await? {
            return Err(ChangeError::KeyNotFound);
        }
        let copy = sqlx::query(
            "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, external_id, permissions,
                               enabled, expires, expired, created_at_m)
             SELECT $2, api_id, workspace_id, $3, $4, name, meta, external_id, permissions,
                    enabled, expires, expired, $5
             FROM ONLY keys WHERE id = $1",
        )
        .bind(reroll.key.as_str())
        .bind(reroll.new_id.as_str())
        .bind(&reroll.hash.0[..])
        .bind(&reroll.start)
        .bind(now.as_millis());
        insert_key(&mut write, copy).await?;
        let end = sqlx::query(
            "UPDATE ONLY keys SET expires = least(expires, $2), expired = expired OR $2 <= $3, updated_at_m = $3
             WHERE id = $1",
        )
        .bind(reroll.key.as_str())
        .bind(reroll.end_of_grace(now).as_millis())
        .bind(now.as_millis());
        write.run_logged(end).await?;
        let entry = AuditEntry::key_rerolled(&reroll, &api);
        Ok(audit::commit(write, Author::root_key(actor), &entry).await?)
    }

    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("delete a key", actor).await?;
        let LockedKey { now, .. } = lock_live_key(&mut write, actor, key, authorize).await?;
        let delete = match mode {
            DeleteMode::Soft => {
                let mark = sqlx::query("UPDATE ONLY keys SET deleted_at_m = $2 WHERE id = $1");
                mark.bind(key.as_str()).bind(now.as_millis())
            }
            DeleteMode::Permanent => sqlx::query("DELETE FROM ONLY keys WHERE id = $1").bind(key.as_str()),
        };
        write.run_logged(delete).await?;
        let entry = AuditEntry::key_deleted(key, mode);
        Ok(audit::commit(write, Author::root_key(actor), &entry).await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let mut write = self.change("delete an API", actor).await?;
        let protection = sqlx::query(
            "SELECT a.delete_protection FROM ONLY apis a JOIN ONLY workspaces w ON w.id = a.workspace_id
             WHERE a.id = $1 AND a.workspace_id = $2 AND a.deleted_at_m IS NULL FOR UPDATE OF a",
        );
        let protection = protection.bind(api.as_str()).bind(actor.workspace_id.as_str());
        if write.value(protection).await?.ok_or(ChangeError::ApiNotFound)? {
            return Err(ChangeError::Protected);
        }
        let mark = sqlx::query("UPDATE ONLY apis SET deleted_at_m = evictd_now() / 1000 WHERE id = $1");
        write.run_logged(mark.bind(api.as_str())).await?;
        Ok(audit::commit(write, Author::root_key(actor), &AuditEntry::api_deleted(api)).await?)
    }

    /// Skips rows that another transaction is changing. The next call finds them.
    async fn try_change(&self) -> Result<(), StoreError> {
        let by = By::Request(TRIAL);
        let mut write = PostgresWrite::begin(&self.lanes.changes, "try a change", by).await?;
        let insert = sqlx::query(
            "INSERT INTO keys (id, api_id, workspace_id, hash, start)
             SELECT $1, id, workspace_id, sha256($1::bytea), '' FROM ONLY apis WHERE deleted_at_m IS NULL LIMIT 1",
        );
        if write.run(insert.bind(TRIAL)).await? > 0 {
            let entry = AuditEntry::key_created(&KeyId::new(TRIAL), &ApiId::new(TRIAL));
            audit::record(&mut write, Author::trial(), &entry).await?;
        }
        // Dropping the transaction rolls it back.
        Ok(())
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        let find = || {
            sqlx::query(
                "SELECT EXISTS (SELECT FROM ONLY keys
                                WHERE expires <= now / 1000 AND NOT expired AND deleted_at_m IS NULL)
                     OR EXISTS (SELECT FROM ONLY root_keys
                                WHERE expires <= now / 1000 AND NOT expired AND deleted_at_m IS NULL) AS found
                 FROM (SELECT evictd_now() AS now OFFSET 0) AS clock",
            )
        };
        let row = self.lanes.changes.row("look for keys to expire", find).await?;
        if !row.map_or(Ok(false), |row| row.flag("found"))? {
            return Ok(0);
        }
        let mut write = PostgresWrite::begin(&self.lanes.changes, "expire keys", By::Publisher).await?;
        // Root keys first: they may do more, and there are few.
        let root_keys = sqlx::query(
            "UPDATE ONLY root_keys SET expired = true WHERE id IN
                 (SELECT id FROM ONLY root_keys WHERE expires <= (SELECT evictd_now() / 1000) AND NOT expired
                      AND deleted_at_m IS NULL
                  ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED)",
        );
        let limit = sql_limit(limit);
        let root_keys = write.run_logged(root_keys.bind(limit)).await?;
        let keys = sqlx::query(
            "UPDATE ONLY keys SET expired = true WHERE id IN
                 (SELECT id FROM ONLY keys WHERE expires <= (SELECT evictd_now() / 1000) AND NOT expired
                      AND deleted_at_m IS NULL
                  ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED)",
        );
        let keys = keys.bind(limit.saturating_sub_unsigned(root_keys));
        let expired = root_keys + write.run_logged(keys).await?;
        write.commit_change().await?;
        Ok(expired)
    }

    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError> {
        let mut write = PostgresWrite::begin(&self.lanes.changes, "purge old rows", By::Publisher).await?;
        let purged = purge::purge(&mut write, purge).await?;
        write.commit().await?;
        Ok(purged)
    }
}

/// Whether the API is live and in the actor's workspace. If so, it can't be deleted until this transaction ends.
async fn lock_live_api(write: &mut PostgresWrite, actor: &Actor, api: &ApiId) -> Result<bool, StoreError> {
    let lock = sqlx::query(
        "SELECT FROM ONLY apis a JOIN ONLY workspaces w ON w.id = a.workspace_id
         WHERE a.id = $1 AND a.workspace_id = $2 AND a.deleted_at_m IS NULL FOR KEY SHARE OF a",
    );
    let row = write.row(lock.bind(api.as_str()).bind(actor.workspace_id.as_str())).await?;
    Ok(row.is_some())
}

/// Inserts a key, unless another one has its hash. Soft-deleted keys count.
async fn insert_key(write: &mut PostgresWrite, insert: Statement) -> Result<(), ChangeError> {
    match write.try_run(insert).await {
        Ok(_) => {
            write.expect_log_row();
            Ok(())
        }
        Err(error) if violated_unique(&error) == Some("keys_hash") => Err(ChangeError::KeyExists),
        Err(error) => Err(failed("create a key")(error).into()),
    }
}

/// A key that is locked until the transaction ends.
struct LockedKey {
    api: ApiId,
    /// The store's clock.
    now: StoreTime,
}

/// Finds a live key of the actor's workspace, locks it, and checks whether the actor may change it. After waiting for the
/// lock, it judges the key as it is then.
async fn lock_live_key(
    write: &mut PostgresWrite,
    actor: &Actor,
    key: &KeyId,
    authorize: Authorize<'_>,
) -> Result<LockedKey, ChangeError> {
    let lock = sqlx::query(
        "SELECT k.api_id, evictd_now() AS now FROM ONLY keys k
         JOIN ONLY apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
         JOIN ONLY workspaces w ON w.id = k.workspace_id
         WHERE k.id = $1 AND k.workspace_id = $2 AND k.deleted_at_m IS NULL
         FOR UPDATE OF k",
    );
    let lock = lock.bind(key.as_str()).bind(actor.workspace_id.as_str());
    let row = write.row(lock).await?.ok_or(ChangeError::KeyNotFound)?;
    let api = ApiId::new(row.text("api_id")?);
    if authorize(&api) {
        Ok(LockedKey { api, now: row.time("now")? })
    } else {
        Err(ChangeError::Forbidden { api })
    }
}
