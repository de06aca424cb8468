//! The root key behind a request, and what it may do.

use std::net::{IpAddr, SocketAddr};

use evictd_core::record::RootKeyRecord;
use evictd_ops::rpc::RpcCall;
use evictd_store::change::Actor;
use evictd_store::{ChangeStore, RecordStore};
use evictd_wire::api::error::ApiError;
use evictd_wire::api::requests::Endpoint;
use hyper::header::USER_AGENT;

use super::{ChangeTarget, ControlApi};
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
    pub(super) fn log_change(&self, endpoint: Endpoint, target: &ChangeTarget) {
        let Actor { root_key_id, workspace_id, request_id, remote_ip, .. } = self.actor();
        let ChangeTarget { api: api_id, key: key_id, new_key: new_key_id } = target;
        tracing::info!(
            request_id, operation = endpoint.path(), %root_key_id, %workspace_id, remote_ip, api_id, key_id, new_key_id,
            "change committed"
        );
    }

    /// Returns who makes a change, for the audit record.
    pub(super) fn actor(&self) -> Actor {
        let header = |name: &str| self.call.headers.get(name).and_then(|value| value.to_str().ok());
        let forwarded = header("x-forwarded-for").and_then(forwarded_for);
        Actor {
            root_key_id: self.root.root_key_id.clone(),
            workspace_id: self.root.workspace_id.clone(),
            request_id: self.call.request_id.clone(),
            remote_ip: Some(forwarded.unwrap_or_else(|| self.remote.ip()).to_string()),
            user_agent: header(USER_AGENT.as_str()).map(str::to_owned),
        }
    }
}

/// Returns the first address of an `X-Forwarded-For` list, without its port; `None` if the first entry is no address. It
/// is a claim: a client that isn't behind a proxy that sets the header can name any address, but nothing else.
fn forwarded_for(list: &str) -> Option<IpAddr> {
    let first = list.split(',').map(str::trim).find(|address| !address.is_empty())?;
    let in_brackets = || first.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || first.parse().ok().map(|address: SocketAddr| address.ip());
    first.parse().ok().or_else(with_port).or_else(in_brackets)
}

#[cfg(test)]
mod tests {
    use super::forwarded_for;

    fn recorded(list: &str) -> Option<String> {
        forwarded_for(list).map(|address| address.to_string())
    }

    #[test]
    fn an_address_is_recorded_without_its_port() {
        for (list, address) in [
            ("192.0.2.7", "192.0.2.7"),
            ("192.0.2.7:5678", "192.0.2.7"),
            ("2001:db8::7", "2001:db8::7"),
            ("2001:DB8:0:0::7", "2001:db8::7"),
            ("[2001:db8::7]", "2001:db8::7"),
            ("[2001:db8::7]:5678", "2001:db8::7"),
            ("::ffff:192.0.2.7", "::ffff:192.0.2.7"),
        ] {
            assert_eq!(recorded(list).as_deref(), Some(address), "{list}");
        }
    }

    #[test]
    fn the_first_of_a_list_counts() {
        for list in ["192.0.2.7, 10.0.0.1", " , ,192.0.2.7:80 , junk", "\t192.0.2.7,", "192.0.2.7,[::1]:80"] {
            assert_eq!(recorded(list).as_deref(), Some("192.0.2.7"), "{list}");
        }
    }

    #[test]
    fn other_text_is_not_recorded_nor_what_follows_it() {
        for list in [
            "",
            " , ,",
            "\"><script>",
            "unknown, 192.0.2.7",
            "\"192.0.2.7\"",
            "192.0.2.7 10.0.0.1",
            "192.0.2.256",
            "192.0.2.7:",
            "192.0.2.7:65536",
            "192.0.2.7:5678:9",
            "[192.0.2.7]",
            "[]",
            "[::1",
            "::1]",
            "[::1]:",
            "for=192.0.2.7",
            "proxy.example:80",
        ] {
            assert_eq!(recorded(list), None, "{list}");
        }
    }
}
