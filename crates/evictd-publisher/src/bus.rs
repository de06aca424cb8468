//! The publisher's NATS connection: what it hears, and where it may speak (R13).
//!
//! It speaks on the live feed and into the inboxes of agents, and its NATS permissions allow no more.
//! NATS checks no permission on reply subjects, so a request names its asker in its subject, and the
//! answer goes into that asker's inbox or nowhere.

use std::sync::Arc;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Message, SubscribeError, Subscriber};
use bytes::Bytes;
use evictd_core::invalidation::Invalidation;
use evictd_core::position::LogPosition;
use evictd_ops::bus::{BusConfig, BusEvent, BusOptions, publish_within};
use evictd_ops::readiness::{Condition, Readiness};
use evictd_wire::live::{encode_invalidations, encode_tick};
use evictd_wire::subject::{AUTHORITY_GROUP, Kind, LIVE, PROBE_ANY_WILDCARD, Speaker};
use futures_util::StreamExt;

use crate::StartError;
use crate::confirmations::Confirmations;
use crate::metrics::{Metrics, Refusal};
use crate::sequencer::Wake;

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

    pub(crate) fn live_feed(&self) -> LiveFeed {
        LiveFeed { bus: self.clone() }
    }

    /// Answers into an inbox that [`Intake`] found to be the asker's.
    pub(crate) async fn answer(&self, reply: String, payload: Bytes) {
        self.send(reply, payload).await;
    }

    /// Nothing is queued for a connection that is down: whoever misses something will ask.
    async fn send(&self, subject: String, payload: Bytes) -> bool {
        if self.client.connection_state() != State::Connected {
            return false;
        }
        match publish_within(&self.client, subject, payload, PUBLISH_LIMIT).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "not sent");
                false
            }
        }
    }
}

/// The sending end of the live feed.
#[derive(Clone, Debug)]
pub(crate) struct LiveFeed {
    bus: Bus,
}

impl LiveFeed {
    /// Emits rows that just got their positions. They count as open first, or an agent could confirm one
    /// before anybody waits for it.
    pub(crate) async fn send_numbered(&self, rows: &[Invalidation], confirmations: &Confirmations) {
        confirmations.numbered(rows);
        for payload in encode_invalidations(rows) {
            let sent = self.bus.send(LIVE.to_owned(), payload).await;
            self.bus.metrics.live_message(sent);
        }
    }

    pub(crate) async fn tick(&self, head: LogPosition) {
        self.bus.send(LIVE.to_owned(), encode_tick(head)).await;
    }

    /// Waits, but not for long, until what was sent has left this process.
    pub(crate) async fn flush(&self) {
        let flushed = tokio::time::timeout(FLUSH_LIMIT, self.bus.client.flush()).await;
        if !matches!(flushed, Ok(Ok(()))) {
            tracing::warn!("NATS wasn't reachable at the end; agents will ask for what they missed");
        }
    }

    pub(crate) fn bus(&self) -> &Bus {
        &self.bus
    }
}

/// Connects; returns although no server may be reachable yet.
pub(crate) async fn connect(
    config: &BusConfig,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
    wake: Wake,
) -> Result<Bus, StartError> {
    let options = BusOptions {
        name: "evictd publisher".to_owned(),
        inbox_prefix: None,
        subscription_capacity: SUBSCRIPTION_CAPACITY,
    };
    let condition = readiness.condition("nats", format!("a connection to {}", config.urls.join(", ")));
    let on_event = on_event(metrics.clone(), condition, wake);
    let client = evictd_ops::bus::connect(config, options, on_event).await?;
    Ok(Bus { client, metrics: metrics.clone() })
}

fn on_event(
    metrics: Arc<Metrics>,
    condition: Condition,
    wake: Wake,
) -> impl Fn(BusEvent) + Send + Sync + 'static {
    move |event| match event {
        BusEvent::Connected => {
            tracing::info!("connected to NATS");
            metrics.connected(true);
            condition.met();
            wake.tick();
        }
        BusEvent::Disconnected => {
            tracing::warn!("the connection to NATS is lost; changes are kept and agents will ask for them");
            metrics.connected(false);
            condition.unmet("a connection to NATS, which was lost");
        }
        BusEvent::SlowConsumer => metrics.slow_consumer(),
        BusEvent::ServerError(error) => {
            tracing::warn!(%error, "NATS reports an error; are the permissions of the publisher's user right?");
            metrics.server_error();
        }
        BusEvent::ClientError(error) => {
            tracing::debug!(%error, "NATS client");
            condition.unmet(format!("a connection to NATS: {error}"));
        }
        BusEvent::LameDuck | BusEvent::Draining | BusEvent::Closed => {}
    }
}
