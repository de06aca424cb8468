//! The frame around every answer: `{"meta":{..},"data":{..}}` or `{"meta":{..},"error":{..}}`.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::error::{ApiError, FieldError};
use super::propagation::Propagation;

/// About the request, in every answer.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Meta {
    /// Names the request in logs and in the audit (`req_...`).
    pub request_id: String,
    /// How far the change has come, if the caller asked to wait for it (`Prefer: wait=<seconds>`). Not
    /// Unkey's; its clients skip it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub propagation: Option<Box<Propagation>>,
    /// The answer comes from a record that nobody vouches for any more, by policy. Not Unkey's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stale: Option<Stale>,
}

/// By how much an answer is older than it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stale {
    /// Whole seconds since somebody vouched for the record.
    pub age_seconds: u64,
}

/// A successful answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Success<T> {
    /// About the request.
    pub meta: Meta,
    /// What was asked for.
    pub data: T,
}

impl<T> Success<T> {
    /// Frames `data` as the answer to `request_id`.
    pub fn new(request_id: impl Into<String>, data: T) -> Self {
        Self { meta: Meta { request_id: request_id.into(), ..Meta::default() }, data }
    }
}

impl<T: Serialize> Success<T> {
    /// The body.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// A part of a list.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Page<T> {
    /// About the request.
    pub meta: Meta,
    /// The items.
    pub data: Vec<T>,
    /// Where it goes on.
    pub pagination: Pagination,
}

/// Where a list goes on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pagination {
    /// What to send as `cursor` for the next part, if there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cursor: Option<String>,
    /// Whether there is one.
    pub has_more: bool,
}

impl<T> Page<T> {
    /// Frames `data` as the answer to `request_id`; the list goes on at `next`.
    pub fn new(request_id: impl Into<String>, data: Vec<T>, next: Option<String>) -> Self {
        let meta = Meta { request_id: request_id.into(), ..Meta::default() };
        Self { meta, data, pagination: Pagination { has_more: next.is_some(), cursor: next } }
    }
}

impl<T: Serialize> Page<T> {
    /// The body.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// A failed answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// About the request.
    pub meta: Meta,
    /// What went wrong.
    pub error: Problem,
}

/// What went wrong, as RFC 7807 words it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// The kind, for people.
    pub title: Cow<'static, str>,
    /// This occurrence, for people.
    pub detail: String,
    /// The HTTP status once more.
    pub status: u16,
    /// The kind, for machines: a URL.
    pub r#type: String,
    /// What to correct.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub errors: Option<Vec<FieldError>>,
}

impl Failure {
    /// Frames `error` as the answer to `request_id`.
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

    /// The body.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// Serialising to memory fails only for maps whose keys aren't text; no answer has such a map.
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
    fn a_page_says_where_the_list_goes_on() {
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
    fn a_refused_request_has_an_errors_array_even_if_empty() {
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
    fn other_failures_have_none() {
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
