//! Endpoints about APIs, and about the keys of one.

use evictd_core::ids::{ApiId, KeyId};
use evictd_ops::http::{Reply, StatusCode, reply};
use evictd_store::change::NewApi;
use evictd_store::record;
use evictd_wire::api::envelope::Page;
use evictd_wire::api::error::{ApiError, JSON};
use evictd_wire::api::ids;
use evictd_wire::api::requests::{CreateApi, DeleteApi, GetApi, ListKeys};
use evictd_wire::api::responses::{CreateApiData, Empty, GetApiData, KeyResponseData};

use super::caller::Caller;
use super::keys::response;
use super::{ChangedIds, CommittedChange, api_not_found};

pub(super) async fn create(
    caller: &Caller<'_>,
    request: CreateApi,
) -> Result<CommittedChange<CreateApiData>, ApiError> {
    caller.require("*", "create_api")?;
    let id = ApiId::new(ids::new_id(ids::API));
    let api = NewApi { id: id.clone(), name: request.name };
    caller
        .changes()
        .create_api(&caller.actor(), api)
        .await
        .map_err(|error| caller.api.change_failed(&error))?;
    Ok(CommittedChange { data: CreateApiData { api_id: id.to_string() }, target: ChangedIds::api(&id) })
}

/// Permission comes before existence: a caller that may not read an API learns nothing about it.
pub(super) async fn get(caller: &Caller<'_>, request: GetApi) -> Result<Reply, ApiError> {
    caller.require(&request.api_id, "read_api")?;
    let id = ApiId::new(request.api_id);
    let api = caller.records().api(&caller.root.workspace_id, &id).await;
    let api = api.map_err(|error| caller.api.store_failed(&error))?.ok_or_else(api_not_found)?;
    Ok(caller.call.success(GetApiData { id: api.id.to_string(), name: api.name }))
}

/// Permission comes before existence here, too.
pub(super) async fn delete(
    caller: &Caller<'_>,
    request: DeleteApi,
) -> Result<CommittedChange<Empty>, ApiError> {
    caller.require(&request.api_id, "delete_api")?;
    let api = ApiId::new(request.api_id);
    let deleted = caller.changes().delete_api(&caller.actor(), &api).await;
    deleted.map_err(|error| caller.api.refused(error, "delete_api"))?;
    Ok(CommittedChange { data: Empty {}, target: ChangedIds::api(&api) })
}

/// Requires two rights. To a caller that lacks one, the API doesn't exist. Neither does one whose id no store can hold.
pub(super) async fn list_keys(caller: &Caller<'_>, request: ListKeys) -> Result<Reply, ApiError> {
    if request.api_id.contains('\0') {
        return Err(api_not_found());
    }
    for action in ["read_key", "read_api"] {
        caller.require(&request.api_id, action).map_err(|_| api_not_found())?;
    }
    let api_id = ApiId::new(request.api_id);
    // As for Unkey, an empty cursor is none.
    let from = request.cursor.filter(|cursor| !cursor.is_empty()).map(KeyId::new);
    if let Some(cursor) = &from
        && !is_cursor(caller, &api_id, cursor).await?
    {
        return Err(ListKeys::unreadable_cursor());
    }
    let list =
        record::KeyQuery { api_id, external_id: request.external_id, from, limit: request.limit.into() };
    let workspace = &caller.root.workspace_id;
    let page = caller.records().list_keys(workspace, list).await;
    let page = page.map_err(|error| caller.api.store_failed(&error))?.ok_or_else(api_not_found)?;
    let keys: Vec<KeyResponseData> = page.keys.into_iter().map(|key| response(workspace, key)).collect();
    let next = page.next.map(|next| next.to_string());
    let page = Page::new(caller.call.request_id.as_str(), keys, next);
    Ok(reply(StatusCode::OK, JSON, page.to_bytes().into()))
}

/// Whether a page of this API's keys can have had this cursor, which is the id of a key. The key may have been erased
/// since, so the form of an id is enough. Direct SQL can store ids of other forms; such a key must exist.
async fn is_cursor(caller: &Caller<'_>, api: &ApiId, cursor: &KeyId) -> Result<bool, ApiError> {
    if ids::is_id(ids::KEY, cursor.as_str()) {
        return Ok(true);
    }
    let key = caller.records().key(&caller.root.workspace_id, cursor).await;
    let key = key.map_err(|error| caller.api.store_failed(&error))?;
    Ok(key.is_some_and(|key| key.api_id == *api))
}
