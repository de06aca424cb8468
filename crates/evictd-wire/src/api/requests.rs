//! What a caller may send, checked as it is read.
//!
//! A request that parsed is within every limit of its endpoint. What Unkey offers and evictd leaves out is
//! refused by name instead of being ignored: a caller who asks for a rate limit must not believe that there
//! is one.

mod apis;
mod keys;
mod propagation;
mod verify;

use evictd_core::limits::{
    EXTERNAL_ID_BYTES_MAX, ID_BYTES_MAX, META_BYTES_MAX, PERMISSION_BYTES_MAX, PERMISSIONS_MAX,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{ApiError, ErrorKind, FieldError};
use super::schema::{EXTERNAL_ID_PATTERN, ID_PATTERN, PERMISSION_PATTERN, Rule, STORED_PATTERN, Schema};

pub use apis::{CreateApi, DeleteApi, GetApi, ListKeys};
pub use keys::{CreateKey, DeleteKey, GetKey, RerollKey, UpdateKey};
pub use propagation::GetReceipt;
pub use verify::VerifyKey;

/// The last instant that a key may expire at, in milliseconds since 1970, and the longest grace of a reroll:
/// the end of the year 2099.
const EXPIRES_MAX: i64 = 4_102_444_800_000;

/// Every endpoint, of both daemons.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Endpoint {
    /// [`CreateApi`].
    CreateApi,
    /// [`GetApi`].
    GetApi,
    /// [`DeleteApi`].
    DeleteApi,
    /// [`ListKeys`].
    ListKeys,
    /// [`CreateKey`].
    CreateKey,
    /// [`GetKey`].
    GetKey,
    /// [`UpdateKey`].
    UpdateKey,
    /// [`RerollKey`].
    RerollKey,
    /// [`DeleteKey`].
    DeleteKey,
    /// [`VerifyKey`].
    VerifyKey,
    /// [`GetReceipt`].
    GetReceipt,
    /// Whether anybody is there: the one that is a GET, has no body and asks for no root key.
    Liveness,
}

impl Endpoint {
    /// All of them, for routers, metrics and tests.
    pub const ALL: [Self; 12] = [
        Self::CreateApi,
        Self::GetApi,
        Self::DeleteApi,
        Self::ListKeys,
        Self::CreateKey,
        Self::GetKey,
        Self::UpdateKey,
        Self::RerollKey,
        Self::DeleteKey,
        Self::VerifyKey,
        Self::GetReceipt,
        Self::Liveness,
    ];

    /// Where it is.
    pub fn path(self) -> &'static str {
        match self {
            Self::CreateApi => CreateApi::PATH,
            Self::GetApi => GetApi::PATH,
            Self::DeleteApi => DeleteApi::PATH,
            Self::ListKeys => ListKeys::PATH,
            Self::CreateKey => CreateKey::PATH,
            Self::GetKey => GetKey::PATH,
            Self::UpdateKey => UpdateKey::PATH,
            Self::RerollKey => RerollKey::PATH,
            Self::DeleteKey => DeleteKey::PATH,
            Self::VerifyKey => VerifyKey::PATH,
            Self::GetReceipt => GetReceipt::PATH,
            Self::Liveness => LIVENESS_PATH,
        }
    }

    /// The one at `path`.
    pub fn of(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }
}

/// Where to ask whether anybody is there, with GET and without a root key.
pub const LIVENESS_PATH: &str = "/v2/liveness";

/// What a request says about an optional property: nothing, `null`, or a value.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Patch<T> {
    /// Nothing: it stays as it is.
    #[default]
    Keep,
    /// `null`: it is taken away.
    Clear,
    /// It becomes this.
    Set(T),
}

impl<T> Patch<T> {
    /// Whether the request says nothing about it.
    pub fn is_keep(&self) -> bool {
        matches!(self, Self::Keep)
    }

