//! Real PostgreSQL servers for tests, with standbys, and every way to break them.
//!
//! Plain blocking code, without a client of its own: what it has to ask a server, `psql` asks. Needs Linux.
//!
//! * [`Postgres`]: one server.
//! * [`shared()`]: the one server of a test process, in which each test takes a database of its own.
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

use crate::home::{Home, NOBODY, output, signal};
use crate::programs::program;
use crate::wait::try_eventually;

/// Who owns everything, and the name of the first database.
const OWNER: &str = "evictd";

/// How long a server may take for any step, recovery and a first checkpoint included, on a busy machine.
const DEADLINE: Duration = Duration::from_mins(1);

/// Lines of the log that an error shows.
const TAIL_LINES: usize = 40;

/// As durable as in production; only what makes tests wait is shortened. Memory that is shared lies in files
/// of the server's directory, which are gone with it.
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
pub enum Mode {
    /// Connections are cut, transactions rolled back, and all is written: a standby that streams gets it first.
    Fast,
    /// At once, as if it had crashed. The next start recovers from the log.
    Immediate,
}

/// A server on a loopback port that stays its own. It ends, and its files are removed, when it is dropped, or
/// with the test process, however that ends.
pub struct Postgres {
    home: Home,
    port: u16,
    /// The first process, until it was stopped or killed.
    server: Option<Child>,
}

/// One server per test process, started by whoever asks first.
pub fn shared() -> Result<&'static Postgres> {
    static SHARED: OnceLock<Result<Postgres, String>> = OnceLock::new();
    let shared = SHARED.get_or_init(|| Postgres::start().map_err(|failure| format!("{failure:#}")));
    shared.as_ref().map_err(|failure| anyhow!("{failure}"))
}

impl Postgres {
    /// A fresh server, taking connections. Whoever comes from this machine is trusted to be who they say.
    pub fn start() -> Result<Self> {
        let home = Home::new()?;
        output(home.command("cp").arg("-a").args([template()?.data(), home.data()]))?;
        Self::launch(home, ports::free()?.port())
    }

    /// A standby of this server, which streams from it already and answers queries. It has this server's
    /// settings, and in the primary's `pg_stat_replication` the name `standby_<its port>`.
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

    /// A copy of this server's files as they are now, under a server of its own: nothing tells the two apart, not even
    /// their timeline.
    pub fn copy(&self) -> Result<Self> {
        let home = Home::new()?;
        let mut backup = home.command(program("pg_basebackup")?);
        backup.args(["--checkpoint=fast", "--wal-method=stream", "--no-sync", "--dbname"]);
        let source = format!("host=127.0.0.1 port={} user={OWNER}", self.port);
        output(backup.arg(source).arg("--pgdata").arg(home.data()))?;
        Self::launch(home, ports::free()?.port())
    }

    /// A new database with all that `source` has, which nobody may be connected to: its URL.
    pub fn copy_database(&self, source: &str, name: &str) -> Result<String> {
        self.query_in("postgres", &format!("CREATE DATABASE \"{name}\" TEMPLATE \"{source}\""))?;
        Ok(self.url_of(OWNER, name))
    }

    fn launch(home: Home, port: u16) -> Result<Self> {
        let mut postgres = Self { home, port, server: None };
        postgres.start_again()?;
        Ok(postgres)
    }

    /// Where its first database is, for its superuser.
    pub fn url(&self) -> String {
        self.url_as(OWNER)
    }

    /// Where its first database is, for another user.
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

