//! Requests about single keys.

use std::time::Duration;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::super::schema::{Field, Harmless, ID_PATTERN, Rule, Schema, Whole};
use super::{
    ApiError, EXPIRES, EXPIRES_MAX, EXTERNAL_ID, META, NAME, PERMISSIONS, Patch, id, into_set, parse,
};

/// `keys.createKey`: a new key in an API.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateKey {
    /// Where it belongs.
    pub api_id: String,
    /// What its text starts with, before an underscore.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub prefix: Option<String>,
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<String>,
    /// How much randomness it holds, 16 bytes or more.
    #[serde(default = "default_byte_length")]
    pub byte_length: u8,
    /// Whom it belongs to, in the caller's words.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub external_id: Option<String>,
    /// An object, handed to whoever verifies the key, byte for byte.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<Box<RawValue>>,
    /// What it may do, in the caller's words. Once parsed: sorted, none twice.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub permissions: Vec<String>,
    /// When it ends, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default, deserialize_with = "whole_or_none")]
    pub expires: Option<i64>,
    /// Whether it grants anything from the start.
    #[serde(default = "default_enabled")]
    pub enabled: bool,
}

impl CreateKey {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.createKey";

    /// Randomness of a key that asks for no particular amount, in bytes.
    pub const DEFAULT_BYTE_LENGTH: u8 = 16;

    const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[
            Field::required("apiId", id(3)),
            Field::optional("prefix", Rule::Text { min: 1, max: 16, pattern: Some(&ID_PATTERN) }),
            Field::optional("name", NAME),
            Field::optional(
                "byteLength",
                Rule::Integer { min: Self::DEFAULT_BYTE_LENGTH as i64, max: u8::MAX as i64 },
            ),
            Field::optional("externalId", EXTERNAL_ID),
            Field::optional("meta", META),
            Field::optional("permissions", PERMISSIONS),
            Field::optional("expires", EXPIRES),
            Field::optional("enabled", Rule::Flag),
            Field::unsupported("roles", Harmless::EmptyList),
            Field::unsupported("credits", Harmless::Nothing),
            Field::unsupported("ratelimits", Harmless::EmptyList),
            Field::unsupported("recoverable", Harmless::False),
        ],
    );

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut request: Self = parse(&Self::SCHEMA, body)?;
        into_set(&mut request.permissions);
        Ok(request)
    }
}

/// `keys.getKey`: what is known of a key, without its text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetKey {
    /// Which one.
    pub key_id: String,
}

impl GetKey {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.getKey";

    const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[Field::required("keyId", id(3)), Field::unsupported("decrypt", Harmless::False)],
    );

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

/// `keys.updateKey`: what becomes of a key's settings. What isn't said stays.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpdateKey {
    /// Which one.
    pub key_id: String,
    /// For people.
    #[serde(skip_serializing_if = "Patch::is_keep", default)]
    pub name: Patch<String>,
    /// Whom it belongs to, in the caller's words.
    #[serde(skip_serializing_if = "Patch::is_keep", default)]
    pub external_id: Patch<String>,
    /// An object, handed to whoever verifies the key, byte for byte.
    #[serde(skip_serializing_if = "Patch::is_keep", default)]
    pub meta: Patch<Box<RawValue>>,
    /// When it ends, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Patch::is_keep", default, deserialize_with = "whole_patch")]
    pub expires: Patch<i64>,
    /// Whether it grants anything.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub enabled: Option<bool>,
    /// What it may do, in the caller's words: all of it. Once parsed: sorted, none twice.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub permissions: Option<Vec<String>>,
}

impl UpdateKey {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.updateKey";

    const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[
            Field::required("keyId", id(3)),
            Field::nullable("name", NAME),
            Field::nullable("externalId", EXTERNAL_ID),
            Field::nullable("meta", META),
            Field::nullable("expires", EXPIRES),
            Field::optional("enabled", Rule::Flag),
            Field::optional("permissions", PERMISSIONS),
            Field::unsupported("credits", Harmless::Null),
            Field::unsupported("ratelimits", Harmless::EmptyList),
            Field::unsupported("roles", Harmless::EmptyList),
        ],
    );

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut request: Self = parse(&Self::SCHEMA, body)?;
        request.permissions.as_mut().map(into_set);
        Ok(request)
    }
}

/// `keys.rerollKey`: a new key with the settings of this one, which ends.
///
/// The one endpoint that ignores what it doesn't know, as Unkey's does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RerollKey {
    /// Which one.
    pub key_id: String,
    /// How long the old one goes on, in milliseconds from now: see [`Self::grace`].
    #[serde(deserialize_with = "whole_span")]
    pub expiration: u64,
}

impl RerollKey {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.rerollKey";

    const SCHEMA: Schema = Schema::lenient(
        Self::PATH,
        &[
            Field::required("keyId", id(3)),
            Field::required("expiration", Rule::Integer { min: 0, max: EXPIRES_MAX }),
        ],
    );

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }

    /// How long the old one goes on.
    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.expiration)
    }
}

/// `keys.deleteKey`: the key stops being valid.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeleteKey {
    /// Which one.
    pub key_id: String,
    /// Whether nothing of it may remain but its id.
    #[serde(default)]
    pub permanent: bool,
}

impl DeleteKey {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.deleteKey";

    const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[Field::required("keyId", id(3)), Field::optional("permanent", Rule::Flag)],
    );

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

fn whole_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    Ok(Option::<Whole>::deserialize(deserializer)?.map(|whole| whole.0))
}

fn whole_patch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Patch<i64>, D::Error> {
    Ok(Patch::<Whole>::deserialize(deserializer)?.map(|whole| whole.0))
}

fn whole_span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    u64::try_from(Whole::deserialize(deserializer)?.0).map_err(D::Error::custom)
}

fn default_byte_length() -> u8 {
    CreateKey::DEFAULT_BYTE_LENGTH
}

fn default_enabled() -> bool {
    true
}
