//! `keys.verifyKey`: the request that comes on every call of somebody's API.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use super::super::permission_query;
use super::super::schema::{Field, Harmless, Rule, Schema};
use super::{ApiError, read_checked, text};

/// Longest key that can be verified, in characters.
const KEY_CHARS_MAX: usize = 512;

/// Most tags of a verification.
const TAGS_MAX: usize = 20;

/// Longest tag, in characters.
const TAG_CHARS_MAX: usize = 512;

/// `keys.verifyKey`: may this key be used?
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyKey<'a> {
    /// The key's full text.
    #[serde(borrow)]
    pub key: Cow<'a, str>,
    /// Labels for analytics, which evictd has none of: checked and ignored.
    #[serde(borrow, skip_serializing_if = "Vec::is_empty", default)]
    pub tags: Vec<Cow<'a, str>>,
    /// What the key has to be allowed to do: a query, not parsed yet, because a syntax error is only told to
    /// those who may verify the key.
    #[serde(borrow, skip_serializing_if = "Option::is_none", default, deserialize_with = "present")]
    pub permissions: Option<Cow<'a, str>>,
}

/// What nearly every verification looks like. Anything else goes the long way.
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

/// Text that is borrowed where it can be. Serde does that by itself for a field, but not inside a `Vec` or an
/// `Option`.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> VerifyKey<'a> {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.verifyKey";

    const SCHEMA: Schema = Schema::strict(
        Self::PATH,
        &[
            Field::required("key", text(1, KEY_CHARS_MAX)),
            Field::optional(
                "tags",
                Rule::Texts { max_items: TAGS_MAX, min: 1, max: TAG_CHARS_MAX, pattern: None },
            ),
            Field::optional("permissions", text(1, permission_query::CHARS_MAX)),
            Field::unsupported("credits", Harmless::Nothing),
            Field::unsupported("ratelimits", Harmless::EmptyList),
            Field::unsupported("migrationId", Harmless::Nothing),
            Field::unsupported("keyspaces", Harmless::EmptyList),
        ],
    );

    /// Asks for nothing but whether `key` is valid.
    pub fn new(key: impl Into<Cow<'a, str>>) -> Self {
        Self { key: key.into(), tags: Vec::new(), permissions: None }
    }

    /// Reads and checks a body; the error names everything that is wrong with it.
    ///
    /// A plain request is read in one pass that copies no text; only one that doesn't look right is read
    /// again, to find out what to answer.
    pub fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        if let Some(request) = Self::parse_plain(body) {
            return Ok(request);
        }
        Self::SCHEMA.check(body)?;
        read_checked(&Self::SCHEMA, body)
    }

    /// Accepts nothing that the schema refuses.
    pub(super) fn parse_plain(body: &'a [u8]) -> Option<Self> {
        // Serde would take an array of the fields' values for the object.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return None;
        }
        // Checked as a whole, which is quicker than each string by itself.
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

/// Text that may be absent but not `null`, which serde's own `Option` would take.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Cow<'a, str>>, D::Error> {
    Text::deserialize(deserializer).map(|text| Some(text.0))
}

fn texts<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Cow<'a, str>>, D::Error> {
    let texts = Vec::<Text<'_>>::deserialize(deserializer)?;
    Ok(texts.into_iter().map(|text| text.0).collect())
}

/// Whether it has 1 to `max` characters. Nearly every text has that few bytes, too.
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
