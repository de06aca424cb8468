//! The command line: what `cargo xtask sim` passes on.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};

use crate::controls;
use crate::report;
use crate::scenario::Scenario;
use crate::trace::SimTrace;
use crate::world;

/// Runs evictd's cores in a simulated world and judges every answer.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim", bin_name = "cargo xtask sim")]
#[allow(clippy::struct_excessive_bools, reason = "they are the flags of a command line")]
pub struct SimCli {
    /// Seeds of each scenario.
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Only this scenario.
    #[arg(long)]
    scenario: Option<Scenario>,
    /// Only this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Print everything that happens; with one scenario and one seed.
    #[arg(long, requires = "scenario", requires = "seed")]
    trace: bool,
    /// The format of the result.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Threads; all cores if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Run each seed twice and compare the traces.
    #[arg(long)]
    check_determinism: bool,
    /// Miss one protection at a time: each time a checker must find out.
    #[arg(long)]
    negative_controls: bool,
    /// Only the control of this protection.
    #[arg(long, requires = "negative_controls")]
    control: Option<String>,
    /// Determinism, and a slice of all scenarios.
    #[arg(long)]
    ci: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Seeds of each scenario in the slice for a gate.
const CI_SEEDS: u64 = 8;

/// Runs what the command line says.
pub fn main() -> ExitCode {
    let cli = SimCli::parse();
    let well = if cli.trace {
        cli.trace_one()
    } else if cli.negative_controls {
        controls::run(cli.control.as_deref(), cli.threads())
    } else if cli.check_determinism {
        cli.determinism(if cli.seed.is_some() { 1 } else { cli.seeds.min(2) })
    } else if cli.ci {
        // First: without it, a seed that failed could not be looked at.
        cli.determinism(1) && cli.simulate(CI_SEEDS)
    } else {
        cli.simulate(cli.seeds)
    };
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl SimCli {
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn scenarios(&self) -> Vec<Scenario> {
        self.scenario.map_or_else(|| Scenario::ALL.to_vec(), |scenario| vec![scenario])
    }

    fn simulate(&self, seeds: u64) -> bool {
        let (first, seeds) = self.seed.map_or((self.first, seeds), |seed| (seed, 1));
        let report = report::run(&self.scenarios(), first, seeds, self.threads());
        match self.output {
            Output::Text => print!("{}{}", report.table(), report.explain()),
            Output::Json => println!("{:#}", report.json()),
        }
        report.failures().next().is_none()
    }

    fn trace_one(&self) -> bool {
        let (Some(scenario), Some(seed)) = (self.scenario, self.seed) else { return false };
        let outcome = world::run(scenario, seed, SimTrace::Print);
        outcome.violations.is_empty()
    }

    fn determinism(&self, seeds: u64) -> bool {
        let began = Instant::now();
        let scenarios = self.scenarios();
        let first = self.seed.unwrap_or(self.first);
        let mut well = true;
        let (mut lines, mut bytes) = (0, 0);
        let job =
            |index: usize| (scenarios[index % scenarios.len()], first + (index / scenarios.len()) as u64);
        let twice = |index: usize| {
            let (scenario, seed) = job(index);
            [(); 2].map(|()| world::run(scenario, seed, SimTrace::Digest(Box::default())).trace)
        };
        report::in_parallel(scenarios.len() * seeds as usize, self.threads(), twice, |index, traces| {
            let [SimTrace::Digest(one), SimTrace::Digest(other)] = traces else { return };
            lines += one.lines;
            bytes += one.bytes;
            if one != other {
                well = false;
                let (scenario, seed) = job(index);
                println!(
                    "scenario {}, seed {seed}: two runs differ before line {}",
                    scenario.name(),
                    one.parts_before(&other)
                );
            }
        });
        if well {
            println!(
                "determinism: {} runs, each twice, the same {lines} lines ({} MB), {:.1} s",
                scenarios.len() * seeds as usize,
                bytes >> 20,
                secs(began.elapsed())
            );
        }
        well
    }
}

fn secs(duration: Duration) -> f64 {
    duration.as_secs_f64()
}
