//! Checks a request body against its endpoint's schema and reports every problem at once.
//!
//! Locations and messages have the form that Unkey's validator gives them. Values are never repeated in a
//! message: they may be secrets.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Number, Value};

use super::error::{ApiError, ErrorKind, FieldError};

/// Where Unkey's validator finds errors of a body that it can't read.
pub(super) const BODY_LOCATION: &str = "requestBody";

/// Names that one message lists; it only counts the rest.
const LISTED_MAX: usize = 8;

/// Characters of a name from the request that a message repeats.
const NAME_SHOWN_MAX: usize = 64;

const SEND_AN_OBJECT: &str = "send one JSON object as the body";

/// The fields of an endpoint's body.
pub(super) struct Schema {
    pub(super) path: &'static str,
    fields: &'static [Field],
    /// Whether an unknown field is an error.
    strict: bool,
}

pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) required: bool,
    pub(super) nullable: bool,
    pub(super) rule: ValueRule,
}

/// The constraints of a field's value.
pub(super) enum ValueRule {
    /// Lengths in characters.
    Text {
        min: usize,
        max: usize,
        pattern: Option<&'static Pattern>,
    },
    /// A list of texts. `min` and `max` are lengths of each, in characters.
    Texts {
        max_items: usize,
        min: usize,
        max: usize,
        pattern: Option<&'static Pattern>,
    },
    Flag,
    /// A whole number, written without fraction and exponent. JSON also has `-0`: parse it as [`Whole`].
    Integer {
        min: i64,
        max: i64,
    },
    /// Any object. Its size is in bytes of JSON.
    Object {
        max_properties: usize,
        max_bytes: usize,
    },
    /// A field of Unkey's that evictd doesn't support.
    Unsupported(Harmless),
}

/// A number that [`ValueRule::Integer`] accepted. serde_json parses `-0` as a float, which converts to no integer.
#[derive(Clone, Copy)]
pub(super) struct Whole(pub(super) i64);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = Number::deserialize(deserializer)?;
        let zero = number.as_f64().filter(|float| *float == 0.0).map(|_| 0);
        number.as_i64().or(zero).map(Self).ok_or_else(|| D::Error::custom("not a whole number"))
    }
}

/// The value of an unsupported field that requests nothing. SDKs send it by default.
#[derive(Clone, Copy)]
pub(super) enum Harmless {
    Nothing,
    False,
    EmptyList,
    /// Credits that are not counted: `{"remaining": null}`.
    Unlimited,
    /// Credits that are removed, or not counted.
    NullOrUnlimited,
}

/// A pattern as Unkey documents it, and its check.
pub(super) struct Pattern {
    text: &'static str,
    matches: fn(&str) -> bool,
}

pub(super) const ID_PATTERN: Pattern =
    Pattern { text: "^[a-zA-Z0-9_]+$", matches: |text| is_made_of(text, b"_") };

pub(super) const EXTERNAL_ID_PATTERN: Pattern =
    Pattern { text: "^[a-zA-Z0-9_.-]+$", matches: |text| is_made_of(text, b"_.-") };

pub(super) const PERMISSION_PATTERN: Pattern =
    Pattern { text: r"^[a-zA-Z0-9_:\-\.\*]+$", matches: |text| is_made_of(text, b"_:-.*") };

/// Text that every store accepts: PostgreSQL has no NUL.
pub(super) const STORED_PATTERN: Pattern =
    Pattern { text: r"^[^\x00]*$", matches: |text| !text.contains('\0') };

impl Pattern {
    pub(super) fn text(&self) -> &'static str {
        self.text
    }
}

impl Field {
    pub(super) const fn required(name: &'static str, rule: ValueRule) -> Self {
        Self { required: true, ..Self::optional(name, rule) }
    }

    /// May be absent, but not `null`.
    pub(super) const fn optional(name: &'static str, rule: ValueRule) -> Self {
        Self { name, required: false, nullable: false, rule }
    }

