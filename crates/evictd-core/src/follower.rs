//! The agent's side of the protocol (R5, R7).
//!
//! A [`Follower`] applies every invalidation, advances `applied` over contiguous positions, has
//! holes repaired by replays, and probes for proofs that nothing was missed. It takes each input
//! with a reading of the lease clock, and appends [`Effect`]s. The agent performs them in the order
//! given, which is that of R9: floors (raised by the follower itself), evictions, `applied`,
//! deadline, announcement.

mod effects;
#[cfg(any(test, feature = "fork"))]
mod fork;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

pub use self::effects::{Accepted, Effect, FlushReason, LoadSource, RepairCause, ReplayOutcome, Via};
use crate::floors::{Anchors, FloorLimits, Floors};
use crate::followed_history::{AnswerSource, FeedSource, FollowedHistory};
use crate::history::{LogToken, Provenance, StoreId, Voucher};
use crate::ids::KeyHash;
use crate::invalidation::Invalidation;
use crate::lease::{Bound, Mode};
use crate::limits::{
    LOG_TOKENS_KEPT_MAX, PENDING_MAX, PROBES_OUTSTANDING_MAX, REPAIR_SPAN_MAX, REPAIRS_OUTSTANDING_MAX,
    REPLAY_BATCH_MAX,
};
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::record::Record;
use crate::time::LeaseTime;

/// All have a documented default in the agent's configuration.
#[derive(Clone, Copy, Debug)]
pub struct FollowerConfig {
    pub bound: Bound,
    /// How often the lease is renewed.
    pub probe_interval: Duration,
    /// How long an answer to a probe or a replay may take before the next try.
    pub request_timeout: Duration,
    /// How long a hole may stay open before it is repaired.
    pub gap_patience: Duration,
    pub floors: FloorLimits,
    /// The only home store that is followed, if one is configured (R15).
    pub home_store: Option<StoreId>,
}

#[derive(Clone, Copy, Debug)]
struct OpenProbe {
    nonce: u64,
    sent_at: LeaseTime,
    seen: Option<Voucher>,
}

#[derive(Clone, Copy, Debug)]
struct OpenReplay {
    nonce: u64,
    sent_at: LeaseTime,
    epoch: u32,
    from: u64,
    to: u64,
    all: bool,
}

#[derive(Clone, Copy, Debug)]
struct Hole {
    since: LeaseTime,
    cause: RepairCause,
}

/// The protocol state of one agent.
#[derive(Debug)]
pub struct Follower {
    config: FollowerConfig,
    followed_history: FollowedHistory,
    /// The tokens that were received of the followed history.
    tokens: BTreeMap<LogPosition, LogToken>,
    floors: Floors,
    /// `None` until the answer to the first probe gives a base position.
    applied: Option<LogPosition>,
    head: LogPosition,
    /// Applied positions above `applied`, and whether each is a deletion, which is announced at
    /// once.
    pending: BTreeMap<LogPosition, bool>,
    hole: Option<Hole>,
    /// Replays without an answer, oldest first; empty without a hole.
    repairs: VecDeque<OpenReplay>,
    probes: VecDeque<OpenProbe>,
    probe_due: LeaseTime,
    unanswered: u32,
    /// Proofs whose head `applied` hasn't reached yet: (probe sent at, head).
    unproven: VecDeque<(LeaseTime, LogPosition)>,
    proven_at: Option<LeaseTime>,
    next_nonce: u64,
}

impl Follower {
    /// `nonce` is the number of the first request. It should be random, so that answers to an
    /// earlier process match no request of this one.
    pub fn new(config: FollowerConfig, nonce: u64) -> Self {
        Self {
            config,
            followed_history: FollowedHistory::new(config.bound, config.home_store),
            tokens: BTreeMap::new(),
            floors: Floors::new(config.floors),
            applied: None,
            head: LogPosition::ZERO,
            pending: BTreeMap::new(),
            hole: None,
            repairs: VecDeque::new(),
            probes: VecDeque::new(),
            probe_due: LeaseTime(0),
            unanswered: 0,
            unproven: VecDeque::new(),
            proven_at: None,
            next_nonce: nonce.max(1),
        }
    }

