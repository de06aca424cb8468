//! `evictd publisher`, `evictd agent`, `evictd check-config`.

use anyhow::Context;
use clap::ValueEnum;
use evictd_cli::print::{note, print_line};
use evictd_ops::bus::{self, BusConfig};
use evictd_ops::config::{Loaded, named_files, print_effective};
use evictd_ops::logging::LogConfig;
use evictd_ops::{logging, reload, shutdown};
use evictd_publisher::StartError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use crate::config_args::ConfigArgs;
use crate::home_store::{ConfiguredStore, with_advice};
use crate::{replica, runtime};

/// In `evictd dev`, it is no mistake.
const UNNAMED_REGION: &str =
    "`region` is the default's, `local`: agents of several places would count as one region; set it";

#[derive(Clone, Copy, ValueEnum, Debug)]
pub(crate) enum DaemonKind {
    /// deploy/publisher.toml
    Publisher,
    /// deploy/agent.toml
    Agent,
}

pub(crate) fn run_publisher(args: &ConfigArgs) -> anyhow::Result<()> {
    logging::set_fatal_format(args.log_format(evictd_publisher::config::DEFAULTS));
    let Loaded { config, effective } = args.publisher()?;
    prepare(&config.log);
    run_until_exit(async |shutdown| {
        let hang_ups = reload::hang_ups();
        let store = ConfiguredStore::new(config.store.clone())?;
        store.check()?;
        let open = async || store.open_for_publisher().await;
        let running = evictd_publisher::start(open, config, shutdown).await.map_err(|error| match error {
            StartError::Store { source, .. } => with_advice(source),
            error => error.into(),
        })?;
        if !running.has_root_keys {
            tracing::warn!(
                "the store has no root key, so the control API rejects every request; create one with: \
                 evictd root-key create{}",
                args.store_flags()
            );
        }
        let reloads = reload::at_hang_up(hang_ups, running.reload(), &effective, || args.publisher());
        Ok(until_ended(running.ended(), reloads))
    })
}

pub(crate) fn run_agent(args: &ConfigArgs) -> anyhow::Result<()> {
    logging::set_fatal_format(args.log_format(evictd_agent::config::DEFAULTS));
    let Loaded { config, effective } = args.agent()?;
    prepare(&config.log);
    run_until_exit(async |shutdown| {
        let hang_ups = reload::hang_ups();
        let database = replica::configured(&config)?;
        let is_region_default = config.is_region_default();
        let running = evictd_agent::start(config, database, shutdown).await?;
        if is_region_default {
            running.readiness.warning("region").unmet(UNNAMED_REGION);
        }
        let reloads = reload::at_hang_up(hang_ups, running.reload(), &effective, || args.agent());
        Ok(until_ended(running.ended(), reloads))
    })
}

/// Runs a daemon until it has ended, and reloads it meanwhile.
async fn until_ended<T>(ended: impl Future<Output = T>, reloads: impl Future<Output = ()>) -> T {
    let reloads = async {
        reloads.await;
        std::future::pending().await
    };
    tokio::select! {
        ended = ended => ended,
        ended = reloads => ended,
    }
}

/// Prepares this process for a daemon.
fn prepare(log: &LogConfig) {
    logging::init(log.format, &log.filter);
    logging::log_panics();
    allow_many_connections();
}

/// Starts a daemon and runs it until it exits. A signal during the start ends it too, as it serves no requests yet.
fn run_until_exit<Start, Ended, Failed>(start: Start) -> anyhow::Result<()>
where
    Start: AsyncFnOnce(CancellationToken) -> anyhow::Result<Ended>,
    Ended: Future<Output = Result<(), Failed>>,
    Failed: std::error::Error + Send + Sync + 'static,
{
    let runtime = runtime::new()?;
    let outcome = runtime.block_on(async {
        let shutdown = shutdown::on_signals();
        match shutdown.run_until_cancelled(start(shutdown.clone())).await {
            Some(started) => Ok(started?.await?),
            None => Ok(()),
        }
    });
    if outcome.is_ok() {
        tracing::info!("stopped");
    }
    // Dropping the runtime would wait for a name resolution in progress, which can take long.
    runtime.shutdown_background();
    outcome
}

/// Raises the limit on file descriptors as far as the system allows. The usual default is a tenth of the connections
/// that a daemon accepts.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, ?limit, "cannot raise the limit on open files; connections may be refused");
    }
}

/// Checks the configuration, and reads the files that the daemon would read, as this user on this machine. With
/// `connect`, it also tries the servers that the daemon would connect to.
pub(crate) fn check_config(daemon: DaemonKind, connect: bool, args: &ConfigArgs) -> anyhow::Result<()> {
    let effective = match daemon {
        DaemonKind::Publisher => {
            let Loaded { config, effective } = args.publisher()?;
            check_files(&effective)?;
            let store = ConfiguredStore::new(config.store).and_then(|store| store.check().map(|()| store));
            let store = store.context("`[store]`")?;
            if connect {
                let database = store.schema_version().map(drop);
                check_servers(&config.nats, &[(store.to_string(), database)])?;
            }
            effective
        }
        DaemonKind::Agent => {
            let Loaded { config, effective } = args.agent()?;
            check_files(&effective)?;
            let database = replica::configured(&config).context("`[postgres]`")?;
            if connect {
                let database =
                    database.map(|database| ("the database".to_owned(), replica::check(&*database)));
                check_servers(&config.nats, database.as_slice())?;
            }
            effective
        }
    };
    print_line(print_effective(&effective).trim_end())
}

