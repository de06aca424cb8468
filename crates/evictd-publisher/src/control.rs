//! The control API: Unkey's endpoints for keys and APIs, and what became of a request.
//!
//! Each checks headers and body first (400), then the root key (401, 403) and how much its workspace asks for
//! (429), then does its work. A change that is answered with success is durable, and its log row with it (G3).
//!
//! * [`caller`]: who asks, and what they may do.
//! * [`apis`], [`keys`], [`verify`], [`propagation`]: the endpoints.

mod apis;
mod caller;
mod keys;
mod propagation;
mod verify;

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_core::limits::{META_BYTES_MAX, PERMISSION_BYTES_MAX, PERMISSIONS_MAX};
use evictd_ops::clock;
use evictd_ops::http::{Handler, Method, Reply, Request, StatusCode, reply};
use evictd_ops::rpc::{self, Call};
use evictd_store::change::ChangeError;
use evictd_store::{HomeStore, StoreError};
use evictd_wire::api::envelope::Success;
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::prefer;
use evictd_wire::api::requests::{
    CreateApi, CreateKey, DeleteApi, DeleteKey, Endpoint, GetApi, GetKey, GetReceipt, ListKeys, RerollKey,
    UpdateKey, VerifyKey,
};
use evictd_wire::api::responses::LivenessData;
use hyper::header::HeaderValue;
use serde::Serialize;

use self::caller::Caller;
use crate::auth::{authenticate, missing, unavailable};
use crate::metrics::Metrics;
use crate::rate_limit::{Admission, RateLimits};
use crate::receipts::Receipts;
use crate::rounds::Vouched;
use crate::sequencer::Wake;

/// Largest body. Every valid request fits, even if each of its characters were escaped.
pub(crate) const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A character as `\u0041`.
const ESCAPED_BYTES: usize = 6;

const _: () = assert!(
    PERMISSIONS_MAX * (PERMISSION_BYTES_MAX * ESCAPED_BYTES + "\"\",".len()) + META_BYTES_MAX + 64 * 1024
        < BODY_BYTES_MAX
);

/// The control API.
#[derive(Clone)]
pub(crate) struct Surface {
    store: Arc<dyn HomeStore>,
    receipts: Arc<Receipts>,
    limits: Arc<RateLimits>,
    wake: Wake,
    vouched: Vouched,
    metrics: Arc<Metrics>,
}

/// A call, and what its answer's headers will tell.
struct Visit<'a> {
    endpoint: Endpoint,
    call: &'a Call,
    remote: SocketAddr,
    admission: Admission,
}

impl Surface {
    pub(crate) fn new(
        store: Arc<dyn HomeStore>,
        receipts: Arc<Receipts>,
        limits: RateLimits,
        wake: Wake,
        vouched: Vouched,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { store, receipts, limits: Arc::new(limits), wake, vouched, metrics }
    }

    async fn answer(&self, visit: &mut Visit<'_>) -> Result<Reply, ApiError> {
        match visit.endpoint {
            Endpoint::CreateApi => self.change(visit, CreateApi::parse, apis::create).await,
            Endpoint::GetApi => self.ask(visit, GetApi::parse, apis::get).await,
            Endpoint::DeleteApi => self.change(visit, DeleteApi::parse, apis::delete).await,
            Endpoint::ListKeys => self.ask(visit, ListKeys::parse, apis::list_keys).await,
            Endpoint::CreateKey => self.change(visit, CreateKey::parse, keys::create).await,
            Endpoint::GetKey => self.ask(visit, GetKey::parse, keys::get).await,
            Endpoint::UpdateKey => self.change(visit, UpdateKey::parse, keys::update).await,
            Endpoint::RerollKey => self.change(visit, RerollKey::parse, keys::reroll).await,
            Endpoint::DeleteKey => self.change(visit, DeleteKey::parse, keys::delete).await,
            Endpoint::VerifyKey => self.ask(visit, VerifyKey::parse, verify::verify).await,
            Endpoint::GetReceipt => self.ask(visit, GetReceipt::parse, propagation::get_receipt).await,
            Endpoint::Liveness => Ok(visit.call.success(LivenessData::ALIVE)),
        }
    }

    /// What comes before the work of every endpoint: its body is read, and who asks is found out.
    async fn admit<'a, 'c: 'a, R>(
        &'a self,
        visit: &mut Visit<'c>,
        parse: impl FnOnce(&'c [u8]) -> Result<R, ApiError>,
    ) -> Result<(Caller<'a>, R), ApiError> {
        let Visit { call, remote, .. } = *visit;
        let request = call.request(parse)?;
        let root = authenticate(&*self.store, &self.metrics, call.token()?).await?;
        visit.admission = self.limits.admit(&root.workspace_id, clock::lease_now());
        if let Some(limit) = visit.admission.refused_by() {
            return Err(too_many(limit));
        }
        Ok((Caller { surface: self, call, root, remote }, request))
    }

