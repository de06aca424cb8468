//! What a caller may send, checked as it is read.
//!
//! A request that parsed is within every limit of its endpoint. What Unkey offers and evictd leaves out is
//! refused by name instead of being ignored: a caller who asks for a rate limit must not believe that there
//! is one.

use std::borrow::Cow;
use std::fmt;

use evictd_core::limits::META_BYTES_MAX;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::error::{ApiError, ErrorKind, FieldError};
use super::schema::{Field, Harmless, ID_PATTERN, Rule, Schema};

/// The last instant that a key may expire at, in milliseconds since 1970: the end of the year 2099.
const EXPIRES_MAX: i64 = 4_102_444_800_000;

/// Longest key that can be verified, in characters.
const KEY_CHARS_MAX: usize = 512;

/// Most tags of a verification.
const TAGS_MAX: usize = 20;

/// Longest tag, in characters.
const TAG_CHARS_MAX: usize = 512;

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

    const SCHEMA: Schema = Schema { path: Self::PATH, fields: &[Field::required("name", text(3, 256))] };

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

    const SCHEMA: Schema = Schema { path: Self::PATH, fields: &[Field::required("apiId", id(8))] };

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

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
    /// An object, handed to whoever verifies the key, byte for byte.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub meta: Option<Box<RawValue>>,
    /// When it ends, in milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none", default)]
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

    const SCHEMA: Schema = Schema {
        path: Self::PATH,
        fields: &[
            Field::required("apiId", id(3)),
            Field::optional("prefix", Rule::Text { min: 1, max: 16, pattern: Some(&ID_PATTERN) }),
            Field::optional("name", text(1, 255)),
            Field::optional(
                "byteLength",
                Rule::Integer { min: Self::DEFAULT_BYTE_LENGTH as i64, max: u8::MAX as i64 },
            ),
            Field::optional("meta", Rule::Object { max_properties: 100, max_bytes: META_BYTES_MAX }),
            Field::optional("expires", Rule::Integer { min: 0, max: EXPIRES_MAX }),
            Field::optional("enabled", Rule::Flag),
            Field::unsupported("externalId", Harmless::Nothing),
            Field::unsupported("roles", Harmless::EmptyList),
            Field::unsupported("permissions", Harmless::EmptyList),
            Field::unsupported("credits", Harmless::Nothing),
            Field::unsupported("ratelimits", Harmless::EmptyList),
            Field::unsupported("recoverable", Harmless::False),
        ],
    };

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
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

    const SCHEMA: Schema = Schema {
        path: Self::PATH,
        fields: &[Field::required("keyId", id(3)), Field::unsupported("decrypt", Harmless::False)],
    };

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
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

    const SCHEMA: Schema = Schema {
        path: Self::PATH,
        fields: &[Field::required("keyId", id(3)), Field::optional("permanent", Rule::Flag)],
    };

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

/// `propagation.getReceipt`: how far has a change come? evictd's own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GetReceipt {
    /// The request that made it, as its answer named it.
    pub request_id: String,
}

impl GetReceipt {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/propagation.getReceipt";

    const SCHEMA: Schema = Schema { path: Self::PATH, fields: &[Field::required("requestId", id(3))] };

    /// Reads and checks a body; the error names everything that is wrong with it.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        parse(&Self::SCHEMA, body)
    }
}

/// `keys.verifyKey`: may this key be used?
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyKey<'a> {
    /// The key's full text.
    #[serde(borrow)]
    pub key: Cow<'a, str>,
    /// Labels for analytics, which evictd has none of: checked and ignored.
    #[serde(borrow, skip_serializing_if = "Vec::is_empty", default)]
    pub tags: Vec<Cow<'a, str>>,
}

/// What nearly every verification looks like. Anything else goes the long way.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainVerifyKey<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    #[serde(borrow, default)]
    tags: Vec<Cow<'a, str>>,
}

impl<'a> VerifyKey<'a> {
    /// The endpoint.
    pub const PATH: &'static str = "/v2/keys.verifyKey";

