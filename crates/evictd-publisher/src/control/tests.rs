//! The control API over a real listener and a real store.

use std::collections::HashSet;
use std::time::Duration;

use evictd_core::ids::WorkspaceId;
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::{Record, RecordState};
use evictd_ops::clock;
use evictd_ops::http::{HttpLimits, bind, serve};
use evictd_ops::metrics::Registry;
use evictd_store::change::NewRootKey;
use evictd_store::sqlite::SqliteStore;
use serde_json::{Value, json};
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::authority::RoundWish;
use crate::config::ReceiptsConfig;
use crate::metrics;

/// Everything a root key can be allowed here.
const ALL: [&str; 5] =
    ["api.*.create_api", "api.*.delete_api", "api.*.create_key", "api.*.read_key", "api.*.delete_key"];

const ENDPOINTS: [&str; 6] =
    [CreateApi::PATH, DeleteApi::PATH, CreateKey::PATH, GetKey::PATH, DeleteKey::PATH, GetReceipt::PATH];

struct Answer {
    status: u16,
    content_type: String,
    preference_applied: Option<String>,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.body))
    }

    /// What a success says.
    fn data(&self) -> Value {
        assert_eq!((self.status, self.content_type.as_str()), (200, "application/json"), "{}", self.body);
        let mut answer = self.json();
        let request_id = answer["meta"]["requestId"].as_str().unwrap();
        assert!(request_id.starts_with("req_"), "{request_id}");
        answer["data"].take()
    }

    /// The end of the URL that says what went wrong.
    fn r#type(&self) -> String {
        let answer = self.json();
        let r#type = answer["error"]["type"].as_str().unwrap_or_else(|| panic!("no error in {answer}"));
        r#type.trim_start_matches("https://unkey.com/docs/errors/").to_owned()
    }

    /// Checks that this is a well-formed error of this status and type.
    fn refuses(&self, status: u16, r#type: &str) {
        assert_eq!((self.status, self.r#type().as_str()), (status, r#type), "{}", self.body);
        let error = &self.json()["error"];
        assert_eq!(error["status"], status);
        assert!(error["title"].is_string() && error["detail"].is_string(), "{error}");
        assert_eq!(error.get("errors").is_some(), matches!(status, 400 | 408 | 413), "{error}");
    }
}

/// A publisher's store and control API. "root" may do everything in `ws_1`, "poor" nothing; "foreign" may
/// do everything in `ws_2`.
struct Home {
    directory: tempfile::TempDir,
    store: Arc<SqliteStore>,
    registry: Registry,
    address: SocketAddr,
    _shutdown: DropGuard,
}

impl Home {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(&directory.path().join("home.db")).await.unwrap());
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        let metrics = Arc::new(Metrics::new(&registry));
        let config = ReceiptsConfig { bound: Duration::from_secs(30).into(), regions: Vec::new() };
        let (rounds, shutdown) = (RoundWish::default(), CancellationToken::new());
        let receipts =
            Receipts::new(&config, store.clone(), metrics.clone(), &registry, rounds, shutdown.clone());
        let surface = Surface::new(store.clone(), Arc::new(receipts), Wake::default(), metrics);
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, surface, HttpLimits::default(), shutdown.clone()));
        let home = Self { directory, store, registry, address, _shutdown: shutdown.drop_guard() };
        home.root_key("root", "ws_1", &ALL).await;
        home.root_key("poor", "ws_1", &[]).await;
        home.root_key("foreign", "ws_2", &ALL).await;
        home
    }

    async fn root_key(&self, text: &str, workspace: &str, permissions: &[&str]) {
        let root_key = NewRootKey {
            id: KeyId::new(format!("root_{text}")),
            workspace_id: WorkspaceId::new(workspace),
            hash: ids::hash(text),
            start: "unkey_abcd".to_owned(),
            name: Some(text.to_owned()),
            permissions: permissions.iter().map(ToString::to_string).collect(),
            expires_at: None,
        };
        self.store.create_root_key(root_key).await.unwrap();
    }

    /// Changes something past the API.
    async fn sql(&self, statement: &'static str) {
        let done = sqlx::query(statement).execute(&mut self.connect().await).await.unwrap();
        assert_eq!(done.rows_affected(), 1, "{statement}");
    }

    async fn connect(&self) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(self.directory.path().join("home.db"));
        SqliteConnection::connect_with(&options).await.unwrap()
    }

    /// Sends a request: its first line, more header lines, its body.
    async fn send(&self, head: &str, headers: &[&str], body: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let lines = [&[head, "host: home", "connection: close"], headers, &["", body]].concat();
        let request = lines.join("\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
        Answer {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            content_type: header("content-type:").unwrap_or_default().trim().to_owned(),
            preference_applied: header("preference-applied:").map(|value| value.trim().to_owned()),
            body: body.to_owned(),
        }
    }

    async fn post_with(&self, path: &str, headers: &[&str], body: &str) -> Answer {
        let length = format!("content-length: {}", body.len());
        self.send(&format!("POST {path} HTTP/1.1"), &[&[length.as_str()], headers].concat(), body).await
    }

    /// Calls an endpoint as an SDK does.
    async fn call(&self, root: &str, path: &str, body: &Value) -> Answer {
        let authorization = format!("authorization: Bearer {root}");
        self.post_with(path, &["accept: application/json", &authorization], &body.to_string()).await
    }

    async fn create_api(&self, root: &str) -> String {
        let data = self.call(root, CreateApi::PATH, &json!({ "name": "payments" })).await.data();
        data["apiId"].as_str().unwrap().to_owned()
    }

    /// A new key's id and text.
    async fn create_key(&self, api: &str) -> (String, String) {
        let data = self.call("root", CreateKey::PATH, &json!({ "apiId": api })).await.data();
        (data["keyId"].as_str().unwrap().to_owned(), data["key"].as_str().unwrap().to_owned())
    }

    async fn get_key(&self, root: &str, key: &str) -> Answer {
        self.call(root, GetKey::PATH, &json!({ "keyId": key })).await
    }

    async fn delete_key(&self, root: &str, key: &str) -> Answer {
        self.call(root, DeleteKey::PATH, &json!({ "keyId": key, "permanent": false })).await
    }

    async fn delete_api(&self, root: &str, api: &str) -> Answer {
        self.call(root, DeleteApi::PATH, &json!({ "apiId": api })).await
    }

    /// What stands in the log that hasn't been numbered yet.
    async fn news(&self) -> Vec<(Scope, Cause)> {
        let rows = self.store.number(usize::MAX).await.unwrap().rows;
        rows.into_iter().map(|row| (row.scope, row.cause)).collect()
    }

    /// What an agent would be told of this key.
    async fn record(&self, text: &str) -> Record {
        self.store.lookup(ids::hash(text)).await.unwrap().record
    }
}