    /// May be absent or `null`.
    pub(super) const fn nullable(name: &'static str, rule: ValueRule) -> Self {
        Self { nullable: true, ..Self::optional(name, rule) }
    }

    pub(super) const fn unsupported(name: &'static str, harmless: Harmless) -> Self {
        Self::optional(name, ValueRule::Unsupported(harmless))
    }
}

impl Schema {
    /// Rejects unknown fields.
    pub(super) const fn strict(path: &'static str, fields: &'static [Field]) -> Self {
        Self { path, fields, strict: true }
    }

    /// Ignores unknown fields.
    pub(super) const fn lenient(path: &'static str, fields: &'static [Field]) -> Self {
        Self { path, fields, strict: false }
    }

    pub(super) fn fields(&self) -> &'static [Field] {
        self.fields
    }

    pub(super) fn is_strict(&self) -> bool {
        self.strict
    }

    /// Finds every problem of `body`.
    pub(super) fn check(&self, body: &[u8]) -> Result<(), ApiError> {
        if body.is_empty() {
            let detail = format!("POST request body is empty for '{}'", self.path);
            let problem = fixable(BODY_LOCATION, "the body is empty", SEND_AN_OBJECT);
            return Err(ApiError { errors: vec![problem], ..ApiError::new(ErrorKind::InvalidInput, detail) });
        }
        let problems = match Members::read(body) {
            Ok(members) => self.problems(&members),
            Err(problem) => vec![problem],
        };
        if problems.is_empty() { Ok(()) } else { Err(self.violated(problems)) }
    }

    /// The error of a body with these problems.
    pub(super) fn violated(&self, errors: Vec<FieldError>) -> ApiError {
        let detail = format!("POST request body for '{}' failed to validate schema", self.path);
        ApiError { errors, ..ApiError::new(ErrorKind::InvalidInput, detail) }
    }

    fn problems(&self, members: &Members<'_>) -> Vec<FieldError> {
        let mut problems = Vec::new();
        let matters = |name: &&String| self.strict || self.knows(name);
        let repeated: Vec<_> = members.repeated.iter().filter(matters).collect();
        if !repeated.is_empty() {
            let names = listed(repeated.iter());
            problems.push(fixable(
                BODY_LOCATION,
                format!("properties given more than once: {names}"),
                "send each once",
            ));
        }
        let missing: Vec<_> = self
            .fields
            .iter()
            .filter(|field| field.required && !members.values.contains_key(field.name))
            .map(|field| field.name)
            .collect();
        if !missing.is_empty() {
            let noun = if missing.len() == 1 { "property" } else { "properties" };
            problems.push(plain("/required", format!("missing {noun} {}", listed(missing.iter()))));
        }
        let unknown: Vec<_> = members.values.keys().filter(|name| !self.knows(name)).collect();
        if self.strict && !unknown.is_empty() {
            let message = format!("additional properties {} not allowed", listed(unknown.iter()));
            problems.push(plain("/additionalProperties", message));
        }
        for field in self.fields {
            if let Some(value) = members.values.get(field.name) {
                field.check(value, &mut problems);
            }
        }
        problems
    }

    fn knows(&self, name: &str) -> bool {
        self.fields.iter().any(|field| field.name == name)
    }
}

