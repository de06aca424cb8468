//! `cargo xtask model`: the exhaustive checks. loom checks the cells that hits, loads and invalidations share. A model
//! checker checks the protocol in small worlds.

use clap::Args;

use crate::missing::without_protections;
use crate::steps::{self, Step};
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
    // A filter names worlds or controls, so it excludes loom and the stores.
    let everything = args.filter.is_none();
    let filter: Vec<&str> = args.filter.as_deref().into_iter().collect();
    if !args.negative_controls {
        if everything {
            run_counted(loom())?;
        }
        return check(&filter).run();
    }
    if everything {
        run_counted(without_protections(loom())?)?;
        run_counted(without_protections(stores())?)?;
    }
    without_protections(check(&[&["--negative-controls"], &filter[..]].concat()))?.run()
}

/// The tests of interleavings. They have a target directory of their own, because other crates read this flag, too.
fn loom() -> Step {
    let package = ["--package", "evictd-core", "--test", "loom", "--target-dir", "target/loom"];
    steps::cargo(&[&["test", "--release"][..], &package].concat()).env("RUSTFLAGS", "--cfg loom")
}

/// The controls of the stores, on real databases. The build is that of all tests, so that they share external crates.
fn stores() -> Step {
    steps::cargo(&["test", "--workspace", "--test", "it", "negative_control"])
}

fn check(args: &[&str]) -> Step {
    let run = ["run", "--quiet", "--release", "--package", "evictd-model", "--"];
    steps::cargo(&[&run[..], args].concat())
}