/// A body that each endpoint accepts, about things that don't exist.
fn good_body(path: &str) -> Value {
    match path {
        CreateApi::PATH => json!({ "name": "payments" }),
        DeleteApi::PATH | CreateKey::PATH => json!({ "apiId": "api_none" }),
        GetReceipt::PATH => json!({ "requestId": "req_none" }),
        _ => json!({ "keyId": "key_none" }),
    }
}

fn key_scope(id: &str, text: &str, api: &str) -> Scope {
    Scope::Key { hash: ids::hash(text), key_id: Some(KeyId::new(id)), api_id: Some(ApiId::new(api)) }
}

#[tokio::test]
async fn a_key_lives_from_its_creation_to_its_deletion() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    assert!(api.starts_with("api_"), "{api}");
    let (id, text) = home.create_key(&api).await;
    assert!(id.starts_with("key_"), "{id}");
    assert_eq!(home.news().await.last().unwrap(), &(key_scope(&id, &text, &api), Cause::Created));
    assert!(matches!(home.record(&text).await, Record::Key(key) if key.state == RecordState::Active));

    assert_eq!(home.delete_key("root", &id).await.data(), json!({}));
    assert_eq!(home.news().await, [(key_scope(&id, &text, &api), Cause::Deleted)]);
    assert!(matches!(home.record(&text).await, Record::Key(key) if key.state == RecordState::Deleted));
}

