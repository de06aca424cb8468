//! `cargo xtask model`: everything that is checked to exhaustion. The cells that hits, loads and invalidations
//! share, under loom; the protocol in small worlds, under a model checker.

use clap::Args;

use crate::missing::without_protections;
use crate::steps::{self, Step};
use crate::test::run_counted;

#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Miss each protection in turn instead: a violation must be found without it.
    #[arg(long)]
    negative_controls: bool,
    /// Check only worlds or controls whose name contains this.
    filter: Option<String>,
}

pub(crate) fn run(args: &ModelArgs) -> anyhow::Result<()> {
    // Without some worlds or controls that are asked for.
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

/// The tests of interleavings, in a directory of their own: other crates look at this flag, too.
fn loom() -> Step {
    let package = ["--package", "evictd-core", "--test", "loom", "--target-dir", "target/loom"];
    steps::cargo(&[&["test", "--release"][..], &package].concat()).env("RUSTFLAGS", "--cfg loom")
}

/// The controls of the stores, on real databases. Built as for all tests, so that these find the crates of others built.
fn stores() -> Step {
    steps::cargo(&["test", "--workspace", "--test", "it", "negative_control"])
}

fn check(args: &[&str]) -> Step {
    let run = ["run", "--quiet", "--release", "--package", "evictd-model", "--"];
    steps::cargo(&[&run[..], args].concat())
}
