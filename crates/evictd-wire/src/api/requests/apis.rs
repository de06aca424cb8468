//! Requests for APIs, and for the keys of one.

use serde::{Deserialize, Serialize};

use super::super::schema::{Field, Harmless, Schema, ValueRule};
use super::{ApiError, FieldError, id, read_checked, stored, text};

/// `apis.createApi`: a new namespace of keys.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreateApi {
    /// Not unique.
    pub name: String,
}

request!(CreateApi, "/v2/apis.createApi", strict, &[Field::required("name", stored(3, 256))]);

/// `apis.getApi`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetApi {
    pub api_id: String,
}

request!(GetApi, "/v2/apis.getApi", strict, &[Field::required("apiId", id(8))]);

/// `apis.deleteApi`: ends every key of the API.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeleteApi {
    pub api_id: String,
}

request!(DeleteApi, "/v2/apis.deleteApi", strict, &[Field::required("apiId", id(8))]);

/// `apis.listKeys`: the keys of an API, a page at a time.
///
/// The API's id may be any text, as Unkey has it: to one that isn't an id, the answer is that no API has it.
/// `revalidateKeysCache` is accepted and has no effect: lists are read from the store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ListKeys {
    pub api_id: String,
    /// The size of a page, 1 to 100.
    #[serde(default = "default_limit")]
    pub limit: u8,
    /// The `cursor` of the page before.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cursor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub external_id: Option<String>,
}

impl ListKeys {
    /// The largest page, and the default.
    pub const DEFAULT_LIMIT: u8 = 100;

    /// The error of a cursor that no page had. Without it, such a list would begin anew or end early.
    pub fn unreadable_cursor() -> ApiError {
        Self::SCHEMA.violated(vec![FieldError {
            location: "/properties/cursor".to_owned(),
            message: "it isn't the cursor of any page of this list".to_owned(),
            fix: Some("send `pagination.cursor` of the page before, unchanged".to_owned()),
        }])
    }
}

request!(
    ListKeys,
    "/v2/apis.listKeys",
    strict,
    &[
        Field::required("apiId", text(1, usize::MAX)),
        Field::optional("limit", ValueRule::Integer { min: 1, max: Self::DEFAULT_LIMIT as i64 }),
        Field::optional("cursor", stored(0, usize::MAX)),
        Field::optional("externalId", stored(1, usize::MAX)),
        Field::optional("revalidateKeysCache", ValueRule::Flag),
        Field::unsupported("decrypt", Harmless::False),
    ]
);

fn default_limit() -> u8 {
    ListKeys::DEFAULT_LIMIT
}
