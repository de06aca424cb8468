//! Compares the answers with what was really committed (G1..G5).
//!
//! The checker is outside the protocol: it has real time and every commit, and receives the agents' answers and
//! announcements, and the receipts. It uses no floors, leases or modes, except for liveness.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use evictd_core::history::{Begin, BeginCause, Incarnation};
use evictd_core::invalidation::Cause;
use evictd_core::position::LogPosition;
use evictd_core::receipts::RegionState;
use evictd_core::rules::Rule;

use crate::histogram::SpanHistogram;
use crate::node::NodeNumber;
use crate::rows::{ChangeNumber, ChangeTarget, Lsn, ReadPlace};
use crate::time::{Micros, Moment, SECOND};

/// A change, as it really was.
#[derive(Clone, Copy, Debug)]
struct CheckedChange {
    lsn: Lsn,
    target: ChangeTarget,
    /// When it became visible to other transactions.
    at: Moment,
    /// Its place in the log; of several rows, the first. `ZERO` until it has one.
    position: LogPosition,
    /// Which incarnation gave it: the same position may have been given before, and lost.
    giver: Ordinal,
    /// When a regression undid it.
    lost_at: Moment,
    /// When a receipt was first final.
    final_at: Moment,
    /// None if a regression made the change: the new epoch covers it.
    rows: u8,
    numbered: u8,
}

impl CheckedChange {
    fn is_covered_by(&self, confirmed: Confirmed) -> bool {
        self.position != LogPosition::ZERO && self.position <= confirmed.at && self.giver <= confirmed.giver
    }
}

/// Counts incarnations in the order of their beginnings.
type Ordinal = u32;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Confirmed {
    giver: Ordinal,
    at: LogPosition,
}

/// A broken rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    pub rule: Rule,
    pub at: Moment,
    pub what: String,
}

#[derive(Clone, Debug, Default)]
pub struct RunCounts {
    pub deletions: u64,
    pub answered: u64,
    /// Verifications denied for want of a fresh record.
    pub denied: u64,
    /// Answers from a state that wasn't the present one; all within the bound, unless there is a violation.
    pub behind: u64,
    pub epochs: u64,
    pub regressions: u64,
    /// Publishers of a copy that yielded.
    pub copies: u64,
    pub repairs: u64,
    pub receipts: u64,
    /// Receipts among them that elapsed.
    pub elapsed: u64,
    /// From a commit to the moment an agent that had the old state could no longer answer it.
    pub evicted: SpanHistogram,
}

/// An answer, and what it was made of.
#[derive(Clone, Copy, Debug)]
pub struct GivenAnswer {
    pub agent: NodeNumber,
    pub started: Moment,
    pub confirmed: Confirmed,
    pub place: ReadPlace,
}

/// What an agent really answered from before a change, after its commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exposed {
    pub committed: Moment,
    /// When the last such verification began; the commit if there was none.
    pub last_began: Moment,
    /// When the last such answer was given; the commit if there was none.
    pub last_given: Moment,
}

#[derive(Debug, Default)]
pub struct Checker {
    bound: Micros,
    changes: Vec<CheckedChange>,
    /// The changes of each row, in the order of their commits.
    of: HashMap<ChangeTarget, Vec<ChangeNumber>>,
    /// Where each incarnation has got to.
    ends: BTreeMap<Incarnation, (Ordinal, LogPosition)>,
    /// Every epoch that any store began, also those that were lost with the commit that began them.
    epochs: BTreeSet<u32>,
    /// The store was restored, and nothing in it shows that yet.
    is_restored: bool,
    /// Epochs that the server's own history began.
    branches: u64,
    /// Which change has each position. What a regression took back may be given again by another incarnation.
    log: BTreeMap<LogPosition, ChangeNumber>,
    /// Reversals that no epoch covers yet.
    unplaced: Vec<ChangeNumber>,
    /// By agent, answers that lacked something and when they were given, as long as it may not have been applied there.
    behind: BTreeMap<NodeNumber, Vec<(GivenAnswer, Moment)>>,
    pub violations: Vec<Violation>,
    pub counts: RunCounts,
}

/// How long a committed row may wait for its position without a fault.
const NUMBERING_GRACE: Micros = 5 * SECOND;

impl Checker {
    pub fn new(bound: Micros) -> Self {
        Self { bound, ..Self::default() }
    }

    pub fn violated(&mut self, rule: Rule, at: Moment, what: String) {
        self.violations.push(Violation { rule, at, what });
    }

