//! Every way to fail, with its status, title and content type.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The content type of every success, and of most errors.
pub const JSON: &str = "application/json";

/// The content type of an error for a client that says it understands it.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// What went wrong, in Unkey's vocabulary. Clients decide by the status and the type URL.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ErrorKind {
    /// The body doesn't meet the endpoint's schema, or asks for what evictd leaves out.
    InvalidInput,
    /// There is no `Authorization` header.
    AuthenticationMissing,
    /// The `Authorization` header isn't `Bearer <root key>`.
    AuthenticationMalformed,
    /// The body couldn't be read to its end.
    RequestBodyUnreadable,
    /// No root key has this text: it is unknown, deleted, or an ordinary key.
    RootKeyNotFound,
    /// The root key has expired.
    Forbidden,
    /// The root key lacks a permission.
    InsufficientPermissions,
    /// The root key is switched off.
    KeyDisabled,
    /// The workspace of the root key is switched off.
    WorkspaceDisabled,
    /// A permission query can't be read.
    PermissionsQuerySyntax,
    /// No live key of the workspace has this id.
    KeyNotFound,
    /// No live API of the workspace has this id.
    ApiNotFound,
    /// The workspace of the root key is gone.
    WorkspaceNotFound,
    /// The workspace carried out no request with this id. evictd's own.
    ReceiptNotFound,
    /// The request took too long.
    RequestTimeout,
    /// A key with this text exists already.
    KeyAlreadyExists,
    /// The API is protected from deletion.
    ProtectedResource,
    /// The body is larger than the server reads.
    RequestBodyTooLarge,
    /// The workspace sent more requests than it may.
    WorkspaceRateLimited,
    /// A bug.
    UnexpectedError,
    /// The store failed; SDKs try again.
    ServiceUnavailable,
    /// The agent can't prove that its answer would be new enough, so it gives none.
    Stale,
}

impl ErrorKind {
    /// All kinds, for tables and tests.
    pub const ALL: [Self; 22] = [
        Self::InvalidInput,
        Self::AuthenticationMissing,
        Self::AuthenticationMalformed,
        Self::RequestBodyUnreadable,
        Self::RootKeyNotFound,
        Self::Forbidden,
        Self::InsufficientPermissions,
        Self::KeyDisabled,
        Self::WorkspaceDisabled,
        Self::PermissionsQuerySyntax,
        Self::KeyNotFound,
        Self::ApiNotFound,
        Self::WorkspaceNotFound,
        Self::ReceiptNotFound,
        Self::RequestTimeout,
        Self::KeyAlreadyExists,
        Self::ProtectedResource,
        Self::RequestBodyTooLarge,
        Self::WorkspaceRateLimited,
        Self::UnexpectedError,
        Self::ServiceUnavailable,
        Self::Stale,
    ];

    /// The HTTP status.
    pub fn status(self) -> u16 {
        self.row().0
    }

