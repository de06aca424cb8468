//! A verification, step by step: clock, deadline, entry, floors (R9).

use std::rc::Rc;

use evictd_core::entry::{Reading, Standing};
use evictd_core::position::LogPosition;
use evictd_core::protection::Protection;
use evictd_core::time::LeaseTime;

use super::{Agent, AgentEvent, Entry};
use crate::checker::Answer;
use crate::ctx::Ctx;
use crate::store::KeyNumber;
use crate::time::{Moment, SECOND};
use crate::trace::trace;

/// What a verification does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Begin,
    Clock,
    Entry,
    Floors,
    /// Only without R9's order.
    Deadline,
}

/// What was known when it began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Began {
    /// Since when nothing could have been missed.
    pub proven_at: LeaseTime,
    /// Applied, and so to be in the answer (G2).
    pub applied: LogPosition,
    /// When, on the lease clock.
    pub at: LeaseTime,
}

/// A verification under way.
#[derive(Clone, Debug)]
pub struct Verification {
    /// Of what.
    pub key: KeyNumber,
    /// When it began: for the checker.
    started: Moment,
    /// What the agent had confirmed then: for the checker.
    confirmed: LogPosition,
    /// What it builds on.
    pub began: Began,
    reading: Option<Reading>,
    entry: Option<Rc<Entry>>,
    step: Step,
    /// Loads that it waited for.
    pub loads: u8,
}

impl Agent {
    /// Somebody asks for a verdict.
    pub fn verify(&mut self, ctx: &mut Ctx, key: KeyNumber) {
        let mut verification = Verification {
            key,
            started: ctx.now,
            confirmed: self.announced,
            began: Began::default(),
            reading: None,
            entry: None,
            step: Step::Begin,
            loads: 0,
        };
        if ctx.dice.permille(ctx.settings.preempted_permille) {
            return self.go_on(ctx, Box::new(verification));
        }
        while self.step(ctx, &mut verification) {}
        self.conclude(ctx, verification);
    }

    /// One step, then a pause.
    pub(super) fn go_on(&mut self, ctx: &mut Ctx, mut verification: Box<Verification>) {
        if self.step(ctx, &mut verification) {
            let stalls = ctx.dice.permille(ctx.settings.stalled_verifications_permille);
            let at = if stalls { ctx.now.after(ctx.dice.below(2 * SECOND)) } else { Self::pause(ctx) };
            self.later(ctx, at, AgentEvent::Verify(verification));
        } else {
            self.conclude(ctx, *verification);
        }
    }

    /// Does the next step; tells whether another one follows.
    fn step(&mut self, ctx: &mut Ctx, verification: &mut Verification) -> bool {
        match verification.step {
            Step::Begin => {
                verification.began =
                    Began { proven_at: self.proven_at, applied: self.applied, at: self.clock(ctx) };
                verification.step = Step::Clock;
            }
            Step::Clock => {
                let (now, applied) = (self.clock(ctx), verification.began.applied);
                let proven_at = if Protection::DeadlinePrecedesFloors.holds() {
                    self.proven_at
                } else {
                    LeaseTime(u64::MAX) // Read later, in the wrong order.
                };
                verification.reading = Some(Reading { now, proven_at, applied });
                verification.step = Step::Entry;
            }
            Step::Entry => {
                verification.entry.clone_from(&self.cache[verification.key.0]);
                verification.step = Step::Floors;
                return verification.entry.is_some();
            }
            Step::Floors => {
                self.judge(verification);
                verification.step = Step::Deadline;
                return !Protection::DeadlinePrecedesFloors.holds() && verification.entry.is_some();
            }
            Step::Deadline => {
                let proven_at = self.proven_at;
                if let (Some(entry), Some(reading)) = (&verification.entry, verification.reading)
                    && !self.bound.allows(reading.now, entry.stamp.read_at, proven_at)
                {
                    verification.entry = None;
                }
                return false;
            }
        }
        true
    }

    /// Drops the entry unless it may be answered from.
    fn judge(&self, verification: &mut Verification) {
        let (Some(entry), Some(reading)) = (&verification.entry, verification.reading) else { return };
        let standing = entry.stamp.standing(reading, &self.horizon, self.bound);
        let age = reading.now.since(entry.stamp.read_at);
        let worn = entry.is_not_found() && age >= super::load::NOT_FOUND_TTL.min(self.bound.bound());
        if standing == Standing::Servable && !worn {
            entry.stamp.lift(reading.applied);
        } else {
            verification.entry = None;
        }
    }

    fn conclude(&mut self, ctx: &mut Ctx, mut verification: Verification) {
        match verification.entry.take() {
            Some(entry) => self.answer(ctx, &verification, &entry),
            None => self.load(ctx, verification),
        }
    }

    pub(super) fn answer(&self, ctx: &mut Ctx, verification: &Verification, entry: &Entry) {
        let answer = Answer {
            agent: self.node(),
            key: verification.key,
            started: verification.started,
            confirmed: verification.confirmed,
            lsn: entry.lsn,
            api: entry.api,
            workspace: entry.workspace,
        };
        trace!(
            ctx,
            "{:?} answers {:?} as of {} ({})",
            self.node(),
            verification.key,
            entry.lsn.0,
            entry.stamp.as_of()
        );
        ctx.checker.answered(ctx.now, answer);
    }
}
