//! Calls in Unkey's form: what every endpoint of both daemons does before and after its own work.

use bytes::Bytes;
use evictd_wire::api::envelope::{Failure, Success};
use evictd_wire::api::error::{ApiError, ErrorKind, FieldError, JSON};
use evictd_wire::api::ids;
use evictd_wire::api::requests::authorization;
use hyper::header::{ACCEPT, ALLOW, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Method, StatusCode};
use serde::Serialize;

use crate::http::{BodyError, Reply, Request, reply, text};

/// A call that arrived whole. Not `Debug`: its headers and its body hold keys.
pub struct Call {
    /// `req_...`, drawn here.
    pub request_id: String,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, not parsed yet.
    pub body: Bytes,
}

impl Call {
    /// Reads a call. What can't be read is answered at once.
    pub async fn read(mut request: Request) -> Result<Self, Reply> {
        let request_id = ids::new_id(ids::REQUEST);
        if request.parts.method != Method::POST {
            return Err(not_allowed("POST"));
        }
        let body = request.body().await;
        let headers = request.parts.headers;
        match body {
            Ok(body) => Ok(Self { request_id, headers, body }),
            Err(error) => {
                let call = Self { request_id, headers, body: Bytes::new() };
                Err(call.failure(&unreadable(error)))
            }
        }
    }

    /// A call that says everything with its path.
    pub fn without_body(request: Request) -> Self {
        Self { request_id: ids::new_id(ids::REQUEST), headers: request.parts.headers, body: Bytes::new() }
    }

    /// The body as `parse` reads it. Unkey's validator looks for the `Authorization` header and at the body's
    /// type and content, and leaves the header's form to what comes later; so do we, in this order.
    pub fn request<'a, T>(
        &'a self,
        parse: impl FnOnce(&'a [u8]) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        if !self.headers.contains_key(AUTHORIZATION) {
            authorization(None)?;
        }
        if !self.headers.get_all(CONTENT_TYPE).iter().all(is_json) {
            return Err(wrong_content_type());
        }
        parse(&self.body)
    }

    /// The root key's text. It was given, but nobody has looked it up yet.
    pub fn token(&self) -> Result<&str, ApiError> {
        let mut headers = self.headers.get_all(AUTHORIZATION).iter().map(HeaderValue::as_bytes);
        let first = headers.next();
        if headers.next().is_some() {
            let detail = "There are several Authorization headers; send one";
            return Err(ApiError::new(ErrorKind::AuthenticationMalformed, detail));
        }
        authorization(first)
    }

    /// The answer of a call that did what it was asked.
    pub fn success(&self, data: impl Serialize) -> Reply {
        reply(StatusCode::OK, JSON, Success::new(self.request_id.as_str(), data).to_bytes().into())
    }

    /// The answer of a call that didn't.
    pub fn failure(&self, error: &ApiError) -> Reply {
        let accept = self.headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = Failure::new(self.request_id.as_str(), error).to_bytes();
        reply(status, error.content_type(accept), body.into())
    }
}

/// The answer to a path that no endpoint has: plain text, as Unkey's router gives it.
pub fn not_found() -> Reply {
    text(StatusCode::NOT_FOUND, "404 page not found\n")
}

/// The answer to a method that an endpoint doesn't have: plain text as well. `allowed` are those that it has.
pub fn not_allowed(allowed: &'static str) -> Reply {
    let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    reply
}

/// Whether a `Content-Type` is JSON, whatever its parameters. (Who sends none means JSON: there is nothing else.)
fn is_json(content_type: &HeaderValue) -> bool {
    let media_type = content_type.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case(JSON)
}

fn wrong_content_type() -> ApiError {
    ApiError {
        errors: vec![FieldError {
            location: "/header/Content-Type".to_owned(),
            message: "the body's type isn't application/json".to_owned(),
            fix: Some("send `Content-Type: application/json`".to_owned()),
        }],
        ..ApiError::new(ErrorKind::InvalidInput, "The Content-Type header must be application/json")
    }
}

fn unreadable(error: BodyError) -> ApiError {
    let kind = match error {
        BodyError::TooLarge { .. } => ErrorKind::RequestBodyTooLarge,
        BodyError::TooSlow { .. } => ErrorKind::RequestTimeout,
        BodyError::Broken => ErrorKind::RequestBodyUnreadable,
    };
    ApiError::new(kind, error.to_string())
}
