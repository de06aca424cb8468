//! The changes of the control API with their audit records, and those that time makes. Triggers write the log rows.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use evictd_core::ids::{ApiId, KeyHash, KeyId};
use evictd_core::time::StoreTime;
use serde_json::json;

use super::clock::now;
use super::write::{SqliteWrite, failed};
use super::{SqliteStore, audit, checkpoint, purge};
use crate::audit::{Purge, Purged};
use crate::audit_entry::{AuditEntry, Author, TRIAL};
use crate::change::{
    Actor, Authorize, ChangeError, ChangeStore, DeleteMode, KeyUpdate, NewApi, NewKey, Reroll,
};
use crate::error::StoreError;
use crate::rows::sql_limit;

/// What verifications read of a key and an update can change. RETURNING gives only the row after the update.
const READ_BY_VERIFICATIONS: &str = "SELECT json_array(name, meta, external_id, permissions, enabled, expires, expired) FROM keys WHERE id = ?1";

#[async_trait]
impl ChangeStore for SqliteStore {
    async fn create_api(&self, actor: &Actor, api: NewApi) -> Result<(), StoreError> {
        let mut write = self.pools.change("create an API").await?;
        let insert =
            sqlx::query("INSERT INTO apis (id, workspace_id, name, created_at_m) VALUES (?1, ?2, ?3, ?4)")
                .bind(api.id.as_str())
                .bind(actor.workspace_id.as_str())
                .bind(&api.name)
                .bind(now().as_millis());
        write.run(insert).await?;
        audit::commit(write, Author::root_key(actor), &AuditEntry::api_created(&api.id)).await
    }

    async fn create_key(&self, actor: &Actor, key: NewKey) -> Result<(), ChangeError> {
        let mut write = self.pools.change("create a key").await?;
        find_live_api(&mut write, actor, &key.api_id).await?;
        check_hash_is_free(&mut write, key.hash).await?;
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
        write.run_logged(insert).await?;
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
        let mut write = self.pools.change("update a key").await?;
        let api = find_live_key(&mut write, actor, key, authorize).await?;
        let (sets_name, name) = update.name.columns();
        let (sets_meta, meta) = update.meta.columns();
        let (sets_external_id, external_id) = update.external_id.columns();
        let (sets_expires, expires) = update.expires_at.columns();
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
        .bind(now().as_millis());
        let read = || sqlx::query(READ_BY_VERIFICATIONS).bind(key.as_str());
        let before: Option<String> = write.value(read()).await?;
        write.run(change).await?;
        if write.value(read()).await? != before {
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
        let mut write = self.pools.change("reroll a key").await?;
        let api = find_live_key(&mut write, actor, &reroll.key, authorize).await?;
        check_hash_is_free(&mut write, reroll.hash).await?;
        let now = now();
        let copy = sqlx::query(
            "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, external_id, permissions,
                               enabled, expires, expired, created_at_m)
             SELECT ?2, api_id, workspace_id, ?3, ?4, name, meta, external_id, permissions,
                    enabled, expires, expired, ?5
             FROM keys WHERE id = ?1",
        )
        .bind(reroll.key.as_str())
        .bind(reroll.new_id.as_str())
        .bind(&reroll.hash.0[..])
        .bind(&reroll.start)
        .bind(now.as_millis());
        write.run(copy).await?;
        let end = sqlx::query(
            "UPDATE keys SET expires = min(coalesce(expires, ?2), ?2), expired = max(expired, ?2 <= ?3),
                    updated_at_m = ?3
             WHERE id = ?1",
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
        let mut write = self.pools.change("delete a key").await?;
        find_live_key(&mut write, actor, key, authorize).await?;
        let delete = match mode {
            DeleteMode::Soft => {
                let mark = sqlx::query("UPDATE keys SET deleted_at_m = ?2 WHERE id = ?1");
                mark.bind(key.as_str()).bind(now().as_millis())
            }
            DeleteMode::Permanent => sqlx::query("DELETE FROM keys WHERE id = ?1").bind(key.as_str()),
        };
        write.run_logged(delete).await?;
        let entry = AuditEntry::key_deleted(key, mode);
        Ok(audit::commit(write, Author::root_key(actor), &entry).await?)
    }

    async fn delete_api(&self, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
        let mut write = self.pools.change("delete an API").await?;
        let is_protected = find_live_api(&mut write, actor, api).await?;
        if is_protected {
            return Err(ChangeError::Protected);
        }
        let mark = sqlx::query("UPDATE apis SET deleted_at_m = ?2 WHERE id = ?1").bind(api.as_str());
        write.run_logged(mark.bind(now().as_millis())).await?;
        Ok(audit::commit(write, Author::root_key(actor), &AuditEntry::api_deleted(api)).await?)
    }

    async fn try_change(&self) -> Result<(), StoreError> {
        let mut write = self.pools.change("try a change").await?;
        let insert = sqlx::query(
            "INSERT INTO keys (id, api_id, workspace_id, hash, start, created_at_m)
             SELECT ?1, id, workspace_id, randomblob(32), '', 0 FROM apis WHERE deleted_at_m IS NULL LIMIT 1",
        );
        if write.run(insert.bind(TRIAL)).await? > 0 {
            let entry = AuditEntry::key_created(&KeyId::new(TRIAL), &ApiId::new(TRIAL));
            audit::record(&mut write, Author::trial(), &entry).await?;
        }
        write.roll_back()
    }

    async fn expire(&self, limit: usize) -> Result<u64, StoreError> {
        let (now, limit) = (now().as_millis(), sql_limit(limit));
        let any: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM keys WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL)
                 OR EXISTS (SELECT 1 FROM root_keys
                            WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL)",
        )
        .bind(now)
        .fetch_one(&self.pools.log)
        .await
        .map_err(failed("look for keys to expire"))?;
        if !any {
            return Ok(0);
        }
        let mut write = self.pools.change("expire keys").await?;
        // Root keys first: they may do more, and there are few.
        let root_keys = sqlx::query(
            "UPDATE root_keys SET expired = 1 WHERE id IN
                 (SELECT id FROM root_keys WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL
                  ORDER BY expires LIMIT ?2)",
        );
        let root_keys = write.run_logged(root_keys.bind(now).bind(limit)).await?;
        let keys = sqlx::query(
            "UPDATE keys SET expired = 1 WHERE id IN
                 (SELECT id FROM keys WHERE expires <= ?1 AND expired = 0 AND deleted_at_m IS NULL
                  ORDER BY expires LIMIT ?2)",
        );
        let rest = limit.saturating_sub_unsigned(root_keys);
        let expired = root_keys + write.run_logged(keys.bind(now).bind(rest)).await?;
        write.commit_change(None).await?;
        Ok(expired)
    }

    async fn purge(&self, purge: Purge) -> Result<Purged, StoreError> {
        let mut write = self.pools.change("purge old rows").await?;
        let purged = purge::purge(&mut write, purge, now()).await?;
        write.commit().await?;
        if purged.log > 0 {
            self.has_traces.store(true, Ordering::Relaxed);
        }
        let is_last = purged.log < purge.limit as u64;
        if is_last && self.has_traces.load(Ordering::Relaxed) {
            // The rows are deleted either way. The next purge tries again to remove their traces.
            match checkpoint::empty_log(&self.pools.checkpoints).await {
                Ok(emptied) => self.has_traces.store(!emptied, Ordering::Relaxed),
                Err(error) => {
                    tracing::warn!(%error, "cannot empty the write-ahead log; retrying at the next purge");
                }
            }
        }
        Ok(purged)
    }
}

