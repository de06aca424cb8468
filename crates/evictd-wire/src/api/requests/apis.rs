//! Requests about APIs, and about the keys of one.

use serde::{Deserialize, Serialize};

use super::super::schema::{Field, Harmless, ID_PATTERN, Rule, Schema};
use super::{ApiError, id, parse, stored};

/// `apis.createApi`: a new namespace of keys.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateApi {
    /// For people; not unique.
    pub name: String,
}

impl CreateApi {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/apis.createApi";

    const SCHEMA: Schema = Schema::strict(Self::PATH, &[Field::required("name", stored(3, 256))]);

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

/// `apis.getApi`: what is known of an API.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetApi {
    /// Which one.
    pub api_id: String,
}

impl GetApi {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/apis.getApi";

    const SCHEMA: Schema = Schema::strict(Self::PATH, &[Field::required("apiId", id(8))]);

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

/// `apis.deleteApi`: every key of the API stops being valid.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeleteApi {
    /// Which one.
    pub api_id: String,
}

impl DeleteApi {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/apis.deleteApi";

    const SCHEMA: Schema = Schema::strict(Self::PATH, &[Field::required("apiId", id(8))]);

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

/// `apis.listKeys`: the keys of an API, a page at a time.
///
/// `revalidateKeysCache` is accepted and means nothing: lists come from the store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListKeys {
    /// Whose.
    pub api_id: String,
    /// How many at most, 1 to 100.
    #[serde(default = "default_limit")]
    pub limit: u8,
    /// Where the page before said that this one begins.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cursor: Option<String>,
    /// Only those that belong to this one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub external_id: Option<String>,
}

impl ListKeys {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/apis.listKeys";

    /// Keys of a page for which no particular number was asked; also the most.
    pub const DEFAULT_LIMIT: u8 = 100;

    const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[
            Field::required("apiId", Rule::Text { min: 1, max: usize::MAX, pattern: Some(&ID_PATTERN) }),
            Field::optional("limit", Rule::Integer { min: 1, max: Self::DEFAULT_LIMIT as i64 }),
            Field::optional("cursor", stored(0, usize::MAX)),
            Field::optional("externalId", stored(1, usize::MAX)),
            Field::optional("revalidateKeysCache", Rule::Flag),
            Field::unsupported("decrypt", Harmless::False),
        ],
    );

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

fn default_limit() -> u8 {
    ListKeys::DEFAULT_LIMIT
}
