//! A publisher: the real rounds and receipts, in a shell that does what evictd-publisher's does.
//!
//! Several of them work on one store. Each numbers all committed changes, sends the
//! head once a second, answers probes by rounds, and answers replays and lookups.
//!
//! * [`rivals`]: discovery of other publishers, and whether this one may answer for its store (R15).

mod rivals;

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use evictd_core::authority::{Rounds, fence_age};
use evictd_core::history::{
    BeginCause, Claim, History, LogToken, Milestone, Past, Provenance, RoundToken, Voucher,
};
use evictd_core::ids::{Identity, WorkspaceId};
use evictd_core::invalidation::Invalidation;
use evictd_core::limits::LIVE_BATCH_MAX;
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Change, Measured, Receipt, ReceiptEvent, ReceiptTracker, TrackerConfig};
use evictd_core::rules::Rule;
use evictd_core::service::Service;
use evictd_core::time::LeaseTime;

use crate::assumption::Assumption;
use crate::ctx::Ctx;
use crate::event::{PublisherEvent, SimEvent};
use crate::message::{ReplyTo, SimMessage};
use crate::net::Audience;
use crate::node::NodeNumber;
use crate::process::Process;
use crate::rows::{Attached, ChangePlan, NumberedBatch, RoundInput, SimHead, instance};
use crate::store::SimStore;
use crate::time::{MS, Micros, Moment, SECOND};
use crate::trace::trace;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SequencerState {
    Idle,
    Numbers,
    /// More was committed meanwhile.
    NumbersAgain,
}

#[derive(Clone, Debug)]
struct AgentProbe {
    reply_to: ReplyTo,
    seen: Option<Voucher>,
}

/// The probe that waits for a round; `None` for this publisher itself.
type RoundWaiter = Option<AgentProbe>;

/// The history and the head that a publisher read from its store.
#[derive(Debug)]
struct KnownStore {
    history: History,
    head: SimHead,
}

/// How long a round may take before the publisher falls silent.
const PATIENCE: Duration = Duration::from_secs(2);

/// The time after which a publisher that doesn't answer must have left the queue group.
const SILENT_AFTER: Micros = 4 * SECOND;

/// How often a publisher polls for changes made past the API.
const POLL_INTERVAL: Micros = 20 * MS;

/// The shortest time between the starts of two rounds.
const ROUND_SPACING: Duration = Duration::from_millis(250);

/// How late a receipt may become final, over the bound: receipts are checked once a second.
const RECEIPT_SLACK: Duration = Duration::from_millis(2_500);

#[derive(Debug)]
pub struct SimPublisher {
    pub process: Process,
    rounds: Rounds<RoundWaiter>,
    running: Option<(LeaseTime, Vec<RoundWaiter>)>,
    fence: LeaseTime,
    /// What the last round drew.
    round: RoundToken,
    service: Service,
    known: Option<KnownStore>,
    /// Queries of other publishers, and when each arrived.
    queries: Vec<(ReplyTo, LeaseTime)>,
    reread_at: LeaseTime,
    tracker: ReceiptTracker,
    head: LogPosition,
    numbering: SequencerState,
    /// Instances that sent a leave message. The roster still lists them.
    departed: BTreeSet<Identity>,
    poll_due: bool,
    patience_due: bool,
    /// When it was last frozen or silent: receipts are held then.
    held_at: LeaseTime,
    /// The oldest unanswered probe since it joined the queue groups: for the checker.
    unanswered_since: Option<Moment>,
}

impl SimPublisher {
    /// A publisher that has read nothing yet, and whose service draws its numbers from `nonce` on.
    pub fn new(process: Process, ctx: &Ctx, nonce: u64) -> Self {
        let (bound, now) = (ctx.settings.bound, process.clock.read(ctx.now));
        let config = TrackerConfig { bound, roster_delay: bound * 2, open_max: 100_000 };
        Self {
            process,
            rounds: Rounds::new(ROUND_SPACING, 1_000),
            running: None,
            fence: LeaseTime(0),
            round: RoundToken(0),
            service: Service::new(bound, !ctx.settings.exclusive, nonce, now),
            known: None,
            queries: Vec::new(),
            reread_at: LeaseTime(0),
            tracker: ReceiptTracker::new(config, []),
            head: LogPosition::ZERO,
            numbering: SequencerState::Idle,
            departed: BTreeSet::new(),
            poll_due: false,
            patience_due: false,
            held_at: LeaseTime(0),
            unanswered_since: None,
        }
    }

