//! The control API: five endpoints in Unkey's form, and what became of a request.
//!
//! Each checks header and body first (400), then the root key (401, 403), then does its work. A change
//! that is answered with success is durable, and its log row with it (G3).

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_core::ids::{ApiId, KeyId};
use evictd_core::record::RootKeyRecord;
use evictd_core::time::StoreTime;
use evictd_ops::http::{Handler, Reply, Request, StatusCode, reply};
use evictd_ops::rpc::{self, Call};
use evictd_store::HomeStore;
use evictd_store::change::{Actor, ChangeError, DeleteMode, NewApi, NewKey};
use evictd_wire::api::envelope::Success;
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::requests::{CreateApi, CreateKey, DeleteApi, DeleteKey, GetKey, GetReceipt};
use evictd_wire::api::responses::{CreateApiData, CreateKeyData, Empty, GetKeyData};
use evictd_wire::api::{ids, prefer};
use hyper::header::{HeaderValue, USER_AGENT};
use serde::Serialize;

use crate::auth::{authenticate, missing, require, store_failed};
use crate::metrics::{Endpoint, Metrics};
use crate::receipts::{Receipts, Told};
use crate::sequencer::Wake;

/// Largest body. The largest valid one, metadata with every character escaped, is a tenth of it.
pub(crate) const BODY_BYTES_MAX: usize = 1024 * 1024;

/// The control API.
#[derive(Clone)]
pub(crate) struct Surface {
    store: Arc<dyn HomeStore>,
    receipts: Arc<Receipts>,
    wake: Wake,
    metrics: Arc<Metrics>,
}

impl Surface {
    pub(crate) fn new(
        store: Arc<dyn HomeStore>,
        receipts: Arc<Receipts>,
        wake: Wake,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { store, receipts, wake, metrics }
    }

    async fn call(&self, endpoint: Endpoint, call: &Call, remote: SocketAddr) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::CreateApi => {
                let request = call.request(CreateApi::parse)?;
                let root = self.authenticate(call).await?;
                self.change(
                    endpoint,
                    call,
                    &root,
                    self.create_api(&root, &actor(call, &root, remote), request),
                )
                .await
            }
            Endpoint::DeleteApi => {
                let request = call.request(DeleteApi::parse)?;
                let root = self.authenticate(call).await?;
                self.change(
                    endpoint,
                    call,
                    &root,
                    self.delete_api(&root, &actor(call, &root, remote), request),
                )
                .await
            }
            Endpoint::CreateKey => {
                let request = call.request(CreateKey::parse)?;
                let root = self.authenticate(call).await?;
                self.change(
                    endpoint,
                    call,
                    &root,
                    self.create_key(&root, &actor(call, &root, remote), request),
                )
                .await
            }
            Endpoint::GetKey => {
                let request = call.request(GetKey::parse)?;
                let root = self.authenticate(call).await?;
                self.get_key(&root, request).await.map(|data| call.success(data))
            }
            Endpoint::DeleteKey => {
                let request = call.request(DeleteKey::parse)?;
                let root = self.authenticate(call).await?;
                self.change(
                    endpoint,
                    call,
                    &root,
                    self.delete_key(&root, &actor(call, &root, remote), request),
                )
                .await
            }
            Endpoint::GetReceipt => {
                let request = call.request(GetReceipt::parse)?;
                let root = self.authenticate(call).await?;
                match self.get_receipt(&root, &request).await? {
                    Told::Here(propagation) => Ok(call.success(propagation)),
                    Told::Recorded(body) => Ok(call.success(body)),
                }
            }
        }
    }

    /// Carries out a change, and waits for its receipt if the caller prefers that. Once the change is committed,
    /// nothing that happens to the wait makes the answer a failure.
    async fn change<T: Serialize>(
        &self,
        endpoint: Endpoint,
        call: &Call,
        root: &RootKeyRecord,
        change: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<Reply, ApiError> {
        let preferences = call.headers.get_all(prefer::PREFER).iter().map(HeaderValue::as_bytes);
        let wait = prefer::wait(preferences);
        let under = self.receipts.under(&call.request_id, wait.is_some());
        let data = match change.await {
            Ok(data) => data,
            Err(error) => {
                under.refused(&error);
                return Err(error);
            }
        };
        self.wake.now();
        let Some(limit) = wait else { return Ok(call.success(data)) };
        let propagation = match endpoint {
            // No agent knows of an API before it has a key.
            Endpoint::CreateApi => under.without_effect(),
            _ => under.settled(&root.workspace_id, limit).await,
        };
        let mut success = Success::new(call.request_id.as_str(), data);
        success.meta.propagation = Some(Box::new(propagation));
        let mut reply = reply(StatusCode::OK, JSON, success.to_bytes().into());
        if let Ok(applied) = HeaderValue::from_str(&prefer::applied(limit)) {
            reply.headers_mut().insert(prefer::PREFERENCE_APPLIED, applied);
        }
        Ok(reply)
    }

    /// Whoever may act for the workspace may know what became of its requests: a receipt has ids only.
    async fn get_receipt(&self, root: &RootKeyRecord, request: &GetReceipt) -> Result<Told, ApiError> {
        let told = self.receipts.tell(&root.workspace_id, &request.request_id).await;
        told.map_err(|error| store_failed(&error))?.ok_or_else(|| {
            ApiError::new(
                ErrorKind::ReceiptNotFound,
                "This workspace has carried out no request with this id",
            )
        })
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
