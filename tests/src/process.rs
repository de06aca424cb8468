//! [`Daemon`]: a child process with the verbs that break it.
//!
//! No child outlives the test, even if the test is killed with SIGKILL. Children are started as `evictd
//! exec-tied -- <program> <args>`, which asks the kernel for a signal at its parent's death and then
//! becomes the program. That signal comes when the *thread* that spawned the child ends, so all
//! children are spawned by one thread that never does.

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

/// The `evictd` binary: `EVICTD_BIN`, else the one that was built beside this executable.
pub fn evictd_binary() -> Result<PathBuf> {
    let binary = match std::env::var_os("EVICTD_BIN") {
        // Children run in directories of their own, so a relative path would lead elsewhere.
        Some(path) => std::path::absolute(path).context("reading EVICTD_BIN")?,
        None => profile_dir()?.join("evictd"),
    };
    if !binary.is_file() {
        bail!("{} is missing: run `cargo build -p evictd`, or set EVICTD_BIN", binary.display());
    }
    Ok(binary)
}

/// What to run, and how to run exactly the same again. Not `Debug`: its environment holds passwords.
#[derive(Clone)]
pub struct Launch {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, String)>,
    dir: PathBuf,
}

impl Launch {
    /// `program`, run in `dir`, where its output goes to `<name>.stdout` and `<name>.stderr`.
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

    /// Sets a variable in the environment, which is otherwise this process's own without any `EVICTD_*`
    /// and `UNKEY_*`: what a developer has exported must not configure a test.
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

    /// Appends: the log of a daemon that was restarted tells the whole story.
    fn log(&self, stream: &str) -> Result<File> {
        let path = self.log_path(stream);
        let file = File::options().create(true).append(true).open(&path);
        file.with_context(|| format!("opening {}", path.display()))
    }
}

/// `evictd`, to be run to its end, without the settings in this process's environment.
pub fn evictd_command() -> Result<Command> {
    let mut command = Command::new(evictd_binary()?);
    without_settings(&mut command);
    Ok(command)
}

/// Hides this process's `EVICTD_*` and `UNKEY_*` from `command`.
fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("EVICTD_") || text.starts_with("UNKEY_") {
            command.env_remove(&name);
        }
    }
}

type Job = (Command, Sender<io::Result<Child>>);

/// Spawns on the one thread that never ends (see the module's documentation).
fn spawn_tied(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, inbox) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                // A caller that is gone left nobody to own the child: `kill` undoes the spawn.
                if let Err(unread) = reply.send(command.spawn())
                    && let Ok(mut orphan) = unread.0
                {
                    let _ = orphan.kill().and_then(|()| orphan.wait());
                }
            }
        });
        jobs
    });
    let gone = || io::Error::other("the spawner thread has ended");
    let (reply, outcome) = channel();
    spawner.send((command, reply)).map_err(|_| gone())?;
    outcome.recv().map_err(|_| gone())?
}

/// Lets this process have `how_many` files and sockets open, and the children that it starts from then on.
pub fn allow_open_files(how_many: u64) -> Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= how_many) {
        return Ok(());
    }
    // More than the maximum is for those who may raise that as well.
    let maximum = maximum.map(|maximum| maximum.max(how_many));
    setrlimit(Resource::Nofile, Rlimit { current: Some(how_many), maximum })
        .with_context(|| format!("raising the limit of open files to {how_many}: `ulimit -Hn {how_many}`"))
}

/// What a process takes of its machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Footprint {
    /// Memory that is really there.
    pub resident_bytes: u64,
    /// The most that there ever was since its start.
    pub peak_bytes: u64,
    /// Files and sockets.
    pub open_files: usize,
}

/// A running child. Dropping it kills it.
pub struct Daemon {
    launch: Launch,
    child: Child,
}

impl Daemon {
    /// Starts it. It is running, not ready: see [`Daemon::wait_until`].
    pub fn start(launch: Launch) -> Result<Self> {
        let child = launch.spawn()?;
        Ok(Self { launch, child })
    }

    /// Its name in messages and log files.
    pub fn name(&self) -> &str {
        &self.launch.name
    }

    /// Its process id, which stays the same through `exec-tied`.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sets a variable in its environment, from its next start on.
    pub fn set_env(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.launch.env.push((name.into(), value.into()));
    }

    /// What it takes of the machine now (Linux).
    pub fn footprint(&self) -> Result<Footprint> {
        let proc = PathBuf::from(format!("/proc/{}", self.pid()));
        let what = || format!("looking at what {} takes", self.launch.name);
        let status = fs::read_to_string(proc.join("status")).with_context(what)?;
        let bytes = |field: &str| {
            let amount = status.lines().find_map(|line| line.strip_prefix(field)).with_context(what)?;
            let kibibytes: u64 = amount.trim().trim_end_matches("kB").trim().parse().with_context(what)?;
            Ok::<_, anyhow::Error>(kibibytes * 1024)
        };
        let open_files = fs::read_dir(proc.join("fd")).with_context(what)?.count();
        Ok(Footprint { resident_bytes: bytes("VmRSS:")?, peak_bytes: bytes("VmHWM:")?, open_files })
    }

