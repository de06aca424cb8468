//! Requests at the limits of every field.

use evictd_wire::api::error::{ErrorKind, JSON};
use evictd_wire::api::requests;
use serde_json::json;

use crate::table::{
    CREATE_API, CREATE_KEY, Characters, DELETE_API, DELETE_KEY, ENDPOINTS, EndpointRow, FieldRow, GET_API,
    GET_KEY, GET_RECEIPT, LIST_KEYS, REROLL_KEY, RuleRow, UPDATE_KEY, VERIFY_KEY,
};

/// The longest text tried where there is no limit.
const LONG: usize = 10_000;

/// The first half of a surrogate pair alone, which is no text.
const HALF_A_CHARACTER: &str = r#""\ud800""#;

/// The deepest nesting of objects and lists, the outermost included.
const DEPTH_MAX: usize = 127;

/// A value as JSON, and the keywords of its field that reject it. None: the value is accepted.
type Case = (String, &'static [&'static str]);

impl EndpointRow {
    /// A body of these members; the required ones that aren't among them are added.
    fn body(&self, members: &[(&str, &str)]) -> Vec<u8> {
        let given = |field: &&FieldRow| members.iter().any(|(name, _)| *name == field.name);
        let others = self.fields.iter().filter(|field| field.required && !given(field));
        let others: Vec<_> = others.map(|field| (field.name, field.rule.fine())).collect();
        let others = others.iter().map(|(name, value)| (*name, value.as_str()));
        let members: Vec<_> = others
            .chain(members.iter().copied())
            .map(|(name, value)| format!("\"{name}\":{value}"))
            .collect();
        format!("{{{}}}", members.join(",")).into_bytes()
    }

    fn takes(&self, body: &[u8], why: &str) {
        if let Err(error) = (self.parse)(body) {
            panic!("{}, {why}: {error:?} in {}", self.path, shown(body));
        }
    }

    /// Asserts that the body is rejected as Unkey's validator does, at these locations.
    fn refuses(&self, body: &[u8], locations: &[String], why: &str) {
        let context = || format!("{}, {why}: {}", self.path, shown(body));
        let error = (self.parse)(body).expect_err(&context());
        assert_eq!((error.status(), error.kind), (400, ErrorKind::InvalidInput), "{}", context());
        assert_eq!(
            error.kind.type_url(),
            "https://unkey.com/docs/errors/unkey/application/invalid_input",
            "{}",
            context()
        );
        assert_eq!(error.content_type(Some("*/*")), JSON, "{}", context());
        assert_eq!(error.detail, format!("POST request body for '{}' failed to validate schema", self.path));
        let reported: Vec<_> = error.errors.iter().map(|error| error.location.clone()).collect();
        assert_eq!(reported, locations, "{}", context());
    }

    /// Tries each field at each of its limits.
    fn enforces_its_limits(&self) {
        for field in self.fields {
            for (value, keywords) in field.cases() {
                let body = self.body(&[(field.name, &value)]);
                if keywords.is_empty() {
                    self.takes(&body, field.name);
                } else {
                    let place = |keyword: &&str| format!("/properties/{}{keyword}", field.name);
                    let places: Vec<_> = keywords.iter().map(place).collect();
                    self.refuses(&body, &places, field.name);
                }
            }
        }
    }
}

impl FieldRow {
    fn cases(&self) -> Vec<Case> {
        let mut cases = self.rule.cases();
        cases.extend(self.rule.other_types().into_iter().map(|value| (value, &["/type"][..])));
        if !matches!(self.rule, RuleRow::LeftOut { .. }) {
            cases.push(("null".to_owned(), if self.nullable { &[] } else { &["/type"] }));
        }
        cases
    }
}

impl RuleRow {
    /// An accepted value.
    fn fine(self) -> String {
        match self {
            Self::Text { min, .. } => quoted(&"a".repeat(min.max(1))),
            Self::List { .. } | Self::LeftOut { .. } => "[]".to_owned(),
            Self::Integer { min, .. } => min.to_string(),
            Self::Flag => "true".to_owned(),
            Self::Object => "{}".to_owned(),
        }
    }

