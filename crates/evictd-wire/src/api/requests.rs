//! The API's requests, checked while they are parsed.
//!
//! A parsed request is within every limit of its endpoint. A feature of Unkey's that evictd doesn't support is
//! rejected by name and never ignored: a client that requests a rate limit must not assume that it has one.

/// Gives a request its path, its schema, and `parse`, which checks the one against the other.
macro_rules! request {
    ($request:ident, $path:literal, $kind:ident, $fields:expr) => {
        impl $request {
            pub const PATH: &'static str = $path;

            pub(in crate::api) const SCHEMA: Schema = Schema::$kind(Self::PATH, $fields);

            /// Parses and checks a body. The error lists every problem.
            pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
                Self::SCHEMA.check(body)?;
                read_checked(&Self::SCHEMA, body)
            }
        }
    };
}

mod apis;
mod keys;
mod propagation;
mod verify;

use evictd_core::limits::{
    EXTERNAL_ID_BYTES_MAX, ID_BYTES_MAX, META_BYTES_MAX, PERMISSION_BYTES_MAX, PERMISSIONS_MAX,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{ApiError, ErrorKind, FieldError, JSON};
use super::schema::{
    BODY_LOCATION, EXTERNAL_ID_PATTERN, ID_PATTERN, PERMISSION_PATTERN, STORED_PATTERN, Schema, ValueRule,
    clipped,
};

pub use apis::{CreateApi, DeleteApi, GetApi, ListKeys};
pub use keys::{CreateKey, DeleteKey, GetKey, RerollKey, UpdateKey};
pub use propagation::GetReceipt;
pub use verify::VerifyKey;

/// The end of the year 2099, in milliseconds since 1970: the latest expiry of a key, and the longest grace of a
/// reroll.
const EXPIRES_MAX: i64 = 4_102_444_800_000;

/// Defines [`Endpoint`] from the list of requests.
macro_rules! endpoints {
    ($($request:ident),*) => {
        evictd_core::labels! {
            /// Every endpoint of both daemons, labeled by its path.
            pub enum Endpoint {
                $($request = $request::PATH,)*
                /// A GET without body and root key.
                Liveness = LIVENESS_PATH,
                /// The same: the description of the API.
                OpenApi = OPENAPI_PATH,
            }
        }

        impl Endpoint {
            /// Returns the schema of the body; `None` for a GET.
            pub(super) fn schema(self) -> Option<&'static Schema> {
                match self {
                    $(Self::$request => Some(const { &$request::SCHEMA }),)*
                    Self::Liveness | Self::OpenApi => None,
                }
            }
        }
    };
}

endpoints!(
    CreateApi, GetApi, DeleteApi, ListKeys, CreateKey, GetKey, UpdateKey, RerollKey, DeleteKey, VerifyKey,
    GetReceipt
);

impl Endpoint {
    pub fn path(self) -> &'static str {
        self.label()
    }

    /// Whether it is a GET without body and root key.
    pub fn is_open(self) -> bool {
        self.schema().is_none()
    }

    /// Finds the endpoint at `path`.
    pub fn of(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }
}

pub const LIVENESS_PATH: &str = "/v2/liveness";
pub const OPENAPI_PATH: &str = "/openapi.yaml";

/// A change of an optional property: absent, `null`, or a value.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Patch<T> {
    /// Absent: the property stays as it is.
    #[default]
    Keep,
    /// `null`: the property is removed.
    Clear,
    Set(T),
}

impl<T> Patch<T> {
    pub fn is_keep(&self) -> bool {
        matches!(self, Self::Keep)
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Patch<U> {
        match self {
            Self::Keep => Patch::Keep,
            Self::Clear => Patch::Clear,
            Self::Set(value) => Patch::Set(change(value)),
        }
    }
}

impl<T: Serialize> Serialize for Patch<T> {
    /// A field of this type must be skipped if [`Self::is_keep`].
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Keep | Self::Clear => serializer.serialize_none(),
            Self::Set(value) => serializer.serialize_some(value),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patch<T> {
    /// A field of this type needs `#[serde(default)]`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(deserializer)?.map_or(Self::Clear, Self::Set))
    }
}

/// The error of a request without an `Authorization` header, or with an empty one, in the words of Unkey's validator.
/// Endpoints look for the header before they read the body.
pub fn missing_authorization() -> ApiError {
    ApiError {
        errors: vec![FieldError {
            location: "security".to_owned(),
            message: "Authorization header was not found".to_owned(),
            fix: Some("Add an 'Authorization' header to this request".to_owned()),
        }],
        ..ApiError::new(ErrorKind::InvalidInput, "Authorization header for 'bearer' scheme")
    }
}

/// The error of a request whose `Content-Type` isn't JSON; empty if it has none.
pub fn unknown_content_type(content_type: &str) -> ApiError {
    let content_type = clipped(content_type);
    ApiError {
        errors: vec![FieldError {
            location: BODY_LOCATION.to_owned(),
            message: format!("the content type '{content_type}' isn't known; a body is JSON"),
            fix: Some(format!("send `Content-Type: {JSON}`")),
        }],
        ..ApiError::new(
            ErrorKind::InvalidInput,
            format!("POST operation request content type '{content_type}' does not exist"),
        )
    }
}

/// Extracts the root key from the `Authorization` header. Endpoints do this once they have checked the body, and before
/// they look the root key up.
///
/// # Errors
///
/// [`missing_authorization`] if the header is empty, [`ErrorKind::AuthenticationMalformed`] when it isn't `Bearer` and a
/// token.
pub fn authorization(header: &[u8]) -> Result<&str, ApiError> {
    if header.is_empty() {
        return Err(missing_authorization());
    }
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

/// Parses a body that its schema accepts. The schema and the type state the same limits twice. A difference
/// between them is a bug of evictd's and not the caller's error.
fn read_checked<'a, T: Deserialize<'a>>(schema: &Schema, body: &'a [u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|_| {
        let detail = format!("The body for '{}' passed its checks but couldn't be read", schema.path);
        ApiError::new(ErrorKind::UnexpectedError, detail)
    })
}

const fn id(min: usize) -> ValueRule {
    ValueRule::Text { min, max: ID_BYTES_MAX, pattern: Some(&ID_PATTERN) }
}

const fn text(min: usize, max: usize) -> ValueRule {
    ValueRule::Text { min, max, pattern: None }
}

/// Any text that every store accepts.
const fn stored(min: usize, max: usize) -> ValueRule {
    ValueRule::Text { min, max, pattern: Some(&STORED_PATTERN) }
}

const EXTERNAL_ID: ValueRule =
    ValueRule::Text { min: 1, max: EXTERNAL_ID_BYTES_MAX, pattern: Some(&EXTERNAL_ID_PATTERN) };

const NAME: ValueRule = stored(1, 255);

const META: ValueRule = ValueRule::Object { max_properties: 100, max_bytes: META_BYTES_MAX };

const EXPIRES: ValueRule = ValueRule::Integer { min: 0, max: EXPIRES_MAX };

const PERMISSIONS: ValueRule = ValueRule::Texts {
    max_items: PERMISSIONS_MAX,
    min: 1,
    max: PERMISSION_BYTES_MAX,
    pattern: Some(&PERMISSION_PATTERN),
};

#[cfg(test)]
mod tests;
