//! The agent's side of the protocol: apply everything, advance contiguously, repair holes, probe, and
//! say since when nothing can have been missed (R5, R7).
//!
//! [`Follower`] takes inputs with the lease clock's reading and appends [`Effect`]s, which its shell
//! performs in the order given; that order is R9's: floors (already raised inside), eviction, `applied`,
//! deadline, announcement.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::floors::{Anchors, FloorLimits, Floors, FloorsMerged};
use crate::followed_history::{AnswerSource, FeedSource, FollowedHistory};
use crate::history::{LogToken, Provenance, StoreId, Voucher};
use crate::ids::KeyHash;
use crate::invalidation::{Invalidation, Scope};
use crate::lease::{Bound, Mode};
use crate::limits::{
    LOG_TOKENS_KEPT_MAX, PENDING_MAX, PROBES_OUTSTANDING_MAX, REPAIR_SPAN_MAX, REPAIRS_OUTSTANDING_MAX,
    REPLAY_BATCH_MAX,
};
use crate::position::LogPosition;
use crate::protection::Protection;
use crate::record::Record;
use crate::time::LeaseTime;

/// Tunables of a follower. All have a documented default in the agent's configuration.
#[derive(Clone, Copy, Debug)]
pub struct FollowerConfig {
    /// The promise.
    pub bound: Bound,
    /// How often the lease is renewed.
    pub probe_interval: Duration,
    /// After which silence a probe or a replay is asked again.
    pub request_timeout: Duration,
    /// How long a hole may take to close by itself.
    pub gap_patience: Duration,
    /// Limits of the floors.
    pub floors: FloorLimits,
    /// The only home store that is followed, if the configuration names one (R15).
    pub home_store: Option<StoreId>,
}

/// How an invalidation arrived.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Via {
    /// On the live feed.
    Live,
    /// In the answer to a replay.
    Replay,
}

/// Why everything was forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FlushReason {
    /// The process started: its base position is now known.
    Start,
    /// The store may have gone back (R2).
    NewEpoch,
    /// The authority couldn't cover what was missed.
    Refused,
    /// More was missed than a replay is worth.
    LongGap,
}

impl FlushReason {
    /// All reasons, for metrics.
    pub const ALL: [Self; 4] = [Self::Start, Self::NewEpoch, Self::Refused, Self::LongGap];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::NewEpoch => "new_epoch",
            Self::Refused => "refused",
            Self::LongGap => "long_gap",
        }
    }
}

/// What showed that something was missed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RepairCause {
    /// A later invalidation.
    Gap,
    /// A tick whose head lies above `applied`.
    Tick,
    /// A probe's answer whose head lies above `applied`.
    Probe,
}

impl RepairCause {
    /// All causes, for metrics.
    pub const ALL: [Self; 3] = [Self::Gap, Self::Tick, Self::Probe];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Gap => "gap",
            Self::Tick => "tick",
            Self::Probe => "probe",
        }
    }
}

/// What the shell has to do, in the order given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// A floor was raised. Evict what is cached under the scope; this is the first sight of it here.
    Applied {
        /// The invalidation.
        invalidation: Invalidation,
        /// How it arrived.
        via: Via,
    },
    /// Floors were merged to stay within the limits.
    FloorsMerged(FloorsMerged),
    /// Forget everything that is cached.
    Flush(FlushReason),
    /// `applied` or the head moved: publish them.
    Progress {
        /// Contiguously applied.
        applied: LogPosition,
        /// The highest position heard of.
        head: LogPosition,
    },
    /// The agent was complete as of then: extend the deadline.
    Proven(LeaseTime),
    /// Tell the publishers now how far this agent is: a deletion was applied, or may have been.
    Announce,
    /// Ask for a proof.
    SendProbe {
        /// To be repeated by the answer.
        nonce: u64,
        /// What was received of the history that this agent follows: a publisher whose store doesn't know it must not
        /// vouch (R15, R16). `None` in a process that follows none yet.
        seen: Option<Voucher>,
        /// Ask all publishers instead of the queue group (R14).
        all: bool,
    },
    /// Something came from a history that this agent doesn't follow, while its own is alive: it moves nothing (R15).
    Rival(Provenance),
    /// Ask for missed rows.
    SendReplay {
        /// To be repeated by the answer.
        nonce: u64,
        /// The epoch of both ends.
        epoch: u32,
        /// The first missing position.
        from: u64,
        /// The last one wanted.
        to: u64,
        /// What showed the hole.
        cause: RepairCause,
        /// Ask all publishers instead of the queue group (R14).
        all: bool,
    },
}

