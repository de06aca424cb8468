//! The answer to a verification, computed by every agent and by the publisher's own endpoint.
//!
//! The order is that of Unkey's server. Each step hides the following ones:
//!
//! 1. A key that is unknown, deleted, of another workspace, or of an API that the caller may not verify, is not
//!    found. The permission query is not parsed.
//! 2. The query is parsed. A syntax error is reported.
//! 3. A key that is disabled or expired, or whose workspace is disabled, has that verdict whatever its permissions.
//! 4. The key's permissions are compared with the query.

use evictd_core::record::{KeyRecord, Record, RootKeyRecord, Verdict};
use evictd_core::time::StoreTime;

use super::error::ApiError;
use super::permission_query::PermissionQuery;
use super::requests::VerifyKey;
use super::responses::VerifyKeyData;

const VERIFY: &str = "verify_key";

/// Returns the key that was `found`, unless it is of another workspace or of an API that the root key may not verify.
pub fn visible<'r>(root: &RootKeyRecord, found: &'r Record) -> Option<&'r KeyRecord> {
    match found {
        Record::Key(key)
            if root.workspace_id == key.workspace_id && root.allows(key.api_id.as_str(), VERIFY) =>
        {
            Some(key)
        }
        Record::Key(_) | Record::RootKey(_) | Record::Absent => None,
    }
}

/// Returns the answer about a [`visible`] key at `home_time`, and its verdict.
///
/// # Errors
///
/// [`PermissionsQuerySyntax`](super::error::ErrorKind::PermissionsQuerySyntax) (400) if the key is visible and
/// the request's permission query has a syntax error.
pub fn judge<'r>(
    key: Option<&'r KeyRecord>,
    request: &VerifyKey<'_>,
    home_time: StoreTime,
) -> Result<(Verdict, VerifyKeyData<'r>), ApiError> {
    let not_found = (Verdict::NotFound, VerifyKeyData::not_found());
    let Some(key) = key else { return Ok(not_found) };
    let mut verdict = key.verdict(home_time);
    if verdict == Verdict::NotFound {
        return Ok(not_found);
    }
    if let Some(query) = &request.permissions {
        let query = PermissionQuery::parse(query)?;
        if verdict == Verdict::Valid && !query.is_met_by(&key.permissions) {
            verdict = Verdict::InsufficientPermissions;
        }
    }
    Ok((verdict, VerifyKeyData::new(key, verdict)))
}

#[cfg(test)]
mod tests {
    use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
    use evictd_core::record::RecordState;

    use super::*;
    use crate::api::error::ErrorKind;

    const NOW: StoreTime = StoreTime(1_000);

    fn key(state: RecordState, permissions: &[&str]) -> KeyRecord {
        KeyRecord {
            key_id: KeyId::new("key_1"),
            api_id: ApiId::new("api_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            state,
            name: None,
            meta: None,
            external_id: None,
            permissions: permissions.iter().map(|permission| Box::from(*permission)).collect(),
            expires_at: None,
        }
    }

    fn root(workspace: &str, permission: &str) -> RootKeyRecord {
        RootKeyRecord {
            root_key_id: KeyId::new("root_1"),
            workspace_id: WorkspaceId::new(workspace),
            state: RecordState::Active,
            permissions: vec![permission.into()],
            expires_at: None,
        }
    }

    fn request(query: Option<&str>) -> VerifyKey<'_> {
        VerifyKey { permissions: query.map(Into::into), ..VerifyKey::new("prod_abc") }
    }

    fn verdict(key: Option<&KeyRecord>, query: Option<&str>) -> Result<Verdict, ErrorKind> {
        let judged = judge(key, &request(query), NOW);
        judged.map_err(|error| error.kind).map(|(verdict, data)| {
            assert_eq!((data.code.as_ref(), data.valid), (verdict.code(), verdict == Verdict::Valid));
            assert_eq!(data.key_id.is_some(), verdict != Verdict::NotFound);
            verdict
        })
    }

    #[test]
    fn a_key_is_visible_with_permission_in_its_own_workspace() {
        let found = Record::Key(key(RecordState::Active, &[]));
        for permission in ["api.*.verify_key", "api.api_1.verify_key"] {
            assert!(visible(&root("ws_1", permission), &found).is_some());
            assert!(visible(&root("ws_2", permission), &found).is_none());
            assert!(visible(&root("ws_1", permission), &Record::Absent).is_none());
            let other = Record::RootKey(root("ws_1", permission));
            assert!(visible(&root("ws_1", permission), &other).is_none());
        }
        for permission in ["api.api_2.verify_key", "api.*.read_key", "api.*.*", "*", ""] {
            assert!(visible(&root("ws_1", permission), &found).is_none(), "{permission}");
        }
    }

    #[test]
    fn a_bad_query_about_an_invisible_key_is_not_reported() {
        assert_eq!(verdict(None, Some("AND")), Ok(Verdict::NotFound));
        let deleted = key(RecordState::Deleted, &[]);
        assert_eq!(verdict(Some(&deleted), Some("AND")), Ok(Verdict::NotFound));
    }

    #[test]
    fn a_bad_query_about_a_visible_key_is_reported_in_any_state() {
        for state in
            [RecordState::Active, RecordState::Disabled, RecordState::Expired, RecordState::WorkspaceDisabled]
        {
            let refused = verdict(Some(&key(state, &[])), Some("a AND"));
            assert_eq!(refused, Err(ErrorKind::PermissionsQuerySyntax), "{state:?}");
        }
    }

    #[test]
    fn the_keys_own_state_precedes_its_permissions() {
        for (state, expected) in [
            (RecordState::Disabled, Verdict::Disabled),
            (RecordState::Expired, Verdict::Expired),
            (RecordState::WorkspaceDisabled, Verdict::Forbidden),
        ] {
            assert_eq!(verdict(Some(&key(state, &[])), Some("a")), Ok(expected));
            assert_eq!(verdict(Some(&key(state, &["a"])), Some("a")), Ok(expected));
        }
        let ended = KeyRecord { expires_at: Some(NOW), ..key(RecordState::Active, &[]) };
        assert_eq!(verdict(Some(&ended), Some("a")), Ok(Verdict::Expired));
    }

    #[test]
    fn a_key_without_the_required_permissions_is_not_valid() {
        let key = key(RecordState::Active, &["a", "b"]);
        assert_eq!(verdict(Some(&key), None), Ok(Verdict::Valid));
        assert_eq!(verdict(Some(&key), Some("a AND b")), Ok(Verdict::Valid));
        assert_eq!(verdict(Some(&key), Some("a AND c")), Ok(Verdict::InsufficientPermissions));
    }
}
