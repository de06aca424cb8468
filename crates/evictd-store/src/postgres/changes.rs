//! What the control API and operators change, with their audit records. The log rows come from the triggers.
//!
//! Changes run side by side. One that changes a key locks it first, so that of several deletions one finds it and
//! the others don't. One that creates a key locks its API against being deleted meanwhile, with the lock that the
//! foreign key takes anyway; a stronger one would make all who create keys write that row in turn.

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId};
use evictd_core::time::StoreTime;
use serde_json::json;
use sqlx::Row;

use super::connections::{Statement, failed};
use super::write::{By, Write, repeated};
use super::{PostgresStore, audit, records};
use crate::audit::{Purge, Purged};
use crate::change::{
    Actor, Authorize, ChangeError, ChangeStore, DeleteMode, KeyUpdate, NewApi, NewKey, Reroll, end_of_grace,
};
use crate::error::StoreError;
use crate::rows::{AuditEntry, Author, edit, sql_limit};

#[async_trait]
impl ChangeStore for PostgresStore {
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let mut write = self.change("create an API", actor).await?;
        create_api(&mut write, actor, &api).await?;
        write.commit_change().await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let mut write = self.change("create a key", actor).await?;
        create_key(&mut write, actor, &key).await?;
        Ok(write.commit_change().await?)
    }

    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("update a key", actor).await?;
        update_key(&mut write, actor, key, &update, authorize).await?;
        Ok(write.commit_change().await?)
    }

    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("reroll a key", actor).await?;
        reroll_key(&mut write, actor, &reroll, authorize).await?;
        Ok(write.commit_change().await?)
    }

    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let mut write = self.change("delete a key", actor).await?;
        delete_key(&mut write, actor, key, mode, authorize).await?;
        Ok(write.commit_change().await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let mut write = self.change("delete an API", actor).await?;
        delete_api(&mut write, actor, api).await?;
        Ok(write.commit_change().await?)
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        if !records::any_to_expire(&self.connections.changes).await? {
            return Ok(0);
        }
        let mut write = Write::begin(&self.connections.changes, "expire keys", By::Publisher).await?;
        let expired = expire(&mut write, sql_limit(limit)).await?;
        write.commit_change().await?;
        Ok(expired)
    }

    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError> {
        let mut write = Write::begin(&self.connections.changes, "purge old rows", By::Publisher).await?;
        let purged = audit::purge(&mut write, purge).await?;
        write.commit().await?;
        Ok(purged)
    }
}

/// Marks keys and root keys whose end has come, at most `limit` together. What somebody is changing right now, or
/// another publisher is marking, waits for the next time.
pub(super) async fn expire(write: &mut Write, limit: i64) -> Result<u64, StoreError> {
    // Root keys first: they may do more, and there are few.
    let root_keys = sqlx::query(
        "UPDATE ONLY root_keys SET expired = true WHERE id IN
             (SELECT id FROM ONLY root_keys WHERE expires <= (SELECT evictd_now() / 1000) AND NOT expired
                  AND deleted_at_m IS NULL
              ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED)",
    );
    let expired = write.run(root_keys.bind(limit)).await?;
    let keys = sqlx::query(
        "UPDATE ONLY keys SET expired = true WHERE id IN
             (SELECT id FROM ONLY keys WHERE expires <= (SELECT evictd_now() / 1000) AND NOT expired
                  AND deleted_at_m IS NULL
              ORDER BY expires LIMIT $1 FOR UPDATE SKIP LOCKED)",
    );
    let rest = limit.saturating_sub_unsigned(expired);
    let expired = expired + write.run(keys.bind(rest)).await?;
    if expired > 0 {
        write.expect_news();
    }
    Ok(expired)
}

pub(super) async fn create_api(write: &mut Write, actor: &Actor, api: &NewApi) -> Result<(), StoreError> {
    let insert = sqlx::query("INSERT INTO apis (id, workspace_id, name) VALUES ($1, $2, $3)")
        .bind(api.id.as_str())
        .bind(actor.workspace_id.as_str())
        .bind(&api.name);
    write.run(insert).await?;
    audit::record(write, Author::root_key(actor), &AuditEntry::api_created(&api.id)).await
}

pub(super) async fn create_key(write: &mut Write, actor: &Actor, key: &NewKey) -> Result<(), ChangeError> {
    if !lock_live_api(write, actor, &key.api_id).await? {
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
    insert_key(write, insert).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::key_created(&key.id, &key.api_id)).await?)
}

/// Whether the API lives and is the actor's. If so, no deletion of it passes until this transaction ends.
async fn lock_live_api(write: &mut Write, actor: &Actor, api: &ApiId) -> Result<bool, StoreError> {
    let lock = sqlx::query(
        "SELECT FROM ONLY apis a JOIN ONLY workspaces w ON w.id = a.workspace_id
         WHERE a.id = $1 AND a.workspace_id = $2 AND a.deleted_at_m IS NULL FOR KEY SHARE OF a",
    );
    let row = write.row(lock.bind(api.as_str()).bind(actor.workspace_id.as_str())).await?;
    Ok(row.is_some())
}

