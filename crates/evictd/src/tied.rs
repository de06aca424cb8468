//! Child processes that end with their parent, even if the parent is killed.
//!
//! The kernel signals a process when its parent exits, if the process has requested it; the request survives `exec`.
//! So a child starts as `evictd exec-tied -- program`, makes the request, and becomes the program. To the kernel, the
//! parent is the *thread* that started the child, so start tied children from a thread that does not exit.

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

/// Returns a command that runs `program` tied to the calling thread. It has its own process group, so Ctrl-C reaches
/// only the parent, which ends the child when it no longer needs it.
pub(crate) fn command(program: &Path) -> anyhow::Result<Command> {
    let evictd = std::env::current_exe().context("cannot find the evictd program itself")?;
    let mut command = Command::new(evictd);
    command.arg("exec-tied").arg("--").arg(program);
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    Ok(command)
}

/// Becomes the program. Returns only if that fails.
pub(crate) fn exec(args: &TiedArgs) -> anyhow::Result<()> {
    let Some((program, rest)) = args.command.split_first() else {
        anyhow::bail!("name the program to run");
    };
    tie()?;
    let mut command = Command::new(program);
    command.args(rest);
    let error = std::os::unix::process::CommandExt::exec(&mut command);
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

#[cfg(target_os = "linux")]
fn tie() -> anyhow::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};

    let parent = getppid();
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot tie this process to its parent")?;
    // The parent may have exited before the request.
    anyhow::ensure!(getppid() == parent, "the parent has already exited");
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn tie() -> anyhow::Result<()> {
    Ok(())
}
