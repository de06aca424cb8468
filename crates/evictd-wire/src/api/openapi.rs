//! The OpenAPI document of what evictd implements, made from the schemas that check the requests.
//!
//! Each daemon serves its own at [`OPENAPI_PATH`](super::requests::OPENAPI_PATH). A field that evictd leaves out is
//! there only with the values that it accepts because they request nothing.

use evictd_core::record::Verdict;
use serde_json::{Map, Value, json};

use super::error::{JSON, PROBLEM_JSON};
use super::prefer;
use super::requests::Endpoint;
use super::schema::{Field, Harmless, Pattern, Schema, ValueRule};

/// The content type of the document.
pub const YAML: &str = "application/yaml";

/// The daemon that a document is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ApiKind {
    /// The publisher's, with every endpoint.
    Control,
    /// An agent's.
    Verify,
}

impl ApiKind {
    /// Whether this daemon serves the endpoint.
    pub fn serves(self, endpoint: Endpoint) -> bool {
        self == Self::Control || matches!(endpoint, Endpoint::VerifyKey | Endpoint::OpenApi)
    }

    /// Returns the statuses of an endpoint's answers in the envelope.
    pub fn statuses(self, endpoint: Endpoint) -> Vec<u16> {
        if matches!(endpoint, Endpoint::Liveness | Endpoint::OpenApi) {
            return vec![200];
        }
        let mut statuses = vec![200, 400, 401, 403, 408, 413];
        if self == Self::Control {
            statuses.extend([429, 500]);
        }
        statuses.extend(match endpoint {
            Endpoint::CreateApi => &[503][..],
            Endpoint::CreateKey | Endpoint::RerollKey => &[404, 409, 503],
            Endpoint::UpdateKey | Endpoint::DeleteKey => &[404, 503],
            Endpoint::DeleteApi => &[404, 412, 503],
            Endpoint::VerifyKey => &[503],
            Endpoint::GetApi | Endpoint::ListKeys | Endpoint::GetKey | Endpoint::GetReceipt => &[404],
            Endpoint::Liveness | Endpoint::OpenApi => &[],
        });
        statuses.sort_unstable();
        statuses
    }
}

/// Makes the document, as JSON.
pub fn document(api: ApiKind) -> Value {
    let (name, about) = match api {
        ApiKind::Control => ("control API", "A publisher serves it."),
        ApiKind::Verify => ("verify API", "An agent serves it."),
    };
    let paths: Map<_, _> = Endpoint::ALL
        .into_iter()
        .filter(|endpoint| api.serves(*endpoint))
        .map(|endpoint| (endpoint.path().to_owned(), path_item(api, endpoint)))
        .collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": format!("evictd {name}"),
            "version": env!("CARGO_PKG_VERSION"),
            "description": format!(
                "{about} It is the part of Unkey's v2 API that evictd implements, and evictd's own receipts. \
                 docs/unkey-compatibility.md explains each field, answer and difference."
            ),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [{ "rootKey": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "rootKey": { "type": "http", "scheme": "bearer", "description": "A root key." },
            },
            "schemas": schemas(),
        },
    })
}

fn path_item(api: ApiKind, endpoint: Endpoint) -> Value {
    let name = endpoint.path().trim_start_matches("/v2/").trim_start_matches('/');
    let mut responses: Map<_, _> = api
        .statuses(endpoint)
        .into_iter()
        .filter(|status| *status != 200)
        .map(|status| (status.to_string(), failure(status)))
        .collect();
    responses.insert("200".to_owned(), success(endpoint));
    let mut operation = json!({
        "operationId": name,
        "summary": summary(endpoint),
        "responses": responses,
    });
    let Some(schema) = endpoint.schema() else {
        operation["security"] = json!([]);
        return json!({ "get": operation });
    };
    operation["requestBody"] =
        json!({ "required": true, "content": { JSON: { "schema": schema.to_json_schema() } } });
    if is_change(endpoint) && api == ApiKind::Control {
        operation["parameters"] = json!([{
            "name": prefer::PREFER,
            "in": "header",
            "description": "`wait=<seconds>` delays the answer until every region has confirmed the change, at most so \
                            long. The answer then has the receipt.",
            "schema": { "type": "string" },
        }]);
    }
    json!({ "post": operation })
}

fn is_change(endpoint: Endpoint) -> bool {
    use Endpoint::{CreateApi, CreateKey, DeleteApi, DeleteKey, RerollKey, UpdateKey};
    matches!(endpoint, CreateApi | DeleteApi | CreateKey | UpdateKey | RerollKey | DeleteKey)
}

