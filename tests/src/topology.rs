//! [`Topology`]: a whole deployment on this machine, for the tests and the demo. It has home's NATS server
//! and publisher, and a NATS server and agents per region. Every connection can run through a [`Proxy`].
//!
//! Only this module writes the daemons' configuration files.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use toml::Table;

use crate::home_store::HomeStoreAddress;
use crate::http::{Client, Response};
use crate::metrics::Scrape;
use crate::nats_server::{Listen, Login, NatsServer, User};
use crate::ports;
use crate::process::{Daemon, Launch, evictd_binary, evictd_command};
use crate::proxy::{Proxy, WireMode};
use crate::sql;

/// How long a daemon may take to become ready on a busy machine.
const READY_DEADLINE: Duration = Duration::from_mins(1);

/// A description of the deployment to start.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Regions and the names of their agents.
    pub regions: Vec<(String, Vec<String>)>,
    /// Which NATS servers there are.
    pub servers: Servers,
    /// Whether connections can be broken.
    pub wires: Wires,
    /// Where daemons listen.
    pub listen: Where,
    /// Where the home store is.
    pub store: StoreKind,
    /// How many publishers share the store. Only PostgreSQL allows more than one.
    pub publishers: usize,
    /// The bound of agents and receipts.
    pub bound: Duration,
    /// Merged into the publisher's configuration, table by table.
    pub publisher: Table,
    /// Merged into every agent's configuration, table by table.
    pub agents: Table,
}

impl Plan {
    /// Plans one agent, `agent-1`, and a NATS server in each of `regions`, with a bound of 30 s, free ports and no
    /// proxies.
    pub fn new(regions: &[&str]) -> Self {
        let region = |name: &&str| ((*name).to_owned(), vec!["agent-1".to_owned()]);
        Self {
            regions: regions.iter().map(region).collect(),
            servers: Servers::PerRegion,
            wires: Wires::Direct,
            listen: Where::FreePorts,
            store: StoreKind::Sqlite,
            publishers: 1,
            bound: Duration::from_secs(30),
            publisher: Table::new(),
            agents: Table::new(),
        }
    }
}

/// Where the home store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreKind {
    /// In a file in the deployment's directory.
    Sqlite,
    /// In this database.
    Postgres(String),
}

/// Which NATS servers there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Servers {
    /// One for all daemons: the quickest to start.
    Single,
    /// Home's, and one in each region, which dials home.
    PerRegion,
}

/// How daemons and servers are connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wires {
    /// Directly, for measurements.
    Direct,
    /// Each through a [`Proxy`], which can break it. This includes the publishers' connections to PostgreSQL.
    Proxied,
}

impl Wires {
    /// Returns the address to dial for `server`, and its proxy if any.
    fn lay(self, server: SocketAddr) -> Result<(SocketAddr, Option<Proxy>)> {
        match self {
            Self::Direct => Ok((server, None)),
            Self::Proxied => {
                let wire = Proxy::start(server)?;
                Ok((wire.address(), Some(wire)))
            }
        }
    }

    /// Returns the store as publishers reach it, and its proxy if any.
    fn lay_to_store(self, store: &StoreKind) -> Result<(StoreKind, Option<Proxy>)> {
        let StoreKind::Postgres(url) = store else { return Ok((store.clone(), None)) };
        let (address, wire) = self.lay(sql::server_of(url)?)?;
        Ok((StoreKind::Postgres(sql::by_way_of(url, address)?), wire))
    }
}

/// Where daemons listen. NATS servers always take free ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    /// On free loopback ports.
    FreePorts,
    /// On the documented ports: the publisher on 7070 and 7079, the first agent on 7080 and 7089, each
    /// further one 100 higher, as `deploy/prometheus` expects it.
    DocumentedPorts,
}

impl Where {
    /// Returns the serving and the admin address of the `index`-th daemon with these documented ports.
    fn pick(self, documented: (u16, u16), index: u16) -> Result<(SocketAddr, SocketAddr)> {
        let local = |port: u16| SocketAddr::from(([127, 0, 0, 1], port + 100 * index));
        match self {
            Self::FreePorts => Ok((ports::free()?, ports::free()?)),
            Self::DocumentedPorts => {
                let picked = (local(documented.0), local(documented.1));
                // Another process that listens there would answer instead of our daemon, and look ready.
                for address in [picked.0, picked.1] {
                    TcpListener::bind(address)
                        .with_context(|| format!("{address} is in use; stop what listens there"))?;
                }
                Ok(picked)
            }
        }
    }
}