    /// Values of its own type, at its limits and beyond.
    fn cases(self) -> Vec<Case> {
        match self {
            Self::Text { min, max, of } => {
                let mut cases = texts(min, max, of, &TEXT_KEYWORDS);
                cases.push((HALF_A_CHARACTER.to_owned(), &[""]));
                cases
            }
            Self::List { max_items, min, max, of } => lists(max_items, min, max, of),
            Self::Integer { min, max } => integers(min, max),
            Self::Flag => vec![("true".to_owned(), &[]), ("false".to_owned(), &[])],
            Self::Object => objects(),
            Self::LeftOut { harmless } => left_out(harmless),
        }
    }

    /// One value of each type that it isn't.
    fn other_types(self) -> Vec<String> {
        let own = match self {
            Self::Text { .. } => "\"a\"",
            Self::List { .. } => "[]",
            Self::Integer { .. } => "7",
            Self::Flag => "true",
            Self::Object => "{}",
            Self::LeftOut { .. } => return Vec::new(),
        };
        let all = ["\"a\"", "[]", "7", "true", "{}"];
        all.into_iter().filter(|other| *other != own).map(str::to_owned).collect()
    }
}

/// The keywords of errors about a text.
struct TextKeywords {
    min: &'static [&'static str],
    max: &'static [&'static str],
    pattern: &'static [&'static str],
    min_and_pattern: &'static [&'static str],
}

const TEXT_KEYWORDS: TextKeywords = TextKeywords {
    min: &["/minLength"],
    max: &["/maxLength"],
    pattern: &["/pattern"],
    min_and_pattern: &["/minLength", "/pattern"],
};

const ITEM_KEYWORDS: TextKeywords = TextKeywords {
    min: &["/items/minLength"],
    max: &["/items/maxLength"],
    pattern: &["/items/pattern"],
    min_and_pattern: &["/items/minLength", "/items/pattern"],
};

fn texts(min: usize, max: usize, of: Characters, keywords: &TextKeywords) -> Vec<Case> {
    let mut cases: Vec<Case> = vec![(quoted(&"a".repeat(min)), &[])];
    if min > 0 {
        // Empty text violates the pattern too.
        let short = if min == 1 && of.is_named() { keywords.min_and_pattern } else { keywords.min };
        cases.push((quoted(&"a".repeat(min - 1)), short));
    }
    // Characters count, not bytes; and an escape is one character.
    let longest = if of.holds('ä') { "ä" } else { "a" };
    cases.push((quoted(&longest.repeat(max.min(LONG))), &[]));
    if max < LONG {
        cases.push((quoted(&longest.repeat(max + 1)), keywords.max));
        cases.push((format!("\"{}\"", "\\u0061".repeat(max)), &[]));
    }
    let room = "a".repeat(min.max(1));
    for character in ('\0'..='\u{7f}').chain(['ä', '\u{212a}', '🔑']) {
        let text = quoted(&format!("{}{character}", &room[1..]));
        cases.push((text, if of.holds(character) { &[] } else { keywords.pattern }));
    }
    cases
}

fn lists(max_items: usize, min: usize, max: usize, of: Characters) -> Vec<Case> {
    let list = |items: &[String]| format!("[{}]", items.join(","));
    let item = quoted(&"a".repeat(max));
    let mut cases: Vec<Case> = vec![
        (list(&[]), &[]),
        (list(&vec![item.clone(); max_items]), &[]),
        (list(&vec![item.clone(); max_items + 1]), &["/maxItems"]),
        (list(&[HALF_A_CHARACTER.to_owned()]), &[""]),
    ];
    for (text, keywords) in texts(min, max, of, &ITEM_KEYWORDS) {
        cases.push((list(&[item.clone(), text]), keywords));
    }
    for other in ["null", "7", "true", "[]", "{}"] {
        cases.push((list(&[item.clone(), other.to_owned()]), &["/items/type"]));
    }
    cases
}

