//! Who asks, and what they may do.

use std::net::SocketAddr;

use evictd_core::record::RootKeyRecord;
use evictd_ops::rpc::Call;
use evictd_store::HomeStore;
use evictd_store::change::Actor;
use evictd_wire::api::error::ApiError;
use hyper::header::USER_AGENT;

use super::Surface;
use crate::auth::missing;

/// Longest address that is recorded, in characters. Whoever forwards a request can claim any.
const ADDRESS_CHARS_MAX: usize = 64;

/// A root key that may act, and the call that it authorises.
pub(super) struct Caller<'a> {
    pub(super) surface: &'a Surface,
    pub(super) call: &'a Call,
    pub(super) root: RootKeyRecord,
    pub(super) remote: SocketAddr,
}

impl Caller<'_> {
    pub(super) fn store(&self) -> &dyn HomeStore {
        &*self.surface.store
    }

    /// Refuses a root key that may not do `action` on `api` (`*` asks for the right on all).
    pub(super) fn require(&self, api: &str, action: &str) -> Result<(), ApiError> {
        if self.root.allows(api, action) { Ok(()) } else { Err(missing(api, action)) }
    }

    /// Who changes something, for the audit record.
    pub(super) fn actor(&self) -> Actor {
        let header = |name: &str| self.call.headers.get(name).and_then(|value| value.to_str().ok());
        let forwarded = header("x-forwarded-for")
            .and_then(|list| list.split(',').map(str::trim).find(|address| !address.is_empty()))
            .map(|address| address.chars().take(ADDRESS_CHARS_MAX).collect());
        Actor {
            root_key_id: self.root.root_key_id.clone(),
            workspace_id: self.root.workspace_id.clone(),
            request_id: self.call.request_id.clone(),
            remote_ip: Some(forwarded.unwrap_or_else(|| self.remote.ip().to_string())),
            user_agent: header(USER_AGENT.as_str()).map(str::to_owned),
        }
    }
}
