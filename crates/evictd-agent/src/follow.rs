//! The follow task: passes messages to the core, and performs the core's effects in order.

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
use evictd_ops::config::HumanDuration;
use evictd_ops::invariants::Invariants;
use evictd_ops::log_limit;
use evictd_ops::readiness::Condition;
use evictd_ops::time::every;
use evictd_wire::applied::Applied;
use evictd_wire::live::{Live, LiveEvent};
use evictd_wire::probe::{ProbeAnswer, ProbeRefusal, ProbeReply, ProbeRequest};
use evictd_wire::replay::{ReplayAnswer, ReplayRequest};
use futures_util::StreamExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply_reports::ApplyReportQueue;
use crate::bus::{Feed, is_no_responders};
use crate::cache::{CachedRecord, RecordCache};
use crate::metrics::{AgentMetrics, Incoming};
use crate::policy::Policies;
use crate::serving::ServingState;
use crate::status::RecentChanges;

/// The interval of gauges, and of announcements without an applied change.
const BEAT: Duration = Duration::from_secs(1);

/// The shortest time between two announcements: one covers all deletions before it. The first one is sent at once.
const ANNOUNCEMENT_SPACING: Duration = Duration::from_millis(10);

/// The live feed counts as silent after three missing ticks.
const FEED_SILENT_AFTER: Duration = Duration::from_secs(3);

/// A rival counts as gone after this silence.
const RIVAL_GONE_AFTER: Duration = Duration::from_secs(5);

const RIVAL: &str = "another home store than the one that this agent follows is active on this bus; stop one of them, \
                     or give each its own NATS account";

/// The parts of the agent that the follow task works on.
#[derive(Debug)]
pub(crate) struct FollowContext {
    pub(crate) identity: Identity,
    pub(crate) bound: Bound,
    pub(crate) serving: Arc<ServingState>,
    pub(crate) cache: Arc<RecordCache>,
    pub(crate) metrics: Arc<AgentMetrics>,
    pub(crate) policies: Arc<Policies>,
    /// Met while the lease runs.
    pub(crate) lease: Condition,
    /// Met while the live feed isn't silent.
    pub(crate) feed: Condition,
    /// Met while no other home store sends on the bus.
    pub(crate) history: Condition,
    pub(crate) recent: RecentChanges,
}

impl FollowContext {
    /// Runs the follow task until `shutdown`.
    pub(crate) async fn run(self, mut feed: Feed, shutdown: CancellationToken) {
        let mut task = FollowTask::new(self);
        let mut beat = every(BEAT);
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
        // Verifications have ended by now. After a disruption no leave message is sent: a copy of this machine has the
        // same instance and continues.
        if !task.context.serving.has_ended()
            && let Some(last) = task.announcement(true)
        {
            feed.leave(last.encode()).await;
        }
    }
}

struct FollowTask {
    context: FollowContext,
    effects: Vec<Effect>,
    offset: ClockOffset,
    apply_reports: ApplyReportQueue,
    /// The last message of the live feed.
    last_live_at: LeaseTime,
    connected_at: LeaseTime,
    /// The earliest time of the next announcement.
    announce_from: Instant,
    announcement_due: bool,
    mode: Mode,
    /// The last message of another history.
    rival: Option<(Provenance, LeaseTime)>,
}

impl FollowTask {
    fn new(context: FollowContext) -> Self {
        Self {
            context,
            effects: Vec::new(),
            offset: ClockOffset::default(),
            apply_reports: ApplyReportQueue::default(),
            last_live_at: clock::lease_now(),
            connected_at: clock::lease_now(),
            announce_from: Instant::now(),
            announcement_due: false,
            mode: Mode::Starting,
            rival: None,
        }
    }

    fn on_live(&mut self, payload: &Bytes) {
        let now = clock::lease_now();
        let mut follower = self.context.serving.follower.lock();
        match Live::decode(payload) {
            Ok(Live { voucher, event: LiveEvent::Invalidations(rows) }) => {
                follower.on_live(&voucher, rows, now, &mut self.effects);
            }
            Ok(Live { voucher, event: LiveEvent::Tick(_) }) => {
                follower.on_tick(&voucher, now, &mut self.effects);
            }
            Ok(Live { voucher, event: LiveEvent::Ended }) => {
                follower.on_end(voucher.milestone.provenance, now);
            }
            Err(error) => {
                tracing::debug!(%error, "ignored a message of the live feed");
                self.context.metrics.malformed(Incoming::Live);
                return;
            }
        }
        self.last_live_at = now;
    }

