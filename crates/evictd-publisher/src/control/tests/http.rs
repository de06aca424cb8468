//! Methods, headers and sizes.

use super::*;

const ROOT: &str = "authorization: Bearer root";

#[tokio::test]
async fn liveness_needs_no_root_key() {
    let home = ControlFixture::new().await;
    home.store.close().await;
    let alive = home.send(&format!("GET {LIVENESS_PATH} HTTP/1.1"), &[], "").await;
    assert_eq!(alive.data(), json!({ "message": "we're cooking" }));
    let head = home.send(&format!("HEAD {LIVENESS_PATH} HTTP/1.1"), &[], "").await;
    assert_eq!((head.status, &*head.body), (200, ""));
}

#[tokio::test]
async fn other_paths_and_methods_are_refused_in_plain_text() {
    let home = ControlFixture::new().await;
    // Those that Unkey has and evictd leaves out, one of each group.
    let left_out = [
        "keys.whoami",
        "analytics.getVerifications",
        "identities.getIdentity",
        "permissions.createRole",
        "ratelimit.limit",
        "deploy.getDeployment",
        "apps.getApp",
        "deployments.getDeployment",
        "domains.getDomain",
        "environments.getEnvironment",
        "gateway.listPolicies",
        "github.installApp",
        "portal.createSession",
        "projects.getProject",
    ]
    .map(|operation| format!("/v2/{operation}"));
    let others = [
        "/v2/apis.listApis",
        "/",
        "/v2/keys.deleteKey/",
        "/v2/keys.deletekey",
        "/v1/keys.deleteKey",
        "/reference",
    ];
    for path in left_out.iter().map(String::as_str).chain(others) {
        let answer = home.post_with(path, &[ROOT], "{}").await;
        assert_eq!((answer.status, answer.body.as_str()), (404, "404 page not found\n"), "{path}");
        assert!(answer.content_type().starts_with("text/plain"), "{path}");
    }
    for endpoint in Endpoint::ALL {
        let (wrong, allowed) = match endpoint {
            Endpoint::Liveness | Endpoint::OpenApi => (["POST", "PUT", "DELETE"], "GET, HEAD"),
            _ => (["GET", "PUT", "DELETE"], "POST"),
        };
        for method in wrong {
            let answer = home.send(&format!("{method} {} HTTP/1.1", endpoint.path()), &[ROOT], "").await;
            assert_eq!((answer.status, answer.header("allow")), (405, Some(allowed)), "{endpoint:?}");
            assert!(answer.content_type().starts_with("text/plain"), "{endpoint:?}");
        }
    }
}

#[tokio::test]
async fn a_body_is_json_and_its_content_type_agrees() {
    let home = ControlFixture::new().await;
    let body = json!({ "name": "payments" }).to_string();
    for fine in [
        "content-type: application/json",
        "content-type: application/json; charset=utf-8",
        "content-type: Application/JSON ;charset=utf-8",
    ] {
        home.post_with(CreateApi::PATH, &[ROOT, fine], &body).await.data();
    }
    for (wrong, shown) in [
        ("x-content-type: none", ""),
        ("content-type:", ""),
        ("content-type: text/plain", "text/plain"),
        ("content-type: application/x-www-form-urlencoded", "application/x-www-form-urlencoded"),
        ("content-type: application/jsonp; charset=utf-8", "application/jsonp; charset=utf-8"),
        ("content-type: application/problem+json", "application/problem+json"),
    ] {
        for (root, body) in [(ROOT, &*body), ("authorization: Bearer unknown", "{"), (ROOT, "")] {
            let answer = home.post_with(CreateApi::PATH, &[root, wrong], body).await;
            answer.refuses(400, "unkey/application/invalid_input");
            let error = &answer.json()["error"];
            assert_eq!(
                error["detail"],
                format!("POST operation request content type '{shown}' does not exist")
            );
            assert_eq!(error["errors"][0]["location"], "requestBody", "{wrong}");
            assert!(error["errors"][0]["fix"].as_str().unwrap().contains("application/json"), "{error}");
        }
    }
    let both = [ROOT, JSON_TYPE, "content-type: text/plain"];
    home.post_with(CreateApi::PATH, &both, &body).await.refuses(400, "unkey/application/invalid_input");
}

