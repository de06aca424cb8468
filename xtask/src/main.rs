//! The commands of the workspace.
//!
//! * [`crashes`]: many deletions while publishers are killed.
//! * [`demo`]: a deletion, measured in three regions.
//! * [`mod@test`]: all tests, with their setup.
//! * [`generate()`]: checked-in files that are generated.
//! * [`model`]: the exhaustive checks.
//! * [`sim`]: the simulator.
//! * [`missing`]: builds that can switch off a protection.
//! * [`monitoring`]: the shipped Prometheus files, against a running deployment.
//! * [`wording`]: no file uses a word that CONTRIBUTING.md rules out.

mod crashes;
mod demo;
mod missing;
mod model;
mod monitoring;
#[cfg(test)]
mod pages;
mod sim;
mod steps;
mod test;
mod wording;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The commands of evictd's workspace", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch a deletion reach three regions: four NATS servers, a publisher, three agents.
    Demo(demo::DemoArgs),
    /// Delete many keys with many clients while publishers are killed every few seconds, and account for each.
    Crashes(crashes::CrashArgs),
    /// Install what the tests need, and run all of them.
    Test(test::TestArgs),
    /// Rewrite the generated files: protobuf code, docs/metrics.md, docs/config.md.
    Generate,
    /// Check the shared cells and the protocol exhaustively, or that each missing protection is detected.
    Model(model::ModelArgs),
    /// Run the cores in a simulated world, and check every answer (`--help` is the simulator's own).
    Sim(sim::SimArgs),
    /// Check deploy/prometheus with promtool, and have a real Prometheus scrape all targets (Debian: package
    /// `prometheus`).
    Monitoring,
    /// Find words that CONTRIBUTING.md rules out, in code and pages.
    Wording,
}

fn main() -> ExitCode {
    if let Some(compiled) = missing::compile() {
        return compiled;
    }
    let done = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Crashes(args) => crashes::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Generate => generate(),
        Command::Model(args) => model::run(&args),
        Command::Sim(args) => sim::run(&args),
        Command::Monitoring => monitoring::run(),
        Command::Wording => wording::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// With `EVICTD_REGENERATE`, the tests that detect stale files rewrite them.
fn generate() -> anyhow::Result<()> {
    for package in ["evictd-wire", "evictd"] {
        let mut test = steps::cargo(["test", "--quiet", "--package", package, "up_to_date"]);
        steps::run(test.env("EVICTD_REGENERATE", "1"))?;
    }
    Ok(())
}
