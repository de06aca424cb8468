//! The control API: Unkey's endpoints for keys and APIs, and the receipts of requests.
//!
//! Each endpoint checks headers and body first (400), then the root key (401, 403) and its workspace's rate limit (429),
//! then does its work. A change that is answered with success is durable, and its log row with it (G3).
//!
//! * [`caller`]: the root key behind a request, and what it may do; [`origin`]: where the request comes from.
//! * [`turns`]: whose request the store works on next.
//! * [`apis`], [`keys`], [`verify`], [`propagation`]: the endpoints.

mod apis;
mod caller;
mod keys;
mod origin;
mod propagation;
mod turns;
mod verify;

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, OnceLock};

use bytes::Bytes;
use evictd_core::ids::{ApiId, KeyId};
use evictd_core::limits::{META_BYTES_MAX, PERMISSION_BYTES_MAX, PERMISSIONS_MAX};
use evictd_ops::answer_log::{AnswerLog, LoggedAnswer};
use evictd_ops::clock;
use evictd_ops::http::{Handler, Reply, Request, StatusCode, reply};
use evictd_ops::rpc::{self, RpcCall};
use evictd_store::change::ChangeError;
use evictd_store::{Concurrency, HomeStore, StoreError};
use evictd_wire::api::envelope::Success;
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::openapi::{self, ApiKind};
use evictd_wire::api::prefer;
use evictd_wire::api::requests::{
    CreateApi, CreateKey, DeleteApi, DeleteKey, Endpoint, GetApi, GetKey, GetReceipt, ListKeys, RerollKey,
    UpdateKey, VerifyKey,
};
use evictd_wire::api::responses::LivenessData;
use hyper::header::HeaderValue;
use serde::Serialize;

use self::caller::Caller;
use self::turns::{Turns, Urgency};
use crate::auth::{authenticate, missing, unavailable};
use crate::change_trials::ChangeTrials;
use crate::metrics::PublisherMetrics;
use crate::rate_limit::{Admission, RateLimits};
use crate::receipts::Receipts;
use crate::rounds::FreshnessGuard;
use crate::wake::Wake;

pub(crate) use origin::TrustedProxies;

/// What `GET /openapi.yaml` returns.
static OPENAPI: LazyLock<Bytes> =
    LazyLock::new(|| openapi::to_yaml(&openapi::document(ApiKind::Control)).into());

/// The largest body. Every valid request fits, even if each of its characters is escaped.
pub(crate) const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A character as `\u0041`.
const ESCAPED_BYTES: usize = 6;

const _: () = assert!(
    PERMISSIONS_MAX * (PERMISSION_BYTES_MAX * ESCAPED_BYTES + "\"\",".len()) + META_BYTES_MAX + 64 * 1024
        < BODY_BYTES_MAX
);

#[derive(Clone)]
pub(crate) struct ControlApi {
    pub(crate) store: Arc<dyn HomeStore>,
    pub(crate) receipts: Receipts,
    pub(crate) limits: Arc<RateLimits>,
    pub(crate) proxies: TrustedProxies,
    pub(crate) turns: StoreTurns,
    pub(crate) trials: ChangeTrials,
    pub(crate) wake: Wake,
    pub(crate) freshness: FreshnessGuard,
    pub(crate) metrics: Arc<PublisherMetrics>,
    pub(crate) log: Arc<AnswerLog>,
}

/// The turns at the store, of reads and of changes.
#[derive(Clone, Debug)]
pub(crate) struct StoreTurns {
    reads: Turns,
    changes: Turns,
}

impl StoreTurns {
    pub(crate) fn new(concurrency: Concurrency) -> Self {
        Self { reads: Turns::new(concurrency.reads), changes: Turns::new(concurrency.changes) }
    }
}

/// What a change returns to its client, and what it is about.
struct CommittedChange<T> {
    data: T,
    target: ChangedIds,
}

/// The ids in a change's line of the log.
#[derive(Default)]
struct ChangedIds {
    api: Option<String>,
    key: Option<String>,
    /// The key that replaces another.
    new_key: Option<String>,
}

struct RequestContext<'a> {
    endpoint: Endpoint,
    call: &'a RpcCall,
    remote: SocketAddr,
}

/// What a request has come to, and what its workspace may still request.
struct ControlAnswer {
    outcome: Result<Reply, ApiError>,
    admission: Admission,
    root_key_id: Option<KeyId>,
}

impl ControlAnswer {
    /// The answer to a request without an admitted root key.
    fn unlimited(outcome: Result<Reply, ApiError>) -> Self {
        Self { outcome, admission: Admission::Unlimited, root_key_id: None }
    }
}

