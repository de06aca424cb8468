//! A verification, step by step: clock, deadline, entry, floors (R9).

use evictd_core::serving::HitVerdict;

use super::SimAgent;
use crate::cached::SimEntry;
use crate::checker::GivenAnswer;
use crate::ctx::Ctx;
use crate::event::AgentEvent;
use crate::rows::{KeyNumber, hash};
use crate::steps::{SimVerification, VerifyStep};
use crate::time::SECOND;
use crate::trace::trace;

impl SimAgent {
    /// Begins a verification.
    pub fn verify(&mut self, ctx: &mut Ctx, key: KeyNumber) {
        let mut verification = SimVerification {
            key,
            started: ctx.now,
            confirmed: self.announced,
            began: None,
            step: VerifyStep::Begun,
            loads: 0,
        };
        if ctx.dice.permille(ctx.settings.preempted_permille) {
            return self.step_and_pause(ctx, Box::new(verification));
        }
        while self.step(ctx, &mut verification) {}
        self.conclude(ctx, verification);
    }

    /// One step, then a pause.
    pub(super) fn step_and_pause(&mut self, ctx: &mut Ctx, mut verification: Box<SimVerification>) {
        if self.step(ctx, &mut verification) {
            let stalls = ctx.dice.permille(ctx.settings.stalled_verifications_permille);
            let at = if stalls { ctx.now.after(ctx.dice.below(2 * SECOND)) } else { Self::pause(ctx) };
            self.later(ctx, at, AgentEvent::Verify(verification));
        } else {
            self.conclude(ctx, *verification);
        }
    }

    /// Does the next step. Returns whether another one follows.
    fn step(&self, ctx: &Ctx, verification: &mut SimVerification) -> bool {
        let next = match std::mem::replace(&mut verification.step, VerifyStep::Judged(None)) {
            VerifyStep::Begun => VerifyStep::Clock(self.clock(ctx)),
            VerifyStep::Clock(now) => {
                let reading = self.state.begin(now);
                verification.began = Some(reading);
                VerifyStep::Read(reading)
            }
            VerifyStep::Read(reading) => {
                let candidate = reading.find(&self.state, &self.cache, &hash(verification.key));
                candidate.map_or(VerifyStep::Judged(None), VerifyStep::Found)
            }
            VerifyStep::Found(candidate) => VerifyStep::Judged(match candidate.judge(&self.state) {
                HitVerdict::Servable(hit) => Some(hit.answer(&self.state)),
                HitVerdict::Stale { .. } | HitVerdict::Void => None,
            }),
            judged @ VerifyStep::Judged(_) => judged,
        };
        let has_next = !matches!(next, VerifyStep::Judged(_));
        verification.step = next;
        has_next
    }

    fn conclude(&mut self, ctx: &mut Ctx, mut verification: SimVerification) {
        match std::mem::replace(&mut verification.step, VerifyStep::Judged(None)) {
            VerifyStep::Judged(Some(entry)) => self.answer(ctx, &verification, &entry),
            _ => self.load(ctx, verification),
        }
    }

    pub(super) fn answer(&self, ctx: &mut Ctx, verification: &SimVerification, entry: &SimEntry) {
        let answer = GivenAnswer {
            agent: self.node(),
            started: verification.started,
            confirmed: verification.confirmed,
            place: entry.place,
        };
        let (lsn, as_of) = (entry.place.lsn.0, entry.validity.as_of());
        trace!(ctx, "{:?} answers {:?} as of {lsn} ({as_of})", self.node(), verification.key);
        ctx.checker.answered(ctx.now, answer);
    }
}
