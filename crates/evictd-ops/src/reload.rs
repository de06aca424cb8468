//! Reads the configuration again at SIGHUP, and takes over what needs no restart.

use std::future::Future;

use evictd_core::labels;
use metrics::{Counter, Unit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{ConfigChanges, ConfigSnapshot, Loaded};
use crate::metrics::{ByLabel, MetricKind, MetricSpec};

/// [`crate::metric_specs!`] adds it to every daemon's list.
pub const SPEC: MetricSpec = MetricSpec {
    name: "evictd_config_reloads_total",
    kind: MetricKind::Counter,
    unit: Some(Unit::Count),
    labels: &["outcome"],
    help: "Times this process read its configuration again, at SIGHUP: applied (the log names what needs a restart), or rejected (nothing changed).",
};

labels! {
    /// What became of a reload.
    pub enum ReloadOutcome {
        Applied = "applied",
        Rejected = "rejected",
    }
}

/// A running daemon whose settings can change.
pub trait Reload {
    type Config;

    /// The keys that it takes over, and sections of such keys, which end with a dot. It also takes over the content of
    /// every file that its configuration names.
    const KEYS: &'static [&'static str];

    /// Takes over the values of [`Self::KEYS`], and the changed files.
    fn reload(&self, config: Self::Config, changes: &ConfigChanges) -> impl Future<Output = ()>;

    fn reloads(&self) -> &ByLabel<ReloadOutcome, Counter>;
}

/// Watches SIGHUP from now on: it no longer ends the process. `None` if that isn't possible; it is logged. Must be called
/// inside a tokio runtime.
pub fn hang_ups() -> Option<Signal> {
    let watched = signal(SignalKind::hangup());
    watched.inspect_err(|error| tracing::error!(%error, "cannot watch SIGHUP; it will end the process")).ok()
}

/// Reloads `daemon` at each SIGHUP, for ever. `running` is what it runs with; `load` reads the configuration again. If it
/// can't be used, nothing changes.
pub async fn at_hang_up<D: Reload, E: std::fmt::Display>(
    hang_ups: Option<Signal>,
    daemon: D,
    running: &toml::Table,
    load: impl Fn() -> Result<Loaded<D::Config>, E>,
) {
    let Some(mut hang_ups) = hang_ups else { return };
    let mut running = ConfigSnapshot::take(running);
    while hang_ups.recv().await.is_some() {
        let Loaded { config, effective } = match load() {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(%error, "configuration rejected; nothing changed");
                daemon.reloads().get(ReloadOutcome::Rejected).increment(1);
                continue;
            }
        };
        let newer = ConfigSnapshot::take(&effective);
        let changes = running.changes(&newer);
        daemon.reload(config, &changes).await;
        let (mut applied, needs_restart) = changes.split(D::KEYS);
        applied.extend(changes.files.iter().map(String::as_str));
        let (applied, needs_restart) = (applied.join(", "), needs_restart.join(", "));
        if needs_restart.is_empty() {
            tracing::info!(applied, "configuration reloaded");
        } else {
            tracing::warn!(applied, needs_restart, "configuration reloaded; a part needs a restart");
        }
        daemon.reloads().get(ReloadOutcome::Applied).increment(1);
        running.take_over(newer, D::KEYS);
    }
}
