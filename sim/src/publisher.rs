//! A publisher: the real rounds and receipts, in a shell that does what evictd-publisher's does.
//!
//! Several of them work on one store. Each numbers what was committed, whoever committed it, tells the
//! head once a second, answers probes by rounds, and answers replays and lookups.
//!
//! * [`rivals`]: what it and others ask each other, and whether it may vouch for its store (R15).

mod rivals;

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use evictd_core::authority::{Rounds, fence_age};
use evictd_core::history::{
    BeginCause, Claim, History, LogToken, Milestone, Past, Provenance, RoundToken, Voucher,
};
use evictd_core::ids::Identity;
use evictd_core::invalidation::Invalidation;
use evictd_core::limits::LIVE_BATCH_MAX;
use evictd_core::position::LogPosition;
use evictd_core::receipts::{Change, Measured, Receipt, ReceiptEvent, ReceiptTracker, TrackerConfig};
use evictd_core::rules::Rule;
use evictd_core::service::Service;
use evictd_core::time::LeaseTime;

use self::rivals::WaitingQuery;
use crate::assumption::Assumption;
use crate::checker::ChangeId;
use crate::ctx::Ctx;
use crate::net::{Found, Message, Nonce};
use crate::process::Process;
use crate::queue::{Event, Life, Node};
use crate::store::{Attached, Head, KeyNumber, Numbered, Plan, RoundInput, Store, instance};
use crate::time::{MS, Micros, Moment, SECOND};
use crate::trace::trace;

/// Something inside a publisher process.
#[derive(Clone, Debug)]
pub enum PublisherEvent {
    /// A second went by: tell the head.
    Tick,
    /// A look at the own standing among other publishers (R15).
    Beat,
    /// Look whether something was committed past the API.
    Poll,
    /// A round may be due.
    Round,
    /// Somebody may have waited too long for a round (R14).
    Patience,
    /// A change's transaction ended.
    Committed {
        /// Which change it became, in truth.
        change: Option<ChangeId>,
        /// Whether the caller is told that it succeeded.
        success: bool,
    },
    /// Numbering ended.
    Numbered {
        /// `None` if it failed, or if nobody knows.
        numbered: Option<Numbered>,
        /// Whether it was a round.
        is_round: bool,
    },
    /// A lookup's statement runs now.
    Look {
        /// Who asks.
        asker: Asker,
        /// For what.
        key: KeyNumber,
        /// The age of the last fence when the question came in.
        fence_age: Duration,
    },
    /// A replay's statement runs now.
    Replay {
        /// Who asks.
        asker: Asker,
        /// The epoch of both ends.
        epoch: u32,
        /// From.
        first: u64,
        /// To.
        last: u64,
    },
    /// The connection pool finds the primary.
    Attach,
}

/// Who asks a question: answers go into the inbox of that process (R13).
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    node: Node,
    life: Life,
    nonce: Nonce,
}

/// What the sequencer does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sequencer {
    Idle,
    Numbers,
    /// More was committed meanwhile.
    NumbersAgain,
}

#[derive(Clone, Debug)]
struct Probe {
    asker: Asker,
    seen: Option<Voucher>,
}

/// Somebody who waits for a round.
#[derive(Clone, Debug)]
enum Waiting {
    Agent(Probe),
    /// This publisher; nobody is answered.
    Publisher,
}

/// What it knows of its store's history.
#[derive(Debug)]
struct Known {
    history: History,
    head: Head,
}

/// How long a round may take before the publisher falls silent.
const PATIENCE: Duration = Duration::from_secs(2);

/// By when a publisher that doesn't answer must have left the queue group.
const SILENT_AFTER: Micros = 4 * SECOND;

/// How often changes made past the API are looked for.
const POLL_INTERVAL: Micros = 20 * MS;

/// How long rounds keep their distance.
const ROUND_SPACING: Duration = Duration::from_millis(250);

/// How late a receipt may become final, over the bound: it is looked at once a second.
const RECEIPT_SLACK: Duration = Duration::from_millis(2_500);

