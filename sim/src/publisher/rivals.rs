//! Other publishers, and their histories (R15).
//!
//! Answers are given after a durable round that began after the query arrived.

use std::time::Duration;

use evictd_core::history::{BeginCause, Past, Provenance, RoundToken};
use evictd_core::rules::Rule;
use evictd_core::service::{Connectivity, Peer, Query, Standing};
use evictd_core::time::LeaseTime;

use super::SimPublisher;
use crate::ctx::Ctx;
use crate::event::PublisherEvent;
use crate::message::SimMessage;
use crate::net::Audience;
use crate::store::SimStore;
use crate::time::{MS, Micros};
use crate::trace::trace;

/// How often the standing is checked.
const BEAT: Micros = 250 * MS;

/// How often a publisher that is behind checks whether its store was declared.
const REREAD_EVERY: Duration = Duration::from_secs(1);

impl SimPublisher {
    pub fn standing(&self) -> Standing {
        self.service.standing()
    }

    pub(super) fn beat(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
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
        self.begin_incarnation(ctx, store);
        self.note_yielding(ctx, store);
        self.check_awaited_past(ctx, store);
        self.keep_silent(ctx);
    }

    fn begin_incarnation(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        if self.service.wants_incarnation() && store.open(ctx, self.node(), BeginCause::Opened) {
            self.reread(ctx, store);
            self.service.on_incarnation_begun();
        }
    }

    /// After it has yielded for a bound, what its store began before replaces no past anymore.
    fn note_yielding(&mut self, ctx: &mut Ctx, store: &mut SimStore) {
        let supersedes = self.known.as_ref().is_some_and(|known| known.history.supersedes());
        if supersedes
            && self.service.yielded_to().is_some()
            && store.open(ctx, self.node(), BeginCause::Yielded)
        {
            self.reread(ctx, store);
        }
    }

    /// An operator may have declared that this store replaces the one with the unknown past.
    fn check_awaited_past(&mut self, ctx: &mut Ctx, store: &SimStore) {
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

    fn reread(&mut self, ctx: &mut Ctx, store: &SimStore) {
        if let Some(head) = store.head(ctx, self.node()) {
            self.note(ctx, store, &head);
        }
    }

    pub(super) fn on_publisher(&mut self, ctx: &mut Ctx, store: &mut SimStore, message: &SimMessage) {
        match message {
            SimMessage::PublisherQuery(reply_to, standing, provenance) => {
                if self.is_foreign(*provenance) && *standing != Standing::Asking {
                    self.query_rivals(ctx);
                }
                self.queries.push((*reply_to, self.clock(ctx)));
                self.want_round(ctx, store);
            }
            SimMessage::PublisherAnswer(nonce, peer, round) => {
                let Some(is_colleague) = self.is_colleague(ctx, store, peer.provenance, *round) else {
                    return;
                };
                let now = self.clock(ctx);
                if is_colleague {
                    self.service.on_same_history(*nonce, peer.standing, now);
                } else {
                    let before = self.standing();
                    self.service.on_rival(*nonce, Peer::clone(peer), now);
                    if self.standing() == Standing::Yielding && before != Standing::Yielding {
                        self.count_yielding(ctx);
                    }
                    trace!(ctx, "{:?} meets {peer:?}, and is {:?}", self.node(), self.standing());
                }
            }
            SimMessage::NoPublisher(nonce) => {
                self.service.on_no_responders(*nonce, self.clock(ctx));
                self.begin_incarnation(ctx, store);
            }
            SimMessage::Tick(voucher, round) => {
                let provenance = voucher.milestone.provenance;
                if self.is_foreign(provenance)
                    || self.is_colleague(ctx, store, provenance, *round) == Some(false)
                {
                    self.query_rivals(ctx);
                }
            }
            SimMessage::Live(voucher, _) if self.is_foreign(voucher.milestone.provenance) => {
                self.query_rivals(ctx);
            }
            _ => {}
        }
    }

    fn count_yielding(&self, ctx: &mut Ctx) {
        if ctx.is_at_copy(self.node()) {
            ctx.checker.counts.copies += 1;
        } else {
            ctx.violated(Rule::R15, format!("{:?} yields to a copy of its store", self.node()));
        }
    }

    fn is_foreign(&self, provenance: Provenance) -> bool {
        self.known.as_ref().is_none_or(|known| known.history.provenance() != provenance)
    }

    /// Whether another publisher works on the same store: it has the same history, and this publisher's own
    /// connection to the store shows its rounds. `None` if the store can't be read.
    fn is_colleague(
        &mut self,
        ctx: &mut Ctx,
        store: &SimStore,
        provenance: Provenance,
        round: RoundToken,
    ) -> Option<bool> {
        // It may have begun an incarnation that this publisher hasn't read yet.
        self.reread(ctx, store);
        let has_round = round == RoundToken(0) || store.has_round_token(ctx, self.node(), round)?;
        Some(!self.is_foreign(provenance) && has_round)
    }

    fn query_rivals(&mut self, ctx: &mut Ctx) {
        let query = self.service.on_foreign(self.clock(ctx));
        self.query(ctx, query);
    }

    fn query(&self, ctx: &mut Ctx, query: Option<Query>) {
        let (Some(Query { nonce, standing }), Some(known)) = (query, &self.known) else { return };
        let (reply_to, provenance) = (self.process.reply_to(nonce), known.history.provenance());
        let query = SimMessage::PublisherQuery(reply_to, standing, provenance);
        ctx.send_query(self.node(), Audience::All, &query);
    }

    /// A round that began after a query arrived shows that this publisher's store is still the primary.
    pub(super) fn answer_queries(&mut self, ctx: &mut Ctx, began: LeaseTime) {
        let Some(known) = &self.known else { return };
        let peer = Peer {
            publisher: format!("{:?}", self.node()).into(),
            provenance: known.history.provenance(),
            since: known.history.current().time,
            standing: self.standing(),
        };
        for (reply_to, _) in self.queries.extract_if(.., |(_, arrived)| *arrived <= began).collect::<Vec<_>>()
        {
            let (nonce, peer) = (reply_to.nonce, Box::new(peer.clone()));
            self.reply(ctx, reply_to, SimMessage::PublisherAnswer(nonce, peer, self.round));
        }
    }
}
