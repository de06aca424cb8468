//! `POST /v2/keys.verifyKey`, in the order of checks that Unkey's clients know.

use std::time::Duration;

use evictd_core::record::Record;
use evictd_ops::http::{Handler, Reply, Request, StatusCode, header, reply};
use evictd_ops::rpc::{self, Call};
use evictd_wire::api::envelope::{Meta, Stale, Success};
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::ids::hash;
use evictd_wire::api::requests::VerifyKey;
use evictd_wire::api::root_key::authorize;
use evictd_wire::api::verification::{judge, visible};

use crate::origin::LoadError;
use crate::verify::{Found, Verifier};

/// Largest body: a key and its tags, all escaped, fit several times.
pub(crate) const BODY_BYTES_MAX: usize = 256 * 1024;

/// In answers from records that are older than the bound allows: whole seconds since somebody vouched for
/// them. Only policy makes such answers.
const STALE: header::HeaderName = header::HeaderName::from_static("evictd-stale");

/// The verify surface.
#[derive(Clone, Debug)]
pub(crate) struct Surface {
    verifier: Verifier,
}

impl Surface {
    pub(crate) fn new(verifier: Verifier) -> Self {
        Self { verifier }
    }

    /// `age` becomes that of the oldest record which was looked at, if it is older than it should be.
    async fn verify(&self, call: &Call, age: &mut Option<Duration>) -> Result<Reply, ApiError> {
        let request = call.request(VerifyKey::parse)?;
        let found_root = self.load(call.token()?, age).await?;
        let root = match &found_root.entry.record {
            Record::RootKey(root) => Some(root),
            Record::Key(_) | Record::Absent => None,
        };
        let root = authorize(root, self.verifier.home_time())?;
        let found = self.load(&request.key, age).await?;
        let key = visible(root, &found.entry.record);
        if age.is_some() && key.is_some_and(|key| !self.verifier.may_be_stale(key)) {
            // Another API's policy let the old root key pass.
            self.verifier.metrics.unavailable();
            return Err(unavailable(LoadError::Unreachable));
        }
        let (verdict, data) = judge(key, &request, self.verifier.home_time())?;
        self.verifier.metrics.verified(verdict, age.is_some());
        let stale = age.map(|age| Stale { age_seconds: age.as_secs() });
        let meta = Meta { request_id: call.request_id.clone(), stale, ..Meta::default() };
        Ok(reply(StatusCode::OK, JSON, Success { meta, data }.to_bytes().into()))
    }

    async fn load(&self, text: &str, age: &mut Option<Duration>) -> Result<Found, ApiError> {
        match self.verifier.entry(hash(text)).await {
            Ok(found) => {
                *age = (*age).max(found.stale);
                Ok(found)
            }
            Err(error) => {
                self.verifier.metrics.unavailable();
                Err(unavailable(error))
            }
        }
    }
}

fn unavailable(error: LoadError) -> ApiError {
    let detail = match error {
        LoadError::Busy => "Too many records are being loaded at once; try again",
        LoadError::Unreachable => {
            "This agent has no record that is fresh enough, and no publisher answered; see its /readyz"
        }
        LoadError::Stale => {
            "The record that could be had is older than a change that is known here; try again"
        }
    };
    ApiError::new(ErrorKind::Stale, detail)
}

impl Handler for Surface {
    async fn handle(&self, request: Request) -> Reply {
        if request.parts.uri.path() != VerifyKey::PATH {
            return rpc::not_found();
        }
        let call = match Call::read(request).await {
            Ok(call) => call,
            Err(reply) => return reply,
        };
        let mut age = None;
        let verified = self.verify(&call, &mut age).await;
        let mut reply = verified.unwrap_or_else(|error| call.failure(&error));
        // A denial for want of a record rests on no old one.
        if let Some(age) = age.filter(|_| reply.status() != StatusCode::SERVICE_UNAVAILABLE) {
            reply.headers_mut().insert(STALE, age.as_secs().into());
        }
        reply
    }

    fn answered(&self, status: StatusCode) {
        self.verifier.metrics.answered(status);
    }
}

#[cfg(test)]
mod tests;
