//! `cargo xtask sim`: builds the simulator with optimizations, and runs it.

use std::process::Command;

use clap::Args;

use crate::missing::without_protections;
use crate::steps;

/// Passed on to the simulator; `cargo xtask sim --help` shows its options.
#[derive(Args)]
#[command(disable_help_flag = true)]
pub(crate) struct SimArgs {
    /// `--seeds N`, `--scenario NAME`, `--seed N --trace`, `--check-determinism`, `--negative-controls`, `--ci`, ...
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

const NEGATIVE_CONTROLS: &str = "--negative-controls";

pub(crate) fn run(args: &SimArgs) -> anyhow::Result<()> {
    let is_given = |flag: &str| args.rest.iter().any(|arg| arg == flag);
    let mut simulator = simulator(args.rest.iter().map(String::as_str));
    if is_given(NEGATIVE_CONTROLS) {
        return steps::run(without_protections(&mut simulator)?);
    }
    steps::run(&mut simulator)?;
    if is_given("--ci") {
        steps::run(without_protections(&mut self::simulator([NEGATIVE_CONTROLS]))?)?;
    }
    Ok(())
}

fn simulator<'a>(args: impl IntoIterator<Item = &'a str>) -> Command {
    let run = ["run", "--quiet", "--profile", "sim", "--package", "evictd-sim", "--"];
    steps::cargo(run.into_iter().chain(args))
}
