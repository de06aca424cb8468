//! Running other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// A cargo command to run in the workspace's root.
pub(crate) fn cargo<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Builds the binary that demo and tests run.
///
/// As a part of the workspace and together with a small test: cargo then picks the features of dependencies that
/// `cargo test --workspace` picks, and compiles them once for both.
pub(crate) fn build_evictd() -> anyhow::Result<()> {
    run(&mut cargo(["build", "--quiet", "--workspace", "--bin", "evictd", "--test", "loom"]))
}

/// Runs a command. Any other exit code than 0 is an error.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed ({status})");
    Ok(())
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}
