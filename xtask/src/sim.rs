//! `cargo xtask sim`: builds the simulator with optimizations, and runs it.

use clap::Args;

use crate::{missing, steps};

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
    let given = |flag: &str| args.rest.iter().any(|arg| arg == flag);
    if given(NEGATIVE_CONTROLS) {
        return without_protections(&args.rest);
    }
    simulator(&args.rest).run()?;
    if given("--ci") { without_protections(&[NEGATIVE_CONTROLS.to_owned()]) } else { Ok(()) }
}

fn simulator(args: &[String]) -> steps::Step {
    let run = ["run", "--quiet", "--profile", "sim", "--package", "evictd-sim", "--"];
    let args: Vec<&str> = run.into_iter().chain(args.iter().map(String::as_str)).collect();
    steps::cargo(&args)
}

/// Runs a build of its own, the only one that can switch off protections of the core.
fn without_protections(args: &[String]) -> anyhow::Result<()> {
    missing::without_protections(simulator(args))?.run()
}