fn summary(endpoint: Endpoint) -> &'static str {
    match endpoint {
        Endpoint::CreateApi => "Creates an API, a namespace of keys.",
        Endpoint::GetApi => "Shows an API.",
        Endpoint::DeleteApi => "Deletes an API. Every region stops accepting its keys within the bound.",
        Endpoint::ListKeys => "Lists the keys of an API, a page at a time.",
        Endpoint::CreateKey => "Creates a key. No other answer contains it.",
        Endpoint::GetKey => "Shows the settings of a key.",
        Endpoint::UpdateKey => "Changes settings of a key. Absent ones stay, null clears.",
        Endpoint::RerollKey => "Replaces a key with a new one, and ends the old one after a grace period.",
        Endpoint::DeleteKey => "Deletes a key. Every region stops accepting it within the bound.",
        Endpoint::VerifyKey => "Verifies a key. The answer is a success whatever the verdict.",
        Endpoint::GetReceipt => "Shows how far a change has propagated.",
        Endpoint::Liveness => "Answers while the process runs.",
        Endpoint::OpenApi => "Returns this document.",
    }
}

/// The answer with status 200.
fn success(endpoint: Endpoint) -> Value {
    let data = match endpoint {
        Endpoint::OpenApi => {
            return json!({ "description": "This document.", "content": { YAML: { "schema": { "type": "string" } } } });
        }
        Endpoint::DeleteApi | Endpoint::UpdateKey | Endpoint::DeleteKey => object(&[], &[]),
        Endpoint::CreateApi => object(&["apiId"], &[("apiId", text())]),
        Endpoint::GetApi => object(&["id", "name"], &[("id", text()), ("name", text())]),
        Endpoint::ListKeys => json!({ "type": "array", "items": schema_ref("Key") }),
        Endpoint::CreateKey | Endpoint::RerollKey => {
            object(&["keyId", "key"], &[("keyId", text()), ("key", text())])
        }
        Endpoint::GetKey => schema_ref("Key"),
        Endpoint::VerifyKey => schema_ref("Verification"),
        Endpoint::GetReceipt => schema_ref("Propagation"),
        Endpoint::Liveness => object(&["message"], &[("message", text())]),
    };
    let mut required = vec!["meta", "data"];
    let mut properties = vec![("meta", schema_ref("Meta")), ("data", data)];
    if endpoint == Endpoint::ListKeys {
        required.push("pagination");
        properties.push(("pagination", schema_ref("Pagination")));
    }
    json!({ "description": "Success.", "content": { JSON: { "schema": object(&required, &properties) } } })
}

/// The answer with another status. Whether its type is of plain JSON or of problem details depends on `Accept`.
fn failure(status: u16) -> Value {
    let description = match status {
        400 => "The request is malformed, or requests what evictd leaves out.",
        401 => "The root key is unknown, revoked, or an ordinary key.",
        403 => "The root key may not do this, or is disabled or expired.",
        404 => "It doesn't exist in the root key's workspace.",
        408 => "The body took too long.",
        409 => "A key with the same text exists.",
        412 => "The API is protected from deletion.",
        413 => "The body is too large.",
        429 => "The workspace sent more requests than it may.",
        503 => {
            "It can't be proven that the answer would be new enough, or that agents would receive the change."
        }
        _ => "The home store failed.",
    };
    let content_types: &[_] = if status == 429 { &[PROBLEM_JSON] } else { &[JSON, PROBLEM_JSON] };
    let content: Map<_, _> = content_types
        .iter()
        .map(|content_type| ((*content_type).to_owned(), json!({ "schema": schema_ref("Failure") })))
        .collect();
    let mut response = json!({ "description": description, "content": content });
    if status == 429 {
        let seconds = |of: &str| json!({ "description": of, "schema": { "type": "integer" } });
        response["headers"] = json!({
            "Retry-After": seconds("Seconds until the minute ends. Absent if the limit is 0."),
        });
    }
    response
}

