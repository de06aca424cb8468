//! `cargo xtask test`: installs what the tests need, runs all of them and counts them.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use clap::Args;
use evictd_tests::nats_server;

use crate::steps;

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Passed on to `cargo test`, for example `-p evictd-core` or a test's name.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let nats_server = nats_server::find_or_install()?;
    steps::build_evictd()?;
    run_counted(steps::cargo(cargo_args(&args.rest)).env("EVICTD_NATS_SERVER", nats_server))
}

/// Runs a `cargo test` and counts its tests. Without any, it is an error.
pub(crate) fn run_counted(test: &mut Command) -> anyhow::Result<()> {
    // Most tests wait most of the time, for real processes and for bounds to pass.
    let threads = std::env::var("RUST_TEST_THREADS")
        .unwrap_or_else(|_| (2 * std::thread::available_parallelism().map_or(1, usize::from)).to_string());
    test.env("RUST_TEST_THREADS", threads).stdout(Stdio::piped());
    let mut child = test.spawn().with_context(|| format!("cannot run {test:?}"))?;
    let stdout = child.stdout.take().context("the tests' output was piped")?;
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        counts.add(&line);
        println!("{line}");
    }
    let status = child.wait()?;
    println!("{} passed, {} failed", counts.passed, counts.failed);
    ensure!(status.success(), "{test:?} failed ({status})");
    ensure!(counts.passed > 0, "no test ran");
    Ok(())
}

/// Tests the whole workspace, unless packages are chosen.
fn cargo_args(rest: &[String]) -> Vec<&str> {
    let rest = rest.iter().map(String::as_str);
    // What follows `--` is for the test binaries.
    let chosen = rest.clone().take_while(|arg| *arg != "--").any(chooses_package);
    let all = (!chosen).then_some("--workspace");
    ["test", "--no-fail-fast"].into_iter().chain(all).chain(rest).collect()
}

/// Whether this is `-p NAME` or `--package NAME`, in one argument or the first of two.
fn chooses_package(arg: &str) -> bool {
    (arg.starts_with("-p") && !arg.starts_with("--")) || arg == "--package" || arg.starts_with("--package=")
}

/// The sums of the test binaries' results.
#[derive(Default, PartialEq, Eq, Debug)]
struct Counts {
    passed: u64,
    failed: u64,
}

impl Counts {
    /// Reads lines such as `test result: ok. 3 passed; 0 failed; 0 ignored; ...`.
    fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let words: Vec<&str> = result.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
        let count = |what: &str| {
            let pair = words.windows(2).find(|pair| pair[1] == what);
            pair.and_then(|pair| pair[0].parse::<u64>().ok()).unwrap_or(0)
        };
        self.passed += count("passed");
        self.failed += count("failed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_chosen_packages_are_tested() {
        let workspace = |line: &str| {
            let rest: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            let args = cargo_args(&rest);
            assert!(args.ends_with(&rest.iter().map(String::as_str).collect::<Vec<_>>()), "{args:?}");
            args.contains(&"--workspace")
        };
        for chosen in
            ["-p evictd-core", "-pevictd-core", "--package evictd-core", "--release --package=evictd"]
        {
            assert!(!workspace(chosen), "{chosen}");
        }
        for all in ["", "a_gap", "--profile ci", "-- -p x", "--release -- --package=x"] {
            assert!(workspace(all), "{all}");
        }
    }

    #[test]
    fn results_of_all_binaries_are_added_up() {
        let mut counts = Counts::default();
        counts.add("running 3 tests");
        counts.add(
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s",
        );
        counts.add(
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 9 filtered out; finished in 2s",
        );
        assert_eq!(counts, Counts { passed: 5, failed: 1 });
    }
}