impl Field {
    fn check(&self, raw: &RawValue, problems: &mut Vec<FieldError>) {
        let value: Value = match serde_json::from_str(raw.get()) {
            Ok(value) => value,
            Err(error) => {
                return problems.push(plain(self.location(""), format!("not readable as JSON: {error}")));
            }
        };
        match (&self.rule, &value) {
            (_, Value::Null) if self.nullable => {}
            (ValueRule::Text { min, max, pattern }, Value::String(text)) => {
                self.check_text("", text, (*min, *max), *pattern, problems);
            }
            (ValueRule::Texts { max_items, min, max, pattern }, Value::Array(items)) => {
                if items.len() > *max_items {
                    problems.push(self.bound("/maxItems", items.len(), *max_items));
                }
                let reported_max = problems.len() + LISTED_MAX;
                for item in items.iter().take(*max_items) {
                    if problems.len() >= reported_max {
                        break;
                    }
                    match item {
                        Value::String(text) => {
                            self.check_text("/items", text, (*min, *max), *pattern, problems);
                        }
                        other => problems.push(self.wrong_type("/items", other, "string")),
                    }
                }
            }
            (ValueRule::Integer { min, max }, Value::Number(number)) => {
                let number = if raw.get() == "-0" { &Number::from(0) } else { number };
                if number.is_f64() {
                    problems.push(self.wrong_type("", &value, "integer"));
                } else if number.as_i64().is_some_and(|number| number < *min) {
                    problems.push(self.bound("/minimum", number, min));
                } else if number.as_i64().is_none_or(|number| number > *max) {
                    problems.push(self.bound("/maximum", number, max));
                }
            }
            (ValueRule::Object { max_properties, max_bytes }, Value::Object(object)) => {
                if object.len() > *max_properties {
                    problems.push(self.bound("/maxProperties", object.len(), *max_properties));
                }
                let bytes = raw.get().len();
                if bytes > *max_bytes {
                    let message = format!("got {bytes} bytes of JSON, want at most {max_bytes}");
                    problems.push(plain(self.location(""), message));
                }
            }
            (ValueRule::Unsupported(harmless), value) if !harmless.is(value) => {
                problems.push(self.unsupported_error(*harmless));
            }
            (ValueRule::Flag, Value::Bool(_)) | (ValueRule::Unsupported(_), _) => {}
            (rule, other) => problems.push(self.wrong_type("", other, rule.type_name())),
        }
    }

    fn check_text(
        &self,
        under: &str,
        text: &str,
        (min, max): (usize, usize),
        pattern: Option<&Pattern>,
        problems: &mut Vec<FieldError>,
    ) {
        let length = text.chars().count();
        if length < min {
            problems.push(self.bound(&format!("{under}/minLength"), length, min));
        } else if length > max {
            problems.push(self.bound(&format!("{under}/maxLength"), length, max));
        }
        if let Some(pattern) = pattern.filter(|pattern| !(pattern.matches)(text)) {
            let message = format!("does not match pattern '{}'", pattern.text);
            problems.push(plain(self.location(&format!("{under}/pattern")), message));
        }
    }

    fn unsupported_error(&self, harmless: Harmless) -> FieldError {
        let instead = match harmless {
            Harmless::Nothing => "leave it out",
            Harmless::Unlimited => "leave it out, or send {\"remaining\": null}",
            Harmless::NullOrUnlimited => "leave it out, or send null",
            Harmless::False => "leave it out, or send false",
            Harmless::EmptyList => "leave it out, or send an empty list",
        };
        fixable(&self.location(""), format!("'{}' is not supported by evictd", self.name), instead)
    }

    fn wrong_type(&self, under: &str, got: &Value, want: &str) -> FieldError {
        plain(self.location(&format!("{under}/type")), format!("got {}, want {want}", type_name(got)))
    }

    fn bound(&self, keyword: &str, got: impl fmt::Display, want: impl fmt::Display) -> FieldError {
        let name = keyword.rsplit('/').next().unwrap_or_default();
        plain(self.location(keyword), format!("{name}: got {got}, want {want}"))
    }

    fn location(&self, keyword: &str) -> String {
        format!("/properties/{}{keyword}", self.name)
    }
}

impl ValueRule {
    fn type_name(&self) -> &'static str {
        match self {
            Self::Text { .. } => "string",
            Self::Texts { .. } => "array",
            Self::Flag => "boolean",
            Self::Integer { .. } => "integer",
            Self::Object { .. } => "object",
            Self::Unsupported(_) => "nothing",
        }
    }
}