/// A publisher process.
#[derive(Debug)]
pub struct Publisher {
    /// What every process has.
    pub process: Process,
    rounds: Rounds<Waiting>,
    running: Option<(LeaseTime, Vec<Waiting>)>,
    fence: LeaseTime,
    /// What the last round drew.
    round: RoundToken,
    service: Service,
    known: Option<Known>,
    queries: Vec<WaitingQuery>,
    reread_at: LeaseTime,
    tracker: ReceiptTracker,
    head: LogPosition,
    numbering: Sequencer,
    /// Who said goodbye: the roster still lists them.
    departed: BTreeSet<Identity>,
    poll_due: bool,
    patience_due: bool,
    /// When it last stood still, or was silent: receipts are held then.
    held_at: LeaseTime,
    /// Since when somebody waits for an answer, as a member of the queue groups: for the checker.
    unanswered_since: Option<Moment>,
}

impl Publisher {
    /// A publisher that was not started yet.
    pub fn new(process: Process, ctx: &Ctx) -> Self {
        Self {
            process,
            rounds: Rounds::new(ROUND_SPACING, 1_000),
            running: None,
            fence: LeaseTime(0),
            round: RoundToken(0),
            service: Service::new(ctx.settings.bound, !ctx.settings.exclusive, 1, LeaseTime(0)),
            known: None,
            queries: Vec::new(),
            reread_at: LeaseTime(0),
            tracker: tracker(ctx),
            head: LogPosition::ZERO,
            numbering: Sequencer::Idle,
            departed: BTreeSet::new(),
            poll_due: false,
            patience_due: false,
            held_at: LeaseTime(0),
            unanswered_since: None,
        }
    }

    /// A new process.
    pub fn start(&mut self, ctx: &mut Ctx, store: &mut Store) {
        self.process.start(ctx);
        self.rounds = Rounds::new(ROUND_SPACING, 1_000);
        (self.running, self.fence, self.head) = (None, LeaseTime(0), LogPosition::ZERO);
        self.numbering = Sequencer::Idle;
        (self.poll_due, self.patience_due) = (false, false);
        self.tracker = tracker(ctx);
        self.departed.clear();
        self.unanswered_since = None;
        store.attach(self.node(), Attached::Primary);
        trace!(ctx, "{:?} starts its life {}", self.node(), self.process.life.0);
        let now = self.clock(ctx);
        if ctx.settings.exclusive {
            store.begin_incarnation(ctx, BeginCause::Opened, 0);
        }
        self.known = self.read_history(ctx, store);
        (self.round, self.reread_at) = (RoundToken(0), LeaseTime(0));
        self.service = Service::new(ctx.settings.bound, !ctx.settings.exclusive, ctx.dice.any(), now);
        self.queries.clear();
        for instance in store.roster(ctx, self.node()).unwrap_or_default() {
            self.tracker.register(&instance, now);
        }
        self.head = self.known.as_ref().map_or(LogPosition::ZERO, |known| known.head.at);
        // The store tells when its epoch began: the roster may lack somebody for a bound from then on.
        if let Some(age) = store.epoch_age(ctx) {
            self.tracker.distrust_roster(now.after(ctx.settings.bound.saturating_sub(age)));
        }
        let tick = ctx.now.after(ctx.dice.below(SECOND));
        self.later(ctx, tick, PublisherEvent::Tick);
        self.wake(ctx);
        self.beat(ctx, store);
        // It finds out whether it could answer.
        self.want_round(ctx, store);
    }

    /// A new connection came about: whoever else came meanwhile must be asked.
    pub fn connected(&mut self) {
        self.service.mark_absent();
    }

    /// It ends in an orderly way. What comes next of an exclusive store is another incarnation.
    pub fn leave(&self, ctx: &mut Ctx) {
        if ctx.settings.exclusive && self.process.is_up() {
            self.tell_end(ctx);
        }
    }

