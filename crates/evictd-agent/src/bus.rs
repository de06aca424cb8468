//! The agent's two NATS connections.
//!
//! The agent subscribes to the live feed and to its own inboxes, one per kind of answer. It publishes on its own
//! subjects only. Its NATS permissions allow no more (R13). Lookups have a connection of their own: however many wait
//! there, they delay neither the feed nor the probes and repairs that the lease depends on (R10).

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, StatusCode, SubscribeError, Subscriber};
use bytes::Bytes;
use evictd_core::ids::Identity;
use evictd_ops::bus::{BusError, BusLink, BusOptions, publish_within};
use evictd_ops::log_limit;
use evictd_ops::logging::with_causes;
use evictd_ops::readiness::Readiness;
use evictd_wire::lookup::LookupRequest;
use evictd_wire::subject::{self, MessageKind, Requester};
use tokio::sync::Notify;

use crate::config::AgentConfig;
use crate::metrics::AgentMetrics;

/// Messages that a subscription buffers while its task is busy. Dropped ones are repaired.
const SUBSCRIPTION_CAPACITY: usize = 8_192;

/// The longest wait for the client to accept a message. A dropped query is repeated.
const PUBLISH_LIMIT: Duration = Duration::from_millis(250);

/// The longest wait for the last announcement to be sent.
pub(crate) const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// The reason that the connections can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("the NATS client rejected a subscription")]
    Subscribe(#[from] SubscribeError),
}

/// The sending side of one connection.
#[derive(Clone, Debug)]
struct Port {
    client: Client,
    link: BusLink,
    requester: Arc<Requester>,
    /// The inbox of this process. It doesn't receive answers to an earlier one.
    inbox: Arc<str>,
}

impl Port {
    fn inbox(&self, kind: MessageKind) -> String {
        format!("{}.{}", self.inbox, kind.token())
    }

    /// The subject of a query: to one publisher, or to `all` of them on a second try (R14).
    fn subject(&self, kind: MessageKind, all: bool) -> String {
        if all { self.requester.subject_any(kind) } else { self.requester.subject(kind) }
    }

    /// Returns whether the client accepted the message. Nothing is queued for a connection that is down: it would
    /// arrive late, and all at once.
    async fn send(&self, subject: String, reply: Option<String>, payload: Bytes) -> bool {
        if !self.link.is_up() {
            return false;
        }
        match publish_within(&self.client, subject, reply, payload, PUBLISH_LIMIT).await {
            Ok(()) => true,
            // The query is repeated anyway.
            Err(BusError::PublishTimeout { .. }) => false,
            Err(error) => {
                if let Some(unlogged) = log_limit!(1, "") {
                    let error = with_causes(&error);
                    tracing::warn!(error, unlogged = unlogged.field(), "NATS rejected a message");
                }
                false
            }
        }
    }
}

/// Sends lookups.
#[derive(Clone, Debug)]
pub(crate) struct LookupPort(Port);

impl LookupPort {
    pub(crate) async fn send(&self, request: &LookupRequest, all: bool) -> bool {
        let subject = self.0.subject(MessageKind::Lookup, all);
        let reply = format!("{}.{}", self.0.inbox(MessageKind::Lookup), request.nonce);
        self.0.send(subject, Some(reply), request.encode()).await
    }
}

/// Whether the NATS server answered because no publisher subscribes to the query's subject.
pub(crate) fn is_no_responders(message: &Message) -> bool {
    message.status == Some(StatusCode::NO_RESPONDERS)
}

/// Returns the nonce of a lookup from the inbox of its answer.
pub(crate) fn lookup_nonce(answer: &Message) -> Option<u64> {
    answer.subject.rsplit('.').next()?.parse().ok()
}

/// The connection of the follow task.
#[derive(Debug)]
pub(crate) struct Feed {
    pub(crate) live: Subscriber,
    pub(crate) probe_answers: Subscriber,
    pub(crate) replay_answers: Subscriber,
    /// Notified after each connect.
    pub(crate) connected: Arc<Notify>,
    port: Port,
}

