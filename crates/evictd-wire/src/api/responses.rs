//! The data of successful answers.

use std::borrow::Cow;

use evictd_core::ids::WorkspaceId;
use evictd_core::record::{KeyRecord, RecordState, Verdict};
use evictd_core::time::StoreTime;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::ids;
use super::secret::{Secret, exposed};

/// Of deletions and of `keys.updateKey`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Empty {}

/// Of `GET /v2/liveness`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LivenessData {
    pub message: Cow<'static, str>,
}

impl LivenessData {
    /// The message of Unkey's server.
    pub const ALIVE: Self = Self { message: Cow::Borrowed("we're cooking") };
}

/// Of `apis.createApi`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateApiData {
    pub api_id: String,
}

/// Of `apis.getApi`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetApiData {
    pub id: String,
    pub name: String,
}

/// Of `keys.createKey`. No other answer contains the key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateKeyData {
    pub key_id: String,
    #[serde(serialize_with = "exposed")]
    pub key: Secret,
}

/// Of `keys.rerollKey`.
pub type RerollKeyData = CreateKeyData;

/// The owner of a key.
///
/// In Unkey, identities are objects of their own. evictd stores only each key's external id and derives the
/// identity's id from it: see [`ids::identity`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityData<'a> {
    /// The same for all keys of the workspace with this external id.
    pub id: String,
    pub external_id: Cow<'a, str>,
}

impl<'a> IdentityData<'a> {
    pub fn new(workspace: &WorkspaceId, external_id: impl Into<Cow<'a, str>>) -> Self {
        let external_id = external_id.into();
        Self { id: ids::identity(workspace, &external_id), external_id }
    }
}

/// Of `keys.getKey`, and one item of `apis.listKeys`. Times are milliseconds since 1970.
///
/// `lastUsedAt` is omitted because verifications are not recorded. Unsupported features are omitted too.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyResponseData {
    pub key_id: String,
    pub start: String,
    pub enabled: bool,
    pub created_at: i64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// Byte for byte as it was stored.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub updated_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires: Option<i64>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub permissions: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub identity: Option<IdentityData<'static>>,
}

/// Of `keys.verifyKey`: a success whatever the verdict. It borrows from the key's record.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyKeyData<'a> {
    pub valid: bool,
    /// A [`Verdict::code`].
    #[serde(borrow)]
    pub code: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub key_id: Option<Cow<'a, str>>,
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub name: Option<Cow<'a, str>>,
    /// Byte for byte as it was stored.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires: Option<i64>,
    /// Absent where the record doesn't hold it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub enabled: Option<bool>,
    #[serde(skip_serializing_if = "is_empty", default)]
    pub permissions: Cow<'a, [Box<str>]>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub identity: Option<IdentityData<'a>>,
}

impl<'a> VerifyKeyData<'a> {
    /// The answer for a key that is unknown, deleted, or invisible to the caller. It holds no other field, so that
    /// the caller can't distinguish these cases.
    pub fn not_found() -> Self {
        Self::bare(Verdict::NotFound)
    }

    /// The answer for `record` under `verdict`.
    ///
    /// Invalid metadata, which only direct SQL can store, is omitted and doesn't fail the verification.
    pub fn new(record: &'a KeyRecord, verdict: Verdict) -> Self {
        if verdict == Verdict::NotFound {
            return Self::not_found();
        }
        Self {
            key_id: Some(record.key_id.as_str().into()),
            name: record.name.as_deref().map(Cow::Borrowed),
            meta: record.meta.as_deref().and_then(reported_meta),
            expires: reported_expiry(record.expires_at),
            enabled: enabled(record.state),
            permissions: Cow::Borrowed(&record.permissions),
            identity: record
                .external_id
                .as_deref()
                .map(|external_id| IdentityData::new(&record.workspace_id, external_id)),
            ..Self::bare(verdict)
        }
    }