/// A running deployment. Dropping it kills everything.
pub struct Topology {
    /// The publisher, the first one.
    pub publisher: Node,
    /// The others.
    pub more_publishers: Vec<Node>,
    /// The regions, in the order of the plan.
    pub regions: Vec<RegionSite>,
    /// Home's NATS server, or the only one.
    pub home: NatsServer,
    root_key: String,
    client: Client,
}

/// One region.
pub struct RegionSite {
    /// Its name.
    pub name: String,
    /// Its agents, in the order of the plan.
    pub agents: Vec<Node>,
    /// Its NATS server, unless there is a single one.
    pub nats: Option<NatsServer>,
    /// The wire between its server and home, if proxied.
    pub wire: Option<Proxy>,
}

impl RegionSite {
    /// Sets the mode of all proxies between the region and home: that of its server, or, with a single server, those of
    /// its agents. Only for proxied plans.
    pub fn set_wires(&self, mode: WireMode) -> Result<()> {
        let agents = self.agents.iter().filter_map(|agent| agent.wire.as_ref());
        match &self.wire {
            Some(wire) => wire.set(mode),
            None if self.nats.is_none() && self.agents.iter().all(|agent| agent.wire.is_some()) => {
                agents.for_each(|wire| wire.set(mode));
            }
            None => bail!("the wires of {} are direct: start it with `Wires::Proxied`", self.name),
        }
        Ok(())
    }
}

/// One daemon with its addresses.
pub struct Node {
    /// Its process.
    pub daemon: Daemon,
    /// The address of the control API or of verifications.
    pub http: SocketAddr,
    /// The address of its admin endpoints.
    pub admin: SocketAddr,
    /// The wire to its NATS server, if proxied.
    pub wire: Option<Proxy>,
    /// A publisher's wire to PostgreSQL, if proxied.
    pub store_wire: Option<Proxy>,
    /// Its configuration file.
    pub config: PathBuf,
}

impl Node {
    /// Writes the configuration to `<dir>/<name>.toml` and starts `evictd <role>` with it.
    fn start(
        dir: &Path,
        role: &str,
        name: &str,
        config: &Table,
        (http, admin): (SocketAddr, SocketAddr),
        wire: Option<Proxy>,
    ) -> Result<Self> {
        let path = dir.join(format!("{name}.toml"));
        fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
        let launch = Launch::new(name, evictd_binary()?, dir).args([role, "--config"]).args([&path]);
        Ok(Self { daemon: Daemon::start(launch)?, http, admin, wire, store_wire: None, config: path })
    }

    /// Waits until `/readyz` answers 200. An error shows its last answer.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        let url = format!("http://{}/readyz", self.admin);
        let client = Client::with_timeout(Duration::from_secs(5));
        let mut last = String::from("nothing");
        let ready = self.daemon.wait_until("readiness", READY_DEADLINE, || {
            let answer = client.get(&url).ok()?;
            last = format!("{} {}", answer.status, answer.text.trim_end());
            (answer.status == 200).then_some(())
        });
        ready.with_context(|| format!("the last answer of {url}: {last}"))
    }

    /// Kills it if it runs, starts it again with the same configuration, and waits until it is ready.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.restart()?;
        self.wait_until_ready()
    }

    /// Scrapes its metrics.
    pub fn metrics(&self) -> Result<Scrape> {
        Scrape::get(&format!("http://{}/metrics", self.admin))
    }

    /// Reads its `/status`.
    pub fn status(&self) -> Result<Value> {
        Ok(Client::new().get(&format!("http://{}/status", self.admin))?.body)
    }
}

impl Topology {
    /// Starts all of `plan` with its files in `dir`, and returns when every daemon is ready.
    pub fn start(dir: &Path, plan: &Plan) -> Result<Self> {
        let (home, servers) = start_servers(dir, plan)?;
        let mut publisher = start_publisher(dir, plan, &home, 0)?;
        publisher.wait_until_ready()?;
        let root_key = create_root_key(&publisher.config)?;
        let more = (1..plan.publishers).map(|index| start_publisher(dir, plan, &home, index));
        let mut more_publishers = more.collect::<Result<Vec<_>>>()?;
        for publisher in &mut more_publishers {
            publisher.wait_until_ready()?;
        }

        let mut sites = Vec::new();
        let mut index = 0;
        for ((name, agents), (nats, wire)) in plan.regions.iter().zip(servers) {
            let server = nats.as_ref().unwrap_or(&home);
            let mut site = RegionSite { name: name.clone(), agents: Vec::new(), nats: None, wire };
            for agent in agents {
                site.agents.push(start_agent(dir, plan, server, (name, agent), index)?);
                index += 1;
            }
            site.nats = nats;
            sites.push(site);
        }
        for agent in sites.iter_mut().flat_map(|site| &mut site.agents) {
            agent.wait_until_ready()?;
        }
        Ok(Self { publisher, more_publishers, regions: sites, home, root_key, client: Client::new() })
    }

