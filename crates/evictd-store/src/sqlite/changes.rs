//! What the control API changes, and its audit records. The log rows come from the triggers.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId};
use evictd_core::time::StoreTime;
use serde_json::json;

use super::clock::now;
use super::write::Write;
use super::{SqliteStore, audit, checkpoint, records};
use crate::audit::{Purge, Purged};
use crate::change::{
    Actor, Authorize, ChangeError, ChangeStore, DeleteMode, KeyUpdate, NewApi, NewKey, Reroll, end_of_grace,
};
use crate::error::StoreError;
use crate::rows::{AuditEntry, Author, edit, sql_limit};

#[async_trait]
impl ChangeStore for SqliteStore {
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let (mut write, _turn) = self.connections.change("create an API").await?;
        create_api(&mut write, actor, &api).await?;
        write.commit_change(Some(&actor.request_id)).await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("create a key").await?;
        create_key(&mut write, actor, &key).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn update_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        update: KeyUpdate,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("update a key").await?;
        update_key(&mut write, actor, key, &update, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn reroll_key(
        &self,
        actor: &Actor,
        reroll: Reroll,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("reroll a key").await?;
        reroll_key(&mut write, actor, &reroll, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn delete_key(
        &self,
        actor: &Actor,
        key: &KeyId,
        mode: DeleteMode,
        authorize: Authorize<'_>,
    ) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("delete a key").await?;
        delete_key(&mut write, actor, key, mode, authorize).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let (mut write, _turn) = self.connections.change("delete an API").await?;
        delete_api(&mut write, actor, api).await?;
        Ok(write.commit_change(Some(&actor.request_id)).await?)
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        let now = now();
        if !records::any_to_expire(&self.connections.log, now).await? {
            return Ok(0);
        }
        let (mut write, _turn) = self.connections.change("expire keys").await?;
        let expired = expire(&mut write, now, sql_limit(limit)).await?;
        write.commit_change(None).await?;
        Ok(expired)
    }

    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError> {
        let (mut write, turn) = self.connections.change("purge old rows").await?;
        let purged = audit::purge(&mut write, purge, now()).await?;
        write.commit().await?;
        drop(turn);
        if purged.log > 0 {
            self.has_traces.store(true, Ordering::Relaxed);
        }
        let is_last = purged.log < purge.limit as u64;
        if is_last && self.has_traces.load(Ordering::Relaxed) {
            // The rows are gone either way; what is left of them is tried again at the next sweep.
            match checkpoint::empty_log(&self.connections.checkpoints).await {
                Ok(emptied) => self.has_traces.store(!emptied, Ordering::Relaxed),
                Err(error) => tracing::warn!(%error, "the write-ahead log wasn't emptied"),
            }
        }
        Ok(purged)
    }
}

/// Marks keys and root keys whose end has come, at most `limit` together.
pub(super) async fn expire(write: &mut Write, now: StoreTime, limit: i64) -> Result<u64, StoreError> {
    // Root keys first: they may do more, and there are few.
    let root_keys = sqlx::query(
        "UPDATE root_keys SET expired = 1 WHERE id IN
             (SELECT id FROM root_keys WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL
              ORDER BY expires LIMIT ?2)",
    );
    let expired = write.run(root_keys.bind(now.as_millis()).bind(limit)).await?;
    let keys = sqlx::query(
        "UPDATE keys SET expired = 1 WHERE id IN
             (SELECT id FROM keys WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL
              ORDER BY expires LIMIT ?2)",
    );
    let rest = limit.saturating_sub_unsigned(expired);
    let expired = expired + write.run(keys.bind(now.as_millis()).bind(rest)).await?;
    if expired > 0 {
        write.expect_news();
    }
    Ok(expired)
}

pub(super) async fn create_api(write: &mut Write, actor: &Actor, api: &NewApi) -> Result<(), StoreError> {
    let insert =
        sqlx::query("INSERT INTO apis (id, workspace_id, name, created_at_m) VALUES (?1, ?2, ?3, ?4)")
            .bind(api.id.as_str())
            .bind(actor.workspace_id.as_str())
            .bind(&api.name)
            .bind(now().as_millis());
    write.run(insert).await?;
    audit::record(write, Author::root_key(actor), &AuditEntry::api_created(&api.id)).await
}

pub(super) async fn create_key(write: &mut Write, actor: &Actor, key: &NewKey) -> Result<(), ChangeError> {
    live_api(write, actor, &key.api_id).await?;
    free_hash(write, key.hash).await?;
    let insert = sqlx::query(
        "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, external_id, permissions,
                           enabled, expires, created_at_m)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
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
    .bind(key.expires_at.map(StoreTime::as_millis))
    .bind(now().as_millis());
    write.run(insert).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::key_created(&key.id, &key.api_id)).await?)
}

/// What an update may change of a key, as far as a verification reads it. RETURNING knows only how a row is afterwards.
const READ_BY_VERIFICATIONS: &str = "SELECT json_array(name, meta, external_id, permissions, enabled, expires, expired) FROM keys WHERE id = ?1";

