//! Endpoints about single keys.

use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::time::StoreTime;
use evictd_ops::http::Reply;
use evictd_store::change::{DeleteMode, Edit, KeyUpdate, NewKey, Reroll};
use evictd_store::record::KeyDetails;
use evictd_wire::api::error::ApiError;
use evictd_wire::api::ids;
use evictd_wire::api::requests::{CreateKey, DeleteKey, GetKey, Patch, RerollKey, UpdateKey};
use evictd_wire::api::responses::{
    CreateKeyData, Empty, IdentityData, KeyResponseData, RerollKeyData, reported_expiry, reported_meta,
};
use serde_json::value::RawValue;

use super::caller::Caller;
use super::{ChangedIds, CommittedChange, api_not_found, key_not_found};

/// To a caller that may not create keys in an API, it doesn't exist.
pub(super) async fn create(
    caller: &Caller<'_>,
    request: CreateKey,
) -> Result<CommittedChange<CreateKeyData>, ApiError> {
    caller.require(&request.api_id, "create_key").map_err(|_| api_not_found())?;
    let (key, start) = ids::new_key(request.prefix.as_deref(), request.byte_length.into());
    let id = KeyId::new(ids::new_id(ids::KEY));
    let api_id = ApiId::new(request.api_id);
    let target = ChangedIds { key: Some(id.to_string()), ..ChangedIds::api(&api_id) };
    let new = NewKey {
        id: id.clone(),
        api_id,
        hash: ids::hash(key.expose()),
        start,
        name: request.name,
        meta: request.meta.map(text),
        external_id: request.external_id,
        permissions: request.permissions,
        enabled: request.enabled,
        expires_at: request.expires.map(StoreTime::from_millis),
    };
    let created = caller.changes().create_key(&caller.actor(), new).await;
    created.map_err(|error| caller.api.refused(error, "create_key"))?;
    Ok(CommittedChange { data: CreateKeyData { key_id: id.to_string(), key }, target })
}

/// Existence comes before permission.
pub(super) async fn get(caller: &Caller<'_>, request: GetKey) -> Result<Reply, ApiError> {
    let key = live(caller, &KeyId::new(request.key_id)).await?;
    caller.require(key.api_id.as_str(), "read_key")?;
    Ok(caller.call.success(response(&caller.root.workspace_id, key)))
}

/// Existence comes before permission; both are checked inside the store's transaction.
pub(super) async fn update(
    caller: &Caller<'_>,
    request: UpdateKey,
) -> Result<CommittedChange<Empty>, ApiError> {
    let id = KeyId::new(request.key_id);
    let update = KeyUpdate {
        name: edit(request.name),
        meta: edit(request.meta.map(text)),
        external_id: edit(request.external_id),
        expires_at: edit(request.expires.map(StoreTime::from_millis)),
        enabled: request.enabled,
        permissions: request.permissions,
    };
    let authorize = |api: &ApiId| caller.root.allows(api.as_str(), "update_key");
    let updated = caller.changes().update_key(&caller.actor(), &id, update, &authorize).await;
    updated.map_err(|error| caller.api.refused(error, "update_key"))?;
    Ok(CommittedChange { data: Empty {}, target: ChangedIds::key(&id) })
}

/// Requires the right to create keys, and no other: the old key expires by itself.
///
/// The new key's form is read from the old one before. Whether that still exists is checked again in the transaction.
pub(super) async fn reroll(
    caller: &Caller<'_>,
    request: RerollKey,
) -> Result<CommittedChange<RerollKeyData>, ApiError> {
    const CREATE: &str = "create_key";
    let grace = request.grace();
    let old = live(caller, &KeyId::new(request.key_id)).await?;
    caller.require(old.api_id.as_str(), CREATE)?;
    let (key, start) = ids::new_key(prefix(&old.start), CreateKey::DEFAULT_BYTE_LENGTH.into());
    let new_id = KeyId::new(ids::new_id(ids::KEY));
    let target = ChangedIds { new_key: Some(new_id.to_string()), ..ChangedIds::key(&old.id) };
    let reroll = Reroll { key: old.id, grace, new_id: new_id.clone(), hash: ids::hash(key.expose()), start };
    let authorize = |api: &ApiId| caller.root.allows(api.as_str(), CREATE);
    let rerolled = caller.changes().reroll_key(&caller.actor(), reroll, &authorize).await;
    rerolled.map_err(|error| caller.api.refused(error, CREATE))?;
    Ok(CommittedChange { data: CreateKeyData { key_id: new_id.to_string(), key }, target })
}

/// Existence comes before permission; both are checked inside the store's transaction.
pub(super) async fn delete(
    caller: &Caller<'_>,
    request: DeleteKey,
) -> Result<CommittedChange<Empty>, ApiError> {
    let mode = if request.permanent { DeleteMode::Permanent } else { DeleteMode::Soft };
    let id = KeyId::new(request.key_id);
    let authorize = |api: &ApiId| caller.root.allows(api.as_str(), "delete_key");
    let deleted = caller.changes().delete_key(&caller.actor(), &id, mode, &authorize).await;
    deleted.map_err(|error| caller.api.refused(error, "delete_key"))?;
    Ok(CommittedChange { data: Empty {}, target: ChangedIds::key(&id) })
}

/// Returns the caller's live key with this id.
async fn live(caller: &Caller<'_>, id: &KeyId) -> Result<KeyDetails, ApiError> {
    let key = caller.records().key(&caller.root.workspace_id, id).await;
    key.map_err(|error| caller.api.store_failed(&error))?.ok_or_else(key_not_found)
}

/// Returns a key as it is shown.
pub(super) fn response(workspace: &WorkspaceId, key: KeyDetails) -> KeyResponseData {
    KeyResponseData {
        key_id: key.id.to_string(),
        start: key.start,
        enabled: key.enabled,
        created_at: key.created_at.as_millis(),
        name: key.name,
        meta: key.meta.as_deref().and_then(reported_meta).map(ToOwned::to_owned),
        updated_at: key.updated_at.map(StoreTime::as_millis),
        expires: reported_expiry(key.expires_at),
        permissions: key.permissions,
        identity: key.external_id.map(|external_id| IdentityData::new(workspace, external_id)),
    }
}

/// Returns the part before the last underscore of a key's start: base58 has none.
fn prefix(start: &str) -> Option<&str> {
    start.rsplit_once('_').map(|(prefix, _)| prefix)
}

fn text(json: Box<RawValue>) -> String {
    Box::<str>::from(json).into()
}

fn edit<T>(patch: Patch<T>) -> Edit<T> {
    match patch {
        Patch::Keep => Edit::Keep,
        Patch::Clear => Edit::Clear,
        Patch::Set(value) => Edit::Set(value),
    }
}
