//! [`Daemon`]: a child process that a test can kill, pause and restart.
//!
//! No child outlives the test, even if the test is killed with SIGKILL. Children are started as `evictd
//! exec-tied -- <program> <args>`, which requests a signal at its parent's death from the kernel, and then
//! executes the program. The kernel sends that signal when the *thread* that spawned the child ends. So one
//! thread, which never ends, spawns all children.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};

use crate::python_package::profile_dir;
use crate::wait::{eventually, try_eventually};

/// Lines of a log that an error shows.
const TAIL_LINES: usize = 40;

/// How long the kernel may take to carry out a SIGKILL or a SIGSTOP on a busy machine.
const KERNEL_DEADLINE: Duration = Duration::from_secs(20);

/// Returns the `evictd` binary: `EVICTD_BIN`, or else the one that was built beside this executable.
pub fn evictd_binary() -> Result<PathBuf> {
    let binary = match std::env::var_os("EVICTD_BIN") {
        // Children run in their own directories, where a relative path would be wrong.
        Some(path) => std::path::absolute(path).context("reading EVICTD_BIN")?,
        None => profile_dir()?.join("evictd"),
    };
    if !binary.is_file() {
        bail!("{} is missing: run `cargo build -p evictd`, or set EVICTD_BIN", binary.display());
    }
    Ok(binary)
}

/// A command that can be started repeatedly. Not `Debug`: its environment holds passwords.
#[derive(Clone)]
pub struct Launch {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, String)>,
    dir: PathBuf,
}

impl Launch {
    /// Runs `program` in `dir`, with its output in `<name>.stdout` and `<name>.stderr` there.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, dir: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            dir: dir.into(),
        }
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable. The others are this process's own without `EVICTD_*` and `UNKEY_*`: a
    /// developer's settings must not configure a test.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    fn spawn(&self) -> Result<Child> {
        fs::create_dir_all(&self.dir).with_context(|| format!("creating {}", self.dir.display()))?;
        let mut command = Command::new(evictd_binary()?);
        command.arg("exec-tied").arg("--").arg(&self.program).args(&self.args);
        without_settings(&mut command);
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.current_dir(&self.dir).stdin(Stdio::null());
        command.stdout(self.log("stdout")?).stderr(self.log("stderr")?);
        spawn_tied(command).with_context(|| format!("starting {} ({})", self.name, self.program.display()))
    }

    fn log_path(&self, stream: &str) -> PathBuf {
        self.dir.join(format!("{}.{stream}", self.name))
    }

    /// Opens a log for appending: it spans restarts.
    fn log(&self, stream: &str) -> Result<File> {
        let path = self.log_path(stream);
        let file = File::options().create(true).append(true).open(&path);
        file.with_context(|| format!("opening {}", path.display()))
    }
}

/// Returns a command for `evictd`, without the settings in this process's environment.
pub fn evictd_command() -> Result<Command> {
    let mut command = Command::new(evictd_binary()?);
    without_settings(&mut command);
    Ok(command)
}

/// Removes this process's `EVICTD_*` and `UNKEY_*` from the environment of `command`.
fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("EVICTD_") || text.starts_with("UNKEY_") {
            command.env_remove(&name);
        }
    }
}

type Job = (Command, Sender<io::Result<Child>>);

/// Spawns on the thread that never ends (see the module's documentation).
fn spawn_tied(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // If the caller has gone, nothing owns the child: `kill` undoes the spawn.
                if let Err(unread) = reply.send(command.spawn())
                    && let Ok(mut orphan) = unread.0
                {
                    let _ = orphan.kill().and_then(|()| orphan.wait());
                }
            }
        });
        jobs
    });
    let ended = || io::Error::other("the spawner thread has ended");
    let (reply, outcome) = channel();
    spawner.send((command, reply)).map_err(|_| ended())?;
    outcome.recv().map_err(|_| ended())?
}

/// Raises the limit of open files and sockets to `how_many`, for this process and its future children.
pub fn allow_open_files(how_many: u64) -> Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= how_many) {
        return Ok(());
    }
    // Above the maximum, this needs the right to raise the maximum as well.
    let maximum = maximum.map(|maximum| maximum.max(how_many));
    setrlimit(Resource::Nofile, Rlimit { current: Some(how_many), maximum })
        .with_context(|| format!("raising the limit of open files to {how_many}: `ulimit -Hn {how_many}`"))
}

/// The resources that a process uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footprint {
    /// Resident memory.
    pub resident_bytes: u64,
    /// The maximum of its resident memory since its start.
    pub peak_bytes: u64,
    /// Open files and sockets.
    pub open_files: usize,
}

/// A running child. Dropping it kills it.
pub struct Daemon {
    launch: Launch,
    child: Child,
}

impl Daemon {
    /// Starts it. It isn't ready yet: see [`Daemon::wait_until`].
    pub fn start(launch: Launch) -> Result<Self> {
        let child = launch.spawn()?;
        Ok(Self { launch, child })
    }

    /// Returns its name in messages and log files.
    pub fn name(&self) -> &str {
        &self.launch.name
    }

