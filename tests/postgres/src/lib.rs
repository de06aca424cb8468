//! Real PostgreSQL servers for tests, with standbys, and every way to break them.
//!
//! Plain blocking code without a client of its own: it queries servers with `psql`. Needs Linux.
//!
//! * [`Postgres`]: one server.
//! * [`shared()`]: one server per test process. Each test creates its own database in it.
//! * [`wait`], [`ports`], [`python_package`]: what the harness of the end-to-end tests needs as well.

mod home;
pub mod ports;
mod programs;
pub mod python_package;
pub mod wait;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::Child;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, geteuid};

use crate::home::{Home, UNPRIVILEGED, output, signal};
use crate::programs::program;
use crate::wait::try_eventually;

/// The superuser's name, and the name of the first database.
const OWNER: &str = "evictd";

/// How long a server may take for any step, recovery and a first checkpoint included, on a busy machine.
const DEADLINE: Duration = Duration::from_mins(1);

/// Lines of the log that an error shows.
const TAIL_LINES: usize = 40;

/// As durable as in production, with shorter retry intervals. Shared memory lies in files of the server's directory,
/// so that it is removed with them.
const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
max_connections = 100
fsync = on
synchronous_commit = on
full_page_writes = on
wal_level = replica
max_wal_senders = 10
wal_keep_size = 512MB
hot_standby = on
wal_retrieve_retry_interval = 100ms
dynamic_shared_memory_type = mmap
log_line_prefix = '%m [%p] %q%a '
";

/// How to stop a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopMode {
    /// Closes connections, rolls transactions back and writes everything, to streaming standbys as well.
    Fast,
    /// Stops at once, as if it had crashed. The next start recovers from the log.
    Immediate,
}

/// A server on a loopback port, which it keeps. It ends, and its files are removed, when it is dropped or when the test
/// process ends in any way.
pub struct Postgres {
    home: Home,
    port: u16,
    /// The first process, until it was stopped or killed.
    server: Option<Child>,
}

/// Returns the test process's only shared server. The first call starts it.
pub fn shared() -> Result<&'static Postgres> {
    static SHARED: OnceLock<Result<Postgres, String>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| Postgres::start().map_err(|failure| format!("{failure:#}")));
    shared.as_ref().map_err(|failure| anyhow!("{failure}"))
}

impl Postgres {
    /// Starts a fresh server that accepts connections. It needs no password from local clients.
    pub fn start() -> Result<Self> {
        let home = Home::new()?;
        output(home.command("cp").arg("-a").args([template()?.data(), home.data()]))?;
        Self::launch(home, ports::free()?.port())
    }

    /// Starts a standby of this server, which already streams from it and answers queries. It has this server's
    /// settings. Its name in the primary's `pg_stat_replication` is `standby_<its port>`.
    pub fn standby(&self) -> Result<Self> {
        let home = Home::new()?;
        let port = ports::free()?.port();
        let primary =
            format!("host=127.0.0.1 port={} user={OWNER} application_name=standby_{port}", self.port);
        let mut backup = home.command(program("pg_basebackup")?);
        backup.args(["--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf", "--no-sync"]);
        output(backup.arg("--dbname").arg(primary).arg("--pgdata").arg(home.data()))?;
        let standby = Self::launch(home, port)?;
        standby.wait_for("the standby to stream", "SELECT status = 'streaming' FROM pg_stat_wal_receiver")?;
        Ok(standby)
    }

    /// Starts a second server on a copy of this server's current files. The two can't be distinguished, not even by
    /// their timeline.
    pub fn copy(&self) -> Result<Self> {
        let home = Home::new()?;
        let mut backup = home.command(program("pg_basebackup")?);
        backup.args(["--checkpoint=fast", "--wal-method=stream", "--no-sync", "--dbname"]);
        let source = format!("host=127.0.0.1 port={} user={OWNER}", self.port);
        output(backup.arg(source).arg("--pgdata").arg(home.data()))?;
        Self::launch(home, ports::free()?.port())
    }

    /// Creates a copy of the database `source`, and returns its URL. No client may be connected to `source`.
    pub fn copy_database(&self, source: &str, name: &str) -> Result<String> {
        self.query_in("postgres", &format!("CREATE DATABASE \"{name}\" TEMPLATE \"{source}\""))?;
        Ok(self.url_of(OWNER, name))
    }

    fn launch(home: Home, port: u16) -> Result<Self> {
        let mut postgres = Self { home, port, server: None };
        postgres.start_again()?;
        Ok(postgres)
    }

