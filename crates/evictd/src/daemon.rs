//! `evictd publisher`, `evictd agent`, `evictd check-config`.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};
use evictd_agent::config::AgentConfig;
use evictd_ops::config::{Layers, Loaded, Validate, print_effective};
use evictd_ops::{logging, shutdown};
use evictd_publisher::config::PublisherConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::de::DeserializeOwned;

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
    runtime()?.block_on(async {
        let shutdown = shutdown::on_signals();
        let store = home_store::Place::configured(config.store.clone())?.open_for_publisher().await?;
        let running = evictd_publisher::start(store, config, shutdown.clone()).await?;
        if !running.has_root_keys {
            tracing::warn!(
                "no root key yet, so nobody can call the control API; make one: evictd root-key create{}",
                args.naming_the_store()
            );
        }
        Ok(running.ended().await?)
    })
}

pub(crate) fn run_agent(args: &ConfigArgs) -> anyhow::Result<()> {
    let config = args.agent()?.config;
    logging::init(config.log.format, &config.log.filter);
    allow_many_connections();
    runtime()?.block_on(async {
        let database = replica::configured(&config)?;
        let running = evictd_agent::start(config, database, shutdown::on_signals()).await?;
        Ok(running.ended().await?)
    })
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

pub(crate) fn check_config(daemon: Daemon, args: &ConfigArgs) -> anyhow::Result<()> {
    let effective = match daemon {
        Daemon::Publisher => args.publisher()?.effective,
        Daemon::Agent => args.agent()?.effective,
    };
    print_line(print_effective(&effective).trim_end());
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
