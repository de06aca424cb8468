//! The flags that name a daemon's configuration, and loading it.

use std::path::PathBuf;

use anyhow::anyhow;
use clap::Args;
use evictd_agent::config::AgentConfig;
use evictd_ops::config::{Layers, Loaded, Validate};
use evictd_ops::logging::LogFormat;
use evictd_publisher::config::PublisherConfig;
use serde::Deserialize as _;
use serde::de::DeserializeOwned;

use crate::variables;

#[derive(Args, Debug, Default)]
pub(crate) struct ConfigArgs {
    /// The daemon's configuration file (TOML). Without it the documented defaults apply.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets one configuration key; overrides file and environment: `--set log.format=json`.
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

impl ConfigArgs {
    /// Adds a `--set`, which overrides those before it.
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
        let layers = self.layers(defaults);
        let mut problems = variables::problems(variables::of_process());
        match layers.load() {
            Ok(loaded) if problems.is_empty() => return Ok(loaded),
            Ok(_) => {}
            Err(error) => problems.extend(error.problems),
        }
        Err(anyhow!("the configuration cannot be used:\n{}", problems.join("\n")))
    }

    /// Returns the format of a daemon's log, even if the rest of its configuration can't be used.
    pub(crate) fn log_format(&self, defaults: &'static str) -> LogFormat {
        let format = self.layers(defaults).value("log.format");
        format.and_then(|format| LogFormat::deserialize(format).ok()).unwrap_or_default()
    }

    fn layers(&self, defaults: &'static str) -> Layers {
        let mut layers = Layers::new(defaults).env(|name| std::env::var(name).ok());
        if let Some(file) = &self.config {
            layers = layers.file(file);
        }
        for (key, value) in &self.set {
            layers = layers.set(key, value);
        }
        layers
    }

    /// Returns the flags that make another command open the same store, each after a space, quoted for a shell. A
    /// URL is left out, because it contains a password.
    pub(crate) fn store_flags(&self) -> String {
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

/// Quotes text that a shell would split or expand.
fn shell_word(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-=:,@%+".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn documented_defaults_are_valid() {
        ConfigArgs::default().publisher().unwrap();
        ConfigArgs::default().agent().unwrap();
    }

    /// Failure: a gateway sends a request on a connection that the daemon is about to close. Envoy waits longest.
    #[test]
    fn idle_timeout_is_above_that_of_every_usual_gateway() {
        let envoy = Duration::from_hours(1);
        assert!(*ConfigArgs::default().publisher().unwrap().config.http.idle_timeout > envoy);
        assert!(*ConfigArgs::default().agent().unwrap().config.http.idle_timeout > envoy);
        assert!(evictd_ops::admin::limits().idle_timeout > envoy);
    }

    #[test]
    fn log_format_is_read_beside_wrong_settings() {
        let format = |args: &ConfigArgs| args.log_format(evictd_agent::config::DEFAULTS);
        let wrong = ConfigArgs::default().and_set("lease.bound", "soon");
        assert_eq!(format(&wrong), LogFormat::Text);
        let wrong = wrong.and_set("log.format", "text").and_set("log.format", "json");
        assert!(wrong.agent().is_err());
        assert_eq!(format(&wrong), LogFormat::Json);
        assert_eq!(format(&wrong.and_set("log.format", "yaml")), LogFormat::Text);
    }

    #[test]
    fn store_flags_name_the_same_store() {
        let args = ConfigArgs { config: Some("/etc/evictd/publisher.toml".into()), set: Vec::new() }
            .and_set("store.path", "/srv/it's here/evictd.db")
            .and_set("log.filter", "debug");
        assert_eq!(
            args.store_flags(),
            r" --config /etc/evictd/publisher.toml --set 'store.path=/srv/it'\''s here/evictd.db'"
        );
        assert_eq!(ConfigArgs::default().store_flags(), "");
        let database = ConfigArgs::default().and_set("store.url", "postgres://evictd:hunter2@db/evictd");
        assert_eq!(database.store_flags(), " --set store.url=...");
    }

    #[test]
    fn listeners_need_separate_addresses() {
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
    fn all_problems_are_reported_together() {
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
