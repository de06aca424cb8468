//! `POST /v2/keys.verifyKey`, with its checks in the order of Unkey's server, and the description of it.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use evictd_core::record::Record;
use evictd_ops::answer_log::{AnswerLog, LoggedAnswer};
use evictd_ops::http::{Handler, Reply, Request, StatusCode, header, reply};
use evictd_ops::rpc::{self, RpcCall};
use evictd_wire::api::envelope::{Meta, Stale, Success};
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::ids::hash;
use evictd_wire::api::openapi::{self, ApiKind};
use evictd_wire::api::requests::{OPENAPI_PATH, VerifyKey};
use evictd_wire::api::root_key::authorize;
use evictd_wire::api::verification::{judge, visible};

use crate::origin::LoadError;
use crate::verify::{FoundRecord, Verifier};

/// The largest body. A key and its tags, all escaped, fit several times.
pub(crate) const BODY_BYTES_MAX: usize = 256 * 1024;

/// What `GET /openapi.yaml` returns.
static OPENAPI: LazyLock<Bytes> =
    LazyLock::new(|| openapi::to_yaml(&openapi::document(ApiKind::Verify)).into());

/// Whole seconds since the last proof for the record. Only answers that policy permits from stale records have it.
const STALE: header::HeaderName = header::HeaderName::from_static("evictd-stale");

#[derive(Clone, Debug)]
pub(crate) struct VerifyApi {
    verifier: Verifier,
    log: Arc<AnswerLog>,
}

/// An error, and the age of the oldest stale record that it rests on.
struct VerifyRefusal {
    error: ApiError,
    stale: Option<Duration>,
}

impl From<ApiError> for VerifyRefusal {
    /// For errors that rest on no stale record.
    fn from(error: ApiError) -> Self {
        Self { error, stale: None }
    }
}

impl VerifyApi {
    /// Logs every answer if `access_log` is set.
    pub(crate) fn new(verifier: Verifier, access_log: bool) -> Self {
        Self { verifier, log: Arc::new(AnswerLog::new(access_log)) }
    }

    async fn verify(&self, call: &RpcCall) -> Result<Reply, VerifyRefusal> {
        let Self { verifier, .. } = self;
        let request = call.request(VerifyKey::parse)?;
        let found_root = self.load(call.token()?).await?;
        let stale = found_root.stale;
        let root = match &found_root.entry.record {
            Record::RootKey(root) => Some(root),
            Record::Key(_) | Record::Absent => None,
        };
        let root = authorize(root, verifier.home_time()).map_err(|error| VerifyRefusal { error, stale })?;
        let found = self.load(&request.key).await?;
        let stale = stale.max(found.stale);
        let key = visible(root, &found.entry.record);
        if stale.is_some() && key.is_some_and(|key| !verifier.may_be_stale(key)) {
            // Another API's policy permitted the stale root key.
            return Err(self.unavailable(LoadError::Unreachable).into());
        }
        let judged = judge(key, &request, verifier.home_time());
        let (verdict, data) = judged.map_err(|error| VerifyRefusal { error, stale })?;
        verifier.metrics.verified(verdict, stale.is_some());
        let stale_meta = stale.map(|age| Stale { age_seconds: age.as_secs() });
        let meta = Meta { request_id: call.request_id.clone(), stale: stale_meta, ..Meta::default() };
        Ok(marked(reply(StatusCode::OK, JSON, Success { meta, data }.to_bytes().into()), stale))
    }

    async fn load(&self, text: &str) -> Result<FoundRecord, ApiError> {
        self.verifier.entry(hash(text)).await.map_err(|error| self.unavailable(error))
    }

    fn unavailable(&self, error: LoadError) -> ApiError {
        self.verifier.metrics.unavailable();
        let detail = match error {
            LoadError::Busy => "Too many records are being loaded at once; try again",
            LoadError::Unreachable => {
                "This agent has no record that is fresh enough, and no publisher answered; see its /readyz"
            }
            LoadError::Stale => "The loaded record is older than a change that was applied here; try again",
        };
        ApiError::new(ErrorKind::TryLater, detail)
    }
}

fn marked(mut reply: Reply, stale: Option<Duration>) -> Reply {
    if let Some(age) = stale {
        reply.headers_mut().insert(STALE, age.as_secs().into());
    }
    reply
}

impl Handler for VerifyApi {
    async fn handle(&self, request: Request) -> Reply {
        match request.parts.uri.path() {
            VerifyKey::PATH => {}
            OPENAPI_PATH => {
                let document = |_| reply(StatusCode::OK, openapi::YAML, OPENAPI.clone());
                return RpcCall::read_open(request).map_or_else(|refusal| refusal, document);
            }
            _ => return rpc::not_found(),
        }
        let (remote, operation, arrived) = (request.remote, VerifyKey::PATH, self.log.arrived());
        let (call, reply) = match RpcCall::read(request).await {
            Ok(call) => {
                let reply = self.verify(&call).await.unwrap_or_else(|VerifyRefusal { error, stale }| {
                    self.log.failed(operation, &call.request_id, &error);
                    marked(call.failure(&error), stale)
                });
                (Some(call), reply)
            }
            Err(reply) => (None, reply),
        };
        let request_id = call.as_ref().map(|call| call.request_id.as_str());
        let (root_key_id, status) = (None, reply.status());
        self.log.answered(arrived, LoggedAnswer { operation, request_id, remote, root_key_id, status });
        reply
    }

    fn answered(&self, status: StatusCode) {
        self.verifier.metrics.answered(status);
    }
}

#[cfg(test)]
mod tests;
