//! `cargo xtask model`: the exhaustive checks. loom checks the cells that hits, loads and invalidations share. A model
//! checker checks the protocol in small worlds.

use std::process::Command;

use clap::Args;

use crate::missing::without_protections;
use crate::steps;
use crate::test::run_counted;

#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Switch off each protection in turn: the check must then find a violation.
    #[arg(long)]
    negative_controls: bool,
    /// Check only worlds or controls whose name contains this.
    filter: Option<String>,
}

pub(crate) fn run(args: &ModelArgs) -> anyhow::Result<()> {
    let mut check = steps::cargo(["run", "--quiet", "--release", "--package", "evictd-model", "--"]);
    check.args(&args.filter);
    // A filter names worlds or controls, so it excludes loom and the stores.
    let everything = args.filter.is_none();
    if !args.negative_controls {
        if everything {
            run_counted(&mut loom())?;
        }
        return steps::run(&mut check);
    }
    if everything {
        run_counted(without_protections(&mut loom())?)?;
        // On real databases. The build is that of all tests, so that they share external crates.
        let mut stores = steps::cargo(["test", "--workspace", "--test", "it", "negative_control"]);
        run_counted(without_protections(&mut stores)?)?;
    }
    steps::run(without_protections(check.arg("--negative-controls"))?)
}

/// The tests of interleavings. They have a target directory of their own, because other crates read this flag, too.
fn loom() -> Command {
    let package = ["--package", "evictd-core", "--test", "loom", "--target-dir", "target/loom"];
    let mut loom = steps::cargo(["test", "--release"].into_iter().chain(package));
    loom.env("RUSTFLAGS", "--cfg loom");
    loom
}
