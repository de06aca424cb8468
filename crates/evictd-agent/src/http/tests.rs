//! The verify API on a real listener, with an authority in memory.

use std::net::SocketAddr;
use std::time::Duration;

use evictd_core::ids::{ApiId, WorkspaceId};
use evictd_core::invalidation::Scope;
use evictd_ops::clock;
use evictd_ops::http::{HttpLimits, bind, serve};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use evictd_core::record::{KeyRecord, RecordState, RootKeyRecord};
use evictd_core::time::StoreTime;

use super::*;
use crate::fixture::{BASE, TestAgent, at, ends_in, key, key_scope, root_key};
use crate::metrics::LoadOutcome;
use crate::origin::LoadError;

struct VerifyAnswer {
    status: u16,
    content_type: String,
    /// The header `Evictd-Stale`, if there is one.
    stale: String,
    body: String,
}

impl VerifyAnswer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.body))
    }

    /// The data of a verification.
    fn data(&self) -> Value {
        assert_eq!((self.status, self.content_type.as_str()), (200, "application/json"), "{}", self.body);
        self.json()["data"].take()
    }

    /// The status, and the end of the type's URL.
    fn refusal(&self) -> (u16, String) {
        let answer = self.json();
        let error = &answer["error"];
        assert_eq!(error["status"], self.status);
        assert!(answer["meta"]["requestId"].as_str().is_some_and(|id| id.starts_with("req_")), "{answer}");
        let r#type = error["type"].as_str().unwrap_or_default();
        (self.status, r#type.trim_start_matches("https://unkey.com/docs/errors/").to_owned())
    }
}

/// A serving agent. Its home region has the root key "root" and the keys "alice" and "bob".
struct Gateway {
    agent: TestAgent,
    address: SocketAddr,
    _shutdown: DropGuard,
}

impl Gateway {
    async fn new() -> Self {
        Self::of(TestAgent::live()).await
    }

    async fn of(agent: TestAgent) -> Self {
        agent.home.put(hash("root"), Record::RootKey(root_key(&["api.*.verify_key"])));
        agent.home.put(hash("alice"), Record::Key(key("key_1")));
        agent.home.put(hash("bob"), Record::Key(key("key_2")));
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = HttpLimits { body_bytes_max: BODY_BYTES_MAX, ..HttpLimits::default() };
        let shutdown = CancellationToken::new();
        tokio::spawn(serve(
            listener,
            VerifyApi::new(agent.verifier.clone(), false),
            limits,
            shutdown.clone(),
        ));
        Self { agent, address, _shutdown: shutdown.drop_guard() }
    }

    async fn send(&self, head: &str, body: &str) -> VerifyAnswer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{head}\r\nhost: gateway\r\nconnection: close\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let header = |name: &str| {
            head.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
        };
        VerifyAnswer {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            content_type: header("content-type:"),
            stale: header("evictd-stale:"),
            body: body.to_owned(),
        }
    }

    /// Posts `body` with these further header lines.
    async fn post(&self, headers: &[&str], body: &str) -> VerifyAnswer {
        let length = format!("content-length: {}", body.len());
        let json = "content-type: application/json";
        let lines = [&["POST /v2/keys.verifyKey HTTP/1.1", &length, json], headers].concat();
        self.send(&lines.join("\r\n"), body).await
    }

    /// Verifies a key as an SDK does.
    async fn verify_as(&self, root: &str, key: &str) -> VerifyAnswer {
        let authorization = format!("authorization: Bearer {root}");
        self.post(&["accept: application/json", &authorization], &json!({ "key": key }).to_string()).await
    }

    async fn verify(&self, key: &str) -> VerifyAnswer {
        self.verify_as("root", key).await
    }

    /// Verifies a key with a permission query.
    async fn verify_with_query(&self, key: &str, query: &str) -> VerifyAnswer {
        let body = json!({ "key": key, "permissions": query }).to_string();
        self.post(&["accept: application/json", ROOT], &body).await
    }

    fn verified(&self, code: &str) -> u64 {
        self.agent.metric(&format!("evictd_agent_verifications_total{{code=\"{code}\"}}"))
    }
}

