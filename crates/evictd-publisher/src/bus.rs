//! The publisher's NATS connections: what it receives, and where it may send (R13).
//!
//! There are two. Lookups have one of their own, so that a flood of them delays no proof, no repair and no invalidation.
//!
//! The publisher sends on the live feed and into the inboxes of agents, and its NATS permissions allow no more. NATS checks
//! no permission on reply subjects. So a request names its requester in its subject, and the answer goes into that
//! requester's inbox or nowhere.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, SubscribeError};
use bytes::Bytes;
use evictd_core::ids::{Identity, InstanceId};
use evictd_ops::bus::{BusConfig, BusError, BusLink, BusMetrics, BusOptions, publish_within};
use evictd_ops::readiness::Readiness;
use evictd_wire::subject::{AUTHORITY_GROUP, MessageKind, Requester};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use metrics::Gauge;
use tokio::sync::watch;

use crate::metrics::{PublisherMetrics, Refusal};

/// Messages that a subscription holds. Agents repeat requests that are dropped beyond.
const SUBSCRIPTION_CAPACITY: usize = 32_768;

/// How long the last messages may take to leave.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How long a message may wait for the client. Agents request what wasn't sent.
const PUBLISH_LIMIT: Duration = Duration::from_millis(250);

#[derive(Clone, Debug)]
pub(crate) struct Bus {
    client: Client,
    link: BusLink,
    metrics: Arc<PublisherMetrics>,
}

/// One kind of message from every agent. Unfit ones are counted and dropped.
///
/// Queries are shared among the publishers of a queue group; an agent's second try goes to all of them. A query that
/// arrives both ways is answered twice, which does no harm.
pub(crate) struct Subscription {
    bus: Bus,
    kind: MessageKind,
    /// What this publisher shares with others, while it takes part.
    shared: Option<BoxStream<'static, Message>>,
    /// What goes to every publisher.
    to_all: BoxStream<'static, Message>,
}

/// A message, and its requester according to its subject.
#[derive(Debug)]
pub(crate) struct Envelope {
    pub(crate) requester: Requester,
    pub(crate) payload: Bytes,
    /// The requester's own inbox. Empty for announcements.
    pub(crate) reply: String,
}

impl Envelope {
    /// Returns which of the requester's processes has sent it.
    pub(crate) fn identity(&self, instance: InstanceId) -> Identity {
        let Requester { region, agent } = self.requester.clone();
        Identity { region, agent, instance }
    }
}

impl Subscription {
    /// Returns the next fit message; `None` when the connection is closed for good.
    pub(crate) async fn next(&mut self) -> Option<Envelope> {
        loop {
            let message = match &mut self.shared {
                Some(shared) => tokio::select! {
                    message = shared.next() => message,
                    message = self.to_all.next() => message,
                },
                None => self.to_all.next().await,
            };
            match self.admit(message?) {
                Ok(envelope) => return Some(envelope),
                Err(refusal) => self.refuse(refusal),
            }
        }
    }

    /// Counts a message that was refused.
    pub(crate) fn refuse(&self, refusal: Refusal) {
        self.bus.metrics.refused(self.kind, refusal);
    }

    fn admit(&self, message: Message) -> Result<Envelope, Refusal> {
        let requester = Requester::from_subject(&message.subject).ok_or(Refusal::Subject)?;
        let reply = message.reply.map(|reply| reply.to_string()).unwrap_or_default();
        if self.kind != MessageKind::Applied && !requester.owns_inbox(&reply) {
            tracing::warn!(%requester, kind = self.kind.token(), "refused a request whose reply subject isn't the requester's inbox");
            return Err(Refusal::Reply);
        }
        Ok(Envelope { requester, payload: message.payload, reply })
    }

    /// Receives as [`Self::next`] does, and takes part in the queue group as `serving` says (R14).
    pub(crate) async fn next_while(&mut self, serving: &mut watch::Receiver<bool>) -> Option<Envelope> {
        loop {
            let takes_part = *serving.borrow_and_update();
            self.set_serving(takes_part).await;
            tokio::select! {
                envelope = self.next() => return envelope,
                // Its sender has ended at a shutdown, and then nothing changes.
                Ok(()) = serving.changed() => {}
            }
        }
    }

    /// Leaves the queue group, or joins it again (R14): a member that can't answer swallows queries.
    pub(crate) async fn set_serving(&mut self, serving: bool) {
        if serving == self.shared.is_some() {
            return;
        }
        // Dropping a subscription ends it.
        self.shared = None;
        if serving {
            match self.bus.shared(self.kind).await {
                Ok(shared) => self.shared = Some(shared),
                Err(error) => {
                    tracing::warn!(%error, kind = self.kind.token(), "cannot join the queue group");
                }
            }
        }
    }
}