    /// Returns the URL of its first database for its superuser.
    pub fn url(&self) -> String {
        self.url_as(OWNER)
    }

    /// Returns the URL of its first database for another user.
    pub fn url_as(&self, user: &str) -> String {
        self.url_of(user, OWNER)
    }

    fn url_of(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// Its port, which it keeps through every restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.home.data()
    }

    /// Returns its log, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("log")
    }

    /// Creates a database, so that many tests can share a server. Returns its URL.
    pub fn create_database(&self, name: &str) -> Result<String> {
        if !name.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
            bail!("{name:?} is not a valid database name: use a-z, 0-9 and _");
        }
        self.query(&format!("CREATE DATABASE \"{name}\""))?;
        Ok(self.url_of(OWNER, name))
    }

    /// Runs the statements in the first database as its superuser, in one transaction. Returns rows as lines, with
    /// columns separated by `|`.
    pub fn query(&self, sql: &str) -> Result<String> {
        self.query_in(OWNER, sql)
    }

    fn query_in(&self, database: &str, sql: &str) -> Result<String> {
        let mut psql = self.home.command(program("psql")?);
        psql.args(["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--command", sql]);
        output(psql.arg("--dbname").arg(self.url_of(OWNER, database))).context("querying PostgreSQL")
    }

    /// Dumps a database of this server as a script. `url` comes from [`Postgres::create_database`].
    pub fn dump(&self, url: &str) -> Result<String> {
        output(self.home.command(program("pg_dump")?).arg("--dbname").arg(url)).context("dumping a database")
    }

    /// Runs a dump from [`Postgres::dump`], statement by statement.
    pub fn load(&self, url: &str, dump: &str) -> Result<()> {
        let script = tempfile::Builder::new().prefix("dump-").tempfile_in(self.home.path())?;
        fs::write(script.path(), dump)?;
        if geteuid().is_root() {
            chown(script.path(), Some(UNPRIVILEGED), Some(UNPRIVILEGED))?;
        }
        let mut psql = self.home.command(program("psql")?);
        psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname", url, "--file"]);
        output(psql.arg(script.path())).context("loading a dump").map(drop)
    }

    /// Starts it after it was stopped or killed, with the same port, files and settings. Returns when it accepts
    /// connections.
    pub fn start_again(&mut self) -> Result<()> {
        if self.server.is_some() {
            bail!("the server on port {} was neither stopped nor killed", self.port);
        }
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut command = self.home.command(program("postgres")?);
        command.arg("-D").arg(self.home.data()).arg("-k").arg(self.home.path());
        command.args(["-p", &self.port.to_string()]).stdout(log.try_clone()?).stderr(log);
        let server = self.server.insert(command.spawn().context("starting PostgreSQL")?);
        let home = &self.home;
        let started = try_eventually("PostgreSQL to accept connections", DEADLINE, || {
            if let Some(status) = server.try_wait()? {
                bail!("PostgreSQL ended ({status}) before it accepted connections");
            }
            Ok(home.is_ready(server.id()).then_some(()))
        });
        started.map_err(|failure| self.explain(&failure))
    }

    /// Stops it, and returns when all its processes have ended. Does nothing if it isn't running.
    pub fn stop(&mut self, mode: StopMode) -> Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        let how = match mode {
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        };
        if server.try_wait()?.is_none() {
            signal(Pid::from_child(server), how)?;
        }
        let stopped = try_eventually("PostgreSQL to stop", DEADLINE, || Ok(server.try_wait()?));
        stopped.map_err(|failure| self.explain(&failure))?;
        self.server = None;
        Ok(())
    }

    /// Stops it and starts it again, so that every setting takes effect.
    pub fn restart(&mut self, mode: StopMode) -> Result<()> {
        self.stop(mode)?;
        self.start_again()
    }

    /// Sends SIGKILL to all its processes. Returns when they have ended.
    pub fn kill(&mut self) -> Result<()> {
        // The first process starts the others, and may have started one during a look. Once it has ended, none starts.
        try_eventually("PostgreSQL's processes to be gone", DEADLINE, || {
            let processes = self.home.processes()?;
            processes.iter().try_for_each(|pid| signal(*pid, Signal::KILL))?;
            Ok(processes.is_empty().then_some(()))
        })?;
        if let Some(mut server) = self.server.take() {
            server.wait()?;
        }
        Ok(())
    }

    /// Sends SIGSTOP to all its processes: connections stay open without an answer. Returns when all have stopped.
    pub fn freeze(&self) -> Result<()> {
        try_eventually("PostgreSQL to freeze", DEADLINE, || {
            let processes = self.home.processes()?;
            let moving: Vec<Pid> = processes.into_iter().filter(|pid| !is_stopped(*pid)).collect();
            moving.iter().try_for_each(|pid| signal(*pid, Signal::STOP))?;
            Ok(moving.is_empty().then_some(()))
        })
    }

    /// Sends SIGCONT, after [`Postgres::freeze`].
    pub fn thaw(&self) -> Result<()> {
        self.home.processes()?.iter().try_for_each(|pid| signal(*pid, Signal::CONT))
    }

    /// Promotes a standby to a primary, on its own timeline. Returns when it accepts writes.
    pub fn promote(&self) -> Result<()> {
        match self.query("SELECT pg_promote(true, 60)")?.as_str() {
            "t" => Ok(()),
            _ => Err(self.explain(&anyhow!("the standby was not promoted"))),
        }
    }

    /// Pauses a standby's replay: it still receives the log, but its tables stay as they are. Returns when the replay
    /// is paused.
    pub fn pause_replay(&self) -> Result<()> {
        self.query("SELECT pg_wal_replay_pause()")?;
        self.wait_for("the replay to pause", "SELECT pg_get_wal_replay_pause_state() = 'paused'")
    }

    /// Resumes a standby's replay, after [`Postgres::pause_replay`].
    pub fn resume_replay(&self) -> Result<()> {
        self.query("SELECT pg_wal_replay_resume()").map(drop)
    }

    /// Appends a setting, as in `postgresql.conf`: `name = value`. It overrides all earlier ones. A running server
    /// applies it at once, unless PostgreSQL reads it only at its start: see [`Postgres::restart`].
    pub fn set(&self, line: &str) -> Result<()> {
        let mut settings =
            File::options().append(true).open(self.home.data().join("postgresql.auto.conf"))?;
        writeln!(settings, "{line}")?;
        let Some(server) = &self.server else { return Ok(()) };
        let before = self.query("SELECT pg_conf_load_time()")?;
        signal(Pid::from_child(server), Signal::HUP)?;
        self.wait_for("the settings to be read", &format!("SELECT pg_conf_load_time() > '{before}'"))
    }

    /// Waits until a query returns true.
    fn wait_for(&self, what: &str, sql: &str) -> Result<()> {
        let came = try_eventually(what, DEADLINE, || Ok((self.query(sql)? == "t").then_some(())));
        came.map_err(|failure| self.explain(&failure))
    }

    /// Adds the end of the log to an error.
    fn explain(&self, failure: &anyhow::Error) -> anyhow::Error {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        anyhow!("{failure:#}\n--- the log of PostgreSQL on port {}\n{tail}", self.port)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            self.home.remove();
            // It has ended, and must not remain as a zombie.
            let _ = server.kill().and_then(|()| server.wait());
        }
    }
}

