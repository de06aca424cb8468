//! Whether a root key may act, decided by the control API and by every agent.

use evictd_core::record::{RecordState, RootKeyRecord};
use evictd_core::time::StoreTime;

use crate::api::error::{ApiError, ErrorKind};

/// Returns the root key that was looked up, if it may act at `home_time`.
///
/// # Errors
///
/// [`ErrorKind::RootKeyNotFound`] (401) if it is absent or revoked. [`ErrorKind::KeyDisabled`],
/// [`ErrorKind::WorkspaceDisabled`] or [`ErrorKind::Forbidden`] (403) if it or its workspace is disabled, or it has
/// expired.
pub fn authorize(root: Option<&RootKeyRecord>, home_time: StoreTime) -> Result<&RootKeyRecord, ApiError> {
    let unknown = || ApiError::new(ErrorKind::RootKeyNotFound, "The root key doesn't exist or was revoked");
    let expired = || ApiError::new(ErrorKind::Forbidden, "The root key has expired");
    let root = root.ok_or_else(unknown)?;
    match root.state {
        RecordState::Deleted => Err(unknown()),
        RecordState::Disabled => Err(ApiError::new(ErrorKind::KeyDisabled, "The root key is disabled")),
        RecordState::Expired => Err(expired()),
        RecordState::WorkspaceDisabled => {
            Err(ApiError::new(ErrorKind::WorkspaceDisabled, "The workspace is disabled"))
        }
        RecordState::Active if root.expires_at.is_some_and(|end| end <= home_time) => Err(expired()),
        RecordState::Active => Ok(root),
    }
}
