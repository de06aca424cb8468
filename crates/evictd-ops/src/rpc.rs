//! Calls in Unkey's form: what all endpoints of both daemons do before and after their own work.

use bytes::Bytes;
use evictd_wire::api::envelope::{Failure, Success};
use evictd_wire::api::error::{ApiError, ErrorKind, JSON};
use evictd_wire::api::ids;
use evictd_wire::api::requests::{authorization, missing_authorization, unknown_content_type};
use hyper::header::{ACCEPT, ALLOW, AUTHORIZATION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, Method, StatusCode};
use serde::Serialize;

use crate::http::{BodyError, Reply, Request, reply, text};

/// A call whose body has been read. Not `Debug`: its headers and its body hold keys.
pub struct RpcCall {
    /// `req_...`, drawn here.
    pub request_id: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl RpcCall {
    /// Reads a call. `Err` is the answer to one that can't be read.
    ///
    /// The body is read only if there is an `Authorization` header. An empty one is none, as for Unkey's validator.
    pub async fn read(mut request: Request) -> Result<Self, Reply> {
        if request.parts.method != Method::POST {
            return Err(not_allowed("POST"));
        }
        if request.parts.headers.get(AUTHORIZATION).is_none_or(HeaderValue::is_empty) {
            return Err(Self::without_body(request).failure(&missing_authorization()));
        }
        let request_id = ids::new_id(ids::REQUEST);
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

    /// Reads a GET, whose path says everything.
    #[expect(clippy::result_large_err, reason = "either is used at once")]
    pub fn read_open(request: Request) -> Result<Self, Reply> {
        match request.parts.method {
            Method::GET | Method::HEAD => Ok(Self::without_body(request)),
            _ => Err(not_allowed("GET, HEAD")),
        }
    }

    fn without_body(request: Request) -> Self {
        Self { request_id: ids::new_id(ids::REQUEST), headers: request.parts.headers, body: Bytes::new() }
    }

    /// Parses the body. The order of the checks is that of Unkey's validator: the body's type, then its content.
    /// [`RpcCall::token`] checks the form of the `Authorization` header afterwards.
    pub fn request<'a, T>(
        &'a self,
        parse: impl FnOnce(&'a [u8]) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut content_types = self.headers.get_all(CONTENT_TYPE).iter();
        let first = content_types.next();
        if first.is_some_and(is_json) && content_types.all(is_json) {
            return parse(&self.body);
        }
        Err(unknown_content_type(first.and_then(|sent| sent.to_str().ok()).unwrap_or_default()))
    }

    /// Returns the text of the root key, which hasn't been looked up yet.
    pub fn token(&self) -> Result<&str, ApiError> {
        let mut headers = self.headers.get_all(AUTHORIZATION).iter().map(HeaderValue::as_bytes);
        let first = headers.next();
        if headers.next().is_some() {
            let detail = "There are several Authorization headers; send one";
            return Err(ApiError::new(ErrorKind::AuthenticationMalformed, detail));
        }
        authorization(first.unwrap_or_default())
    }

    /// The answer of a call that succeeded.
    pub fn success(&self, data: impl Serialize) -> Reply {
        reply(StatusCode::OK, JSON, Success::new(self.request_id.as_str(), data).to_bytes().into())
    }

    /// The answer of a call that failed.
    pub fn failure(&self, error: &ApiError) -> Reply {
        let accept = self.headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = Failure::new(self.request_id.as_str(), error).to_bytes();
        let mut reply = reply(status, error.content_type(accept), body.into());
        if status == StatusCode::SERVICE_UNAVAILABLE {
            reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        reply
    }
}

/// The answer to an unknown path: plain text, as from Unkey's router.
pub fn not_found() -> Reply {
    text(StatusCode::NOT_FOUND, "404 page not found\n")
}

/// The answer to another method than the `allowed` ones: plain text as well.
pub fn not_allowed(allowed: &'static str) -> Reply {
    let mut reply = text(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
    reply.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    reply
}

/// Whether a `Content-Type` is JSON, with any parameters.
fn is_json(content_type: &HeaderValue) -> bool {
    let media_type = content_type.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case(JSON)
}

fn unreadable(error: BodyError) -> ApiError {
    let kind = match error {
        BodyError::TooLarge { .. } => ErrorKind::RequestBodyTooLarge,
        BodyError::TooSlow { .. } => ErrorKind::RequestTimeout,
        BodyError::Broken => ErrorKind::RequestBodyUnreadable,
    };
    ApiError::new(kind, error.to_string())
}