    /// Starts a publisher with another home store, such as a copy of the first one's. Its configuration is otherwise
    /// the first publisher's, and its connection to NATS runs through `wire`. It isn't ready yet when this returns.
    pub fn start_rival(
        &self,
        dir: &Path,
        name: &str,
        store: &HomeStoreAddress,
        wire: Proxy,
        login: &Login,
    ) -> Result<Node> {
        let first = &self.publisher.config;
        let text = fs::read_to_string(first).with_context(|| format!("reading {}", first.display()))?;
        let mut config: Table = text.parse()?;
        let listen = Where::FreePorts.pick((0, 0), 0)?;
        lay_over(&mut config, &daemon_config(listen, wire.address(), login));
        let mut section = Table::new();
        match store {
            HomeStoreAddress::Sqlite(path) => {
                section.insert("path".to_owned(), path.to_string_lossy().as_ref().into())
            }
            HomeStoreAddress::Postgres(url) => section.insert("url".to_owned(), url.as_str().into()),
        };
        config.insert("store".to_owned(), section.into());
        Node::start(dir, "publisher", name, &config, listen, Some(wire))
    }

    /// Returns a root key with all permissions.
    pub fn root_key(&self) -> &str {
        &self.root_key
    }

    /// Calls `POST /v2/<operation>` (`keys.deleteKey`) at a daemon with the root key.
    pub fn call(&self, node: &Node, operation: &str, body: &Value) -> Result<Response> {
        self.call_with(node, operation, body, &[])
    }