    fn bare(verdict: Verdict) -> Self {
        Self {
            valid: verdict == Verdict::Valid,
            code: Cow::Borrowed(verdict.code()),
            key_id: None,
            name: None,
            meta: None,
            expires: None,
            enabled: None,
            permissions: Cow::Borrowed(&[]),
            identity: None,
        }
    }
}

/// Metadata as answers report it, byte for byte. Unkey omits an object without members. Invalid metadata, which only
/// direct SQL can store, is omitted too.
pub fn reported_meta(stored: &str) -> Option<&RawValue> {
    let meta: &RawValue = serde_json::from_str(stored).ok()?;
    let members = meta.get().strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
    let is_empty = meta.get() == "null" || members.is_some_and(|members| members.trim_ascii().is_empty());
    (!is_empty).then_some(meta)
}

/// An expiry as answers report it, in milliseconds since 1970. Unkey omits every number that is zero; the verdict
/// still reports that such a key has expired.
pub fn reported_expiry(expires_at: Option<StoreTime>) -> Option<i64> {
    expires_at.map(StoreTime::as_millis).filter(|millis| *millis != 0)
}

/// A disabled workspace hides whether the key itself is enabled.
fn enabled(state: RecordState) -> Option<bool> {
    (state != RecordState::WorkspaceDisabled).then_some(state != RecordState::Disabled)
}

fn is_empty(permissions: &[Box<str>]) -> bool {
    permissions.is_empty()
}

#[cfg(test)]
mod tests {
    use evictd_core::ids::{ApiId, KeyId};

    use super::*;

