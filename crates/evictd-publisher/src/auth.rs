//! Authentication by root keys, in Unkey's order of checks.

use evictd_core::record::RootKeyRecord;
use evictd_ops::clock;
use evictd_ops::logging::with_causes;
use evictd_store::{RecordStore, StoreError};
use evictd_wire::api::error::{ApiError, ErrorKind};
use evictd_wire::api::ids::hash;
use evictd_wire::api::root_key::authorize;

use crate::metrics::PublisherMetrics;

/// Returns the root key with this text, if it may act.
///
/// It is looked up by its SHA-256 through an index. Timing could reveal something of a hash that the caller can't choose,
/// not of the key.
pub(crate) async fn authenticate(
    store: &dyn RecordStore,
    metrics: &PublisherMetrics,
    token: &str,
) -> Result<RootKeyRecord, ApiError> {
    let root = store.root_key(hash(token)).await.map_err(|error| {
        metrics.store_failed(&error);
        unavailable(&error)
    })?;
    authorize(root.as_ref(), clock::wall_now()).cloned()
}

/// Returns the error that names the permissions of which one is needed.
pub(crate) fn missing(api: &str, action: &str) -> ApiError {
    let mut needed = vec![format!("api.*.{action}")];
    if api != "*" {
        needed.push(format!("api.{api}.{action}"));
    }
    ApiError::missing_permission(&needed)
}

/// Returns the error that the client gets for a store failure; SDKs retry.
pub(crate) fn unavailable(error: &StoreError) -> ApiError {
    let (kind, detail) = match error {
        StoreError::Unlogged { .. } => {
            let detail = "The home store's triggers are switched off or altered; nothing was changed";
            (ErrorKind::UnexpectedError, detail)
        }
        StoreError::Unknown { .. } => {
            let detail = "The home store didn't say whether it kept the change; look before you repeat it";
            (ErrorKind::ServiceUnavailable, detail)
        }
        _ if error.is_busy() => {
            (ErrorKind::TryLater, "The home store is busy; nothing was changed. Try again")
        }
        _ => (ErrorKind::ServiceUnavailable, "The home store failed; nothing was changed"),
    };
    ApiError::new(kind, detail).caused_by(with_causes(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Failure: a client gives up, or an operator is paged, because a bulk change keeps the store busy for a moment.
    #[test]
    fn busy_store_is_no_failed_one() {
        let of = |source| unavailable(&StoreError::Database { action: "delete a key", source });
        let busy = of(sqlx::Error::PoolTimedOut);
        assert_eq!((busy.kind, busy.status()), (ErrorKind::TryLater, 503));
        assert!(busy.detail.contains("nothing was changed"), "{}", busy.detail);
        assert_eq!(of(sqlx::Error::PoolClosed).kind, ErrorKind::ServiceUnavailable);
    }
}
