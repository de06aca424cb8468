//! Loads of what the cache doesn't have: one query per key at a time, few at once (R10).

use std::cell::Cell;
use std::time::Duration;

use evictd_core::follower::LoadSource;
use evictd_core::serving::{EntryCache, LoadAnswer, LoadedEntry, SettledEntry};
use evictd_core::time::LeaseTime;

use super::SimAgent;
use crate::cached::SimEntry;
use crate::ctx::{Ctx, DenialReason};
use crate::event::AgentEvent;
use crate::message::SimMessage;
use crate::net::Audience;
use crate::node::Nonce;
use crate::rows::{KeyNumber, Snapshot, hash};
use crate::steps::{LoadStep, OpenLoad, SimVerification};
use crate::time::{MS, SECOND};
use crate::trace::trace;

/// The time that a "not found" is cached.
pub(super) const NOT_FOUND_TTL: Duration = Duration::from_secs(10);

/// The time without an answer after which a load is repeated, once.
const LOAD_TIMEOUT: u64 = SECOND;

/// Insertions that evict another entry, of 1,000.
const EVICTING_PERMILLE: u32 = 50;

/// Loads of one agent at once.
const LOADING_MAX: usize = 256;

/// Loads that one verification waits for.
const LOADS_MAX: u8 = 2;

impl SimAgent {
    /// Loads for a verification, or shares the load under way.
    pub(super) fn load(&mut self, ctx: &mut Ctx, mut verification: SimVerification) {
        let key = verification.key;
        verification.loads += 1;
        if let Some(load) = &mut self.loads[key.0] {
            return load.waiting.push(verification);
        }
        if self.loading >= LOADING_MAX {
            return self.deny(ctx, &verification, DenialReason::Busy);
        }
        // If a replica's answer was too old, the authority is queried.
        let from_replica = self.replica_lag.is_some() && verification.loads == 1;
        let load = OpenLoad { from_replica, waiting: vec![verification], ..OpenLoad::default() };
        self.loads[key.0] = Some(Box::new(load));
        self.loading += 1;
        self.query(ctx, key);
    }

    fn query(&mut self, ctx: &mut Ctx, key: KeyNumber) {
        let (now, nonce) = (self.clock(ctx), self.next_nonce);
        let Some(load) = &mut self.loads[key.0] else { return };
        self.next_nonce += 1;
        (load.nonce, load.sent_at) = (nonce, now);
        if load.from_replica {
            let at = ctx.now.after(ctx.dice.span(2 * MS));
            return self.later(ctx, at, AgentEvent::Replica(key, nonce));
        }
        let lookup = SimMessage::Lookup(self.process.reply_to(nonce), key);
        if ctx.send_query(self.node(), Audience::One, &lookup) {
            let timeout = self.process.clock.moment(now.after(Duration::from_micros(LOAD_TIMEOUT)));
            self.later(ctx, timeout, AgentEvent::Timeout(key, nonce));
        } else {
            self.unreachable(ctx, key, nonce);
        }
    }

    /// The load whose newest query has this number, unless it was answered.
    fn open_load(&mut self, key: KeyNumber, nonce: Nonce) -> Option<&mut OpenLoad> {
        let load = self.loads[key.0].as_deref_mut()?;
        (load.step.is_none() && load.nonce == nonce).then_some(load)
    }

    pub(super) fn timed_out(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce) {
        let Some(load) = self.open_load(key, nonce) else { return };
        if std::mem::replace(&mut load.last_try, true) {
            self.unreachable(ctx, key, nonce);
        } else {
            self.query(ctx, key);
        }
    }

    pub(super) fn unreachable(&mut self, ctx: &mut Ctx, key: KeyNumber, nonce: Nonce) {
        if self.open_load(key, nonce).is_none() {
            return;
        }
        if let Some(load) = self.take_load(key) {
            for verification in load.waiting {
                self.deny(ctx, &verification, DenialReason::Unreachable);
            }
        }
    }