    fn record() -> KeyRecord {
        KeyRecord {
            key_id: KeyId::new("key_1"),
            api_id: ApiId::new("api_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            state: RecordState::Active,
            name: Some("ci".into()),
            meta: Some(r#"{"b": 1.50, "a":[ ]}"#.into()),
            external_id: None,
            permissions: Vec::new(),
            expires_at: Some(StoreTime::from_millis(7)),
        }
    }

    fn json(data: &impl Serialize) -> String {
        serde_json::to_string(data).unwrap()
    }

    #[test]
    fn metadata_passes_through_byte_for_byte() {
        let text = json(&VerifyKeyData::new(&record(), Verdict::Valid));
        assert_eq!(
            text,
            concat!(
                r#"{"valid":true,"code":"VALID","keyId":"key_1","name":"ci","meta":{"b": 1.50, "a":[ ]},"#,
                r#""expires":7,"enabled":true}"#
            )
        );
        let back: VerifyKeyData<'_> = serde_json::from_str(&text).unwrap();
        assert_eq!(back.meta.unwrap().get(), r#"{"b": 1.50, "a":[ ]}"#);
    }

    #[test]
    fn metadata_without_members_is_omitted() {
        for none in ["{}", "{ }", " {\n} ", "null", "", "{", "x"] {
            assert!(reported_meta(none).is_none(), "{none}");
        }
        for some in [r#"{"a":{}}"#, r#"{"":null}"#, "[]", "0"] {
            assert_eq!(reported_meta(some).map(RawValue::get), Some(some));
        }
        let bare = KeyRecord { meta: Some("{}".into()), ..record() };
        assert!(!json(&VerifyKeyData::new(&bare, Verdict::Valid)).contains("meta"));
    }

    #[test]
    fn only_an_expiry_of_zero_is_omitted() {
        assert_eq!([None, Some(StoreTime(0))].map(reported_expiry), [None, None]);
        assert_eq!(
            [1, -1].map(|millis| reported_expiry(Some(StoreTime::from_millis(millis)))),
            [Some(1), Some(-1)]
        );
    }

    #[test]
    fn not_found_reveals_nothing_of_a_record() {
        let bare = r#"{"valid":false,"code":"NOT_FOUND"}"#;
        assert_eq!(json(&VerifyKeyData::not_found()), bare);
        assert_eq!(json(&VerifyKeyData::new(&record(), Verdict::NotFound)), bare);
    }

    #[test]
    fn a_verification_reports_permissions_and_identity() {
        let record = KeyRecord {
            external_id: Some("user_1".into()),
            permissions: vec!["a".into(), "b.*".into()],
            name: None,
            meta: None,
            expires_at: None,
            ..record()
        };
        let text = json(&VerifyKeyData::new(&record, Verdict::InsufficientPermissions));
        assert_eq!(
            text,
            concat!(
                r#"{"valid":false,"code":"INSUFFICIENT_PERMISSIONS","keyId":"key_1","enabled":true,"#,
                r#""permissions":["a","b.*"],"#,
                r#""identity":{"id":"id_K3s1UbLXo492JC3ERX7Gte","externalId":"user_1"}}"#
            )
        );
        let back: VerifyKeyData<'_> = serde_json::from_str(&text).unwrap();
        assert_eq!(back.permissions.as_ref(), record.permissions);
        assert_eq!(back.identity.unwrap().external_id, "user_1");
    }

    #[test]
    fn a_key_of_a_disabled_workspace_is_forbidden_without_enabled() {
        let record = KeyRecord { state: RecordState::WorkspaceDisabled, meta: None, ..record() };
        assert_eq!(
            json(&VerifyKeyData::new(&record, Verdict::Forbidden)),
            r#"{"valid":false,"code":"FORBIDDEN","keyId":"key_1","name":"ci","expires":7}"#
        );
    }

    #[test]
    fn absent_settings_of_a_listed_key_are_omitted() {
        let bare = KeyResponseData {
            key_id: "key_1".into(),
            start: "prod_abcd".into(),
            enabled: true,
            created_at: 1,
            name: None,
            meta: None,
            updated_at: None,
            expires: None,
            permissions: Vec::new(),
            identity: None,
        };
        assert_eq!(json(&bare), r#"{"keyId":"key_1","start":"prod_abcd","enabled":true,"createdAt":1}"#);
        let full = KeyResponseData {
            name: Some("ci".into()),
            meta: RawValue::from_string(r#"{"a": 1}"#.into()).ok(),
            updated_at: Some(2),
            expires: Some(3),
            permissions: vec!["a".into()],
            identity: Some(IdentityData::new(&WorkspaceId::new("ws_1"), "user_1")),
            ..bare
        };
        let text = json(&full);
        assert_eq!(
            text,
            concat!(
                r#"{"keyId":"key_1","start":"prod_abcd","enabled":true,"createdAt":1,"name":"ci","#,
                r#""meta":{"a": 1},"updatedAt":2,"expires":3,"permissions":["a"],"#,
                r#""identity":{"id":"id_K3s1UbLXo492JC3ERX7Gte","externalId":"user_1"}}"#
            )
        );
        assert_eq!(json(&serde_json::from_str::<KeyResponseData>(&text).unwrap()), text);
    }

    #[test]
    fn liveness_has_the_words_of_unkeys_server() {
        assert_eq!(json(&LivenessData::ALIVE), r#"{"message":"we're cooking"}"#);
    }

    #[test]
    fn a_disabled_key_is_reported_as_disabled() {
        let record =
            KeyRecord { state: RecordState::Disabled, name: None, meta: None, expires_at: None, ..record() };
        assert_eq!(
            json(&VerifyKeyData::new(&record, Verdict::Disabled)),
            r#"{"valid":false,"code":"DISABLED","keyId":"key_1","enabled":false}"#
        );
    }

    #[test]
    fn broken_metadata_doesnt_break_the_verdict() {
        let record = KeyRecord { meta: Some("{".into()), ..record() };
        assert!(VerifyKeyData::new(&record, Verdict::Valid).meta.is_none());
    }

    #[test]
    fn a_new_key_is_in_the_answer_but_not_in_debug_output() {
        let data = CreateKeyData { key_id: "key_1".into(), key: Secret::new("prod_abc") };
        assert_eq!(json(&data), r#"{"keyId":"key_1","key":"prod_abc"}"#);
        assert!(!format!("{data:?}").contains("prod_abc"));
        assert_eq!(serde_json::from_str::<CreateKeyData>(&json(&data)).unwrap(), data);
    }
}
