//! What the agent says to a NATS server that only listens.

use std::sync::Arc;

use evictd_core::ids::InstanceId;
use evictd_ops::metrics::Registry;
use evictd_wire::api::ids::hash;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::fixture::config;
use crate::origin::{Authority, LoadError, Origin as _};

/// As much of a NATS server as keeps clients content; it delivers nothing, and remembers what was said.
struct MuteServer {
    url: String,
    said: Arc<Mutex<Vec<(String, String)>>>,
    spoken: Arc<watch::Sender<usize>>,
}

const INFO: &str = r#"INFO {"server_id":"FAKE","server_name":"fake","host":"127.0.0.1","port":4222,"version":"2.15.0","proto":1,"max_payload":1048576,"client_id":1,"headers":true}"#;

impl MuteServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("nats://{}", listener.local_addr().unwrap());
        let (said, spoken) = (Arc::default(), Arc::new(watch::Sender::new(0)));
        let server = Self { url, said, spoken };
        let (said, spoken) = (server.said.clone(), server.spoken.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(listen(stream, said.clone(), spoken.clone()));
            }
        });
        server
    }

    /// Waits until `count` messages were said, on any connection.
    async fn hears(&self, count: usize) {
        self.spoken.subscribe().wait_for(|spoken| *spoken >= count).await.unwrap();
    }

    /// What was said, as connection and subject.
    fn heard(&self) -> Vec<(String, String)> {
        self.said.lock().clone()
    }
}

async fn listen(
    stream: TcpStream,
    said: Arc<Mutex<Vec<(String, String)>>>,
    spoken: Arc<watch::Sender<usize>>,
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
                said.lock().push((name.clone(), subject));
                spoken.send_modify(|spoken| *spoken += 1);
            }
            _ => {}
        }
        line.clear();
    }
}

/// An agent's connections to `server`, both of them up.
async fn connected(server: &MuteServer, settings: &[(&str, &str)]) -> (AgentConfig, Identity, Bus) {
    let config = config(&[&[("nats.urls", server.url.as_str())], settings].concat());
    let registry = Registry::new(crate::metrics::SPECS, &[]).unwrap();
    let metrics = Arc::new(Metrics::new(&registry));
    let Requester { region, agent } = config.requester();
    let identity = Identity { region, agent, instance: InstanceId(7) };
    let readiness = Readiness::new();
    let bus = connect(&config, &identity, &metrics, &readiness).await.unwrap();
    readiness.ready().await;
    while !bus.lookups.0.link.is_up() {
        tokio::task::yield_now().await;
    }
    (config, identity, bus)
}

fn said(connection: &str, subject: &str) -> (String, String) {
    (connection.to_owned(), subject.to_owned())
}

#[tokio::test]
async fn lookups_have_a_connection_of_their_own_and_their_second_try_goes_to_all() {
    let server = MuteServer::start().await;
    let (config, identity, bus) = connected(&server, &[("loads.timeout", "10ms")]).await;
    let origin = Authority::new(bus.lookups(), identity.instance, config.loads.timeout.into());
    let (_, error) = origin.lookup(hash("alice")).await.unwrap_err();
    assert_eq!(error, LoadError::Unreachable);
    server.hears(2).await;
    let lookups = "evictd agent local/agent-1 lookups";
    assert_eq!(
        server.heard(),
        [
            said(lookups, "evictd.v1.lookup.local.agent-1"),
            said(lookups, "evictd.v1.lookup.local.agent-1.any")
        ]
    );
}

#[tokio::test]
async fn the_lease_speaks_on_the_other_one() {
    let server = MuteServer::start().await;
    let (_, _, bus) = connected(&server, &[]).await;
    let (feed, _) = bus.split();
    for all in [false, true] {
        feed.send_probe(Bytes::from_static(b"probe"), all).await;
        feed.send_replay(Bytes::from_static(b"replay"), all).await;
    }
    feed.leave(Bytes::from_static(b"applied")).await;
    server.hears(5).await;
    let subjects = ["probe", "replay", "probe.any", "replay.any", "applied"].map(|subject| {
        let (kind, any) = subject.split_once('.').map_or((subject, ""), |(kind, _)| (kind, ".any"));
        said("evictd agent local/agent-1", &format!("evictd.v1.{kind}.local.agent-1{any}"))
    });
    assert_eq!(server.heard(), subjects);
}
