//! `cargo xtask model`: everything that is checked to exhaustion. The cells that hits, loads and invalidations
//! share, under loom; the protocol in small worlds, under a model checker.

use clap::Args;

use crate::steps;

/// What is built with protections that can be switched off, and where.
const MISSING: &str = "--cfg evictd_negative_controls";
const CONTROLS: &str = "target/model-controls";

#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Miss each protection in turn instead: a violation must be found without it.
    #[arg(long)]
    negative_controls: bool,
    /// Check only worlds or controls whose name contains this.
    filter: Option<String>,
}

pub(crate) fn run(args: &ModelArgs) -> anyhow::Result<()> {
    if args.negative_controls {
        loom("target/loom-controls", "--cfg loom --cfg evictd_negative_controls", args)?;
        if args.filter.is_none() {
            // Those of the stores, on real databases.
            let package = ["--package", "evictd-store", "--test", "it", "--target-dir", CONTROLS];
            steps::cargo(&[&["test", "--quiet"][..], &package, &["negative_control"]].concat())
                .env("RUSTFLAGS", MISSING)
                .run()?;
        }
        return check(CONTROLS, MISSING, &["--negative-controls"], args);
    }
    loom("target/loom", "--cfg loom", args)?;
    check("target/model", "", &[], args)
}

/// The tests of interleavings, unless only some worlds or controls are asked for.
fn loom(target: &str, rustflags: &str, args: &ModelArgs) -> anyhow::Result<()> {
    if args.filter.is_some() {
        return Ok(());
    }
    let package = ["--package", "evictd-core", "--test", "loom", "--target-dir", target];
    steps::cargo(&[&["test", "--quiet", "--release"][..], &package].concat())
        .env("RUSTFLAGS", rustflags)
        .run()
}

/// A directory for each kind of build, so that none rebuilds for another.
fn check(target: &str, rustflags: &str, more: &[&str], args: &ModelArgs) -> anyhow::Result<()> {
    let filter: Vec<&str> = args.filter.as_deref().into_iter().collect();
    let run = ["run", "--quiet", "--release", "--package", "evictd-model", "--target-dir", target, "--"];
    steps::cargo(&[&run[..], more, &filter].concat()).env("RUSTFLAGS", rustflags).run()
}