impl ChangedIds {
    fn api(api: &ApiId) -> Self {
        Self { api: Some(api.to_string()), ..Self::default() }
    }

    fn key(key: &KeyId) -> Self {
        Self { key: Some(key.to_string()), ..Self::default() }
    }
}

impl ControlApi {
    async fn answer(&self, context: &RequestContext<'_>) -> ControlAnswer {
        match context.endpoint {
            Endpoint::CreateApi => self.change(context, CreateApi::parse, apis::create).await,
            Endpoint::GetApi => self.read(context, GetApi::parse, apis::get).await,
            Endpoint::DeleteApi => self.change(context, DeleteApi::parse, apis::delete).await,
            Endpoint::ListKeys => self.read(context, ListKeys::parse, apis::list_keys).await,
            Endpoint::CreateKey => self.change(context, CreateKey::parse, keys::create).await,
            Endpoint::GetKey => self.read(context, GetKey::parse, keys::get).await,
            Endpoint::UpdateKey => self.change(context, UpdateKey::parse, keys::update).await,
            Endpoint::RerollKey => self.change(context, RerollKey::parse, keys::reroll).await,
            Endpoint::DeleteKey => self.change(context, DeleteKey::parse, keys::delete).await,
            Endpoint::VerifyKey => self.read(context, VerifyKey::parse, verify::verify).await,
            Endpoint::GetReceipt => self.read(context, GetReceipt::parse, propagation::get_receipt).await,
            Endpoint::Liveness => ControlAnswer::unlimited(Ok(alive(context.call))),
            Endpoint::OpenApi => ControlAnswer::unlimited(Ok(openapi_document())),
        }
    }

    /// Parses the body, authenticates the caller and admits the request, then has it answered.
    async fn query<'c, R>(
        &self,
        context: &RequestContext<'c>,
        parse: impl FnOnce(&'c [u8]) -> Result<R, ApiError>,
        answer: impl AsyncFnOnce(&Caller<'_>, R) -> Result<Reply, ApiError>,
    ) -> ControlAnswer {
        let RequestContext { call, remote, .. } = *context;
        let checked = async {
            let request = call.request(parse)?;
            Ok((request, authenticate(&*self.store, &self.metrics, call.token()?).await?))
        };
        let (request, root) = match checked.await {
            Ok(checked) => checked,
            Err(error) => return ControlAnswer::unlimited(Err(error)),
        };
        let admission = self.limits.admit(&root.workspace_id, clock::lease_now());
        let root_key_id = Some(root.root_key_id.clone());
        let outcome = match admission.refused_by() {
            Some(limit) => Err(too_many(limit)),
            None => answer(&Caller { api: self, call, root, remote }, request).await,
        };
        ControlAnswer { outcome, admission, root_key_id }
    }

    /// Reads from the store when it is the workspace's turn.
    async fn read<'c, R>(
        &self,
        context: &RequestContext<'c>,
        parse: impl FnOnce(&'c [u8]) -> Result<R, ApiError>,
        read: impl AsyncFnOnce(&Caller<'_>, R) -> Result<Reply, ApiError>,
    ) -> ControlAnswer {
        let answer = async |caller: &Caller<'_>, request: R| {
            let _turn = self.turns.reads.take(&caller.root.workspace_id, Urgency::Other).await;
            read(caller, request).await
        };
        self.query(context, parse, answer).await
    }

    /// Makes a change, and waits for its receipt if the client prefers that. Once the change is committed, the answer is
    /// a success whatever happens to the wait.
    async fn change<'c, R, T: Serialize>(
        &self,
        context: &RequestContext<'c>,
        parse: impl FnOnce(&'c [u8]) -> Result<R, ApiError>,
        change: impl AsyncFnOnce(&Caller<'_>, R) -> Result<CommittedChange<T>, ApiError>,
    ) -> ControlAnswer {
        let answer = async |caller: &Caller<'_>, request: R| {
            if let Some(reason) = self.freshness.vouching.refusal() {
                // Agents follow another store: a change of this one wouldn't reach them.
                return Err(ApiError::new(ErrorKind::TryLater, format!("Nothing was changed: {reason}")));
            }
            let call = caller.call;
            let wait = prefer::wait(call.headers.get_all(prefer::PREFER).iter().map(HeaderValue::as_bytes));
            let pending = self.receipts.begin(&call.request_id, wait.is_some()).await;
            let urgency = match context.endpoint {
                Endpoint::DeleteKey | Endpoint::DeleteApi => Urgency::Deletion,
                _ => Urgency::Other,
            };
            let turn = self.turns.changes.take(&caller.root.workspace_id, urgency).await;
            let changed = change(caller, request).await;
            drop(turn);
            let CommittedChange { data, target } = match changed {
                Ok(committed) => {
                    self.trials.succeeded();
                    committed
                }
                Err(error) => {
                    pending.refused(&error).await;
                    return Err(error);
                }
            };
            self.wake.now();
            caller.log_change(context.endpoint, &target);
            let Some(limit) = wait else { return Ok(call.success(data)) };
            let propagation = match context.endpoint {
                // No agent caches anything of an API before it has a key.
                Endpoint::CreateApi => pending.without_effect().await,
                _ => pending.settled(&caller.root.workspace_id, limit).await,
            };
            let mut success = Success::new(call.request_id.as_str(), data);
            success.meta.propagation = Some(Box::new(propagation));
            let mut reply = reply(StatusCode::OK, JSON, success.to_bytes().into());
            if let Ok(applied) = HeaderValue::from_str(&prefer::applied(limit)) {
                reply.headers_mut().insert(prefer::PREFERENCE_APPLIED, applied);
            }
            Ok(reply)
        };
        self.query(context, parse, answer).await
    }

    /// Returns the error that the client gets for a refused change.
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
            ChangeError::Store(error) => self.change_failed(&error),
        }
    }

    /// As [`Self::store_failed`], of a change.
    fn change_failed(&self, error: &StoreError) -> ApiError {
        self.trials.failed(error);
        self.store_failed(error)
    }

    /// Notes a store failure, and returns the error that the client gets.
    fn store_failed(&self, error: &StoreError) -> ApiError {
        self.metrics.store_failed(error);
        if matches!(error, StoreError::Unlogged { .. }) {
            self.wake.unlogged();
        }
        unavailable(error)
    }
}

