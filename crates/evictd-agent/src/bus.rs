//! The agent's two NATS connections: what it listens to and what it may say.
//!
//! It listens to the live feed and to its own inboxes, one per kind of answer, and speaks on its own
//! subjects only; its NATS permissions allow no more (R13). Lookups have a connection of their own: however
//! many wait there, the feed, the probes and the repairs that the lease rests on are not behind them (R10).

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, StatusCode, Subscriber};
use bytes::Bytes;
use evictd_core::ids::Identity;
use evictd_ops::bus::{BusError, BusOptions, Link, publish_within};
use evictd_ops::readiness::Readiness;
use evictd_wire::lookup::LookupRequest;
use evictd_wire::subject::{self, MessageKind, Requester};
use tokio::sync::Notify;

use crate::StartError;
use crate::config::AgentConfig;
use crate::metrics::Metrics;

/// Messages that a subscription holds while its task is busy. What is dropped beyond is repaired.
const SUBSCRIPTION_CAPACITY: usize = 8_192;

/// How long a message may wait for the client before it is given up: questions are asked again anyway.
const PUBLISH_LIMIT: Duration = Duration::from_millis(250);

/// How long the last announcement may take to leave.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// Sends on one connection.
#[derive(Clone, Debug)]
struct Port {
    client: Client,
    link: Link,
    requester: Arc<Requester>,
    /// Inboxes of this process: answers to an earlier one find nobody.
    inbox: Arc<str>,
}

impl Port {
    fn inbox(&self, kind: MessageKind) -> String {
        format!("{}.{}", self.inbox, kind.token())
    }

    /// Where a question goes: to one publisher, or to all of them on a second try (R14).
    fn subject(&self, kind: MessageKind, all: bool) -> String {
        if all { self.requester.subject_any(kind) } else { self.requester.subject(kind) }
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
    pub(crate) async fn send(&self, request: &LookupRequest, all: bool) -> bool {
        let subject = self.0.subject(MessageKind::Lookup, all);
        let reply = format!("{}.{}", self.0.inbox(MessageKind::Lookup), request.nonce);
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
    /// Whether there is a connection by which anything could be heard.
    pub(crate) fn is_connected(&self) -> bool {
        self.port.link.is_up()
    }

    pub(crate) async fn send_probe(&self, payload: Bytes, all: bool) {
        let subject = self.port.subject(MessageKind::Probe, all);
        self.port.send(subject, Some(self.port.inbox(MessageKind::Probe)), payload).await;
    }

    pub(crate) async fn send_replay(&self, payload: Bytes, all: bool) {
        let subject = self.port.subject(MessageKind::Replay, all);
        self.port.send(subject, Some(self.port.inbox(MessageKind::Replay)), payload).await;
    }

    /// Returns whether it was sent.
    pub(crate) async fn announce(&self, payload: Bytes) -> bool {
        self.port.send(self.port.subject(MessageKind::Applied, false), None, payload).await
    }

    /// Announces for the last time, and sees it off: the process ends next.
    pub(crate) async fn leave(&self, payload: Bytes) {
        self.announce(payload).await;
        if self.port.link.is_up()
            && !matches!(tokio::time::timeout(LEAVE_LIMIT, self.port.client.flush()).await, Ok(Ok(())))
        {
            tracing::info!(
                "couldn't tell the publishers that this agent leaves; they will notice its silence"
            );
        }
    }
}

/// The connections with all their subscriptions.
#[derive(Debug)]
pub(crate) struct Bus {
    feed: Feed,
    lookups: LookupPort,
    lookup_answers: Subscriber,
}

impl Bus {
    pub(crate) fn lookups(&self) -> LookupPort {
        self.lookups.clone()
    }

    pub(crate) fn split(self) -> (Feed, Subscriber) {
        (self.feed, self.lookup_answers)
    }
}

/// Connects and subscribes; returns although no server may be reachable yet. An agent that starts waits for both
/// connections: without the one of the lease nothing is trusted, without the other nothing is loaded.
pub(crate) async fn connect(
    config: &AgentConfig,
    identity: &Identity,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
) -> Result<Bus, StartError> {
    let requester = Arc::new(config.requester());
    let inbox: Arc<str> = format!("{}.{}", requester.inbox_prefix(), identity.instance).into();
    let options = |name| BusOptions {
        name,
        inbox_prefix: Some(requester.inbox_prefix()),
        subscription_capacity: SUBSCRIPTION_CAPACITY,
    };
    let port = |client, link| Port { client, link, requester: requester.clone(), inbox: inbox.clone() };

    let connected = Arc::new(Notify::new());
    let link = Link::new(&config.nats, metrics.nats_lease.clone(), readiness);
    let on_event = {
        let (link, connected) = (link.clone(), connected.clone());
        move |event| {
            if link.note(event) {
                connected.notify_one();
            }
        }
    };
    let client =
        evictd_ops::bus::connect(&config.nats, options(format!("evictd agent {requester}")), on_event)
            .await?;
    let port_of_lease = port(client, link);
    // The live feed first: nothing that follows a probe's answer may be missed.
    let feed = Feed {
        live: subscribe(&port_of_lease, subject::LIVE.to_owned()).await?,
        probe_answers: subscribe(&port_of_lease, port_of_lease.inbox(MessageKind::Probe)).await?,
        replay_answers: subscribe(&port_of_lease, port_of_lease.inbox(MessageKind::Replay)).await?,
        connected,
        port: port_of_lease,
    };

    let link = Link::named("nats_lookups", &config.nats, metrics.nats_lookups.clone(), readiness);
    let on_event = {
        let link = link.clone();
        move |event| {
            link.note(event);
        }
    };
    let options = options(format!("evictd agent {requester} lookups"));
    let lookups = port(evictd_ops::bus::connect(&config.nats, options, on_event).await?, link);
    let lookup_answers = subscribe(&lookups, format!("{}.*", lookups.inbox(MessageKind::Lookup))).await?;
    Ok(Bus { feed, lookups: LookupPort(lookups), lookup_answers })
}

async fn subscribe(port: &Port, subject: String) -> Result<Subscriber, StartError> {
    let action = "subscribe";
    port.client.subscribe(subject).await.map_err(|source| StartError::Subscribe { action, source })
}

#[cfg(test)]
mod tests;