#[tokio::test]
async fn a_permanent_deletion_leaves_nothing_to_be_found() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let (id, text) = home.create_key(&api).await;
    home.news().await;
    let body = json!({ "keyId": id, "permanent": true });
    assert_eq!(home.call("root", DeleteKey::PATH, &body).await.data(), json!({}));
    assert_eq!(home.news().await, [(key_scope(&id, &text, &api), Cause::Erased)]);
    assert_eq!(home.record(&text).await, Record::Absent);
}

#[tokio::test]
async fn deleting_an_api_ends_all_its_keys_with_one_row_of_the_log() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let mut keys = Vec::new();
    for _ in 0..3 {
        keys.push(home.create_key(&api).await);
    }
    home.news().await;
    assert_eq!(home.delete_api("root", &api).await.data(), json!({}));
    assert_eq!(home.news().await, [(Scope::Api(ApiId::new(api.as_str())), Cause::Deleted)]);
    for (id, text) in keys {
        assert!(matches!(home.record(&text).await, Record::Key(key) if key.state == RecordState::Deleted));
        home.get_key("root", &id).await.refuses(404, "unkey/data/key_not_found");
        home.delete_key("root", &id).await.refuses(404, "unkey/data/key_not_found");
    }
}

#[tokio::test]
async fn a_key_is_created_as_asked_for() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let expires = clock::wall_now().as_millis() + 3_600_000;
    let body = format!(
        r#"{{"apiId":"{api}","prefix":"prod","name":"billing","byteLength":32,"meta":{{"plan": "pro"}},
            "expires":{expires},"enabled":false,"recoverable":false,"roles":[],"permissions":[],"ratelimits":[]}}"#
    );
    let data = home.post_with(CreateKey::PATH, &["authorization: Bearer root"], &body).await.data();
    let (id, text) = (data["keyId"].as_str().unwrap(), data["key"].as_str().unwrap());
    let random = text.strip_prefix("prod_").unwrap();
    assert!((40..=44).contains(&random.len()), "32 bytes in base58: {}", random.len());

    let answer = home.get_key("root", id).await;
    assert!(answer.body.contains(r#""meta":{"plan": "pro"}"#), "byte for byte: {}", answer.body);
    assert!(!answer.body.contains(random), "the key itself is never told again");
    let data = answer.data();
    let now = clock::wall_now().as_millis();
    assert!((now - 60_000..=now).contains(&data["createdAt"].as_i64().unwrap()));
    let start = format!("prod_{}", &random[..4]);
    assert_eq!(
        data,
        json!({
            "keyId": id, "start": start, "enabled": false, "createdAt": data["createdAt"],
            "name": "billing", "meta": { "plan": "pro" }, "expires": expires,
        })
    );
    assert!(matches!(home.record(text).await, Record::Key(key) if key.state == RecordState::Disabled));
}

#[tokio::test]
async fn no_two_keys_are_alike() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let mut seen = HashSet::new();
    for _ in 0..10 {
        let (id, text) = home.create_key(&api).await;
        assert!(seen.insert(id) && seen.insert(text));
    }
}