#[tokio::test]
async fn errors_come_in_the_type_that_the_client_understands() {
    let home = ControlFixture::new().await;
    let api = home.create_api("root").await;
    let (key, _) = home.create_key(&api).await;
    let bodies = [
        ("unknown", DeleteKey::PATH, json!({ "keyId": key }), 401),
        ("poor", DeleteKey::PATH, json!({ "keyId": key }), 403),
        ("root", DeleteKey::PATH, json!({ "keyId": "key_none" }), 404),
    ];
    for (root, path, body, status) in &bodies {
        let authorization = format!("authorization: Bearer {root}");
        for (accept, content_type) in [
            ("accept: application/json", "application/json"),
            ("accept: application/json, application/problem+json", "application/problem+json"),
            ("accept: text/html, */*;q=0.1", "application/problem+json"),
            ("x-accept: none", "application/json"),
        ] {
            let headers = [&authorization, JSON_TYPE, accept];
            let answer = home.post_with(path, &headers, &body.to_string()).await;
            assert_eq!((answer.status, answer.content_type()), (*status, content_type), "{accept}");
        }
    }
    // What Unkey's validator refuses is always plain JSON; what its handlers refuse isn't.
    for (authorization, body, content_type) in [
        ("x-authorization: none", r#"{"keyId":"key_none"}"#, "application/json"),
        ("authorization: Basic x", r#"{"keyId":"key_none"}"#, "application/problem+json"),
        (ROOT, "{}", "application/json"),
    ] {
        let headers = ["accept: */*", JSON_TYPE, authorization];
        let answer = home.post_with(DeleteKey::PATH, &headers, body).await;
        assert_eq!((answer.status, answer.content_type()), (400, content_type), "{authorization}");
    }
}

#[tokio::test]
async fn an_unreadable_body_is_refused_in_the_envelope() {
    let limits = HttpLimits {
        body_bytes_max: 1_000,
        body_timeout: Duration::from_millis(50),
        ..HttpLimits::default()
    };
    let home = ControlFixture::with(limits, &[]).await;
    let delete = format!("POST {} HTTP/1.1", DeleteKey::PATH);
    let large = "x".repeat(1_001);
    let length = format!("content-length: {}", large.len());
    let answer = home.send(&delete, &[ROOT, &length], &large).await;
    answer.refuses(413, "user/bad_request/request_body_too_large");
    let chunked = [ROOT, "transfer-encoding: chunked"];
    let answer = home.send(&delete, &chunked, &format!("3e9\r\n{large}\r\n0\r\n\r\n")).await;
    answer.refuses(413, "user/bad_request/request_body_too_large");
    let answer = home.send(&delete, &[ROOT, "content-length: 10"], "{").await;
    answer.refuses(408, "user/bad_request/request_timeout");
    let answer = home.send(&delete, &chunked, "no length\r\n").await;
    answer.refuses(400, "user/bad_request/request_body_unreadable");
}

/// A client of the kind that sends everything before it reads anything.
#[tokio::test]
async fn a_client_that_sends_too_much_gets_the_error_and_continues() {
    let home = ControlFixture::new().await;
    let url = format!("http://{}", home.address);
    let posted = tokio::task::spawn_blocking(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let post = |path: &str, body: Vec<u8>| {
            let request = agent.post(format!("{url}{path}")).header("authorization", "Bearer root");
            let mut answer = request.content_type("application/json").send(body).unwrap();
            (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
        };
        let large = vec![b' '; 32 << 20];
        let refused = [post(DeleteKey::PATH, large.clone()), post("/v2/apis.listApis", large)];
        (refused, post(CreateApi::PATH, br#"{"name":"payments"}"#.to_vec()))
    });
    let ([too_large, unknown], created) = posted.await.unwrap();
    assert_eq!(too_large.0, 413);
    assert!(too_large.1.contains("request_body_too_large"), "{}", too_large.1);
    assert_eq!(unknown, (404, "404 page not found\n".to_owned()));
    assert_eq!(created.0, 200, "{}", created.1);
}

#[tokio::test]
async fn answers_are_counted_by_endpoint_and_class() {
    let home = ControlFixture::new().await;
    home.create_api("root").await;
    home.delete_key("root", "key_none").await;
    home.call("root", DeleteKey::PATH, &json!({})).await;
    home.send(&format!("GET {LIVENESS_PATH} HTTP/1.1"), &[], "").await;
    home.store.close().await;
    home.delete_key("root", "key_none").await;
    let scrape = home.registry.render();
    for (endpoint, class, count) in [
        ("apis.createApi", "2xx", 1),
        ("apis.createApi", "4xx", 0),
        ("keys.deleteKey", "4xx", 2),
        ("keys.deleteKey", "5xx", 1),
        ("liveness", "2xx", 1),
    ] {
        let line =
            format!("evictd_publisher_requests_total{{endpoint=\"{endpoint}\",class=\"{class}\"}} {count}");
        assert!(scrape.lines().any(|found| found == line), "no {line} in\n{scrape}");
    }
}