    /// Contiguously applied; `None` before the base position is known.
    pub fn applied(&self) -> Option<LogPosition> {
        self.applied
    }

    /// The highest position received, applied or not.
    pub fn head(&self) -> LogPosition {
        self.head
    }

    /// The followed history; `None` before the base position is known.
    pub fn provenance(&self) -> Option<Provenance> {
        self.followed_history.provenance()
    }

    /// Whether a record as of `as_of` belongs to the followed history (R15).
    pub fn accepts(&self, source: LoadSource, as_of: LogPosition) -> bool {
        match source {
            LoadSource::Authority(provenance) => self.followed_history.follows(provenance),
            LoadSource::Database(token) => {
                self.shares_log(as_of, token) || !Protection::DatabasesShareTheLog.holds()
            }
        }
    }

    /// Whether a log with `token` at `head` is a prefix of the followed and applied one. `false`
    /// also if the follower can't decide it.
    fn shares_log(&self, head: LogPosition, token: LogToken) -> bool {
        self.applied.is_some_and(|applied| head <= applied) && self.tokens.get(&head) == Some(&token)
    }

    /// The time as of which the agent was proven complete.
    pub fn proven_at(&self) -> Option<LeaseTime> {
        self.proven_at
    }

    pub fn floors(&self) -> &Floors {
        &self.floors
    }

    /// When the probe with this number was sent, while an answer to it counts.
    pub fn probe_sent_at(&self, nonce: u64) -> Option<LeaseTime> {
        self.probes.iter().find(|probe| probe.nonce == nonce).map(|probe| probe.sent_at)
    }

    pub fn mode(&self, now: LeaseTime) -> Mode {
        match self.proven_at {
            None => Mode::Starting,
            Some(at) if self.config.bound.remaining(now, at).is_zero() => Mode::Expired,
            Some(_) => Mode::Live,
        }
    }

    /// Returns the shared floors that an entry for `record` depends on.
    pub fn anchors(&mut self, record: &Record, effects: &mut Vec<Effect>) -> Anchors {
        let (anchors, merged) = self.floors.anchors(record);
        effects.extend(merged.map(Effect::FloorsMerged));
        anchors
    }

    /// Returns the highest floor that an entry for `hash` must meet.
    pub fn floor(&self, hash: &KeyHash, anchors: &Anchors) -> LogPosition {
        self.floors.floor(hash, anchors)
    }

    /// Whether a load as of `as_of` may be cached. Not before the base position is known, because
    /// until then the floors are incomplete.
    pub fn admits(&self, hash: &KeyHash, anchors: &Anchors, source: LoadSource, as_of: LogPosition) -> bool {
        self.applied.is_some()
            && self.accepts(source, as_of)
            && (as_of >= self.floor(hash, anchors) || !Protection::LoadsMeetFloors.holds())
    }

    /// The bus is connected again. Messages may have been lost meanwhile, so a probe is due now.
    pub fn connected(&mut self, now: LeaseTime) {
        self.probe_due = now;
        self.unanswered = 0;
        self.repairs.clear();
    }

    /// Takes in invalidations of the live feed, in any order, old ones included. `voucher` is that
    /// of the last one.
    pub fn on_live(
        &mut self,
        voucher: &Voucher,
        invalidations: Vec<Invalidation>,
        now: LeaseTime,
        effects: &mut Vec<Effect>,
    ) {
        if !self.receives(voucher, now, effects) {
            return;
        }
        self.track(effects, |this, effects| {
            for invalidation in invalidations {
                this.apply(invalidation, Via::Live, now, effects);
            }
        });
    }

    /// Takes in a tick of the live feed.
    pub fn on_tick(&mut self, head: &Voucher, now: LeaseTime, effects: &mut Vec<Effect>) {
        if !self.receives(head, now, effects) {
            return;
        }
        let head = head.milestone.at;
        self.track(effects, |this, _| {
            if this.is_of_epoch(head) {
                this.raise_head(head, RepairCause::Tick, now);
            }
        });
    }

    /// A publisher announced that its incarnation ended. Another one of the same history may follow
    /// at once.
    pub fn on_end(&mut self, provenance: Provenance, now: LeaseTime) {
        if self.followed_history.on_end(provenance) {
            self.probe_soon(now);
        }
    }

