//! Every API error, with its status, title and content type.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The content type of every success, and of most errors.
pub const JSON: &str = "application/json";

/// The content type of an error for a client that accepts it.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Defines [`ErrorKind`] from one table: each kind's status, title and type.
macro_rules! error_kinds {
    ($($(#[$doc:meta])* $kind:ident: $status:literal, $title:literal, $path:literal;)*) => {
        /// A kind of failure, in Unkey's vocabulary. Clients decide by the status and the type URL.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum ErrorKind {
            $($(#[$doc])* $kind,)*
        }

        impl ErrorKind {
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            fn row(self) -> (u16, &'static str, &'static str) {
                match self {
                    $(Self::$kind => ($status, $title, $path),)*
                }
            }
        }
    };
}

error_kinds! {
    /// There is no `Authorization` header, the body violates the endpoint's schema, or the request uses a feature that
    /// evictd doesn't support.
    InvalidInput: 400, "Bad Request", "unkey/application/invalid_input";
    /// The `Authorization` header isn't `Bearer <root key>`.
    AuthenticationMalformed: 400, "Bad Request", "unkey/authentication/malformed";
    /// The connection failed before the end of the body.
    RequestBodyUnreadable: 400, "Bad Request", "user/bad_request/request_body_unreadable";
    /// The root key is unknown, deleted, or an ordinary key.
    RootKeyNotFound: 401, "Unauthorized", "unkey/authentication/key_not_found";
    /// The root key has expired.
    Forbidden: 403, "Forbidden", "unkey/authorization/forbidden";
    /// The root key lacks a permission.
    InsufficientPermissions: 403, "Insufficient Permissions", "unkey/authorization/insufficient_permissions";
    /// The root key is disabled.
    KeyDisabled: 403, "Key is disabled", "unkey/authorization/key_disabled";
    /// The workspace of the root key is disabled.
    WorkspaceDisabled: 403, "Workspace is disabled", "unkey/authorization/workspace_disabled";
    /// A permission query has a syntax error.
    PermissionsQuerySyntax: 400, "Bad Request", "user/bad_request/permissions_query_syntax_error";
    /// No live key of the workspace has this id.
    KeyNotFound: 404, "Not Found", "unkey/data/key_not_found";
    /// No live API of the workspace has this id.
    ApiNotFound: 404, "Not Found", "unkey/data/api_not_found";
    /// The workspace of the root key is deleted.
    WorkspaceNotFound: 404, "Not Found", "unkey/data/workspace_not_found";
    /// The workspace has no request with this id. evictd's own.
    ReceiptNotFound: 404, "Not Found", "evictd/data/receipt_not_found";
    /// The request took too long.
    RequestTimeout: 408, "Request Timeout", "user/bad_request/request_timeout";
    /// Another key has this text.
    KeyAlreadyExists: 409, "Conflicting Resource", "unkey/data/key_already_exists";
    /// The API is protected from deletion.
    ProtectedResource: 412, "Resource is protected", "unkey/application/protected_resource";
    /// The body is larger than the server reads.
    RequestBodyTooLarge: 413, "Request Entity Too Large", "user/bad_request/request_body_too_large";
    /// The workspace exceeded its request rate.
    WorkspaceRateLimited: 429, "Too Many Requests", "user/too_many_requests/workspace_rate_limited";
    /// A bug.
    UnexpectedError: 500, "Internal Server Error", "unkey/application/unexpected_error";
    /// The store failed. SDKs retry.
    ServiceUnavailable: 500, "Internal Server Error", "unkey/application/service_unavailable";
    /// Nothing was changed, and the same request may soon succeed: no record is proven fresh enough, or the home store is
    /// busy or not open yet.
    TryLater: 503, "Service Unavailable", "unkey/application/service_unavailable";
}

impl ErrorKind {
    pub fn status(self) -> u16 {
        self.row().0
    }

    /// Returns the title in Unkey's words.
    pub fn title(self) -> &'static str {
        self.row().1
    }

    /// Returns the URL that identifies the kind.
    pub fn type_url(self) -> String {
        format!("https://unkey.com/docs/errors/{}", self.row().2)
    }

    /// Whether the body has an `errors` array, which may be empty.
    pub fn has_errors(self) -> bool {
        matches!(self.status(), 400 | 408 | 413)
    }

    /// Returns the content type for a client that sent this `Accept` header.
    ///
    /// Unkey's rule is `application/problem+json` for clients that accept it by name or by a range, and else
    /// `application/json`. Its validator's errors and its internal errors are always `application/json`. Its SDKs
    /// parse a 429 only as `application/problem+json`, as Unkey's specification promises.
    pub fn content_type(self, accept: Option<&str>) -> &'static str {
        match self {
            Self::InvalidInput | Self::UnexpectedError => JSON,
            Self::WorkspaceRateLimited => PROBLEM_JSON,
            _ if accept.is_some_and(accepts_problems) => PROBLEM_JSON,
            _ => JSON,
        }
    }
}

/// Whether an `Accept` header names problem details or a range that includes them. Weights are ignored.
fn accepts_problems(accept: &str) -> bool {
    accept.split(',').any(|range| {
        let range = range.split(';').next().unwrap_or_default().trim();
        [PROBLEM_JSON, "application/*", "*/*"].iter().any(|wanted| range.eq_ignore_ascii_case(wanted))
    })
}

/// One problem of a request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FieldError {
    /// The schema's keyword (`/properties/name/minLength`), or the part of the request.
    pub location: String,
    pub message: String,
    /// The correction, unless the message states it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fix: Option<String>,
}

