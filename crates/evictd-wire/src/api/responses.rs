//! What a successful answer holds.

use std::borrow::Cow;

use evictd_core::record::{KeyRecord, RecordState, Verdict};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::secret::{Secret, exposed};

/// Of a deletion: it was done, and there is nothing more to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Empty {}

/// Of `apis.createApi`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateApiData {
    /// The new API's id.
    pub api_id: String,
}

/// Of `keys.createKey`: the only time that the key is told.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateKeyData {
    /// The new key's id, by which it is deleted.
    pub key_id: String,
    /// The key itself.
    #[serde(serialize_with = "exposed")]
    pub key: Secret,
}

/// Of `keys.getKey`. Times are milliseconds since 1970.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetKeyData {
    /// The key's id.
    pub key_id: String,
    /// What of the key may be shown.
    pub start: String,
    /// Whether it grants anything.
    pub enabled: bool,
    /// When it was created.
    pub created_at: i64,
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// Its metadata, byte for byte as it was given.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<Box<RawValue>>,
    /// When it last changed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub updated_at: Option<i64>,
    /// When it ends.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires: Option<i64>,
}

/// Of `keys.verifyKey`: always a success, whatever the verdict. It borrows from the record it tells of.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VerifyKeyData<'a> {
    /// Whether the key may be used.
    pub valid: bool,
    /// Why or why not: a [`Verdict::code`].
    #[serde(borrow)]
    pub code: Cow<'a, str>,
    /// The key's id.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub key_id: Option<Cow<'a, str>>,
    /// Its name.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub name: Option<Cow<'a, str>>,
    /// Its metadata, byte for byte as it was given.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<&'a RawValue>,
    /// When it ends, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires: Option<i64>,
    /// Whether its owner left it switched on.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub enabled: Option<bool>,
}

impl<'a> VerifyKeyData<'a> {
    /// The answer for a key that is unknown, deleted, foreign, or none of the caller's business. It says
    /// nothing else, so that the cases can't be told apart.
    pub fn not_found() -> Self {
        Self::bare(Verdict::NotFound)
    }

    /// The answer for `record` under `verdict`.
    ///
    /// Metadata that isn't JSON, which only direct SQL can have stored, is left out: the verdict counts.
    pub fn new(record: &'a KeyRecord, verdict: Verdict) -> Self {
        if verdict == Verdict::NotFound {
            return Self::not_found();
        }
        Self {
            key_id: Some(record.key_id.as_str().into()),
            name: record.name.as_deref().map(Cow::Borrowed),
            meta: record.meta.as_deref().and_then(|meta| serde_json::from_str(meta).ok()),
            expires: record.expires_at.map(evictd_core::time::StoreTime::as_millis),
            enabled: Some(record.state != RecordState::Disabled),
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
        }
    }
}

#[cfg(test)]
mod tests {
    use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
    use evictd_core::time::StoreTime;

    use super::*;

    fn record() -> KeyRecord {
        KeyRecord {
            key_id: KeyId::new("key_1"),
            api_id: ApiId::new("api_1"),
            workspace_id: WorkspaceId::new("ws_1"),
            state: RecordState::Active,
            name: Some("ci".into()),
            meta: Some(r#"{"b": 1.50, "a":[ ]}"#.into()),
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
    fn not_found_tells_nothing_about_a_record() {
        let bare = r#"{"valid":false,"code":"NOT_FOUND"}"#;
        assert_eq!(json(&VerifyKeyData::not_found()), bare);
        assert_eq!(json(&VerifyKeyData::new(&record(), Verdict::NotFound)), bare);
    }

    #[test]
    fn a_disabled_key_says_so() {
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
    fn a_new_key_is_told_once_and_never_printed() {
        let data = CreateKeyData { key_id: "key_1".into(), key: Secret::new("prod_abc") };
        assert_eq!(json(&data), r#"{"keyId":"key_1","key":"prod_abc"}"#);
        assert!(!format!("{data:?}").contains("prod_abc"));
        assert_eq!(serde_json::from_str::<CreateKeyData>(&json(&data)).unwrap(), data);
    }
}