    /// Takes in the answer to a probe.
    ///
    /// If it is a proof, every change that was committed before the probe was sent is at or below
    /// `head`. Otherwise changes can bypass the log at present (R3), and the answer only names the
    /// history and its head. Then the agent serves without a lease: each entry for the bound after
    /// its own read.
    pub fn on_probe_answer(
        &mut self,
        nonce: u64,
        head: &Voucher,
        is_proof: bool,
        now: LeaseTime,
        effects: &mut Vec<Effect>,
    ) -> Accepted {
        let open = self.probes.iter().position(|probe| probe.nonce == nonce);
        let Some(index) = open.or_else(|| Self::unmatched(self.probes.len())) else {
            return Accepted::No;
        };
        let (voucher, head) = (head, head.milestone.at);
        let source = self.followed_history.on_answer(voucher, now);
        if source == AnswerSource::Rival {
            effects.push(Effect::Rival(voucher.milestone.provenance));
            return Accepted::No;
        }
        if !self.fits(source, self.probes[index].seen, head) {
            return Accepted::No;
        }
        let dated = Protection::ProofsDateFromTheQuestion.holds();
        let probed_at = self.probes[index].sent_at;
        let sent_at = if dated { probed_at } else { now };
        // Older probes need no answer any more.
        self.probes.drain(..=index);
        self.unanswered = 0;
        self.probe_due = sent_at.after(self.config.probe_interval);
        self.track(effects, |this, effects| {
            match source {
                AnswerSource::Own => this.retract(voucher, probed_at),
                _ => this.follow(voucher, now, effects),
            }
            this.note_token(voucher);
            this.raise_head(head, RepairCause::Probe, now);
            // A long hole may wait for this answer, see `poll_repair`.
            this.hole = this.hole.map(|hole| Hole { since: hole.since.min(now), ..hole });
            if !is_proof {
                return;
            }
            if this.unproven.len() == PROBES_OUTSTANDING_MAX {
                this.unproven.pop_back();
            }
            this.unproven.push_back((sent_at, head));
        });
        Accepted::Yes
    }

    /// Takes in the answer to a replay, of a store at `provenance`.
    pub fn on_replay_answer(
        &mut self,
        nonce: u64,
        provenance: Provenance,
        answer: ReplayOutcome,
        now: LeaseTime,
        effects: &mut Vec<Effect>,
    ) -> Accepted {
        let open = self.repairs.iter().position(|repair| repair.nonce == nonce);
        let Some(index) = open.or_else(|| Self::unmatched(self.repairs.len())) else {
            return Accepted::No;
        };
        if !self.followed_history.follows(provenance) {
            effects.push(Effect::Rival(provenance));
            return Accepted::No;
        }
        if !answer_covers(&self.repairs[index], &answer) && Protection::ReplaysAreComplete.holds() {
            return Accepted::No;
        }
        // A late answer counts, or a path slower than the timeout would never be repaired. If
        // another one has advanced `applied` since, no harm is done: rows are idempotent.
        self.repairs.clear();
        self.track(effects, |this, effects| match answer {
            // The rows begin at the first missing one, so `applied` advances over them.
            ReplayOutcome::Rows(rows) => {
                for row in rows {
                    this.apply(row, Via::Replay, now, effects);
                }
            }
            // Nothing is missing.
            ReplayOutcome::Refused { head } if this.is_covered(head.milestone.at) => {
                this.lower_head(head.milestone.at);
            }
            ReplayOutcome::Refused { head } => {
                this.followed_history.on_feed(&head, now);
                this.note_token(&head);
                let base = head.milestone.at.max(this.applied.unwrap_or(LogPosition::ZERO));
                this.start_over(base, FlushReason::Refused, effects);
            }
        });
        Accepted::Yes
    }

    /// Sends the requests that are due. Call it after each input and at [`Follower::wake_at`].
    pub fn poll(&mut self, now: LeaseTime, effects: &mut Vec<Effect>) {
        self.poll_repair(now, effects);
        self.poll_probe(now, effects);
    }

    pub fn wake_at(&self) -> LeaseTime {
        self.repair_due().map_or(self.probe_due, |due| due.min(self.probe_due))
    }