    fn tell_end(&self, ctx: &mut Ctx) {
        let Some(known) = self.known.as_ref().filter(|_| self.may_vouch(ctx)) else { return };
        let incarnation = known.head.incarnation;
        let ended = Message::Ended(Provenance { store: known.history.store(), incarnation });
        ctx.broadcast(self.node(), &ended);
    }

    /// It goes on after it stood still.
    pub fn thawed(&mut self, ctx: &Ctx) {
        self.held_at = self.clock(ctx);
        self.unanswered_since = None;
    }

    fn node(&self) -> Node {
        self.process.node
    }

    fn clock(&self, ctx: &Ctx) -> LeaseTime {
        self.process.clock.read(ctx.now)
    }

    fn later(&self, ctx: &mut Ctx, at: Moment, event: PublisherEvent) {
        ctx.queue.push(at, Event::Publisher(self.node(), self.process.life, event));
    }

    /// Something was committed by somebody: it will be found by polling.
    pub fn wake(&mut self, ctx: &mut Ctx) {
        if !self.poll_due && self.process.is_up() {
            self.poll_due = true;
            let at = ctx.now.after(ctx.dice.below(POLL_INTERVAL));
            self.later(ctx, at, PublisherEvent::Poll);
        }
    }

    /// A caller asks for a change, which takes `span`. `false` if it is refused at once.
    pub fn change(&mut self, ctx: &mut Ctx, store: &mut Store, plan: Plan, span: Micros) -> bool {
        let possible = self.process.is_up() && store.attached(ctx, self.node()) == Attached::Primary;
        if possible {
            store.begin(ctx, plan, Some((self.node(), self.process.life)), span);
        }
        possible
    }

