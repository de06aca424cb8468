//! Requests for single keys.

use std::time::Duration;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::super::schema::{Field, Harmless, ID_PATTERN, Schema, ValueRule, Whole};
use super::{ApiError, EXPIRES, EXPIRES_MAX, EXTERNAL_ID, META, NAME, PERMISSIONS, Patch, id, read_checked};

/// `keys.createKey`: a new key in an API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateKey {
    pub api_id: String,
    /// The start of the key's text, before an underscore.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub prefix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// The number of random bytes, 16 or more.
    #[serde(default = "default_byte_length")]
    pub byte_length: u8,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub external_id: Option<String>,
    /// An object, returned byte for byte by verifications of the key.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<Box<RawValue>>,
    /// Sorted by bytes and without duplicates once parsed, as the store keeps them.
    #[serde(skip_serializing_if = "Vec::is_empty", default, deserialize_with = "permission_set")]
    pub permissions: Vec<String>,
    /// In milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "whole_or_none")]
    pub expires: Option<i64>,
    #[serde(default = "default_enabled")]
    pub enabled: bool,
}

impl CreateKey {
    /// The smallest number of random bytes, and the default.
    pub const DEFAULT_BYTE_LENGTH: u8 = 16;
}

request!(
    CreateKey,
    "/v2/keys.createKey",
    strict,
    &[
        Field::required("apiId", id(3)),
        Field::optional("prefix", ValueRule::Text { min: 1, max: 16, pattern: Some(&ID_PATTERN) }),
        Field::optional("name", NAME),
        Field::optional(
            "byteLength",
            ValueRule::Integer { min: Self::DEFAULT_BYTE_LENGTH as i64, max: u8::MAX as i64 },
        ),
        Field::optional("externalId", EXTERNAL_ID),
        Field::optional("meta", META),
        Field::optional("permissions", PERMISSIONS),
        Field::optional("expires", EXPIRES),
        Field::optional("enabled", ValueRule::Flag),
        Field::unsupported("roles", Harmless::EmptyList),
        Field::unsupported("credits", Harmless::Unlimited),
        Field::unsupported("ratelimits", Harmless::EmptyList),
        Field::unsupported("recoverable", Harmless::False),
    ]
);

/// `keys.getKey`: a key's settings, without its text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetKey {
    pub key_id: String,
}

request!(
    GetKey,
    "/v2/keys.getKey",
    strict,
    &[Field::required("keyId", id(3)), Field::unsupported("decrypt", Harmless::False)]
);

/// `keys.updateKey`: new settings of a key. Absent ones stay.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpdateKey {
    pub key_id: String,
    #[serde(skip_serializing_if = "Patch::is_keep", default)]
    pub name: Patch<String>,
    #[serde(skip_serializing_if = "Patch::is_keep", default)]
    pub external_id: Patch<String>,
    /// As [`CreateKey::meta`].
    #[serde(skip_serializing_if = "Patch::is_keep", default)]
    pub meta: Patch<Box<RawValue>>,
    /// In milliseconds since 1970.
    #[serde(skip_serializing_if = "Patch::is_keep", default, deserialize_with = "whole_patch")]
    pub expires: Patch<i64>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub enabled: Option<bool>,
    /// Replaces all permissions. As [`CreateKey::permissions`].
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "permission_set_or_none")]
    pub permissions: Option<Vec<String>>,
}

request!(
    UpdateKey,
    "/v2/keys.updateKey",
    strict,
    &[
        Field::required("keyId", id(3)),
        Field::nullable("name", NAME),
        Field::nullable("externalId", EXTERNAL_ID),
        Field::nullable("meta", META),
        Field::nullable("expires", EXPIRES),
        Field::optional("enabled", ValueRule::Flag),
        Field::optional("permissions", PERMISSIONS),
        Field::unsupported("credits", Harmless::NullOrUnlimited),
        Field::unsupported("ratelimits", Harmless::EmptyList),
        Field::unsupported("roles", Harmless::EmptyList),
    ]
);

/// `keys.rerollKey`: a new key with the settings of this one, which ends after a grace period.
///
/// The only endpoint that ignores unknown properties, as Unkey's does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RerollKey {
    pub key_id: String,
    /// In milliseconds from now: see [`Self::grace`].
    #[serde(deserialize_with = "whole_span")]
    pub expiration: u64,
}

request!(
    RerollKey,
    "/v2/keys.rerollKey",
    lenient,
    &[
        Field::required("keyId", id(3)),
        Field::required("expiration", ValueRule::Integer { min: 0, max: EXPIRES_MAX }),
    ]
);

impl RerollKey {
    /// Returns the time until the old key ends.
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.expiration)
    }
}

/// `keys.deleteKey`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeleteKey {
    pub key_id: String,
    /// Whether everything but the id is erased.
    #[serde(default)]
    pub permanent: bool,
}

request!(
    DeleteKey,
    "/v2/keys.deleteKey",
    strict,
    &[Field::required("keyId", id(3)), Field::optional("permanent", ValueRule::Flag)]
);

fn whole_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    Ok(Option::<Whole>::deserialize(deserializer)?.map(|whole| whole.0))
}

fn whole_patch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Patch<i64>, D::Error> {
    Ok(Patch::<Whole>::deserialize(deserializer)?.map(|whole| whole.0))
}

fn whole_span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    u64::try_from(Whole::deserialize(deserializer)?.0).map_err(D::Error::custom)
}

fn permission_set<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let mut permissions = Vec::deserialize(deserializer)?;
    permissions.sort_unstable();
    permissions.dedup();
    Ok(permissions)
}

fn permission_set_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<String>>, D::Error> {
    permission_set(deserializer).map(Some)
}

fn default_byte_length() -> u8 {
    CreateKey::DEFAULT_BYTE_LENGTH
}

fn default_enabled() -> bool {
    true
}