    /// The same with another value.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Patch<U> {
        match self {
            Self::Keep => Patch::Keep,
            Self::Clear => Patch::Clear,
            Self::Set(value) => Patch::Set(change(value)),
        }
    }
}

impl<T: Serialize> Serialize for Patch<T> {
    /// A field of this type has to be skipped when it [is kept](Self::is_keep).
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Keep | Self::Clear => serializer.serialize_none(),
            Self::Set(value) => serializer.serialize_some(value),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patch<T> {
    /// A field of this type has to have its default when it is absent.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(deserializer)?.map_or(Self::Clear, Self::Set))
    }
}

/// Reads the root key out of the `Authorization` header. Endpoints do this and check the body before they
/// look the root key up.
///
/// # Errors
///
/// [`ErrorKind::AuthenticationMissing`] without a header, [`ErrorKind::AuthenticationMalformed`] when it
/// isn't `Bearer` and a token.
pub fn authorization(header: Option<&[u8]>) -> Result<&str, ApiError> {
    let Some(header) = header else {
        return Err(ApiError {
            errors: vec![FieldError {
                location: "/header/Authorization".to_owned(),
                message: "the header is missing".to_owned(),
                fix: Some("send `Authorization: Bearer <root key>`".to_owned()),
            }],
            ..ApiError::new(
                ErrorKind::AuthenticationMissing,
                "Authorization header for 'bearer' scheme is missing",
            )
        });
    };
    let token =
        std::str::from_utf8(header).ok().and_then(|header| header.strip_prefix("Bearer ")).map(str::trim);
    match token {
        Some(token) if !token.is_empty() => Ok(token),
        _ => Err(ApiError::new(
            ErrorKind::AuthenticationMalformed,
            "The Authorization header must read 'Bearer <root key>'",
        )),
    }
}

fn parse<T: DeserializeOwned>(schema: &Schema, body: &[u8]) -> Result<T, ApiError> {
    schema.check(body)?;
    read_checked(schema, body)
}

/// Reads a body that its schema accepts. The schema and the type say the same thing twice; if they ever
/// differ, that is a bug of evictd's and no fault of the caller's.
fn read_checked<'a, T: Deserialize<'a>>(schema: &Schema, body: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|_| {
        let detail = format!("The body for '{}' passed its checks but couldn't be read", schema.path);
        ApiError::new(ErrorKind::UnexpectedError, detail)
    })
}

const fn id(min: usize) -> Rule {
    Rule::Text { min, max: ID_BYTES_MAX, pattern: Some(&ID_PATTERN) }
}

const fn text(min: usize, max: usize) -> Rule {
    Rule::Text { min, max, pattern: None }
}

/// Any text that the store can keep.
const fn stored(min: usize, max: usize) -> Rule {
    Rule::Text { min, max, pattern: Some(&STORED_PATTERN) }
}

/// Whom a key belongs to, in its owner's words.
const EXTERNAL_ID: Rule =
    Rule::Text { min: 1, max: EXTERNAL_ID_BYTES_MAX, pattern: Some(&EXTERNAL_ID_PATTERN) };

/// What a key is called.
const NAME: Rule = stored(1, 255);

/// What a key's owner wants to know of it when it is verified.
const META: Rule = Rule::Object { max_properties: 100, max_bytes: META_BYTES_MAX };

/// When a key ends.
const EXPIRES: Rule = Rule::Integer { min: 0, max: EXPIRES_MAX };

/// What a key may do.
const PERMISSIONS: Rule = Rule::Texts {
    max_items: PERMISSIONS_MAX,
    min: 1,
    max: PERMISSION_BYTES_MAX,
    pattern: Some(&PERMISSION_PATTERN),
};

/// A set, as the store keeps it: sorted by bytes, none twice.
fn into_set(permissions: &mut Vec<String>) {
    permissions.sort_unstable();
    permissions.dedup();
}

#[cfg(test)]
mod tests;
