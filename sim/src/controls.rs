//! Negative controls: without one protection, or one assumption, a promise breaks, and a checker must find it.
//!
//! The table has for each the scenario that shows it, the promises of which one must break, and the most seeds that
//! this may take.

use evictd_core::protection::Protection;
use evictd_core::rules::Rule;

use crate::assumption::Assumption;
use crate::checker::Violation;
use crate::report;
use crate::scenario::{Scenario, SimSettings};
use crate::world::RunOutcome;

#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// One of these promises is broken.
    Breaks(&'static [Rule]),
    /// Nothing: it is a second line of defense, for the reason given.
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

const fn control(without: Without, scenario: Scenario, expected: Expected, seeds: u64) -> SimControl {
    SimControl { without, scenario, expected, seeds, tune: |_| {} }
}

const fn breaks(without: Protection, scenario: Scenario, rules: &'static [Rule]) -> SimControl {
    control(Without::Protection(without), scenario, Expected::Breaks(rules), 200)
}

/// A control without an assumption. The code of agents and publishers is unchanged.
const fn unfounded(without: Assumption, scenario: Scenario, rules: &'static [Rule]) -> SimControl {
    control(Without::Assumption(without), scenario, Expected::Breaks(rules), 200)
}

const fn nothing(without: Protection, scenario: Scenario, why: &'static str) -> SimControl {
    control(Without::Protection(without), scenario, Expected::Nothing(why), 10)
}

impl SimControl {
    const fn within(self, seeds: u64) -> Self {
        Self { seeds, ..self }
    }

    const fn tuned(self, tune: fn(&mut SimSettings)) -> Self {
        Self { tune, ..self }
    }
}

/// Each fault comes with the one that makes it matter.
fn in_pairs(settings: &mut SimSettings) {
    settings.paired_permille = 1_000;
}

/// Many verifications stall between two of their steps.
fn with_stalled_verifications(settings: &mut SimSettings) {
    (settings.preempted_permille, settings.stalled_verifications_permille) = (300, 300);
    settings.paired_permille = 1_000;
}

/// Many loads are read before a change and arrive after it, with long pauses between their steps, and of keys that are
/// verified all the time.
fn with_loads_on_the_way(settings: &mut SimSettings) {
    (settings.preempted_permille, settings.slow_loads_permille) = (300, 300);
    (settings.starved_permille, settings.verifications_per_second) = (1_000, 1_000);
    settings.keys = 100;
}

/// Agents start often, on bad links, among others that confirm quickly, and load slowly.
fn with_slow_starts(settings: &mut SimSettings) {
    (settings.polite, settings.paired_permille, settings.slow_loads_permille) = (true, 700, 300);
}

/// One line for each protection and each assumption that shows here. `ProofsPrecedeApplied` and
/// `AdvancesRestOnTheReading` show within a step of the agent, which loom checks; what the stores do by themselves, in the
/// stores' own tests; and what shows only by forged claims, or when a copy of the store serves, in the exhaustive model.
pub const CONTROLS: &[SimControl] = {
    use Protection as P;
    use Rule::{G1, G2, G3, G4, G5, R2, R14};
    use Scenario as S;
    &[
        unfounded(Assumption::LateCommitsAreFound, S::Calm, &[G1, G3]),
        breaks(P::BranchesBeginAnEpoch, S::Failover, &[G1, R2, G5]),
        breaks(P::LostEpochsAreNotRepeated, S::Failover, &[G1, G2, R2, G5]),
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
        unfounded(Assumption::EveryChangeWritesItsRow, S::Calm, &[G1, G3]),
        unfounded(Assumption::UnknownIsNotSuccess, S::Failover, &[G3]),
        nothing(
            P::OldPositionsAreApplied,
            S::Reorder,
            "what lies at or below `applied` was applied, or a flush covers it",
        ),
        breaks(P::AppliedIsContiguous, S::Loss, &[G1, G2, G4]),
        nothing(
            P::ReplaysAreComplete,
            S::Partition,
            "what is left out stays a hole, and the next replay of that is refused",
        ),
        breaks(P::DroppedFloorsLiveOn, S::Bulk, &[G1, G2, G4]),
        breaks(P::HitsMeetFloors, S::Calm, &[G1, G2]),
        breaks(P::ProofsWaitForTheirHead, S::Loss, &[G1]),
        breaks(P::ProofsDateFromTheQuestion, S::Reorder, &[G1]).tuned(in_pairs),
        unfounded(Assumption::RoundsAreWrites, S::Failover, &[G1]),
        unfounded(Assumption::RoundsFollowTheirProbes, S::Failover, &[G1, G4]).tuned(in_pairs),
        breaks(P::LeasesRunOut, S::Partition, &[G1]),
        // Late answers may lie within the bound, and follow a receipt that ended with it.
        breaks(P::MarginsAreKept, S::Clocks, &[G1, G4]),
        unfounded(Assumption::ClocksCountSuspension, S::Clocks, &[G1]),
        breaks(P::LookupsCarryTheFenceAge, S::Failover, &[G1]),
        breaks(P::EntriesAppearChecked, S::Calm, &[G1, G2, G4]).tuned(with_loads_on_the_way),
        breaks(P::ChecksFollowInsertions, S::Calm, &[G1, G2, G4]),
        breaks(P::EvictionPrecedesApplied, S::Calm, &[G2, G4]),
        breaks(P::DeadlinePrecedesFloors, S::Partition, &[G1]).tuned(with_stalled_verifications),
        breaks(P::LoadsMeetFloors, S::Calm, &[G1, G2, G4]),
        breaks(P::AnswersMeetWhatWasApplied, S::Calm, &[G2, G4]),
        breaks(P::LoadsAreSharedUnderALease, S::Crash, &[G4]).within(400).tuned(with_slow_starts),
        breaks(P::AnswersAreHandedOn, S::Partition, &[G5]),
        unfounded(Assumption::RosterPrecedesHead, S::Crash, &[G4]).tuned(with_slow_starts),
        breaks(P::LostRostersAreDistrusted, S::Restore, &[G4]),
        breaks(P::ReceiptsWaitForAll, S::Calm, &[G4]),
        breaks(P::ReceiptsWaitForTheBound, S::Partition, &[G4]),
        breaks(P::AnswersMatchQuestions, S::Reorder, &[G1]),
        breaks(P::SecondTriesGoToAll, S::Freeze, &[G5]),
        breaks(P::NewcomersAsk, S::Copies, &[G1, G2, G4]),
        breaks(P::SilentPublishersHoldReceipts, S::Copies, &[G4]),
        breaks(P::StalledPublishersKeepSilent, S::Failover, &[R14]),
    ]
};

/// Runs the controls whose name contains `only`. Returns whether each had its expected result.
pub fn run(only: &str, threads: usize) -> bool {
    if !cfg!(evictd_negative_controls) {
        println!("this build can't switch off a protection; run `cargo xtask sim --negative-controls`");
        return false;
    }
    let named = CONTROLS.iter().map(|control| (control, format!("{:?}", control.without)));
    let controls: Vec<&SimControl> =
        named.filter(|(_, name)| name.contains(only)).map(|(control, _)| control).collect();
    println!("{:<42} {:<4} {:<10} {:<12} found", "without", "rule", "scenario", "may break");
    let mut passes = !controls.is_empty();
    report::in_parallel(&controls, threads, SimControl::search, |control, (is_as_expected, found)| {
        passes &= is_as_expected;
        let SimControl { without, scenario, .. } = control;
        let rules: Vec<&str> = control.rules().iter().map(|rule| rule.id()).collect();
        let (name, rule, rules) = (format!("{without:?}"), without.rule().id(), rules.join(" "));
        println!("{name:<42} {rule:<4} {:<10} {rules:<12} {found}", scenario.name());
    });
    passes
}

impl SimControl {
    fn rules(&self) -> &'static [Rule] {
        match self.expected {
            Expected::Breaks(rules) => rules,
            Expected::Nothing(_) => &[],
        }
    }

    /// Returns whether the result is the expected one, and the result.
    fn search(&self) -> (bool, String) {
        let seeds = self.seeds;
        let mut other = None;
        for seed in 0..seeds {
            let Some(Violation { rule, at, what }) = self.run(seed).violations.into_iter().next() else {
                continue;
            };
            if self.rules().contains(&rule) {
                return (true, format!("{rule} by seed {seed} of {seeds}, at {at} s"));
            }
            other.get_or_insert(format!("SOMETHING ELSE, {rule}, by seed {seed}: {what}"));
        }
        match (other, self.expected) {
            (Some(other), _) => (false, other),
            (None, Expected::Nothing(why)) => {
                (true, format!("nothing in {seeds} seeds, as it should: {why}"))
            }
            (None, Expected::Breaks(_)) => (false, format!("NOTHING in {seeds} seeds")),
        }
    }

    fn run(&self, seed: u64) -> RunOutcome {
        let run = |lacking| {
            report::run_caught(self.scenario, seed, |settings| {
                (self.tune)(settings);
                settings.lacking = lacking;
            })
        };
        match self.without {
            Without::Assumption(assumption) => run(Some(assumption)),
            #[cfg(evictd_negative_controls)]
            Without::Protection(protection) => protection.without(|| run(None)),
            #[cfg(not(evictd_negative_controls))]
            Without::Protection(_) => run(None),
        }
    }
}