/// Prints on standard error which servers can be used. The error lists those that cannot.
fn check_servers(nats: &BusConfig, databases: &[(String, anyhow::Result<()>)]) -> anyhow::Result<()> {
    let servers = runtime::new()?.block_on(bus::check(nats))?;
    let servers = servers.into_iter().map(|(server, result)| (server, result.err()));
    let databases = databases
        .iter()
        .map(|(place, result)| (place.clone(), result.as_ref().err().map(|error| format!("{error:#}"))));
    let (usable, failed): (Vec<_>, Vec<_>) = servers.chain(databases).partition(|(_, error)| error.is_none());
    for (server, _) in usable {
        note(&format!("{server}: can be used"));
    }
    let failed: Vec<String> =
        failed.into_iter().filter_map(|(server, error)| Some(format!("{server}: {}", error?))).collect();
    anyhow::ensure!(failed.is_empty(), "cannot connect:\n{}", failed.join("\n"));
    Ok(())
}

/// Prints on standard error which files can be read. The error lists those that cannot.
fn check_files(effective: &toml::Table) -> anyhow::Result<()> {
    let (mut problems, mut readable) = (Vec::new(), Vec::new());
    for file in named_files(effective) {
        let (key, path) = (file.key, file.path.display());
        match file.read {
            Ok(()) => readable.push(format!("{key}: {path} can be read")),
            Err(error) => problems.push(format!("{key}: cannot read {path}: {error}")),
        }
    }
    anyhow::ensure!(problems.is_empty(), "the configuration cannot be used:\n{}", problems.join("\n"));
    for line in readable {
        note(&line);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use evictd_ops::metrics::reference as metrics_reference;

    use super::*;

    /// Compares a page with the generated one. `EVICTD_REGENERATE=1`, which `cargo xtask generate` sets, rewrites it instead.
    fn check_page(name: &str, fresh: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
        if std::env::var_os("EVICTD_REGENERATE").is_some() {
            std::fs::write(&path, fresh).unwrap();
        }
        let current = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(current == fresh, "docs/{name} is not what the code generates: run `cargo xtask generate`");
    }

    #[test]
    fn configuration_page_is_up_to_date() {
        let publisher = evictd_ops::config::reference("Publisher", evictd_publisher::config::DEFAULTS);
        let agent = evictd_ops::config::reference("Agent", evictd_agent::config::DEFAULTS);
        check_page("config.md", &format!("{publisher}\n{agent}"));
    }

    #[test]
    fn reloadable_settings_exist_and_are_documented() {
        use evictd_ops::reload::Reload;
        let page = include_str!("../../../docs/operations.md");
        let row = |name: &str| page.lines().find(|line| line.starts_with(&format!("| {name} |"))).unwrap();
        let publisher = (evictd_publisher::reload::PublisherReload::KEYS, evictd_publisher::config::DEFAULTS);
        let agent = (evictd_agent::reload::AgentReload::KEYS, evictd_agent::config::DEFAULTS);
        for ((keys, defaults), row) in [(publisher, row("publisher")), (agent, row("agent"))] {
            let defaults: toml::Table = defaults.parse().unwrap();
            let mut documented = Vec::new();
            for key in keys {
                let (section, name) = key.split_once('.').unwrap();
                assert!(name.is_empty() || defaults[section].get(name).is_some(), "{key}");
                documented.push(if name.is_empty() { format!("`{section}.*`") } else { format!("`{key}`") });
            }
            assert!(row.ends_with(&format!("| {} |", documented.join(", "))), "{row}");
        }
    }

    #[test]
    fn metrics_page_is_up_to_date() {
        let publisher = metrics_reference("Publisher", evictd_publisher::metrics::SPECS);
        let agent = metrics_reference("Agent", evictd_agent::metrics::SPECS);
        check_page("metrics.md", &format!("{publisher}\n{agent}"));
    }

    #[test]
    fn check_config_reads_the_files_that_the_daemon_reads() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let named = |key: &str| ConfigArgs::default().and_set(key, file.display().to_string());
        let with_password = || named("nats.password_file").and_set("nats.user", "u");
        let from_database = || named("postgres.url_file").and_set("loads.origin", "postgres");
        let all = [
            (DaemonKind::Publisher, with_password(), "nats.password_file"),
            (DaemonKind::Publisher, named("nats.ca_file"), "nats.ca_file"),
            (DaemonKind::Publisher, named("store.url_file"), "store.url_file"),
            (DaemonKind::Agent, with_password(), "nats.password_file"),
            (DaemonKind::Agent, from_database(), "postgres.url_file"),
        ];
        for (daemon, args, key) in &all {
            let error = check_config(*daemon, false, args).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(file.to_str().unwrap()), "{error}");
        }
        std::fs::write(&file, "postgres://u:hunter2@db/evictd\n").unwrap();
        for (daemon, args, _) in &all {
            check_config(*daemon, false, args).unwrap();
        }
        // Their content is checked too.
        for (content, problem) in [
            ("postgres://u:hunter2@db", "name a database"),
            ("postgres://u:hunter2@db:x/evictd", "invalid port number"),
        ] {
            std::fs::write(&file, content).unwrap();
            for (daemon, args) in
                [(DaemonKind::Publisher, named("store.url_file")), (DaemonKind::Agent, from_database())]
            {
                let error = format!("{:#}", check_config(daemon, false, &args).unwrap_err());
                assert!(error.contains(problem) && !error.contains("hunter2"), "{error}");
            }
        }
    }
}