    /// Lets it have `how_many` files and sockets open from now on. Those that it has stay.
    pub fn limit_open_files(&self, how_many: u64) -> Result<()> {
        // As much as this process, whose child it is, so that it can be lifted again.
        let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
        let limit = Rlimit { current: Some(how_many), maximum };
        let limited = prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, limit);
        limited.map(drop).with_context(|| format!("limiting the open files of {}", self.launch.name))
    }

    /// How it ended, or `None` while it runs.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("looking after {}", self.launch.name))
    }

    /// Waits until `check` returns something. Fails at once if the daemon exits, and every failure
    /// shows the end of its log.
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

    /// SIGKILL: no farewell, at any instruction. Returns when it is gone.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait_exit(KERNEL_DEADLINE)
    }

    /// SIGTERM, and waits until it has drained and ended.
    pub fn stop(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait_exit(deadline)
    }

    /// SIGTERM, and returns at once: what happens while it drains is for the caller to see.
    pub fn terminate(&mut self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGINT, as Ctrl-C sends it, and waits until it has ended.
    pub fn interrupt(&mut self, deadline: Duration) -> Result<ExitStatus> {
        self.signal(Signal::INT)?;
        self.wait_exit(deadline)
    }

    /// SIGSTOP: a long collection pause, or a VM that stands still. Sockets stay open. Returns when it
    /// stands still.
    pub fn pause(&mut self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let what = format!("{} to stand still", self.launch.name);
        let stat = format!("/proc/{}/stat", self.pid());
        eventually(&what, KERNEL_DEADLINE, || {
            // `<pid> (<name>) <state> ..`, where the name may contain anything.
            let text = fs::read_to_string(&stat).ok()?;
            text.rsplit_once(") ")?.1.starts_with('T').then_some(())
        })
    }

    /// SIGCONT, after [`Daemon::pause`].
    pub fn resume(&mut self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Kills it if it still runs, and starts it again: same arguments, environment, directory and so
    /// the same ports and state.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.child = self.launch.spawn()?;
        Ok(())
    }

    /// All it wrote to its standard output, restarts included.
    pub fn stdout(&self) -> Result<String> {
        read_log(&self.launch.log_path("stdout"))
    }

    /// All it wrote to its standard error, restarts included.
    pub fn stderr(&self) -> Result<String> {
        read_log(&self.launch.log_path("stderr"))
    }

    /// The last lines of both logs, headed by where they are.
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

    /// Sends a signal unless it has ended: then its id may already be another process's.
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
        // It may have ended already; either way nobody is left to tell.
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
    fn a_daemon_that_dies_before_it_is_ready_fails_at_once_and_shows_its_log() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut daemon = shell(dir.path(), "echo out of cheese >&2; exit 3")?;
        let failure = daemon.wait_until("readiness", Duration::from_mins(10), || None::<()>).unwrap_err();
        let text = failure.to_string();
        assert!(text.contains("exit status: 3") && text.contains("out of cheese"), "{text}");
        Ok(())
    }

    #[test]
    fn stop_lets_it_finish_and_kill_does_not() -> Result<()> {
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
    fn a_paused_daemon_stands_still_until_it_is_resumed() -> Result<()> {
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
        assert!(!Path::new(&remains).exists(), "also a daemon that stands still is killed");
        Ok(())
    }

    #[test]
    fn a_developers_settings_do_not_reach_the_daemons() -> Result<()> {
        let dir = tempfile::tempdir()?;
        // Set by the test runner of a developer, as it were: EVICTD_BIN is often set, and is one of them.
        let launch = Launch::new("shell", "/bin/sh", dir.path()).args(["-c", "env"]).env("EVICTD_X", "1");
        let mut daemon = Daemon::start(launch)?;
        assert!(daemon.wait_exit(DEADLINE)?.success());
        let settings: Vec<_> =
            daemon.stdout()?.lines().filter(|line| line.starts_with("EVICTD_")).map(str::to_owned).collect();
        assert_eq!(settings, ["EVICTD_X=1"]);
        Ok(())
    }

    #[test]
    fn a_setting_counts_from_the_next_start_on_and_a_footprint_is_seen() -> Result<()> {
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

    /// The other half of the next test: does nothing unless that test runs it, and then never returns.
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
        // A process that nobody has reaped yet has an empty command line.
        eventually("the daemon to die with the test", DEADLINE, || {
            fs::read(&alive).unwrap_or_default().is_empty().then_some(())
        })
    }
}
