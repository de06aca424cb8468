//! The control API: five endpoints in Unkey's form.
//!
//! Each checks header and body first (400), then the root key (401, 403), then does its work. A change
//! that is answered with success is durable, and its log row with it (G3).

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_core::ids::{ApiId, KeyId};
use evictd_core::record::RootKeyRecord;
use evictd_core::time::StoreTime;
use evictd_ops::http::{Handler, Reply, Request};
use evictd_ops::rpc::{self, Call};
use evictd_store::HomeStore;
use evictd_store::change::{Actor, ChangeError, DeleteMode, NewApi, NewKey};
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::ids;
use evictd_wire::api::requests::{CreateApi, CreateKey, DeleteApi, DeleteKey, GetKey};
use evictd_wire::api::responses::{CreateApiData, CreateKeyData, Empty, GetKeyData};
use hyper::header::USER_AGENT;

use crate::auth::{authenticate, missing, require, store_failed};
use crate::metrics::{Endpoint, Metrics};
use crate::sequencer::Wake;

/// Largest body. The largest valid one, metadata with every character escaped, is a tenth of it.
pub(crate) const BODY_BYTES_MAX: usize = 1024 * 1024;

/// The control API.
#[derive(Clone)]
pub(crate) struct Surface {
    store: Arc<dyn HomeStore>,
    wake: Wake,
    metrics: Arc<Metrics>,
}

impl Surface {
    pub(crate) fn new(store: Arc<dyn HomeStore>, wake: Wake, metrics: Arc<Metrics>) -> Self {
        Self { store, wake, metrics }
    }

    async fn call(&self, endpoint: Endpoint, call: &Call, remote: SocketAddr) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::CreateApi => {
                let request = call.request(CreateApi::parse)?;
                let root = self.authenticate(call).await?;
                self.create_api(&root, &actor(call, &root, remote), request)
                    .await
                    .map(|data| call.success(data))
            }
            Endpoint::DeleteApi => {
                let request = call.request(DeleteApi::parse)?;
                let root = self.authenticate(call).await?;
                self.delete_api(&root, &actor(call, &root, remote), request)
                    .await
                    .map(|data| call.success(data))
            }
            Endpoint::CreateKey => {
                let request = call.request(CreateKey::parse)?;
                let root = self.authenticate(call).await?;
                self.create_key(&root, &actor(call, &root, remote), request)
                    .await
                    .map(|data| call.success(data))
            }
            Endpoint::GetKey => {
                let request = call.request(GetKey::parse)?;
                let root = self.authenticate(call).await?;
                self.get_key(&root, request).await.map(|data| call.success(data))
            }
            Endpoint::DeleteKey => {
                let request = call.request(DeleteKey::parse)?;
                let root = self.authenticate(call).await?;
                self.delete_key(&root, &actor(call, &root, remote), request)
                    .await
                    .map(|data| call.success(data))
            }
        }
    }

    async fn authenticate(&self, call: &Call) -> Result<RootKeyRecord, ApiError> {
        authenticate(&*self.store, call.token()?).await
    }

    async fn create_api(
        &self,
        root: &RootKeyRecord,
        actor: &Actor,
        request: CreateApi,
    ) -> Result<CreateApiData, ApiError> {
        require(root, "*", "create_api")?;
        let id = ApiId::new(ids::new_id(ids::API));
        let api = NewApi { id: id.clone(), name: request.name };
        self.store.create_api(actor, api).await.map_err(|error| store_failed(&error))?;
        Ok(CreateApiData { api_id: id.to_string() })
    }

    /// Permission comes before existence here: who may not delete an API learns nothing about it.
    async fn delete_api(
        &self,
        root: &RootKeyRecord,
        actor: &Actor,
        request: DeleteApi,
    ) -> Result<Empty, ApiError> {
        require(root, &request.api_id, "delete_api")?;
        let api = ApiId::new(request.api_id);
        self.store.delete_api(actor, &api).await.map_err(|error| refused(error, "delete_api"))?;
        self.wake.now();
        Ok(Empty {})
    }

    /// Who may not create keys in an API is told that it doesn't exist.
    async fn create_key(
        &self,
        root: &RootKeyRecord,
        actor: &Actor,
        request: CreateKey,
    ) -> Result<CreateKeyData, ApiError> {
        require(root, &request.api_id, "create_key").map_err(|_| api_not_found())?;
        let (key, start) = ids::new_key(request.prefix.as_deref(), request.byte_length.into());
        let id = KeyId::new(ids::new_id(ids::KEY));
        let new = NewKey {
            id: id.clone(),
            api_id: ApiId::new(request.api_id),
            hash: ids::hash(key.expose()),
            start,
            name: request.name,
            meta: request.meta.map(|meta| meta.get().to_owned()),
            enabled: request.enabled,
            expires_at: request.expires.map(StoreTime::from_millis),
        };
        self.store.create_key(actor, new).await.map_err(|error| refused(error, "create_key"))?;
        self.wake.now();
        Ok(CreateKeyData { key_id: id.to_string(), key })
    }

    async fn get_key(&self, root: &RootKeyRecord, request: GetKey) -> Result<GetKeyData, ApiError> {
        let id = KeyId::new(request.key_id);
        let key = self.store.key(&root.workspace_id, &id).await.map_err(|error| store_failed(&error))?;
        let key = key.ok_or_else(key_not_found)?;
        require(root, key.api_id.as_str(), "read_key")?;
        Ok(GetKeyData {
            key_id: key.id.to_string(),
            start: key.start,
            enabled: key.enabled,
            created_at: key.created_at.as_millis(),
            name: key.name,
            meta: key.meta.and_then(|meta| serde_json::value::RawValue::from_string(meta).ok()),
            updated_at: key.updated_at.map(StoreTime::as_millis),
            expires: key.expires_at.map(StoreTime::as_millis),
        })
    }

    /// Existence comes before permission here; both are judged inside the store's transaction.
    async fn delete_key(
        &self,
        root: &RootKeyRecord,
        actor: &Actor,
        request: DeleteKey,
    ) -> Result<Empty, ApiError> {
        let mode = if request.permanent { DeleteMode::Permanent } else { DeleteMode::Soft };
        let id = KeyId::new(request.key_id);
        let authorize = |api: &ApiId| root.allows(api.as_str(), "delete_key");
        let deleted = self.store.delete_key(actor, &id, mode, &authorize).await;
        deleted.map_err(|error| refused(error, "delete_key"))?;
        self.wake.now();
        Ok(Empty {})
    }
}

