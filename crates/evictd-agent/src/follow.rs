//! The shell of the follower: receives, asks the core, performs what it says in order.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message;
use bytes::Bytes;
use evictd_core::exposure::{ApplyReport, Exposure};
use evictd_core::follower::{Accepted, Effect, Via};
use evictd_core::history::Provenance;
use evictd_core::ids::{Identity, KeyHash};
use evictd_core::invalidation::{Invalidation, Scope};
use evictd_core::lease::{Bound, Mode};
use evictd_core::offset::{ClockOffset, CommitWindow, Measurement};
use evictd_core::position::LogPosition;
use evictd_core::roster::PartitionPolicy;
use evictd_core::rules::Rule;
use evictd_core::serving::EntryCache;
use evictd_core::time::LeaseTime;
use evictd_ops::clock;
use evictd_ops::invariants::Invariants;
use evictd_ops::readiness::Condition;
use evictd_wire::applied::Applied;
use evictd_wire::live::{Live, LiveEvent};
use evictd_wire::probe::{ProbeAnswer, ProbeRequest};
use evictd_wire::replay::{ReplayAnswer, ReplayRequest};
use evictd_wire::subject::MessageKind;
use futures_util::StreamExt;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::apply_reports::ApplyReportQueue;
use crate::bus::{Feed, nobody_listens};
use crate::cache::{Cache, Entry};
use crate::knowledge::Knowledge;
use crate::metrics::{Incoming, Metrics};
use crate::policy::Policies;
use crate::status::Recent;

/// How often gauges are refreshed and progress is announced if nothing asks for it sooner.
const BEAT: Duration = Duration::from_secs(1);

/// Announcements keep this distance: one speaks for all deletions before it. The first goes at once.
const ANNOUNCEMENT_SPACING: Duration = Duration::from_millis(10);

/// After so much silence the live feed is called silent: three ticks.
const FEED_SILENT_AFTER: Duration = Duration::from_secs(3);

/// A rival that was silent for so long is gone.
const RIVAL_GONE_AFTER: Duration = Duration::from_secs(5);

/// What its messages mean. They move nothing here.
const RIVAL: &str = "another home store than the one that this agent follows is active on this bus; stop one of them, \
                     or give each its own NATS account";

/// Everything the follow task works on.
#[derive(Debug)]
pub(crate) struct Follow {
    pub(crate) identity: Identity,
    pub(crate) bound: Bound,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) policies: Arc<Policies>,
    /// Met while the lease runs.
    pub(crate) lease: Condition,
    /// Met while the live feed is heard.
    pub(crate) feed: Condition,
    /// Met while no other home store speaks on the bus.
    pub(crate) history: Condition,
    pub(crate) recent: Recent,
}

impl Follow {
    /// Follows until `shutdown`.
    pub(crate) async fn run(self, mut feed: Feed, shutdown: CancellationToken) {
        let mut task = Task::new(self);
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
        // Verifications have ended by now. But a copy of this machine has the same instance, and goes on.
        if !task.follow.knowledge.has_ended()
            && let Some(last) = task.announcement(true)
        {
            feed.leave(last.encode()).await;
        }
    }
}

struct Task {
    follow: Follow,
    effects: Vec<Effect>,
    offset: ClockOffset,
    apply_reports: ApplyReportQueue,
    last_heard: LeaseTime,
    /// Nothing can be heard before.
    connected_at: LeaseTime,
    /// When the next announcement may go, and whether somebody waits for it.
    announce_from: Instant,
    announcement_due: bool,
    mode: Mode,
    /// Who spoke last for another history, and when.
    rival: Option<(Provenance, LeaseTime)>,
}

impl Task {
    fn new(follow: Follow) -> Self {
        Self {
            follow,
            effects: Vec::new(),
            offset: ClockOffset::default(),
            apply_reports: ApplyReportQueue::default(),
            last_heard: clock::lease_now(),
            connected_at: clock::lease_now(),
            announce_from: Instant::now(),
            announcement_due: false,
            mode: Mode::Starting,
            rival: None,
        }
    }

