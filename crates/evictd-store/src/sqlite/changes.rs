//! What the control API changes, and its audit records. The log rows come from the triggers.

use evictd_core::ids::{ApiId, KeyId};
use evictd_core::time::StoreTime;
use serde_json::{Value, json};

use super::now;
use super::write::Write;
use crate::StoreError;
use crate::change::{Actor, Authorize, ChangeError, DeleteMode, NewApi, NewKey, NewRootKey};

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
    Ok(expired + write.run(keys.bind(now.as_millis()).bind(rest)).await?)
}

pub(super) async fn create_root_key(write: &mut Write, root_key: &NewRootKey) -> Result<(), StoreError> {
    let now = now().as_millis();
    let workspace =
        sqlx::query("INSERT INTO workspaces (id, created_at_m) VALUES (?1, ?2) ON CONFLICT (id) DO NOTHING");
    write.run(workspace.bind(root_key.workspace_id.as_str()).bind(now)).await?;
    let insert = sqlx::query(
        "INSERT INTO root_keys (id, workspace_id, hash, start, name, permissions, expires, created_at_m)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )
    .bind(root_key.id.as_str())
    .bind(root_key.workspace_id.as_str())
    .bind(&root_key.hash.0[..])
    .bind(&root_key.start)
    .bind(root_key.name.as_deref())
    .bind(json!(root_key.permissions).to_string())
    .bind(root_key.expires_at.map(StoreTime::as_millis))
    .bind(now);
    write.run(insert).await?;
    Ok(())
}

pub(super) async fn create_api(write: &mut Write, actor: &Actor, api: &NewApi) -> Result<(), StoreError> {
    let insert =
        sqlx::query("INSERT INTO apis (id, workspace_id, name, created_at_m) VALUES (?1, ?2, ?3, ?4)")
            .bind(api.id.as_str())
            .bind(actor.workspace_id.as_str())
            .bind(&api.name)
            .bind(now().as_millis());
    write.run(insert).await?;
    let description = format!("Created API {}", api.id);
    audit(write, actor, "api.create", &description, &[("api", api.id.as_str())]).await
}

pub(super) async fn create_key(write: &mut Write, actor: &Actor, key: &NewKey) -> Result<(), ChangeError> {
    live_api(write, actor, &key.api_id).await?;
    let taken = sqlx::query("SELECT 1 FROM keys WHERE hash = ?1").bind(&key.hash.0[..]);
    if write.row(taken).await?.is_some() {
        return Err(ChangeError::KeyExists);
    }
    let insert = sqlx::query(
        "INSERT INTO keys (id, api_id, workspace_id, hash, start, name, meta, enabled, expires, created_at_m)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )
    .bind(key.id.as_str())
    .bind(key.api_id.as_str())
    .bind(actor.workspace_id.as_str())
    .bind(&key.hash.0[..])
    .bind(&key.start)
    .bind(key.name.as_deref())
    .bind(key.meta.as_deref())
    .bind(key.enabled)
    .bind(key.expires_at.map(StoreTime::as_millis))
    .bind(now().as_millis());
    write.run(insert).await?;
    let description = format!("Created key {} in API {}", key.id, key.api_id);
    let targets = [("key", key.id.as_str()), ("api", key.api_id.as_str())];
    Ok(audit(write, actor, "key.create", &description, &targets).await?)
}

pub(super) async fn delete_key(
    write: &mut Write,
    actor: &Actor,
    key: &KeyId,
    mode: DeleteMode,
    authorize: Authorize<'_>,
) -> Result<(), ChangeError> {
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
    if !authorize(&api) {
        return Err(ChangeError::Forbidden { api });
    }
    let (delete, done) = match mode {
        DeleteMode::Soft => {
            let mark = sqlx::query("UPDATE keys SET deleted_at_m = ?2 WHERE id = ?1").bind(key.as_str());
            (mark.bind(now().as_millis()), "Deleted")
        }
        DeleteMode::Permanent => {
            let erase = sqlx::query("DELETE FROM keys WHERE id = ?1").bind(key.as_str());
            (erase, "Permanently deleted")
        }
    };
    write.run(delete).await?;
    let description = format!("{done} key {key}");
    Ok(audit(write, actor, "key.delete", &description, &[("key", key.as_str())]).await?)
}

pub(super) async fn delete_api(write: &mut Write, actor: &Actor, api: &ApiId) -> Result<(), ChangeError> {
    let protected = live_api(write, actor, api).await?;
    if protected {
        return Err(ChangeError::Protected);
    }
    let mark = sqlx::query("UPDATE apis SET deleted_at_m = ?2 WHERE id = ?1").bind(api.as_str());
    write.run(mark.bind(now().as_millis())).await?;
    let description = format!("Deleted API {api}");
    Ok(audit(write, actor, "api.delete", &description, &[("api", api.as_str())]).await?)
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

/// Writes the audit record. `targets` are (type, id): ids only, because the record outlives a permanent
/// deletion, and a name might say more than may remain.
async fn audit(
    write: &mut Write,
    actor: &Actor,
    event: &'static str,
    description: &str,
    targets: &[(&str, &str)],
) -> Result<(), StoreError> {
    let targets: Vec<Value> =
        targets.iter().map(|(kind, id)| json!({ "type": kind, "id": id, "name": id })).collect();
    let insert = sqlx::query(
        "INSERT INTO audit_log (time, workspace_id, event, description, actor_type, actor_id, actor_name,
                                remote_ip, user_agent, targets, correlation_id)
         VALUES (?1, ?2, ?3, ?4, 'rootkey', ?5,
                 coalesce((SELECT name FROM root_keys WHERE id = ?5), 'root key'),
                 ?6, substr(?7, 1, 1024), ?8, ?9)",
    )
    .bind(now().as_millis())
    .bind(actor.workspace_id.as_str())
    .bind(event)
    .bind(description)
    .bind(actor.root_key_id.as_str())
    .bind(actor.remote_ip.as_deref())
    .bind(actor.user_agent.as_deref())
    .bind(Value::from(targets).to_string())
    .bind(&actor.request_id);
    write.run(insert).await?;
    Ok(())
}
