//! A slice of what `cargo xtask sim` runs.

use clap::ValueEnum as _;
use evictd_sim::controls::CONTROLS;
use evictd_sim::scenario::Scenario;
use evictd_sim::trace::{Digest, SimTrace};
use evictd_sim::world::run;

fn digest(scenario: Scenario, seed: u64) -> Digest {
    match run(scenario, seed, SimTrace::Digest(Box::default())).trace {
        SimTrace::Digest(digest) => *digest,
        _ => panic!("the run gives back the trace that it was given"),
    }
}

#[test]
fn the_same_seed_gives_the_same_trace_byte_by_byte() {
    let one = digest(Scenario::Everything, 7);
    assert!(one.lines > 10_000, "{one:?}");
    assert_eq!(one, digest(Scenario::Everything, 7));
}

#[test]
fn another_seed_gives_another_trace() {
    assert_ne!(digest(Scenario::Calm, 1), digest(Scenario::Calm, 2));
}

#[test]
fn a_trace_changes_nothing() {
    let (traced, quiet) =
        (run(Scenario::Crash, 3, SimTrace::last(10)), run(Scenario::Crash, 3, SimTrace::Off));
    assert_eq!(traced.events, quiet.events);
    assert_eq!(traced.trace.kept().len(), 10);
}

#[test]
fn no_scenario_breaks_a_promise() {
    for scenario in Scenario::value_variants().iter().copied() {
        for seed in 0..2 {
            let outcome = run(scenario, seed, SimTrace::Off);
            assert_eq!(outcome.violations, [], "{scenario:?}, seed {seed}");
            assert!(outcome.counts.deletions > 500 && outcome.counts.answered > 5_000, "{scenario:?}");
        }
    }
}

#[test]
fn every_kind_of_trouble_takes_place() {
    let counts = |scenario| (0..4).map(|seed| run(scenario, seed, SimTrace::Off).counts).collect::<Vec<_>>();
    let sum = |scenario, of: fn(&evictd_sim::checker::RunCounts) -> u64| {
        counts(scenario).iter().map(of).sum::<u64>()
    };
    assert!(sum(Scenario::Loss, |counts| counts.repairs) > 100);
    assert!(sum(Scenario::Partition, |counts| counts.denied) > 100, "who is cut off must deny in the end");
    assert!(sum(Scenario::Partition, |counts| counts.elapsed) > 100);
    assert!(sum(Scenario::Failover, |counts| counts.epochs) >= 2);
    assert!(sum(Scenario::Restore, |counts| counts.epochs) >= 3);
    assert!(sum(Scenario::Copies, |counts| counts.copies) >= 3);
    assert!(
        sum(Scenario::Freeze, |counts| counts.behind) > 100,
        "answers within the bound do lack something"
    );
}

/// No claim can be forged here: `model::history` has the controls of R16.
#[test]
fn every_rule_has_a_negative_control_that_must_be_found() {
    use evictd_core::rules::Rule;
    use evictd_sim::controls::Expected;
    let rules = Rule::ALL.into_iter().filter(|rule| rule.id().starts_with('R') && *rule != Rule::R16);
    for rule in rules {
        let covers = CONTROLS
            .iter()
            .any(|control| control.without.rule() == rule && matches!(control.expected, Expected::Breaks(_)));
        assert!(covers, "{rule} has none");
    }
}
