//! The shell of the follower: receives, asks the core, performs what it says in order.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message;
use bytes::Bytes;
use evictd_core::follower::{Accepted, Effect, Via, evicts_one};
use evictd_core::ids::Identity;
use evictd_core::invalidation::Invalidation;
use evictd_core::lease::{Bound, Mode};
use evictd_core::position::LogPosition;
use evictd_core::roster::PartitionPolicy;
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_ops::readiness::Condition;
use evictd_wire::applied::Applied;
use evictd_wire::live::{self, Live};
use evictd_wire::probe::{ProbeAnswer, ProbeRequest};
use evictd_wire::replay::{ReplayAnswer, ReplayRequest};
use evictd_wire::subject::Kind;
use futures_util::StreamExt;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::bus::{Feed, nobody_listens};
use crate::cache::Cache;
use crate::knowledge::Knowledge;
use crate::metrics::{Incoming, Metrics};
use crate::status::Recent;

/// How often gauges are refreshed and progress is announced if nothing asks for it sooner.
const BEAT: Duration = Duration::from_secs(1);

/// After so much silence the live feed is called silent: three ticks.
const FEED_SILENT_AFTER: Duration = Duration::from_secs(3);

/// Everything the follow task works on.
#[derive(Debug)]
pub(crate) struct Follow {
    pub(crate) identity: Identity,
    pub(crate) bound: Bound,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lease: Condition,
    pub(crate) recent: Recent,
}

impl Follow {
    /// Follows until `shutdown`.
    pub(crate) async fn run(self, mut feed: Feed, shutdown: CancellationToken) {
        let mut task = Task {
            follow: self,
            effects: Vec::new(),
            offset: Offset::default(),
            last_heard: clock::lease_now(),
            mode: Mode::Starting,
        };
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wake_at = task.wake_at();
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(message) = feed.live.next() => task.on_live(&message.payload),
                Some(message) = feed.probe_answers.next() => task.on_probe_answer(&message),
                Some(message) = feed.replay_answers.next() => task.on_replay_answer(&message),
                () = feed.connected.notified() => task.on_connected(),
                () = tokio::time::sleep_until(wake_at) => {}
                _ = beat.tick() => task.on_beat(&feed).await,
            }
            task.poll_and_perform(&feed).await;
        }
        task.announce(&feed).await;
    }
}

struct Task {
    follow: Follow,
    effects: Vec<Effect>,
    offset: Offset,
    last_heard: LeaseTime,
    mode: Mode,
}

impl Task {
    fn on_live(&mut self, payload: &Bytes) {
        let now = clock::lease_now();
        let mut follower = self.follow.knowledge.follower.lock();
        match live::decode(payload) {
            Ok(Live::Invalidations(rows)) => follower.on_live(rows, now, &mut self.effects),
            Ok(Live::Tick(head)) => follower.on_tick(head, now, &mut self.effects),
            Err(error) => {
                tracing::debug!(%error, "ignored a message of the live feed");
                self.follow.metrics.malformed(Incoming::Live);
                return;
            }
        }
        self.last_heard = now;
    }

    fn on_probe_answer(&mut self, message: &Message) {
        let incoming = Incoming::Answer(Kind::Probe);
        if nobody_listens(message) {
            return;
        }
        let Ok(answer) = ProbeAnswer::decode(&message.payload) else {
            return self.follow.metrics.malformed(incoming);
        };
        let now = clock::lease_now();
        let mut follower = self.follow.knowledge.follower.lock();
        let sent_at = follower.probe_sent_at(answer.nonce);
        match follower.on_probe_answer(answer.nonce, answer.head, now, &mut self.effects) {
            Accepted::Yes => {
                if let Some(sent_at) = sent_at {
                    let travelled = now.since(sent_at).saturating_sub(answer.held);
                    self.offset.measured(answer.store_time, clock::wall_now(), travelled);
                    self.follow.knowledge.publish_offset_high(self.offset.high_micros());
                }
            }
            Accepted::No => self.follow.metrics.unasked(incoming),
        }
    }

    fn on_replay_answer(&mut self, message: &Message) {
        let incoming = Incoming::Answer(Kind::Replay);
        if nobody_listens(message) {
            return;
        }
        let Ok(answer) = ReplayAnswer::decode(&message.payload) else {
            return self.follow.metrics.malformed(incoming);
        };
        let now = clock::lease_now();
        let mut follower = self.follow.knowledge.follower.lock();
        if follower.on_replay_answer(answer.nonce, answer.outcome, now, &mut self.effects) == Accepted::No {
            self.follow.metrics.unasked(incoming);
        }
    }

    fn on_connected(&mut self) {
        self.follow.knowledge.follower.lock().connected(clock::lease_now());
    }

    async fn on_beat(&mut self, feed: &Feed) {
        let now = clock::lease_now();
        let (mode, remaining) = {
            let follower = self.follow.knowledge.follower.lock();
            let proven_at = follower.proven_at();
            (follower.mode(now), proven_at.map_or(Duration::ZERO, |at| self.follow.bound.remaining(now, at)))
        };
        self.enter(mode);
        let metrics = &self.follow.metrics;
        metrics.lease(self.follow.bound.bound(), remaining, mode);
        metrics.feed_silent(now.since(self.last_heard) >= FEED_SILENT_AFTER);
        metrics.clock(self.offset.micros as f64 / 1e6, self.offset.error);
        self.announce(feed).await;
    }

