//! Who calls: root keys, in Unkey's order of checks.

use evictd_core::record::RootKeyRecord;
use evictd_ops::clock;
use evictd_store::{HomeStore, StoreError};
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::ids::hash;
use evictd_wire::api::root_key::acting;

/// The root key with this text, if it may act.
///
/// It is looked up by its SHA-256 through an index. What timing could tell of that comparison concerns
/// a hash that the caller can't steer, not the key.
pub(crate) async fn authenticate(store: &dyn HomeStore, token: &str) -> Result<RootKeyRecord, ApiError> {
    let root = store.root_key(hash(token)).await.map_err(|error| store_failed(&error))?;
    acting(root.as_ref(), clock::wall_now()).cloned()
}

/// The error that names what would have sufficed.
pub(crate) fn missing(api: &str, action: &str) -> ApiError {
    let mut needed = vec![format!("api.*.{action}")];
    if api != "*" {
        needed.push(format!("api.{api}.{action}"));
    }
    ApiError::missing_permission(&needed)
}

/// A store failure as the client sees it; SDKs try again. What happened goes to the log.
pub(crate) fn store_failed(error: &StoreError) -> ApiError {
    let mut chain = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        chain.push_str(": ");
        chain.push_str(&cause.to_string());
        source = cause.source();
    }
    tracing::error!(error = chain, "the home store failed");
    let detail = match error {
        StoreError::Unknown { .. } => {
            "The home store didn't say whether it kept the change; look before you repeat it"
        }
        _ => "The home store failed; nothing was changed",
    };
    ApiError::new(ErrorKind::ServiceUnavailable, detail)
}
