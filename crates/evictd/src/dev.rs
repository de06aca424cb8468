//! `evictd dev`: a publisher, one agent per region and a NATS server, with one command.
//!
//! All parts are those of production, with two exceptions, both on loopback only: the NATS server requires no
//! password, and the data directory contains the root key in plain text, so that a later run can use it again.

use std::fs::Permissions;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use evictd_cli::print::{OutputFormat, print_line};
use evictd_cli::private_file;
use evictd_ops::config::{HumanDuration, UnitError};
use evictd_ops::{logging, shutdown};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore as _, RecordStore as _};
use evictd_wire::api::ids;
use evictd_wire::subject::check_name;
use serde::Serialize;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::config_args::ConfigArgs;
use crate::home_store::{ConfiguredStore, with_advice};
use crate::nats_server::DevNats;
use crate::root_key::{self, RootKeySpec};
use crate::runtime;

/// The distance between the ports of two agents.
const PORT_STEP: u16 = 100;

/// How long all parts may take to become ready.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// Ctrl-C ends everything at once: no gateway follows the readiness of an installation on one machine.
const NO_DELAY: &str = "0s";

/// The shortest bound: an agent's timeout for a query. A shorter one would leave no time for a retry.
const BOUND_MIN: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(crate) struct DevArgs {
    /// The regions; each gets one agent.
    #[arg(long, value_delimiter = ',', default_value = "us-east-1,eu-central-1,ap-south-1")]
    regions: Vec<String>,
    /// `fixed`: publisher on 7070 and 7079, agents on 7080 and 7089, 7180 and 7189, and so on; `auto`: free ports.
    #[arg(long, default_value = "fixed")]
    ports: Ports,
    /// The directory of home store and root key. Without it a temporary one is used, and removed at the end.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// A running NATS server to use instead of starting one.
    #[arg(long, value_name = "URL")]
    nats_url: Option<String>,
    /// The nats-server program, if it is not on PATH.
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
    /// The bound of the agents, at least a second.
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = bound)]
    bound: HumanDuration,
    /// `json`: the first line of standard output is an object with all addresses.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    output: OutputFormat,
    /// The filter for log messages.
    #[arg(long, default_value = "warn")]
    log: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum Ports {
    Fixed,
    Auto,
}

/// The addresses of an installation.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Installation {
    publisher: Endpoints,
    agents: Vec<AgentEndpoints>,
    nats: String,
    root_key: String,
    data_dir: PathBuf,
}

#[derive(Serialize)]
struct Endpoints {
    url: String,
    admin: String,
}

#[derive(Serialize)]
struct AgentEndpoints {
    region: String,
    id: String,
    #[serde(flatten)]
    endpoints: Endpoints,
}

pub(crate) fn run(args: &DevArgs) -> anyhow::Result<()> {
    logging::init(logging::LogFormat::Text, &args.log);
    logging::log_panics();
    check_regions(&args.regions)?;
    // A temporary directory is removed when it is dropped.
    let (data_dir, _temporary) = if let Some(dir) = &args.data_dir {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        (dir.canonicalize()?, None)
    } else {
        let dir = temporary_directory()?;
        (dir.path().to_owned(), Some(dir))
    };
    // On the main thread, because the server is killed when the thread that started it exits.
    let mut nats = match &args.nats_url {
        Some(url) => DevNats::External(url.clone()),
        None => DevNats::start(args.nats_server.as_deref(), &data_dir)?,
    };
    let done = runtime::new()?.block_on(serve(args, &data_dir, &mut nats));
    nats.stop();
    done
}