    /// When the next replay for the hole is due.
    fn repair_due(&self) -> Option<LeaseTime> {
        let hole = self.hole?;
        Some(match self.repairs.back() {
            None => hole.since.after(self.config.gap_patience),
            // The pause doubles with each replay, so that retries don't overload a publisher that
            // is behind.
            Some(last) => last.sent_at.after(self.config.request_timeout * (1 << (self.repairs.len() - 1))),
        })
    }

    fn poll_probe(&mut self, now: LeaseTime, effects: &mut Vec<Effect>) {
        if now < self.probe_due {
            return;
        }
        let nonce = self.draw_nonce();
        if self.probes.len() == PROBES_OUTSTANDING_MAX {
            self.probes.pop_front();
        }
        // The live feed may be forged, and no publisher vouches for what it claimed. So every other
        // pair of tries presents only what an answer confirmed. That is enough for a proof, but not
        // to change to another history.
        let seen = match self.unanswered % 4 {
            0 | 1 => self.followed_history.voucher(),
            _ => self.followed_history.confirmed(),
        };
        self.probes.push_back(OpenProbe { nonce, sent_at: now, seen });
        // Without an answer, the next try follows after the timeout. Every other one goes to all
        // publishers.
        let all = self.unanswered % 2 == 1 && Protection::SecondTriesGoToAll.holds();
        self.unanswered += 1;
        self.probe_due = now.after(self.config.request_timeout);
        effects.push(Effect::SendProbe { nonce, seen, all });
    }

    fn poll_repair(&mut self, now: LeaseTime, effects: &mut Vec<Effect>) {
        let (Some(hole), Some(applied)) = (self.hole, self.applied) else { return };
        if self.repair_due().is_none_or(|due| now < due) {
            return;
        }
        if self.head.position().saturating_sub(applied.position()) > REPAIR_SPAN_MAX {
            let confirmed = self.followed_history.confirmed().map_or(applied, |voucher| voucher.milestone.at);
            if confirmed.position().saturating_sub(applied.position()) <= REPAIR_SPAN_MAX {
                // Only the live feed claims that much so far. It may be forged, which must not
                // flush the cache.
                self.hole = Some(Hole { since: now.after(self.config.request_timeout), ..hole });
                return self.probe_soon(now);
            }
            let head = confirmed;
            self.track(effects, |this, effects| this.start_over(head, FlushReason::LongGap, effects));
            return;
        }
        let nonce = self.draw_nonce();
        let from = applied.position() + 1;
        let to = self.head.position().min(applied.position() + REPLAY_BATCH_MAX as u64);
        let epoch = applied.epoch();
        // Every other one, however many have been sent.
        let all = self.repairs.back().is_some_and(|last| !last.all) && Protection::SecondTriesGoToAll.holds();
        if self.repairs.len() == REPAIRS_OUTSTANDING_MAX {
            self.repairs.pop_front();
        }
        self.repairs.push_back(OpenReplay { nonce, sent_at: now, epoch, from, to, all });
        effects.push(Effect::SendReplay { nonce, epoch, from, to, cause: hole.cause, all });
    }

    /// Applies an invalidation at any position (R5).
    fn apply(&mut self, invalidation: Invalidation, via: Via, now: LeaseTime, effects: &mut Vec<Effect>) {
        let position = invalidation.position;
        if !self.is_of_epoch(position) {
            return;
        }
        let first = self.is_new(position);
        if !first && !Protection::OldPositionsAreApplied.holds() {
            return;
        }
        let merged = self.floors.raise(&invalidation.scope, position);
        if first {
            let is_deletion = invalidation.cause.is_deletion();
            effects.push(Effect::Applied { invalidation, via });
            // Above the limit, a live position is dropped. Its repair brings it again.
            if self.pending.len() < PENDING_MAX || via == Via::Replay {
                self.pending.insert(position, is_deletion);
            }
        }
        effects.extend(merged.map(Effect::FloorsMerged));
        self.raise_head(position, RepairCause::Gap, now);
    }

    fn is_new(&self, position: LogPosition) -> bool {
        self.applied.is_none_or(|applied| position > applied) && !self.pending.contains_key(&position)
    }

