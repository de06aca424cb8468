//! The messages that an agent sends to a NATS server.

use std::sync::Arc;

use evictd_wire::api::ids::hash;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::AgentParts;
use crate::fixture::config;
use crate::origin::{BusOrigin, LoadError, Origin as _};

/// A minimal NATS server: it accepts clients and records their messages, and delivers none.
struct MuteServer {
    url: String,
    messages: Arc<Mutex<Vec<(String, String)>>>,
    count: Arc<watch::Sender<usize>>,
}

const INFO: &str = r#"INFO {"server_id":"FAKE","server_name":"fake","host":"127.0.0.1","port":4222,"version":"2.15.0","proto":1,"max_payload":1048576,"client_id":1,"headers":true}"#;

impl MuteServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        let (messages, count) = (Arc::default(), Arc::new(watch::Sender::new(0)));
        let server = Self { url, messages, count };
        let (messages, count) = (server.messages.clone(), server.count.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, messages.clone(), count.clone()));
            }
        });
        server
    }

    /// Waits until `count` messages arrived, on any connection.
    async fn receives(&self, count: usize) {
        self.count.subscribe().wait_for(|received| *received >= count).await.unwrap();
    }

    /// Returns the connection and subject of each message.
    fn received(&self) -> Vec<(String, String)> {
        self.messages.lock().clone()
    }
}

async fn serve(
    stream: TcpStream,
    messages: Arc<Mutex<Vec<(String, String)>>>,
    count: Arc<watch::Sender<usize>>,
) {
    let mut stream = BufReader::new(stream);
    stream.write_all(format!("{INFO}\r\n").as_bytes()).await.unwrap();
    let (mut name, mut line) = (String::new(), String::new());
    while stream.read_line(&mut line).await.is_ok_and(|length| length > 0) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "CONNECT" => {
                let options: serde_json::Value = serde_json::from_str(&line["CONNECT ".len()..]).unwrap();
                name = options["name"].as_str().unwrap().to_owned();
            }
            "PING" => stream.write_all(b"PONG\r\n").await.unwrap(),
            "PUB" => {
                let length: usize = words[words.len() - 1].parse().unwrap();
                let subject = words[1].to_owned();
                stream.read_exact(&mut vec![0; length + 2]).await.unwrap();
                messages.lock().push((name.clone(), subject));
                count.send_modify(|count| *count += 1);
            }
            _ => {}
        }
        line.clear();
    }
}

/// Connects an agent's two connections to `server`.
async fn connected(server: &MuteServer, settings: &[(&str, &str)]) -> (AgentParts, AgentBus) {
    let parts = AgentParts::new(config(&[&[("nats.urls", server.url.as_str())], settings].concat())).unwrap();
    let AgentParts { config, identity, metrics, readiness, .. } = &parts;
    let bus = connect(config, identity, metrics, readiness).await.unwrap();
    while !(bus.feed.is_connected() && bus.lookups.0.link.is_up()) {
        tokio::task::yield_now().await;
    }
    (parts, bus)
}

fn sent(connection: &str, subject: &str) -> (String, String) {
    (connection.to_owned(), subject.to_owned())
}

#[tokio::test]
async fn lookups_have_their_own_connection_and_retry_at_all_publishers() {
    let server = MuteServer::start().await;
    let (parts, bus) = connected(&server, &[("loads.timeout", "10ms")]).await;
    let timeout = parts.config.loads.timeout.into();
    let origin = BusOrigin::new(bus.lookups, parts.identity.instance, timeout);
    let (_, error) = origin.lookup(hash("alice")).await.unwrap_err();
    assert_eq!(error, LoadError::Unreachable);
    server.receives(2).await;
    let lookups = "evictd agent local/agent-1 lookups";
    assert_eq!(
        server.received(),
        [
            sent(lookups, "evictd.v1.lookup.local.agent-1"),
            sent(lookups, "evictd.v1.lookup.local.agent-1.any")
        ]
    );
}

#[tokio::test]
async fn the_lease_uses_the_other_connection() {
    let server = MuteServer::start().await;
    let (_, AgentBus { feed, .. }) = connected(&server, &[]).await;
    for all in [false, true] {
        feed.send_probe(Bytes::from_static(b"probe"), all).await;
        feed.send_replay(Bytes::from_static(b"replay"), all).await;
    }
    feed.leave(Bytes::from_static(b"applied")).await;
    server.receives(5).await;
    let subjects = ["probe", "replay", "probe.any", "replay.any", "applied"].map(|subject| {
        let (kind, any) = subject.split_once('.').map_or((subject, ""), |(kind, _)| (kind, ".any"));
        sent("evictd agent local/agent-1", &format!("evictd.v1.{kind}.local.agent-1{any}"))
    });
    assert_eq!(server.received(), subjects);
}
