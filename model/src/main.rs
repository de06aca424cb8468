//! The command behind `cargo xtask model`: exhausts every world, or looks for what each control breaks; prints a
//! table, and fails if anything is not as it must be.

use std::process::ExitCode;

use clap::Parser;
use evictd_core::rules::Rule;
use evictd_model::check::{self, CheckOutcome};
use evictd_model::{controls, history, worlds};

#[derive(Parser)]
struct ModelCli {
    /// Miss each protection in turn.
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
    let failures = if cli.negative_controls { find_controls(&cli)? } else { exhaust_worlds(&cli) };
    if failures > 0 {
        eprintln!("model: {failures} of the above are not as they must be");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns how many worlds have a violation, or prove too little.
fn exhaust_worlds(cli: &ModelCli) -> usize {
    println!(
        "{:<18} {:>10} {:>10} {:>5} {:>7}  what meets in it",
        "world", "steps", "states", "depth", "seconds"
    );
    let mut failures = 0;
    let (mut steps, mut states, mut seconds) = (0, 0, 0.0);
    let mut sum = |name: &str, about: &str, outcome: &CheckOutcome| {
        row(name, outcome, about);
        steps += outcome.steps;
        states += outcome.states;
        seconds += outcome.took.as_secs_f64();
        for never in &outcome.never {
            println!("    proves too little: never happened that {never}");
        }
        if let Some((law, way)) = &outcome.violated {
            trace(law, way);
        }
        failures += usize::from(outcome.violated.is_some() || !outcome.never.is_empty());
    };
    for world in worlds::ALL.iter().filter(|world| world.name.contains(&cli.filter)) {
        sum(world.name, world.about, &check::exhaust(*world, cli.threads));
    }
    for world in history::worlds::ALL.iter().filter(|world| world.name.contains(&cli.filter)) {
        sum(world.name, world.about, &check::exhaust(*world, cli.threads));
    }
    println!("{:<18} {steps:>10} {states:>10} {:>5} {seconds:>7.1}", "together", "");
    failures
}

/// Returns how many controls broke nothing, or something else than they should.
fn find_controls(cli: &ModelCli) -> anyhow::Result<usize> {
    if !cfg!(evictd_negative_controls) {
        anyhow::bail!("this build can't miss a protection; run `cargo xtask model --negative-controls`");
    }
    println!("{:<18} {:>10} {:>10} {:>5} {:>7}  control", "world", "steps", "states", "depth", "seconds");
    let mut failures = 0;
    let mut look = |world: &str, name: &str, breaks: &[Rule], outcome: &CheckOutcome| {
        row(world, outcome, name);
        let broken = outcome.violated.as_ref().map(|(law, _)| *law);
        let is_met = match broken {
            Some(law) => breaks.iter().any(|rule| rule.id() == law),
            None => breaks.is_empty(),
        };
        if !is_met {
            println!("    NOT AS IT MUST BE: breaks {broken:?} instead of one of {breaks:?}");
            failures += 1;
        }
        match &outcome.violated {
            Some((law, way)) => trace(law, way),
            None => println!("    breaks nothing: a second line"),
        }
    };
    for control in controls::ALL.iter().filter(|control| control.name().contains(&cli.filter)) {
        look(control.world.name, &control.name(), control.breaks, &control.check());
    }
    for control in history::controls::ALL.iter().filter(|control| control.name().contains(&cli.filter)) {
        look(control.world.name, &control.name(), control.breaks, &control.check());
    }
    Ok(failures)
}

fn row(name: &str, outcome: &CheckOutcome, about: &str) {
    let CheckOutcome { steps, states, depth, took, .. } = outcome;
    println!("{name:<18} {steps:>10} {states:>10} {depth:>5} {:>7.1}  {about}", took.as_secs_f64());
}

fn trace(law: &str, way: &[String]) {
    println!("    breaks {law} in {} steps:", way.len());
    for (number, step) in way.iter().enumerate() {
        println!("    {:>3}. {step}", number + 1);
    }
}
