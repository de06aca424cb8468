//! The root key behind a request, and what it may do.

use std::net::SocketAddr;

use evictd_core::record::RootKeyRecord;
use evictd_ops::rpc::RpcCall;
use evictd_store::change::Actor;
use evictd_store::{ChangeStore, RecordStore};
use evictd_wire::api::error::ApiError;
use evictd_wire::api::requests::Endpoint;
use hyper::header::USER_AGENT;

use super::{ChangedIds, ControlApi};
use crate::auth::missing;

/// A root key that may act, and the call that it authorizes.
pub(super) struct Caller<'a> {
    pub(super) api: &'a ControlApi,
    pub(super) call: &'a RpcCall,
    pub(super) root: RootKeyRecord,
    pub(super) remote: SocketAddr,
}

impl Caller<'_> {
    pub(super) fn records(&self) -> &dyn RecordStore {
        &*self.api.store
    }

    pub(super) fn changes(&self) -> &dyn ChangeStore {
        &*self.api.store
    }

    /// Refuses a root key that may not do `action` on `api` (`*` requires the right on all).
    pub(super) fn require(&self, api: &str, action: &str) -> Result<(), ApiError> {
        if self.root.allows(api, action) { Ok(()) } else { Err(missing(api, action)) }
    }

    /// Logs a change that is committed. The receipts task logs its position and its regions.
    pub(super) fn log_change(&self, endpoint: Endpoint, target: &ChangedIds) {
        let Actor { root_key_id, workspace_id, request_id, remote_ip, .. } = self.actor();
        let ChangedIds { api: api_id, key: key_id, new_key: new_key_id } = target;
        tracing::info!(
            request_id, operation = endpoint.path(), %root_key_id, %workspace_id, remote_ip, api_id, key_id, new_key_id,
            "change committed"
        );
    }

    /// Returns who makes a change, for the audit record.
    pub(super) fn actor(&self) -> Actor {
        let headers = &self.call.headers;
        let peer = self.remote.ip().to_canonical();
        let user_agent = headers.get(USER_AGENT).and_then(|value| value.to_str().ok());
        Actor {
            root_key_id: self.root.root_key_id.clone(),
            workspace_id: self.root.workspace_id.clone(),
            request_id: self.call.request_id.clone(),
            remote_ip: Some(self.api.proxies.client(peer, headers).to_string()),
            peer_ip: Some(peer.to_string()),
            user_agent: user_agent.map(str::to_owned),
        }
    }
}
