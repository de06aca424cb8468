//! Running other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// A command to run in the workspace's root.
pub(crate) struct Step {
    command: Command,
    shown: String,
}

/// A cargo command.
pub(crate) fn cargo(args: &[&str]) -> Step {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(args).current_dir(root());
    Step { command, shown: format!("cargo {}", args.join(" ")) }
}

/// Builds the binary that demo and tests run.
///
/// As a part of the workspace and together with a small test: cargo then picks the features of dependencies that
/// `cargo test --workspace` picks, and compiles them once for both.
pub(crate) fn build_evictd() -> anyhow::Result<()> {
    cargo(&["build", "--quiet", "--workspace", "--bin", "evictd", "--test", "loom"]).run()
}

impl Step {
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it. Any other exit code than 0 is an error.
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        let status = self.command.status().with_context(|| format!("cannot run `{}`", self.shown))?;
        if !status.success() {
            bail!("`{}` failed ({status})", self.shown);
        }
        Ok(())
    }

    /// Returns the command, to run it in another way, and its name.
    pub(crate) fn into_parts(self) -> (Command, String) {
        (self.command, self.shown)
    }
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}
