//! The frame around every answer: `{"meta":{..},"data":{..}}` or `{"meta":{..},"error":{..}}`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::error::{ApiError, FieldError};
use super::propagation::Propagation;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meta {
    /// Identifies the request in logs and in the audit (`req_...`).
    pub request_id: String,
    /// The receipt of the change, if the client sent `Prefer: wait=<seconds>`. Not Unkey's; its clients skip it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub propagation: Option<Box<Propagation>>,
    /// Present if the answer comes from a record without a current proof, which policy allows. Not Unkey's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stale: Option<Stale>,
}

/// The age of the record behind a stale answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stale {
    /// Whole seconds since the last proof for the record.
    pub age_seconds: u64,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Success<T> {
    pub meta: Meta,
    pub data: T,
}

impl<T> Success<T> {
    pub fn new(request_id: impl Into<String>, data: T) -> Self {
        Self { meta: Meta { request_id: request_id.into(), ..Meta::default() }, data }
    }
}

impl<T: Serialize> Success<T> {
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// A page of a list.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Page<T> {
    pub meta: Meta,
    pub data: Vec<T>,
    pub pagination: Pagination,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pagination {
    /// The `cursor` for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cursor: Option<String>,
    pub has_more: bool,
}

impl<T> Page<T> {
    /// `next` is the cursor of the next page.
    pub fn new(request_id: impl Into<String>, data: Vec<T>, next: Option<String>) -> Self {
        let meta = Meta { request_id: request_id.into(), ..Meta::default() };
        Self { meta, data, pagination: Pagination { has_more: next.is_some(), cursor: next } }
    }
}

impl<T: Serialize> Page<T> {
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub meta: Meta,
    pub error: Problem,
}

/// An error in the form of RFC 7807.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    pub title: Cow<'static, str>,
    /// Describes this occurrence.
    pub detail: String,
    pub status: u16,
    /// A URL.
    pub r#type: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub errors: Option<Vec<FieldError>>,
}

impl Failure {
    pub fn new(request_id: impl Into<String>, error: &ApiError) -> Self {
        let error = Problem {
            title: Cow::Borrowed(error.kind.title()),
            detail: error.detail.clone(),
            status: error.kind.status(),
            r#type: error.kind.type_url(),
            errors: error.kind.has_errors().then(|| error.errors.clone()),
        };
        Self { meta: Meta { request_id: request_id.into(), ..Meta::default() }, error }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// Serializing to memory fails only for maps whose keys aren't text. No answer has such a map.
fn to_json(answer: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(answer).expect("answers have no map with keys other than text")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::error::ErrorKind;
    use crate::api::responses::Empty;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn an_empty_success_is_the_documented_bytes() {
        let body = text(Success::new("req_1", Empty {}).to_bytes());
        assert_eq!(body, r#"{"meta":{"requestId":"req_1"},"data":{}}"#);
    }

    #[test]
    fn a_page_has_the_cursor_of_the_next_one() {
        let body = text(Page::new("req_1", vec![1, 2], Some("key_3".to_owned())).to_bytes());
        assert_eq!(
            body,
            concat!(
                r#"{"meta":{"requestId":"req_1"},"data":[1,2],"#,
                r#""pagination":{"cursor":"key_3","hasMore":true}}"#
            )
        );
        let body = text(Page::<u8>::new("req_1", Vec::new(), None).to_bytes());
        assert_eq!(body, r#"{"meta":{"requestId":"req_1"},"data":[],"pagination":{"hasMore":false}}"#);
    }

    #[test]
    fn a_rejected_request_has_an_errors_array_even_if_empty() {
        let error = ApiError::new(ErrorKind::AuthenticationMalformed, "no");
        assert_eq!(
            text(Failure::new("req_1", &error).to_bytes()),
            concat!(
                r#"{"meta":{"requestId":"req_1"},"error":{"title":"Bad Request","detail":"no","status":400,"#,
                r#""type":"https://unkey.com/docs/errors/unkey/authentication/malformed","errors":[]}}"#
            )
        );
    }

    #[test]
    fn other_failures_have_no_errors_array() {
        let error = ApiError::new(ErrorKind::KeyNotFound, "gone");
        let body = text(Failure::new("req_1", &error).to_bytes());
        assert!(!body.contains("errors\":"), "{body}");
        assert_eq!(serde_json::from_str::<Failure>(&body).unwrap(), Failure::new("req_1", &error));
    }

    #[test]
    fn a_field_error_without_a_fix_has_no_such_member() {
        let mut error = ApiError::new(ErrorKind::InvalidInput, "no");
        error.errors = vec![FieldError { location: "/a".into(), message: "b".into(), fix: None }];
        let body = text(Failure::new("req_1", &error).to_bytes());
        assert!(body.ends_with(r#""errors":[{"location":"/a","message":"b"}]}}"#), "{body}");
    }
}
