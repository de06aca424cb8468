//! The admin port, for monitoring, orchestrators and operators.

use std::future::{Future, ready};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use crate::http::{self, Handler, HttpLimits, Method, Reply, Request, StatusCode, header};
use crate::metrics::Registry;
use crate::readiness::Readiness;

/// The section `[admin]` of a configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    pub listen: SocketAddr,
}

/// Answers `/metrics`, `/livez`, `/readyz` and `/status`.
#[derive(Clone)]
pub struct Admin {
    pub metrics: Registry,
    pub readiness: Readiness,
    /// Makes the answer of `/status`, at each request. Must not block.
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
}

/// How long the admin port waits for requests in flight. It closes last, and its pages are answered from memory.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// What a client may demand of the admin port.
pub fn limits() -> HttpLimits {
    HttpLimits { drain: DRAIN_LIMIT, ..HttpLimits::default() }
}

/// The version of the text format is part of its name.
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

impl Handler for Admin {
    fn handle(&self, request: Request) -> impl Future<Output = Reply> + Send {
        ready(self.answer(&request.parts.method, request.parts.uri.path()))
    }
}

impl Admin {
    fn answer(&self, method: &Method, path: &str) -> Reply {
        let page = match path {
            "/metrics" => Self::metrics,
            // Any answer proves liveness.
            "/livez" => |_: &Self| http::text(StatusCode::OK, "ok"),
            "/readyz" => Self::ready,
            "/status" => Self::status,
            _ => return http::text(StatusCode::NOT_FOUND, "try /metrics, /livez, /readyz or /status\n"),
        };
        if method != Method::GET && method != Method::HEAD {
            let mut reply = http::text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
            reply.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
            return reply;
        }
        page(self)
    }

    fn metrics(&self) -> Reply {
        http::reply(StatusCode::OK, PROMETHEUS_TEXT, Bytes::from(self.metrics.render()))
    }

    fn ready(&self) -> Reply {
        let waiting_for = self.readiness.waiting_for();
        let ready = waiting_for.is_empty();
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut body = json!({ "ready": ready, "waitingFor": waiting_for });
        let warnings = self.readiness.warnings();
        if !warnings.is_empty() {
            body["warnings"] = json!(warnings);
        }
        http::json(status, body.to_string())
    }

    fn status(&self) -> Reply {
        http::json(StatusCode::OK, (self.status)().to_string())
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::metrics::{MetricKind, MetricSpec};

    static SPECS: [MetricSpec; 1] = [MetricSpec {
        name: "test_entries",
        kind: MetricKind::Gauge,
        unit: None,
        labels: &[],
        help: "Entries in the cache.",
    }];

    fn admin() -> Admin {
        Admin {
            metrics: Registry::new(&SPECS, &[]).unwrap(),
            readiness: Readiness::new(),
            status: Arc::new(|| json!({ "mode": "live" })),
        }
    }

    async fn get(admin: &Admin, path: &str) -> (StatusCode, String, String) {
        unpack(admin.answer(&Method::GET, path)).await
    }

    async fn unpack(reply: Reply) -> (StatusCode, String, String) {
        let content_type = reply.headers()[header::CONTENT_TYPE].to_str().unwrap().to_owned();
        let status = reply.status();
        let body = reply.into_body().collect().await.unwrap().to_bytes();
        (status, content_type, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn metrics_are_in_prometheus_text_format() {
        let admin = admin();
        admin.metrics.gauge(&SPECS[0], &[]).set(3.0);
        let (status, content_type, body) = get(&admin, "/metrics").await;
        assert_eq!((status, content_type.as_str()), (StatusCode::OK, PROMETHEUS_TEXT));
        assert!(body.contains("test_entries 3"), "{body}");
    }

    #[tokio::test]
    async fn liveness_is_answered() {
        let (status, _, body) = get(&admin(), "/livez").await;
        assert_eq!((status, body.as_str()), (StatusCode::OK, "ok"));
    }

    #[tokio::test]
    async fn readiness_names_what_is_missing() {
        let admin = admin();
        let bus = admin.readiness.condition("bus", "a connection to NATS");
        let (status, content_type, body) = get(&admin, "/readyz").await;
        assert_eq!((status, content_type.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "application/json"));
        assert_eq!(
            body,
            r#"{"ready":false,"waitingFor":[{"condition":"bus","detail":"a connection to NATS"}]}"#
        );
        bus.met();
        let (status, _, body) = get(&admin, "/readyz").await;
        assert_eq!((status, body.as_str()), (StatusCode::OK, r#"{"ready":true,"waitingFor":[]}"#));
        admin.readiness.warning("feed").unmet("silent");
        let (status, _, body) = get(&admin, "/readyz").await;
        let with_warning =
            r#"{"ready":true,"waitingFor":[],"warnings":[{"condition":"feed","detail":"silent"}]}"#;
        assert_eq!((status, body.as_str()), (StatusCode::OK, with_warning));
    }

    #[tokio::test]
    async fn status_shows_the_daemons_own_answer() {
        assert_eq!(get(&admin(), "/status").await.2, r#"{"mode":"live"}"#);
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused_in_plain_text() {
        let admin = admin();
        let (status, content_type, _) = get(&admin, "/").await;
        assert_eq!((status, content_type.as_str()), (StatusCode::NOT_FOUND, "text/plain; charset=utf-8"));
        for path in ["/metrics", "/livez", "/readyz", "/status"] {
            let reply = admin.answer(&Method::POST, path);
            assert_eq!(reply.status(), StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(reply.headers()[header::ALLOW], "GET, HEAD");
        }
    }
}
