//! The agent's one NATS connection: what it listens to and what it may say.
//!
//! It listens to the live feed and to its own inboxes, one per kind of answer, and speaks on its own
//! subjects only; its NATS permissions allow no more (R13).

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, StatusCode, Subscriber};
use bytes::Bytes;
use evictd_core::ids::Identity;
use evictd_ops::bus::{BusError, BusOptions, Link, publish_within};
use evictd_ops::readiness::Readiness;
use evictd_wire::lookup::LookupRequest;
use evictd_wire::subject::{self, Kind, Speaker};
use tokio::sync::Notify;

use crate::StartError;
use crate::config::AgentConfig;
use crate::metrics::Metrics;

/// Messages that a subscription holds while its task is busy. What is dropped beyond is repaired.
const SUBSCRIPTION_CAPACITY: usize = 8_192;

/// How long a message may wait for the client before it is given up: questions are asked again anyway.
const PUBLISH_LIMIT: Duration = Duration::from_millis(250);

/// Sends on one connection.
#[derive(Clone, Debug)]
struct Port {
    client: Client,
    link: Link,
    speaker: Arc<Speaker>,
    /// Inboxes of this process: answers to an earlier one find nobody.
    inbox: Arc<str>,
}

impl Port {
    fn inbox(&self, kind: Kind) -> String {
        format!("{}.{}", self.inbox, kind.token())
    }

    /// Whether the message was handed to the connection. Nothing is queued for a connection that is
    /// down: it would arrive late and together.
    async fn send(&self, subject: String, reply: Option<String>, payload: Bytes) -> bool {
        if !self.link.is_up() {
            return false;
        }
        match publish_within(&self.client, subject, reply, payload, PUBLISH_LIMIT).await {
            Ok(()) => true,
            // The question is asked again anyway.
            Err(BusError::PublishTimeout { .. }) => false,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "NATS refused a message");
                false
            }
        }
    }
}

/// Where lookups are asked.
#[derive(Clone, Debug)]
pub(crate) struct LookupPort(Port);

impl LookupPort {
    pub(crate) async fn send(&self, request: &LookupRequest) -> bool {
        let subject = self.0.speaker.subject(Kind::Lookup);
        let reply = format!("{}.{}", self.0.inbox(Kind::Lookup), request.nonce);
        self.0.send(subject, Some(reply), request.encode()).await
    }
}

/// Whether the server answered instead of a publisher: nobody listens to the question.
pub(crate) fn nobody_listens(message: &Message) -> bool {
    message.status == Some(StatusCode::NO_RESPONDERS)
}

/// The question that a lookup's answer came for, by its inbox.
pub(crate) fn asked(answer: &Message) -> Option<u64> {
    answer.subject.rsplit('.').next()?.parse().ok()
}

/// What the follow task hears and says.
#[derive(Debug)]
pub(crate) struct Feed {
    pub(crate) live: Subscriber,
    pub(crate) probe_answers: Subscriber,
    pub(crate) replay_answers: Subscriber,
    /// Notified whenever the connection came about.
    pub(crate) connected: Arc<Notify>,
    port: Port,
}

impl Feed {
    pub(crate) async fn send_probe(&self, payload: Bytes, all: bool) {
        let speaker = &self.port.speaker;
        let subject = if all { speaker.probe_any() } else { speaker.subject(Kind::Probe) };
        self.port.send(subject, Some(self.port.inbox(Kind::Probe)), payload).await;
    }

    pub(crate) async fn send_replay(&self, payload: Bytes) {
        let subject = self.port.speaker.subject(Kind::Replay);
        self.port.send(subject, Some(self.port.inbox(Kind::Replay)), payload).await;
    }

    pub(crate) async fn announce(&self, payload: Bytes) {
        self.port.send(self.port.speaker.subject(Kind::Applied), None, payload).await;
    }
}

/// The connection with all its subscriptions.
#[derive(Debug)]
pub(crate) struct Bus {
    feed: Feed,
    lookup_answers: Subscriber,
}

impl Bus {
    pub(crate) fn lookups(&self) -> LookupPort {
        LookupPort(self.feed.port.clone())
    }

    pub(crate) fn split(self) -> (Feed, Subscriber) {
        (self.feed, self.lookup_answers)
    }
}

/// Connects and subscribes; returns although no server may be reachable yet.
pub(crate) async fn connect(
    config: &AgentConfig,
    identity: &Identity,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
) -> Result<Bus, StartError> {
    let speaker = config.speaker();
    let inbox: Arc<str> = format!("{}.{}", speaker.inbox_prefix(), identity.instance).into();
    let connected = Arc::new(Notify::new());
    let options = BusOptions {
        name: format!("evictd agent {speaker}"),
        inbox_prefix: Some(speaker.inbox_prefix()),
        subscription_capacity: SUBSCRIPTION_CAPACITY,
    };
    let link = Link::new(&config.nats, metrics.nats.clone(), readiness);
    let on_event = {
        let (link, connected) = (link.clone(), connected.clone());
        move |event| {
            if link.note(event) {
                connected.notify_one();
            }
        }
    };
    let client = evictd_ops::bus::connect(&config.nats, options, on_event).await?;
    let port = Port { client: client.clone(), link, speaker: Arc::new(speaker), inbox };
    let subscribe = async |subject: String| {
        let action = "subscribe";
        client.subscribe(subject).await.map_err(|source| StartError::Subscribe { action, source })
    };
    // The live feed first: nothing that follows a probe's answer may be missed.
    let feed = Feed {
        live: subscribe(subject::LIVE.to_owned()).await?,
        probe_answers: subscribe(port.inbox(Kind::Probe)).await?,
        replay_answers: subscribe(port.inbox(Kind::Replay)).await?,
        connected,
        port: port.clone(),
    };
    let lookup_answers = subscribe(format!("{}.*", port.inbox(Kind::Lookup))).await?;
    Ok(Bus { feed, lookup_answers })
}