impl AgentBus {
    /// Returns the clients of both connections.
    pub(crate) fn clients(&self) -> [Client; 2] {
        [self.feed.port.client.clone(), self.lookups.0.client.clone()]
    }
}

impl Feed {
    pub(crate) fn is_connected(&self) -> bool {
        self.port.link.is_up()
    }

    pub(crate) async fn send_probe(&self, payload: Bytes, all: bool) {
        self.send_query(MessageKind::Probe, payload, all).await;
    }

    pub(crate) async fn send_replay(&self, payload: Bytes, all: bool) {
        self.send_query(MessageKind::Replay, payload, all).await;
    }

    async fn send_query(&self, kind: MessageKind, payload: Bytes, all: bool) {
        self.port.send(self.port.subject(kind, all), Some(self.port.inbox(kind)), payload).await;
    }

    /// Returns whether it was sent.
    pub(crate) async fn announce(&self, payload: Bytes) -> bool {
        self.port.send(self.port.subject(MessageKind::Applied, false), None, payload).await
    }

    /// Sends the last announcement and flushes the connection, because the process exits next.
    pub(crate) async fn leave(&self, payload: Bytes) {
        self.announce(payload).await;
        if self.port.link.is_up()
            && !matches!(tokio::time::timeout(LEAVE_LIMIT, self.port.client.flush()).await, Ok(Ok(())))
        {
            tracing::info!("last announcement not sent; publishers will detect the exit by its silence");
        }
    }
}

/// The connections with all their subscriptions.
#[derive(Debug)]
pub(crate) struct AgentBus {
    pub(crate) feed: Feed,
    pub(crate) lookups: LookupPort,
    pub(crate) lookup_answers: Subscriber,
}

/// Connects and subscribes. Returns even if no server is reachable yet. A starting agent isn't ready before both
/// connections are up: it needs one for the lease and one for loads.
pub(crate) async fn connect(
    config: &AgentConfig,
    identity: &Identity,
    metrics: &Arc<AgentMetrics>,
    readiness: &Readiness,
) -> Result<AgentBus, ConnectError> {
    let requester = Arc::new(config.requester());
    let inbox: Arc<str> = format!("{}.{}", requester.inbox_prefix(), identity.instance).into();
    let open = async |name, link: BusLink| {
        let options = BusOptions {
            name,
            inbox_prefix: Some(requester.inbox_prefix()),
            subscription_capacity: SUBSCRIPTION_CAPACITY,
        };
        let connected = Arc::new(Notify::new());
        let on_event = {
            let (link, connected) = (link.clone(), connected.clone());
            move |event| {
                if link.note(event) {
                    connected.notify_one();
                }
            }
        };
        let client = evictd_ops::bus::connect(&config.nats, options, on_event).await?;
        let port = Port { client, link, requester: requester.clone(), inbox: inbox.clone() };
        Ok::<_, BusError>((port, connected))
    };

    let link = BusLink::new(&config.nats, metrics.nats_lease.clone(), readiness);
    let (port, connected) = open(format!("evictd agent {requester}"), link).await?;
    // The live feed first: the agent must not miss a message after the answer to its first probe.
    let live = port.client.subscribe(subject::LIVE).await?;
    let probe_answers = port.client.subscribe(port.inbox(MessageKind::Probe)).await?;
    let replay_answers = port.client.subscribe(port.inbox(MessageKind::Replay)).await?;
    let feed = Feed { live, probe_answers, replay_answers, connected, port };

    let link = BusLink::named("nats_lookups", &config.nats, metrics.nats_lookups.clone(), readiness);
    let (port, _) = open(format!("evictd agent {requester} lookups"), link).await?;
    let lookup_answers = port.client.subscribe(format!("{}.*", port.inbox(MessageKind::Lookup))).await?;
    Ok(AgentBus { feed, lookups: LookupPort(port), lookup_answers })
}

#[cfg(test)]
mod tests;