    /// Handles one of its own events.
    pub fn on_event(&mut self, ctx: &mut Ctx, store: &mut Store, event: PublisherEvent) {
        self.hold_receipts(ctx);
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
                    ctx.checker.told_success(ctx.now, change);
                }
                self.number(ctx, store);
            }
            PublisherEvent::Numbered { numbered, is_round: true } => self.finish_round(ctx, store, numbered),
            PublisherEvent::Numbered { numbered, is_round: false } => {
                self.finish_numbering(ctx, store, numbered);
            }
            PublisherEvent::Look { asker, key, fence_age } => {
                let read = store.read(ctx, self.node(), key).filter(|_| self.may_vouch(ctx));
                if let Some(read) = read {
                    let found = Box::new(Found { read, fence_age });
                    self.reply(ctx, asker, Message::LookupAnswer { nonce: asker.nonce, key, found });
                }
            }
            PublisherEvent::Replay { asker, epoch, first, last } => {
                let answer = store.replay(ctx, self.node(), epoch, first, last);
                if let Some(answer) = answer.filter(|_| self.may_vouch(ctx)) {
                    let (nonce, answer) = (asker.nonce, Box::new(answer));
                    // Whom it speaks for it knows from elsewhere.
                    let Some(known) = &self.known else { return };
                    let provenance = known.history.provenance();
                    self.reply(ctx, asker, Message::ReplayOutcome { nonce, provenance, answer });
                }
            }
            PublisherEvent::Attach => store.attach(self.node(), Attached::Primary),
        }
    }

    /// Handles a message.
    pub fn on_message(&mut self, ctx: &mut Ctx, store: &mut Store, message: &Message) {
        self.hold_receipts(ctx);
        match *message {
            Message::Probe { from, life, nonce, seen, all } => {
                let now = self.clock(ctx);
                self.check_silence(ctx, all);
                let asker = Asker { node: from, life, nonce };
                if self.rounds.add(Waiting::Agent(Probe { asker, seen }), now).is_ok() {
                    self.start_round(ctx, store);
                }
            }
            Message::Replay { from, life, nonce, epoch, first, last } => {
                let at = ctx.now.after(store.statement(ctx));
                let asker = Asker { node: from, life, nonce };
                self.later(ctx, at, PublisherEvent::Replay { asker, epoch, first, last });
            }
            Message::Lookup { from, life, nonce, key } => {
                // Before the read: the fence may rise meanwhile, but this read is no newer for it.
                let fence_age = fence_age(Some(self.fence), self.clock(ctx));
                let slow = ctx.dice.permille(ctx.settings.slow_loads_permille);
                let took = store.statement(ctx) + if slow { ctx.dice.below(600 * MS) } else { 0 };
                let at = ctx.now.after(took);
                let asker = Asker { node: from, life, nonce };
                self.later(ctx, at, PublisherEvent::Look { asker, key, fence_age });
            }
            Message::Applied { from, life, provenance, applied } => {
                let now = self.clock(ctx);
                // What was applied of another history confirms nothing here.
                let seen = Milestone { provenance, at: applied, token: LogToken::default() };
                let judge = |known: &Known| known.history.judge(&seen, self.head) == Past::Known;
                let counts = applied <= self.head && self.known.as_ref().is_some_and(judge);
                if counts {
                    let identity = instance(from, life, ctx.settings.bound).identity;
                    self.tracker.record_applied(&identity, applied, &[], now);
                    self.tell_receipts(ctx);
                }
            }
            Message::Goodbye { from, life } => {
                let now = self.clock(ctx);
                let identity = instance(from, life, ctx.settings.bound).identity;
                self.tracker.mark_departed(&identity, now);
                self.departed.insert(identity);
                self.tell_receipts(ctx);
            }
            _ => self.on_publisher(ctx, store, message),
        }
    }

    fn hold_receipts(&mut self, ctx: &Ctx) {
        self.tracker.apply_service(&self.service, self.process.clock.read(ctx.now));
    }

    fn reply(&self, ctx: &mut Ctx, asker: Asker, message: Message) {
        // The inbox is that of one process: an answer for an earlier one finds nobody.
        if ctx.net.links[asker.node.0].life == asker.life {
            ctx.send(self.node(), asker.node, message);
        }
    }

    fn tick(&mut self, ctx: &mut Ctx, store: &mut Store) {
        let next = ctx.now.after(SECOND);
        self.later(ctx, next, PublisherEvent::Tick);
        if let Some(head) = store.head(ctx, self.node()) {
            if head.at < self.head {
                // Its server's history may tell why, and a round looks at it.
                self.want_round(ctx, store);
            }
            self.note(ctx, store, &head);
            if self.may_vouch(ctx) {
                let tick = Message::Tick(store.voucher(&head, head.at), head.round);
                ctx.broadcast(self.node(), &tick);
            }
        }
        let now = self.clock(ctx);
        if self.tracker.is_held() {
            self.held_at = now;
        }
        self.tracker.poll(now);
        self.tell_receipts(ctx);
        self.keep_silent(ctx);
    }

    fn read_history(&self, ctx: &Ctx, store: &Store) -> Option<Known> {
        let head = store.head(ctx, self.node())?;
        Some(Known { history: store.history(ctx, self.node())?, head })
    }

    /// The log reaches to `head`. Reads the history again if another incarnation has begun, and tells that the one
    /// before it has ended.
    fn note(&mut self, ctx: &mut Ctx, store: &Store, head: &Head) {
        let Some(known) = &mut self.known else { return };
        if known.history.current().incarnation != head.incarnation {
            let Some(history) = store.history(ctx, self.process.node) else { return };
            known.history = history;
            if known.head.incarnation != head.incarnation {
                self.tell_end(ctx);
            }
        }
        let Some(known) = &mut self.known else { return };
        if known.head.at <= head.at || known.head.incarnation != head.incarnation {
            known.head = *head;
        }
        self.note_head(ctx, head.at);
    }

    fn note_head(&mut self, ctx: &Ctx, head: LogPosition) {
        if head.epoch() > self.head.epoch() && self.head != LogPosition::ZERO {
            // The store may have lost changes whose receipts are open.
            self.tracker.begin_epoch(head.epoch(), self.clock(ctx));
            self.tracker.distrust_roster(self.clock(ctx).after(ctx.settings.bound));
        }
        self.head = self.head.max(head);
    }

    fn number(&mut self, ctx: &mut Ctx, store: &mut Store) {
        if self.numbering == Sequencer::Idle {
            self.numbering = Sequencer::Numbers;
            store.number(ctx, self.node(), self.process.life, None);
        } else {
            self.numbering = Sequencer::NumbersAgain;
        }
    }

    fn finish_numbering(&mut self, ctx: &mut Ctx, store: &mut Store, numbered: Option<Numbered>) {
        let before = std::mem::replace(&mut self.numbering, Sequencer::Idle);
        if let Some(numbered) = numbered {
            self.emit(ctx, store, &numbered);
            if before == Sequencer::NumbersAgain {
                self.number(ctx, store);
            }
        } else {
            self.wake(ctx);
        }
    }

    /// Sends what the log gained; receipts are opened first, after a look at the roster (R12).
    fn emit(&mut self, ctx: &mut Ctx, store: &Store, numbered: &Numbered) {
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
            ctx.broadcast(self.node(), &Message::Live(voucher, rows));
        }
    }

    fn track(&mut self, ctx: &mut Ctx, store: &Store, rows: &[Invalidation]) {
        let Some(roster) = store.roster(ctx, self.node()) else { return };
        let now = self.clock(ctx);
        for instance in roster.iter().filter(|instance| !self.departed.contains(&instance.identity)) {
            self.tracker.register(instance, now);
        }
        for row in rows.iter().filter(|row| row.cause.is_deletion()) {
            let request: Box<str> = format!("req_{}", row.position).into();
            let change = Change {
                request: Some((request, ctx.settings.receipt_workspace.clone())),
                position: row.position,
                cause: row.cause,
                committed_at: row.committed_at,
            };
            self.tracker.track(change, now, Measured::FromFirstSight, now);
        }
        self.tell_receipts(ctx);
    }

    fn tell_receipts(&mut self, ctx: &mut Ctx) {
        for event in self.tracker.take_events() {
            if let ReceiptEvent::Final(receipt) = event {
                self.tell_receipt(ctx, &receipt);
            }
        }
    }

    fn tell_receipt(&self, ctx: &mut Ctx, receipt: &Receipt) {
        let position = receipt.change.position;
        trace!(ctx, "{:?} receipt of {position}: {:?}", self.node(), receipt.state());
        if ctx.is_at_copy(self.node()) {
            // Agents follow home's history, and nothing that is known of them is about this one.
            let what = || format!("a copy of the store calls its receipt of {position} final");
            return ctx.checker.violated(Rule::G4, ctx.now, what);
        }
        ctx.checker.receipt(ctx.now, position, receipt.state());
        let limit = ctx.settings.bound + RECEIPT_SLACK;
        let after = receipt.final_after.unwrap_or_default();
        let was_held = self.clock(ctx).since(self.held_at) < after;
        if after > limit && !was_held {
            ctx.checker.violated(Rule::G4, ctx.now, || format!("the receipt of {position} took {after:?}"));
        }
    }

    fn start_round(&mut self, ctx: &mut Ctx, store: &mut Store) {
        let now = self.clock(ctx);
        self.keep_silent(ctx);
        if let Some(waiting) = self.rounds.start(now) {
            let probes = || waiting.iter().filter_map(Waiting::probe);
            let proved = probes().filter_map(|probe| probe.seen).filter(|seen| store.is_authentic(seen));
            let seen_epoch = proved.map(|seen| seen.milestone.at.epoch()).max().unwrap_or(0);
            let instances = probes().map(|probe| (probe.asker.node, probe.asker.life)).collect();
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

    fn finish_round(&mut self, ctx: &mut Ctx, store: &mut Store, numbered: Option<Numbered>) {
        let Some((began, mut waiting)) = self.running.take() else { return };
        self.rounds.finish(numbered.is_some());
        // Without a round nobody is answered: the agents ask again, and perhaps somebody else.
        if let Some(Numbered { head, rows }) = numbered {
            // First what the answers speak of, or every agent would find a gap in it.
            self.emit(ctx, store, &Numbered { head, rows });
            (self.fence, self.round) = (self.fence.max(began), head.round);
            if ctx.lacks(Assumption::RoundsFollowTheirProbes) {
                waiting.extend(self.rounds.waiting().iter().cloned());
            }
            let probes: Vec<&Probe> = waiting.iter().filter_map(Waiting::probe).collect();
            self.answer_probes(ctx, store, &head, &probes);
            self.answer_queries(ctx, began);
        }
        self.start_round(ctx, store);
    }

    /// Answers agents whose past the store knows (R15, R16). If there is one that it gave out and doesn't know, this
    /// publisher falls silent.
    fn answer_probes(&mut self, ctx: &mut Ctx, store: &Store, head: &Head, probes: &[&Probe]) {
        let admitted = probes.iter().filter(|probe| self.admits_past(ctx, store, probe, head));
        let admitted: Vec<Asker> = admitted.map(|probe| probe.asker).collect();
        if !self.may_vouch(ctx) {
            return;
        }
        self.unanswered_since = None;
        let voucher = store.voucher(head, head.at);
        for asker in admitted {
            self.reply(ctx, asker, Message::ProbeAnswer { nonce: asker.nonce, head: voucher });
        }
    }

    fn admits_past(&mut self, ctx: &mut Ctx, store: &Store, probe: &Probe, head: &Head) -> bool {
        let (Some(seen), Some(known)) = (&probe.seen, &self.known) else { return probe.seen.is_none() };
        let own = store.row_token(ctx, self.node(), seen.milestone.at);
        let past = known.history.judge_row(&seen.milestone, head.at, own);
        let claim = Claim::new(past, store.is_authentic(seen));
        if claim == Claim::Unknown {
            trace!(ctx, "{:?} doesn't know what {:?} has seen: {seen:?}", self.node(), probe.asker.node);
            self.service.on_unknown_past(seen.milestone);
        }
        claim == Claim::Admitted
    }

    /// Whether messages that vouch for something may be sent now.
    fn may_vouch(&self, ctx: &Ctx) -> bool {
        self.service.may_vouch(self.clock(ctx))
    }

    /// Wants a round for itself. One that somebody waits for already will do.
    fn want_round(&mut self, ctx: &mut Ctx, store: &mut Store) {
        let now = self.clock(ctx);
        if self.rounds.waiting().is_empty() && self.rounds.add(Waiting::Publisher, now).is_ok() {
            self.start_round(ctx, store);
        }
    }

    /// A probe came through the queue group (unless to `all`): has this one any business in it (R14)?
    fn check_silence(&mut self, ctx: &mut Ctx, all: bool) {
        let since = *self.unanswered_since.get_or_insert(ctx.now);
        let node = self.node();
        let link = &ctx.net.links[node.0];
        // What is late was routed when this one still answered.
        let clear = !link.trouble.is_any() && ctx.now.since(link.clear_since) > 2 * SECOND;
        let member = link.serving && clear;
        if !all && member && ctx.now.since(since) > SILENT_AFTER {
            ctx.checker.violated(Rule::R14, ctx.now, || {
                format!("{node:?} takes probes of its neighbours, and has answered nobody since {since}")
            });
        }
    }

    /// Leaves the queue groups while it stalls, or may vouch for nothing, and joins them again (R14).
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

impl Waiting {
    fn probe(&self) -> Option<&Probe> {
        match self {
            Self::Agent(probe) => Some(probe),
            Self::Publisher => None,
        }
    }
}

fn tracker(ctx: &Ctx) -> ReceiptTracker {
    let bound = ctx.settings.bound;
    ReceiptTracker::new(TrackerConfig { bound, roster_delay: bound * 2, open_max: 100_000 }, [])
}