/// Whether a process is stopped or has ended.
fn is_stopped(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // `<pid> (<name>) <state> ..`, where the name may contain anything.
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['T', 'Z', 'X']))
}

/// Returns the files of a fresh server, of which each server gets a copy. A copy is about ten times faster than
/// `initdb`.
fn template() -> Result<&'static Home> {
    static TEMPLATE: OnceLock<Result<Home, String>> = OnceLock::new();
    let template = TEMPLATE.get_or_init(|| make_template().map_err(|failure| format!("{failure:#}")));
    template.as_ref().map_err(|failure| anyhow!("{failure}"))
}

fn make_template() -> Result<Home> {
    let home = Home::new()?;
    let mut initdb = home.command(program("initdb")?);
    initdb.args(["--username", OWNER, "--auth=trust", "--locale=C", "--encoding=UTF8", "--no-sync"]);
    output(initdb.arg("--pgdata").arg(home.data()))?;
    let mut settings = File::options().append(true).open(home.data().join("postgresql.conf"))?;
    settings.write_all(SETTINGS.as_bytes())?;
    // In single-user mode, PostgreSQL reads statements from its standard input.
    let script = home.path().join("create.sql");
    fs::write(&script, format!("CREATE DATABASE {OWNER}\n"))?;
    let mut single = home.command(program("postgres")?);
    output(single.args(["--single", "-D"]).arg(home.data()).arg("postgres").stdin(File::open(script)?))?;
    Ok(home)
}