    /// Answers a question.
    async fn ask<'c, R>(
        &self,
        visit: &mut Visit<'c>,
        parse: impl FnOnce(&'c [u8]) -> Result<R, ApiError>,
        answer: impl AsyncFnOnce(&Caller<'_>, R) -> Result<Reply, ApiError>,
    ) -> Result<Reply, ApiError> {
        let (caller, request) = self.admit(visit, parse).await?;
        answer(&caller, request).await
    }

    /// Carries out a change, and waits for its receipt if the caller prefers that. Once the change is
    /// committed, nothing that happens to the wait makes the answer a failure.
    async fn change<'c, R, T: Serialize>(
        &self,
        visit: &mut Visit<'c>,
        parse: impl FnOnce(&'c [u8]) -> Result<R, ApiError>,
        change: impl AsyncFnOnce(&Caller<'_>, R) -> Result<T, ApiError>,
    ) -> Result<Reply, ApiError> {
        let (caller, request) = self.admit(visit, parse).await?;
        if let Some(reason) = self.vouched.vouching.refusal() {
            // Agents follow another store: what is changed in this one wouldn't reach them.
            return Err(ApiError::new(ErrorKind::Stale, format!("Nothing was changed: {reason}")));
        }
        let call = caller.call;
        let wait = prefer::wait(call.headers.get_all(prefer::PREFER).iter().map(HeaderValue::as_bytes));
        let under = self.receipts.under(&call.request_id, wait.is_some());
        let data = match change(&caller, request).await {
            Ok(data) => data,
            Err(error) => {
                under.refused(&error);
                return Err(error);
            }
        };
        self.wake.now();
        let Some(limit) = wait else { return Ok(call.success(data)) };
        let propagation = match visit.endpoint {
            // No agent knows of an API before it has a key.
            Endpoint::CreateApi => under.without_effect(),
            _ => under.settled(&caller.root.workspace_id, limit).await,
        };
        let mut success = Success::new(call.request_id.as_str(), data);
        success.meta.propagation = Some(Box::new(propagation));
        let mut reply = reply(StatusCode::OK, JSON, success.to_bytes().into());
        if let Ok(applied) = HeaderValue::from_str(&prefer::applied(limit)) {
            reply.headers_mut().insert(prefer::PREFERENCE_APPLIED, applied);
        }
        Ok(reply)
    }

    /// A refused change as the client sees it.
    fn refused(&self, error: ChangeError, action: &str) -> ApiError {
        match error {
            ChangeError::KeyNotFound => key_not_found(),
            ChangeError::ApiNotFound => api_not_found(),
            ChangeError::Protected => ApiError::new(
                ErrorKind::ProtectedResource,
                "The API is protected from deletion; lift that first",
            ),
            ChangeError::KeyExists => {
                ApiError::new(ErrorKind::KeyAlreadyExists, "A key with the same text exists already")
            }
            ChangeError::Forbidden { api } => missing(api.as_str(), action),
            ChangeError::Store(error) => self.store_failed(&error),
        }
    }

    /// Takes note of a store failure, and has it answered.
    fn store_failed(&self, error: &StoreError) -> ApiError {
        self.metrics.store_failed(error);
        if matches!(error, StoreError::Unlogged { .. }) {
            self.wake.unlogged();
        }
        unavailable(error)
    }
}

impl Handler for Surface {
    async fn handle(&self, request: Request) -> Reply {
        let Some(endpoint) = Endpoint::of(request.parts.uri.path()) else {
            return rpc::not_found();
        };
        let remote = request.remote;
        let reply = match read(endpoint, request).await {
            Ok(call) => {
                let mut visit = Visit { endpoint, call: &call, remote, admission: Admission::Unlimited };
                let answered = self.answer(&mut visit).await;
                let mut reply = answered.unwrap_or_else(|error| call.failure(&error));
                visit.admission.tell(reply.headers_mut());
                reply
            }
            Err(reply) => reply,
        };
        self.metrics.answered(endpoint, reply.status());
        reply
    }
}

/// Reads a call. All but one are a POST with a body.
async fn read(endpoint: Endpoint, request: Request) -> Result<Call, Reply> {
    if endpoint != Endpoint::Liveness {
        return Call::read(request).await;
    }
    match request.parts.method {
        Method::GET | Method::HEAD => Ok(Call::without_body(request)),
        _ => Err(rpc::not_allowed("GET, HEAD")),
    }
}

fn key_not_found() -> ApiError {
    ApiError::new(ErrorKind::KeyNotFound, "The key doesn't exist or was deleted")
}

fn api_not_found() -> ApiError {
    ApiError::new(ErrorKind::ApiNotFound, "The API doesn't exist or was deleted")
}

fn too_many(limit: u32) -> ApiError {
    let detail = format!("The workspace exceeded its API rate limit of {limit}/1m0s");
    ApiError::new(ErrorKind::WorkspaceRateLimited, detail)
}

#[cfg(test)]
mod tests;