    fn on_probe_answer(&mut self, message: &Message) {
        let incoming = Incoming::Probe;
        if is_no_responders(message) {
            return;
        }
        let answer = match ProbeReply::decode(&message.payload) {
            Ok(ProbeReply::Answer(answer)) => answer,
            Ok(ProbeReply::Refused { nonce, refusal }) => return self.on_refusal(nonce, &refusal),
            Err(_) => return self.context.metrics.malformed(incoming),
        };
        let now = clock::lease_now();
        let mut follower = self.context.serving.follower.lock();
        let sent_at = follower.probe_sent_at(answer.nonce);
        match follower.on_probe_answer(answer.nonce, &answer.head, answer.is_proof, now, &mut self.effects) {
            Accepted::Yes => {
                if let Some(sent_at) = sent_at {
                    let ProbeAnswer { held, store_time, head, .. } = answer;
                    let (received_at, head) = (now, head.milestone.at);
                    let measured = Measurement { sent_at, received_at, held, store_time, head };
                    if self.offset.measured(measured) && log_limit!(1, "").is_some() {
                        tracing::warn!("home store's clock was set; measuring lags anew");
                    }
                    self.publish_offset(now);
                }
            }
            Accepted::No => self.context.metrics.unasked(incoming),
        }
    }

    /// A refusal changes nothing: another publisher may answer. It is what an operator must know if none does.
    fn on_refusal(&mut self, nonce: u64, refusal: &ProbeRefusal) {
        let FollowContext { serving, bound, lease, metrics, .. } = &self.context;
        if serving.follower.lock().probe_sent_at(nonce).is_none() {
            return metrics.unasked(Incoming::Probe);
        }
        let reason = match refusal {
            ProbeRefusal::Bound { limit } => format!(
                "lease.bound is {} here, and at most {} (receipts.bound) at the publisher; change one of them",
                HumanDuration::from(bound.bound()),
                HumanDuration::from(*limit)
            ),
            ProbeRefusal::Crowded => {
                "too many processes run under this agent's name; give each its own".to_owned()
            }
            ProbeRefusal::Unproved => {
                "its home store did not give out what this agent has received: the agent follows another store; if \
                 that store is replaced by the publisher's, restart the agent"
                    .to_owned()
            }
            ProbeRefusal::Other => "for a reason that this version of evictd doesn't have; update the agent".to_owned(),
        };
        if let Some(unlogged) = log_limit!(1, reason) {
            tracing::warn!(unlogged = unlogged.field(), "a publisher refuses this agent: {reason}");
        }
        if self.mode != Mode::Live {
            lease.unmet(format!("a publisher that gives this agent a lease; one refuses: {reason}"));
        }
    }

    fn on_replay_answer(&mut self, message: &Message) {
        let incoming = Incoming::Replay;
        if is_no_responders(message) {
            return;
        }
        let Ok(answer) = ReplayAnswer::decode(&message.payload) else {
            return self.context.metrics.malformed(incoming);
        };
        let now = clock::lease_now();
        let mut follower = self.context.serving.follower.lock();
        if follower.on_replay_answer(answer.nonce, answer.provenance, answer.outcome, now, &mut self.effects)
            == Accepted::No
        {
            self.context.metrics.unasked(incoming);
        }
    }

    fn on_connected(&mut self) {
        self.connected_at = clock::lease_now();
        self.context.serving.follower.lock().connected(self.connected_at);
    }