    /// Whether a message of the live feed counts.
    fn receives(&mut self, voucher: &Voucher, now: LeaseTime, effects: &mut Vec<Effect>) -> bool {
        match self.followed_history.on_feed(voucher, now) {
            FeedSource::Own => self.note_token(voucher),
            FeedSource::Candidate => {
                self.probe_soon(now);
                return false;
            }
            FeedSource::Rival | FeedSource::Excluded => {
                effects.push(Effect::Rival(voucher.milestone.provenance));
                return false;
            }
        }
        true
    }

    /// Whether the answer to a probe agrees with what was received of its history.
    ///
    /// An epoch belongs to one incarnation, so that of the own history never changes. The answer of
    /// a successor counts only if its probe presented all that was received of the own history: an
    /// older copy has the past that an earlier probe proved, and its positions may have caught up
    /// since.
    fn fits(&self, source: AnswerSource, seen: Option<Voucher>, head: LogPosition) -> bool {
        match (source, self.applied) {
            (AnswerSource::Own, Some(applied)) => {
                head.epoch() == applied.epoch() || !Protection::OlderEpochsMoveNothing.holds()
            }
            (AnswerSource::Successor, Some(applied)) => {
                (head >= applied.max(self.head) || !Protection::OlderEpochsMoveNothing.holds())
                    && (seen == self.followed_history.voucher()
                        || !Protection::SuccessorsKnowAllThatWasSeen.holds())
            }
            _ => true,
        }
    }

    /// Follows the history of `head` from now on. `head` is the new base if it is the first one, or
    /// of a newer epoch.
    fn follow(&mut self, head: &Voucher, now: LeaseTime, effects: &mut Vec<Effect>) {
        self.followed_history.follow(*head, now);
        // Both were requested of the history that is over.
        self.repairs.clear();
        self.unproven.clear();
        let head = head.milestone.at;
        match self.applied {
            None => self.start_over(head, FlushReason::Start, effects),
            Some(applied) if head.epoch() > applied.epoch() && Protection::NewerEpochsFlush.holds() => {
                self.tokens.clear();
                self.start_over(head, FlushReason::NewEpoch, effects);
            }
            Some(_) => {}
        }
    }

    /// Corrects what the live feed claimed, if the answer to a probe shows that it was forged.
    fn retract(&mut self, answer: &Voucher, probed_at: LeaseTime) {
        if self.followed_history.retract(answer, probed_at) {
            self.lower_head(answer.milestone.at);
            self.tokens.retain(|at, _| *at <= answer.milestone.at);
        }
    }

    /// Nothing exists above `head`.
    fn lower_head(&mut self, head: LogPosition) {
        let applied = self.applied.unwrap_or(head);
        self.head = head.max(applied);
        self.pending.retain(|position, _| *position <= head);
        if self.head == applied {
            self.hole = None;
            self.repairs.clear();
        }
    }

    fn note_token(&mut self, voucher: &Voucher) {
        self.tokens.insert(voucher.milestone.at, voucher.milestone.token);
        if self.tokens.len() > LOG_TOKENS_KEPT_MAX {
            self.tokens.pop_first();
        }
    }

    /// Makes a probe due now, unless one was just sent.
    fn probe_soon(&mut self, now: LeaseTime) {
        let just_sent = |probe: &OpenProbe| now.since(probe.sent_at) < self.config.request_timeout;
        if !self.probes.back().is_some_and(just_sent) {
            self.probe_due = self.probe_due.min(now);
        }
    }

    /// Whether `position` belongs to the current epoch. A newer epoch counts once the answer to a
    /// probe confirms it (R16).
    fn is_of_epoch(&self, position: LogPosition) -> bool {
        self.applied.is_none_or(|applied| position.epoch() == applied.epoch())
            || !Protection::OlderEpochsMoveNothing.holds()
    }

    fn is_covered(&self, head: LogPosition) -> bool {
        self.applied.is_some_and(|applied| head.epoch() == applied.epoch() && head <= applied)
    }

    fn raise_head(&mut self, head: LogPosition, cause: RepairCause, now: LeaseTime) {
        self.head = self.head.max(head);
        if self.hole.is_none() && self.applied.is_some_and(|applied| self.head > applied) {
            self.hole = Some(Hole { since: now, cause });
        }
    }

