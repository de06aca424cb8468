//! Negative controls: without one protection, or one assumption, the world must break a promise, and a checker
//! must see it.
//!
//! The table says for each which scenario shows it, which promises may be the ones that break, and within how many
//! seeds.

use std::fmt;

use evictd_core::protection::Protection;
use evictd_core::rules::Rule;

use crate::assumption::Assumption;
use crate::scenario::{Scenario, SimSettings};

#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// One of these promises is broken.
    Breaks(&'static [Rule]),
    /// Nothing: it is a second line of defence, for the reason given.
    Nothing(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Without {
    /// A protection of the shipped code.
    Protection(Protection),
    /// A guarantee of the surroundings.
    Assumption(Assumption),
}

impl Without {
    /// The rule that needs it.
    pub fn rule(self) -> Rule {
        match self {
            Self::Protection(protection) => protection.rule(),
            Self::Assumption(assumption) => assumption.rule(),
        }
    }
}

#[cfg(evictd_negative_controls)]
impl Without {
    fn kind(self) -> &'static str {
        match self {
            Self::Protection(_) => "protection",
            Self::Assumption(_) => "assumption",
        }
    }

    fn assumption(self) -> Option<Assumption> {
        match self {
            Self::Protection(_) => None,
            Self::Assumption(assumption) => Some(assumption),
        }
    }
}

impl fmt::Display for Without {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protection(protection) => write!(f, "{protection:?}"),
            Self::Assumption(assumption) => write!(f, "{assumption:?}"),
        }
    }
}

/// A negative control: the expected result without a protection or an assumption.
#[derive(Clone, Copy, Debug)]
pub struct SimControl {
    pub without: Without,
    pub scenario: Scenario,
    pub expected: Expected,
    /// The most seeds to try.
    pub seeds: u64,
    /// Changes the settings where chance alone would need too many seeds.
    pub tune: fn(&mut SimSettings),
}

const fn breaks(without: Protection, scenario: Scenario, rules: &'static [Rule], seeds: u64) -> SimControl {
    let without = Without::Protection(without);
    SimControl { without, scenario, expected: Expected::Breaks(rules), seeds, tune: |_| {} }
}

/// A control without an assumption. The code of agents and publishers is unchanged.
const fn unfounded(
    without: Assumption,
    scenario: Scenario,
    rules: &'static [Rule],
    seeds: u64,
) -> SimControl {
    let without = Without::Assumption(without);
    SimControl { without, scenario, expected: Expected::Breaks(rules), seeds, tune: |_| {} }
}

const fn nothing(without: Protection, scenario: Scenario, why: &'static str) -> SimControl {
    let without = Without::Protection(without);
    SimControl { without, scenario, expected: Expected::Nothing(why), seeds: 10, tune: |_| {} }
}

impl SimControl {
    const fn tuned(self, tune: fn(&mut SimSettings)) -> Self {
        Self { tune, ..self }
    }
}

/// Each fault comes with the one that makes it matter.
fn in_pairs(settings: &mut SimSettings) {
    settings.paired_permille = 1_000;
}

/// Many verifications stand still between two of their steps.
fn with_stalled_verifications(settings: &mut SimSettings) {
    (settings.preempted_permille, settings.stalled_verifications_permille) = (300, 300);
    settings.paired_permille = 1_000;
}

/// Many loads are read before a change and land after it, with long pauses between their steps, and of keys that are
/// verified all the time.
fn with_loads_on_the_way(settings: &mut SimSettings) {
    (settings.preempted_permille, settings.slow_loads_permille) = (300, 300);
    (settings.starved_permille, settings.verifications_per_second) = (1_000, 1_000);
    settings.size.keys = 100;
}

/// Agents start often, on bad links, among others that confirm quickly, and load slowly.
fn with_slow_starts(settings: &mut SimSettings) {
    (settings.polite, settings.paired_permille, settings.slow_loads_permille) = (true, 700, 300);
}