    /// As [`Topology::call`], with more headers (`Prefer: wait=30`).
    pub fn call_with(
        &self,
        node: &Node,
        operation: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> Result<Response> {
        let url = format!("http://{}/v2/{operation}", node.http);
        self.client.post_json(&url, Some(&self.root_key), body, headers)
    }

    /// Returns all publishers, the first one first.
    pub fn publishers(&self) -> impl Iterator<Item = &Node> {
        std::iter::once(&self.publisher).chain(&self.more_publishers)
    }

    /// Returns all publishers mutably, to break them.
    pub fn publishers_mut(&mut self) -> impl Iterator<Item = &mut Node> {
        std::iter::once(&mut self.publisher).chain(&mut self.more_publishers)
    }

    /// Returns all agents, region by region.
    pub fn agents(&self) -> impl Iterator<Item = &Node> {
        self.regions.iter().flat_map(|site| &site.agents)
    }
}

/// A region's server and its proxy to home, if the plan has them.
type RegionServer = (Option<NatsServer>, Option<Proxy>);

/// Starts the NATS servers, and returns when the regions have reached home.
fn start_servers(dir: &Path, plan: &Plan) -> Result<(NatsServer, Vec<RegionServer>)> {
    let names: Vec<&str> = plan.regions.iter().map(|(region, _)| region.as_str()).collect();
    let mut servers = Vec::new();
    match plan.servers {
        Servers::Single => {
            let agents: Vec<(&str, &str)> = plan
                .regions
                .iter()
                .flat_map(|(region, agents)| agents.iter().map(|agent| (region.as_str(), agent.as_str())))
                .collect();
            let home = NatsServer::start_single(dir, Listen::free()?, &agents)?;
            servers.resize_with(names.len(), || (None, None));
            Ok((home, servers))
        }
        Servers::PerRegion => {
            let mut home = NatsServer::start_home(dir, Listen::free()?, &names)?;
            for (region, agents) in &plan.regions {
                let (address, wire) = plan.wires.lay(home.leaves())?;
                let agents: Vec<&str> = agents.iter().map(String::as_str).collect();
                let login = home.login(&User::leaf(region))?;
                let server = NatsServer::start_region(dir, Listen::free()?, region, &agents, address, login)?;
                servers.push((Some(server), wire));
            }
            home.wait_for_leaves(servers.len())?;
            Ok((home, servers))
        }
    }
}

fn start_publisher(dir: &Path, plan: &Plan, home: &NatsServer, index: usize) -> Result<Node> {
    let listen = match index {
        0 => plan.listen.pick((7070, 7079), 0)?,
        _ => Where::FreePorts.pick((0, 0), 0)?,
    };
    let (server, wire) = plan.wires.lay(home.clients())?;
    let (store, store_wire) = plan.wires.lay_to_store(&plan.store)?;
    let plan = &Plan { store, ..plan.clone() };
    let config = publisher_config(dir, plan, listen, server, home.login(&User::Publisher)?);
    let name = if index == 0 { "publisher".to_owned() } else { format!("publisher-{}", index + 1) };
    Ok(Node { store_wire, ..Node::start(dir, "publisher", &name, &config, listen, wire)? })
}

fn start_agent(
    dir: &Path,
    plan: &Plan,
    server: &NatsServer,
    (region, agent): (&str, &str),
    index: u16,
) -> Result<Node> {
    let listen = plan.listen.pick((7080, 7089), index)?;
    let (address, wire) = plan.wires.lay(server.clients())?;
    let login = server.login(&User::agent(region, agent))?;
    let config = agent_config(plan, (region, agent), listen, address, login);
    Node::start(dir, "agent", &format!("{region}.{agent}"), &config, listen, wire)
}

/// The configuration that publishers and agents have in common.
fn daemon_config((http, admin): (SocketAddr, SocketAddr), server: SocketAddr, login: &Login) -> Table {
    let mut config = Table::new();
    set(&mut config, "http", "listen", http.to_string());
    set(&mut config, "admin", "listen", admin.to_string());
    // No gateway follows these daemons, and their ends must not be slow.
    set(&mut config, "shutdown", "delay", "0s");
    set(&mut config, "nats", "urls", vec![format!("nats://{server}")]);
    set(&mut config, "nats", "user", login.user.as_str());
    set(&mut config, "nats", "password", login.password.as_str());
    config
}

fn publisher_config(
    dir: &Path,
    plan: &Plan,
    listen: (SocketAddr, SocketAddr),
    server: SocketAddr,
    login: &Login,
) -> Table {
    let mut config = daemon_config(listen, server, login);
    match &plan.store {
        StoreKind::Sqlite => {
            set(&mut config, "store", "path", dir.join("home.db").to_string_lossy().as_ref());
        }
        StoreKind::Postgres(url) => set(&mut config, "store", "url", url.as_str()),
    }
    set(&mut config, "receipts", "bound", millis(plan.bound));
    lay_over(&mut config, &plan.publisher);
    config
}

fn agent_config(
    plan: &Plan,
    (region, agent): (&str, &str),
    listen: (SocketAddr, SocketAddr),
    server: SocketAddr,
    login: &Login,
) -> Table {
    let mut config = daemon_config(listen, server, login);
    config.insert("region".to_owned(), region.into());
    config.insert("agent".to_owned(), agent.into());
    set(&mut config, "lease", "bound", millis(plan.bound));
    set(&mut config, "lease", "margin", millis(plan.bound / 10));
    // These depend on the bound, in the same proportions as the defaults.
    set(&mut config, "lease", "probe_interval", millis(plan.bound / 6));
    set(&mut config, "lease", "request_timeout", millis((plan.bound / 6).min(Duration::from_secs(1))));
    set(&mut config, "cache", "not_found_ttl", millis(plan.bound / 3));
    lay_over(&mut config, &plan.agents);
    config
}

fn set(config: &mut Table, section: &str, key: &str, value: impl Into<toml::Value>) {
    let section = config.entry(section).or_insert_with(|| Table::new().into());
    if let Some(section) = section.as_table_mut() {
        section.insert(key.to_owned(), value.into());
    }
}

fn millis(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

/// Merges `over` into `config`: tables are merged, other values are replaced.
fn lay_over(config: &mut Table, over: &Table) {
    for (key, value) in over {
        match (config.get_mut(key), value) {
            (Some(toml::Value::Table(own)), toml::Value::Table(over)) => lay_over(own, over),
            _ => drop(config.insert(key.clone(), value.clone())),
        }
    }
}

/// Creates a root key on the command line, as an operator does.
fn create_root_key(config: &Path) -> Result<String> {
    let mut command = evictd_command()?;
    command.args(["root-key", "create", "--output", "json", "--config"]).arg(config);
    let output = command.output().context("running `evictd root-key create`")?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`evictd root-key create` failed ({}): {}", output.status, stderr.trim_end());
    }
    // The messages must not show the output, which may hold the key.
    let answer: Value =
        serde_json::from_slice(&output.stdout).context("`evictd root-key create` printed no JSON")?;
    let key = answer["rootKey"].as_str().context("`evictd root-key create` printed no `rootKey`")?;
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use toml::toml;

    use super::*;
    use crate::wait::eventually;

    fn login() -> Login {
        Login { user: "u".to_owned(), password: "p".to_owned() }
    }

    fn configs(plan: &Plan) -> Result<(Table, Table)> {
        let listen = plan.listen.pick((7070, 7079), 2)?;
        let server = SocketAddr::from(([127, 0, 0, 1], 4222));
        let publisher = publisher_config(Path::new("/var/lib/x"), plan, listen, server, &login());
        Ok((publisher, agent_config(plan, ("eu", "agent-1"), listen, server, &login())))
    }

    /// Returns the keys of `config` that `documented` doesn't have, as paths.
    fn unknown(config: &Table, documented: &Table) -> Vec<String> {
        let mut paths = Vec::new();
        for (key, value) in config {
            match (value, documented.get(key)) {
                (_, None) => paths.push(key.clone()),
                (toml::Value::Table(own), Some(toml::Value::Table(theirs))) => {
                    paths.extend(unknown(own, theirs).iter().map(|path| format!("{key}.{path}")));
                }
                _ => {}
            }
        }
        paths
    }

    #[test]
    fn every_written_key_is_documented_for_operators() -> Result<()> {
        let (publisher, agent) = configs(&Plan::new(&["eu"]))?;
        for (config, file) in [(publisher, "publisher.toml"), (agent, "agent.toml")] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
            let documented: Table = fs::read_to_string(&path)?.parse()?;
            assert_eq!(unknown(&config, &documented), Vec::<String>::new(), "not in deploy/{file}");
        }
        Ok(())
    }