    /// Flushes, and goes on from `base`: older entries are below the horizon.
    fn start_over(&mut self, base: LogPosition, reason: FlushReason, effects: &mut Vec<Effect>) {
        self.floors.flush(base);
        self.applied = Some(base);
        // Positions of an older epoch are no progress in this one.
        self.head = if self.head.epoch() == base.epoch() { self.head.max(base) } else { base };
        self.pending.retain(|position, _| *position > base && position.epoch() == base.epoch());
        self.unproven.retain(|(_, head)| head.epoch() == base.epoch());
        self.repairs.clear();
        self.hole = None;
        effects.push(Effect::Flush(reason));
    }

    /// Runs `step`, advances over what became contiguous, and reports what moved, in the order of
    /// R9.
    fn track(&mut self, effects: &mut Vec<Effect>, step: impl FnOnce(&mut Self, &mut Vec<Effect>)) {
        let (applied_before, head_before) = (self.applied, self.head);
        let start = effects.len();
        step(self, effects);
        let has_deletion = self.advance();
        let Some(applied) = self.applied else { return };
        if Some(applied) != applied_before || self.head != head_before {
            effects.push(Effect::Progress { applied, head: self.head });
        }
        self.prove(applied, effects);
        // A flush may have covered deletions that were never received.
        let flushed = effects[start..].iter().any(|effect| matches!(effect, Effect::Flush(_)));
        if has_deletion || flushed {
            effects.push(Effect::Announce);
        }
        if !Protection::EvictionPrecedesApplied.holds() {
            effects[start..]
                .sort_by_key(|effect| matches!(effect, Effect::Applied { .. } | Effect::Flush(_)));
        }
    }

    /// Advances over contiguous positions. Returns whether one of them is a deletion.
    fn advance(&mut self) -> bool {
        let Some(mut applied) = self.applied else { return false };
        let mut has_deletion = false;
        while let Some((next, deletion)) = applied.next().and_then(|next| self.pending.remove_entry(&next)) {
            applied = next;
            has_deletion |= deletion;
        }
        if !Protection::AppliedIsContiguous.holds() {
            applied = self.pending.pop_last().map_or(applied, |(last, _)| last.max(applied));
            self.pending.clear();
        }
        if Some(applied) != self.applied {
            self.applied = Some(applied);
            // A hole further up keeps its age, so that the next batch of its repair is due at once.
            self.hole = self.hole.filter(|_| self.head > applied);
            if self.hole.is_none() {
                self.repairs.clear();
            }
        }
        has_deletion
    }

    fn prove(&mut self, applied: LogPosition, effects: &mut Vec<Effect>) {
        let mut proven = None;
        while let Some((sent_at, head)) = self.unproven.front().copied() {
            if applied < head && Protection::ProofsWaitForTheirHead.holds() {
                break;
            }
            proven = Some(sent_at);
            self.unproven.pop_front();
        }
        if let Some(sent_at) = proven.filter(|at| self.proven_at.is_none_or(|before| *at > before)) {
            self.proven_at = Some(sent_at);
            effects.push(Effect::Proven(sent_at));
        }
    }

    /// The newest of `open` requests, for an answer that matches none. Always `None`, except in a
    /// negative control.
    fn unmatched(open: usize) -> Option<usize> {
        if Protection::AnswersMatchQuestions.holds() { None } else { open.checked_sub(1) }
    }

    fn draw_nonce(&mut self) -> u64 {
        let nonce = self.next_nonce;
        self.next_nonce = self.next_nonce.wrapping_add(1).max(1);
        nonce
    }
}

/// Whether an answer counts: its rows must be the first requested ones, without a gap. A missing
/// row never means no change.
fn answer_covers(repair: &OpenReplay, answer: &ReplayOutcome) -> bool {
    match answer {
        ReplayOutcome::Rows(rows) => {
            let requested = LogPosition::new(repair.epoch, repair.from).into_iter();
            !rows.is_empty()
                && rows.len() as u64 <= repair.to - repair.from + 1
                && requested
                    .flat_map(|first| std::iter::successors(Some(first), |at| at.next()))
                    .zip(rows)
                    .all(|(expected, row)| row.position == expected)
        }
        ReplayOutcome::Refused { .. } => true,
    }
}

#[cfg(test)]
mod tests;