#[tokio::test]
async fn a_bad_request_is_refused_before_the_root_key_is_looked_up() {
    let home = Home::new().await;
    // The store can't be asked any more.
    home.store.close().await;
    for path in ENDPOINTS {
        let good = good_body(path).to_string();
        for (headers, r#type) in [
            (&[][..], "unkey/authentication/missing"),
            (&["authorization: Bearer "], "unkey/authentication/malformed"),
            (&["authorization: Basic cm9vdA=="], "unkey/authentication/malformed"),
        ] {
            home.post_with(path, headers, &good).await.refuses(400, r#type);
        }
        for body in ["", "{", "[]", "{}", r#"{"keyId":7,"apiId":7,"name":7}"#] {
            let answer = home.post_with(path, &["authorization: Bearer unknown"], body).await;
            answer.refuses(400, "unkey/application/invalid_input");
            assert!(!answer.json()["error"]["errors"].as_array().unwrap().is_empty(), "{path} {body}");
        }
        // Whether the header is there is looked at before the body, its form after it.
        home.post_with(path, &[], "{").await.refuses(400, "unkey/authentication/missing");
        let basic = ["authorization: Basic cm9vdA=="];
        home.post_with(path, &basic, "{").await.refuses(400, "unkey/application/invalid_input");
        let mut strict = good_body(path);
        strict["unknown"] = json!(1);
        home.call("unknown", path, &strict).await.refuses(400, "unkey/application/invalid_input");
        home.call("root", path, &good_body(path)).await.refuses(500, "unkey/application/service_unavailable");
    }
}

#[tokio::test]
async fn what_evictd_leaves_out_is_refused_by_name() {
    let home = Home::new().await;
    for (path, field, value) in [
        (CreateKey::PATH, "ratelimits", json!([{ "name": "requests" }])),
        (CreateKey::PATH, "credits", json!({ "remaining": 5 })),
        (CreateKey::PATH, "recoverable", json!(true)),
        (CreateKey::PATH, "externalId", json!("user_1")),
        (CreateKey::PATH, "roles", json!(["admin"])),
        (CreateKey::PATH, "permissions", json!(["read"])),
        (GetKey::PATH, "decrypt", json!(true)),
    ] {
        let mut body = good_body(path);
        body[field] = value;
        let answer = home.call("root", path, &body).await;
        answer.refuses(400, "unkey/application/invalid_input");
        let message = answer.json()["error"]["errors"][0]["message"].to_string();
        assert!(message.contains(field) && message.contains("not supported"), "{message}");
    }
}

#[tokio::test]
async fn a_root_key_that_may_not_act_is_refused_everywhere() {
    let home = Home::new().await;
    for text in ["deleted", "disabled", "expired", "ended"] {
        home.root_key(text, "ws_1", &ALL).await;
    }
    home.sql("UPDATE root_keys SET deleted_at_m = 1 WHERE id = 'root_deleted'").await;
    home.sql("UPDATE root_keys SET enabled = 0 WHERE id = 'root_disabled'").await;
    home.sql("UPDATE root_keys SET expired = 1 WHERE id = 'root_expired'").await;
    home.sql("UPDATE root_keys SET expires = 1 WHERE id = 'root_ended'").await;
    let api = home.create_api("root").await;
    let (_, ordinary) = home.create_key(&api).await;
    for path in ENDPOINTS {
        for (text, status, r#type) in [
            ("unknown", 401, "unkey/authentication/key_not_found"),
            (&ordinary, 401, "unkey/authentication/key_not_found"),
            ("deleted", 401, "unkey/authentication/key_not_found"),
            ("disabled", 403, "unkey/authorization/key_disabled"),
            ("expired", 403, "unkey/authorization/forbidden"),
            ("ended", 403, "unkey/authorization/forbidden"),
        ] {
            home.call(text, path, &good_body(path)).await.refuses(status, r#type);
        }
    }
}

#[tokio::test]
async fn a_key_must_exist_before_its_deletion_can_be_forbidden() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let (id, text) = home.create_key(&api).await;
    let not_found = "unkey/data/key_not_found";
    home.delete_key("poor", "key_none").await.refuses(404, not_found);
    home.delete_key("foreign", &id).await.refuses(404, not_found);

    let answer = home.delete_key("poor", &id).await;
    answer.refuses(403, "unkey/authorization/insufficient_permissions");
    let detail = format!("Missing one of these permissions: api.*.delete_key or api.{api}.delete_key");
    assert_eq!(answer.json()["error"]["detail"], detail);
    assert!(matches!(home.record(&text).await, Record::Key(key) if key.state == RecordState::Active));

    home.delete_key("root", &id).await.data();
    home.delete_key("root", &id).await.refuses(404, not_found);
    home.delete_key("poor", &id).await.refuses(404, not_found);
    let permanent = json!({ "keyId": id, "permanent": true });
    home.call("root", DeleteKey::PATH, &permanent).await.refuses(404, not_found);
}

#[tokio::test]
async fn who_may_not_delete_an_api_learns_nothing_about_it() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let not_found = "unkey/data/api_not_found";
    for unknown in ["api_none", &api] {
        let answer = home.delete_api("poor", unknown).await;
        answer.refuses(403, "unkey/authorization/insufficient_permissions");
    }
    home.delete_api("root", "api_none").await.refuses(404, not_found);
    home.delete_api("foreign", &api).await.refuses(404, not_found);
    home.delete_api("root", &api).await.data();
    home.delete_api("root", &api).await.refuses(404, not_found);
    home.delete_api("poor", &api).await.refuses(403, "unkey/authorization/insufficient_permissions");
}

