//! `evictd publisher`, `evictd agent`, `evictd check-config`.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use evictd_agent::config::AgentConfig;
use evictd_ops::config::{Layers, Loaded, Validate, named_files, print_effective};
use evictd_ops::{logging, shutdown};
use evictd_publisher::config::PublisherConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::output_format::print_line;
use crate::{home_store, replica, variables};

/// Where a configuration comes from.
#[derive(Args, Debug, Default)]
pub(crate) struct ConfigArgs {
    /// The daemon's configuration file (TOML). Without it the documented defaults are in force.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets one key of the configuration, stronger than file and environment: `--set log.format=json`.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

/// The daemons that have a configuration.
#[derive(Clone, Copy, ValueEnum, Debug)]
pub(crate) enum Daemon {
    /// deploy/publisher.toml
    Publisher,
    /// deploy/agent.toml
    Agent,
}

impl ConfigArgs {
    /// Sets one key more, the strongest.
    pub(crate) fn and_set(mut self, key: &str, value: impl Into<String>) -> Self {
        self.set.push((key.to_owned(), value.into()));
        self
    }

    pub(crate) fn publisher(&self) -> anyhow::Result<Loaded<PublisherConfig>> {
        self.load(evictd_publisher::config::DEFAULTS)
    }

    pub(crate) fn agent(&self) -> anyhow::Result<Loaded<AgentConfig>> {
        self.load(evictd_agent::config::DEFAULTS)
    }

    fn load<T: DeserializeOwned + Validate>(&self, defaults: &'static str) -> anyhow::Result<Loaded<T>> {
        let mut layers = Layers::new(defaults).env(|name| std::env::var(name).ok());
        if let Some(file) = &self.config {
            layers = layers.file(file);
        }
        for (key, value) in &self.set {
            layers = layers.set(key, value);
        }
        let mut problems = variables::problems(variables::of_process());
        match layers.load() {
            Ok(loaded) if problems.is_empty() => return Ok(loaded),
            Ok(_) => {}
            Err(error) => problems.extend(error.problems),
        }
        Err(anyhow!("the configuration can't be used:\n{}", problems.join("\n")))
    }

    /// The flags that lead another command to the same store, each after a space, as a shell takes them. A URL
    /// isn't repeated, for it holds a password.
    fn naming_the_store(&self) -> String {
        let config = self.config.iter().map(|file| ("--config", file.display().to_string()));
        let set = self.set.iter().filter(|(key, _)| key.starts_with("store."));
        let set = set.map(|(key, value)| {
            let value = if key == "store.url" { "..." } else { value };
            ("--set", format!("{key}={value}"))
        });
        let flags = config.chain(set).map(|(flag, value)| format!(" {flag} {}", shell_word(&value)));
        flags.collect::<Vec<_>>().concat()
    }
}

pub(crate) fn run_publisher(args: &ConfigArgs) -> anyhow::Result<()> {
    let config = args.publisher()?.config;
    logging::init(config.log.format, &config.log.filter);
    allow_many_connections();
    run_until_ended(async |shutdown| {
        let store = home_store::Place::configured(config.store.clone())?.open_for_publisher().await?;
        let running = evictd_publisher::start(store, config, shutdown).await?;
        if !running.has_root_keys {
            tracing::warn!(
                "no root key yet, so nobody can call the control API; make one: evictd root-key create{}",
                args.naming_the_store()
            );
        }
        Ok(running.ended())
    })
}

pub(crate) fn run_agent(args: &ConfigArgs) -> anyhow::Result<()> {
    let config = args.agent()?.config;
    logging::init(config.log.format, &config.log.filter);
    allow_many_connections();
    run_until_ended(async |shutdown| {
        let database = replica::configured(&config)?;
        Ok(evictd_agent::start(config, database, shutdown).await?.ended())
    })
}

/// Starts a daemon and runs it until it ends. A signal that comes while it starts ends it as well: it has
/// served nobody yet.
fn run_until_ended<Start, Ended, Failed>(start: Start) -> anyhow::Result<()>
where
    Start: AsyncFnOnce(CancellationToken) -> anyhow::Result<Ended>,
    Ended: Future<Output = Result<(), Failed>>,
    Failed: std::error::Error + Send + Sync + 'static,
{
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let shutdown = shutdown::on_signals();
        match shutdown.run_until_cancelled(start(shutdown.clone())).await {
            Some(started) => Ok(started?.await?),
            None => Ok(()),
        }
    });
    // A name that is being resolved would be waited for otherwise, for as long as the resolver likes.
    runtime.shutdown_background();
    outcome
}

/// Takes as many file descriptors as the system grants: its default for a process is a tenth of the connections
/// that ours is.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, ..limit };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, ?limit, "can't raise the limit on open files; connections may be refused");
    }
}

/// Besides the configuration itself, reads what the daemon would read when it starts, on the machine and as the user
/// that this runs on and as.
pub(crate) fn check_config(daemon: Daemon, args: &ConfigArgs) -> anyhow::Result<()> {
    let effective = match daemon {
        Daemon::Publisher => {
            let Loaded { config, effective } = args.publisher()?;
            check_files(&effective)?;
            home_store::Place::configured(config.store)
                .and_then(|place| place.check())
                .context("`[store]`")?;
            effective
        }
        Daemon::Agent => {
            let Loaded { config, effective } = args.agent()?;
            check_files(&effective)?;
            replica::configured(&config).context("`[postgres]`")?;
            effective
        }
    };
    print_line(print_effective(&effective).trim_end());
    Ok(())
}

