//! The command behind `cargo xtask model`: exhausts every world, or looks for what each control breaks; prints a
//! table, and fails if a result is unexpected.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use evictd_model::check::{self, CheckOutcome, Checkable};
use evictd_model::defect::{Control, Defect};
use evictd_model::{controls, history, worlds};

#[derive(Parser)]
struct ModelCli {
    /// Switch off each protection in turn.
    #[arg(long)]
    negative_controls: bool,
    /// Threads of the checker. Controls use one, so that the ways they find are the shortest.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Only what has this in its name.
    #[arg(default_value = "")]
    filter: String,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = ModelCli::parse();
    let last = if cli.negative_controls { "control" } else { "what meets in it" };
    println!("{:<18} {:>10} {:>10} {:>5} {:>7}  {last}", "world", "steps", "states", "depth", "seconds");
    let failures = if cli.negative_controls {
        if !cfg!(evictd_negative_controls) {
            anyhow::bail!(
                "this build can't switch off a protection; run `cargo xtask model --negative-controls`"
            );
        }
        cli.find(controls::ALL) + cli.find(history::controls::ALL)
    } else {
        let outcomes = [cli.exhaust(worlds::ALL), cli.exhaust(history::worlds::ALL)].concat();
        let steps: usize = outcomes.iter().map(|outcome| outcome.steps).sum();
        let states: usize = outcomes.iter().map(|outcome| outcome.states).sum();
        let seconds = outcomes.iter().map(|outcome| outcome.took).sum::<Duration>().as_secs_f64();
        println!("{:<18} {steps:>10} {states:>10} {:>5} {seconds:>7.1}", "together", "");
        outcomes.iter().filter(|outcome| outcome.violated.is_some() || !outcome.never.is_empty()).count()
    };
    if failures > 0 {
        eprintln!("model: {failures} of the above are unexpected");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

impl ModelCli {
    fn exhaust(&self, worlds: &[impl Checkable]) -> Vec<CheckOutcome> {
        let mut outcomes = Vec::new();
        for world in worlds.iter().filter(|world| world.name().contains(&self.filter)) {
            let outcome = check::exhaust(*world, self.threads);
            row(world, &outcome, world.about());
            for never in &outcome.never {
                println!("    proves too little: never happened that {never}");
            }
            trace(&outcome);
            outcomes.push(outcome);
        }
        outcomes
    }

    /// Returns how many controls broke nothing, or something else than they should.
    fn find(&self, controls: &[Control<impl Checkable>]) -> usize {
        let mut failures = 0;
        for Control(defect, world, breaks) in controls {
            let name = match defect {
                Defect::Without(protection) => format!("without {protection:?} ({})", protection.rule()),
                Defect::With(flaw) => format!("{flaw:?}"),
            };
            if !name.contains(&self.filter) {
                continue;
            }
            let outcome = check::shortest_violation(world.with(*defect));
            row(world, &outcome, &name);
            let broken = outcome.violated.as_ref().map(|(law, _)| *law);
            let is_met = match broken {
                Some(law) => breaks.iter().any(|rule| rule.id() == law),
                None => breaks.is_empty(),
            };
            if !is_met {
                println!("    UNEXPECTED: breaks {broken:?} instead of one of {breaks:?}");
                failures += 1;
            } else if broken.is_none() {
                println!("    breaks nothing: a second line of defense");
            }
            trace(&outcome);
        }
        failures
    }
}

fn row(world: &impl Checkable, outcome: &CheckOutcome, last: &str) {
    let CheckOutcome { steps, states, depth, took, .. } = outcome;
    println!("{:<18} {steps:>10} {states:>10} {depth:>5} {:>7.1}  {last}", world.name(), took.as_secs_f64());
}

fn trace(outcome: &CheckOutcome) {
    let Some((law, way)) = &outcome.violated else { return };
    println!("    breaks {law} in {} steps:", way.len());
    for (number, step) in way.iter().enumerate() {
        println!("    {:>3}. {step}", number + 1);
    }
}