    /// Returns its process id, which `exec-tied` keeps.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sets an environment variable from its next start on.
    pub fn set_env(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.launch.env.push((name.into(), value.into()));
    }

    /// Returns its current resource usage (Linux).
    pub fn footprint(&self) -> Result<Footprint> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        let what = || format!("reading the resource usage of {}", self.launch.name);
        let status = fs::read_to_string(proc.join("status")).with_context(what)?;
        let bytes = |field: &str| {
            let amount = status.lines().find_map(|line| line.strip_prefix(field)).with_context(what)?;
            let kibibytes: u64 = amount.trim().trim_end_matches("kB").trim().parse().with_context(what)?;
            Ok::<_, anyhow::Error>(kibibytes * 1024)
        };
        let open_files = fs::read_dir(proc.join("fd")).with_context(what)?.count();
        Ok(Footprint { resident_bytes: bytes("VmRSS:")?, peak_bytes: bytes("VmHWM:")?, open_files })
    }

    /// Limits its open files and sockets to `how_many`. Those that are open stay open.
    pub fn limit_open_files(&self, how_many: u64) -> Result<()> {
        // The maximum stays as this process's, so that the limit can be raised again.
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let limit = Rlimit { current: Some(how_many), maximum };
        let limited = prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit);
        limited.map(drop).with_context(|| format!("limiting the open files of {}", self.launch.name))
    }

    /// Returns its exit status, or `None` while it runs.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("reading the status of {}", self.launch.name))
    }

    /// Waits until `check` returns something. Fails at once if the daemon exits. Errors show the end of its log.
    pub fn wait_until<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        mut check: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        let what = format!("{}: {what}", self.launch.name);
        let outcome = try_eventually(&what, deadline, || {
            if let Some(status) = self.exit_status()? {
                bail!("{} ended ({status}) before: {what}", self.launch.name);
            }
            Ok(check())
        });
        outcome.map_err(|failure| anyhow!("{failure}\n{}", self.log_tail()))
    }

    /// Waits until it ends by itself.
    pub fn wait_exit(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("{} to exit", self.launch.name);
        let outcome = try_eventually(&what, deadline, || self.exit_status());
        outcome.map_err(|failure| anyhow!("{failure}\n{}", self.log_tail()))
    }

    /// Sends SIGKILL. Returns when it has ended.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait_exit(KERNEL_DEADLINE)
    }

    /// Sends SIGTERM, and waits until it has drained and ended.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait_exit(deadline)
    }

    /// Sends SIGTERM, and returns at once, so that the caller can observe the drain.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// Sends SIGHUP to a process that runs.
    pub fn hang_up(&self) -> Result<()> {
        // The child isn't waited for yet, so its id is no other process's.
        let sent = kill_process(Pid::from_child(&self.child), Signal::HUP);
        sent.with_context(|| format!("sending SIGHUP to {}", self.launch.name))
    }

    /// Sends SIGINT, as Ctrl-C does, and waits until it has ended.
    pub fn interrupt(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::INT)?;
        self.wait_exit(deadline)
    }

    /// Sends SIGSTOP, which is like a long GC pause or a suspended VM: its sockets stay open. Returns when it has
    /// stopped.
    pub fn pause(&mut self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let what = format!("{} to pause", self.launch.name);
        let stat = format!("/proc/{}/stat", self.pid());
        eventually(&what, KERNEL_DEADLINE, || {
            // `<pid> (<name>) <state> ..`, where the name may contain anything.
            let text = fs::read_to_string(&stat).ok()?;
            text.rsplit_once(") ")?.1.starts_with('T').then_some(())
        })
    }

    /// Sends SIGCONT, after [`Daemon::pause`].
    pub fn resume(&mut self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Kills it if it still runs, and starts it again with the same arguments, environment and directory, and so with
    /// the same ports and state.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.child = self.launch.spawn()?;
        Ok(())
    }

    /// Returns its standard output, restarts included.
    pub fn stdout(&self) -> Result<String> {
        read_log(&self.launch.log_path("stdout"))
    }

    /// Returns its standard error, restarts included.
    pub fn stderr(&self) -> Result<String> {
        read_log(&self.launch.log_path("stderr"))
    }

    /// Returns the last lines of both logs, each below its path.
    pub fn log_tail(&self) -> String {
        let tails = ["stdout", "stderr"].map(|stream| {
            let path = self.launch.log_path(stream);
            let log = read_log(&path).unwrap_or_else(|failure| format!("{failure:#}"));
            let lines: Vec<_> = log.lines().collect();
            let skipped = lines.len().saturating_sub(TAIL_LINES);
            format!("--- {}\n{}", path.display(), lines[skipped..].join("\n"))
        });
        tails.join("\n")
    }

    /// Sends a signal unless it has ended: its id may then belong to another process.
    fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exit_status()?.is_some() {
            return Ok(());
        }
        let sent = kill_process(Pid::from_child(&self.child), signal);
        sent.with_context(|| format!("sending signal {} to {}", signal.as_raw(), self.launch.name))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may already have ended, and an error can't be reported from here.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn read_log(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    fn shell(dir: &Path, script: &str) -> Result<Daemon> {
        Daemon::start(Launch::new("shell", "/bin/sh", dir).args(["-c", script]))
    }

    fn wait_for_output(daemon: &mut Daemon, text: &str) -> Result<()> {
        let log = daemon.launch.log_path("stdout");
        daemon.wait_until(text, DEADLINE, || read_log(&log).ok()?.contains(text).then_some(()))
    }

    #[test]
    fn early_exit_ends_the_wait_and_shows_the_log() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut daemon = shell(dir.path(), "echo out of cheese >&2; exit 3")?;
        let failure = daemon.wait_until("readiness", Duration::from_mins(10), || None::<()>).unwrap_err();
        let text = failure.to_string();
        assert!(text.contains("exit status: 3") && text.contains("out of cheese"), "{text}");
        Ok(())
    }

    #[test]
    fn stop_drains_and_kill_does_not() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let script = "trap 'echo drained; exit 0' TERM; echo up; while :; do sleep 0.01; done";
        let mut daemon = shell(dir.path(), script)?;
        wait_for_output(&mut daemon, "up")?;
        assert!(daemon.stop(DEADLINE)?.success());
        assert_eq!(daemon.stdout()?, "up\ndrained\n");

        daemon.restart()?;
        wait_for_output(&mut daemon, "up\ndrained\nup")?;
        assert_eq!(daemon.kill()?.signal(), Some(Signal::KILL.as_raw()));
        assert_eq!(daemon.stdout()?, "up\ndrained\nup\n");
        Ok(())
    }

    #[test]
    fn a_paused_daemon_does_nothing_until_resumed() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let script = "n=0; while :; do n=$((n + 1)); echo line $n; sleep 0.01; done";
        let mut daemon = shell(dir.path(), script)?;
        wait_for_output(&mut daemon, "line 3\n")?;
        daemon.pause()?;
        assert!(daemon.exit_status()?.is_none());
        let next = format!("line {}\n", daemon.stdout()?.lines().count() + 1);
        daemon.resume()?;
        wait_for_output(&mut daemon, &next)?;

        daemon.pause()?;
        let remains = format!("/proc/{}", daemon.pid());
        drop(daemon);
        assert!(!Path::new(&remains).exists(), "a paused daemon wasn't killed");
        Ok(())
    }

    #[test]
    fn a_developers_settings_do_not_reach_the_daemons() -> Result<()> {
        let dir = tempfile::tempdir()?;
        // This process's own EVICTD_BIN, which is often set, must not be among them.
        let launch = Launch::new("shell", "/bin/sh", dir.path()).args(["-c", "env"]).env("EVICTD_X", "1");
        let mut daemon = Daemon::start(launch)?;
        assert!(daemon.wait_exit(DEADLINE)?.success());
        let settings: Vec<_> =
            daemon.stdout()?.lines().filter(|line| line.starts_with("EVICTD_")).map(str::to_owned).collect();
        assert_eq!(settings, ["EVICTD_X=1"]);
        Ok(())
    }

    #[test]
    fn settings_apply_at_the_next_start_and_usage_is_read() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut daemon = shell(dir.path(), "echo x=$X; exec sleep 100000")?;
        wait_for_output(&mut daemon, "x=\n")?;
        daemon.set_env("X", "1");
        daemon.restart()?;
        wait_for_output(&mut daemon, "x=1\n")?;
        let footprint = daemon.footprint()?;
        assert!(footprint.resident_bytes > 0 && footprint.open_files >= 3, "{footprint:?}");
        assert!(footprint.peak_bytes >= footprint.resident_bytes, "{footprint:?}");
        Ok(())
    }

    /// The child process of the next test. Does nothing otherwise; there it never returns.
    #[test]
    fn a_child_of_the_test_below() -> Result<()> {
        let Some(dir) = std::env::var_os("HARNESS_TEST_ORPHAN") else { return Ok(()) };
        let script = "echo $$ >pid.new; mv pid.new pid; exec sleep 100000";
        let mut daemon = shell(Path::new(&dir), script)?;
        daemon.wait_exit(Duration::from_hours(1))?;
        Ok(())
    }

    #[test]
    fn no_daemon_outlives_a_test_that_is_killed() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut test = Command::new(std::env::current_exe()?)
            .args(["--exact", "process::tests::a_child_of_the_test_below"])
            .env("HARNESS_TEST_ORPHAN", dir.path())
            .stdout(Stdio::null())
            .spawn()?;
        let pid =
            eventually("the daemon's pid", DEADLINE, || fs::read_to_string(dir.path().join("pid")).ok());
        test.kill()?;
        test.wait()?;
        let alive = PathBuf::from("/proc").join(pid?.trim()).join("cmdline");
        // A zombie's command line is empty.
        eventually("the daemon to die with the test", DEADLINE, || {
            fs::read(&alive).unwrap_or_default().is_empty().then_some(())
        })
    }
}