    async fn on_beat(&mut self, feed: &Feed) {
        let now = clock::lease_now();
        let FollowContext { serving, metrics, bound, .. } = &self.context;
        let (mode, remaining) = {
            let follower = serving.follower.lock();
            (serving.mode(&follower, now), serving.remaining(&follower, now))
        };
        metrics.lease(bound.bound(), remaining, mode);
        metrics.feed_silent(self.is_feed_silent(now));
        self.update_feed_condition(feed.is_connected(), now);
        if let Some((low, high)) = self.offset.bounds(now) {
            let wall_less_lease = clock::wall_now().0.saturating_sub(now.0 as i64);
            metrics.clock(low.saturating_sub(wall_less_lease), high.saturating_sub(wall_less_lease));
        }
        self.publish_offset(now);
        self.update_history_condition(now);
        self.enter(mode);
        self.announce(feed).await;
    }

    fn is_feed_silent(&self, now: LeaseTime) -> bool {
        now.since(self.last_live_at) >= FEED_SILENT_AFTER
    }

    /// Without a connection the feed is silent, too; the connection's own condition reports that.
    fn update_feed_condition(&self, connected: bool, now: LeaseTime) {
        let feed = &self.context.feed;
        if !self.is_feed_silent(now) {
            feed.met();
        } else if !connected {
            feed.not_applicable();
        } else if now.since(self.connected_at) >= FEED_SILENT_AFTER {
            feed.unmet(
                "no publisher ticks: none is connected, or none can read its store, or the permissions lack \
                 evictd.v1.live; changes arrive by repair only",
            );
        }
    }

    /// Another home store on the bus has no effect here, but an operator must stop it.
    fn update_history_condition(&mut self, now: LeaseTime) {
        match self.rival {
            Some((provenance, at)) if now.since(at) < RIVAL_GONE_AFTER => {
                let Provenance { store, incarnation } = provenance;
                self.context.history.unmet(format!("{RIVAL}: store {store}, incarnation {incarnation}"));
            }
            _ => {
                self.rival = None;
                self.context.history.met();
            }
        }
    }

    fn publish_offset(&self, now: LeaseTime) {
        if let Some((_, high)) = self.offset.bounds(now) {
            self.context.serving.publish_home_offset_high(high);
        }
    }

    fn enter(&mut self, mode: Mode) {
        if mode == self.mode {
            return;
        }
        self.mode = mode;
        match mode {
            Mode::Live => {
                tracing::info!("lease live");
                self.context.lease.met();
            }
            Mode::Expired => {
                tracing::warn!("lease expired: serving only entries read within the bound");
                self.context
                    .lease
                    .unmet("a proof from a publisher that nothing was missed; the last one is too old");
            }
            // Only the first mode of a process.
            Mode::Starting => {}
        }
    }

    fn wake_at(&self) -> Instant {
        let wake_at = self.context.serving.follower.lock().wake_at();
        let wake_at = Instant::now() + wake_at.since(clock::lease_now());
        if self.announcement_due { wake_at.min(self.announce_from) } else { wake_at }
    }

    async fn poll_and_perform(&mut self, feed: &Feed) {
        self.context.serving.follower.lock().poll(clock::lease_now(), &mut self.effects);
        let mut effects = std::mem::take(&mut self.effects);
        for effect in effects.drain(..) {
            self.perform(effect, feed).await;
        }
        self.effects = effects;
        if self.announcement_due && Instant::now() >= self.announce_from {
            self.announce(feed).await;
        }
    }

