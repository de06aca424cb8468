//! Every answer of these tests is one that the OpenAPI document describes.

use std::sync::LazyLock;

use evictd_wire::api::openapi::{ApiKind, document, to_yaml};
use evictd_wire::api::requests::OPENAPI_PATH;

use super::*;

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| document(ApiKind::Control));

/// Checks an answer to `METHOD path HTTP/1.1`. What the router answers in plain text isn't in the document.
pub(super) fn check(head: &str, answer: &ControlResponse) {
    let mut words = head.split(' ').map(str::to_ascii_lowercase);
    let (method, path) = (words.next().unwrap(), head.split(' ').nth(1).unwrap());
    let operation = &DOCUMENT["paths"][path][method];
    if operation.is_null() || answer.status == 404 && answer.content_type().starts_with("text/plain") {
        return;
    }
    let response = &operation["responses"][answer.status.to_string()];
    let schema = &response["content"][answer.content_type()]["schema"];
    assert!(schema.is_object(), "{head}: {} {} isn't documented", answer.status, answer.content_type());
    if answer.content_type().ends_with("json") {
        let problem = violation(schema, &answer.json(), "");
        assert_eq!(problem, None, "{head}: {} {}", answer.status, answer.body);
    }
}

/// Finds what of a value the schema doesn't allow, as far as the document uses JSON Schema for answers.
fn violation(schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        return violation(DOCUMENT.pointer(reference.trim_start_matches('#')).unwrap(), value, at);
    }
    let is_of_type = match schema["type"].as_str().unwrap() {
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{at}: type {other}"),
    };
    if !is_of_type || schema["enum"].as_array().is_some_and(|values| !values.contains(value)) {
        return Some(format!("{at}: {value} isn't {schema}"));
    }
    let mut inner = Vec::new();
    for item in value.as_array().into_iter().flatten() {
        inner.push((&schema["items"], item, format!("{at}/[]")));
    }
    for (name, member) in value.as_object().into_iter().flatten() {
        match schema["properties"].get(name) {
            Some(property) => inner.push((property, member, format!("{at}/{name}"))),
            None if schema["additionalProperties"] == false => {
                return Some(format!("{at}: {name} is unknown"));
            }
            None => {}
        }
    }
    let mut required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(missing) = required.find(|name| value.get(name).is_none()) {
        return Some(format!("{at}: {missing} is missing"));
    }
    inner.into_iter().find_map(|(schema, value, at)| violation(schema, value, &at))
}

#[tokio::test]
async fn the_openapi_document_is_served_without_a_root_key() {
    let home = ControlFixture::new().await;
    home.store.close().await;
    let answer = home.send(&format!("GET {OPENAPI_PATH} HTTP/1.1"), &[], "").await;
    assert_eq!((answer.status, answer.content_type()), (200, "application/yaml"));
    assert_eq!(answer.body, to_yaml(&DOCUMENT));
    let head = home.send(&format!("HEAD {OPENAPI_PATH} HTTP/1.1"), &[], "").await;
    assert_eq!((head.status, &*head.body), (200, ""));
}

#[test]
fn an_answer_that_isnt_documented_is_found() {
    let problem = |path: &str, status: &str, body: Value| {
        let response = &DOCUMENT["paths"][path]["post"]["responses"][status]["content"]["application/json"];
        violation(&response["schema"], &body, "")
    };
    let meta = json!({ "requestId": "req_1" });
    let found = |data: Value| problem(GetApi::PATH, "200", json!({ "meta": meta, "data": data }));
    assert_eq!(found(json!({ "id": "api_1", "name": "n" })), None);
    for wrong in [json!({ "id": "api_1" }), json!({ "id": 1, "name": "n" }), json!([]), json!(null)] {
        assert!(found(wrong.clone()).is_some(), "{wrong}");
    }
    assert!(found(json!({ "id": "api_1", "name": "n", "owner": "o" })).unwrap().contains("owner is unknown"));
    let verdict = json!({ "meta": meta, "data": { "valid": false, "code": "LOST" } });
    assert!(problem(VerifyKey::PATH, "200", verdict).is_some());
}