#[tokio::test]
async fn a_protected_api_stays_until_it_is_deleted_past_the_protection() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let (_, text) = home.create_key(&api).await;
    home.sql("UPDATE apis SET delete_protection = 1").await;
    home.news().await;

    let answer = home.delete_api("root", &api).await;
    answer.refuses(412, "unkey/application/protected_resource");
    assert_eq!(answer.json()["error"]["title"], "Resource is protected");
    assert_eq!(answer.content_type, "application/json");
    assert_eq!(home.news().await, []);
    assert!(matches!(home.record(&text).await, Record::Key(key) if key.state == RecordState::Active));

    home.delete_api("poor", &api).await.refuses(403, "unkey/authorization/insufficient_permissions");
    home.delete_api("foreign", &api).await.refuses(404, "unkey/data/api_not_found");
    home.sql("UPDATE apis SET deleted_at_m = 1").await;
    home.delete_api("root", &api).await.refuses(404, "unkey/data/api_not_found");
}

#[tokio::test]
async fn who_may_not_create_keys_cannot_tell_whether_the_api_exists() {
    let home = Home::new().await;
    let (api, deleted) = (home.create_api("root").await, home.create_api("root").await);
    home.delete_api("root", &deleted).await.data();
    let mut bodies = HashSet::new();
    for (root, api) in
        [("poor", "api_none"), ("poor", &api), ("foreign", &api), ("root", "api_none"), ("root", &deleted)]
    {
        let answer = home.call(root, CreateKey::PATH, &json!({ "apiId": api })).await;
        answer.refuses(404, "unkey/data/api_not_found");
        bodies.insert(answer.json()["error"].to_string());
    }
    assert_eq!(bodies.len(), 1, "{bodies:?}");
}

#[tokio::test]
async fn a_key_must_exist_before_reading_it_can_be_forbidden() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let (id, _) = home.create_key(&api).await;
    home.get_key("poor", "key_none").await.refuses(404, "unkey/data/key_not_found");
    home.get_key("foreign", &id).await.refuses(404, "unkey/data/key_not_found");
    home.get_key("poor", &id).await.refuses(403, "unkey/authorization/insufficient_permissions");
    assert_eq!(home.get_key("root", &id).await.data()["keyId"], id);
    home.delete_key("root", &id).await.data();
    home.get_key("root", &id).await.refuses(404, "unkey/data/key_not_found");
}

#[tokio::test]
async fn apis_are_created_only_by_a_right_on_all_of_them() {
    let home = Home::new().await;
    home.root_key("narrow", "ws_1", &["api.api_1.create_api", "api.*.*"]).await;
    for root in ["poor", "narrow"] {
        let answer = home.call(root, CreateApi::PATH, &json!({ "name": "payments" })).await;
        answer.refuses(403, "unkey/authorization/insufficient_permissions");
        assert_eq!(answer.json()["error"]["detail"], "Missing permission: 'api.*.create_api'");
    }
}