    pub fn start(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        self.process.start(ctx);
        store.attach(self.node(), Attached::Primary);
        trace!(ctx, "{:?} starts its life {}", self.node(), self.process.life.0);
        if ctx.settings.exclusive {
            store.begin_incarnation(ctx, BeginCause::Opened, 0);
        }
        let nonce = ctx.dice.any();
        *self = Self::new(self.process.clone(), ctx, nonce);
        let history = store.history(ctx, self.node());
        self.known =
            history.zip(store.head(ctx, self.node())).map(|(history, head)| KnownStore { history, head });
        let now = self.clock(ctx);
        for instance in store.roster(ctx, self.node()).unwrap_or_default() {
            self.tracker.register(&instance, now);
        }
        self.head = self.known.as_ref().map_or(LogPosition::ZERO, |known| known.head.at);
        // The roster may be incomplete for a bound after the beginning of an epoch.
        if let Some(age) = store.epoch_age(ctx) {
            self.tracker.distrust_roster(now.after(ctx.settings.bound.saturating_sub(age)));
        }
        let tick = ctx.now.after(ctx.dice.below(SECOND));
        self.later(ctx, tick, PublisherEvent::Tick);
        self.wake(ctx);
        self.beat(ctx, store);
        // The round shows whether it could answer.
        self.want_round(ctx, store);
    }

    /// After a reconnect, other publishers must be discovered again.
    pub fn connected(&mut self) {
        self.service.mark_absent();
    }

    /// Exits in an orderly way. The next start at an exclusive store begins another incarnation.
    pub fn leave(&self, ctx: &mut Ctx) {
        if ctx.settings.exclusive && self.process.is_up() {
            self.announce_end(ctx);
        }
    }

    fn announce_end(&self, ctx: &mut Ctx) {
        let Some(known) = self.known.as_ref().filter(|_| self.may_vouch(ctx)) else { return };
        let incarnation = known.head.incarnation;
        let ended = SimMessage::Ended(Provenance { store: known.history.store(), incarnation });
        ctx.broadcast(self.node(), &ended);
    }

    /// The process continues after a freeze.
    pub fn thaw(&mut self, ctx: &mut Ctx, clock_stood: bool) {
        self.process.thaw(ctx, clock_stood);
        self.held_at = self.clock(ctx);
        self.unanswered_since = None;
    }

    fn node(&self) -> NodeNumber {
        self.process.node
    }

    fn clock(&self, ctx: &Ctx) -> LeaseTime {
        self.process.clock.read(ctx.now)
    }

    fn later(&self, ctx: &mut Ctx, at: Moment, event: PublisherEvent) {
        ctx.queue.push(at, SimEvent::Publisher(self.node(), self.process.life, event));
    }

    /// After a commit, polling finds it.
    pub fn wake(&mut self, ctx: &mut Ctx) {
        if !self.poll_due && self.process.is_up() {
            self.poll_due = true;
            let at = ctx.now.after(ctx.dice.below(POLL_INTERVAL));
            self.later(ctx, at, PublisherEvent::Poll);
        }
    }

    /// Makes a change for a client, which takes `span`, if it can.
    pub fn change(&self, ctx: &mut Ctx, store: &mut SimStore, plan: ChangePlan, span: Micros) {
        if self.process.is_up() && store.attached(ctx, self.node()) == Attached::Primary {
            store.begin(ctx, plan, Some((self.node(), self.process.life)), span);
        }
    }

    pub fn on_event(&mut self, ctx: &mut Ctx, store: &mut SimStore, event: PublisherEvent) {
        self.tracker.apply_service(&self.service, self.clock(ctx));
        match event {
            PublisherEvent::Tick => self.tick(ctx, store),
            PublisherEvent::Beat => self.beat(ctx, store),
            PublisherEvent::Poll => {
                self.poll_due = false;
                if store.has_unnumbered() {
                    self.number(ctx, store);
                }
            }
            PublisherEvent::Round => self.start_round(ctx, store),
            PublisherEvent::Patience => {
                self.patience_due = false;
                self.keep_silent(ctx);
            }
            PublisherEvent::Committed { change, success } => {
                if success {
                    ctx.checker.reported_success(ctx.now, change);
                }
                self.number(ctx, store);
            }
            PublisherEvent::Numbered { numbered, is_round: true } => self.finish_round(ctx, store, numbered),
            PublisherEvent::Numbered { numbered, is_round: false } => {
                self.finish_numbering(ctx, store, numbered);
            }
            PublisherEvent::Lookup(reply_to, key, fence_age) => {
                let read = store.read(ctx, self.node(), key).filter(|_| self.may_vouch(ctx));
                if let Some(read) = read.map(Box::new) {
                    let answer = SimMessage::LookupAnswer(reply_to.nonce, key, read, fence_age);
                    self.reply(ctx, reply_to, answer);
                }
            }
            PublisherEvent::Replay(reply_to, range) => {
                let rows = store.replay(ctx, self.node(), range).filter(|_| self.may_vouch(ctx));
                // The provenance doesn't come from the same read.
                if let Some((rows, known)) = rows.zip(self.known.as_ref()) {
                    let provenance = known.history.provenance();
                    let answer = SimMessage::ReplayOutcome(reply_to.nonce, provenance, Box::new(rows));
                    self.reply(ctx, reply_to, answer);
                }
            }
            PublisherEvent::Attach => store.attach(self.node(), Attached::Primary),
        }
    }