/// One line for each protection and each assumption that shows here. `ProofsPrecedeApplied` and `AdvancesRestOnTheReading`
/// show within a step of the agent's, where loom looks; what the stores do by themselves, in the stores' own tests; and
/// what shows only by forged claims, or when a copy of the store serves, in the exhaustive model.
pub const CONTROLS: &[SimControl] = {
    use Protection as P;
    use Rule::{G1, G2, G3, G4, G5, R2, R14};
    use Scenario as S;
    &[
        unfounded(Assumption::LateCommitsAreFound, S::Calm, &[G1, G3], 200),
        breaks(P::BranchesBeginAnEpoch, S::Failover, &[G1, R2, G5], 200),
        breaks(P::LostEpochsAreNotRepeated, S::Failover, &[G1, G2, R2, G5], 200),
        nothing(
            P::OlderEpochsMoveNothing,
            S::Failover,
            "an answer of an older epoch was given before the regression, and dates from then",
        ),
        nothing(
            P::NewerEpochsFlush,
            S::Failover,
            "the replay of the old epoch is refused, which flushes as well",
        ),
        unfounded(Assumption::EveryChangeWritesItsRow, S::Calm, &[G1, G3], 200),
        unfounded(Assumption::UnknownIsNotSuccess, S::Failover, &[G3], 200),
        nothing(
            P::OldPositionsAreApplied,
            S::Reorder,
            "what lies at or below `applied` was applied, or a flush covers it",
        ),
        breaks(P::AppliedIsContiguous, S::Loss, &[G1, G2, G4], 200),
        nothing(
            P::ReplaysAreComplete,
            S::Partition,
            "what is left out stays a hole, and the next replay of that is refused",
        ),
        breaks(P::DroppedFloorsLiveOn, S::Bulk, &[G1, G2, G4], 200),
        breaks(P::HitsMeetFloors, S::Calm, &[G1, G2], 200),
        breaks(P::ProofsWaitForTheirHead, S::Loss, &[G1], 200),
        breaks(P::ProofsDateFromTheQuestion, S::Reorder, &[G1], 200).tuned(in_pairs),
        unfounded(Assumption::RoundsAreWrites, S::Failover, &[G1], 200),
        unfounded(Assumption::RoundsFollowTheirProbes, S::Failover, &[G1, G4], 200).tuned(in_pairs),
        breaks(P::LeasesRunOut, S::Partition, &[G1], 200),
        // Late answers may lie within the bound, and follow a receipt that ended with it.
        breaks(P::MarginsAreKept, S::Clocks, &[G1, G4], 200),
        unfounded(Assumption::ClocksCountSuspension, S::Clocks, &[G1], 200),
        breaks(P::LookupsCarryTheFenceAge, S::Failover, &[G1], 200),
        breaks(P::EntriesAppearChecked, S::Calm, &[G1, G2, G4], 200).tuned(with_loads_on_the_way),
        breaks(P::ChecksFollowInsertions, S::Calm, &[G1, G2, G4], 200),
        breaks(P::EvictionPrecedesApplied, S::Calm, &[G2, G4], 200),
        breaks(P::DeadlinePrecedesFloors, S::Partition, &[G1], 200).tuned(with_stalled_verifications),
        breaks(P::LoadsMeetFloors, S::Calm, &[G1, G2, G4], 200),
        breaks(P::AnswersMeetWhatWasApplied, S::Calm, &[G2, G4], 200),
        breaks(P::LoadsAreSharedUnderALease, S::Crash, &[G4], 400).tuned(with_slow_starts),
        breaks(P::AnswersAreHandedOn, S::Partition, &[G5], 200),
        unfounded(Assumption::RosterPrecedesHead, S::Crash, &[G4], 200).tuned(with_slow_starts),
        breaks(P::LostRostersAreDistrusted, S::Restore, &[G4], 200),
        breaks(P::ReceiptsWaitForAll, S::Calm, &[G4], 200),
        breaks(P::ReceiptsWaitForTheBound, S::Partition, &[G4], 200),
        breaks(P::AnswersMatchQuestions, S::Reorder, &[G1], 200),
        breaks(P::SecondTriesGoToAll, S::Freeze, &[G5], 200),
        breaks(P::NewcomersAsk, S::Copies, &[G1, G2, G4], 200),
        breaks(P::SilentPublishersHoldReceipts, S::Copies, &[G4], 200),
        breaks(P::StalledPublishersKeepSilent, S::Failover, &[R14], 200),
    ]
};