/// What an answer was good for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accepted {
    /// It moved something, or could have.
    Yes,
    /// It matches no question, or comes from the past: to be counted and ignored.
    No,
}

/// Who read a record.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LoadSource {
    /// A publisher, which speaks for this history.
    Authority(Provenance),
    /// The agent itself, from a database whose log ends with this token at the position that the record is as of.
    Database(LogToken),
}

/// The answer to a replay, as decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReplayOutcome {
    /// The rows from the first position asked for on, dense.
    Rows(Vec<Invalidation>),
    /// The range can't be covered: start over at `head`.
    Refused {
        /// The store's head.
        head: Voucher,
    },
}

#[derive(Clone, Copy, Debug)]
struct OpenProbe {
    nonce: u64,
    sent_at: LeaseTime,
    /// What it proved to have seen.
    seen: Option<Voucher>,
}

#[derive(Clone, Copy, Debug)]
struct OpenReplay {
    nonce: u64,
    sent_at: LeaseTime,
    epoch: u32,
    from: u64,
    to: u64,
    /// Whether it went to all publishers.
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
    /// Of what was received of the history that is followed: which token belongs to which position.
    tokens: BTreeMap<LogPosition, LogToken>,
    floors: Floors,
    /// `None` until the first probe's answer gives a base position.
    applied: Option<LogPosition>,
    head: LogPosition,
    /// Applied positions above `applied`, and whether somebody waits to hear of them.
    pending: BTreeMap<LogPosition, bool>,
    hole: Option<Hole>,
    /// Replays asked for and not answered, oldest first; empty unless there is a hole.
    repairs: VecDeque<OpenReplay>,
    probes: VecDeque<OpenProbe>,
    probe_due: LeaseTime,
    unanswered: u32,
    /// Answers whose head `applied` hasn't reached yet: (probe sent at, head).
    unproven: VecDeque<(LeaseTime, LogPosition)>,
    proven_at: Option<LeaseTime>,
    next_nonce: u64,
}

impl Follower {
    /// A follower that knows nothing. `nonce` seeds the question numbers and should be random, so that
    /// answers meant for an earlier process match nothing.
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

    /// Contiguously applied; `None` before the base is known.
    pub fn applied(&self) -> Option<LogPosition> {
        self.applied
    }

    /// The highest position heard of.
    pub fn head(&self) -> LogPosition {
        self.head
    }

    /// The history that this agent follows; `None` before the base is known.
    pub fn provenance(&self) -> Option<Provenance> {
        self.followed_history.provenance()
    }

    /// Whether a record that was read as of `as_of` belongs to the history that this agent follows (R15).
    pub fn accepts(&self, source: LoadSource, as_of: LogPosition) -> bool {
        match source {
            LoadSource::Authority(provenance) => self.followed_history.follows(provenance),
            LoadSource::Database(token) => {
                self.shares_log(as_of, token) || !Protection::DatabasesShareTheLog.holds()
            }
        }
    }

    /// Whether a log that ends at `head` with `token` is a beginning of the one that this agent follows and has
    /// applied. `false` if it isn't, and also if that can't be told.
    fn shares_log(&self, head: LogPosition, token: LogToken) -> bool {
        self.applied.is_some_and(|applied| head <= applied) && self.tokens.get(&head) == Some(&token)
    }

    /// Since when nothing can have been missed.
    pub fn proven_at(&self) -> Option<LeaseTime> {
        self.proven_at
    }

    /// The floors, for their shared cells and their size.
    pub fn floors(&self) -> &Floors {
        &self.floors
    }

    /// When the probe with this number was sent, as long as an answer to it is still accepted.
    pub fn probe_sent_at(&self, nonce: u64) -> Option<LeaseTime> {
        self.probes.iter().find(|probe| probe.nonce == nonce).map(|probe| probe.sent_at)
    }

