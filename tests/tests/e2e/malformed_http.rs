//! Every endpoint receives malformed requests. It answers with an error, changes nothing, and serves the next request.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use evictd_tests::http::{raw, raw_request};
use evictd_tests::topology::Node;
use serde_json::{Value, json};

use crate::world::{World, count, plan};

const JSON_TYPE: &[u8] = b"content-type: application/json\r\n";

/// More than either daemon accepts: 10 MiB and 256 KiB.
const TOO_LARGE: usize = 11 << 20;

/// An endpoint with a body that it accepts.
struct EndpointUnderTest<'w> {
    node: &'w Node,
    path: &'static str,
    good: Value,
}

/// Returns all endpoints of both daemons. Most bodies name things that don't exist, so accepting one changes nothing.
fn endpoints(world: &World) -> Vec<EndpointUnderTest<'_>> {
    let (publisher, agent) = (world.publisher(), world.agent(0));
    let endpoint = |node, path, good| EndpointUnderTest { node, path, good };
    vec![
        endpoint(publisher, "/v2/apis.createApi", json!({ "name": "another" })),
        endpoint(publisher, "/v2/apis.deleteApi", json!({ "apiId": "api_missing" })),
        endpoint(publisher, "/v2/keys.createKey", json!({ "apiId": "api_missing" })),
        endpoint(publisher, "/v2/keys.getKey", json!({ "keyId": "key_missing" })),
        endpoint(publisher, "/v2/keys.deleteKey", json!({ "keyId": "key_missing" })),
        endpoint(agent, "/v2/keys.verifyKey", json!({ "key": "prod_missing" })),
    ]
}

struct MalformedAnswer {
    status: u16,
    text: String,
}

impl MalformedAnswer {
    /// Sends a complete request.
    fn to(server: SocketAddr, request: &[u8]) -> Result<Self> {
        raw_request(server, request).map(|answer| Self::read(&answer))
    }

    /// Sends bytes that aren't a complete request. If the server closes the connection without an answer, the status
    /// is 0.
    fn to_garbage(server: SocketAddr, bytes: &[u8]) -> Result<Self> {
        raw(server, bytes).map(|answer| Self::read(&answer))
    }

    fn read(answer: &[u8]) -> Self {
        let text = String::from_utf8_lossy(answer).into_owned();
        let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
        Self { status: status.unwrap_or(0), text }
    }

    /// Asserts that the body is an error in Unkey's form: with a request id, the status, a type and a detail.
    fn assert_envelope(&self, what: &str) -> Result<()> {
        let (_, body) = self.text.split_once("\r\n\r\n").with_context(|| format!("{what}: no body"))?;
        let body: Value = serde_json::from_str(body).with_context(|| format!("{what}: {}", self.text))?;
        let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        ensure!(
            text("/meta/requestId").starts_with("req_")
                && body["error"]["status"] == self.status
                && text("/error/type").starts_with("https://unkey.com/docs/errors/")
                && !text("/error/detail").is_empty(),
            "{what}: {}",
            self.text
        );
        Ok(())
    }
}

