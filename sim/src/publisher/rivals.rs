//! Other publishers: who else is there, and for which history they speak (R15).
//!
//! Answers are given after a durable round that began when the question was here.

use std::time::Duration;

use evictd_core::history::{Past, Provenance, RoundToken};
use evictd_core::rules::Rule;
use evictd_core::service::{Connectivity, Peer, Query, Standing};
use evictd_core::time::LeaseTime;

use super::{Publisher, PublisherEvent};
use crate::ctx::Ctx;
use crate::net::{Introduction, Message, Nonce};
use crate::queue::{Life, Node};
use crate::store::Store;
use crate::time::{MS, Micros};
use crate::trace::trace;

/// How often the standing is looked at.
const BEAT: Micros = 250 * MS;

/// How often a publisher whose store doesn't know a past looks whether that was settled.
const REREAD_EVERY: Duration = Duration::from_secs(1);

/// A question of another publisher.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitingQuery {
    from: Node,
    life: Life,
    nonce: Nonce,
    came: LeaseTime,
}

impl Publisher {
    /// How it stands.
    pub fn standing(&self) -> Standing {
        self.service.standing()
    }

    pub(super) fn beat(&mut self, ctx: &mut Ctx, store: &mut Store) {
        let next = ctx.now.after(BEAT);
        self.later(ctx, next, PublisherEvent::Beat);
        let now = self.clock(ctx);
        let connectivity =
            match (ctx.net.links[self.node().0].connected, self.rounds.stalled(now, super::PATIENCE)) {
                (_, true) => Connectivity::Stalled,
                (false, false) => Connectivity::Disconnected,
                (true, false) => Connectivity::Connected,
            };
        let query = self.service.poll(connectivity, now);
        self.query(ctx, query);
        self.begin_alone(ctx, store);
        self.look_for_awaited_past(ctx, store);
        self.keep_silent(ctx);
    }

    fn begin_alone(&mut self, ctx: &mut Ctx, store: &mut Store) {
        if self.service.wants_incarnation() && store.open(ctx, self.node()) {
            self.reread(ctx, store);
            self.service.on_incarnation_begun();
        }
    }

    /// An operator may have declared that this store replaces the one whose past it doesn't know.
    fn look_for_awaited_past(&mut self, ctx: &mut Ctx, store: &Store) {
        let Some(awaited) = self.service.unknown_past().copied() else { return };
        let now = self.clock(ctx);
        if now.since(self.reread_at) < REREAD_EVERY {
            return;
        }
        self.reread_at = now;
        self.reread(ctx, store);
        let (Some(known), Some(head)) = (&self.known, store.head(ctx, self.node())) else { return };
        let own = store.row_token(ctx, self.node(), awaited.at);
        if known.history.judge_row(&awaited, head.at, own) != Past::Unknown {
            self.service.on_past_resolved();
        }
    }

    fn reread(&mut self, ctx: &mut Ctx, store: &Store) {
        if let Some(head) = store.head(ctx, self.node()) {
            self.note(ctx, store, &head);
        }
    }

    pub(super) fn on_publisher(&mut self, ctx: &mut Ctx, store: &mut Store, message: &Message) {
        match message {
            Message::PublisherQuery { from, life, query, introduction } => {
                if self.is_foreign(introduction.peer.provenance) && query.standing != Standing::Asking {
                    self.question(ctx);
                }
                let came = self.clock(ctx);
                self.queries.push(WaitingQuery { from: *from, life: *life, nonce: query.nonce, came });
                self.want_round(ctx, store);
            }
            Message::PublisherAnswer { nonce, introduction } => {
                let Introduction { peer, round } = &**introduction;
                let Some(is_colleague) = self.is_colleague(ctx, store, peer.provenance, *round) else {
                    return;
                };
                let now = self.clock(ctx);
                if is_colleague {
                    self.service.on_same_history(*nonce, peer.standing, now);
                } else {
                    let before = self.standing();
                    self.service.on_rival(*nonce, peer.clone(), now);
                    if self.standing() == Standing::Yielding && before != Standing::Yielding {
                        self.count_yielding(ctx);
                    }
                    trace!(ctx, "{:?} meets {peer:?}, and is {:?}", self.node(), self.standing());
                }
            }
            Message::NoPublisher { nonce } => {
                self.service.on_no_responders(*nonce, self.clock(ctx));
                self.begin_alone(ctx, store);
            }
            Message::Tick(voucher, round) => {
                let provenance = voucher.milestone.provenance;
                if self.is_foreign(provenance)
                    || self.is_colleague(ctx, store, provenance, *round) == Some(false)
                {
                    self.question(ctx);
                }
            }
            Message::Live(voucher, _) if self.is_foreign(voucher.milestone.provenance) => self.question(ctx),
            _ => {}
        }
    }

    fn count_yielding(&self, ctx: &mut Ctx) {
        if ctx.is_at_copy(self.node()) {
            ctx.checker.counts.copies += 1;
        } else {
            let what = || format!("{:?} yields to a copy of its store", self.node());
            ctx.checker.violated(Rule::R15, ctx.now, what);
        }
    }

    fn is_foreign(&self, provenance: Provenance) -> bool {
        self.known.as_ref().is_none_or(|known| known.history.provenance() != provenance)
    }

    /// Whether another publisher works on the same store: it speaks for the same history, and this publisher's own
    /// connection to the store shows its rounds. `None` if the store can't be asked.
    fn is_colleague(
        &mut self,
        ctx: &mut Ctx,
        store: &Store,
        provenance: Provenance,
        round: RoundToken,
    ) -> Option<bool> {
        // It may have begun an incarnation that this publisher hasn't heard of yet.
        self.reread(ctx, store);
        let has_round = round == RoundToken(0) || store.has_round_token(ctx, self.node(), round)?;
        Some(!self.is_foreign(provenance) && has_round)
    }

    fn question(&mut self, ctx: &mut Ctx) {
        let query = self.service.on_foreign(self.clock(ctx));
        self.query(ctx, query);
    }

    fn query(&self, ctx: &mut Ctx, query: Option<Query>) {
        let (Some(query), Some(introduction)) = (query, self.introduction()) else { return };
        let (from, life) = (self.node(), self.process.life);
        let message = Message::PublisherQuery { from, life, query, introduction };
        ctx.ask_publishers(from, query.nonce, &message);
    }

    fn introduction(&self) -> Option<Box<Introduction>> {
        let history = &self.known.as_ref()?.history;
        let peer = Peer {
            publisher: format!("{:?}", self.node()).into(),
            provenance: history.provenance(),
            since: history.current().time,
            standing: self.standing(),
        };
        Some(Box::new(Introduction { peer, round: self.round }))
    }

    /// A round that began after a question came shows that this publisher's store is still the primary.
    pub(super) fn answer_queries(&mut self, ctx: &mut Ctx, began: LeaseTime) {
        let Some(introduction) = self.introduction() else { return };
        let (due, waiting) =
            std::mem::take(&mut self.queries).into_iter().partition(|query| query.came <= began);
        self.queries = waiting;
        let due: Vec<WaitingQuery> = due;
        for WaitingQuery { from, life, nonce, .. } in due {
            if ctx.net.links[from.0].life == life {
                let answer = Message::PublisherAnswer { nonce, introduction: introduction.clone() };
                ctx.send(self.node(), from, answer);
            }
        }
    }
}