async fn serve(args: &DevArgs, data_dir: &Path, nats: &mut DevNats) -> anyhow::Result<()> {
    let shutdown = shutdown::on_signals_and_hang_up();
    // On the heap, because the future of a whole installation is large.
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
    let printed = match args.output {
        OutputFormat::Json => serde_json::to_string(&installation).map_err(anyhow::Error::from),
        OutputFormat::Text => Ok(installation.describe(args.data_dir.is_some())),
    }
    .and_then(|text| print_line(&text));
    let exited = match &printed {
        Ok(()) => shutdown.clone().run_until_cancelled(nats.exited()).await,
        Err(_) => None,
    };
    shutdown.cancel();
    let (publisher, agents) = running;
    // All are drained, even if others fail. The first failure is returned.
    let mut done = Ok(());
    for agent in agents {
        done = done.and(agent.ended().await);
    }
    done.and(publisher.ended().await)?;
    printed?;
    match exited {
        Some(status) => bail!("the NATS server of this installation exited unexpectedly ({status})"),
        None => Ok(()),
    }
}

type Daemons = (evictd_publisher::RunningPublisher, Vec<evictd_agent::RunningAgent>);

async fn start(
    args: &DevArgs,
    data_dir: &Path,
    nats_url: &str,
    shutdown: &CancellationToken,
) -> anyhow::Result<(Installation, Daemons)> {
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
        .and_set("shutdown.delay", NO_DELAY)
        .and_set("http.listen", listen(7070))
        .and_set("admin.listen", listen(7079));
    let config = config.publisher()?.config;
    // Whatever is wrong with it, there is no use in waiting: the operator is at the terminal.
    let store =
        ConfiguredStore::new(config.store.clone())?.open_for_publisher().await.map_err(with_advice)?;
    let publisher = evictd_publisher::start(async || Ok(store.clone()), config, shutdown.clone()).await?;
    let mut agents = Vec::new();
    for (index, region) in args.regions.iter().enumerate() {
        let step = u16::try_from(index).ok().and_then(|index| index.checked_mul(PORT_STEP));
        let step = step
            .filter(|step| *step < 50_000)
            .context("too many regions for fixed ports; use --ports auto")?;
        let config = with_bound(ConfigArgs::default(), args.bound)
            .and_set("region", region)
            .and_set("agent", "agent-1")
            .and_set("shutdown.delay", NO_DELAY)
            .and_set("nats.urls", nats_url)
            .and_set("http.listen", listen(7080 + step))
            .and_set("admin.listen", listen(7089 + step));
        agents.push(evictd_agent::start(config.agent()?.config, None, shutdown.clone()).await?);
    }
    wait_until_ready(&publisher, &agents).await?;
    let endpoints =
        |http, admin| Endpoints { url: format!("http://{http}"), admin: format!("http://{admin}") };
    let installation = Installation {
        publisher: endpoints(publisher.http, publisher.admin),
        agents: agents
            .iter()
            .map(|agent| AgentEndpoints {
                region: agent.identity.region.to_string(),
                id: agent.identity.agent.to_string(),
                endpoints: endpoints(agent.http, agent.admin),
            })
            .collect(),
        nats: nats_url.to_owned(),
        root_key,
        data_dir: data_dir.to_owned(),
    };
    Ok((installation, (publisher, agents)))
}

/// Refuses malformed and duplicate names.
fn check_regions(regions: &[String]) -> anyhow::Result<()> {
    for (index, region) in regions.iter().enumerate() {
        check_name(region).with_context(|| format!("--regions: `{region}`"))?;
        anyhow::ensure!(!regions[..index].contains(region), "--regions names `{region}` twice");
    }
    Ok(())
}

/// Sets the bound, with margin, probe interval and TTL in the proportions of the defaults.
fn with_bound(config: ConfigArgs, bound: HumanDuration) -> ConfigArgs {
    let millis = bound.as_millis();
    config
        .and_set("lease.bound", bound.to_string())
        .and_set("lease.margin", format!("{}ms", millis.div_ceil(10)))
        .and_set("lease.probe_interval", format!("{}ms", (millis / 6).max(10)))
        .and_set("cache.not_found_ttl", format!("{}ms", millis / 3))
}