impl Harmless {
    fn is(self, value: &Value) -> bool {
        match self {
            Self::Nothing => false,
            Self::False => *value == Value::Bool(false),
            Self::EmptyList => value.as_array().is_some_and(Vec::is_empty),
            Self::Unlimited => is_unlimited(value),
            Self::NullOrUnlimited => value.is_null() || is_unlimited(value),
        }
    }
}

/// The members of a JSON object, their values still as text. Unlike a JSON map it keeps repeated names.
struct Members<'a> {
    values: BTreeMap<String, &'a RawValue>,
    repeated: Vec<String>,
}

impl<'a> Members<'a> {
    fn read(body: &'a [u8]) -> Result<Self, FieldError> {
        let unreadable = |problem: String| fixable(BODY_LOCATION, problem, SEND_AN_OBJECT);
        let text = std::str::from_utf8(body)
            .map_err(|error| unreadable(format!("the body isn't UTF-8 text: {error}")))?;
        let not_json = |error| unreadable(format!("the body isn't JSON: {error}"));
        let raw: &RawValue = serde_json::from_str(text).map_err(not_json)?;
        if !raw.get().starts_with('{') {
            let other = serde_json::from_str(raw.get()).unwrap_or_default();
            return Err(plain("/type", format!("got {}, want object", type_name(&other))));
        }
        serde_json::from_str(raw.get()).map_err(not_json)
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Members { values: BTreeMap::new(), repeated: Vec::new() };
        while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
            match members.values.entry(name) {
                Entry::Vacant(free) => {
                    free.insert(value);
                }
                Entry::Occupied(taken) => members.repeated.push(taken.key().clone()),
            }
        }
        Ok(members)
    }
}

/// Whether these credits are no limit: `{"remaining": null}`, and no refill.
fn is_unlimited(credits: &Value) -> bool {
    credits
        .as_object()
        .is_some_and(|credits| credits.len() == 1 && credits.get("remaining") == Some(&Value::Null))
}

/// Whether `text` isn't empty and has only ASCII letters, digits, and the characters of `others`.
fn is_made_of(text: &str, others: &[u8]) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || others.contains(&byte))
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// `'a', 'b' and 3 more`.
fn listed(names: impl ExactSizeIterator<Item = impl AsRef<str>>) -> String {
    let more = names.len().saturating_sub(LISTED_MAX);
    let shown: Vec<_> = names.take(LISTED_MAX).map(|name| format!("'{}'", clipped(name.as_ref()))).collect();
    let shown = shown.join(", ");
    if more == 0 { shown } else { format!("{shown} and {more} more") }
}

pub(super) fn clipped(name: &str) -> Cow<'_, str> {
    match name.char_indices().nth(NAME_SHOWN_MAX) {
        Some((end, _)) => Cow::Owned(format!("{}...", &name[..end])),
        None => Cow::Borrowed(name),
    }
}

fn plain(location: impl Into<String>, message: impl Into<String>) -> FieldError {
    FieldError { location: location.into(), message: message.into(), fix: None }
}