    pub fn on_message(&mut self, ctx: &mut Ctx, store: &mut SimStore, message: &SimMessage) {
        self.tracker.apply_service(&self.service, self.clock(ctx));
        match *message {
            SimMessage::Probe(reply_to, seen, audience) => {
                let now = self.clock(ctx);
                self.check_silence(ctx, audience);
                if self.rounds.add(Some(AgentProbe { reply_to, seen }), now).is_ok() {
                    self.start_round(ctx, store);
                }
            }
            SimMessage::Replay(reply_to, range) => {
                let at = ctx.now.after(store.statement(ctx));
                self.later(ctx, at, PublisherEvent::Replay(reply_to, range));
            }
            SimMessage::Lookup(reply_to, key) => {
                // Before the read: the fence may rise meanwhile, but this read is no newer for it.
                let fence_age = fence_age(Some(self.fence), self.clock(ctx));
                let slow = ctx.dice.permille(ctx.settings.slow_loads_permille);
                let took = store.statement(ctx) + if slow { ctx.dice.below(600 * MS) } else { 0 };
                let at = ctx.now.after(took);
                self.later(ctx, at, PublisherEvent::Lookup(reply_to, key, fence_age));
            }
            SimMessage::Applied(from, life, provenance, applied) => {
                let now = self.clock(ctx);
                // What was applied of another history confirms nothing here.
                let seen = Milestone { provenance, at: applied, token: LogToken::default() };
                let judge = |known: &KnownStore| known.history.judge(&seen, self.head) == Past::Known;
                let counts = applied <= self.head && self.known.as_ref().is_some_and(judge);
                if counts {
                    let identity = instance(from, life, ctx.settings.bound).identity;
                    self.tracker.record_applied(&identity, applied, &[], now);
                    self.report_receipts(ctx);
                }
            }
            SimMessage::Leave(from, life) => {
                let now = self.clock(ctx);
                let identity = instance(from, life, ctx.settings.bound).identity;
                self.tracker.mark_departed(&identity, now);
                self.departed.insert(identity);
                self.report_receipts(ctx);
            }
            _ => self.on_publisher(ctx, store, message),
        }
    }

    fn reply(&self, ctx: &mut Ctx, reply_to: ReplyTo, message: SimMessage) {
        // The inbox belongs to one process: an answer for an earlier one isn't delivered.
        if ctx.net.links[reply_to.node.0].life == reply_to.life {
            ctx.send(self.node(), reply_to.node, message);
        }
    }

    fn tick(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        let next = ctx.now.after(SECOND);
        self.later(ctx, next, PublisherEvent::Tick);
        if let Some(head) = store.head(ctx, self.node()) {
            if head.at < self.head {
                // The server's history may show why, and a round reads it.
                self.want_round(ctx, store);
            }
            self.note(ctx, store, &head);
            if self.may_vouch(ctx) {
                let tick = SimMessage::Tick(store.voucher(&head, head.at), head.round);
                ctx.broadcast(self.node(), &tick);
            }
        }
        let now = self.clock(ctx);
        if self.tracker.is_held() {
            self.held_at = now;
        }
        self.tracker.poll(now);
        self.report_receipts(ctx);
        self.keep_silent(ctx);
    }