fn request(method: &str, path: &str, headers: &[u8], body: &[u8]) -> Vec<u8> {
    let head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
    let length = format!("content-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), headers, length.as_bytes(), body].concat()
}

fn authorized(world: &World) -> Vec<u8> {
    let root_key = world.topology.root_key();
    format!("content-type: application/json\r\nauthorization: Bearer {root_key}\r\n").into_bytes()
}

/// Returns bodies that no endpoint accepts.
fn bad_bodies(good: &Value) -> Vec<(&'static str, Vec<u8>)> {
    let with = |change: fn(&mut serde_json::Map<String, Value>)| {
        let mut members = good.as_object().cloned().unwrap_or_default();
        change(&mut members);
        Value::from(members).to_string().into_bytes()
    };
    let good_text = good.to_string();
    vec![
        ("an empty body", Vec::new()),
        ("broken JSON", good_text.as_bytes()[..good_text.len() - 1].to_vec()),
        ("two values", format!("{good_text}{good_text}").into_bytes()),
        ("an array", b"[]".to_vec()),
        ("a text", b"\"key_missing\"".to_vec()),
        ("nothing", b"null".to_vec()),
        ("an empty object", b"{}".to_vec()),
        ("an unknown member", with(|members| drop(members.insert("nonsense".into(), 1.into())))),
        ("numbers for texts", with(|members| members.values_mut().for_each(|value| *value = 7.into()))),
        ("lists for texts", with(|members| members.values_mut().for_each(|value| *value = json!(["x"])))),
        ("empty texts", with(|members| members.values_mut().for_each(|value| *value = "".into()))),
        (
            "long texts",
            with(|members| {
                members.values_mut().for_each(|value| *value = "x".repeat(100_000).into());
            }),
        ),
        (
            "invalid UTF-8",
            good_text
                .replace("missing", "\u{1}")
                .replace("another", "\u{1}")
                .bytes()
                .map(|byte| if byte == 1 { 0xff } else { byte })
                .collect(),
        ),
        (
            "half a surrogate pair",
            good_text.replace("missing", "\\ud800").replace("another", "\\ud800").into(),
        ),
        ("a deep nesting", "[".repeat(100_000).into_bytes()),
        ("a deep nesting inside", format!("{{\"meta\":{}", "{\"a\":".repeat(30_000)).into_bytes()),
        ("a huge number", b"{\"expires\":1e999999}".to_vec()),
    ]
}

/// Failure: a malformed body is accepted, or ends the process.
#[test]
fn every_endpoint_rejects_malformed_bodies() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let headers = authorized(&world);
    let rows = "SELECT (SELECT count(*) FROM keys) || ' ' || (SELECT count(*) FROM apis)";
    let before = world.sql(rows)?;
    for EndpointUnderTest { node, path, good } in endpoints(&world) {
        for (what, body) in bad_bodies(&good) {
            let answer = MalformedAnswer::to(node.http, &request("POST", path, &headers, &body))?;
            assert_eq!(answer.status, 400, "{path}, {what}: {}", answer.text);
            answer.assert_envelope(&format!("{path}, {what}"))?;
        }
        let answer =
            MalformedAnswer::to(node.http, &request("POST", path, &headers, &vec![b' '; TOO_LARGE]))?;
        assert_eq!(answer.status, 413, "{path}: {}", answer.text);
        answer.assert_envelope(path)?;
    }
    assert_eq!(world.sql(rows)?, before, "something was created");
    assert_unharmed(&world)
}

/// Failure: a truncated request is carried out, or blocks until the client closes the connection.
#[test]
fn truncated_requests_are_rejected() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let headers = authorized(&world);
    for EndpointUnderTest { node, path, .. } in endpoints(&world) {
        // Complete, this request would delete the key at the endpoint for that.
        let body = json!({ "keyId": key.id }).to_string();
        let whole = request("POST", path, &headers, body.as_bytes());
        for cut in [whole.len() - 1, whole.len() - body.len(), whole.len() - body.len() - 2, 20, 3] {
            let answer = MalformedAnswer::to_garbage(node.http, &whole[..cut])?;
            assert!([0, 400].contains(&answer.status), "{path} cut at {cut}: {}", answer.text);
        }
        let start = format!("POST {path} HTTP/1.1\r\nhost: test\r\n");
        let rest = b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}";
        let answer = MalformedAnswer::to_garbage(node.http, &[start.as_bytes(), &headers, rest].concat())?;
        assert!([0, 400].contains(&answer.status), "{path} in chunks: {}", answer.text);
    }
    world.wait_for_codes(&[&key], "VALID")?;
    assert_unharmed(&world)
}