    /// The title, in Unkey's words.
    pub fn title(self) -> &'static str {
        self.row().1
    }

    /// The URL that identifies the kind to machines and explains it to people.
    pub fn type_url(self) -> String {
        format!("https://unkey.com/docs/errors/{}", self.row().2)
    }

    /// Whether the body has an `errors` array, be it empty.
    pub fn has_errors(self) -> bool {
        matches!(self.status(), 400 | 408 | 413)
    }

    /// The content type for a client that sent this `Accept` header.
    ///
    /// Unkey's rule is: `application/problem+json` for who names it or accepts anything, else
    /// `application/json`; refusals of its validator and bugs are always `application/json`. Its SDKs
    /// understand a 429 as `application/problem+json` only, as Unkey's specification promises it.
    pub fn content_type(self, accept: Option<&str>) -> &'static str {
        match self {
            Self::InvalidInput | Self::AuthenticationMissing | Self::UnexpectedError => JSON,
            Self::WorkspaceRateLimited => PROBLEM_JSON,
            _ if accept.is_some_and(accepts_problems) => PROBLEM_JSON,
            _ => JSON,
        }
    }

    fn row(self) -> (u16, &'static str, &'static str) {
        match self {
            Self::InvalidInput => (400, "Bad Request", "unkey/application/invalid_input"),
            Self::AuthenticationMissing => (400, "Bad Request", "unkey/authentication/missing"),
            Self::AuthenticationMalformed => (400, "Bad Request", "unkey/authentication/malformed"),
            Self::RequestBodyUnreadable => (400, "Bad Request", "user/bad_request/request_body_unreadable"),
            Self::RootKeyNotFound => (401, "Unauthorized", "unkey/authentication/key_not_found"),
            Self::Forbidden => (403, "Forbidden", "unkey/authorization/forbidden"),
            Self::InsufficientPermissions => {
                (403, "Insufficient Permissions", "unkey/authorization/insufficient_permissions")
            }
            Self::KeyDisabled => (403, "Key is disabled", "unkey/authorization/key_disabled"),
            Self::PermissionsQuerySyntax => {
                (400, "Bad Request", "user/bad_request/permissions_query_syntax_error")
            }
            Self::WorkspaceDisabled => {
                (403, "Workspace is disabled", "unkey/authorization/workspace_disabled")
            }
            Self::KeyNotFound => (404, "Not Found", "unkey/data/key_not_found"),
            Self::ApiNotFound => (404, "Not Found", "unkey/data/api_not_found"),
            Self::WorkspaceNotFound => (404, "Not Found", "unkey/data/workspace_not_found"),
            Self::ReceiptNotFound => (404, "Not Found", "evictd/data/receipt_not_found"),
            Self::RequestTimeout => (408, "Request Timeout", "user/bad_request/request_timeout"),
            Self::KeyAlreadyExists => (409, "Conflicting Resource", "unkey/data/key_already_exists"),
            Self::ProtectedResource => (412, "Resource is protected", "unkey/application/protected_resource"),
            Self::RequestBodyTooLarge => {
                (413, "Request Entity Too Large", "user/bad_request/request_body_too_large")
            }
            Self::WorkspaceRateLimited => {
                (429, "Too Many Requests", "user/too_many_requests/workspace_rate_limited")
            }
            Self::UnexpectedError => (500, "Internal Server Error", "unkey/application/unexpected_error"),
            Self::ServiceUnavailable => {
                (500, "Internal Server Error", "unkey/application/service_unavailable")
            }
            Self::Stale => (503, "Service Unavailable", "unkey/application/service_unavailable"),
        }
    }
}

/// Whether an `Accept` header names problem details or a range that holds them. Weights don't count.
fn accepts_problems(accept: &str) -> bool {
    accept.split(',').any(|range| {
        let range = range.split(';').next().unwrap_or_default().trim();
        [PROBLEM_JSON, "application/*", "*/*"].iter().any(|wanted| range.eq_ignore_ascii_case(wanted))
    })
}

/// One thing wrong with a request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FieldError {
    /// Where: the schema's keyword (`/properties/name/minLength`), or the part of the request.
    pub location: String,
    /// What.
    pub message: String,
    /// What to do about it, where the message doesn't already say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fix: Option<String>,
}

/// A failure as the caller gets to see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiError {
    /// What went wrong.
    pub kind: ErrorKind,
    /// This occurrence, for people. Never holds a secret.
    pub detail: String,
    /// What to correct. Sent only where [`ErrorKind::has_errors`].
    pub errors: Vec<FieldError>,
}

impl ApiError {
    /// A failure with nothing to correct field by field.
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), errors: Vec::new() }
    }

    /// The caller lacks all of `permissions`, any one of which would do.
    pub fn missing_permission(permissions: &[String]) -> Self {
        let detail = match permissions {
            [one] => format!("Missing permission: '{one}'"),
            any => format!("Missing one of these permissions: {}", any.join(" or ")),
        };
        Self::new(ErrorKind::InsufficientPermissions, detail)
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.kind.status()
    }

    /// The content type for a client that sent this `Accept` header; see [`ErrorKind::content_type`].
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
    fn statuses_are_those_of_unkeys_server_not_of_its_documentation() {
        assert_eq!(ErrorKind::AuthenticationMissing.status(), 400);
        assert_eq!(ErrorKind::AuthenticationMalformed.status(), 400);
        assert_eq!(ErrorKind::RootKeyNotFound.status(), 401);
        assert_eq!(ErrorKind::ProtectedResource.status(), 412);
        assert_eq!(ErrorKind::ServiceUnavailable.status(), 500);
        assert_eq!(ErrorKind::Stale.status(), 503);
        assert_eq!(
            ErrorKind::KeyNotFound.type_url(),
            "https://unkey.com/docs/errors/unkey/data/key_not_found"
        );
    }

    #[test]
    fn an_sdk_gets_json_for_every_error_but_429() {
        for kind in ErrorKind::ALL {
            let expected = if kind.status() == 429 { PROBLEM_JSON } else { JSON };
            assert_eq!(kind.content_type(Some("application/json")), expected, "{kind:?}");
        }
    }

    #[test]
    fn who_accepts_anything_gets_problem_details() {
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
    fn refusals_of_the_validator_and_bugs_are_always_plain_json() {
        for kind in [ErrorKind::InvalidInput, ErrorKind::AuthenticationMissing, ErrorKind::UnexpectedError] {
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