/// What other publishers send.
pub(crate) struct PublisherMessages {
    /// Queries to all publishers.
    pub(crate) queries: BoxStream<'static, Message>,
    /// Answers to this publisher's own queries.
    pub(crate) answers: BoxStream<'static, Message>,
    /// The live feed, but for what this publisher sends.
    pub(crate) live: BoxStream<'static, Message>,
}

impl Bus {
    /// Returns whether the connection is up.
    pub(crate) fn is_up(&self) -> bool {
        self.link.is_up()
    }

    pub(crate) async fn subscribe(
        &self,
        subject: String,
    ) -> Result<BoxStream<'static, Message>, SubscribeError> {
        Ok(self.client.subscribe(subject).await?.boxed())
    }

    /// Receives one kind of message from now on.
    pub(crate) async fn receive(&self, kind: MessageKind) -> Result<Subscription, SubscribeError> {
        let (shared, to_all) = match kind {
            MessageKind::Applied => (None, kind.wildcard()),
            _ => (Some(self.shared(kind).await?), kind.any_wildcard()),
        };
        let to_all = self.client.subscribe(to_all).await?.boxed();
        Ok(Subscription { bus: self.clone(), kind, shared, to_all })
    }

    async fn shared(&self, kind: MessageKind) -> Result<BoxStream<'static, Message>, SubscribeError> {
        Ok(self.client.queue_subscribe(kind.wildcard(), AUTHORITY_GROUP.to_owned()).await?.boxed())
    }

    /// Sends an answer into an inbox that [`Subscription`] found to be the requester's.
    pub(crate) async fn answer(&self, reply: String, payload: Bytes) {
        self.send(reply, payload).await;
    }

    /// Connects again, with the login and the certificates of now.
    pub(crate) async fn reconnect(&self) {
        evictd_ops::bus::reconnect(&self.client).await;
    }

    /// Waits until what was sent has left this process, for [`FLUSH_LIMIT`] at most.
    pub(crate) async fn flush(&self) {
        let flushed = tokio::time::timeout(FLUSH_LIMIT, self.client.flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!("NATS not reachable at shutdown; agents will request what they missed");
        }
    }

    /// Sends, and returns whether the client has taken the message. Nothing is queued for a connection that is down:
    /// agents request what they miss.
    pub(crate) async fn send(&self, subject: String, payload: Bytes) -> bool {
        self.publish(subject, None, payload).await
    }

    /// Sends with a subject for answers. The server answers there if there is no subscriber.
    pub(crate) async fn query(&self, subject: String, reply: String, payload: Bytes) -> bool {
        self.publish(subject, Some(reply), payload).await
    }

    async fn publish(&self, subject: String, reply: Option<String>, payload: Bytes) -> bool {
        if !self.link.is_up() {
            return false;
        }
        match publish_within(&self.client, subject, reply, payload, PUBLISH_LIMIT).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "message not sent");
                false
            }
        }
    }
}

/// Connects; returns even if no server is reachable yet. Calls `on_connected` at each connection.
pub(crate) async fn connect(
    config: &BusConfig,
    metrics: &Arc<PublisherMetrics>,
    readiness: &Readiness,
    on_connected: impl Fn() + Send + Sync + 'static,
) -> Result<Bus, BusError> {
    let link = BusLink::new(config, metrics.nats.clone(), readiness);
    open("evictd publisher", config, link, metrics, on_connected).await
}

/// Connects once more, for lookups alone. Readiness depends on this connection too; the metric shows the other one.
pub(crate) async fn connect_for_lookups(
    config: &BusConfig,
    metrics: &Arc<PublisherMetrics>,
    readiness: &Readiness,
) -> Result<Bus, BusError> {
    let counted = BusMetrics { connected: Gauge::noop(), ..metrics.nats.clone() };
    let link = BusLink::named("nats_lookups", config, counted, readiness);
    open("evictd publisher, lookups", config, link, metrics, || {}).await
}

async fn open(
    name: &str,
    config: &BusConfig,
    link: BusLink,
    metrics: &Arc<PublisherMetrics>,
    on_connected: impl Fn() + Send + Sync + 'static,
) -> Result<Bus, BusError> {
    let options = BusOptions {
        name: name.to_owned(),
        inbox_prefix: None,
        subscription_capacity: SUBSCRIPTION_CAPACITY,
    };
    let on_event = {
        let link = link.clone();
        move |event| {
            if link.note(event) {
                on_connected();
            }
        }
    };
    let client = evictd_ops::bus::connect(config, options, on_event).await?;
    Ok(Bus { client, link, metrics: metrics.clone() })
}

#[cfg(test)]
pub(crate) mod tests;
