//! Builds that can miss a protection.
//!
//! For the workspace's own crates cargo runs this program in place of rustc, and keeps what comes of it apart from all
//! other builds, except for the programs themselves: `cargo xtask` replaces them each time. The crates of others are built
//! once for both.

use std::ffi::OsStr;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::steps::Step;

const CFG: &str = "evictd_negative_controls";

/// Set for a cargo that runs this program as rustc.
const AS_RUSTC: &str = "EVICTD_XTASK_AS_RUSTC";

/// Makes a cargo command build what can miss a protection.
pub(crate) fn without_protections(step: Step) -> anyhow::Result<Step> {
    let this = std::env::current_exe().context("can't find out where xtask is")?;
    Ok(step.env("RUSTC_WORKSPACE_WRAPPER", this).env(AS_RUSTC, "1"))
}

/// Compiles a crate, if cargo runs this program for that.
pub(crate) fn compile() -> Option<ExitCode> {
    std::env::var_os(AS_RUSTC)?;
    let mut args = std::env::args_os().skip(1);
    let rustc = args.next()?;
    let status = match Command::new(&rustc).args(args).args(["--cfg", CFG].map(OsStr::new)).status() {
        Ok(status) => status,
        Err(error) => {
            eprintln!("xtask: can't run {}: {error}", rustc.display());
            return Some(ExitCode::FAILURE);
        }
    };
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Some(ExitCode::from(code.unwrap_or(1)))
}
