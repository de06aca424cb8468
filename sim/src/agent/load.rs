//! What the cache doesn't have is asked of the origin: one question per key at a time, few at once (R10).

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use evictd_core::entry::Stamp;
use evictd_core::lease::{answers, may_join};
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::time::LeaseTime;

use super::verify::Verification;
use super::{Agent, AgentEvent, Entry};
use crate::ctx::Ctx;
use crate::net::{Audience, Found, Message, Nonce};
use crate::store::{KeyNumber, hash};
use crate::time::{MS, SECOND};
use crate::trace::trace;

/// How long "not found" is remembered.
pub(super) const NOT_FOUND_TTL: Duration = Duration::from_secs(10);

/// After which silence a load is repeated, once.
const LOAD_TIMEOUT: u64 = SECOND;

/// Loads that one verification waits for.
const LOADS_MAX: u8 = 2;

/// A load under way.
#[derive(Debug)]
pub(super) struct Flight {
    nonce: Nonce,
    sent_at: LeaseTime,
    last_try: bool,
    from_replica: bool,
    landing: Option<Rc<Entry>>,
    as_of: LogPosition,
    waiting: Vec<Verification>,
}

/// What a load that arrived does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Landing {
    /// It was inserted, hidden; now look at the floors, and show it.
    Check,
    /// Without R9: it was checked; now insert it, shown.
    InsertShown,
    /// It isn't under way any more; those who waited get it.
    Hand,
}

/// Why there is no record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Denial {
    /// Too many loads.
    Busy,
    /// Nobody answered.
    Unreachable,
    /// What arrived is too old, twice.
    Stale,
}

impl Agent {
    /// Loads for a verification, joining a load that is under way already.
    pub(super) fn load(&mut self, ctx: &mut Ctx, mut verification: Verification) {
        let key = verification.key;
        verification.loads += 1;
        if let Some(flight) = &mut self.flights[key.0] {
            return flight.waiting.push(verification);
        }
        if self.flying >= ctx.settings.loads_max {
            return self.deny(ctx, &verification, Denial::Busy);
        }
        // What a replica gave and was too old is asked of the authority.
        let from_replica = self.replica_lag.is_some() && verification.loads == 1;
        let flight = Flight {
            nonce: 0,
            sent_at: LeaseTime(0),
            last_try: false,
            from_replica,
            landing: None,
            as_of: LogPosition::ZERO,
            waiting: vec![verification],
        };
        self.flights[key.0] = Some(Box::new(flight));
        self.flying += 1;
        self.ask(ctx, key);
    }

    fn ask(&mut self, ctx: &mut Ctx, key: KeyNumber) {
        let (now, nonce) = (self.clock(ctx), self.next_nonce);
        let Some(flight) = &mut self.flights[key.0] else { return };
        self.next_nonce += 1;
        (flight.nonce, flight.sent_at) = (nonce, now);
        if flight.from_replica {
            let at = ctx.now.after(ctx.dice.span(2 * MS));
            return self.later(ctx, at, AgentEvent::Replica(key, nonce));
        }
        let lookup = Message::Lookup { from: self.node(), life: self.life(), nonce, key };
        if ctx.ask(self.node(), Audience::Questions, lookup) {
            let timeout = self.process.clock.moment(now.after(Duration::from_micros(LOAD_TIMEOUT)));
            self.later(ctx, timeout, AgentEvent::Timeout(key, nonce));
        } else {
            self.unreachable(ctx, key, nonce);
        }
    }

    /// The load whose newest question has this number, unless it has landed.
    fn asked(&mut self, key: KeyNumber, nonce: Nonce) -> Option<&mut Flight> {
        let flight = self.flights[key.0].as_deref_mut()?;
        let matches = flight.nonce == nonce || !Protection::AnswersMatchQuestions.holds();
        (flight.landing.is_none() && matches).then_some(flight)
    }

    pub(super) fn timed_out(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce) {
        let Some(flight) = self.flights[key.0].as_deref_mut() else { return };
        if flight.nonce != nonce || flight.landing.is_some() {
            return;
        }
        if std::mem::replace(&mut flight.last_try, true) {
            self.unreachable(ctx, key, nonce);
        } else {
            self.ask(ctx, key);
        }
    }

    pub(super) fn unreachable(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce) {
        if self.asked(key, nonce).is_none() {
            return;
        }
        if let Some(flight) = self.take_flight(key) {
            for verification in flight.waiting {
                self.deny(ctx, &verification, Denial::Unreachable);
            }
        }
    }