    /// The log reaches to `head`. Reads the history again if another incarnation has begun, and reports that the one
    /// before it has ended.
    fn note(&mut self, ctx: &mut Ctx, store: &SimStore, head: &SimHead) {
        let Some(known) = &mut self.known else { return };
        if known.history.current().incarnation != head.incarnation {
            let Some(history) = store.history(ctx, self.process.node) else { return };
            known.history = history;
            if known.head.incarnation != head.incarnation {
                self.announce_end(ctx);
            }
        }
        let Some(known) = &mut self.known else { return };
        if known.head.at <= head.at || known.head.incarnation != head.incarnation {
            known.head = *head;
        }
        if head.at.epoch() > self.head.epoch() && self.head != LogPosition::ZERO {
            // The store may have lost changes whose receipts are open.
            self.tracker.begin_epoch(head.at.epoch(), self.clock(ctx));
            self.tracker.distrust_roster(self.clock(ctx).after(ctx.settings.bound));
        }
        self.head = self.head.max(head.at);
    }

    fn number(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        if self.numbering == SequencerState::Idle {
            self.numbering = SequencerState::Numbers;
            store.number(ctx, self.node(), self.process.life, None);
        } else {
            self.numbering = SequencerState::NumbersAgain;
        }
    }

    fn finish_numbering(&mut self, ctx: &mut Ctx, store: &mut SimStore, numbered: Option<NumberedBatch>) {
        let before = std::mem::replace(&mut self.numbering, SequencerState::Idle);
        if let Some(numbered) = numbered {
            self.emit(ctx, store, &numbered);
            if before == SequencerState::NumbersAgain {
                self.number(ctx, store);
            }
        } else {
            self.wake(ctx);
        }
    }

    /// Sends what the log gained. Opens receipts first, after it read the roster (R12).
    fn emit(&mut self, ctx: &mut Ctx, store: &SimStore, numbered: &NumberedBatch) {
        self.note(ctx, store, &numbered.head);
        let rows = &numbered.rows;
        if !rows.is_empty() {
            self.track(ctx, store, rows);
        }
        if !self.may_vouch(ctx) {
            return;
        }
        for batch in rows.chunks(LIVE_BATCH_MAX) {
            let Some(last) = batch.last() else { continue };
            let voucher = store.voucher(&numbered.head, last.position);
            let rows = if batch.len() == rows.len() { rows.clone() } else { Rc::from(batch) };
            ctx.broadcast(self.node(), &SimMessage::Live(voucher, rows));
        }
    }

    fn track(&mut self, ctx: &mut Ctx, store: &SimStore, rows: &[Invalidation]) {
        let Some(roster) = store.roster(ctx, self.node()) else { return };
        let now = self.clock(ctx);
        for instance in roster.iter().filter(|instance| !self.departed.contains(&instance.identity)) {
            self.tracker.register(instance, now);
        }
        for row in rows.iter().filter(|row| row.cause.is_deletion()) {
            let request = Some((format!("req_{}", row.position).into(), WorkspaceId::new("ws")));
            let Invalidation { position, cause, committed_at, .. } = *row;
            let change = Change { request, position, cause, committed_at };
            self.tracker.track(change, now, Measured::FromFirstSight, now);
        }
        self.report_receipts(ctx);
    }

    fn report_receipts(&mut self, ctx: &mut Ctx) {
        for event in self.tracker.take_events() {
            if let ReceiptEvent::Final(receipt) = event {
                self.report_receipt(ctx, &receipt);
            }
        }
    }

    fn report_receipt(&self, ctx: &mut Ctx, receipt: &Receipt) {
        let position = receipt.change.position;
        trace!(ctx, "{:?} receipt of {position}: {:?}", self.node(), receipt.state());
        if ctx.is_at_copy(self.node()) {
            // Agents follow home's history, and nothing that is known of them is about this one.
            return ctx.violated(Rule::G4, format!("a copy of the store finalized a receipt: {position}"));
        }
        ctx.checker.receipt(ctx.now, position, receipt.state());
        let limit = ctx.settings.bound + RECEIPT_SLACK;
        let after = receipt.final_after.unwrap_or_default();
        let was_held = self.clock(ctx).since(self.held_at) < after;
        if after > limit && !was_held {
            ctx.violated(Rule::G4, format!("the receipt of {position} took {after:?}"));
        }
    }

    fn start_round(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        let now = self.clock(ctx);
        self.keep_silent(ctx);
        if let Some(waiting) = self.rounds.start(now) {
            let probes = || waiting.iter().flatten();
            let proved = probes().filter_map(|probe| probe.seen).filter(|seen| store.is_authentic(seen));
            let seen_epoch = proved.map(|seen| seen.milestone.at.epoch()).max().unwrap_or(0);
            let instances = probes().map(|probe| (probe.reply_to.node, probe.reply_to.life)).collect();
            self.running = Some((now, waiting));
            store.number(ctx, self.node(), self.process.life, Some(RoundInput { seen_epoch, instances }));
        } else if let Some(due) = self.rounds.start_at() {
            let at = self.process.clock.moment(due).max(ctx.now.after(1));
            self.later(ctx, at, PublisherEvent::Round);
        }
        if !self.patience_due {
            self.patience_due = true;
            let at = ctx.now.after(PATIENCE.as_micros() as u64 + 50 * MS);
            self.later(ctx, at, PublisherEvent::Patience);
        }
    }