    fn take_load(&mut self, key: KeyNumber) -> Option<Box<OpenLoad>> {
        let load = self.loads[key.0].take();
        self.loading -= usize::from(load.is_some());
        load
    }

    /// An answer arrives.
    pub(super) fn arrived(
        &mut self,
        ctx: &mut Ctx,
        key: KeyNumber,
        nonce: Nonce,
        source: LoadSource,
        read: Snapshot,
        fence_age: Duration,
    ) {
        let Some(load) = self.open_load(key, nonce) else { return };
        let sent_at = load.sent_at;
        // A replica's read proves nothing: its record depends on the lease alone (R8).
        let read_at = if load.from_replica { LeaseTime(0) } else { sent_at.before(fence_age) };
        let answer = LoadAnswer { hash: hash(key), source, as_of: read.as_of, read_at, sent_at };
        let not_found_ttl = NOT_FOUND_TTL.min(self.state.bound.bound());
        let place = read.place;
        let new_entry = |record, validity| {
            let counted = Cell::new(false);
            let answers = self.cache.exposure.answers_of(&record);
            SimEntry { record, validity, sent_at, not_found_ttl, place, counted, answers }
        };
        let loaded = LoadedEntry::new(&self.state, answer, read.record, &mut Vec::new(), new_entry);
        self.proceed(ctx, key, LoadStep::Loaded(loaded));
    }

    /// Sometimes evicts another entry, as for lack of room.
    fn make_room(&self, ctx: &mut Ctx) {
        if ctx.dice.permille(EVICTING_PERMILLE) {
            let other = hash(KeyNumber(ctx.dice.index(ctx.settings.keys)));
            if let Some(entry) = self.cache.evict(&other) {
                self.count_end(ctx, &entry);
            }
        }
    }

    fn proceed(&mut self, ctx: &mut Ctx, key: KeyNumber, next: LoadStep) {
        let Some(load) = &mut self.loads[key.0] else { return };
        load.step = Some(next);
        if ctx.dice.permille(ctx.settings.preempted_permille) {
            let at = Self::pause(ctx);
            self.later(ctx, at, AgentEvent::StepLoad(key));
        } else {
            self.step_load(ctx, key);
        }
    }

    pub(super) fn step_load(&mut self, ctx: &mut Ctx, key: KeyNumber) {
        let Some(step) = self.loads[key.0].as_mut().and_then(|load| load.step.take()) else {
            return;
        };
        let next = match step {
            LoadStep::Loaded(loaded) => {
                self.make_room(ctx);
                if let Some(replaced) = self.cache.get(&hash(key)) {
                    self.count_end(ctx, &replaced);
                }
                LoadStep::Inserted(loaded.insert(&self.cache))
            }
            LoadStep::Inserted(inserted) => {
                let settled = inserted.settle(&self.state, &self.cache);
                if !settled.is_admitted() {
                    trace!(ctx, "{:?} refuses a load of {key:?}", self.node());
                }
                LoadStep::Settled(settled)
            }
            LoadStep::Settled(settled) => return self.answer_waiting(ctx, key, &settled),
        };
        self.proceed(ctx, key, next);
    }

    /// Ends the load, so that no later verification shares it, and answers the waiting ones.
    fn answer_waiting(&mut self, ctx: &mut Ctx, key: KeyNumber, settled: &SettledEntry<SimEntry>) {
        let Some(load) = self.take_load(key) else { return };
        for verification in load.waiting {
            let Some(began) = verification.began else { continue };
            if let Some(entry) = settled.answer(&self.state, began, self.clock(ctx)) {
                self.answer(ctx, &verification, &entry);
            } else if verification.loads < LOADS_MAX {
                self.load(ctx, verification);
            } else {
                self.deny(ctx, &verification, DenialReason::Stale);
            }
        }
    }

    fn deny(&self, ctx: &mut Ctx, verification: &SimVerification, why: DenialReason) {
        trace!(ctx, "{:?} denies {:?}: {why:?}", self.node(), verification.key);
        ctx.denied(self.node(), verification.key, why);
    }
}