const ROOT: &str = "authorization: Bearer root";

fn not_found() -> Value {
    json!({ "valid": false, "code": "NOT_FOUND" })
}

#[tokio::test]
async fn a_valid_key_comes_with_its_details() {
    let gateway = Gateway::new().await;
    let end = ends_in(Duration::from_hours(1));
    let record = KeyRecord {
        name: Some("billing".into()),
        meta: Some(r#"{"plan": "pro"}"#.into()),
        expires_at: Some(end),
        ..key("key_3")
    };
    gateway.agent.home.put(hash("carol"), Record::Key(record));
    let answer = gateway.verify("carol").await;
    assert!(answer.body.contains(r#""meta":{"plan": "pro"}"#), "byte for byte: {}", answer.body);
    assert_eq!(
        answer.data(),
        json!({
            "valid": true, "code": "VALID", "keyId": "key_3", "name": "billing",
            "meta": { "plan": "pro" }, "expires": end.as_millis(), "enabled": true,
        })
    );
    assert_eq!(
        gateway.verify("alice").await.data(),
        json!({ "valid": true, "code": "VALID", "keyId": "key_1", "enabled": true })
    );
    assert_eq!(gateway.verified("VALID"), 2);
}

#[tokio::test]
async fn an_invalid_key_is_answered_with_the_reason() {
    let gateway = Gateway::new().await;
    let now = ends_in(Duration::ZERO);
    for (record, code, enabled) in [
        (KeyRecord { state: RecordState::Disabled, ..key("key_3") }, "DISABLED", json!(false)),
        (KeyRecord { state: RecordState::Expired, ..key("key_3") }, "EXPIRED", json!(true)),
        (KeyRecord { expires_at: Some(now), ..key("key_3") }, "EXPIRED", json!(true)),
        (KeyRecord { state: RecordState::WorkspaceDisabled, ..key("key_3") }, "FORBIDDEN", json!(null)),
    ] {
        gateway.agent.home.put(hash("carol"), Record::Key(record));
        gateway.agent.invalidate(key_scope(hash("carol")));
        let data = gateway.verify("carol").await.data();
        assert_eq!(data["valid"], false);
        assert_eq!((&data["code"], &data["enabled"]), (&json!(code), &enabled));
        assert_eq!(data["keyId"], "key_3");
    }
}

#[tokio::test]
async fn an_expiry_of_zero_has_passed_and_is_omitted() {
    let gateway = Gateway::new().await;
    for state in [RecordState::Active, RecordState::Expired] {
        let record = KeyRecord { state, expires_at: Some(StoreTime(0)), ..key("key_3") };
        gateway.agent.home.put(hash("carol"), Record::Key(record));
        gateway.agent.invalidate(key_scope(hash("carol")));
        assert_eq!(
            gateway.verify("carol").await.data(),
            json!({ "valid": false, "code": "EXPIRED", "keyId": "key_3", "enabled": true })
        );
    }
    let ended = RootKeyRecord { expires_at: Some(StoreTime(0)), ..root_key(&["api.*.verify_key"]) };
    gateway.agent.home.put(hash("root"), Record::RootKey(ended));
    gateway.agent.invalidate(Scope::Workspace(WorkspaceId::new("ws_1")));
    let refusal = gateway.verify("carol").await.refusal();
    assert_eq!(refusal, (403, "unkey/authorization/forbidden".to_owned()));
}

#[tokio::test]
async fn keys_invisible_to_the_caller_are_not_found() {
    let gateway = Gateway::new().await;
    let put = |text: &str, record| gateway.agent.home.put(hash(text), record);
    put("foreign", Record::Key(KeyRecord { workspace_id: WorkspaceId::new("ws_2"), ..key("key_3") }));
    put("deleted", Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_4") }));
    put("other", Record::RootKey(root_key(&["api.*.verify_key"])));
    for key in ["absent", "foreign", "deleted", "other", "root"] {
        assert_eq!(gateway.verify(key).await.data(), not_found(), "{key}");
    }
    assert_eq!(gateway.verified("NOT_FOUND"), 5);

    let permissions =
        [&[][..], &["api.*.delete_key"], &["api.api_2.verify_key"], &["api.*.*"], &["verify_key"]];
    for permissions in permissions {
        put("root", Record::RootKey(root_key(permissions)));
        gateway.agent.invalidate(Scope::Workspace(WorkspaceId::new("ws_1")));
        assert_eq!(gateway.verify("alice").await.data(), not_found(), "{permissions:?}");
    }
    put("root", Record::RootKey(root_key(&["api.api_1.verify_key"])));
    gateway.agent.invalidate(Scope::Workspace(WorkspaceId::new("ws_1")));
    assert_eq!(gateway.verify("alice").await.data()["code"], "VALID");
}

#[tokio::test]
async fn a_verification_returns_permissions_and_identity() {
    let gateway = Gateway::new().await;
    let record = KeyRecord {
        external_id: Some("user_1".into()),
        permissions: vec!["documents.read".into(), "documents.write".into()],
        ..key("key_3")
    };
    gateway.agent.home.put(hash("carol"), Record::Key(record));
    let details = |valid: bool, code: &str| {
        json!({
            "valid": valid, "code": code, "keyId": "key_3", "enabled": true,
            "permissions": ["documents.read", "documents.write"],
            "identity": { "id": "id_K3s1UbLXo492JC3ERX7Gte", "externalId": "user_1" },
        })
    };
    assert_eq!(gateway.verify("carol").await.data(), details(true, "VALID"));
    for met in ["documents.read", "Documents.read or (documents.read AND documents.write)"] {
        assert_eq!(gateway.verify_with_query("carol", met).await.data(), details(true, "VALID"), "{met}");
    }
    for lacking in ["documents.*", "Documents.Read", "documents.read AND users.view"] {
        let data = gateway.verify_with_query("carol", lacking).await.data();
        assert_eq!(data, details(false, "INSUFFICIENT_PERMISSIONS"), "{lacking}");
    }
    assert_eq!((gateway.verified("VALID"), gateway.verified("INSUFFICIENT_PERMISSIONS")), (3, 3));
}

#[tokio::test]
async fn a_bad_query_about_an_invisible_key_is_not_found() {
    let gateway = Gateway::new().await;
    let put = |text: &str, record| gateway.agent.home.put(hash(text), record);
    put("foreign", Record::Key(KeyRecord { workspace_id: WorkspaceId::new("ws_2"), ..key("key_3") }));
    put("deleted", Record::Key(KeyRecord { state: RecordState::Deleted, ..key("key_4") }));
    for key in ["absent", "foreign", "deleted", "root"] {
        assert_eq!(gateway.verify_with_query(key, "a AND").await.data(), not_found(), "{key}");
    }
    put("root", Record::RootKey(root_key(&["api.api_2.verify_key"])));
    gateway.agent.invalidate(Scope::All);
    assert_eq!(
        gateway.verify_with_query("alice", "a AND").await.data(),
        not_found(),
        "it may not verify this API"
    );
}

#[tokio::test]
async fn a_bad_query_about_a_visible_key_is_rejected_in_any_state() {
    let gateway = Gateway::new().await;
    for state in
        [RecordState::Active, RecordState::Disabled, RecordState::Expired, RecordState::WorkspaceDisabled]
    {
        gateway.agent.home.put(hash("carol"), Record::Key(KeyRecord { state, ..key("key_3") }));
        gateway.agent.invalidate(key_scope(hash("carol")));
        let answer = gateway.verify_with_query("carol", "a AND (b OR").await;
        let syntax = "user/bad_request/permissions_query_syntax_error";
        assert_eq!(answer.refusal(), (400, syntax.to_owned()), "{state:?}");
        assert_eq!(answer.content_type, "application/json");
        let error = &answer.json()["error"];
        assert_eq!(error["errors"][0]["location"], "/properties/permissions");
        let message = "at character 12: expected a permission or '(', found the end";
        assert_eq!(error["errors"][0]["message"], message);
    }
    let body = json!({ "key": "carol", "permissions": "AND" }).to_string();
    let answer = gateway.post(&[ROOT, "accept: */*"], &body).await;
    assert_eq!((answer.status, answer.content_type.as_str()), (400, "application/problem+json"));
    for code in ["VALID", "DISABLED", "EXPIRED", "FORBIDDEN", "INSUFFICIENT_PERMISSIONS"] {
        assert_eq!(gateway.verified(code), 0, "{code}: a rejected request is no verification");
    }
}

#[tokio::test]
async fn the_keys_state_precedes_its_permissions() {
    let gateway = Gateway::new().await;
    for (state, code) in [
        (RecordState::Disabled, "DISABLED"),
        (RecordState::Expired, "EXPIRED"),
        (RecordState::WorkspaceDisabled, "FORBIDDEN"),
    ] {
        let record = KeyRecord { state, permissions: vec!["a".into()], ..key("key_3") };
        gateway.agent.home.put(hash("carol"), Record::Key(record));
        gateway.agent.invalidate(key_scope(hash("carol")));
        for query in ["a", "b"] {
            let data = gateway.verify_with_query("carol", query).await.data();
            assert_eq!((&data["code"], &data["valid"]), (&json!(code), &json!(false)), "{query}");
        }
    }
}

/// The answer must not reveal that an invisible key is disabled or expired.
#[tokio::test]
async fn visibility_precedes_the_keys_own_state() {
    let gateway = Gateway::new().await;
    for state in [RecordState::Disabled, RecordState::Expired] {
        let record = KeyRecord { state, api_id: ApiId::new("api_2"), ..key("key_3") };
        gateway.agent.home.put(hash("carol"), Record::Key(record));
        gateway.agent.home.put(hash("root"), Record::RootKey(root_key(&["api.api_1.verify_key"])));
        gateway.agent.invalidate(Scope::All);
        assert_eq!(gateway.verify("carol").await.data(), not_found());
    }
}

#[tokio::test]
async fn a_bad_request_is_rejected_before_any_lookup() {
    let gateway = Gateway::new().await;
    let unknown = "authorization: Bearer unknown";
    let long = json!({ "key": "x".repeat(513) }).to_string();
    let query = json!({ "key": "alice", "permissions": "x".repeat(1001) }).to_string();
    for body in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"key":""}"#,
        r#"{"key":7}"#,
        &long,
        r#"{"key":"alice","apiId":"api_1"}"#,
        r#"{"key":"alice","permissions":""}"#,
        r#"{"key":"alice","permissions":["a"]}"#,
        &query,
        r#"{"key":"alice","ratelimits":[{"name":"requests"}]}"#,
        r#"{"key":"alice","credits":{"cost":1}}"#,
        r#"{"key":"alice","keyspaces":[]}"#,
    ] {
        let answer = gateway.post(&[unknown, "accept: */*"], body).await;
        assert_eq!(answer.refusal(), (400, "unkey/application/invalid_input".to_owned()), "{body}");
        assert_eq!(answer.content_type, "application/json", "as Unkey's validator answers");
        assert!(!answer.json()["error"]["errors"].as_array().unwrap().is_empty(), "{body}");
    }
    for (headers, r#type) in [
        (&[][..], "unkey/application/invalid_input"),
        (&["authorization:"], "unkey/application/invalid_input"),
        (&["authorization: Bearer "], "unkey/authentication/malformed"),
        (&["authorization: Basic root"], "unkey/authentication/malformed"),
        (&["authorization: root"], "unkey/authentication/malformed"),
    ] {
        let answer = gateway.post(headers, r#"{"key":"alice"}"#).await;
        assert_eq!(answer.refusal(), (400, r#type.to_owned()));
    }
    for headers in [&[][..], &["authorization:"]] {
        let answer = gateway.post(headers, "{").await;
        let error = &answer.json()["error"];
        assert_eq!(error["detail"], "Authorization header for 'bearer' scheme", "before the body");
        assert_eq!(error["errors"][0]["location"], "security");
    }
    let body = r#"{"key":"alice"}"#;
    let head = format!("POST /v2/keys.verifyKey HTTP/1.1\r\n{ROOT}\r\ncontent-length: {}", body.len());
    let untyped = gateway.send(&head, body).await;
    assert_eq!(untyped.json()["error"]["detail"], "POST operation request content type '' does not exist");
    assert_eq!(gateway.agent.home.lookups(), 0);
}

#[tokio::test]
async fn an_unauthorized_root_key_is_rejected_before_the_lookup() {
    let gateway = Gateway::new().await;
    let root = |state| Record::RootKey(RootKeyRecord { state, ..root_key(&["api.*.verify_key"]) });
    let ended = RootKeyRecord { expires_at: Some(ends_in(Duration::ZERO)), ..root_key(&[]) };
    let put = |text: &str, record| gateway.agent.home.put(hash(text), record);
    put("deleted", root(RecordState::Deleted));
    put("disabled", root(RecordState::Disabled));
    put("closed", root(RecordState::WorkspaceDisabled));
    put("expired", root(RecordState::Expired));
    put("ended", Record::RootKey(ended));
    for (lookups, (text, status, r#type)) in [
        ("unknown", 401, "unkey/authentication/key_not_found"),
        ("deleted", 401, "unkey/authentication/key_not_found"),
        // An ordinary key.
        ("alice", 401, "unkey/authentication/key_not_found"),
        ("disabled", 403, "unkey/authorization/key_disabled"),
        ("closed", 403, "unkey/authorization/workspace_disabled"),
        ("expired", 403, "unkey/authorization/forbidden"),
        ("ended", 403, "unkey/authorization/forbidden"),
    ]
    .into_iter()
    .enumerate()
    {
        let answer = gateway.verify_as(text, "bob").await;
        assert_eq!(answer.refusal(), (status, r#type.to_owned()), "{text}");
        assert_eq!(gateway.agent.home.lookups(), lookups + 1, "{text}");
    }
    for code in ["VALID", "NOT_FOUND"] {
        assert_eq!(gateway.verified(code), 0, "{code}");
    }
}

#[tokio::test]
async fn without_an_answer_it_denies_with_the_reason() {
    let gateway = Gateway::new().await;
    gateway.agent.home.fail(Some((LoadOutcome::Timeout, LoadError::Unreachable)));
    let answer = gateway.verify("alice").await;
    assert_eq!(answer.refusal(), (503, "unkey/application/service_unavailable".to_owned()));
    assert_eq!(answer.content_type, "application/json");
    let mut body = answer.json();
    body["meta"].take();
    assert_eq!(
        body,
        json!({
            "meta": null,
            "error": {
                "title": "Service Unavailable",
                "detail": "This agent has no record that is fresh enough, and no publisher answered; see its /readyz",
                "status": 503,
                "type": "https://unkey.com/docs/errors/unkey/application/service_unavailable",
            },
        })
    );

    let answer = gateway.post(&[ROOT, "accept: */*"], r#"{"key":"alice"}"#).await;
    assert_eq!((answer.status, answer.content_type.as_str()), (503, "application/problem+json"));
    gateway.agent.home.fail(Some((LoadOutcome::Busy, LoadError::Busy)));
    let answer = gateway.verify("alice").await;
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("try again"), "{}", answer.body);
    assert_eq!(gateway.verified("UNAVAILABLE"), 3);
}

#[tokio::test]
async fn when_cut_off_only_cached_keys_are_answered() {
    let gateway = Gateway::new().await;
    assert_eq!(gateway.verify("alice").await.data()["code"], "VALID");
    gateway.agent.home.fail(Some((LoadOutcome::Unsent, LoadError::Unreachable)));
    assert_eq!(gateway.verify("alice").await.data()["code"], "VALID");
    assert_eq!(gateway.verify("bob").await.status, 503);
    gateway.agent.invalidate(key_scope(hash("alice")));
    assert_eq!(gateway.verify("alice").await.status, 503, "it was deleted, so the cached record is void");
}

#[tokio::test]
async fn an_applied_deletion_takes_effect_at_once() {
    let gateway = Gateway::new().await;
    assert_eq!(gateway.verify("alice").await.data()["code"], "VALID");
    let deleted = KeyRecord { state: RecordState::Deleted, ..key("key_1") };
    gateway.agent.home.put(hash("alice"), Record::Key(deleted));
    assert_eq!(
        gateway.verify("alice").await.data()["code"],
        "VALID",
        "the agent hasn't received the invalidation"
    );
    gateway.agent.invalidate(key_scope(hash("alice")));
    assert_eq!(gateway.verify("alice").await.data(), not_found());
}

#[tokio::test]
async fn the_openapi_document_of_an_agent_is_served() {
    let gateway = Gateway::new().await;
    let answer = gateway.send("GET /openapi.yaml HTTP/1.1", "").await;
    assert_eq!((answer.status, answer.content_type.as_str()), (200, "application/yaml"));
    assert!(answer.body.contains("\"/v2/keys.verifyKey\":") && !answer.body.contains("deleteKey"));
    assert_eq!(gateway.send("POST /openapi.yaml HTTP/1.1\r\ncontent-length: 0", "").await.status, 405);
}

#[tokio::test]
async fn other_paths_methods_and_sizes_are_rejected() {
    let gateway = Gateway::new().await;
    let answer = gateway.send("POST /v2/keys.deleteKey HTTP/1.1\r\ncontent-length: 2", "{}").await;
    assert_eq!((answer.status, answer.body.as_str()), (404, "404 page not found\n"));
    let answer = gateway.send("GET /v2/keys.verifyKey HTTP/1.1", "").await;
    assert_eq!(answer.status, 405);
    let length = BODY_BYTES_MAX + 1;
    let head = format!("POST /v2/keys.verifyKey HTTP/1.1\r\n{ROOT}\r\ncontent-length: {length}");
    let answer = gateway.send(&head, "").await;
    assert_eq!(answer.refusal(), (413, "user/bad_request/request_body_too_large".to_owned()));
}

/// Failure: all requests of a gateway with a revoked root key are rejected, and no metric shows it.
#[tokio::test]
async fn every_answer_is_counted_by_its_status() {
    let gateway = Gateway::new().await;
    gateway.verify("alice").await;
    gateway.verify_as("unknown", "alice").await;
    let expired = RootKeyRecord { expires_at: Some(StoreTime(0)), ..root_key(&["api.*.verify_key"]) };
    gateway.agent.home.put(hash("expired"), Record::RootKey(expired));
    gateway.verify_as("expired", "alice").await;
    gateway.post(&[ROOT], "{}").await;
    gateway.send("POST /v2/keys.deleteKey HTTP/1.1\r\ncontent-length: 0", "").await;
    gateway.send("GET /v2/keys.verifyKey HTTP/1.1", "").await;
    gateway.agent.home.fail(Some((LoadOutcome::NoPublisher, LoadError::Unreachable)));
    gateway.verify("absent").await;
    // A header without a name: the server rejects it before any handler.
    gateway.send("POST /v2/keys.verifyKey HTTP/1.1\r\n: x", "").await;
    let counted = ["200", "400", "401", "403", "404", "405", "503", "other"].map(|status| {
        (status, gateway.agent.metric(&format!("evictd_agent_requests_total{{status=\"{status}\"}}")))
    });
    let expected =
        [("200", 1), ("400", 2), ("401", 1), ("403", 1), ("404", 1), ("405", 1), ("503", 1), ("other", 0)];
    assert_eq!(counted, expected);
    gateway.agent.metrics.answered(StatusCode::IM_A_TEAPOT);
    assert_eq!(gateway.agent.metric(r#"evictd_agent_requests_total{status="other"}"#), 1);
}

#[tokio::test]
async fn a_stale_answer_is_marked_and_counted() {
    let agent = TestAgent::expired_with(&[("partition.policy", "serve_stale")]);
    let ago = |seconds| clock::lease_now().before(Duration::from_secs(seconds));
    let root = Record::RootKey(root_key(&["api.*.verify_key"]));
    agent.cached(hash("root"), root, at(BASE), ago(1));
    agent.cached(hash("fresh"), Record::Key(key("key_1")), at(BASE), ago(2));
    agent.cached(hash("old"), Record::Key(key("key_2")), at(BASE), ago(41));
    let gateway = Gateway::of(agent).await;
    gateway.agent.home.fail(Some((LoadOutcome::NoPublisher, LoadError::Unreachable)));

    let fresh = gateway.verify("fresh").await;
    assert_eq!((fresh.stale.as_str(), &fresh.json()["meta"]["stale"]), ("", &Value::Null));
    let old = gateway.verify("old").await;
    assert_eq!((old.stale.as_str(), &old.json()["meta"]["stale"]), ("41", &json!({ "ageSeconds": 41 })));
    assert!(old.json()["meta"]["requestId"].as_str().is_some_and(|id| id.starts_with("req_")));
    assert_eq!(old.data(), json!({ "valid": true, "code": "VALID", "keyId": "key_2", "enabled": true }));
    let stale = r#"evictd_agent_stale_answers_total{code="VALID"}"#;
    assert_eq!((gateway.verified("VALID"), gateway.agent.metric(stale)), (2, 1));
    assert_eq!(gateway.verify("absent").await.status, 503);
}

#[tokio::test]
async fn a_stale_root_key_marks_answers_and_errors() {
    let agent = TestAgent::expired_with(&[("partition.policy", "serve_stale")]);
    let old = clock::lease_now().before(Duration::from_secs(50));
    agent.cached(hash("root"), Record::RootKey(root_key(&["api.*.verify_key"])), at(BASE), old);
    agent.cached(hash("key"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    let disabled = RootKeyRecord { state: RecordState::Disabled, ..root_key(&[]) };
    agent.cached(hash("disabled"), Record::RootKey(disabled), at(BASE), old);
    let gateway = Gateway::of(agent).await;
    gateway.agent.home.fail(Some((LoadOutcome::NoPublisher, LoadError::Unreachable)));
    let answer = gateway.verify("key").await;
    assert_eq!((answer.status, answer.stale.as_str()), (200, "50"));
    let refused = gateway.verify_as("disabled", "key").await;
    assert_eq!((refused.status, refused.stale.as_str()), (403, "50"));
}

#[tokio::test]
async fn a_root_key_stale_by_another_apis_policy_is_denied() {
    let agent =
        TestAgent::expired_with(&[("partition.policy", "deny"), ("partition.apis.api_other", "serve_stale")]);
    let old = clock::lease_now().before(Duration::from_secs(50_000));
    agent.cached(hash("root"), Record::RootKey(root_key(&["api.*.verify_key"])), at(BASE), old);
    agent.cached(hash("key"), Record::Key(key("key_1")), at(BASE), clock::lease_now());
    let gateway = Gateway::of(agent).await;
    gateway.agent.home.fail(Some((LoadOutcome::NoPublisher, LoadError::Unreachable)));
    let denied = gateway.verify("key").await;
    assert_eq!((denied.status, denied.stale.as_str()), (503, ""));
}