fn integers(min: i64, max: i64) -> Vec<Case> {
    vec![
        ((min - 1).to_string(), &["/minimum"]),
        (min.to_string(), &[]),
        (max.to_string(), &[]),
        ((max + 1).to_string(), &["/maximum"]),
        (u64::MAX.to_string(), &["/maximum"]),
        (i64::MIN.to_string(), &["/minimum"]),
        ("-0".to_owned(), if min > 0 { &["/minimum"] } else { &[] }),
        ("-0.0".to_owned(), &["/type"]),
        (format!("{min}.5"), &["/type"]),
        // Whole numbers for JSON Schema, but not integers.
        (format!("{min}.0"), &["/type"]),
        (format!("{min}e0"), &["/type"]),
        // More than any number type holds.
        ("1e999".to_owned(), &[""]),
    ]
}

fn objects() -> Vec<Case> {
    let object = |properties: usize| {
        let members: Vec<_> = (0..properties).map(|n| format!("\"{n}\":[null]")).collect();
        format!("{{{}}}", members.join(","))
    };
    let sized = |bytes: usize| format!(r#"{{"a":"{}"}}"#, "x".repeat(bytes - r#"{"a":""}"#.len()));
    vec![
        (object(0), &[]),
        (object(100), &[]),
        (object(101), &["/maxProperties"]),
        (sized(16 * 1024), &[]),
        (sized(16 * 1024 + 1), &[""]),
        (format!("{{\"a\":{HALF_A_CHARACTER}}}"), &[""]),
        (nested(DEPTH_MAX), &[]),
        (nested(DEPTH_MAX + 1), &[""]),
        ("{\"a\":-1.7e308}".to_owned(), &[]),
        ("{\"a\":1.8e308}".to_owned(), &[""]),
    ]
}

/// Objects nested so deep.
fn nested(depth: usize) -> String {
    format!("{}{{}}{}", "{\"a\":".repeat(depth - 1), "}".repeat(depth - 1))
}

/// The value is rejected as a whole, whatever its content.
fn left_out(harmless: &'static [&'static str]) -> Vec<Case> {
    let values = [
        "null",
        "false",
        "true",
        "0",
        "\"a\"",
        "[]",
        "{}",
        "[null]",
        r#"{"cost":1,"unknown":[{}]}"#,
        r#"{"remaining":null}"#,
        r#"{"remaining":null,"refill":{"interval":"daily","amount":1}}"#,
        r#"{"refill":null}"#,
        r#"{"remaining":0}"#,
    ];
    let keywords = |value| if harmless.contains(&value) { &[][..] } else { &[""] };
    values.into_iter().map(|value| (value.to_owned(), keywords(value))).collect()
}

impl Characters {
    fn holds(self, character: char) -> bool {
        match self {
            Self::Any => true,
            Self::Stored => character != '\0',
            Self::LettersDigitsAnd(others) => character.is_ascii_alphanumeric() || others.contains(character),
        }
    }

    /// Whether the pattern lists characters and requires at least one.
    fn is_named(self) -> bool {
        matches!(self, Self::LettersDigitsAnd(_))
    }
}

fn quoted(text: &str) -> String {
    json!(text).to_string()
}

fn shown(body: &[u8]) -> String {
    String::from_utf8_lossy(body).chars().take(200).collect()
}

#[test]
fn create_api_enforces_the_limits_of_each_field() {
    CREATE_API.enforces_its_limits();
}

#[test]
fn get_api_enforces_the_limits_of_each_field() {
    GET_API.enforces_its_limits();
}

#[test]
fn delete_api_enforces_the_limits_of_each_field() {
    DELETE_API.enforces_its_limits();
}

#[test]
fn list_keys_enforces_the_limits_of_each_field() {
    LIST_KEYS.enforces_its_limits();
}

#[test]
fn create_key_enforces_the_limits_of_each_field() {
    CREATE_KEY.enforces_its_limits();
}

#[test]
fn get_key_enforces_the_limits_of_each_field() {
    GET_KEY.enforces_its_limits();
}

#[test]
fn update_key_enforces_the_limits_of_each_field() {
    UPDATE_KEY.enforces_its_limits();
}

#[test]
fn reroll_key_enforces_the_limits_of_each_field() {
    REROLL_KEY.enforces_its_limits();
}

#[test]
fn delete_key_enforces_the_limits_of_each_field() {
    DELETE_KEY.enforces_its_limits();
}

#[test]
fn verify_key_enforces_the_limits_of_each_field() {
    VERIFY_KEY.enforces_its_limits();
}