    /// The mode at `now`.
    pub fn mode(&self, now: LeaseTime) -> Mode {
        match self.proven_at {
            None => Mode::Starting,
            Some(at) if self.config.bound.remaining(now, at).is_zero() => Mode::Expired,
            Some(_) => Mode::Live,
        }
    }

    /// The shared floors that an entry for `record` depends on.
    pub fn anchors(&mut self, record: &Record, effects: &mut Vec<Effect>) -> Anchors {
        let (anchors, widened) = self.floors.anchors(record);
        effects.extend(widened.map(Effect::FloorsMerged));
        anchors
    }

    /// The highest floor an entry for `hash` must meet.
    pub fn floor(&self, hash: &KeyHash, anchors: &Anchors) -> LogPosition {
        self.floors.floor(hash, anchors)
    }

    /// Whether a load that is as new as `as_of` may be cached: not before the base position is known,
    /// because until then the floors are not complete.
    pub fn admits(&self, hash: &KeyHash, anchors: &Anchors, source: LoadSource, as_of: LogPosition) -> bool {
        self.applied.is_some()
            && self.accepts(source, as_of)
            && (as_of >= self.floor(hash, anchors) || !Protection::LoadsMeetFloors.holds())
    }

    /// The bus is connected (again): whatever was on the way may be lost, so a proof is due now.
    pub fn connected(&mut self, now: LeaseTime) {
        self.probe_due = now;
        self.unanswered = 0;
        self.repairs.clear();
    }

    /// Invalidations of the live feed, in any order, also old ones. `voucher` is that of the last of them.
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

    /// A tick of the live feed.
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

    /// A publisher said that its incarnation ended: another one of the same history may follow at once.
    pub fn on_end(&mut self, provenance: Provenance, now: LeaseTime) {
        if self.followed_history.on_end(provenance) {
            self.probe_soon(now);
        }
    }

