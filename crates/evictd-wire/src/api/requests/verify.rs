//! `keys.verifyKey`: sent for every call of a customer's API.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use super::super::permission_query;
use super::super::schema::{Field, Harmless, Schema, ValueRule};
use super::{ApiError, read_checked, text};

/// In characters.
const KEY_CHARS_MAX: usize = 512;

const TAGS_MAX: usize = 20;

/// In characters.
const TAG_CHARS_MAX: usize = 512;

/// `keys.verifyKey`: whether a key is valid.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyKey<'a> {
    /// The key's full text.
    #[serde(borrow)]
    pub key: Cow<'a, str>,
    /// Labels for analytics: checked and ignored, because evictd has no analytics.
    #[serde(borrow, skip_serializing_if = "Vec::is_empty", default)]
    pub tags: Vec<Cow<'a, str>>,
    /// The permission query, not parsed yet: a syntax error is reported only to callers that may verify the key.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default, deserialize_with = "present")]
    pub permissions: Option<Cow<'a, str>>,
}

/// Nearly every verification. Any other one takes the slow path.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainVerifyKey<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow, default, deserialize_with = "texts")]
    tags: Vec<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present")]
    permissions: Option<Cow<'a, str>>,
}

/// Text that is borrowed where possible. Serde borrows a field by itself, but not inside a `Vec` or an `Option`.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> VerifyKey<'a> {
    pub const PATH: &'static str = "/v2/keys.verifyKey";

    pub(in crate::api) const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[
            Field::required("key", text(1, KEY_CHARS_MAX)),
            Field::optional(
                "tags",
                ValueRule::Texts { max_items: TAGS_MAX, min: 1, max: TAG_CHARS_MAX, pattern: None },
            ),
            Field::optional("permissions", text(1, permission_query::CHARS_MAX)),
            Field::unsupported("credits", Harmless::Nothing),
            Field::unsupported("ratelimits", Harmless::EmptyList),
            Field::unsupported("migrationId", Harmless::Nothing),
            // A restriction to no keyspace would admit no key: it isn't the same as none.
            Field::unsupported("keyspaces", Harmless::Nothing),
        ],
    );

    /// A verification without tags and permission query.
    pub fn new(key: impl Into<Cow<'a, str>>) -> Self {
        Self { key: key.into(), tags: Vec::new(), permissions: None }
    }

    /// Parses and checks a body. The error lists every problem.
    ///
    /// A plain request is parsed in one pass that copies no text. Only a request that fails this pass is checked
    /// against the schema.
    pub fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        if let Some(request) = Self::parse_plain(body) {
            return Ok(request);
        }
        Self::SCHEMA.check(body)?;
        read_checked(&Self::SCHEMA, body)
    }

    /// Accepts only bodies that the schema accepts.
    pub(super) fn parse_plain(body: &'a [u8]) -> Option<Self> {
        // Serde also accepts an array of the fields' values.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return None;
        }
        // Checking UTF-8 once is faster than checking each string.
        let PlainVerifyKey { key, tags, permissions } =
            serde_json::from_str(std::str::from_utf8(body).ok()?).ok()?;
        let fine = fits(&key, KEY_CHARS_MAX)
            && tags.len() <= TAGS_MAX
            && tags.iter().all(|tag| fits(tag, TAG_CHARS_MAX))
            && permissions.as_deref().is_none_or(|query| fits(query, permission_query::CHARS_MAX));
        fine.then_some(Self { key, tags, permissions })
    }

    #[cfg(test)]
    pub(super) fn check(body: &[u8]) -> Result<(), ApiError> {
        Self::SCHEMA.check(body)
    }
}

/// Text that may be absent but not `null`, which serde's own `Option` accepts.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Cow<'a, str>>, D::Error> {
    Text::deserialize(deserializer).map(|text| Some(text.0))
}

fn texts<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Cow<'a, str>>, D::Error> {
    let texts = Vec::<Text<'_>>::deserialize(deserializer)?;
    Ok(texts.into_iter().map(|text| text.0).collect())
}

/// Whether it has 1 to `max` characters. Bytes are counted first: nearly every text is that short.
fn fits(text: &str, max: usize) -> bool {
    !text.is_empty() && (text.len() <= max || text.chars().count() <= max)
}

impl fmt::Debug for VerifyKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyKey")
            .field("key", &"[redacted]")
            .field("tags", &self.tags)
            .field("permissions", &self.permissions)
            .finish()
    }
}
