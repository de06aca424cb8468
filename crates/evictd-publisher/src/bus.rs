//! The publisher's NATS connection: what it hears, and where it may speak (R13).
//!
//! It speaks on the live feed and into the inboxes of agents, and its NATS permissions allow no more.
//! NATS checks no permission on reply subjects, so a request names its asker in its subject, and the
//! answer goes into that asker's inbox or nowhere.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, SubscribeError, Subscriber};
use bytes::Bytes;
use evictd_ops::bus::{BusConfig, BusOptions, Link, publish_within};
use evictd_ops::readiness::Readiness;
use evictd_wire::subject::{AUTHORITY_GROUP, Kind, PROBE_ANY_WILDCARD, Speaker};
use futures_util::StreamExt;

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

/// Everything the publisher hears.
pub(crate) struct Intakes {
    pub(crate) probes: Intake,
    pub(crate) probes_any: Intake,
    pub(crate) replays: Intake,
    pub(crate) lookups: Intake,
    pub(crate) applied: Intake,
}

/// A subscription to one kind of message, of which unfit ones are counted and dropped.
pub(crate) struct Intake {
    bus: Bus,
    kind: Kind,
    subject: String,
    grouped: bool,
    subscription: Option<Subscriber>,
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
    /// The next fit message; `None` when the connection is closed for good. Waits while silent.
    pub(crate) async fn next(&mut self) -> Option<Heard> {
        loop {
            let Some(subscription) = &mut self.subscription else {
                std::future::pending::<()>().await;
                continue;
            };
            let message = subscription.next().await?;
            match self.admit(message) {
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
    pub(crate) async fn set_serving(&mut self, serving: bool) -> Result<(), SubscribeError> {
        if serving == self.subscription.is_some() {
            return Ok(());
        }
        if serving {
            self.subscription = Some(self.subscribe().await?);
        } else if let Some(mut subscription) = self.subscription.take() {
            // It fails only when the connection is closed, and then nothing is swallowed.
            drop(subscription.unsubscribe().await);
        }
        Ok(())
    }

    async fn subscribe(&self) -> Result<Subscriber, SubscribeError> {
        let subject = self.subject.clone();
        if self.grouped {
            self.bus.client.queue_subscribe(subject, AUTHORITY_GROUP.to_owned()).await
        } else {
            self.bus.client.subscribe(subject).await
        }
    }
}

impl Bus {
    /// Subscribes to everything.
    pub(crate) async fn intakes(&self) -> Result<Intakes, SubscribeError> {
        let intake = async |kind: Kind, subject: String, grouped| {
            let mut intake = Intake { bus: self.clone(), kind, subject, grouped, subscription: None };
            intake.set_serving(true).await?;
            Ok::<_, SubscribeError>(intake)
        };
        Ok(Intakes {
            probes: intake(Kind::Probe, Kind::Probe.wildcard(), true).await?,
            probes_any: intake(Kind::Probe, PROBE_ANY_WILDCARD.to_owned(), false).await?,
            replays: intake(Kind::Replay, Kind::Replay.wildcard(), true).await?,
            lookups: intake(Kind::Lookup, Kind::Lookup.wildcard(), true).await?,
            applied: intake(Kind::Applied, Kind::Applied.wildcard(), false).await?,
        })
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
        if !self.link.is_up() {
            return false;
        }
        match publish_within(&self.client, subject, None, payload, PUBLISH_LIMIT).await {
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
    let options = BusOptions {
        name: "evictd publisher".to_owned(),
        inbox_prefix: None,
        subscription_capacity: SUBSCRIPTION_CAPACITY,
    };
    let link = Link::new(config, metrics.nats.clone(), readiness);
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
mod tests;