fn fixable(location: &str, message: impl Into<String>, fix: &str) -> FieldError {
    FieldError { fix: Some(fix.to_owned()), ..plain(location, message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: Schema = Schema::strict(
        "/v2/test",
        &[
            Field::required("id", ValueRule::Text { min: 3, max: 5, pattern: Some(&ID_PATTERN) }),
            Field::optional("flag", ValueRule::Flag),
            Field::optional("count", ValueRule::Integer { min: 16, max: 255 }),
            Field::optional("tags", ValueRule::Texts { max_items: 2, min: 1, max: 3, pattern: None }),
            Field::optional("meta", ValueRule::Object { max_properties: 1, max_bytes: 20 }),
            Field::unsupported("roles", Harmless::EmptyList),
            Field::unsupported("decrypt", Harmless::False),
            Field::unsupported("credits", Harmless::Nothing),
        ],
    );

    /// Each problem as `location: message`.
    fn problems(body: impl AsRef<[u8]>) -> Vec<String> {
        match SCHEMA.check(body.as_ref()) {
            Ok(()) => Vec::new(),
            Err(error) => {
                assert_eq!(error.kind, ErrorKind::InvalidInput);
                assert_eq!(error.detail, "POST request body for '/v2/test' failed to validate schema");
                error.errors.iter().map(|error| format!("{}: {}", error.location, error.message)).collect()
            }
        }
    }

    #[test]
    fn a_valid_body_passes() {
        assert_eq!(problems(r#"{"id":"abc"}"#), [""; 0]);
        let all = r#" {"id":"a_1","flag":true,"count":16,"tags":["a","äöü"],"meta":{"a":{"b":[]}},
            "roles":[],"decrypt":false} "#;
        assert_eq!(problems(all), [""; 0]);
    }

    #[test]
    fn every_problem_is_reported() {
        assert_eq!(
            problems(r#"{"flag":1,"count":2,"tags":["","abcd"],"extra":0,"more":0}"#),
            [
                "/required: missing property 'id'",
                "/additionalProperties: additional properties 'extra', 'more' not allowed",
                "/properties/flag/type: got number, want boolean",
                "/properties/count/minimum: minimum: got 2, want 16",
                "/properties/tags/items/minLength: minLength: got 0, want 1",
                "/properties/tags/items/maxLength: maxLength: got 4, want 3",
            ]
        );
    }

    #[test]
    fn text_is_measured_in_characters() {
        assert_eq!(problems(r#"{"id":"ab"}"#), ["/properties/id/minLength: minLength: got 2, want 3"]);
        assert_eq!(problems(r#"{"id":"abcdef"}"#), ["/properties/id/maxLength: maxLength: got 6, want 5"]);
        assert_eq!(problems(r#"{"id":"abcde"}"#), [""; 0]);
        assert_eq!(
            problems(r#"{"id":"äöü"}"#),
            ["/properties/id/pattern: does not match pattern '^[a-zA-Z0-9_]+$'"]
        );
    }

    #[test]
    fn null_is_not_absence() {
        assert_eq!(
            problems(r#"{"id":null,"tags":null}"#),
            ["/properties/id/type: got null, want string", "/properties/tags/type: got null, want array"]
        );
    }

    #[test]
    fn numbers_are_whole_and_in_range() {
        for (count, problem) in [
            ("256", "maximum: maximum: got 256, want 255"),
            ("18446744073709551615", "maximum: maximum: got 18446744073709551615, want 255"),
            ("-1", "minimum: minimum: got -1, want 16"),
            ("-0", "minimum: minimum: got 0, want 16"),
            ("16.5", "type: got number, want integer"),
            ("1e2", "type: got number, want integer"),
            ("\"16\"", "type: got string, want integer"),
        ] {
            let body = format!(r#"{{"id":"abc","count":{count}}}"#);
            assert_eq!(problems(body), [format!("/properties/count/{problem}")]);
        }
    }

    #[test]
    fn lists_and_objects_are_bounded() {
        assert_eq!(
            problems(r#"{"id":"abc","tags":["a","b","c"],"meta":{"a":1,"b":2}}"#),
            [
                "/properties/tags/maxItems: maxItems: got 3, want 2",
                "/properties/meta/maxProperties: maxProperties: got 2, want 1"
            ]
        );
        assert_eq!(
            problems(r#"{"id":"abc","meta":{"a":"0123456789abcdef"}}"#),
            ["/properties/meta: got 24 bytes of JSON, want at most 20"]
        );
        assert_eq!(
            problems(r#"{"id":"abc","tags":[1]}"#),
            ["/properties/tags/items/type: got number, want string"]
        );
    }

    #[test]
    fn unsupported_fields_are_rejected_unless_harmless() {
        assert_eq!(
            problems(r#"{"id":"abc","roles":["a"],"decrypt":true,"credits":{"cost":1}}"#),
            [
                "/properties/roles: 'roles' is not supported by evictd",
                "/properties/decrypt: 'decrypt' is not supported by evictd",
                "/properties/credits: 'credits' is not supported by evictd"
            ]
        );
        let error = SCHEMA.check(br#"{"id":"abc","decrypt":true}"#).unwrap_err();
        assert_eq!(error.errors[0].fix.as_deref(), Some("leave it out, or send false"));
    }

    #[test]
    fn repeated_properties_are_rejected() {
        assert_eq!(
            problems(r#"{"id":"abc","id":"abc"}"#),
            ["requestBody: properties given more than once: 'id'"]
        );
        // The same name, spelled with an escape.
        assert_eq!(
            problems(r#"{"id":"abc","i\u0064":"abc"}"#),
            ["requestBody: properties given more than once: 'id'"]
        );
    }

    #[test]
    fn bodies_other_than_objects_are_rejected() {
        for (body, problem) in [
            (" \n", "requestBody: the body isn't JSON: EOF while parsing a value at line 2 column 0"),
            ("[]", "/type: got array, want object"),
            ("null", "/type: got null, want object"),
            ("\"id\"", "/type: got string, want object"),
            ("{", "requestBody: the body isn't JSON: EOF while parsing an object at line 1 column 1"),
            ("{} x", "requestBody: the body isn't JSON: trailing characters at line 1 column 4"),
            ("{'id':1}", "requestBody: the body isn't JSON: key must be a string at line 1 column 2"),
        ] {
            assert_eq!(problems(body), [problem], "{body}");
        }
        let problem = &problems(b"{\"id\":\"\xff\"}")[0];
        assert!(problem.starts_with("requestBody: the body isn't UTF-8 text"), "{problem}");
    }

    #[test]
    fn an_empty_body_has_a_detail_of_its_own() {
        let error = SCHEMA.check(b"").unwrap_err();
        assert_eq!(error.detail, "POST request body is empty for '/v2/test'");
        let places: Vec<_> = error.errors.iter().map(|error| error.location.as_str()).collect();
        assert_eq!((error.kind, &places[..]), (ErrorKind::InvalidInput, &["requestBody"][..]));
    }

    #[test]
    fn text_that_isnt_unicode_is_rejected_at_any_depth() {
        for body in
            [r#"{"id":"\ud800"}"#, r#"{"id":"abc","meta":{"a":"\ud800"}}"#, r#"{"id":"abc","\ud800":1}"#]
        {
            assert_eq!(problems(body).len(), 1, "{body}");
        }
    }

    #[test]
    fn answers_stay_small_for_any_request() {
        let long = "x".repeat(10_000);
        let members: Vec<_> = (0..1000).map(|n| format!(r#""{long}{n}":1"#)).collect();
        let problems = problems(format!("{{{}}}", members.join(",")));
        assert!(problems.iter().map(String::len).sum::<usize>() < 1000, "{problems:?}");
        assert!(problems[1].contains("and 992 more"));
    }

    #[test]
    fn only_the_first_problems_of_a_list_are_reported() {
        const LISTS: Schema = Schema::strict(
            "/v2/test",
            &[Field::optional(
                "list",
                ValueRule::Texts { max_items: 1000, min: 1, max: 3, pattern: Some(&ID_PATTERN) },
            )],
        );
        for item in ["\"-\"", "7", "\"\""] {
            let body = format!(r#"{{"list":[{}]}}"#, vec![item; 1000].join(","));
            assert_eq!(LISTS.check(body.as_bytes()).unwrap_err().errors.len(), LISTED_MAX, "{item}");
        }
    }
}