    fn take_flight(&mut self, key: KeyNumber) -> Option<Box<Flight>> {
        let flight = self.flights[key.0].take();
        self.flying -= usize::from(flight.is_some());
        flight
    }

    /// An answer arrives: inserted hidden, then checked, then shown (R9).
    pub(super) fn arrived(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce, found: Found) {
        let Some(flight) = self.asked(key, nonce) else { return };
        let Found { read, fence_age } = found;
        flight.as_of = read.as_of;
        // A replica vouches for no time: what it gives lives by proofs alone (R8).
        let read_at = if flight.from_replica { LeaseTime(0) } else { flight.sent_at.before(fence_age) };
        let (anchors, _) = {
            let mut effects = Vec::new();
            (self.follower.anchors(&read.record, &mut effects), effects)
        };
        let entry = Rc::new(Entry {
            key,
            stamp: Stamp::new(read.as_of, read_at, anchors),
            lsn: read.lsn,
            api: read.api,
            workspace: read.workspace,
            record: read.record,
            counted: Cell::new(false),
        });
        let Some(flight) = &mut self.flights[key.0] else { return };
        flight.landing = Some(entry.clone());
        if Protection::EntriesAppearChecked.holds() {
            self.insert(ctx, key, entry);
            self.proceed(ctx, key, Landing::Check);
        } else if self.follower.admits(&hash(key), &entry.stamp.anchors, entry.stamp.as_of()) {
            self.proceed(ctx, key, Landing::InsertShown);
        } else {
            self.proceed(ctx, key, Landing::Hand);
        }
    }

    fn insert(&mut self, ctx: &mut Ctx, key: KeyNumber, entry: Rc<Entry>) {
        self.evict(ctx, key);
        self.cache[key.0] = Some(entry);
    }

    fn proceed(&mut self, ctx: &mut Ctx, key: KeyNumber, next: Landing) {
        if ctx.dice.permille(ctx.settings.preempted_permille) {
            let at = Self::pause(ctx);
            self.later(ctx, at, AgentEvent::Land(key, next));
        } else {
            self.land(ctx, key, next);
        }
    }

    pub(super) fn land(&mut self, ctx: &mut Ctx, key: KeyNumber, landing: Landing) {
        let Some(entry) = self.flights[key.0].as_ref().and_then(|flight| flight.landing.clone()) else {
            return;
        };
        match landing {
            Landing::Check => {
                let as_of = entry.stamp.as_of();
                if self.follower.admits(&hash(key), &entry.stamp.anchors, as_of) {
                    entry.stamp.show();
                } else {
                    trace!(ctx, "{:?} refuses a load of {key:?} as of {as_of}", self.node());
                    self.evict(ctx, key);
                }
                self.proceed(ctx, key, Landing::Hand);
            }
            Landing::InsertShown => {
                entry.stamp.show();
                self.insert(ctx, key, entry);
                self.proceed(ctx, key, Landing::Hand);
            }
            Landing::Hand => self.hand_out(ctx, key, &entry),
        }
    }

    /// Whoever comes later doesn't join what is over; whoever waited gets it, if it is for them.
    fn hand_out(&mut self, ctx: &mut Ctx, key: KeyNumber, entry: &Rc<Entry>) {
        let Some(flight) = self.take_flight(key) else { return };
        for verification in flight.waiting {
            let now = self.clock(ctx);
            // The proof before the floors, as everywhere (R9).
            let proven_at = self.proven_at;
            let floor = self.follower.floor(&hash(key), &entry.stamp.anchors);
            let began = verification.began;
            let proof = if flight.as_of >= floor { proven_at } else { began.proven_at };
            let fits = may_join(self.bound, flight.sent_at, began.at, began.proven_at)
                && answers(flight.as_of, floor, began.applied)
                && self.bound.allows(now, entry.stamp.read_at, proof);
            if fits {
                self.answer(ctx, &verification, entry);
            } else if verification.loads < LOADS_MAX {
                self.load(ctx, verification);
            } else {
                self.deny(ctx, &verification, Denial::Stale);
            }
        }
    }

    fn deny(&self, ctx: &mut Ctx, verification: &Verification, why: Denial) {
        trace!(ctx, "{:?} denies {:?}: {why:?}", self.node(), verification.key);
        ctx.denied(self.node(), verification.key, why);
    }
}