    const SCHEMA: Schema = Schema {
        path: Self::PATH,
        fields: &[
            Field::required("key", text(1, KEY_CHARS_MAX)),
            Field::optional("tags", Rule::Texts { max_items: TAGS_MAX, min: 1, max: TAG_CHARS_MAX }),
            Field::unsupported("permissions", Harmless::Nothing),
            Field::unsupported("credits", Harmless::Nothing),
            Field::unsupported("ratelimits", Harmless::EmptyList),
            Field::unsupported("migrationId", Harmless::Nothing),
            Field::unsupported("keyspaces", Harmless::EmptyList),
        ],
    };

    /// Reads and checks a body; the error names everything that is wrong with it.
    ///
    /// A plain request is read in one pass that copies nothing; only one that doesn't look right is read
    /// again, to find out what to answer.
    pub fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        if let Some(request) = Self::parse_plain(body) {
            return Ok(request);
        }
        Self::SCHEMA.check(body)?;
        read_checked(&Self::SCHEMA, body)
    }

    /// Accepts nothing that the schema refuses.
    fn parse_plain(body: &'a [u8]) -> Option<Self> {
        // Serde would take an array of the fields' values for the object.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return None;
        }
        let PlainVerifyKey { key, tags } = serde_json::from_slice(body).ok()?;
        let fits = |text: &str, max| (1..=max).contains(&text.chars().count());
        let fine = fits(&key, KEY_CHARS_MAX)
            && tags.len() <= TAGS_MAX
            && tags.iter().all(|tag| fits(tag, TAG_CHARS_MAX));
        fine.then_some(Self { key, tags })
    }
}

impl fmt::Debug for VerifyKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifyKey").field("key", &"[redacted]").field("tags", &self.tags).finish()
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
    Rule::Text { min, max: 255, pattern: Some(&ID_PATTERN) }
}

const fn text(min: usize, max: usize) -> Rule {
    Rule::Text { min, max, pattern: None }
}

fn default_byte_length() -> u8 {
    CreateKey::DEFAULT_BYTE_LENGTH
}