    fn enter(&mut self, mode: Mode) {
        if mode == self.mode {
            return;
        }
        self.mode = mode;
        match mode {
            Mode::Live => {
                tracing::info!("live: the cache is trusted");
                self.follow.lease.met();
            }
            Mode::Starting | Mode::Expired => {
                tracing::warn!(
                    "expired: no proof within the bound, cached entries live by their own read only"
                );
                self.follow
                    .lease
                    .unmet("a proof from a publisher that nothing was missed; the last one is too old");
            }
        }
    }

    fn wake_at(&self) -> Instant {
        let wake_at = self.follow.knowledge.follower.lock().wake_at();
        Instant::now() + wake_at.since(clock::lease_now())
    }

    async fn poll_and_perform(&mut self, feed: &Feed) {
        self.follow.knowledge.follower.lock().poll(clock::lease_now(), &mut self.effects);
        let mut effects = std::mem::take(&mut self.effects);
        for effect in effects.drain(..) {
            self.perform(effect, feed).await;
        }
        self.effects = effects;
    }

    /// Floors were raised inside the core; what follows is R9's order.
    async fn perform(&mut self, effect: Effect, feed: &Feed) {
        let Follow { knowledge, cache, metrics, identity, .. } = &self.follow;
        match effect {
            Effect::Applied { invalidation, via } => {
                if let Some(hash) = evicts_one(&invalidation.scope) {
                    cache.evict(hash);
                }
                self.applied(&invalidation, via);
            }
            Effect::Flush(reason) => {
                tracing::info!(reason = reason.label(), "everything cached is forgotten");
                cache.clear();
                metrics.flushed(reason);
            }
            Effect::Widened(widened) => {
                tracing::warn!(?widened, "floors were merged to bound memory; more than necessary reloads");
                metrics.floors_merged(widened.floors());
            }
            Effect::Progress { applied, head } => {
                knowledge.publish_applied(applied);
                metrics.progress(applied.epoch(), applied.position(), head.position());
            }
            Effect::Proven(at) => {
                knowledge.publish_proven(at);
                let mode = knowledge.follower.lock().mode(clock::lease_now());
                self.enter(mode);
            }
            Effect::Announce => self.announce(feed).await,
            Effect::SendProbe { nonce, seen, all } => {
                let probe = ProbeRequest {
                    nonce,
                    instance: identity.instance,
                    policy: PartitionPolicy::Deny,
                    bound: self.follow.bound.bound(),
                    seen,
                };
                feed.send_probe(probe.encode(), all).await;
            }
            Effect::SendReplay { nonce, epoch, from, to, cause } => {
                tracing::info!(from, to, cause = cause.label(), "repairing a gap");
                metrics.repair(cause);
                feed.send_replay(ReplayRequest { nonce, epoch, from, to }.encode()).await;
            }
        }
    }

    fn applied(&self, invalidation: &Invalidation, via: Via) {
        let lag = self.offset.age_of(invalidation.committed_at, clock::wall_now());
        self.follow.metrics.applied(&invalidation.scope, via, lag);
        self.follow.recent.push(invalidation, via, lag, self.offset.error);
        tracing::debug!(
            position = %invalidation.position, scope = invalidation.scope.label(),
            cause = invalidation.cause.label(), ?lag, "applied"
        );
    }

    async fn announce(&mut self, feed: &Feed) {
        let applied = self.follow.knowledge.applied();
        if applied == LogPosition::ZERO {
            return;
        }
        let announcement = Applied { instance: self.follow.identity.instance, applied };
        feed.announce(announcement.encode()).await;
    }
}

/// The store's clock less this machine's, from the best of the last probes.
#[derive(Debug)]
struct Offset {
    micros: i64,
    error: Duration,
}

impl Default for Offset {
    fn default() -> Self {
        Self { micros: 0, error: Duration::from_hours(1) }
    }
}

impl Offset {
    /// The answer spent `travelled` on the way, there and back: the store's clock was read somewhere
    /// within. A measurement with a smaller error replaces a larger one; an old one widens with time, as
    /// clocks drift apart.
    fn measured(&mut self, store_time: StoreTime, received_at: StoreTime, travelled: Duration) {
        let error = travelled / 2;
        self.error = self.error.saturating_add(Self::DRIFT);
        let read_at = store_time.0.saturating_add(error.as_micros() as i64);
        let micros = read_at.saturating_sub(received_at.0);
        // Both can't be true: a clock was set in between.
        let contradicts =
            u128::from(micros.abs_diff(self.micros)) > (error.saturating_add(self.error)).as_micros();
        if error <= self.error || contradicts {
            self.micros = micros;
            self.error = error;
        }
    }

    /// What two ordinary clocks may drift apart between two probes.
    const DRIFT: Duration = Duration::from_micros(500);

    fn age_of(&self, committed_at: StoreTime, now: StoreTime) -> Duration {
        let home_now = now.0.saturating_add(self.micros);
        Duration::from_micros(home_now.saturating_sub(committed_at.0).max(0) as u64)
    }

    fn high_micros(&self) -> i64 {
        self.micros.saturating_add(i64::try_from(self.error.as_micros()).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests;
