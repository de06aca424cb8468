//! Calls in Unkey's form: what every endpoint of both daemons does before and after its own work.

use bytes::Bytes;
use evictd_wire::api::envelope::{Failure, Success};
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::ids;
use evictd_wire::api::requests::authorization;
use hyper::header::{ACCEPT, AUTHORIZATION};
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
            return Err(text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n"));
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

    /// The body as `parse` reads it. Unkey's validator looks at the body and for the header, and leaves the
    /// header's form to what comes later; so do we, in this order.
    pub fn request<'a, T>(
        &'a self,
        parse: impl FnOnce(&'a [u8]) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        if !self.headers.contains_key(AUTHORIZATION) {
            authorization(None)?;
        }
        parse(&self.body)
    }

    /// The root key's text. It was given, but nobody has looked it up yet.
    pub fn token(&self) -> Result<&str, ApiError> {
        authorization(self.headers.get(AUTHORIZATION).map(hyper::header::HeaderValue::as_bytes))
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

fn unreadable(error: BodyError) -> ApiError {
    let kind = match error {
        BodyError::TooLarge { .. } => ErrorKind::RequestBodyTooLarge,
        BodyError::TooSlow { .. } => ErrorKind::RequestTimeout,
        BodyError::Broken => ErrorKind::RequestBodyUnreadable,
    };
    ApiError::new(kind, error.to_string())
}
