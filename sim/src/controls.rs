//! Negative controls: without one protection, or one assumption, the world must break a promise, and a checker
//! must see it.
//!
//! The table says for each which scenario shows it, which promises may be the ones that break, and within how many
//! seeds.

use std::fmt;

use evictd_core::protection::Protection;
use evictd_core::rules::Rule;

use crate::assumption::Assumption;
use crate::scenario::{Scenario, Settings};

/// What comes of missing a protection.
#[derive(Clone, Copy, Debug)]
pub enum Expected {
    /// One of these promises is broken.
    Breaks(&'static [Rule]),
    /// Nothing: it is a second line of defence, for the reason given.
    Nothing(&'static str),
}

/// What is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// Something that the shipped code does.
    Protection(Protection),
    /// Something that its surroundings do.
    Assumption(Assumption),
}

impl Missing {
    /// The rule that needs it.
    pub fn rule(self) -> Rule {
        match self {
            Self::Protection(protection) => protection.rule(),
            Self::Assumption(assumption) => assumption.rule(),
        }
    }
}

#[cfg(evictd_negative_controls)]
impl Missing {
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

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protection(protection) => write!(f, "{protection:?}"),
            Self::Assumption(assumption) => write!(f, "{assumption:?}"),
        }
    }
}

/// What is expected when something is missing.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// Without what.
    pub without: Missing,
    /// Where it shows.
    pub scenario: Scenario,
    /// What comes of it.
    pub expected: Expected,
    /// Within so many seeds.
    pub seeds: u64,
    /// What is set up otherwise, where chance alone would take too many of them.
    pub tune: fn(&mut Settings),
}

const fn breaks(without: Protection, scenario: Scenario, rules: &'static [Rule], seeds: u64) -> Control {
    let without = Missing::Protection(without);
    Control { without, scenario, expected: Expected::Breaks(rules), seeds, tune: |_| {} }
}

/// The agents' and the publishers' code is as it is; what it stands on isn't.
const fn unfounded(without: Assumption, scenario: Scenario, rules: &'static [Rule], seeds: u64) -> Control {
    let without = Missing::Assumption(without);
    Control { without, scenario, expected: Expected::Breaks(rules), seeds, tune: |_| {} }
}

const fn nothing(without: Protection, scenario: Scenario, why: &'static str) -> Control {
    let without = Missing::Protection(without);
    Control { without, scenario, expected: Expected::Nothing(why), seeds: 10, tune: |_| {} }
}

impl Control {
    const fn tuned(self, tune: fn(&mut Settings)) -> Self {
        Self { tune, ..self }
    }
}

/// Each fault comes with the one that makes it matter.
fn in_pairs(settings: &mut Settings) {
    settings.paired_permille = 1_000;
}

/// Many verifications stand still between two of their steps.
fn with_stalled_verifications(settings: &mut Settings) {
    (settings.preempted_permille, settings.stalled_verifications_permille) = (300, 300);
    settings.paired_permille = 1_000;
}

/// Many loads are read before a change and land after it, with long pauses between their steps, and of keys that are
/// verified all the time.
fn with_loads_on_the_way(settings: &mut Settings) {
    (settings.preempted_permille, settings.slow_loads_permille) = (300, 300);
    (settings.starved_permille, settings.verifications_per_second) = (1_000, 1_000);
    settings.size.keys = 100;
}

/// Agents start often, on bad links, among others that confirm quickly, and load slowly.
fn with_slow_starts(settings: &mut Settings) {
    (settings.polite, settings.paired_permille, settings.slow_loads_permille) = (true, 700, 300);
}

/// One line for each protection and each assumption that shows here. `ProofsPrecedeApplied` and `AdvancesRestOnTheReading`
/// show within a step of the agent's, where loom looks; what the stores do by themselves, in the stores' own tests; and
/// what shows only by forged claims, or when a copy of the store serves, in the exhaustive model.
pub const CONTROLS: &[Control] = {
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
impl Control {
    /// What may break.
    fn rules(&self) -> &'static [Rule] {
        match self.expected {
            Expected::Breaks(rules) => rules,
            Expected::Nothing(_) => &[],
        }
    }
}

/// What was found without a protection.
#[cfg(evictd_negative_controls)]
enum Finding {
    Found { seed: u64, rule: Rule, at: crate::time::Moment },
    Other { seed: u64, rule: Rule, what: String },
    Nothing,
}

/// Runs all controls, or that of one protection or assumption; tells whether each found what it must.
#[cfg(evictd_negative_controls)]
pub fn run(only: Option<&str>, threads: usize) -> bool {
    use crate::report::in_parallel;
    let chosen = |control: &&Control| only.is_none_or(|name| control.without.to_string() == name);
    let controls: Vec<&Control> = CONTROLS.iter().filter(chosen).collect();
    println!("{:<10} {:<28} {:<4} {:<10} {:<12} found", "without", "", "rule", "scenario", "may break");
    let mut well = !controls.is_empty();
    let take = |index: usize, finding: Finding| {
        let control: &Control = controls[index];
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
fn judge(control: &Control, finding: Finding) -> (String, bool) {
    let seeds = control.seeds;
    match (finding, control.expected) {
        (Finding::Found { seed, rule, at }, _) => {
            (format!("{rule} by seed {seed} of {seeds}, at {at} s"), true)
        }
        (Finding::Nothing, Expected::Nothing(why)) => {
            (format!("nothing in {seeds} seeds, as it should: {why}"), true)
        }
        (Finding::Nothing, _) => (format!("NOTHING in {seeds} seeds"), false),
        (Finding::Other { seed, rule, what }, _) => {
            (format!("SOMETHING ELSE, {rule}, by seed {seed}: {what}"), false)
        }
    }
}

#[cfg(evictd_negative_controls)]
fn search(control: &Control) -> Finding {
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
            Missing::Protection(protection) => protection.without(run),
            Missing::Assumption(_) => run(),
        };
        let Some(violation) = outcome.violations.into_iter().next() else { continue };
        if control.rules().contains(&violation.rule) {
            return Finding::Found { seed, rule: violation.rule, at: violation.at };
        }
        other.get_or_insert(Finding::Other { seed, rule: violation.rule, what: violation.what });
    }
    other.unwrap_or(Finding::Nothing)
}

/// Runs all controls, in a build that can.
#[cfg(not(evictd_negative_controls))]
pub fn run(_only: Option<&str>, _threads: usize) -> bool {
    println!("this build can't miss a protection; `cargo xtask sim --negative-controls` makes one that can");
    false
}
