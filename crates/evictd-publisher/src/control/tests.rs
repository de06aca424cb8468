//! The control API over a real listener and a real store.
//!
//! * [`access`]: the order of checks, and permissions.
//! * [`apis`], [`keys`], [`verify`], [`propagation`]: what each endpoint does.
//! * [`http`]: methods, headers, sizes. [`openapi`]: the document that describes them.
//! * [`rate_limit`]: how much a workspace may request.

mod access;
mod apis;
mod http;
mod keys;
mod openapi;
mod propagation;
mod rate_limit;
mod verify;

use std::collections::BTreeMap;
use std::time::Duration;

use evictd_core::history::RoundToken;
use evictd_core::ids::{ApiId, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Scope};
use evictd_core::record::{KeyRecord, Record};
use evictd_ops::http::{HttpLimits, bind, serve};
use evictd_ops::metrics::Registry;
use evictd_ops::readiness::Readiness;
use evictd_store::operator::{NewRootKey, Operator};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{LogStore, OperatorStore, RecordStore};
use evictd_wire::api::ids;
use evictd_wire::api::requests::LIVENESS_PATH;
use serde_json::{Value, json};
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::*;
use crate::config::{RateLimitConfig, ReceiptsConfig, RequestLimit};
use crate::history::HomeHistory;
use crate::metrics;
use crate::receipts::ReceiptsTask;
use crate::shared::Shared;

/// Every right that an endpoint requires, on all APIs.
const ALL: [&str; 8] = [
    "api.*.create_api",
    "api.*.read_api",
    "api.*.delete_api",
    "api.*.create_key",
    "api.*.read_key",
    "api.*.update_key",
    "api.*.delete_key",
    "api.*.verify_key",
];

const JSON_TYPE: &str = "content-type: application/json";

/// All but those that require no root key.
fn endpoints() -> impl Iterator<Item = &'static str> {
    Endpoint::ALL.into_iter().filter(|endpoint| !endpoint.is_open()).map(Endpoint::path)
}

struct ControlResponse {
    status: u16,
    /// By name, in small letters.
    headers: BTreeMap<String, String>,
    body: String,
}

impl ControlResponse {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn content_type(&self) -> &str {
        self.header("content-type").unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.body))
    }

    fn request_id(&self) -> String {
        let answer = self.json();
        let request_id = answer["meta"]["requestId"].as_str().unwrap_or_else(|| panic!("none in {answer}"));
        assert!(request_id.starts_with("req_"), "{request_id}");
        request_id.to_owned()
    }

    /// The data of a success.
    fn data(&self) -> Value {
        assert_eq!((self.status, self.content_type()), (200, "application/json"), "{}", self.body);
        self.request_id();
        self.json()["data"].take()
    }

    /// The end of the error's URL.
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
        self.request_id();
    }
}

/// A publisher's store and control API. "root" may do everything in `ws_1`, "poor" nothing; "foreign" may
/// do everything in `ws_2`.
struct ControlFixture {
    directory: tempfile::TempDir,
    store: Arc<SqliteStore>,
    registry: Registry,
    address: SocketAddr,
    _shutdown: DropGuard,
}

impl ControlFixture {
    async fn new() -> Self {
        Self::with(HttpLimits::default(), &[]).await
    }

    /// With limits of single workspaces.
    async fn with(limits: HttpLimits, workspaces: &[(&str, RequestLimit)]) -> Self {
        Self::that_trusts(Duration::from_hours(1), limits, workspaces, &[]).await
    }

    async fn behind(proxies: &[&str]) -> Self {
        Self::that_trusts(Duration::from_hours(1), HttpLimits::default(), &[], proxies).await
    }