    fn on_live(&mut self, payload: &Bytes) {
        let now = clock::lease_now();
        let mut follower = self.follow.knowledge.follower.lock();
        match Live::decode(payload) {
            Ok(Live { voucher, event: LiveEvent::Invalidations(rows) }) => {
                follower.on_live(&voucher, rows, now, &mut self.effects);
            }
            Ok(Live { voucher, event: LiveEvent::Tick(_) }) => {
                follower.on_tick(&voucher, now, &mut self.effects);
            }
            Ok(Live { voucher, event: LiveEvent::Ended }) => {
                follower.on_end(voucher.milestone.provenance, now)
            }
            Err(error) => {
                tracing::debug!(%error, "ignored a message of the live feed");
                self.follow.metrics.malformed(Incoming::Live);
                return;
            }
        }
        self.last_heard = now;
    }

    fn on_probe_answer(&mut self, message: &Message) {
        let incoming = Incoming::Answer(MessageKind::Probe);
        if nobody_listens(message) {
            return;
        }
        let Ok(answer) = ProbeAnswer::decode(&message.payload) else {
            return self.follow.metrics.malformed(incoming);
        };
        let now = clock::lease_now();
        let mut follower = self.follow.knowledge.follower.lock();
        let sent_at = follower.probe_sent_at(answer.nonce);
        match follower.on_probe_answer(answer.nonce, &answer.head, answer.is_proof, now, &mut self.effects) {
            Accepted::Yes => {
                if let Some(sent_at) = sent_at {
                    let ProbeAnswer { held, store_time, head, .. } = answer;
                    let (received_at, head) = (now, head.milestone.at);
                    if self.offset.measured(Measurement { sent_at, received_at, held, store_time, head }) {
                        tracing::warn!("the home store's clock was set; lags are measured anew");
                    }
                    self.publish_offset(now);
                }
            }
            Accepted::No => self.follow.metrics.unasked(incoming),
        }
    }

    fn on_replay_answer(&mut self, message: &Message) {
        let incoming = Incoming::Answer(MessageKind::Replay);
        if nobody_listens(message) {
            return;
        }
        let Ok(answer) = ReplayAnswer::decode(&message.payload) else {
            return self.follow.metrics.malformed(incoming);
        };
        let now = clock::lease_now();
        let mut follower = self.follow.knowledge.follower.lock();
        if follower.on_replay_answer(answer.nonce, answer.provenance, answer.outcome, now, &mut self.effects)
            == Accepted::No
        {
            self.follow.metrics.unasked(incoming);
        }
    }

    fn on_connected(&mut self) {
        self.connected_at = clock::lease_now();
        self.follow.knowledge.follower.lock().connected(self.connected_at);
    }

    async fn on_beat(&mut self, feed: &Feed) {
        let now = clock::lease_now();
        let Follow { knowledge, metrics, bound, .. } = &self.follow;
        let (mode, remaining) = {
            let follower = knowledge.follower.lock();
            (knowledge.mode(&follower, now), knowledge.remaining(&follower, now))
        };
        metrics.lease(bound.bound(), remaining, mode);
        metrics.feed_silent(self.is_feed_silent(now));
        self.remark_on_feed(feed.is_connected(), now);
        if let Some((low, high)) = self.offset.bounds(now) {
            let wall_less_lease = clock::wall_now().0.saturating_sub(now.0 as i64);
            metrics.clock(low.saturating_sub(wall_less_lease), high.saturating_sub(wall_less_lease));
        }
        self.publish_offset(now);
        self.remark_on_rival(now);
        self.enter(mode);
        self.announce(feed).await;
    }

    fn is_feed_silent(&self, now: LeaseTime) -> bool {
        now.since(self.last_heard) >= FEED_SILENT_AFTER
    }

    /// That nothing is heard without a connection is said by the connection's own condition.
    fn remark_on_feed(&self, connected: bool, now: LeaseTime) {
        let feed = &self.follow.feed;
        if !self.is_feed_silent(now) {
            feed.met();
        } else if !connected {
            feed.moot();
        } else if now.since(self.connected_at) >= FEED_SILENT_AFTER {
            feed.unmet(
                "no publisher ticks: none is connected, or none can read its store, or the permissions lack \
                 evictd.v1.live; changes arrive by repair only",
            );
        }
    }

