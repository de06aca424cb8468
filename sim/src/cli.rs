//! The command line: what `cargo xtask sim` passes on.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Instant;

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
    /// Threads; all cores if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Run each seed twice and compare the traces.
    #[arg(long)]
    check_determinism: bool,
    /// Switch off one protection at a time: the checkers must find what breaks.
    #[arg(long)]
    negative_controls: bool,
    /// Only the controls whose name contains this.
    #[arg(long, requires = "negative_controls", default_value = "")]
    control: String,
    /// Determinism, and a slice of all scenarios.
    #[arg(long)]
    ci: bool,
}

/// Seeds of each scenario in the slice for a gate.
const CI_SEEDS: u64 = 8;

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = SimCli::parse();
    let passes = if cli.trace {
        cli.trace_one()
    } else if cli.negative_controls {
        controls::run(&cli.control, cli.threads())
    } else if cli.check_determinism {
        cli.determinism(cli.seeds.min(2))
    } else if cli.ci {
        // First: without it, a seed that fails can't be repeated.
        cli.determinism(1) && cli.simulate(CI_SEEDS)
    } else {
        cli.simulate(cli.seeds)
    };
    if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl SimCli {
    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn scenarios(&self) -> Vec<Scenario> {
        self.scenario.map_or_else(|| Scenario::value_variants().to_vec(), |scenario| vec![scenario])
    }

    fn seeds(&self, count: u64) -> Range<u64> {
        self.seed.map_or(self.first..self.first + count, |seed| seed..seed + 1)
    }

    fn simulate(&self, seeds: u64) -> bool {
        report::run(&self.scenarios(), self.seeds(seeds), self.threads())
    }

    fn trace_one(&self) -> bool {
        let (Some(scenario), Some(seed)) = (self.scenario, self.seed) else { return false };
        world::run(scenario, seed, SimTrace::Print).violations.is_empty()
    }

    fn determinism(&self, seeds: u64) -> bool {
        let began = Instant::now();
        let runs = report::runs(&self.scenarios(), self.seeds(seeds));
        let (mut passes, mut lines, mut bytes) = (true, 0, 0);
        let twice = |(scenario, seed)| {
            [(); 2].map(|()| world::run(scenario, seed, SimTrace::Digest(Box::default())).trace)
        };
        report::in_parallel(&runs, self.threads(), twice, |(scenario, seed), traces| {
            let [SimTrace::Digest(one), SimTrace::Digest(other)] = traces else { return };
            lines += one.lines;
            bytes += one.bytes;
            if one != other {
                passes = false;
                let (name, line) = (scenario.name(), one.differs_before(&other));
                println!("scenario {name}, seed {seed}: two runs differ before line {line}");
            }
        });
        if passes {
            println!(
                "determinism: {} runs, each twice, the same {lines} lines ({} MB), {:.1} s",
                runs.len(),
                bytes >> 20,
                began.elapsed().as_secs_f64()
            );
        }
        passes
    }
}