/// What answers at the control API's address: the API from when the home store is open, and 503 until then.
#[derive(Clone)]
pub(crate) struct ControlServer {
    pub(crate) api: Arc<OnceLock<ControlApi>>,
    pub(crate) metrics: Arc<PublisherMetrics>,
}

impl Handler for ControlServer {
    async fn handle(&self, request: Request) -> Reply {
        if let Some(api) = self.api.get() {
            return api.handle(request).await;
        }
        let Some(endpoint) = Endpoint::of(request.parts.uri.path()) else {
            return rpc::not_found();
        };
        let reply = read(endpoint, request)
            .await
            .map_or_else(|refusal| refusal, |call| before_the_store_is_open(endpoint, &call));
        self.metrics.answered(endpoint, reply.status());
        reply
    }
}

fn alive(call: &RpcCall) -> Reply {
    call.success(LivenessData::ALIVE)
}

fn openapi_document() -> Reply {
    reply(StatusCode::OK, openapi::YAML, OPENAPI.clone())
}

fn before_the_store_is_open(endpoint: Endpoint, call: &RpcCall) -> Reply {
    match endpoint {
        Endpoint::Liveness => alive(call),
        Endpoint::OpenApi => openapi_document(),
        _ => {
            let detail = "The home store isn't open yet; nothing was changed. Try again";
            call.failure(&ApiError::new(ErrorKind::TryLater, detail))
        }
    }
}

impl Handler for ControlApi {
    async fn handle(&self, request: Request) -> Reply {
        let Some(endpoint) = Endpoint::of(request.parts.uri.path()) else {
            return rpc::not_found();
        };
        let (remote, operation, arrived) = (request.remote, endpoint.path(), self.log.arrived());
        let log = |request_id: Option<&str>, root_key_id: Option<&str>, status| {
            let answer = LoggedAnswer { operation, request_id, remote, root_key_id, status };
            self.log.answered(arrived, answer);
        };
        let reply = match read(endpoint, request).await {
            Ok(call) => {
                let context = RequestContext { endpoint, call: &call, remote };
                let ControlAnswer { outcome, admission, root_key_id } = self.answer(&context).await;
                let mut reply = outcome.unwrap_or_else(|error| {
                    self.log.failed(operation, &call.request_id, &error);
                    call.failure(&error)
                });
                admission.write_headers(reply.headers_mut());
                log(Some(&call.request_id), root_key_id.as_ref().map(KeyId::as_str), reply.status());
                reply
            }
            Err(reply) => {
                log(None, None, reply.status());
                reply
            }
        };
        self.metrics.answered(endpoint, reply.status());
        reply
    }
}

/// Reads a call: a POST with a body, or of open endpoints a GET.
async fn read(endpoint: Endpoint, request: Request) -> Result<RpcCall, Reply> {
    if endpoint.is_open() { RpcCall::read_open(request) } else { RpcCall::read(request).await }
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