#[test]
fn get_receipt_enforces_the_limits_of_each_field() {
    GET_RECEIPT.enforces_its_limits();
}

#[test]
fn every_endpoint_that_reads_a_body_is_in_the_table() {
    let known = requests::Endpoint::ALL.into_iter().filter(|endpoint| !endpoint.is_open());
    let known = known.map(requests::Endpoint::path);
    assert_eq!(known.collect::<Vec<_>>(), ENDPOINTS.map(|endpoint| endpoint.path));
}

#[test]
fn a_missing_required_field_is_rejected() {
    for endpoint in ENDPOINTS {
        endpoint.refuses(b"{}", &["/required".to_owned()], "nothing at all");
        for missing in endpoint.fields.iter().filter(|field| field.required) {
            let others = endpoint.fields.iter().filter(|field| field.required && field.name != missing.name);
            let others: Vec<_> =
                others.map(|field| format!("\"{}\":{}", field.name, field.rule.fine())).collect();
            let body = format!("{{{}}}", others.join(","));
            endpoint.refuses(body.as_bytes(), &["/required".to_owned()], missing.name);
        }
    }
}

#[test]
fn unknown_fields_are_rejected_except_by_the_lenient_endpoint() {
    for endpoint in ENDPOINTS {
        for name in ["unknown", "KeyId", "api_id", "", "0"] {
            let body = endpoint.body(&[(name, "null")]);
            if endpoint.strict {
                endpoint.refuses(&body, &["/additionalProperties".to_owned()], name);
            } else {
                endpoint.takes(&body, name);
                endpoint.takes(&endpoint.body(&[(name, "1"), (name, "[{}]")]), name);
            }
        }
    }
    assert_eq!(ENDPOINTS.iter().filter(|endpoint| !endpoint.strict).count(), 1);
}

#[test]
fn a_repeated_field_is_rejected() {
    for endpoint in ENDPOINTS {
        for field in endpoint.fields {
            let harmless = match field.rule {
                RuleRow::LeftOut { harmless } => harmless.first().map(|value| (*value).to_owned()),
                rule => Some(rule.fine()),
            };
            let Some(value) = harmless else { continue };
            let body = endpoint.body(&[(field.name, &value), (field.name, &value)]);
            endpoint.refuses(&body, &["requestBody".to_owned()], field.name);
            // The same name, its first character spelled as an escape.
            let escaped = format!("\\u{:04x}{}", u32::from(field.name.as_bytes()[0]), &field.name[1..]);
            let body = endpoint.body(&[(field.name, &value), (&escaped, &value)]);
            endpoint.refuses(&body, &["requestBody".to_owned()], field.name);
        }
    }
}

#[test]
fn a_body_that_is_no_json_object_is_rejected() {
    for endpoint in ENDPOINTS {
        for (body, location) in [
            (&b" \n\t"[..], "requestBody"),
            (b"{", "requestBody"),
            (b"{}{}", "requestBody"),
            (b"{\"a\":1,}", "requestBody"),
            (b"\xef\xbb\xbf{}", "requestBody"),
            (b"{\"a\":\"\xff\"}", "requestBody"),
            (b"null", "/type"),
            (b"[]", "/type"),
            (b"\"keyId\"", "/type"),
            (b"1", "/type"),
        ] {
            endpoint.refuses(body, &[location.to_owned()], "no object");
        }
        let empty = (endpoint.parse)(b"").unwrap_err();
        assert_eq!(empty.detail, format!("POST request body is empty for '{}'", endpoint.path));
        assert_eq!((empty.kind, empty.errors[0].location.as_str()), (ErrorKind::InvalidInput, "requestBody"));
    }
}

#[test]
fn all_problems_of_a_request_are_reported_at_once() {
    let body = br#"{"apiId":"a","byteLength":15,"permissions":["", "ok", 1],"roles":["x"],"more":1}"#;
    let places = [
        "/additionalProperties",
        "/properties/apiId/minLength",
        "/properties/byteLength/minimum",
        "/properties/permissions/items/minLength",
        "/properties/permissions/items/pattern",
        "/properties/permissions/items/type",
        "/properties/roles",
    ];
    CREATE_KEY.refuses(body, &places.map(str::to_owned), "seven things");
}
