//! Runs in bulk, and their results.

use std::fmt::Write as _;
use std::panic::UnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use evictd_core::rules::Rule;
use serde_json::{Value, json};

use crate::checker::{RunCounts, Violation};
use crate::scenario::{Scenario, SimSettings};
use crate::time::{Micros, Moment, SECOND};
use crate::trace::SimTrace;
use crate::world;
use crate::world::RunOutcome;

/// Lines of trace before a violation that are shown.
const TRACE_LINES: usize = 40;

/// Violations shown in full.
const SHOWN_MAX: usize = 5;

#[derive(Clone, Debug)]
pub struct FailedSeed {
    pub scenario: Scenario,
    pub seed: u64,
    pub violation: Violation,
}

#[derive(Debug)]
pub struct Totals {
    pub scenario: Scenario,
    pub seeds: u64,
    pub counts: RunCounts,
    pub lasted: Micros,
    pub events: u64,
    pub failures: Vec<FailedSeed>,
}

#[derive(Debug)]
pub struct SimReport {
    pub totals: Vec<Totals>,
    pub took: Duration,
    pub threads: usize,
}

/// Does `job` for each of `0..jobs` on so many threads, and gives the results in order.
pub fn in_parallel<T: Send>(
    jobs: usize,
    threads: usize,
    job: impl Fn(usize) -> T + Sync,
    mut take: impl FnMut(usize, T),
) {
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, job) = (sender.clone(), &next, &job);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= jobs || sender.send((index, job(index))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        // Results are added up in the order of jobs: sums don't depend on it, lists do.
        let mut early = std::collections::BTreeMap::new();
        let mut due = 0;
        for (index, result) in receiver {
            early.insert(index, result);
            while let Some(result) = early.remove(&due) {
                take(due, result);
                due += 1;
            }
        }
    });
}

pub fn run(scenarios: &[Scenario], first: u64, seeds: u64, threads: usize) -> SimReport {
    let began = Instant::now();
    let new = |scenario: &Scenario| Totals {
        scenario: *scenario,
        seeds: 0,
        counts: RunCounts::default(),
        lasted: 0,
        events: 0,
        failures: Vec::new(),
    };
    let mut totals: Vec<Totals> = scenarios.iter().map(new).collect();
    let job = |index: usize| (scenarios[index % scenarios.len()], first + (index / scenarios.len()) as u64);
    in_parallel(
        scenarios.len() * seeds as usize,
        threads,
        |index| {
            let (scenario, seed) = job(index);
            run_caught(scenario, seed, |_| {})
        },
        |index, outcome| totals[index % scenarios.len()].add(job(index).1, outcome),
    );
    SimReport { totals, took: began.elapsed(), threads }
}

/// Runs one seed; a panic in it is a violation like any other, and has a seed as well.
pub fn run_caught(scenario: Scenario, seed: u64, tune: impl Fn(&mut SimSettings) + UnwindSafe) -> RunOutcome {
    std::panic::catch_unwind(|| world::run_tuned(scenario, seed, SimTrace::Off, tune)).unwrap_or_else(|_| {
        RunOutcome {
            violations: vec![Violation {
                rule: Rule::G5,
                at: Moment::default(),
                what: "a core panicked; the message stands above".to_owned(),
            }],
            violations_total: 1,
            ..RunOutcome::default()
        }
    })
}

impl Totals {
    fn add(&mut self, seed: u64, outcome: RunOutcome) {
        self.seeds += 1;
        self.lasted += outcome.lasted;
        self.events += outcome.events;
        self.counts.add(&outcome.counts);
        if let Some(violation) = outcome.violations.into_iter().next() {
            self.failures.push(FailedSeed { scenario: self.scenario, seed, violation });
        }
    }
}

impl RunCounts {
    fn add(&mut self, other: &Self) {
        self.changes += other.changes;
        self.deletions += other.deletions;
        self.answered += other.answered;
        self.denied += other.denied;
        self.behind += other.behind;
        self.flushes += other.flushes;
        self.epochs += other.epochs;
        self.regressions += other.regressions;
        self.copies += other.copies;
        self.repairs += other.repairs;
        self.receipts += other.receipts;
        self.elapsed += other.elapsed;
        self.evicted.merge(&other.evicted);
    }
}