/// A failure, as the caller receives it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiError {
    pub kind: ErrorKind,
    /// Describes this occurrence. Never holds a secret.
    pub detail: String,
    /// Sent only where [`ErrorKind::has_errors`].
    pub errors: Vec<FieldError>,
    /// What went wrong inside. For the log, and never sent.
    pub cause: Option<String>,
}

impl ApiError {
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), errors: Vec::new(), cause: None }
    }

    /// Adds what the log says about it.
    #[must_use]
    pub fn caused_by(self, cause: impl Into<String>) -> Self {
        Self { cause: Some(cause.into()), ..self }
    }

    /// The caller has none of `permissions`, and needs one of them.
    pub fn missing_permission(permissions: &[String]) -> Self {
        let detail = match permissions {
            [one] => format!("Missing permission: '{one}'"),
            any => format!("Missing one of these permissions: {}", any.join(" or ")),
        };
        Self::new(ErrorKind::InsufficientPermissions, detail)
    }

    pub fn status(&self) -> u16 {
        self.kind.status()
    }

    /// See [`ErrorKind::content_type`].
    pub fn content_type(&self, accept: Option<&str>) -> &'static str {
        self.kind.content_type(accept)
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for ApiError {}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn kinds_differ_in_status_or_type() {
        let rows: HashSet<_> = ErrorKind::ALL.iter().map(|kind| (kind.status(), kind.type_url())).collect();
        assert_eq!(rows.len(), ErrorKind::ALL.len());
    }

    #[test]
    fn statuses_match_unkeys_server_not_its_documentation() {
        assert_eq!(ErrorKind::AuthenticationMalformed.status(), 400);
        assert_eq!(ErrorKind::RootKeyNotFound.status(), 401);
        assert_eq!(ErrorKind::ProtectedResource.status(), 412);
        assert_eq!(ErrorKind::ServiceUnavailable.status(), 500);
        assert_eq!(ErrorKind::TryLater.status(), 503);
        assert_eq!(
            ErrorKind::KeyNotFound.type_url(),
            "https://unkey.com/docs/errors/unkey/data/key_not_found"
        );
    }

    #[test]
    fn an_sdk_gets_json_for_every_error_but_429() {
        for &kind in ErrorKind::ALL {
            let expected = if kind.status() == 429 { PROBLEM_JSON } else { JSON };
            assert_eq!(kind.content_type(Some("application/json")), expected, "{kind:?}");
        }
    }

    #[test]
    fn a_range_in_accept_gets_problem_details() {
        let kind = ErrorKind::KeyNotFound;
        for accept in [
            "*/*",
            "text/html, Application/*;q=0.1",
            "application/json,application/problem+json",
            " */* ;q=0",
        ] {
            assert_eq!(kind.content_type(Some(accept)), PROBLEM_JSON, "{accept}");
        }
        for accept in [None, Some(""), Some("text/*"), Some("application/json"), Some("application/jsonx")] {
            assert_eq!(kind.content_type(accept), JSON, "{accept:?}");
        }
    }

    #[test]
    fn validator_and_internal_errors_are_always_plain_json() {
        for kind in [ErrorKind::InvalidInput, ErrorKind::UnexpectedError] {
            assert_eq!(kind.content_type(Some("*/*")), JSON);
        }
        assert_eq!(ErrorKind::AuthenticationMalformed.content_type(Some("*/*")), PROBLEM_JSON);
    }

    #[test]
    fn a_missing_permission_is_named() {
        let one = ApiError::missing_permission(&["api.*.create_api".to_owned()]);
        assert_eq!(one.detail, "Missing permission: 'api.*.create_api'");
        let any =
            ApiError::missing_permission(&["api.*.delete_key".to_owned(), "api.api_1.delete_key".to_owned()]);
        assert_eq!(any.detail, "Missing one of these permissions: api.*.delete_key or api.api_1.delete_key");
        assert_eq!(any.status(), 403);
    }
}