#[cfg(evictd_negative_controls)]
impl SimControl {
    fn rules(&self) -> &'static [Rule] {
        match self.expected {
            Expected::Breaks(rules) => rules,
            Expected::Nothing(_) => &[],
        }
    }
}

/// The result of a control.
#[cfg(evictd_negative_controls)]
enum ControlFinding {
    Found { seed: u64, rule: Rule, at: crate::time::Moment },
    Other { seed: u64, rule: Rule, what: String },
    Nothing,
}

/// Runs all controls, or that of one protection or assumption. Returns whether each had its expected result.
#[cfg(evictd_negative_controls)]
pub fn run(only: Option<&str>, threads: usize) -> bool {
    use crate::report::in_parallel;
    let chosen = |control: &&SimControl| only.is_none_or(|name| control.without.to_string() == name);
    let controls: Vec<&SimControl> = CONTROLS.iter().filter(chosen).collect();
    println!("{:<10} {:<28} {:<4} {:<10} {:<12} found", "without", "", "rule", "scenario", "may break");
    let mut well = !controls.is_empty();
    let take = |index: usize, finding: ControlFinding| {
        let control: &SimControl = controls[index];
        let (found, as_expected) = judge(control, finding);
        well &= as_expected;
        let names: Vec<&str> = control.rules().iter().map(|rule| rule.id()).collect();
        println!(
            "{:<10} {:<28} {:<4} {:<10} {:<12} {found}",
            control.without.kind(),
            control.without.to_string(),
            control.without.rule().id(),
            control.scenario.name(),
            names.join(" ")
        );
    };
    in_parallel(controls.len(), threads, |index| search(controls[index]), take);
    well
}

#[cfg(evictd_negative_controls)]
fn judge(control: &SimControl, finding: ControlFinding) -> (String, bool) {
    let seeds = control.seeds;
    match (finding, control.expected) {
        (ControlFinding::Found { seed, rule, at }, _) => {
            (format!("{rule} by seed {seed} of {seeds}, at {at} s"), true)
        }
        (ControlFinding::Nothing, Expected::Nothing(why)) => {
            (format!("nothing in {seeds} seeds, as it should: {why}"), true)
        }
        (ControlFinding::Nothing, _) => (format!("NOTHING in {seeds} seeds"), false),
        (ControlFinding::Other { seed, rule, what }, _) => {
            (format!("SOMETHING ELSE, {rule}, by seed {seed}: {what}"), false)
        }
    }
}

#[cfg(evictd_negative_controls)]
fn search(control: &SimControl) -> ControlFinding {
    use crate::report::run_caught;
    let mut other = None;
    for seed in 0..control.seeds {
        let run = || {
            run_caught(control.scenario, seed, |settings| {
                (control.tune)(settings);
                settings.lacking = control.without.assumption();
            })
        };
        let outcome = match control.without {
            Without::Protection(protection) => protection.without(run),
            Without::Assumption(_) => run(),
        };
        let Some(violation) = outcome.violations.into_iter().next() else { continue };
        if control.rules().contains(&violation.rule) {
            return ControlFinding::Found { seed, rule: violation.rule, at: violation.at };
        }
        other.get_or_insert(ControlFinding::Other { seed, rule: violation.rule, what: violation.what });
    }
    other.unwrap_or(ControlFinding::Nothing)
}

/// Only a build with `--cfg evictd_negative_controls` can run controls.
#[cfg(not(evictd_negative_controls))]
pub fn run(_only: Option<&str>, _threads: usize) -> bool {
    println!("this build can't miss a protection; `cargo xtask sim --negative-controls` makes one that can");
    false
}
