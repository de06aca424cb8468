//! The publisher's NATS connections: what it hears, and where it may speak (R13).
//!
//! There are two: lookups come and are answered on one of their own, so that a flood of them holds up no proof,
//! no repair and no invalidation.
//!
//! It speaks on the live feed and into the inboxes of agents, and its NATS permissions allow no more.
//! NATS checks no permission on reply subjects, so a request names its asker in its subject, and the
//! answer goes into that asker's inbox or nowhere.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, SubscribeError};
use bytes::Bytes;
use evictd_ops::bus::{BusConfig, BusMetrics, BusOptions, Link, publish_within};
use evictd_ops::readiness::Readiness;
use evictd_wire::subject::{AUTHORITY_GROUP, Kind, Speaker};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use metrics::Gauge;

use crate::StartError;
use crate::metrics::{Metrics, Refusal};

/// Messages that a subscription holds. What is dropped beyond is asked again.
const SUBSCRIPTION_CAPACITY: usize = 32_768;

/// How long the last messages may take to leave.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// How long a message may wait for the client. What isn't sent is repaired by whoever misses it.
const PUBLISH_LIMIT: Duration = Duration::from_millis(250);

/// The connection.
#[derive(Clone, Debug)]
pub(crate) struct Bus {
    client: Client,
    link: Link,
    metrics: Arc<Metrics>,
}

/// One kind of message from every agent, of which unfit ones are counted and dropped.
///
/// Questions are shared among the publishers of a queue group; an agent's second try goes to all of them. One
/// that is heard both ways is answered twice, which does no harm.
pub(crate) struct Intake {
    bus: Bus,
    kind: Kind,
    /// What this publisher shares with others, while it takes part.
    shared: Option<BoxStream<'static, Message>>,
    /// What goes to every publisher.
    to_all: BoxStream<'static, Message>,
}

/// A message, and who sent it according to its subject.
#[derive(Debug)]
pub(crate) struct Heard {
    pub(crate) speaker: Speaker,
    pub(crate) payload: Bytes,
    /// Where the answer goes: into the speaker's own inbox. Empty for announcements.
    pub(crate) reply: String,
}

impl Intake {
    /// The next fit message; `None` when the connection is closed for good.
    pub(crate) async fn next(&mut self) -> Option<Heard> {
        loop {
            let message = match &mut self.shared {
                Some(shared) => tokio::select! {
                    message = shared.next() => message,
                    message = self.to_all.next() => message,
                },
                None => self.to_all.next().await,
            };
            match self.admit(message?) {
                Ok(heard) => return Some(heard),
                Err(refusal) => self.refuse(refusal),
            }
        }
    }

    /// Counts a message that came in but can't be used.
    pub(crate) fn refuse(&self, refusal: Refusal) {
        self.bus.metrics.refused(self.kind, refusal);
    }

    fn admit(&self, message: Message) -> Result<Heard, Refusal> {
        let speaker = Speaker::of(&message.subject).ok_or(Refusal::Subject)?;
        let reply = message.reply.map(|reply| reply.to_string()).unwrap_or_default();
        if self.kind != Kind::Applied && !speaker.owns_inbox(&reply) {
            tracing::warn!(%speaker, kind = self.kind.token(), "refused a request whose reply subject isn't the asker's inbox");
            return Err(Refusal::Reply);
        }
        Ok(Heard { speaker, payload: message.payload, reply })
    }

    /// Leaves the queue group, or joins it again (R14): a member that can't answer swallows questions.
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
                    tracing::warn!(%error, kind = self.kind.token(), "couldn't join the queue group");
                }
            }
        }
    }
}

/// What other publishers send.
pub(crate) struct Publishers {
    /// Questions to all publishers.
    pub(crate) queries: BoxStream<'static, Message>,
    /// Answers to this publisher's own questions.
    pub(crate) answers: BoxStream<'static, Message>,
    /// The live feed, but for what this publisher sends.
    pub(crate) live: BoxStream<'static, Message>,
}

impl Bus {
    /// Whether what is sent now has a connection to leave by.
    pub(crate) fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// Subscribes to a subject.
    pub(crate) async fn subscribe(
        &self,
        subject: String,
    ) -> Result<BoxStream<'static, Message>, SubscribeError> {
        Ok(self.client.subscribe(subject).await?.boxed())
    }

    /// Hears one kind of message from now on.
    pub(crate) async fn intake(&self, kind: Kind) -> Result<Intake, SubscribeError> {
        let (shared, to_all) = match kind {
            Kind::Applied => (None, kind.wildcard()),
            _ => (Some(self.shared(kind).await?), kind.any_wildcard()),
        };
        let to_all = self.client.subscribe(to_all).await?.boxed();
        Ok(Intake { bus: self.clone(), kind, shared, to_all })
    }

    async fn shared(&self, kind: Kind) -> Result<BoxStream<'static, Message>, SubscribeError> {
        Ok(self.client.queue_subscribe(kind.wildcard(), AUTHORITY_GROUP.to_owned()).await?.boxed())
    }

    /// Answers into an inbox that [`Intake`] found to be the asker's.
    pub(crate) async fn answer(&self, reply: String, payload: Bytes) {
        self.send(reply, payload).await;
    }

    /// Waits, but not for long, until what was sent has left this process.
    pub(crate) async fn flush(&self) {
        let flushed = tokio::time::timeout(FLUSH_LIMIT, self.client.flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!("NATS wasn't reachable at the end; agents will ask for what they missed");
        }
    }

    /// Nothing is queued for a connection that is down: whoever misses something will ask.
    pub(crate) async fn send(&self, subject: String, payload: Bytes) -> bool {
        self.publish(subject, None, payload).await
    }

    /// As [`Bus::send`], with a subject for answers. The server says there if nobody listens.
    pub(crate) async fn ask(&self, subject: String, reply: String, payload: Bytes) -> bool {
        self.publish(subject, Some(reply), payload).await
    }

    async fn publish(&self, subject: String, reply: Option<String>, payload: Bytes) -> bool {
        if !self.link.is_up() {
            return false;
        }
        match publish_within(&self.client, subject, reply, payload, PUBLISH_LIMIT).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "not sent");
                false
            }
        }
    }
}

/// Connects; returns although no server may be reachable yet. `on_connected` is called at each connection.
pub(crate) async fn connect(
    config: &BusConfig,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
    on_connected: impl Fn() + Send + Sync + 'static,
) -> Result<Bus, StartError> {
    let link = Link::new(config, metrics.nats.clone(), readiness);
    open("evictd publisher", config, link, metrics, on_connected).await
}

/// Connects once more, for lookups alone. That it is there counts for readiness too; whether this publisher is
/// connected at all is the other connection's to show.
pub(crate) async fn connect_for_lookups(
    config: &BusConfig,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
) -> Result<Bus, StartError> {
    let counted = BusMetrics { connected: Gauge::noop(), ..metrics.nats.clone() };
    let link = Link::named("nats_lookups", config, counted, readiness);
    open("evictd publisher, lookups", config, link, metrics, || {}).await
}

async fn open(
    name: &str,
    config: &BusConfig,
    link: Link,
    metrics: &Arc<Metrics>,
    on_connected: impl Fn() + Send + Sync + 'static,
) -> Result<Bus, StartError> {
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
