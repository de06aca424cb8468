//! [`Home`]: a directory for one server's files. Neither the directory nor the server's processes outlive the test.
//!
//! A killed test runs no destructors, and statics are never dropped. So each home has a keeper: a shell that waits
//! for its standard input to end. The kernel closes it however the test ends. The keeper then ends all processes
//! that work in the directory, and removes it. Dropping a home does the same.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, geteuid, kill_process};

/// PostgreSQL refuses to run as root. If the tests run as root, this user runs it: `nobody`, and its group.
pub(crate) const UNPRIVILEGED: u32 = 65_534;

/// How the keeper removes the home `$1`. It tries an immediate shutdown first: a killed server leaves a segment of
/// shared memory behind, and a machine has a limited number of them. If the test has killed the server, line 7 of
/// `postmaster.pid` ("key id") names that segment.
const KEEPER: &str = r#"
read -r _
signal() {
    found=1
    for cwd in /proc/[0-9]*/cwd; do
        if [ "$cwd" -ef "$home" ] || [ "$cwd" -ef "$home/data" ]; then
            pid=${cwd#/proc/}
            kill "-$1" "${pid%/cwd}" && found=0
        fi
    done
    return $found
}
home=$1
signal QUIT
signal CONT
tries=0
while signal 0 && [ $((tries += 1)) -lt 1000 ]; do sleep 0.01; done
while signal KILL; do sleep 0.01; done
segment=$(sed -n '7s/.* //p' "$home/data/postmaster.pid") && [ "$segment" ] && ipcrm -m "$segment"
rm -rf "$home"
"#;

/// A directory that belongs to the user who runs the server.
pub(crate) struct Home {
    dir: PathBuf,
    keeper: Child,
}

impl Home {
    pub(crate) fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("evictd-postgres-").tempdir()?;
        // As the kernel spells it in /proc.
        let path = dir.path().canonicalize()?;
        if geteuid().is_root() {
            chown(&path, Some(UNPRIVILEGED), Some(UNPRIVILEGED))
                .with_context(|| format!("giving {} to user {UNPRIVILEGED}", path.display()))?;
        }
        let mut keeper = Command::new("/bin/sh");
        keeper.args(["-c", KEEPER, "keeper"]).arg(&path).current_dir("/");
        // A signal to the test's process group must not end the keeper.
        keeper.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let keeper = as_server_user(&mut keeper).spawn().context("starting /bin/sh")?;
        Ok(Self { dir: dir.keep(), keeper })
    }

    /// Ends all processes that work here, and removes the directory.
    pub(crate) fn remove(&mut self) {
        drop(self.keeper.stdin.take());
        // A failure can't be reported from here.
        let _ = self.keeper.wait();
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// The server's data directory.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// `program`, to be run in this directory by the server's user, without this process's `PG*` settings.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(&name);
            }
        }
        command
            .current_dir(&self.dir)
            .env("HOME", &self.dir)
            .env("LC_ALL", "C")
            .env("PGCONNECT_TIMEOUT", "30");
        command.process_group(0).stdin(Stdio::null());
        as_server_user(&mut command);
        command
    }

    /// The server's processes: all that work in its data directory.
    pub(crate) fn processes(&self) -> Result<Vec<Pid>> {
        let data = self.data();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("listing processes: /proc is needed")? {
            let entry = entry?;
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
            // The link can't be read if the process is ending or belongs to another user.
            if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data) {
                found.extend(Pid::from_raw(pid));
            }
        }
        Ok(found)
    }

    /// Whether the server whose first process is `pid` accepts connections. Line 8 of `postmaster.pid` says so, as for
    /// `pg_ctl`.
    pub(crate) fn is_ready(&self, pid: u32) -> bool {
        let Ok(notes) = fs::read_to_string(self.data().join("postmaster.pid")) else { return false };
        let mut lines = notes.lines();
        lines.next().is_some_and(|first| first == pid.to_string())
            && lines.nth(6).is_some_and(|status| status.trim_end() == "ready")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Runs `command` to its end, and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = Path::new(command.get_program()).display().to_string();
    let user = if geteuid().is_root() { UNPRIVILEGED } else { geteuid().as_raw() };
    let output = command.output().with_context(|| {
        format!("running {program}: user {user} must be able to reach it, and the temporary directory")
    })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed ({}): {}", output.status, stderr.trim_end());
    }
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// Sends a signal to a process that may have ended meanwhile.
pub(crate) fn signal(pid: Pid, signal: Signal) -> Result<()> {
    match kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(refused) => Err(refused).with_context(|| format!("sending {signal:?} to process {pid:?}")),
    }
}

fn as_server_user(command: &mut Command) -> &mut Command {
    if geteuid().is_root() { command.uid(UNPRIVILEGED).gid(UNPRIVILEGED) } else { command }
}