    pub fn committed(
        &mut self,
        at: Moment,
        lsn: Lsn,
        target: ChangeTarget,
        cause: Cause,
        rows: usize,
    ) -> ChangeNumber {
        self.counts.deletions += u64::from(cause.is_deletion());
        self.add(target, at, lsn, rows as u8)
    }

    fn add(&mut self, target: ChangeTarget, at: Moment, lsn: Lsn, rows: u8) -> ChangeNumber {
        let id = ChangeNumber(self.changes.len() as u32);
        self.changes.push(CheckedChange {
            lsn,
            target,
            at,
            position: LogPosition::ZERO,
            giver: 0,
            lost_at: Moment::NEVER,
            final_at: Moment::NEVER,
            rows,
            numbered: 0,
        });
        self.of.entry(target).or_default().push(id);
        id
    }

    /// A row got its position (R1): the next one of its incarnation, never given before.
    pub fn numbered(
        &mut self,
        now: Moment,
        incarnation: Incarnation,
        change: ChangeNumber,
        position: LogPosition,
    ) {
        let (giver, end) = self.ends.entry(incarnation).or_default();
        let giver = *giver;
        let expected = end.next().unwrap_or(*end);
        *end = position.max(*end);
        self.log.insert(position, change);
        match position.cmp(&expected) {
            Ordering::Equal => {}
            Ordering::Less => {
                self.violated(Rule::R2, now, format!("position {position} was given a second time"));
            }
            Ordering::Greater => {
                self.violated(Rule::R1, now, format!("position {position} was given before {expected}"));
            }
        }
        let change = &mut self.changes[change.0 as usize];
        change.numbered += 1;
        if change.position == LogPosition::ZERO {
            (change.position, change.giver) = (position, giver);
        }
        if change.numbered > change.rows {
            self.violated(Rule::G3, now, format!("a row got a second position, {position}"));
        }
    }

    /// A regression took a row's position back.
    pub fn unnumbered(&mut self, change: ChangeNumber, position: LogPosition) {
        self.log.remove(&position);
        let change = &mut self.changes[change.0 as usize];
        change.numbered -= 1;
        change.position = LogPosition::ZERO;
    }

    /// A regression undid a change, which is another change, at `lsn`.
    pub fn lost(&mut self, now: Moment, change: ChangeNumber, lsn: Lsn, target: ChangeTarget) {
        let lost = &mut self.changes[change.0 as usize];
        if lost.lost_at == Moment::NEVER {
            lost.lost_at = now;
            let reversal = self.add(target, now, lsn, 0);
            self.unplaced.push(reversal);
        }
    }

    pub fn regressed(&mut self) {
        self.counts.regressions += 1;
        self.is_restored = true;
    }

    /// An incarnation began. An agent that confirms an epoch has evicted what a regression undid.
    pub fn incarnation_began(&mut self, now: Moment, begin: &Begin) {
        let (base, giver) = (begin.at, self.ends.len() as Ordinal + 1);
        self.ends.insert(begin.incarnation, (giver, base));
        if !begin.cause.begins_epoch() {
            return;
        }
        self.counts.epochs += 1;
        // A declared epoch may repeat one that was lost: agents that follow the lost one are denied until the operator
        // declares again.
        if !self.epochs.insert(base.epoch()) && begin.cause == BeginCause::Branched {
            self.violated(Rule::R2, now, format!("epoch {} began a second time", base.epoch()));
        }
        self.is_restored = false;
        self.branches += u64::from(begin.cause == BeginCause::Branched);
        if self.branches > self.counts.regressions {
            self.violated(Rule::R2, now, format!("epoch {base} began although nothing went back"));
        }
        for change in std::mem::take(&mut self.unplaced) {
            let change = &mut self.changes[change.0 as usize];
            (change.position, change.giver) = (base, giver);
        }
    }

    /// A client received success for its change (R4).
    pub fn reported_success(&mut self, now: Moment, change: Option<ChangeNumber>) {
        if change.is_none() {
            self.violated(Rule::G3, now, "success was answered for a change that isn't there".to_owned());
        }
    }

    /// What an agent has confirmed that announces a position of an incarnation.
    pub fn confirmed(&self, incarnation: Incarnation, at: LogPosition) -> Confirmed {
        let giver = self.ends.get(&incarnation).map_or(0, |(giver, _)| *giver);
        Confirmed { giver, at }
    }