    /// What it has logged so far, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("log")
    }

    /// A new database, so that many tests can share a server: its URL.
    pub fn create_database(&self, name: &str) -> Result<String> {
        if !name.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
            bail!("{name:?} is no name for a database: take a-z, 0-9 and _");
        }
        self.query(&format!("CREATE DATABASE \"{name}\""))?;
        Ok(self.url_of(OWNER, name))
    }

    /// What the statements return in the first database, for its superuser: rows as lines, columns divided
    /// by `|`. All of them are one transaction.
    pub fn query(&self, sql: &str) -> Result<String> {
        self.query_in(OWNER, sql)
    }

    fn query_in(&self, database: &str, sql: &str) -> Result<String> {
        let mut psql = self.home.command(program("psql")?);
        psql.args(["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--command", sql]);
        output(psql.arg("--dbname").arg(self.url_of(OWNER, database))).context("asking PostgreSQL")
    }

    /// All of a database of this server, as a script: its URL is what [`Postgres::create_database`] said.
    pub fn dump(&self, url: &str) -> Result<String> {
        output(self.home.command(program("pg_dump")?).arg("--dbname").arg(url)).context("dumping a database")
    }

    /// Runs what [`Postgres::dump`] wrote, statement by statement.
    pub fn load(&self, url: &str, dump: &str) -> Result<()> {
        let script = tempfile::Builder::new().prefix("dump-").tempfile_in(self.home.path())?;
        fs::write(script.path(), dump)?;
        if geteuid().is_root() {
            chown(script.path(), Some(NOBODY), Some(NOBODY))?;
        }
        let mut psql = self.home.command(program("psql")?);
        psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--dbname", url, "--file"]);
        output(psql.arg(script.path())).context("loading a dump").map(drop)
    }

    /// Starts it after it was stopped or killed, with the same port, files and settings. Returns when it
    /// takes connections.
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
        let started = try_eventually("PostgreSQL to take connections", DEADLINE, || {
            if let Some(status) = server.try_wait()? {
                bail!("PostgreSQL ended ({status}) before it took connections");
            }
            Ok(home.is_ready(server.id()).then_some(()))
        });
        started.map_err(|failure| self.explain(&failure))
    }

    /// Stops it, and returns when all its processes are gone. Does nothing if it doesn't run.
    pub fn stop(&mut self, mode: Mode) -> Result<()> {
        let Some(server) = &mut self.server else { return Ok(()) };
        let how = match mode {
            Mode::Fast => Signal::INT,
            Mode::Immediate => Signal::QUIT,
        };
        if server.try_wait()?.is_none() {
            signal(Pid::from_child(server), how)?;
        }
        let stopped = try_eventually("PostgreSQL to stop", DEADLINE, || Ok(server.try_wait()?));
        stopped.map_err(|failure| self.explain(&failure))?;
        self.server = None;
        Ok(())
    }

    /// Stops it and starts it again, so that every setting counts.
    pub fn restart(&mut self, mode: Mode) -> Result<()> {
        self.stop(mode)?;
        self.start_again()
    }

    /// SIGKILL for all its processes at any instruction. Returns when they are gone.
    pub fn kill(&mut self) -> Result<()> {
        // Nobody new comes when the first is gone, but it may have brought somebody while we looked.
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

    /// SIGSTOP for all its processes: connections stay open, and nobody answers. Returns when all stand still.
    pub fn freeze(&self) -> Result<()> {
        try_eventually("PostgreSQL to stand still", DEADLINE, || {
            let processes = self.home.processes()?;
            let moving: Vec<Pid> = processes.into_iter().filter(|pid| !stands_still(*pid)).collect();
            moving.iter().try_for_each(|pid| signal(*pid, Signal::STOP))?;
            Ok(moving.is_empty().then_some(()))
        })
    }

    /// SIGCONT, after [`Postgres::freeze`].
    pub fn thaw(&self) -> Result<()> {
        self.home.processes()?.iter().try_for_each(|pid| signal(*pid, Signal::CONT))
    }

    /// Makes a standby a primary, on a timeline of its own. Returns when it takes writes.
    pub fn promote(&self) -> Result<()> {
        match self.query("SELECT pg_promote(true, 60)")?.as_str() {
            "t" => Ok(()),
            _ => Err(self.explain(&anyhow!("the standby was not promoted"))),
        }
    }

    /// A standby goes on receiving, and shows nothing newer. Returns when that is so.
    pub fn pause_replay(&self) -> Result<()> {
        self.query("SELECT pg_wal_replay_pause()")?;
        self.wait_for("the replay to pause", "SELECT pg_get_wal_replay_pause_state() = 'paused'")
    }

    /// A standby shows again what it receives, after [`Postgres::pause_replay`].
    pub fn resume_replay(&self) -> Result<()> {
        self.query("SELECT pg_wal_replay_resume()").map(drop)
    }

    /// A setting, as in `postgresql.conf`: `name = value`. It overrides all earlier ones and counts at once if
    /// the server runs, but for those that PostgreSQL reads only at its start: see [`Postgres::restart`].
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

    /// An error that shows the end of the log.
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
            // It is gone, and must not stay in the list of processes.
            let _ = server.kill().and_then(|()| server.wait());
        }
    }
}

/// Whether a process is stopped. One that is gone moves no more either.
fn stands_still(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // `<pid> (<name>) <state> ..`, where the name may contain anything.
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['T', 'Z', 'X']))
}

/// The files of a fresh server, from which each is copied: that is some ten times faster than to make them.
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
    // Without a server: it takes statements from its standard input.
    let script = home.path().join("create.sql");
    fs::write(&script, format!("CREATE DATABASE {OWNER}\n"))?;
    let mut single = home.command(program("postgres")?);
    output(single.args(["--single", "-D"]).arg(home.data()).arg("postgres").stdin(File::open(script)?))?;
    Ok(home)
}