    /// Another home store on the bus moves nothing here, but somebody has to stop it.
    fn remark_on_rival(&mut self, now: LeaseTime) {
        match self.rival {
            Some((provenance, at)) if now.since(at) < RIVAL_GONE_AFTER => {
                let Provenance { store, incarnation } = provenance;
                self.follow.history.unmet(format!("{RIVAL}: store {store}, incarnation {incarnation}"));
            }
            _ => {
                self.rival = None;
                self.follow.history.met();
            }
        }
    }

    fn publish_offset(&self, now: LeaseTime) {
        if let Some((_, high)) = self.offset.bounds(now) {
            self.follow.knowledge.publish_home_offset_high(high);
        }
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
            Mode::Expired => {
                tracing::warn!(
                    "expired: no proof within the bound, cached entries live by their own read only"
                );
                self.follow
                    .lease
                    .unmet("a proof from a publisher that nothing was missed; the last one is too old");
            }
            // Where every process begins, and none returns to.
            Mode::Starting => {}
        }
    }

    fn wake_at(&self) -> Instant {
        let wake_at = self.follow.knowledge.follower.lock().wake_at();
        let wake_at = Instant::now() + wake_at.since(clock::lease_now());
        if self.announcement_due { wake_at.min(self.announce_from) } else { wake_at }
    }

    async fn poll_and_perform(&mut self, feed: &Feed) {
        self.follow.knowledge.follower.lock().poll(clock::lease_now(), &mut self.effects);
        let mut effects = std::mem::take(&mut self.effects);
        for effect in effects.drain(..) {
            self.perform(effect, feed).await;
        }
        self.effects = effects;
        if self.announcement_due && Instant::now() >= self.announce_from {
            self.announce(feed).await;
        }
    }

    /// The core performs it (R9); what else there is to do or to tell of it is done here.
    async fn perform(&mut self, effect: Effect, feed: &Feed) {
        let Follow { knowledge, cache, metrics, identity, .. } = &self.follow;
        let applied_before = knowledge.applied();
        let evicted = knowledge.perform(&effect, &**cache);
        match effect {
            Effect::Applied { invalidation, via } => {
                if let Some(hash) = invalidation.scope.evicted_key() {
                    self.check_evicted(hash, invalidation.position);
                }
                self.applied(&invalidation, via, evicted.as_deref());
            }
            Effect::Flush(reason) => {
                tracing::info!(reason = reason.label(), "everything cached is forgotten");
                metrics.flushed(reason);
            }
            Effect::FloorsMerged(merged) => {
                tracing::warn!(?merged, "floors were merged to bound memory; more than necessary reloads");
                metrics.floors_merged(merged.floors());
            }
            Effect::Progress { applied, head } => {
                check_progress(&metrics.invariants, applied_before, applied);
                metrics.progress(applied.epoch(), applied.position(), head.position());
            }
            Effect::Proven(at) => {
                cache.exposure.proven(at);
                let now = clock::lease_now();
                if at > now {
                    metrics
                        .invariants
                        .violated(Rule::R7, format_args!("a proof from the future: {at:?} at {now:?}"));
                }
                let mode = knowledge.mode(&knowledge.follower.lock(), now);
                self.enter(mode);
            }
            Effect::Rival(provenance) => {
                metrics.rival_message();
                if self.rival.replace((provenance, clock::lease_now())).is_none() {
                    tracing::warn!(store = %provenance.store, incarnation = %provenance.incarnation, "{RIVAL}");
                }
            }
            // After all other effects (R9).
            Effect::Announce => self.announcement_due = true,
            Effect::SendProbe { nonce, seen, all } => {
                let probe = ProbeRequest {
                    nonce,
                    instance: identity.instance,
                    policy: self.follow.policies.widest(),
                    bound: self.follow.bound.bound(),
                    seen,
                };
                feed.send_probe(probe.encode(), all).await;
            }
            Effect::SendReplay { nonce, epoch, from, to, cause, all } => {
                tracing::info!(from, to, cause = cause.label(), "repairing a gap");
                metrics.repair(cause);
                feed.send_replay(ReplayRequest { nonce, epoch, from, to }.encode(), all).await;
            }
        }
    }

    /// After an eviction nothing may be left, or have come, that is older than what evicted it (R9).
    fn check_evicted(&self, hash: &KeyHash, position: LogPosition) {
        let Follow { cache, metrics, .. } = &self.follow;
        let left =
            cache.get(hash).filter(|entry| entry.validity.is_shown() && entry.validity.as_of() < position);
        if let Some(entry) = left {
            let as_of = entry.validity.as_of();
            metrics
                .invariants
                .violated(Rule::G2, format_args!("{as_of} is shown after the eviction at {position}"));
        }
    }

    /// A change was applied; `evicted` is what was cached under it, if it concerns a single key.
    fn applied(&mut self, invalidation: &Invalidation, via: Via, evicted: Option<&Entry>) {
        let now = clock::lease_now();
        let Invalidation { position, committed_at, cause, ref scope } = *invalidation;
        let commit = self.offset.commit_of(position, committed_at, now);
        let apply_report = commit.map(|commit| {
            let lag = commit.age(now);
            let mut exposure = self.exposure(invalidation, commit, evicted);
            // Answers are dated a tick late, and end here.
            exposure.last_after = exposure.last_after.min(lag.high);
            ApplyReport { position, lag, exposure }
        });
        let lag = apply_report.map(|apply_report| apply_report.lag.middle());
        self.follow.metrics.applied(scope, via, lag);
        self.follow.recent.push(invalidation, via, apply_report.as_ref());
        if let Some(apply_report) = apply_report {
            self.apply_reports.push(apply_report);
        }
        tracing::debug!(%position, scope = scope.label(), cause = cause.label(), ?lag, "applied");
    }

    fn exposure(
        &self,
        invalidation: &Invalidation,
        commit: CommitWindow,
        evicted: Option<&Entry>,
    ) -> Exposure {
        let Follow { cache, metrics, bound, policies, .. } = &self.follow;
        let Invalidation { position, ref scope, .. } = *invalidation;
        let answers = evicted.map(|entry| (&entry.answers, entry.validity.as_of()));
        let after = cache.exposure.exposure(scope, position, commit, answers);
        metrics.exposed(after.at_most);
        if after.at_least > bound.bound() {
            metrics.breached();
            let policy = match (evicted, scope) {
                (Some(entry), _) => policies.of(&entry.record),
                (None, Scope::Api(api) | Scope::Key { api_id: Some(api), .. }) => policies.of_api(api),
                (None, _) => policies.widest(),
            };
            if policy == PartitionPolicy::Deny {
                let after = after.at_least;
                metrics
                    .invariants
                    .violated(Rule::G1, format_args!("answered {after:?} after the commit of {position}"));
            }
        }
        Exposure { last_after: after.at_most }
    }

    async fn announce(&mut self, feed: &Feed) {
        self.announcement_due = false;
        self.announce_from = Instant::now() + ANNOUNCEMENT_SPACING;
        if let Some(announcement) = self.announcement(false)
            && !feed.announce(announcement.encode()).await
        {
            self.apply_reports.unsent(&announcement.apply_reports);
        }
    }

    /// How far this agent is, and what it saw lately; nothing before it knows where it stands.
    fn announcement(&mut self, leaving: bool) -> Option<Applied> {
        let applied = self.follow.knowledge.applied();
        if applied == LogPosition::ZERO {
            return None;
        }
        let provenance = self.follow.knowledge.follower.lock().provenance()?;
        let (instance, apply_reports) =
            (self.follow.identity.instance, self.apply_reports.told_with(applied));
        Some(Applied { instance, provenance, applied, apply_reports, leaving })
    }
}

/// `applied` only grows (R5), and so does its epoch (R2).
fn check_progress(invariants: &Invariants, before: LogPosition, applied: LogPosition) {
    if applied < before {
        let rule = if applied.epoch() < before.epoch() { Rule::R2 } else { Rule::R5 };
        invariants.violated(rule, format_args!("applied went from {before} back to {applied}"));
    }
}

#[cfg(test)]
mod tests;