    /// A receipt is final. From now on no agent may answer from before the change, unless the receipt is unproven.
    ///
    /// Not while a restored store wasn't declared: its publisher can't have the agents that joined in
    /// what was lost, until one of them presents what it has seen.
    pub fn receipt(&mut self, now: Moment, position: LogPosition, state: RegionState) {
        self.counts.receipts += 1;
        self.counts.elapsed += u64::from(state == RegionState::Elapsed);
        let Some(change) = self.log.get(&position).copied() else { return };
        if state == RegionState::Pending {
            return self.violated(Rule::G4, now, format!("the final receipt of {position} is pending"));
        }
        if state == RegionState::Unproven || self.is_restored {
            return;
        }
        let change = &mut self.changes[change.0 as usize];
        change.final_at = change.final_at.min(now);
    }

    /// Judges an answer: what it lacks must be young, unconfirmed, and without a final receipt.
    pub fn answered(&mut self, now: Moment, answer: GivenAnswer) {
        self.counts.answered += 1;
        let GivenAnswer { agent, started, confirmed, place } = answer;
        let visible = |change: &&CheckedChange| change.at < started && started < change.lost_at;
        let lacking: Vec<CheckedChange> = self.lacking(&place).filter(visible).copied().collect();
        if lacking.is_empty() {
            return;
        }
        self.counts.behind += 1;
        self.behind.entry(agent).or_default().push((answer, now));
        let breaks = |change: &CheckedChange| {
            if change.at.after(self.bound) <= started {
                Some(Rule::G1)
            } else if change.is_covered_by(confirmed) {
                Some(Rule::G2)
            } else {
                (change.final_at < started).then_some(Rule::G4)
            }
        };
        let broken = lacking.iter().filter_map(|change| Some((breaks(change)?, change)));
        if let Some((rule, change)) = broken.min_by_key(|(rule, _)| *rule) {
            let what = format!(
                "{agent:?} answered from {place:?}, which lacks {change:?}; the verification began at {started}, \
                 when the agent had confirmed {confirmed:?}"
            );
            self.violated(rule, now, what);
        }
    }

    /// The changes that a record that was read there lacks.
    fn lacking(&self, place: &ReadPlace) -> impl Iterator<Item = &CheckedChange> {
        let ids = place.targets.iter().flatten().filter_map(|target| self.of.get(target));
        let change = |id: &ChangeNumber| &self.changes[id.0 as usize];
        let lsn = place.lsn;
        ids.flat_map(move |ids| {
            let later = ids.partition_point(|id| change(id).lsn <= lsn);
            ids[later..].iter().map(change)
        })
    }

    /// When the first change that such a record lacks became visible.
    pub fn lacking_since(&self, place: &ReadPlace) -> Option<Moment> {
        self.lacking(place).map(|change| change.at).min()
    }

    /// An agent has shown that every change of before `at` was applied there.
    pub fn settled(&mut self, agent: NodeNumber, at: Moment) {
        if let Some(behind) = self.behind.get_mut(&agent) {
            behind.retain(|(_, given)| *given >= at);
        }
    }

    /// An agent's process is another one.
    pub fn restarted(&mut self, agent: NodeNumber) {
        self.behind.remove(&agent);
    }

    /// The real exposure of the change at a position, which is applied now; `None` if that was lost.
    pub fn exposed(&self, agent: NodeNumber, position: LogPosition) -> Option<Exposed> {
        let change = self.changes[self.log.get(&position)?.0 as usize];
        if change.lost_at != Moment::NEVER {
            return None;
        }
        let mut exposed = Exposed { committed: change.at, last_began: change.at, last_given: change.at };
        for (answer, given) in self.behind.get(&agent).into_iter().flatten() {
            let concerns = answer.place.targets.contains(&Some(change.target));
            if concerns && answer.place.lsn < change.lsn {
                exposed.last_began = exposed.last_began.max(answer.started);
                exposed.last_given = exposed.last_given.max(*given);
            }
        }
        Some(exposed)
    }

    /// Checks at the end that every change that wasn't lost has its position (G3).
    pub fn finish(&mut self, now: Moment) {
        let unnumbered = self.changes.iter().position(|change| {
            change.lost_at == Moment::NEVER
                && change.numbered < change.rows
                && now.since(change.at) > NUMBERING_GRACE
        });
        if let Some(index) = unnumbered {
            let change = self.changes[index];
            let what = format!("commit {} of {} never got a position", change.lsn.0, change.at);
            self.violated(Rule::G3, now, what);
        }
    }
}

#[cfg(test)]
mod tests;