    /// The core changes the serving state and the cache (R9). This adds messages, metrics and logs.
    async fn perform(&mut self, effect: Effect, feed: &Feed) {
        let FollowContext { serving, cache, metrics, identity, .. } = &self.context;
        let applied_before = serving.applied();
        let evicted = serving.perform(&effect, &**cache);
        match effect {
            Effect::Applied { invalidation, via } => {
                match invalidation.scope.evicted_key() {
                    Some(hash) => self.check_evicted(hash, invalidation.position),
                    None => cache.wide_floor_raised(),
                }
                self.record_applied(&invalidation, via, evicted.as_deref());
            }
            Effect::Flush(reason) => {
                if let Some(unlogged) = log_limit!(10, reason.label()) {
                    tracing::info!(reason = reason.label(), unlogged = unlogged.field(), "cache flushed");
                }
                metrics.flushed(reason);
            }
            Effect::FloorsMerged(merged) => {
                if let Some(unlogged) = log_limit!(1, "") {
                    let unlogged = unlogged.field();
                    tracing::warn!(
                        ?merged,
                        unlogged,
                        "floors merged to bound memory; more records than necessary reload"
                    );
                }
                metrics.floors_merged(merged.floors());
                cache.wide_floor_raised();
            }
            Effect::Progress { applied, head } => {
                check_progress(&metrics.invariants, applied_before, applied);
                metrics.progress(applied.epoch(), applied.position(), head.position());
            }
            Effect::Proven(at) => {
                cache.exposure.proven(at);
                self.context.policies.proven(at);
                let now = clock::lease_now();
                if at > now {
                    metrics
                        .invariants
                        .violated(Rule::R7, format_args!("a proof from the future: {at:?} at {now:?}"));
                }
                let mode = serving.mode(&serving.follower.lock(), now);
                self.enter(mode);
            }
            Effect::Rival(provenance) => {
                metrics.rival_message();
                if self.rival.replace((provenance, clock::lease_now())).is_none()
                    && log_limit!(1, "").is_some()
                {
                    tracing::warn!(store = %provenance.store, incarnation = %provenance.incarnation, "{RIVAL}");
                }
            }
            // After all other effects (R9).
            Effect::Announce => self.announcement_due = true,
            Effect::SendProbe { nonce, seen, all } => {
                let probe = ProbeRequest {
                    nonce,
                    instance: identity.instance,
                    policy: self.context.policies.widest(),
                    bound: self.context.bound.bound(),
                    seen,
                };
                feed.send_probe(probe.encode(), all).await;
            }
            Effect::SendReplay { nonce, epoch, from, to, cause, all } => {
                if let Some(unlogged) = log_limit!(10, cause.label()) {
                    let (cause, unlogged) = (cause.label(), unlogged.field());
                    tracing::info!(from, to, cause, unlogged, "repairing a gap");
                }
                metrics.repair(cause);
                feed.send_replay(ReplayRequest { nonce, epoch, from, to }.encode(), all).await;
            }
        }
    }

    /// After an eviction, no entry older than its change may be shown (R9).
    fn check_evicted(&self, hash: &KeyHash, position: LogPosition) {
        let FollowContext { cache, metrics, .. } = &self.context;
        let left =
            cache.get(hash).filter(|entry| entry.validity.is_shown() && entry.validity.as_of() < position);
        if let Some(entry) = left {
            let as_of = entry.validity.as_of();
            metrics
                .invariants
                .violated(Rule::G2, format_args!("{as_of} is shown after the eviction at {position}"));
        }
    }

    /// Measures and reports an applied change. `evicted` is the cached entry of its key, if it concerns a single one.
    fn record_applied(&mut self, invalidation: &Invalidation, via: Via, evicted: Option<&CachedRecord>) {
        let now = clock::lease_now();
        let Invalidation { position, committed_at, cause, ref scope } = *invalidation;
        let commit = self.offset.commit_of(position, committed_at, now);
        let apply_report = commit.map(|commit| {
            let lag = commit.age(now);
            let mut exposure = self.exposure(invalidation, commit, evicted);
            // Answers are dated a tick late. None is later than the application.
            exposure.last_after = exposure.last_after.min(lag.high);
            ApplyReport { position, lag, exposure }
        });
        let lag = apply_report.map(|apply_report| apply_report.lag.middle());
        self.context.metrics.applied(scope, via, lag);
        self.context.recent.push(invalidation, via, apply_report.as_ref());
        if let Some(apply_report) = apply_report {
            self.apply_reports.push(apply_report);
        }
        tracing::debug!(%position, scope = scope.label(), cause = cause.label(), ?lag, "applied");
    }

    fn exposure(
        &self,
        invalidation: &Invalidation,
        commit: CommitWindow,
        evicted: Option<&CachedRecord>,
    ) -> Exposure {
        let FollowContext { cache, metrics, bound, policies, .. } = &self.context;
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

    /// Returns the announcement of the applied position and of recent measurements. `None` before the base position.
    fn announcement(&mut self, leaving: bool) -> Option<Applied> {
        let applied = self.context.serving.applied();
        if applied == LogPosition::ZERO {
            return None;
        }
        let provenance = self.context.serving.follower.lock().provenance()?;
        let (instance, apply_reports) =
            (self.context.identity.instance, self.apply_reports.take_for(applied));
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
