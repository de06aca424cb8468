//! The scripts of evictd.
//!
//! * [`crashes`]: many deletions, while publishers are killed.
//! * [`demo`]: a deletion, watched from three regions.
//! * [`mod@test`]: the whole suite, set-up included.
//! * [`generate()`]: what is checked in and comes from something else.
//! * [`model`]: what is checked to exhaustion.
//! * [`sim`]: the simulator.
//! * [`missing`]: builds that can miss a protection.
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
#[command(name = "cargo xtask", about = "The scripts of evictd", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch a deletion reach three regions: four NATS servers, a publisher, three agents.
    Demo(demo::DemoArgs),
    /// Delete many keys by many clients while publishers are killed every few seconds, and account for each.
    Crashes(crashes::CrashArgs),
    /// Run all tests, after getting what they need.
    Test(test::TestArgs),
    /// Rewrite what is generated: protobuf code, docs/metrics.md, docs/config.md.
    Generate,
    /// Check the shared cells and the protocol to exhaustion, or that each missing protection is noticed.
    Model(model::ModelArgs),
    /// Run the cores in a simulated world, and judge every answer (`--help` is the simulator's own).
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

/// The tests that find generated files stale rewrite them when they are told to.
fn generate() -> anyhow::Result<()> {
    for package in ["evictd-wire", "evictd"] {
        steps::cargo(&["test", "--quiet", "--package", package, "up_to_date"])
            .env("EVICTD_REGENERATE", "1")
            .run()?;
    }
    Ok(())
}