/// Finds a live key of the actor's workspace, and checks whether the actor may change it. Returns its API.
async fn find_live_key(
    write: &mut SqliteWrite,
    actor: &Actor,
    key: &KeyId,
    authorize: Authorize<'_>,
) -> Result<ApiId, ChangeError> {
    let find = sqlx::query(
        "SELECT k.api_id FROM keys k
         JOIN apis a ON a.id = k.api_id AND a.deleted_at_m IS NULL
         JOIN workspaces w ON w.id = k.workspace_id
         WHERE k.id = ?1 AND k.workspace_id = ?2 AND k.deleted_at_m IS NULL",
    )
    .bind(key.as_str())
    .bind(actor.workspace_id.as_str());
    let api: String = write.value(find).await?.ok_or(ChangeError::KeyNotFound)?;
    let api = ApiId::new(api);
    if authorize(&api) { Ok(api) } else { Err(ChangeError::Forbidden { api }) }
}

/// Checks that no key has this hash. Soft-deleted keys count.
async fn check_hash_is_free(write: &mut SqliteWrite, hash: KeyHash) -> Result<(), ChangeError> {
    let taken = sqlx::query("SELECT 1 FROM keys WHERE hash = ?1").bind(hash.0.to_vec());
    if write.row(taken).await?.is_some() { Err(ChangeError::KeyExists) } else { Ok(()) }
}

/// Finds a live API of the actor's workspace. Returns whether it is protected from deletion.
async fn find_live_api(write: &mut SqliteWrite, actor: &Actor, api: &ApiId) -> Result<bool, ChangeError> {
    let protection = sqlx::query(
        "SELECT a.delete_protection FROM apis a JOIN workspaces w ON w.id = a.workspace_id
         WHERE a.id = ?1 AND a.workspace_id = ?2 AND a.deleted_at_m IS NULL",
    )
    .bind(api.as_str())
    .bind(actor.workspace_id.as_str());
    write.value(protection).await?.ok_or(ChangeError::ApiNotFound)
}