#[tokio::test]
async fn a_right_on_one_api_suffices_there_and_nowhere_else() {
    let home = Home::new().await;
    let (own, other) = (home.create_api("root").await, home.create_api("root").await);
    let rights = ["create_key", "read_key", "delete_key", "delete_api"].map(|it| format!("api.{own}.{it}"));
    home.root_key("narrow", "ws_1", &rights.each_ref().map(String::as_str)).await;
    let (foreign_key, _) = home.create_key(&other).await;

    let key = home.call("narrow", CreateKey::PATH, &json!({ "apiId": own })).await.data();
    let key = key["keyId"].as_str().unwrap();
    home.get_key("narrow", key).await.data();
    home.delete_key("narrow", key).await.data();
    home.delete_api("narrow", &own).await.data();

    let forbidden = "unkey/authorization/insufficient_permissions";
    let create = home.call("narrow", CreateKey::PATH, &json!({ "apiId": other })).await;
    create.refuses(404, "unkey/data/api_not_found");
    home.get_key("narrow", &foreign_key).await.refuses(403, forbidden);
    home.delete_key("narrow", &foreign_key).await.refuses(403, forbidden);
    home.delete_api("narrow", &other).await.refuses(403, forbidden);
}

#[tokio::test]
async fn errors_come_in_the_type_that_the_client_understands() {
    let home = Home::new().await;
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
            let answer = home.post_with(path, &[&authorization, accept], &body.to_string()).await;
            assert_eq!((answer.status, answer.content_type.as_str()), (*status, content_type), "{accept}");
        }
    }
    // What Unkey's validator refuses is always plain JSON; what its handlers refuse isn't.
    for (authorization, body, content_type) in [
        ("x-authorization: none", r#"{"keyId":"key_none"}"#, "application/json"),
        ("authorization: Basic x", r#"{"keyId":"key_none"}"#, "application/problem+json"),
        ("authorization: Bearer root", "{}", "application/json"),
    ] {
        let answer = home.post_with(DeleteKey::PATH, &["accept: */*", authorization], body).await;
        assert_eq!((answer.status, answer.content_type.as_str()), (400, content_type), "{authorization}");
    }
}

#[tokio::test]
async fn other_paths_methods_and_sizes_are_refused() {
    let home = Home::new().await;
    for path in ["/v2/apis.listApis", "/v2/keys.verifyKey", "/", "/v2/keys.deleteKey/"] {
        let answer = home.post_with(path, &["authorization: Bearer root"], "{}").await;
        assert_eq!((answer.status, answer.body.as_str()), (404, "404 page not found\n"), "{path}");
    }
    let answer = home.send("GET /v2/keys.deleteKey HTTP/1.1", &[], "").await;
    assert_eq!(answer.status, 405);
    let length = format!("content-length: {}", HttpLimits::default().body_bytes_max + 1);
    let answer = home.send("POST /v2/keys.deleteKey HTTP/1.1", &[&length], "").await;
    answer.refuses(413, "user/bad_request/request_body_too_large");
}

#[tokio::test]
async fn a_change_is_audited_with_who_asked_for_it() {
    let home = Home::new().await;
    let api = home.create_api("root").await;
    let (id, _) = home.create_key(&api).await;
    let headers =
        ["authorization: Bearer root", "user-agent: curl/8", "x-forwarded-for:  , 192.0.2.7 , 10.0.0.1"];
    let answer = home.post_with(DeleteKey::PATH, &headers, &json!({ "keyId": id }).to_string()).await;
    answer.data();
    let row: (String, String, String, String, String, String) = sqlx::query_as(
        "SELECT actor_id, actor_name, remote_ip, user_agent, correlation_id, targets FROM audit_log
         WHERE event = 'key.delete'",
    )
    .fetch_one(&mut home.connect().await)
    .await
    .unwrap();
    let (actor, name, remote_ip, user_agent, request, targets) = row;
    assert_eq!((actor.as_str(), name.as_str()), ("root_root", "root"));
    assert_eq!((remote_ip.as_str(), user_agent.as_str()), ("192.0.2.7", "curl/8"));
    assert_eq!(request, answer.json()["meta"]["requestId"].as_str().unwrap());
    assert!(targets.contains(&id), "{targets}");
}

#[tokio::test]
async fn answers_are_counted_by_endpoint_and_class() {
    let home = Home::new().await;
    home.create_api("root").await;
    home.delete_key("root", "key_none").await;
    home.call("root", DeleteKey::PATH, &json!({})).await;
    home.store.close().await;
    home.delete_key("root", "key_none").await;
    let scrape = home.registry.render();
    for (endpoint, class, count) in [
        ("apis.createApi", "2xx", 1),
        ("apis.createApi", "4xx", 0),
        ("keys.deleteKey", "4xx", 2),
        ("keys.deleteKey", "5xx", 1),
    ] {
        let line =
            format!("evictd_publisher_requests_total{{endpoint=\"{endpoint}\",class=\"{class}\"}} {count}");
        assert!(scrape.lines().any(|found| found == line), "no {line} in\n{scrape}");
    }
}

#[tokio::test]
async fn a_preference_for_waiting_is_honoured_by_every_change_and_changes_nothing_else() {
    let home = Home::new().await;
    let prefer = ["authorization: Bearer root", "prefer: respond-async", "prefer: wait=0"];
    let created = home.post_with(CreateApi::PATH, &prefer, r#"{"name":"payments"}"#).await;
    assert_eq!(created.preference_applied.as_deref(), Some("wait=0"));
    let propagation = &created.json()["meta"]["propagation"];
    assert_eq!((&propagation["state"], &propagation["final"]), (&json!("confirmed"), &json!(true)));
    let api = created.data()["apiId"].as_str().unwrap().to_owned();

    let body = json!({ "apiId": api }).to_string();
    let created = home.post_with(CreateKey::PATH, &prefer, &body).await;
    assert_eq!(created.json()["meta"]["propagation"]["state"], "pending", "nobody has numbered it here");
    let key = created.data()["keyId"].as_str().unwrap().to_owned();
    let deletions = [(DeleteKey::PATH, json!({ "keyId": key })), (DeleteApi::PATH, json!({ "apiId": api }))];
    for (path, body) in deletions {
        let deleted = home.post_with(path, &prefer, &body.to_string()).await;
        let meta = &deleted.json()["meta"];
        assert_eq!(meta["propagation"]["requestId"], meta["requestId"]);
        assert_eq!((deleted.preference_applied.as_deref(), deleted.data()), (Some("wait=0"), json!({})));
    }
}

#[tokio::test]
async fn who_prefers_nothing_or_nonsense_gets_the_plain_answer() {
    let home = Home::new().await;
    for prefer in ["accept: application/json", "prefer: wait=soon", "prefer: return=minimal"] {
        let headers = ["authorization: Bearer root", prefer];
        let answer = home.post_with(CreateApi::PATH, &headers, r#"{"name":"payments"}"#).await;
        assert_eq!((answer.status, &answer.preference_applied), (200, &None), "{prefer}");
        assert_eq!(answer.json()["meta"].as_object().unwrap().len(), 1, "{}", answer.body);
    }
    let refused = home.call("root", DeleteKey::PATH, &json!({ "keyId": "key_none" })).await;
    refused.refuses(404, "unkey/data/key_not_found");
}

#[tokio::test]
async fn a_receipt_is_told_to_its_workspace_alone() {
    let home = Home::new().await;
    let answer = home.call("root", CreateApi::PATH, &json!({ "name": "payments" })).await;
    let request = json!({ "requestId": answer.json()["meta"]["requestId"] });
    // No permission is needed: whoever may act for the workspace may know.
    for root in ["root", "poor"] {
        let told = home.call(root, GetReceipt::PATH, &request).await.data();
        assert_eq!(
            (&told["state"], &told["final"], &told["regions"]),
            (&json!("confirmed"), &json!(true), &json!([]))
        );
    }
    home.call("foreign", GetReceipt::PATH, &request).await.refuses(404, "evictd/data/receipt_not_found");
    let unknown = json!({ "requestId": "req_unknown" });
    home.call("root", GetReceipt::PATH, &unknown).await.refuses(404, "evictd/data/receipt_not_found");
}