fn bound(text: &str) -> Result<HumanDuration, String> {
    let bound: HumanDuration = text.parse().map_err(|error: UnitError| error.to_string())?;
    if Duration::from(bound) < BOUND_MIN {
        return Err(format!("the bound must be at least {}", HumanDuration::from(BOUND_MIN)));
    }
    Ok(bound)
}

async fn wait_until_ready(
    publisher: &evictd_publisher::RunningPublisher,
    agents: &[evictd_agent::RunningAgent],
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

/// Returns the root key of this data directory; the first start creates it.
async fn root_key(data_dir: &Path, store: &Path) -> anyhow::Result<String> {
    let store = SqliteStore::open(store).await?;
    let root_key = existing_or_new(&data_dir.join("root-key"), &store).await;
    store.close().await;
    root_key
}

/// Returns the root key in `file` if the store has it. Otherwise creates one and writes it there.
async fn existing_or_new(file: &Path, store: &SqliteStore) -> anyhow::Result<String> {
    match std::fs::read_to_string(file) {
        Ok(existing) => {
            let existing = existing.trim();
            if !existing.is_empty() && store.root_key(ids::hash(existing)).await?.is_some() {
                return Ok(existing.to_owned());
            }
            tracing::warn!(file = %file.display(), "the file has no root key of this store; creating a new one");
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
    let (_, secret) = root_key::create_in(store, RootKeySpec::named("dev")).await?;
    private_file::write(file, secret.expose()).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(secret.expose().to_owned())
}

impl Installation {
    fn describe(&self, is_kept: bool) -> String {
        let mut lines = vec![format!("evictd is ready.\n\n  publisher  {}", self.publisher.url)];
        for agent in &self.agents {
            lines.push(format!("  agent      {}   {}", agent.endpoints.url, agent.region));
        }
        lines.push(format!("  nats       {}", self.nats));
        let data = self.data_dir.display();
        lines.push(if is_kept {
            format!("  data       {data}")
        } else {
            format!("  data       {data} (removed at the end; --data-dir keeps it)")
        });
        let agent =
            self.agents.first().map_or(self.publisher.url.as_str(), |agent| agent.endpoints.url.as_str());
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
            admin = self
                .agents
                .first()
                .map_or(self.publisher.admin.as_str(), |agent| agent.endpoints.admin.as_str()),
        ));
        lines.join("\n")
    }
}

/// Creates a directory for this run only, which its owner alone can read.
fn temporary_directory() -> anyhow::Result<TempDir> {
    let mut directory = tempfile::Builder::new();
    directory.prefix("evictd-dev").permissions(Permissions::from_mode(0o700));
    directory.tempdir().context("cannot create a temporary directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_bound_is_refused_by_its_flag() {
        use clap::Parser as _;

        #[derive(clap::Parser)]
        struct DevCli {
            #[command(flatten)]
            dev: DevArgs,
        }
        for wrong in ["xyz", "0s", "999ms", ""] {
            let error = DevCli::try_parse_from(["dev", "--bound", wrong]).err().unwrap().to_string();
            assert!(error.contains("--bound"), "{error}");
        }
        // The shortest one makes a valid configuration.
        let shortest = DevCli::try_parse_from(["dev", "--bound=1s"]).ok().unwrap().dev.bound;
        with_bound(ConfigArgs::default(), shortest).agent().unwrap();
    }

    #[tokio::test]
    async fn root_key_is_reused_if_the_store_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, store) = (dir.path().join("root-key"), dir.path().join("evictd.db"));
        let mut current = root_key(dir.path(), &store).await.unwrap();
        assert_eq!(root_key(dir.path(), &store).await.unwrap(), current);
        for useless in ["", "\n", "unkey_of_another_store"] {
            std::fs::write(&file, useless).unwrap();
            let new = root_key(dir.path(), &store).await.unwrap();
            assert!(new != current && new != useless, "{useless:?}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), new);
            assert_eq!(root_key(dir.path(), &store).await.unwrap(), new);
            current = new;
        }
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.filter(|name| name.to_string_lossy().starts_with("root-key")).count(), 1);
    }
}