pub(super) async fn update_key(
    write: &mut Write,
    actor: &Actor,
    key: &KeyId,
    update: &KeyUpdate,
    authorize: Authorize<'_>,
) -> Result<(), ChangeError> {
    let api = live_key(write, actor, key, authorize).await?;
    let now = now().as_millis();
    let (sets_name, name) = edit(&update.name);
    let (sets_meta, meta) = edit(&update.meta);
    let (sets_external_id, external_id) = edit(&update.external_id);
    let (sets_expires, expires) = edit(&update.expires_at);
    let change = sqlx::query(
        "UPDATE keys SET
             name = CASE WHEN ?2 THEN ?3 ELSE name END,
             meta = CASE WHEN ?4 THEN ?5 ELSE meta END,
             external_id = CASE WHEN ?6 THEN ?7 ELSE external_id END,
             expires = CASE WHEN ?8 THEN ?9 ELSE expires END,
             expired = CASE WHEN ?8 THEN ?9 IS NOT NULL AND ?9 <= ?12 ELSE expired END,
             enabled = coalesce(?10, enabled),
             permissions = coalesce(?11, permissions),
             updated_at_m = ?12
         WHERE id = ?1",
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
    .bind(now);
    let read = sqlx::query(READ_BY_VERIFICATIONS).bind(key.as_str());
    let before: Option<String> = write.value(read).await?;
    write.run(change).await?;
    let read = sqlx::query(READ_BY_VERIFICATIONS).bind(key.as_str());
    if write.value(read).await? != before {
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
    let Reroll { key, grace, new_id, hash, start } = reroll;
    let api = live_key(write, actor, key, authorize).await?;
    free_hash(write, *hash).await?;
    let now = now();
    let copy = sqlx::query(
        "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, external_id, permissions,
                           enabled, expires, expired, created_at_m)
         SELECT ?2, api_id, workspace_id, ?3, ?4, name, meta, external_id, permissions,
                enabled, expires, expired, ?5
         FROM keys WHERE id = ?1",
    )
    .bind(key.as_str())
    .bind(new_id.as_str())
    .bind(&hash.0[..])
    .bind(start)
    .bind(now.as_millis());
    write.run(copy).await?;
    let end = sqlx::query(
        "UPDATE keys SET expires = min(coalesce(expires, ?2), ?2), expired = max(expired, ?2 <= ?3),
                updated_at_m = ?3
         WHERE id = ?1",
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
    live_key(write, actor, key, authorize).await?;
    let delete = match mode {
        DeleteMode::Soft => {
            let mark = sqlx::query("UPDATE keys SET deleted_at_m = ?2 WHERE id = ?1");
            mark.bind(key.as_str()).bind(now().as_millis())
        }
        DeleteMode::Permanent => sqlx::query("DELETE FROM keys WHERE id = ?1").bind(key.as_str()),
    };
    write.run(delete).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::key_deleted(key, mode)).await?)
}

pub(super) async fn delete_api(write: &mut Write, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
    let protected = live_api(write, actor, api).await?;
    if protected {
        return Err(ChangeError::Protected);
    }
    let mark = sqlx::query("UPDATE apis SET deleted_at_m = ?2 WHERE id = ?1").bind(api.as_str());
    write.run(mark.bind(now().as_millis())).await?;
    write.expect_news();
    Ok(audit::record(write, Author::root_key(actor), &AuditEntry::api_deleted(api)).await?)
}

/// Finds a key that lives and is the actor's, and asks whether he may do it. Returns its API.
async fn live_key(
    write: &mut Write,
    actor: &Actor,
    key: &KeyId,
    authorize: Authorize<'_>,
) -> Result<ApiId, ChangeError> {
    let live_key = sqlx::query(
        "SELECT k.api_id FROM keys k
         JOIN apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
         JOIN workspaces w ON w.id = k.workspace_id
         WHERE k.id = ?1 AND k.workspace_id = ?2 AND k.deleted_at_m IS NULL",
    )
    .bind(key.as_str())
    .bind(actor.workspace_id.as_str());
    let api: String = write.value(live_key).await?.ok_or(ChangeError::KeyNotFound)?;
    let api = ApiId::new(api);
    if authorize(&api) { Ok(api) } else { Err(ChangeError::Forbidden { api }) }
}

/// Makes sure that no key has this text, deleted ones included.
async fn free_hash(write: &mut Write, hash: KeyHash) -> Result<(), ChangeError> {
    let taken = sqlx::query("SELECT 1 FROM keys WHERE hash = ?1").bind(hash.0.to_vec());
    if write.row(taken).await?.is_some() { Err(ChangeError::KeyExists) } else { Ok(()) }
}

/// Finds an API that lives and is the actor's. Returns whether it is protected from deletion.
async fn live_api(write: &mut Write, actor: &Actor, api: &ApiId) -> Result<bool, ChangeError> {
    let protection = sqlx::query(
        "SELECT a.delete_protection FROM apis a JOIN workspaces w ON w.id = a.workspace_id
         WHERE a.id = ?1 AND a.workspace_id = ?2 AND a.deleted_at_m IS NULL",
    )
    .bind(api.as_str())
    .bind(actor.workspace_id.as_str());
    write.value(protection).await?.ok_or(ChangeError::ApiNotFound)
}