impl Handler for Surface {
    async fn handle(&self, request: Request) -> Reply {
        let Some(endpoint) = Endpoint::of(request.parts.uri.path()) else {
            return rpc::not_found();
        };
        let remote = request.remote;
        let reply = match Call::read(request).await {
            Ok(call) => {
                let answered = self.call(endpoint, &call, remote).await;
                answered.unwrap_or_else(|error| call.failure(&error))
            }
            Err(reply) => reply,
        };
        self.metrics.answered(endpoint, reply.status());
        reply
    }
}

fn actor(call: &Call, root: &RootKeyRecord, remote: SocketAddr) -> Actor {
    let header = |name: &str| call.headers.get(name).and_then(|value| value.to_str().ok());
    let forwarded = header("x-forwarded-for")
        .and_then(|list| list.split(',').map(str::trim).find(|address| !address.is_empty()));
    Actor {
        root_key_id: root.root_key_id.clone(),
        workspace_id: root.workspace_id.clone(),
        request_id: call.request_id.clone(),
        // As claimed by whoever forwarded it; addresses are short.
        remote_ip: Some(
            forwarded.map_or_else(|| remote.ip().to_string(), |ip| ip.chars().take(64).collect()),
        ),
        user_agent: header(USER_AGENT.as_str()).map(str::to_owned),
    }
}

fn refused(error: ChangeError, action: &str) -> ApiError {
    match error {
        ChangeError::KeyNotFound => key_not_found(),
        ChangeError::ApiNotFound => api_not_found(),
        ChangeError::Protected => {
            ApiError::new(ErrorKind::ProtectedResource, "The API is protected from deletion; lift that first")
        }
        ChangeError::KeyExists => {
            ApiError::new(ErrorKind::KeyAlreadyExists, "A key with the same text exists already")
        }
        ChangeError::Forbidden { api } => missing(api.as_str(), action),
        ChangeError::Store(error) => store_failed(&error),
    }
}

fn key_not_found() -> ApiError {
    ApiError::new(ErrorKind::KeyNotFound, "The key doesn't exist or was deleted")
}

fn api_not_found() -> ApiError {
    ApiError::new(ErrorKind::ApiNotFound, "The API doesn't exist or was deleted")
}

#[cfg(test)]
mod tests;