    fn finish_round(&mut self, ctx: &mut Ctx, store: &mut SimStore, numbered: Option<NumberedBatch>) {
        let Some((began, mut waiting)) = self.running.take() else { return };
        self.rounds.finish(numbered.is_some());
        // Without a round there are no answers: the agents retry, perhaps at another publisher.
        if let Some(NumberedBatch { head, rows }) = numbered {
            // First the rows below the answered head, or every agent would find a gap.
            self.emit(ctx, store, &NumberedBatch { head, rows });
            (self.fence, self.round) = (self.fence.max(began), head.round);
            if ctx.lacks(Assumption::RoundsFollowTheirProbes) {
                waiting.extend(self.rounds.waiting().iter().cloned());
            }
            let probes: Vec<&AgentProbe> = waiting.iter().flatten().collect();
            self.answer_probes(ctx, store, &head, &probes);
            self.answer_queries(ctx, began);
        }
        self.start_round(ctx, store);
    }

    /// Answers agents whose past the store has (R15, R16). If there is one that it issued and doesn't have, this
    /// publisher falls silent.
    fn answer_probes(&mut self, ctx: &mut Ctx, store: &SimStore, head: &SimHead, probes: &[&AgentProbe]) {
        let admitted = probes.iter().filter(|probe| self.admits_past(ctx, store, probe, head));
        let admitted: Vec<ReplyTo> = admitted.map(|probe| probe.reply_to).collect();
        if !self.may_vouch(ctx) {
            return;
        }
        self.unanswered_since = None;
        let voucher = store.voucher(head, head.at);
        for reply_to in admitted {
            self.reply(ctx, reply_to, SimMessage::ProbeAnswer(reply_to.nonce, voucher));
        }
    }

    fn admits_past(&mut self, ctx: &mut Ctx, store: &SimStore, probe: &AgentProbe, head: &SimHead) -> bool {
        let (Some(seen), Some(known)) = (&probe.seen, &self.known) else { return probe.seen.is_none() };
        let own = store.row_token(ctx, self.node(), seen.milestone.at);
        let past = known.history.judge_row(&seen.milestone, head.at, own);
        let claim = Claim::new(past, store.is_authentic(seen));
        if claim == Claim::Unknown {
            trace!(ctx, "{:?} doesn't know what {:?} has seen: {seen:?}", self.node(), probe.reply_to.node);
            self.service.on_unknown_past(seen.milestone);
        }
        claim == Claim::Admitted
    }

    /// Whether answers for the store may be sent now.
    fn may_vouch(&self, ctx: &Ctx) -> bool {
        self.service.may_vouch(self.clock(ctx))
    }

    /// Requests a round for itself, unless a probe already waits for one.
    fn want_round(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        let now = self.clock(ctx);
        if self.rounds.waiting().is_empty() && self.rounds.add(None, now).is_ok() {
            self.start_round(ctx, store);
        }
    }

    /// Checks, when a probe arrives through the queue group, that this publisher may be a member of it (R14).
    fn check_silence(&mut self, ctx: &mut Ctx, audience: Audience) {
        let since = *self.unanswered_since.get_or_insert(ctx.now);
        let node = self.node();
        let link = &ctx.net.links[node.0];
        // What is late was routed when this one still answered.
        let clear = !link.trouble.is_any() && ctx.now.since(link.clear_since) > 2 * SECOND;
        let member = link.serving && clear;
        if audience == Audience::One && member && ctx.now.since(since) > SILENT_AFTER {
            let what =
                format!("{node:?} is still in the queue group, and has answered no probe since {since}");
            ctx.violated(Rule::R14, what);
        }
    }

    /// Leaves the queue groups while it stalls or may not answer, and joins them again (R14).
    fn keep_silent(&mut self, ctx: &mut Ctx) {
        let now = self.clock(ctx);
        let serving = !self.rounds.stalled(now, PATIENCE) && self.may_vouch(ctx);
        let link = &mut ctx.net.links[self.process.node.0];
        if link.connected && !link.trouble.mute {
            if serving && !link.serving {
                self.unanswered_since = None;
            }
            link.serving = serving;
        }
    }
}