/// Inserts a key, unless one has its text, deleted ones included.
async fn insert_key(write: &mut Write, insert: Statement) -> Result<(), ChangeError> {
    match write.try_run(insert).await {
        Ok(_) => Ok(()),
        Err(error) if repeated(&error) == Some("keys_hash") => Err(ChangeError::KeyExists),
        Err(error) => Err(failed("create a key")(error).into()),
    }
}

pub(super) async fn update_key(
    write: &mut Write,
    actor: &Actor,
    key: &KeyId,
    update: &KeyUpdate,
    authorize: Authorize<'_>,
) -> Result<(), ChangeError> {
    let LiveKey { api, now } = live_key(write, actor, key, authorize).await?;
    let (sets_name, name) = edit(&update.name);
    let (sets_meta, meta) = edit(&update.meta);
    let (sets_external_id, external_id) = edit(&update.external_id);
    let (sets_expires, expires) = edit(&update.expires_at);
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
        write.expect_news();
    }
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::key_updated(key, &api)).await?)
}

pub(super) async fn reroll_key(
    write: &mut Write,
    actor: &Actor,
    reroll: &Reroll,
    authorize: Authorize<'_>,
) -> Result<(), ChangeError> {
    let Reroll { key, grace, new_id, hash: KeyHash(hash), start } = reroll;
    let LiveKey { api, now } = live_key(write, actor, key, authorize).await?;
    if !lock_live_api(write, actor, &api).await? {
        return Err(ChangeError::KeyNotFound);
    }
    let copy = sqlx::query(
        "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, external_id, permissions,
                           enabled, expires, expired, created_at_m)
         SELECT $2, api_id, workspace_id, $3, $4, name, meta, external_id, permissions,
                enabled, expires, expired, $5
         FROM ONLY keys WHERE id = $1",
    )
    .bind(key.as_str())
    .bind(new_id.as_str())
    .bind(&hash[..])
    .bind(start)
    .bind(now.as_millis());
    insert_key(write, copy).await?;
    let end = sqlx::query(
        "UPDATE ONLY keys SET expires = least(expires, $2), expired = expired OR $2 <= $3, updated_at_m = $3
         WHERE id = $1",
    )
    .bind(key.as_str())
    .bind(end_of_grace(now, *grace).as_millis())
    .bind(now.as_millis());
    write.run(end).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::key_rerolled(reroll, &api)).await?)
}

pub(super) async fn delete_key(
    write: &mut Write,
    actor: &Actor,
    key: &KeyId,
    mode: DeleteMode,
    authorize: Authorize<'_>,
) -> Result<(), ChangeError> {
    let LiveKey { now, .. } = live_key(write, actor, key, authorize).await?;
    let delete = match mode {
        DeleteMode::Soft => {
            let mark = sqlx::query("UPDATE ONLY keys SET deleted_at_m = $2 WHERE id = $1");
            mark.bind(key.as_str()).bind(now.as_millis())
        }
        DeleteMode::Permanent => sqlx::query("DELETE FROM ONLY keys WHERE id = $1").bind(key.as_str()),
    };
    write.run(delete).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::key_deleted(key, mode)).await?)
}

pub(super) async fn delete_api(write: &mut Write, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
    let protection = sqlx::query(
        "SELECT a.delete_protection FROM ONLY apis a JOIN ONLY workspaces w ON w.id = a.workspace_id
         WHERE a.id = $1 AND a.workspace_id = $2 AND a.deleted_at_m IS NULL FOR UPDATE OF a",
    );
    let protection = protection.bind(api.as_str()).bind(actor.workspace_id.as_str());
    if write.value(protection).await?.ok_or(ChangeError::ApiNotFound)? {
        return Err(ChangeError::Protected);
    }
    let mark = sqlx::query("UPDATE ONLY apis SET deleted_at_m = evictd_now() / 1000 WHERE id = $1");
    write.run(mark.bind(api.as_str())).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::api_deleted(api)).await?)
}

/// A key that is locked until the transaction ends.
struct LiveKey {
    api: ApiId,
    /// The store's clock.
    now: StoreTime,
}

/// Finds a key that lives and is the actor's, locks it, and asks whether he may do it. Who had to wait for the
/// lock finds what is left of the key.
async fn live_key(
    write: &mut Write,
    actor: &Actor,
    key: &KeyId,
    authorize: Authorize<'_>,
) -> Result<LiveKey, ChangeError> {
    let lock = sqlx::query(
        "SELECT k.api_id, evictd_now() AS now FROM ONLY keys k
         JOIN ONLY apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
         JOIN ONLY workspaces w ON w.id = k.workspace_id
         WHERE k.id = $1 AND k.workspace_id = $2 AND k.deleted_at_m IS NULL
         FOR UPDATE OF k",
    );
    let lock = lock.bind(key.as_str()).bind(actor.workspace_id.as_str());
    let row = write.row(lock).await?.ok_or(ChangeError::KeyNotFound)?;
    let read = || Ok((row.try_get::<&str, _>("api_id")?, row.try_get("now")?));
    let (api, now) = read().map_err(failed("lock a key"))?;
    let api = ApiId::new(api);
    if authorize(&api) {
        Ok(LiveKey { api, now: StoreTime(now) })
    } else {
        Err(ChangeError::Forbidden { api })
    }
}
