//! `evictd publisher`, `evictd agent`, `evictd check-config`.

use anyhow::Context;
use clap::ValueEnum;
use evictd_cli::print::print_line;
use evictd_ops::config::{Loaded, named_files, print_effective};
use evictd_ops::{logging, shutdown};
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
    let config = args.publisher()?.config;
    logging::init(config.log.format, &config.log.filter);
    allow_many_connections();
    run_until_exit(async |shutdown| {
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
        Ok(running.ended())
    })
}

pub(crate) fn run_agent(args: &ConfigArgs) -> anyhow::Result<()> {
    let config = args.agent()?.config;
    logging::init(config.log.format, &config.log.filter);
    allow_many_connections();
    run_until_exit(async |shutdown| {
        let database = replica::configured(&config)?;
        let is_region_default = config.is_region_default();
        let running = evictd_agent::start(config, database, shutdown).await?;
        if is_region_default {
            running.readiness.warning("region").unmet(UNNAMED_REGION);
        }
        Ok(running.ended())
    })
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

/// Checks the configuration, and reads the files that the daemon would read, as this user on this machine.
pub(crate) fn check_config(daemon: DaemonKind, args: &ConfigArgs) -> anyhow::Result<()> {
    let effective = match daemon {
        DaemonKind::Publisher => {
            let Loaded { config, effective } = args.publisher()?;
            check_files(&effective)?;
            ConfiguredStore::new(config.store).and_then(|store| store.check()).context("`[store]`")?;
            effective
        }
        DaemonKind::Agent => {
            let Loaded { config, effective } = args.agent()?;
            check_files(&effective)?;
            replica::configured(&config).context("`[postgres]`")?;
            effective
        }
    };
    print_line(print_effective(&effective).trim_end());
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
        eprintln!("{line}");
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
            let error = check_config(*daemon, args).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(file.to_str().unwrap()), "{error}");
        }
        std::fs::write(&file, "postgres://u:hunter2@db/evictd\n").unwrap();
        for (daemon, args, _) in &all {
            check_config(*daemon, args).unwrap();
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
                let error = format!("{:#}", check_config(daemon, &args).unwrap_err());
                assert!(error.contains(problem) && !error.contains("hunter2"), "{error}");
            }
        }
    }
}