    #[test]
    fn a_plan_overrides_the_default_configuration() -> Result<()> {
        let plan = Plan {
            listen: Where::DocumentedPorts,
            bound: Duration::from_secs(5),
            agents: toml! { lease = { probe_interval = "1s", margin = "2s" } },
            publisher: toml! { log = { format = "json" } },
            ..Plan::new(&["eu", "us"])
        };
        let (publisher, agent) = configs(&plan)?;
        assert_eq!(publisher["http"]["listen"].as_str(), Some("127.0.0.1:7270"));
        assert_eq!(publisher["receipts"]["bound"].as_str(), Some("5000ms"));
        assert_eq!(publisher["log"]["format"].as_str(), Some("json"));
        let expected =
            toml! { bound = "5000ms" probe_interval = "1s" margin = "2s" request_timeout = "833ms" };
        assert_eq!(agent["lease"], expected.into());
        assert_eq!((agent["region"].as_str(), agent["agent"].as_str()), (Some("eu"), Some("agent-1")));
        Ok(())
    }

    #[test]
    fn a_region_can_be_cut_off_and_reconnected() -> Result<()> {
        for servers in [Servers::Single, Servers::PerRegion] {
            let dir = tempfile::tempdir()?;
            let plan = Plan { servers, wires: Wires::Proxied, ..Plan::new(&["eu", "us"]) };
            let mut deployment = Topology::start(dir.path(), &plan)?;
            let body = serde_json::json!({"name": "payments"});
            let answer = deployment.call(&deployment.publisher, "apis.createApi", &body)?;
            assert_eq!(answer.status, 200, "{}", answer.text);
            assert_eq!(deployment.agents().count(), 2);

            let eu = &mut deployment.regions[0];
            eu.set_wires(WireMode::Cut)?;
            let silent =
                |eu: &RegionSite| eu.agents[0].metrics().ok()?.value("evictd_agent_feed_silent", &[]);
            eventually("eu to miss the live feed", READY_DEADLINE, || {
                silent(eu).filter(|silent| *silent > 0.0)
            })?;
            eu.set_wires(WireMode::Pass)?;
            eventually("eu to receive the live feed", READY_DEADLINE, || {
                silent(eu).filter(|silent| *silent == 0.0)
            })?;
            eu.agents[0].restart()?;
        }
        Ok(())
    }

    #[test]
    fn configuration_round_trips_through_toml() -> Result<()> {
        let (publisher, agent) = configs(&Plan::new(&["eu"]))?;
        for config in [publisher, agent] {
            assert_eq!(config.to_string().parse::<Table>()?, config);
        }
        Ok(())
    }
}
