//! Builds that can switch off a protection.
//!
//! For the workspace's own crates, cargo runs this program in place of rustc. It keeps the results apart from those of other
//! builds, except for the programs themselves: `cargo xtask` replaces them each time. External crates are built once for
//! both.

use std::process::{Command, ExitCode};

use anyhow::Context;

const CFG: &str = "evictd_negative_controls";

/// Set for a cargo that runs this program in place of rustc.
const AS_RUSTC: &str = "EVICTD_XTASK_AS_RUSTC";

/// Makes a cargo command build code that can switch off a protection.
pub(crate) fn without_protections(cargo: &mut Command) -> anyhow::Result<&mut Command> {
    let this = std::env::current_exe().context("cannot find the path of xtask")?;
    Ok(cargo.env("RUSTC_WORKSPACE_WRAPPER", this).env(AS_RUSTC, "1"))
}

/// Compiles a crate, if cargo runs this program in place of rustc.
pub(crate) fn compile() -> Option<ExitCode> {
    std::env::var_os(AS_RUSTC)?;
    let mut args = std::env::args_os().skip(1);
    let rustc = args.next()?;
    let status = Command::new(&rustc).args(args).args(["--cfg", CFG]).status();
    if let Err(error) = &status {
        eprintln!("xtask: cannot run {}: {error}", rustc.display());
    }
    let code = status.ok().and_then(|status| u8::try_from(status.code()?).ok());
    Some(ExitCode::from(code.unwrap_or(1)))
}
