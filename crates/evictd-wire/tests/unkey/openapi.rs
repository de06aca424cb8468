//! The OpenAPI document has the endpoints, fields and limits of the table, and is what the repository shows.

use evictd_wire::api::openapi::{ApiKind, document, to_yaml};
use evictd_wire::api::requests::Endpoint;
use serde_json::{Map, Value, json};

use crate::table::{Characters, ENDPOINTS, FieldRow, RuleRow};

/// The JSON Schema of a field; `None` if it accepts no value.
fn schema(field: &FieldRow) -> Option<Value> {
    let text = |min: usize, max: usize, of: Characters| {
        let mut schema = Map::from_iter([("type".to_owned(), json!("string"))]);
        if min > 0 {
            schema.insert("minLength".to_owned(), json!(min));
        }
        if max < usize::MAX {
            schema.insert("maxLength".to_owned(), json!(max));
        }
        let pattern = match of {
            Characters::Any => None,
            Characters::Stored => Some(r"^[^\x00]*$"),
            Characters::LettersDigitsAnd("_") => Some("^[a-zA-Z0-9_]+$"),
            Characters::LettersDigitsAnd("_.-") => Some("^[a-zA-Z0-9_.-]+$"),
            Characters::LettersDigitsAnd(_) => Some(r"^[a-zA-Z0-9_:\-\.\*]+$"),
        };
        schema.extend(pattern.map(|pattern| ("pattern".to_owned(), json!(pattern))));
        Value::Object(schema)
    };
    let mut schema = match field.rule {
        RuleRow::Text { min, max, of } => text(min, max, of),
        RuleRow::List { max_items, min, max, of } => {
            json!({ "type": "array", "maxItems": max_items, "items": text(min, max, of) })
        }
        RuleRow::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        RuleRow::Flag => json!({ "type": "boolean" }),
        RuleRow::Object => {
            json!({ "type": "object", "maxProperties": 100, "description": "At most 16384 bytes of JSON." })
        }
        RuleRow::LeftOut { harmless } => return left_out(harmless),
    };
    if field.nullable {
        schema["type"] = json!([schema["type"], "null"]);
    }
    Some(schema)
}

fn left_out(harmless: &[&str]) -> Option<Value> {
    let unlimited = |types: Value| {
        json!({
            "type": types, "required": ["remaining"], "properties": { "remaining": { "type": "null" } },
            "additionalProperties": false,
        })
    };
    match harmless {
        [] => None,
        ["false"] => Some(json!({ "const": false })),
        ["[]"] => Some(json!({ "type": "array", "maxItems": 0 })),
        [_] => Some(unlimited(json!("object"))),
        _ => Some(unlimited(json!(["object", "null"]))),
    }
}

#[test]
fn the_openapi_document_has_every_field_with_its_limits() {
    let document = document(ApiKind::Control);
    for endpoint in ENDPOINTS {
        let body = &document["paths"][endpoint.path]["post"]["requestBody"];
        let request = &body["content"]["application/json"]["schema"];
        let properties: Map<_, _> = endpoint
            .fields
            .iter()
            .filter_map(|field| Some((field.name.to_owned(), schema(field)?)))
            .collect();
        assert_eq!(request["properties"], Value::Object(properties), "{}", endpoint.path);
        let required: Vec<_> =
            endpoint.fields.iter().filter(|field| field.required).map(|field| field.name).collect();
        assert_eq!((&body["required"], &request["required"]), (&json!(true), &json!(required)));
        assert_eq!(request.get("additionalProperties").is_some(), endpoint.strict, "{}", endpoint.path);
    }
}

#[test]
fn the_openapi_document_has_every_endpoint() {
    let control = document(ApiKind::Control);
    for endpoint in Endpoint::ALL {
        let item = &control["paths"][endpoint.path()];
        let is_get = matches!(endpoint, Endpoint::Liveness | Endpoint::OpenApi);
        let operation = &item[if is_get { "get" } else { "post" }];
        assert!(operation["summary"].is_string(), "{endpoint:?}");
        assert_eq!(operation.get("security").is_some(), is_get, "the others need a root key");
        let responses = operation["responses"].as_object().unwrap();
        let statuses: Vec<_> = ApiKind::Control.statuses(endpoint).iter().map(u16::to_string).collect();
        assert!(responses.keys().eq(&statuses), "{endpoint:?}");
    }
}

/// `EVICTD_REGENERATE=1` (what `cargo xtask generate` sets) rewrites the pages instead of failing.
#[test]
fn openapi_documents_are_up_to_date() {
    for (api, page) in [(ApiKind::Control, "openapi.yaml"), (ApiKind::Verify, "openapi-agent.yaml")] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(page);
        let fresh = to_yaml(&document(api));
        if std::env::var_os("EVICTD_REGENERATE").is_some() {
            std::fs::write(&path, &fresh).unwrap();
        }
        let current = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(current == fresh, "docs/{page} is not what the code generates: run `cargo xtask generate`");
    }
}