    /// With a limit to the age of the round that vouches for the store.
    async fn that_trusts(
        trust: Duration,
        limits: HttpLimits,
        workspaces: &[(&str, RequestLimit)],
        proxies: &[&str],
    ) -> Self {
        let parsed = |proxy: &str| proxy.to_owned().try_into().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(&directory.path().join("home.db")).await.unwrap());
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        let config = ReceiptsConfig { bound: Duration::from_secs(30).into(), regions: Vec::new() };
        let shutdown = CancellationToken::new();
        let history = Arc::new(HomeHistory::read(store.clone()).await.unwrap());
        let shared = Shared::serving(history, &registry);
        let (receipts, _, task) =
            ReceiptsTask::new(&config, store.clone(), shared.clone(), &registry, shutdown.clone());
        tokio::spawn(task.run());
        let rate_limit = RateLimitConfig {
            requests_per_minute: RequestLimit::Unlimited,
            workspaces: workspaces.iter().map(|(name, limit)| ((*name).to_owned(), *limit)).collect(),
        };
        shared.fence.raise(clock::lease_now(), RoundToken(1));
        let control = ControlApi {
            store: store.clone(),
            receipts,
            turns: StoreTurns::new(store.concurrency()),
            trials: ChangeTrials::new(Readiness::new().condition("changes", "")),
            limits: Arc::new(RateLimits::new(&rate_limit)),
            proxies: TrustedProxies::new(proxies.iter().map(|proxy| parsed(proxy)).collect()),
            wake: shared.wake.clone(),
            freshness: shared.freshness_guard(trust),
            metrics: shared.metrics,
            log: Arc::new(AnswerLog::new(false)),
        };
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, control, limits, shutdown.clone()));
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
        let operator = Operator { name: "ops".to_owned(), request_id: format!("req_{text}") };
        self.store.create_root_key(&operator, root_key).await.unwrap();
    }

    /// Makes a change outside the API.
    async fn sql(&self, statement: &'static str) {
        let done = sqlx::query(statement).execute(&mut self.connect().await).await.unwrap();
        assert_eq!(done.rows_affected(), 1, "{statement}");
    }

    async fn connect(&self) -> SqliteConnection {
        let options = SqliteConnectOptions::new().filename(self.directory.path().join("home.db"));
        SqliteConnection::connect_with(&options).await.unwrap()
    }

    /// Sends a request: its first line, more header lines, its body.
    async fn send(&self, head: &str, headers: &[&str], body: &str) -> ControlResponse {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let lines = [&[head, "host: home", "connection: close"], headers, &["", body]].concat();
        let request = lines.join("\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.into(), value.into()));
        let answer = ControlResponse {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            headers: head.lines().filter_map(header).collect(),
            body: body.to_owned(),
        };
        openapi::check(lines[0], &answer);
        answer
    }

    async fn post_with(&self, path: &str, headers: &[&str], body: &str) -> ControlResponse {
        let length = format!("content-length: {}", body.len());
        self.send(&format!("POST {path} HTTP/1.1"), &[&[length.as_str()], headers].concat(), body).await
    }

    /// Calls an endpoint as an SDK does.
    async fn call(&self, root: &str, path: &str, body: &Value) -> ControlResponse {
        let authorization = format!("authorization: Bearer {root}");
        let headers = ["accept: application/json", JSON_TYPE, &authorization];
        self.post_with(path, &headers, &body.to_string()).await
    }

    async fn create_api(&self, root: &str) -> String {
        let data = self.call(root, CreateApi::PATH, &json!({ "name": "payments" })).await.data();
        data["apiId"].as_str().unwrap().to_owned()
    }

    /// A new key's id and text.
    async fn create_key(&self, api: &str) -> (String, String) {
        self.create_key_with(&json!({ "apiId": api })).await
    }

    async fn create_key_with(&self, body: &Value) -> (String, String) {
        id_and_text(&self.call("root", CreateKey::PATH, body).await.data())
    }

    async fn get_key(&self, root: &str, key: &str) -> ControlResponse {
        self.call(root, GetKey::PATH, &json!({ "keyId": key })).await
    }

    async fn update_key(&self, root: &str, key: &str, mut update: Value) -> ControlResponse {
        update["keyId"] = json!(key);
        self.call(root, UpdateKey::PATH, &update).await
    }

    async fn reroll_key(&self, root: &str, key: &str, grace_ms: u64) -> ControlResponse {
        self.call(root, RerollKey::PATH, &json!({ "keyId": key, "expiration": grace_ms })).await
    }

    async fn delete_key(&self, root: &str, key: &str) -> ControlResponse {
        self.call(root, DeleteKey::PATH, &json!({ "keyId": key, "permanent": false })).await
    }

    async fn delete_api(&self, root: &str, api: &str) -> ControlResponse {
        self.call(root, DeleteApi::PATH, &json!({ "apiId": api })).await
    }

    /// The data of a local verification.
    async fn verify(&self, root: &str, key: &str) -> Value {
        self.call(root, VerifyKey::PATH, &json!({ "key": key })).await.data()
    }

    /// The log's rows that haven't been numbered yet.
    async fn news(&self) -> Vec<(Scope, Cause)> {
        let rows = self.store.number(usize::MAX).await.unwrap().rows;
        rows.into_iter().map(|row| (row.scope, row.cause)).collect()
    }

    /// The record that an agent would get for this key.
    async fn record(&self, text: &str) -> Record {
        self.store.lookup(ids::hash(text)).await.unwrap().record
    }

    async fn key_record(&self, text: &str) -> KeyRecord {
        let Record::Key(record) = self.record(text).await else { panic!("there is no such key") };
        record
    }
}

/// The id and the text of a new key.
fn id_and_text(data: &Value) -> (String, String) {
    (data["keyId"].as_str().unwrap().to_owned(), data["key"].as_str().unwrap().to_owned())
}

/// A body that each endpoint accepts, about things that don't exist.
fn good_body(path: &str) -> Value {
    match path {
        CreateApi::PATH => json!({ "name": "payments" }),
        GetApi::PATH | DeleteApi::PATH | ListKeys::PATH | CreateKey::PATH => json!({ "apiId": "api_none" }),
        RerollKey::PATH => json!({ "keyId": "key_none", "expiration": 0 }),
        VerifyKey::PATH => json!({ "key": "none" }),
        GetReceipt::PATH => json!({ "requestId": "req_none" }),
        _ => json!({ "keyId": "key_none" }),
    }
}

fn key_scope(id: &str, text: &str, api: &str) -> Scope {
    Scope::Key { hash: ids::hash(text), key_id: Some(KeyId::new(id)), api_id: Some(ApiId::new(api)) }
}