fn schemas() -> Value {
    let number = || json!({ "type": "number" });
    let whole = || json!({ "type": "integer" });
    let flag = || json!({ "type": "boolean" });
    let texts = || json!({ "type": "array", "items": { "type": "string" } });
    let meta = || json!({ "type": "object", "description": "Byte for byte as it was given." });
    let millis = || json!({ "type": "integer", "description": "Milliseconds since 1970." });
    let states = |own: &[&str]| json!({ "type": "string", "enum": own });
    let field_error =
        object(&["location", "message"], &[("location", text()), ("message", text()), ("fix", text())]);
    let stale = object(&["ageSeconds"], &[("ageSeconds", whole())]);
    let identity = object(&["id", "externalId"], &[("id", text()), ("externalId", text())]);
    let problem = object(
        &["title", "detail", "status", "type"],
        &[
            ("title", text()),
            ("detail", text()),
            ("status", whole()),
            ("type", json!({ "type": "string", "description": "Identifies the kind of error." })),
            ("errors", json!({ "type": "array", "items": schema_ref("FieldError") })),
        ],
    );
    let key = object(
        &["keyId", "start", "enabled", "createdAt"],
        &[
            ("keyId", text()),
            ("start", text()),
            ("enabled", flag()),
            ("createdAt", millis()),
            ("name", text()),
            ("meta", meta()),
            ("updatedAt", millis()),
            ("expires", millis()),
            ("permissions", texts()),
            ("identity", schema_ref("Identity")),
        ],
    );
    let codes: Vec<_> = Verdict::ALL.into_iter().map(Verdict::code).collect();
    let verification = object(
        &["valid", "code"],
        &[
            ("valid", flag()),
            ("code", states(&codes)),
            ("keyId", text()),
            ("name", text()),
            ("meta", meta()),
            ("expires", millis()),
            ("enabled", flag()),
            ("permissions", texts()),
            ("identity", schema_ref("Identity")),
        ],
    );
    let propagation = object(
        &["requestId", "state", "final", "boundMs", "regions"],
        &[
            ("requestId", text()),
            ("state", states(&["pending", "confirmed", "elapsed", "unproven"])),
            ("final", flag()),
            ("position", whole()),
            ("epoch", whole()),
            ("cause", states(&["created", "changed", "deleted", "erased", "restored", "expired"])),
            ("committedAt", millis()),
            ("measuredFrom", states(&["request", "first_sight"])),
            ("boundMs", whole()),
            ("finalAfterMs", number()),
            ("regions", json!({ "type": "array", "items": schema_ref("RegionPropagation") })),
        ],
    );
    let missing = object(&["agent", "instance"], &[("agent", text()), ("instance", text())]);
    let region = object(
        &["region", "state", "instances", "missingCount", "duplicateNames"],
        &[
            ("region", text()),
            ("state", states(&["pending", "confirmed", "elapsed", "unproven", "absent"])),
            ("instances", whole()),
            ("confirmedAfterMs", number()),
            ("missing", json!({ "type": "array", "items": missing })),
            ("missingCount", whole()),
            ("lagMs", object(&["low", "high"], &[("low", number()), ("high", number())])),
            ("exposure", object(&["lastAnswerAfterMs"], &[("lastAnswerAfterMs", number())])),
            ("duplicateNames", flag()),
        ],
    );
    json!({
        "Meta": object(
            &["requestId"],
            &[("requestId", text()), ("propagation", schema_ref("Propagation")), ("stale", schema_ref("Stale"))],
        ),
        "Stale": stale,
        "Pagination": object(&["hasMore"], &[("cursor", text()), ("hasMore", flag())]),
        "Failure": object(&["meta", "error"], &[("meta", schema_ref("Meta")), ("error", schema_ref("Problem"))]),
        "Problem": problem,
        "FieldError": field_error,
        "Key": key,
        "Identity": identity,
        "Verification": verification,
        "Propagation": propagation,
        "RegionPropagation": region,
    })
}

fn text() -> Value {
    json!({ "type": "string" })
}