/// Says which files were read, for people, or which can't be.
fn check_files(effective: &toml::Table) -> anyhow::Result<()> {
    let mut problems = Vec::new();
    let mut read = Vec::new();
    for file in named_files(effective) {
        let (key, path) = (file.key, file.path.display());
        match file.read {
            Ok(()) => read.push(format!("{key}: {path} can be read")),
            Err(error) => problems.push(format!("{key}: can't read {path}: {error}")),
        }
    }
    anyhow::ensure!(problems.is_empty(), "the configuration can't be used:\n{}", problems.join("\n"));
    for line in read {
        eprintln!("{line}");
    }
    Ok(())
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start the async runtime")
}

/// Quotes what a shell would take apart.
fn shell_word(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-=:,@%+".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err("write it as KEY=VALUE, for example lease.bound=10s".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use evictd_ops::metrics::reference as metrics_reference;

    use super::*;

    /// `EVICTD_REGENERATE=1` (what `cargo xtask generate` sets) rewrites the page instead of failing.
    fn check_page(name: &str, fresh: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
        if std::env::var_os("EVICTD_REGENERATE").is_some() {
            std::fs::write(&path, fresh).unwrap();
        }
        let stands = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(stands == fresh, "docs/{name} is not what the code generates: run `cargo xtask generate`");
    }

    #[test]
    fn the_configuration_page_is_up_to_date() {
        let publisher = evictd_ops::config::reference("Publisher", evictd_publisher::config::DEFAULTS);
        let agent = evictd_ops::config::reference("Agent", evictd_agent::config::DEFAULTS);
        check_page("config.md", &format!("{publisher}\n{agent}"));
    }

    #[test]
    fn the_metrics_page_is_up_to_date() {
        let publisher = metrics_reference("Publisher", evictd_publisher::metrics::SPECS);
        let agent = metrics_reference("Agent", evictd_agent::metrics::SPECS);
        check_page("metrics.md", &format!("{publisher}\n{agent}"));
    }

    #[test]
    fn the_documented_defaults_are_valid() {
        ConfigArgs::default().publisher().unwrap();
        ConfigArgs::default().agent().unwrap();
    }

    #[test]
    fn the_hint_about_root_keys_leads_to_the_same_store() {
        let args = ConfigArgs { config: Some("/etc/evictd/publisher.toml".into()), set: Vec::new() }
            .and_set("store.path", "/srv/it's here/evictd.db")
            .and_set("log.filter", "debug");
        assert_eq!(
            args.naming_the_store(),
            r" --config /etc/evictd/publisher.toml --set 'store.path=/srv/it'\''s here/evictd.db'"
        );
        assert_eq!(ConfigArgs::default().naming_the_store(), "");
        let database = ConfigArgs::default().and_set("store.url", "postgres://evictd:hunter2@db/evictd");
        assert_eq!(database.naming_the_store(), " --set store.url=...");
    }

    #[test]
    fn a_file_that_the_daemon_would_read_has_to_be_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let named = |key: &str| ConfigArgs::default().and_set(key, file.display().to_string());
        let with_password = || named("nats.password_file").and_set("nats.user", "u");
        let from_database = || named("postgres.url_file").and_set("loads.origin", "postgres");
        let all = [
            (Daemon::Publisher, with_password(), "nats.password_file"),
            (Daemon::Publisher, named("nats.ca_file"), "nats.ca_file"),
            (Daemon::Publisher, named("store.url_file"), "store.url_file"),
            (Daemon::Agent, with_password(), "nats.password_file"),
            (Daemon::Agent, from_database(), "postgres.url_file"),
        ];
        for (daemon, args, key) in &all {
            let error = check_config(*daemon, args).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(file.to_str().unwrap()), "{error}");
        }
        std::fs::write(&file, "postgres://u:hunter2@db/evictd\n").unwrap();
        for (daemon, args, _) in &all {
            check_config(*daemon, args).unwrap();
        }
        // What stands in it counts, too.
        for (content, told) in [
            ("postgres://u:hunter2@db", "name a database"),
            ("postgres://u:hunter2@db:x/evictd", "can't be opened"),
        ] {
            std::fs::write(&file, content).unwrap();
            for (daemon, args) in
                [(Daemon::Publisher, named("store.url_file")), (Daemon::Agent, from_database())]
            {
                let error = format!("{:#}", check_config(daemon, &args).unwrap_err());
                assert!(error.contains(told) && !error.contains("hunter2"), "{error}");
            }
        }
    }

    #[test]
    fn a_listener_has_an_address_of_its_own_and_no_name() {
        let both = |http: &str, admin: &str| {
            ConfigArgs::default().and_set("http.listen", http).and_set("admin.listen", admin)
        };
        for args in [both("127.0.0.1:7000", "127.0.0.1:7000"), both("0.0.0.0:7000", "127.0.0.1:7000")] {
            for error in [args.publisher().unwrap_err(), args.agent().unwrap_err()] {
                let error = error.to_string();
                assert!(error.contains("http.listen") && error.contains("admin.listen"), "{error}");
            }
        }
        let error = both("localhost:7070", "127.0.0.1:0").agent().unwrap_err().to_string();
        assert!(error.contains("an IP address and a port, as in 127.0.0.1:7070"), "{error}");
        let error = ConfigArgs::default().and_set("htp.listen", "1").agent().unwrap_err().to_string();
        assert!(error.contains("did you mean `http.listen`?"), "{error}");
    }

    #[test]
    fn all_problems_of_a_configuration_are_reported_together() {
        let args = ConfigArgs::default()
            .and_set("region", "a.b")
            .and_set("lease.margin", "1s")
            .and_set("lease.bond", "30s");
        let error = args.agent().unwrap_err().to_string();
        for part in ["region", "lease.margin", "lease.bond", "lease.bound"] {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    }
}
