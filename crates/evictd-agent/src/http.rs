//! `POST /v2/keys.verifyKey`, in the order of checks that Unkey's clients know.

use evictd_core::record::{KeyRecord, Record, RootKeyRecord, Verdict};
use evictd_ops::http::{Handler, Reply, Request};
use evictd_ops::rpc::{self, Call};
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::ids::hash;
use evictd_wire::api::requests::VerifyKey;
use evictd_wire::api::responses::VerifyKeyData;
use evictd_wire::api::root_key::acting;

use crate::cache::Entry;
use crate::origin::LoadError;
use crate::verify::Verifier;

/// Largest body: a key and its tags, all escaped, fit several times.
pub(crate) const BODY_BYTES_MAX: usize = 256 * 1024;

const VERIFY: &str = "verify_key";

/// The verify surface.
#[derive(Clone, Debug)]
pub(crate) struct Surface {
    verifier: Verifier,
}

impl Surface {
    pub(crate) fn new(verifier: Verifier) -> Self {
        Self { verifier }
    }

    async fn verify(&self, call: &Call) -> Result<Reply, ApiError> {
        let request = call.request(VerifyKey::parse)?;
        let root_entry = self.load(call.token()?).await?;
        let root = match &root_entry.record {
            Record::RootKey(root) => Some(root),
            Record::Key(_) | Record::Absent => None,
        };
        let root = acting(root, self.verifier.home_time())?;
        let entry = self.load(&request.key).await?;
        let visible = match &entry.record {
            Record::Key(key) if may_see(root, key) => Some(key),
            Record::Key(_) | Record::RootKey(_) | Record::Absent => None,
        };
        let Some(key) = visible else {
            self.verifier.metrics.verified(Verdict::NotFound);
            return Ok(call.success(VerifyKeyData::not_found()));
        };
        Ok(call.success(VerifyKeyData::new(key, self.verifier.judge(key))))
    }

    async fn load(&self, text: &str) -> Result<std::sync::Arc<Entry>, ApiError> {
        self.verifier.entry(hash(text)).await.map_err(|error| {
            self.verifier.metrics.unavailable();
            unavailable(error)
        })
    }
}

/// Keys of other workspaces, and of APIs that the root key may not verify, don't exist for the caller.
fn may_see(root: &RootKeyRecord, key: &KeyRecord) -> bool {
    root.workspace_id == key.workspace_id && root.allows(key.api_id.as_str(), VERIFY)
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
        self.verify(&call).await.unwrap_or_else(|error| call.failure(&error))
    }
}

#[cfg(test)]
mod tests;