    /// The answer to a probe. If it is a proof, everything that was committed when the probe was sent is at or below
    /// `head`. Otherwise changes can bypass the log at present (R3), and it only names the history and its head: the agent
    /// goes on without a lease, as a cache whose entries live for the bound.
    pub fn on_probe_answer(
        &mut self,
        nonce: u64,
        head: &Voucher,
        is_proof: bool,
        now: LeaseTime,
        effects: &mut Vec<Effect>,
    ) -> Accepted {
        let asked = self.probes.iter().position(|probe| probe.nonce == nonce);
        let Some(index) = asked.or_else(|| Self::unmatched(self.probes.len())) else {
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
        let asked_at = self.probes[index].sent_at;
        let sent_at = if dated { asked_at } else { now };
        // Older questions need no answer any more, and their number stays small.
        self.probes.drain(..=index);
        self.unanswered = 0;
        self.probe_due = sent_at.after(self.config.probe_interval);
        self.track(effects, |this, effects| {
            match source {
                AnswerSource::Own => this.retract(voucher, asked_at),
                _ => this.follow(voucher, now, effects),
            }
            this.note_token(voucher);
            this.raise_head(head, RepairCause::Probe, now);
            // What waited for a confirmation waits no longer.
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

    /// The answer to a replay, from a store at `provenance`.
    pub fn on_replay_answer(
        &mut self,
        nonce: u64,
        provenance: Provenance,
        answer: ReplayOutcome,
        now: LeaseTime,
        effects: &mut Vec<Effect>,
    ) -> Accepted {
        let asked = self.repairs.iter().position(|repair| repair.nonce == nonce);
        let Some(index) = asked.or_else(|| Self::unmatched(self.repairs.len())) else {
            return Accepted::No;
        };
        if !self.followed_history.follows(provenance) {
            effects.push(Effect::Rival(provenance));
            return Accepted::No;
        }
        if !answer_covers(&self.repairs[index], &answer) && Protection::ReplaysAreComplete.holds() {
            return Accepted::No;
        }
        // A late answer counts, or a path slower than the timeout would never be repaired. Another one may
        // have advanced `applied` since it was asked for: rows are idempotent.
        self.repairs.clear();
        self.track(effects, |this, effects| match answer {
            // The rows are dense from what was the first missing one, so `applied` advances over them.
            ReplayOutcome::Rows(rows) => {
                for row in rows {
                    this.apply(row, Via::Replay, now, effects);
                }
            }
            // There is nothing to be missed.
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

    /// Asks what is due. To be called after every input and at [`Follower::wake_at`].
    pub fn poll(&mut self, now: LeaseTime, effects: &mut Vec<Effect>) {
        self.poll_repair(now, effects);
        self.poll_probe(now, effects);
    }

    /// When [`Follower::poll`] is due next.
    pub fn wake_at(&self) -> LeaseTime {
        self.repair_due().map_or(self.probe_due, |due| due.min(self.probe_due))
    }

    /// When the hole, if there is one, is to be repaired (again).
    fn repair_due(&self) -> Option<LeaseTime> {
        let hole = self.hole?;
        Some(match self.repairs.back() {
            None => hole.since.after(self.config.gap_patience),
            // Twice as long after each question: an authority that is behind must not be asked faster.
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
        // What the live feed said may be a lie, which no publisher vouches for. So now and then only what is confirmed is
        // presented; that is enough for a proof, but not to change over.
        let seen = match self.unanswered % 4 {
            0 | 1 => self.followed_history.voucher(),
            _ => self.followed_history.confirmed(),
        };
        self.probes.push_back(OpenProbe { nonce, sent_at: now, seen });
        // Until an answer comes, the next try is a timeout away, and every other one goes to all.
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
                // So far only the live feed says so: everything cached is too much for a lie.
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
        // Every other one, however many are still remembered.
        let all = self.repairs.back().is_some_and(|last| !last.all) && Protection::SecondTriesGoToAll.holds();
        if self.repairs.len() == REPAIRS_OUTSTANDING_MAX {
            self.repairs.pop_front();
        }
        self.repairs.push_back(OpenReplay { nonce, sent_at: now, epoch, from, to, all });
        effects.push(Effect::SendReplay { nonce, epoch, from, to, cause: hole.cause, all });
    }

    /// Applies one invalidation, whatever its position (R5).
    fn apply(&mut self, invalidation: Invalidation, via: Via, now: LeaseTime, effects: &mut Vec<Effect>) {
        let position = invalidation.position;
        if !self.is_of_epoch(position) {
            return;
        }
        let first = self.is_new(position);
        if !first && !Protection::OldPositionsAreApplied.holds() {
            return;
        }
        let widened = self.floors.raise(&invalidation.scope, position);
        if first {
            let awaited = invalidation.cause.is_deletion();
            effects.push(Effect::Applied { invalidation, via });
            // Over the limit a live position is forgotten, and its repair brings it again.
            if self.pending.len() < PENDING_MAX || via == Via::Replay {
                self.pending.insert(position, awaited);
            }
        }
        effects.extend(widened.map(Effect::FloorsMerged));
        self.raise_head(position, RepairCause::Gap, now);
    }

    fn is_new(&self, position: LogPosition) -> bool {
        self.applied.is_none_or(|applied| position > applied) && !self.pending.contains_key(&position)
    }

    /// Whether something of the live feed counts, and why not.
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

    /// Whether the answer to a probe agrees with what is known of its history. An epoch belongs to one incarnation,
    /// so the own one's never changes. What replaces it was asked about everything that was received of the own one: an
    /// older copy knows the past that an earlier probe proved, and its positions may have caught up since.
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

    /// Follows the history of `head` from now on; with it as base if it is the first or of a later epoch.
    fn follow(&mut self, head: &Voucher, now: LeaseTime, effects: &mut Vec<Effect>) {
        self.followed_history.follow(*head, now);
        // Both were asked of the history that is over.
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

    /// Takes back what the live feed claimed, if the authority's answer shows that it was a lie.
    fn retract(&mut self, answer: &Voucher, asked_at: LeaseTime) {
        if self.followed_history.retract(answer, asked_at) {
            self.lower_head(answer.milestone.at);
            self.tokens.retain(|at, _| *at <= answer.milestone.at);
        }
    }

    /// Nothing is missing above `head`.
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

    /// Asks for a proof now, unless that was just done.
    fn probe_soon(&mut self, now: LeaseTime) {
        let asked = |probe: &OpenProbe| now.since(probe.sent_at) < self.config.request_timeout;
        if !self.probes.back().is_some_and(asked) {
            self.probe_due = self.probe_due.min(now);
        }
    }

    /// Whether `position` belongs to the epoch that this agent is in. A newer one counts once a probe's answer
    /// confirms it (R16).
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

    /// Forgets everything and goes on from `base`: what is older than it is below the horizon.
    fn start_over(&mut self, base: LogPosition, reason: FlushReason, effects: &mut Vec<Effect>) {
        self.floors.flush(base);
        self.applied = Some(base);
        // What is left of an older epoch must not be mistaken for progress in this one.
        self.head = if self.head.epoch() == base.epoch() { self.head.max(base) } else { base };
        self.pending.retain(|position, _| *position > base && position.epoch() == base.epoch());
        self.unproven.retain(|(_, head)| head.epoch() == base.epoch());
        self.repairs.clear();
        self.hole = None;
        effects.push(Effect::Flush(reason));
    }

    /// Runs `step`, then advances over what became contiguous and tells what moved, in R9's order.
    fn track(&mut self, effects: &mut Vec<Effect>, step: impl FnOnce(&mut Self, &mut Vec<Effect>)) {
        let (applied_before, head_before) = (self.applied, self.head);
        let start = effects.len();
        step(self, effects);
        let awaited = self.advance();
        let Some(applied) = self.applied else { return };
        if Some(applied) != applied_before || self.head != head_before {
            effects.push(Effect::Progress { applied, head: self.head });
        }
        self.prove(applied, effects);
        // A flush may have covered deletions that were never seen.
        let flushed = effects[start..].iter().any(|effect| matches!(effect, Effect::Flush(_)));
        if awaited || flushed {
            effects.push(Effect::Announce);
        }
        if !Protection::EvictionPrecedesApplied.holds() {
            effects[start..]
                .sort_by_key(|effect| matches!(effect, Effect::Applied { .. } | Effect::Flush(_)));
        }
    }

    /// Advances over what is contiguous; tells whether a deletion was among it.
    fn advance(&mut self) -> bool {
        let Some(mut applied) = self.applied else { return false };
        let mut awaited = false;
        while let Some((next, deletion)) = applied.next().and_then(|next| self.pending.remove_entry(&next)) {
            applied = next;
            awaited |= deletion;
        }
        if !Protection::AppliedIsContiguous.holds() {
            applied = self.pending.pop_last().map_or(applied, |(last, _)| last.max(applied));
            self.pending.clear();
        }
        if Some(applied) != self.applied {
            self.applied = Some(applied);
            // What is missing further up keeps its age: the next batch of its repair is due at once.
            self.hole = self.hole.filter(|_| self.head > applied);
            if self.hole.is_none() {
                self.repairs.clear();
            }
        }
        awaited
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

    /// The newest of `open` questions, for an answer that matches none: never, but as a negative control.
    fn unmatched(open: usize) -> Option<usize> {
        if Protection::AnswersMatchQuestions.holds() { None } else { open.checked_sub(1) }
    }

    fn draw_nonce(&mut self) -> u64 {
        let nonce = self.next_nonce;
        self.next_nonce = self.next_nonce.wrapping_add(1).max(1);
        nonce
    }
}

/// Absent never means nothing: rows count only when they are exactly the first ones asked for, dense.
fn answer_covers(repair: &OpenReplay, answer: &ReplayOutcome) -> bool {
    match answer {
        ReplayOutcome::Rows(rows) => {
            let asked = LogPosition::new(repair.epoch, repair.from).into_iter();
            !rows.is_empty()
                && rows.len() as u64 <= repair.to - repair.from + 1
                && asked
                    .flat_map(|first| std::iter::successors(Some(first), |at| at.next()))
                    .zip(rows)
                    .all(|(expected, row)| row.position == expected)
        }
        ReplayOutcome::Refused { .. } => true,
    }
}

/// Whether cached entries below the scope are removed one by one (a key) or die by their floor.
pub fn evicted_key(scope: &Scope) -> Option<&KeyHash> {
    match scope {
        Scope::Key { hash, .. } => Some(hash),
        Scope::Api(_) | Scope::Workspace(_) | Scope::All => None,
    }
}

#[cfg(any(test, feature = "fork"))]
mod fork;
#[cfg(test)]
mod tests;
