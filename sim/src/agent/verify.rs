//! A verification, step by step: clock, deadline, entry, floors (R9).

use std::sync::Arc;

use evictd_core::serving::{Candidate, HitVerdict, VerificationStart};
use evictd_core::time::LeaseTime;

use super::{Agent, AgentEvent, Entry};
use crate::checker::{Answer, Confirmed};
use crate::ctx::Ctx;
use crate::store::{KeyNumber, hash};
use crate::time::{Moment, SECOND};
use crate::trace::trace;

/// How far a verification is: what the core gave it last.
#[derive(Clone, Debug)]
enum Step {
    Begun,
    Clock(LeaseTime),
    Read(VerificationStart),
    Found(Candidate<Entry>),
    Judged(Option<Arc<Entry>>),
}

/// A verification under way.
#[derive(Clone, Debug)]
pub struct Verification {
    /// Of what.
    pub key: KeyNumber,
    /// When it began: for the checker.
    started: Moment,
    /// What the agent had confirmed then: for the checker.
    confirmed: Confirmed,
    /// What it builds on, from when it was read.
    pub began: Option<VerificationStart>,
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
            began: None,
            step: Step::Begun,
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
    fn step(&self, ctx: &Ctx, verification: &mut Verification) -> bool {
        let next = match std::mem::replace(&mut verification.step, Step::Judged(None)) {
            Step::Begun => Step::Clock(self.clock(ctx)),
            Step::Clock(now) => {
                let reading = self.state.begin(now);
                verification.began = Some(reading);
                Step::Read(reading)
            }
            Step::Read(reading) => {
                let candidate = reading.find(&self.state, &self.cache, &hash(verification.key));
                candidate.map_or(Step::Judged(None), Step::Found)
            }
            Step::Found(candidate) => Step::Judged(match candidate.judge(&self.state) {
                HitVerdict::Servable(hit) => Some(hit.answer(&self.state)),
                HitVerdict::Stale { .. } | HitVerdict::Void => None,
            }),
            judged @ Step::Judged(_) => judged,
        };
        let goes_on = !matches!(next, Step::Judged(_));
        verification.step = next;
        goes_on
    }

    fn conclude(&mut self, ctx: &mut Ctx, mut verification: Verification) {
        match std::mem::replace(&mut verification.step, Step::Judged(None)) {
            Step::Judged(Some(entry)) => self.answer(ctx, &verification, &entry),
            _ => self.load(ctx, verification),
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
            entry.validity.as_of()
        );
        ctx.checker.answered(ctx.now, answer);
    }
}