fn default_enabled() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn locations(error: &ApiError) -> Vec<&str> {
        error.errors.iter().map(|error| error.location.as_str()).collect()
    }

    #[test]
    fn what_the_sdks_send_is_accepted() {
        let deletion = DeleteKey::parse(br#"{"keyId":"key_1234abcd","permanent":false}"#).unwrap();
        assert_eq!(deletion, DeleteKey { key_id: "key_1234abcd".into(), permanent: false });
        assert_eq!(DeleteApi::parse(br#"{"apiId":"api_1234abcd"}"#).unwrap().api_id, "api_1234abcd");
        assert_eq!(VerifyKey::parse(br#"{"key":"prod_abc"}"#).unwrap().key, "prod_abc");
        let key =
            CreateKey::parse(br#"{"apiId":"api_1","byteLength":16,"enabled":true,"recoverable":false}"#)
                .unwrap();
        assert_eq!((key.api_id.as_str(), key.byte_length, key.enabled), ("api_1", 16, true));
        assert_eq!(GetKey::parse(br#"{"keyId":"key_1","decrypt":false}"#).unwrap().key_id, "key_1");
        assert_eq!(CreateApi::parse(br#"{"name":"payments"}"#).unwrap().name, "payments");
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        assert!(!DeleteKey::parse(br#"{"keyId":"key_1"}"#).unwrap().permanent);
        let key = CreateKey::parse(br#"{"apiId":"api_1"}"#).unwrap();
        assert_eq!((key.byte_length, key.enabled, key.expires), (16, true, None));
        assert!(key.prefix.is_none() && key.name.is_none() && key.meta.is_none());
    }

    #[test]
    fn ids_have_their_lengths_and_characters() {
        assert!(DeleteKey::parse(br#"{"keyId":"abc"}"#).is_ok());
        assert!(DeleteApi::parse(br#"{"apiId":"12345678"}"#).is_ok());
        let error = DeleteApi::parse(br#"{"apiId":"api_123"}"#).unwrap_err();
        assert_eq!(locations(&error), ["/properties/apiId/minLength"]);
        let error = DeleteKey::parse(br#"{"keyId":"key-1"}"#).unwrap_err();
        assert_eq!(locations(&error), ["/properties/keyId/pattern"]);
        let error = DeleteKey::parse(format!(r#"{{"keyId":"{}"}}"#, "k".repeat(256)).as_bytes()).unwrap_err();
        assert_eq!(locations(&error), ["/properties/keyId/maxLength"]);
    }

    #[test]
    fn metadata_is_kept_byte_for_byte() {
        let key = CreateKey::parse(br#"{"apiId":"api_1","meta":{"b": 1.50, "a":[ ]}}"#).unwrap();
        assert_eq!(key.meta.unwrap().get(), r#"{"b": 1.50, "a":[ ]}"#);
    }

    #[test]
    fn a_key_with_rights_that_evictd_would_ignore_is_not_created() {
        let body =
            br#"{"apiId":"api_1","roles":["admin"],"ratelimits":[{"name":"x"}],"credits":{"remaining":5},
            "permissions":["a"],"externalId":"user_1","recoverable":true}"#;
        let error = CreateKey::parse(body).unwrap_err();
        assert_eq!(error.errors.len(), 6);
        assert!(error.errors.iter().all(|error| error.message.contains("not supported by evictd")));
        assert!(
            CreateKey::parse(br#"{"apiId":"api_1","roles":[],"permissions":[],"ratelimits":[]}"#).is_ok()
        );
    }

    #[test]
    fn a_verification_that_asks_for_more_than_validity_is_refused() {
        for field in [
            r#""permissions":"a AND b""#,
            r#""credits":{"cost":1}"#,
            r#""ratelimits":[{"name":"x"}]"#,
            r#""migrationId":"m""#,
            r#""keyspaces":["ks"]"#,
        ] {
            let error = VerifyKey::parse(format!(r#"{{"key":"k",{field}}}"#).as_bytes()).unwrap_err();
            assert!(error.errors[0].message.contains("not supported by evictd"), "{field}");
        }
        // Version 1 wanted it; version 2 refuses it like any unknown field.
        let error = VerifyKey::parse(br#"{"key":"k","apiId":"api_1"}"#).unwrap_err();
        assert_eq!(locations(&error), ["/additionalProperties"]);
    }

    #[test]
    fn harmless_extras_of_a_verification_take_the_long_way() {
        let body = br#"{"key":"k\u0041","tags":["a=b"],"ratelimits":[],"keyspaces":[]}"#;
        assert_eq!(VerifyKey::parse_plain(body), None);
        let request = VerifyKey::parse(body).unwrap();
        assert_eq!((request.key.as_ref(), request.tags.len()), ("kA", 1));
    }

    #[test]
    fn a_plain_verification_copies_nothing() {
        let request = VerifyKey::parse(br#"{"key":"prod_abc"}"#).unwrap();
        assert!(matches!(request.key, Cow::Borrowed("prod_abc")));
    }

    #[test]
    fn keys_in_a_refused_or_printed_verification_stay_secret() {
        let body = br#"{"key":"prod_hunter2","credits":1}"#;
        assert!(!format!("{:?}", VerifyKey::parse(body)).contains("hunter2"));
        let body = br#"{"key":"prod_hunter2"}"#;
        assert!(!format!("{:?}", VerifyKey::parse(body)).contains("hunter2"));
        let body = br#"{"key":["prod_hunter2"], "tags":"prod_hunter2"}"#;
        assert!(!format!("{:?}", VerifyKey::parse(body)).contains("hunter2"));
    }

    #[test]
    fn an_array_isnt_mistaken_for_an_object() {
        let error = VerifyKey::parse(br#"["prod_abc"]"#).unwrap_err();
        assert_eq!(locations(&error), ["/type"]);
    }

    #[test]
    fn the_authorization_header_has_three_ways_to_be_wrong() {
        assert_eq!(authorization(Some(b"Bearer unkey_1")).unwrap(), "unkey_1");
        assert_eq!(authorization(Some(b"Bearer  unkey_1 ")).unwrap(), "unkey_1");
        let missing = authorization(None).unwrap_err();
        assert_eq!((missing.kind, missing.status()), (ErrorKind::AuthenticationMissing, 400));
        assert!(missing.detail.contains("Authorization") && missing.detail.contains("bearer"));
        assert!(missing.errors[0].fix.is_some());
        for header in
            [&b""[..], b"Bearer", b"Bearer ", b"Bearer  ", b"bearer x", b"Basic abc", b"Bearer \xff"]
        {
            let error = authorization(Some(header)).unwrap_err();
            assert_eq!((error.kind, error.status()), (ErrorKind::AuthenticationMalformed, 400));
        }
    }

    #[test]
    fn requests_survive_the_way_from_the_cli() {
        let key = CreateKey::parse(br#"{"apiId":"api_1","prefix":"p","meta":{"a":1},"expires":5}"#).unwrap();
        let body = serde_json::to_vec(&key).unwrap();
        let expected =
            r#"{"apiId":"api_1","prefix":"p","byteLength":16,"meta":{"a":1},"expires":5,"enabled":true}"#;
        assert_eq!(String::from_utf8(body.clone()).unwrap(), expected);
        assert!(CreateKey::parse(&body).is_ok());
        let deletion = DeleteKey { key_id: "key_1".into(), permanent: false };
        assert_eq!(serde_json::to_string(&deletion).unwrap(), r#"{"keyId":"key_1","permanent":false}"#);
        let verification = VerifyKey { key: "k".into(), tags: Vec::new() };
        assert_eq!(serde_json::to_string(&verification).unwrap(), r#"{"key":"k"}"#);
    }

    /// Bodies around the border of what is allowed: valid ones, wrong types, repeats, extras, raw noise.
    fn bodies() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![
            4 => Just("key"),
            2 => Just("tags"),
            1 => Just(r"k\u0065y"),
            1 => Just("ratelimits"),
            1 => Just("apiId"),
            1 => Just("meta"),
            1 => Just("byteLength"),
        ];
        let value = prop_oneof![
            Just(r#""prod_abc""#.to_owned()),
            Just(r#""a\u0041\n""#.to_owned()),
            Just(r#""\ud800""#.to_owned()),
            (0usize..=520).prop_map(|length| format!("\"{}\"", "ä".repeat(length))),
            (0usize..=22).prop_map(|count| format!("[{}]", vec!["\"t\""; count].join(","))),
            (10i64..=300).prop_map(|number| number.to_string()),
            Just(r#"["", "ok"]"#.to_owned()),
            Just(r#"["\ud800"]"#.to_owned()),
            Just("[]".to_owned()),
            Just("null".to_owned()),
            Just("16.0".to_owned()),
            Just("-0".to_owned()),
            Just(r#"{"a":1e999}"#.to_owned()),
            Just(r#"{"a":{"a":1,"a":2}}"#.to_owned()),
        ];
        let members = prop::collection::vec((name, value), 0..4);
        let object = (members, "[ \n]{0,2}", prop_oneof![8 => Just(""), 1 => Just("x"), 1 => Just("}")])
            .prop_map(|(members, space, tail)| {
                let members: Vec<_> =
                    members.iter().map(|(name, value)| format!("{space}\"{name}\"{space}:{value}")).collect();
                format!("{space}{{{}}}{space}{tail}", members.join(",")).into_bytes()
            });
        let damaged = (object, any::<prop::sample::Index>(), any::<u8>(), 0u8..4).prop_map(
            |(mut body, at, byte, damage)| {
                if damage == 0 && !body.is_empty() {
                    let at = at.index(body.len());
                    body[at] = byte;
                }
                body
            },
        );
        prop_oneof![
            8 => damaged,
            1 => Just(br#"["prod_abc"]"#.to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..20)
        ]
    }

    proptest! {
        #[test]
        fn the_quick_way_accepts_only_what_the_schema_accepts(body in bodies()) {
            if let Some(quick) = VerifyKey::parse_plain(&body) {
                prop_assert!(VerifyKey::SCHEMA.check(&body).is_ok());
                let slow: VerifyKey<'_> = serde_json::from_slice(&body).unwrap();
                prop_assert_eq!(quick, slow);
            }
        }

        #[test]
        fn what_a_schema_accepts_can_be_read(body in bodies()) {
            for result in [VerifyKey::parse(&body).err(), CreateKey::parse(&body).err()] {
                prop_assert!(result.is_none_or(|error| error.kind == ErrorKind::InvalidInput));
            }
        }

        #[test]
        fn keys_read_back_as_they_were_sent(key in "\\PC{1,512}") {
            let body = serde_json::to_vec(&VerifyKey { key: key.as_str().into(), tags: Vec::new() }).unwrap();
            prop_assert_eq!(VerifyKey::parse(&body).unwrap().key, key);
        }
    }
}
