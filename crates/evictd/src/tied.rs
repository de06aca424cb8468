//! Children that end with their parent, even when that one is killed.
//!
//! The kernel sends a signal to a process when its parent ends, if that process asked for it; the request
//! survives `exec`. So a child is started as `evictd exec-tied -- program`, asks, and becomes the program.
//! The kernel means the parent's *thread* that started it: start tied children from a thread that stays.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use clap::Args;

#[derive(Args, Debug)]
pub(crate) struct TiedArgs {
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

/// A command that runs `program` tied to the calling thread, in a process group of its own: Ctrl-C in the
/// terminal reaches only the parent, which ends the child when it no longer needs it.
pub(crate) fn command(program: &Path) -> anyhow::Result<Command> {
    let evictd = std::env::current_exe().context("can't find the evictd program itself")?;
    let mut command = Command::new(evictd);
    command.arg("exec-tied").arg("--").arg(program);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    Ok(command)
}

/// Becomes the program; returns only if that fails.
pub(crate) fn exec(args: &TiedArgs) -> anyhow::Result<()> {
    let Some((program, rest)) = args.command.split_first() else {
        anyhow::bail!("name the program to run");
    };
    tie()?;
    let mut command = Command::new(program);
    command.args(rest);
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    Err(error).with_context(|| format!("can't run {}", program.display()))
}

#[cfg(target_os = "linux")]
fn tie() -> anyhow::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    let parent = getppid();
    set_parent_process_death_signal(Some(Signal::KILL)).context("can't tie this process to its parent")?;
    // The parent may have ended before it was asked for.
    anyhow::ensure!(getppid() == parent, "the parent has ended already");
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn tie() -> anyhow::Result<()> {
    Ok(())
}