impl SimReport {
    pub fn failures(&self) -> impl Iterator<Item = &FailedSeed> {
        self.totals.iter().flat_map(|totals| &totals.failures)
    }

    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<11} {:>6} {:>11} {:>13} {:>8} {:>9} {:>8} {:>9}  {:>37}\n",
            "scenario",
            "seeds",
            "deletions",
            "verifications",
            "denied",
            "receipts",
            "virtual",
            "violations",
            "evicted after p50/p99/p99.9/max"
        );
        let mut all = RunCounts::default();
        let (mut seeds, mut lasted, mut failures) = (0, 0, 0);
        for totals in &self.totals {
            out += &line(
                &totals.scenario.name(),
                totals.seeds,
                &totals.counts,
                totals.lasted,
                totals.failures.len(),
            );
            all.add(&totals.counts);
            seeds += totals.seeds;
            lasted += totals.lasted;
            failures += totals.failures.len();
        }
        out += &line("all", seeds, &all, lasted, failures);
        let _ = writeln!(
            out,
            "{:.1} s on {} threads: {:.0} deletions per second",
            self.took.as_secs_f64(),
            self.threads,
            self.rate()
        );
        out
    }

    fn rate(&self) -> f64 {
        let deletions: u64 = self.totals.iter().map(|totals| totals.counts.deletions).sum();
        deletions as f64 / self.took.as_secs_f64().max(1e-3)
    }

    pub fn json(&self) -> Value {
        let scenario = |totals: &Totals| {
            let counts = &totals.counts;
            let seconds = |permyriad| counts.evicted.quantile(permyriad) as f64 / SECOND as f64;
            json!({
                "scenario": totals.scenario,
                "seeds": totals.seeds,
                "deletions": counts.deletions,
                "changes": counts.changes,
                "verifications": counts.answered + counts.denied,
                "denied": counts.denied,
                "answersWithinTheBound": counts.behind,
                "receipts": counts.receipts,
                "elapsedReceipts": counts.elapsed,
                "repairs": counts.repairs,
                "flushes": counts.flushes,
                "regressions": counts.regressions,
                "epochs": counts.epochs,
                "virtualHours": totals.lasted as f64 / SECOND as f64 / 3600.0,
                "events": totals.events,
                "evictedAfterSeconds": {
                    "count": counts.evicted.total(),
                    "p50": seconds(5_000), "p99": seconds(9_900), "p999": seconds(9_990),
                    "max": counts.evicted.max() as f64 / SECOND as f64,
                },
                "violations": totals.failures.iter().map(|failure| json!({
                    "rule": failure.violation.rule.id(),
                    "seed": failure.seed,
                    "at": failure.violation.at.to_string(),
                    "what": failure.violation.what,
                })).collect::<Vec<_>>(),
            })
        };
        json!({
            "scenarios": self.totals.iter().map(scenario).collect::<Vec<_>>(),
            "seconds": self.took.as_secs_f64(),
            "threads": self.threads,
            "deletionsPerSecond": self.rate(),
        })
    }

    /// The first violations, each with what led to it: the seed is run once more for that.
    pub fn explain(&self) -> String {
        self.failures().take(SHOWN_MAX).map(explain).collect()
    }
}

fn line(name: &str, seeds: u64, counts: &RunCounts, lasted: Micros, failures: usize) -> String {
    let evicted = [5_000, 9_900, 9_990].map(|permyriad| span(counts.evicted.quantile(permyriad)));
    let hours = lasted as f64 / SECOND as f64 / 3600.0;
    format!(
        "{name:<11} {seeds:>6} {:>11} {:>13} {:>8} {:>9} {hours:>6.1} h {failures:>9}  {:>37}\n",
        counts.deletions,
        counts.answered + counts.denied,
        counts.denied,
        counts.receipts,
        format!("{} / {} / {} / {}", evicted[0], evicted[1], evicted[2], span(counts.evicted.max())),
    )
}

fn span(micros: Micros) -> String {
    if micros < SECOND {
        format!("{:.1}ms", micros as f64 / 1e3)
    } else {
        format!("{:.2}s", micros as f64 / 1e6)
    }
}

/// A violation, its seed, and the last lines before it.
pub fn explain(failure: &FailedSeed) -> String {
    let FailedSeed { scenario, seed, violation } = failure;
    let outcome = world::run(*scenario, *seed, SimTrace::last(TRACE_LINES));
    let mut out = format!(
        "\n{} broken: {}\n  {}\n  scenario {}, seed {seed}, at {} s of virtual time; again with\n    \
         cargo xtask sim --scenario {} --seed {seed} --trace\n",
        violation.rule,
        violation.rule.statement(),
        violation.what,
        scenario.name(),
        violation.at,
        scenario.name(),
    );
    for line in outcome.trace.kept() {
        let _ = writeln!(out, "  | {line}");
    }
    out
}