/// Failure: a client without a root key, or with another credential, is served.
#[test]
fn every_endpoint_rejects_callers_without_a_root_key() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let key = world.create_key()?;
    let ordinary = format!("authorization: Bearer {}\r\n", key.text);
    let basic = format!("authorization: Basic {}\r\n", world.topology.root_key());
    let lower = format!("authorization: bearer{}\r\n", world.topology.root_key());
    let cases: [(&str, &[u8], u16); 8] = [
        ("no header", b"", 400),
        ("an empty header", b"authorization:\r\n", 400),
        ("no token", b"authorization: Bearer \r\n", 400),
        ("another scheme", basic.as_bytes(), 400),
        ("no space", lower.as_bytes(), 400),
        ("invalid UTF-8", b"authorization: Bearer \xff\xfe\r\n", 400),
        ("an unknown root key", b"authorization: Bearer unkey_missing\r\n", 401),
        ("an ordinary key", ordinary.as_bytes(), 401),
    ];
    for EndpointUnderTest { node, path, good } in endpoints(&world) {
        for (what, header, status) in cases {
            let headers = [JSON_TYPE, header].concat();
            let answer = MalformedAnswer::to(
                node.http,
                &request("POST", path, &headers, good.to_string().as_bytes()),
            )?;
            assert_eq!(answer.status, status, "{path}, {what}: {}", answer.text);
            answer.assert_envelope(&format!("{path}, {what}"))?;
        }
    }
    assert_unharmed(&world)
}

/// Failure: a wrong method or path reaches an endpoint, or bytes that aren't HTTP end the process.
#[test]
fn wrong_methods_paths_and_garbage_reach_no_endpoint() -> Result<()> {
    let world = World::start(&plan(&["eu"]))?;
    let headers = authorized(&world);
    for EndpointUnderTest { node, path, good } in endpoints(&world) {
        let body = good.to_string();
        for method in ["GET", "PUT", "DELETE", "NONSENSE"] {
            let answer = MalformedAnswer::to(node.http, &request(method, path, &headers, body.as_bytes()))?;
            assert_eq!(answer.status, 405, "{method} {path}: {}", answer.text);
        }
        for path in [&path[..path.len() - 1], &format!("{path}/"), &path.to_uppercase(), "/", "/v2/", "*"] {
            let answer = MalformedAnswer::to(node.http, &request("POST", path, &headers, body.as_bytes()))?;
            assert!([400, 404].contains(&answer.status), "POST {path}: {}", answer.text);
        }
    }
    for node in [world.publisher(), world.agent(0)] {
        for address in [node.http, node.admin] {
            assert_garbage_is_refused(address)?;
        }
        for page in ["/metrics", "/livez", "/readyz", "/status"] {
            assert_eq!(MalformedAnswer::to(node.admin, &request("GET", page, b"", b""))?.status, 200);
            assert_eq!(MalformedAnswer::to(node.admin, &request("POST", page, b"", b"{}"))?.status, 405);
        }
        assert_eq!(MalformedAnswer::to(node.admin, &request("GET", "/metrics/", b"", b""))?.status, 404);
        assert_eq!(MalformedAnswer::to(node.http, &request("GET", "/metrics", b"", b""))?.status, 404);
    }
    assert_unharmed(&world)
}

fn assert_garbage_is_refused(address: SocketAddr) -> Result<()> {
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(200_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(5_000));
    let path = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(200_000));
    let garbage: [&[u8]; 12] = [
        b"",
        b"\r\n\r\n\r\n",
        b"\x00\xff\x00\xff\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v2/keys.deleteKey HTTP/1.1\r\n\x00\x01: x\r\n\r\n",
        b"POST /v2/keys.deleteKey HTTP/1.1\r\nx: \x00\r\n\r\n",
        b"POST /v2/keys.deleteKey HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        long.as_bytes(),
        many.as_bytes(),
        path.as_bytes(),
    ];
    for bytes in garbage {
        let answer = MalformedAnswer::to_garbage(address, bytes)?;
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]);
        assert!([0, 400, 404, 414, 431].contains(&answer.status), "{shown:?}: {}", answer.text);
    }
    Ok(())
}

/// Asserts that no daemon failed, and that the deployment still works.
fn assert_unharmed(world: &World) -> Result<()> {
    let failures = count(world.publisher(), "evictd_publisher_requests_total", &[("class", "5xx")])?;
    assert_eq!(failures, 0, "the publisher answered with a 5xx");
    for node in [world.publisher(), world.agent(0)] {
        assert_eq!(MalformedAnswer::to(node.admin, &request("GET", "/livez", b"", b""))?.status, 200);
    }
    world.assert_works()
}
