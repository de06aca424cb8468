//! What clients see of each kind of error: they decide by status and type.

use evictd_wire::api::envelope::Failure;
use evictd_wire::api::error::{ApiError, ErrorKind, JSON, PROBLEM_JSON};

/// Unkey's table, followed by evictd's additions.
const TABLE: [(ErrorKind, u16, &str, &str); ErrorKind::ALL.len()] = [
    (ErrorKind::InvalidInput, 400, "Bad Request", "unkey/application/invalid_input"),
    (ErrorKind::AuthenticationMalformed, 400, "Bad Request", "unkey/authentication/malformed"),
    (ErrorKind::RequestBodyUnreadable, 400, "Bad Request", "user/bad_request/request_body_unreadable"),
    (
        ErrorKind::PermissionsQuerySyntax,
        400,
        "Bad Request",
        "user/bad_request/permissions_query_syntax_error",
    ),
    (ErrorKind::RootKeyNotFound, 401, "Unauthorized", "unkey/authentication/key_not_found"),
    (ErrorKind::Forbidden, 403, "Forbidden", "unkey/authorization/forbidden"),
    (
        ErrorKind::InsufficientPermissions,
        403,
        "Insufficient Permissions",
        "unkey/authorization/insufficient_permissions",
    ),
    (ErrorKind::KeyDisabled, 403, "Key is disabled", "unkey/authorization/key_disabled"),
    (ErrorKind::WorkspaceDisabled, 403, "Workspace is disabled", "unkey/authorization/workspace_disabled"),
    (ErrorKind::KeyNotFound, 404, "Not Found", "unkey/data/key_not_found"),
    (ErrorKind::ApiNotFound, 404, "Not Found", "unkey/data/api_not_found"),
    (ErrorKind::WorkspaceNotFound, 404, "Not Found", "unkey/data/workspace_not_found"),
    (ErrorKind::RequestTimeout, 408, "Request Timeout", "user/bad_request/request_timeout"),
    (ErrorKind::KeyAlreadyExists, 409, "Conflicting Resource", "unkey/data/key_already_exists"),
    (ErrorKind::ProtectedResource, 412, "Resource is protected", "unkey/application/protected_resource"),
    (
        ErrorKind::RequestBodyTooLarge,
        413,
        "Request Entity Too Large",
        "user/bad_request/request_body_too_large",
    ),
    (
        ErrorKind::WorkspaceRateLimited,
        429,
        "Too Many Requests",
        "user/too_many_requests/workspace_rate_limited",
    ),
    (ErrorKind::UnexpectedError, 500, "Internal Server Error", "unkey/application/unexpected_error"),
    (ErrorKind::ServiceUnavailable, 500, "Internal Server Error", "unkey/application/service_unavailable"),
    (ErrorKind::ReceiptNotFound, 404, "Not Found", "evictd/data/receipt_not_found"),
    (ErrorKind::TryLater, 503, "Service Unavailable", "unkey/application/service_unavailable"),
];

#[test]
fn each_kind_of_error_has_unkeys_status_title_and_type() {
    for (kind, status, title, r#type) in TABLE {
        let failure = Failure::new("req_1", &ApiError::new(kind, "why"));
        let error = &failure.error;
        assert_eq!((error.status, error.title.as_ref()), (status, title), "{kind:?}");
        assert_eq!(error.r#type, format!("https://unkey.com/docs/errors/{type}"));
        assert_eq!(error.detail, "why");
    }
    for kind in ErrorKind::ALL {
        assert!(TABLE.iter().any(|row| row.0 == *kind), "{kind:?} is not in the table");
    }
}

#[test]
fn only_rejected_requests_have_a_list_of_errors() {
    for (kind, status, ..) in TABLE {
        let body = Failure::new("req_1", &ApiError::new(kind, "why")).to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let errors = &body["error"]["errors"];
        assert_eq!(errors.is_array(), [400, 408, 413].contains(&status), "{kind:?}");
        assert_eq!(errors.is_null(), ![400, 408, 413].contains(&status), "{kind:?}");
        assert_eq!(body["meta"]["requestId"], "req_1");
    }
}

#[test]
fn content_types_are_those_that_sdks_and_curl_expect() {
    let plain = [ErrorKind::InvalidInput, ErrorKind::UnexpectedError];
    for (kind, status, ..) in TABLE {
        let sdk = if status == 429 { PROBLEM_JSON } else { JSON };
        assert_eq!(kind.content_type(Some("application/json")), sdk, "{kind:?}");
        let curl = if plain.contains(&kind) { JSON } else { PROBLEM_JSON };
        assert_eq!(kind.content_type(Some("*/*")), curl, "{kind:?}");
    }
}