fn schema_ref(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// An object with these properties and no others.
fn object(required: &[&str], properties: &[(&str, Value)]) -> Value {
    let properties: Map<_, _> =
        properties.iter().map(|(name, schema)| ((*name).to_owned(), schema.clone())).collect();
    json!({ "type": "object", "required": required, "properties": properties, "additionalProperties": false })
}

impl Schema {
    /// The JSON Schema of what [`Schema::check`] accepts.
    fn to_json_schema(&self) -> Value {
        let required: Vec<_> =
            self.fields().iter().filter(|field| field.required).map(|field| field.name).collect();
        let properties: Map<_, _> = self
            .fields()
            .iter()
            .filter_map(|field| Some((field.name.to_owned(), field.to_json_schema()?)))
            .collect();
        let mut schema = json!({ "type": "object", "required": required, "properties": properties });
        if self.is_strict() {
            schema["additionalProperties"] = json!(false);
        }
        schema
    }
}

impl Field {
    /// `None` if no value is accepted.
    fn to_json_schema(&self) -> Option<Value> {
        let mut schema = match &self.rule {
            ValueRule::Text { min, max, pattern } => texts(*min, *max, *pattern),
            ValueRule::Texts { max_items, min, max, pattern } => json!({
                "type": "array",
                "maxItems": max_items,
                "items": texts(*min, *max, *pattern),
            }),
            ValueRule::Flag => json!({ "type": "boolean" }),
            ValueRule::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
            ValueRule::Object { max_properties, max_bytes } => json!({
                "type": "object",
                "maxProperties": max_properties,
                "description": format!("At most {max_bytes} bytes of JSON."),
            }),
            ValueRule::Unsupported(harmless) => return harmless.to_json_schema(),
        };
        if self.nullable {
            schema["type"] = json!([schema["type"], "null"]);
        }
        Some(schema)
    }
}

impl Harmless {
    fn to_json_schema(self) -> Option<Value> {
        let unlimited = || object(&["remaining"], &[("remaining", json!({ "type": "null" }))]);
        Some(match self {
            Self::Nothing => return None,
            Self::False => json!({ "const": false }),
            Self::EmptyList => json!({ "type": "array", "maxItems": 0 }),
            Self::Unlimited => unlimited(),
            Self::NullOrUnlimited => {
                let mut schema = unlimited();
                schema["type"] = json!(["object", "null"]);
                schema
            }
        })
    }
}

fn texts(min: usize, max: usize, pattern: Option<&Pattern>) -> Value {
    let mut schema = json!({ "type": "string" });
    if min > 0 {
        schema["minLength"] = json!(min);
    }
    if max < usize::MAX {
        schema["maxLength"] = json!(max);
    }
    if let Some(pattern) = pattern {
        schema["pattern"] = json!(pattern.text());
    }
    schema
}

/// Writes JSON as YAML, in blocks. Every text is in quotes, which YAML reads as JSON does.
pub fn to_yaml(value: &Value) -> String {
    let mut yaml = String::new();
    write_block(&mut yaml, value, 0);
    yaml
}

/// Writes a list or an object that isn't empty at an indentation, or any other value on one line.
fn write_block(yaml: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (name, value) in members {
                yaml.push_str(&" ".repeat(indent));
                yaml.push_str(&key(name));
                yaml.push(':');
                write_nested(yaml, value, indent);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                yaml.push_str(&" ".repeat(indent));
                yaml.push('-');
                write_nested(yaml, item, indent);
            }
        }
        scalar => {
            yaml.push_str(&scalar.to_string());
            yaml.push('\n');
        }
    }
}

fn write_nested(yaml: &mut String, value: &Value, indent: usize) {
    let is_block = match value {
        Value::Object(members) => !members.is_empty(),
        Value::Array(items) => !items.is_empty(),
        _ => false,
    };
    yaml.push(if is_block { '\n' } else { ' ' });
    write_block(yaml, value, indent + 2);
}

/// A name needs quotes unless it is a plain word.
fn key(name: &str) -> String {
    let is_word = name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"]
            .contains(&name.to_ascii_lowercase().as_str());
    if is_word { name.to_owned() } else { Value::from(name).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_has_blocks_and_quoted_texts() {
        let value = json!({
            "a": { "b": [1, { "c": "x: #\n" }, [true, null], []], "d": {} },
            "/v2/x": "\"", "200": -1.5, "no": "no",
        });
        let yaml = "\
\"/v2/x\": \"\\\"\"
\"200\": -1.5
a:
  b:
    - 1
    -
      c: \"x: #\\n\"
    -
      - true
      - null
    - []
  d: {}
\"no\": \"no\"
";
        assert_eq!(to_yaml(&value), yaml);
    }

    #[test]
    fn each_daemon_documents_what_it_serves() {
        let paths = |api| document(api)["paths"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(paths(ApiKind::Verify), ["/openapi.yaml", "/v2/keys.verifyKey"]);
        assert_eq!(paths(ApiKind::Control).len(), Endpoint::ALL.len());
    }

    #[test]
    fn every_reference_has_its_schema() {
        fn references<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
            match value {
                Value::Object(members) => {
                    found.extend(members.get("$ref").and_then(Value::as_str));
                    members.values().for_each(|value| references(value, found));
                }
                Value::Array(items) => items.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        let document = document(ApiKind::Control);
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 20, "{found:?}");
        for reference in found {
            assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
        }
    }
}
