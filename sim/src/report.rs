//! Runs in bulk, and their results.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::UnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use evictd_core::rules::Rule;

use crate::checker::{RunCounts, Violation};
use crate::histogram::SpanHistogram;
use crate::scenario::{Scenario, SimSettings};
use crate::time::{Micros, Moment, SECOND};
use crate::trace::SimTrace;
use crate::world::{self, RunOutcome};

/// Lines of trace before a violation that are shown.
const TRACE_LINES: usize = 40;

/// Violations shown in full.
const SHOWN_MAX: usize = 5;

/// The sums of runs.
#[derive(Default)]
struct Totals {
    seeds: u64,
    failures: u64,
    lasted: Micros,
    deletions: u64,
    answered: u64,
    denied: u64,
    receipts: u64,
    evicted: SpanHistogram,
}

/// Does `job` for each item, on so many threads, and takes the results in the order of the items.
pub fn in_parallel<I: Copy + Sync, T: Send>(
    items: &[I],
    threads: usize,
    job: impl Fn(I) -> T + Sync,
    mut take: impl FnMut(I, T),
) {
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, job) = (sender.clone(), &next, &job);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { return };
                    if sender.send((index, job(*item))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut due = 0;
        for (index, result) in receiver {
            early.insert(index, result);
            while let Some(result) = early.remove(&due) {
                take(items[due], result);
                due += 1;
            }
        }
    });
}

/// All `scenarios` with each of the `seeds`.
pub fn runs(scenarios: &[Scenario], seeds: Range<u64>) -> Vec<(Scenario, u64)> {
    seeds.flat_map(|seed| scenarios.iter().map(move |scenario| (*scenario, seed))).collect()
}

/// Runs all seeds. Prints a table, and the first violations. Returns whether there was none.
pub fn run(scenarios: &[Scenario], seeds: Range<u64>, threads: usize) -> bool {
    let began = Instant::now();
    let mut totals: BTreeMap<Scenario, Totals> = BTreeMap::new();
    let mut all = Totals::default();
    let mut failures = Vec::new();
    let job = |(scenario, seed)| run_caught(scenario, seed, |_| {});
    in_parallel(&runs(scenarios, seeds), threads, job, |(scenario, seed), outcome| {
        totals.entry(scenario).or_default().add(&outcome);
        all.add(&outcome);
        failures.extend(outcome.violations.into_iter().next().map(|violation| (scenario, seed, violation)));
    });
    println!(
        "scenario     seeds   deletions verifications   denied  receipts  virtual violations        \
         evicted after p50/p99/p99.9/max"
    );
    for (scenario, totals) in &totals {
        totals.print(&scenario.name());
    }
    all.print("all");
    let seconds = began.elapsed().as_secs_f64();
    let rate = all.deletions as f64 / seconds.max(1e-3);
    println!("{seconds:.1} s on {threads} threads: {rate:.0} deletions per second");
    for (scenario, seed, violation) in failures.iter().take(SHOWN_MAX) {
        explain(*scenario, *seed, violation);
    }
    failures.is_empty()
}

/// Runs one seed. A panic in it is a violation.
pub fn run_caught(scenario: Scenario, seed: u64, tune: impl Fn(&mut SimSettings) + UnwindSafe) -> RunOutcome {
    let run = || world::run_tuned(scenario, seed, SimTrace::Off, tune);
    std::panic::catch_unwind(run).unwrap_or_else(|_| {
        let what = "a core panicked; its message is above".to_owned();
        let violation = Violation { rule: Rule::G5, at: Moment::default(), what };
        RunOutcome { violations: vec![violation], ..RunOutcome::default() }
    })
}

impl Totals {
    fn add(&mut self, outcome: &RunOutcome) {
        let RunCounts { deletions, answered, denied, receipts, evicted, .. } = &outcome.counts;
        self.seeds += 1;
        self.failures += u64::from(!outcome.violations.is_empty());
        self.lasted += outcome.lasted;
        self.deletions += deletions;
        self.answered += answered;
        self.denied += denied;
        self.receipts += receipts;
        self.evicted.merge(evicted);
    }

    fn print(&self, name: &str) {
        let Self { seeds, failures, lasted, deletions, answered, denied, receipts, evicted } = self;
        let verifications = answered + denied;
        let hours = *lasted as f64 / SECOND as f64 / 3600.0;
        let quantiles = [5_000, 9_900, 9_990].map(|permyriad| evicted.quantile(permyriad));
        let [p50, p99, p999, max] = [quantiles[0], quantiles[1], quantiles[2], evicted.max()].map(span);
        let evicted = format!("{p50} / {p99} / {p999} / {max}");
        println!(
            "{name:<11} {seeds:>6} {deletions:>11} {verifications:>13} {denied:>8} {receipts:>9} {hours:>6.1} h \
             {failures:>9}  {evicted:>37}"
        );
    }
}

fn span(micros: Micros) -> String {
    if micros < SECOND {
        format!("{:.1}ms", micros as f64 / 1e3)
    } else {
        format!("{:.2}s", micros as f64 / 1e6)
    }
}

/// Prints a violation with its seed, and runs the seed once more for the last lines before it.
fn explain(scenario: Scenario, seed: u64, violation: &Violation) {
    let Violation { rule, at, what } = violation;
    let name = scenario.name();
    println!(
        "\n{rule} broken: {}\n  {what}\n  scenario {name}, seed {seed}, at {at} s of virtual time; again with\n    \
         cargo xtask sim --scenario {name} --seed {seed} --trace",
        rule.statement(),
    );
    for line in world::run(scenario, seed, SimTrace::last(TRACE_LINES)).trace.kept() {
        println!("  | {line}");
    }
}
