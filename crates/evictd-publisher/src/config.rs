//! The publisher's configuration. `deploy/publisher.toml` documents every key and holds every default.

use std::path::PathBuf;
use std::time::Duration;

use evictd_ops::admin::AdminConfig;
use evictd_ops::bus::BusConfig;
use evictd_ops::config::{HumanDuration, Validate, check_count};
use evictd_ops::http::HttpConfig;
use evictd_ops::logging::LogConfig;
use evictd_wire::subject::check_name;
use serde::Deserialize;

/// The documented default file; the program's own defaults.
pub const DEFAULTS: &str = include_str!("../../../deploy/publisher.toml");

/// All of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublisherConfig {
    /// The control API.
    pub http: HttpConfig,
    /// The operator's port.
    pub admin: AdminConfig,
    /// The home store.
    pub store: StoreConfig,
    /// The bus.
    pub nats: BusConfig,
    /// Numbering and the live feed.
    pub sequencer: SequencerConfig,
    /// Answers to agents.
    pub authority: AuthorityConfig,
    /// Receipts.
    pub receipts: ReceiptsConfig,
    /// Logging.
    pub log: LogConfig,
}

/// The home store.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// The SQLite file.
    pub path: PathBuf,
}

/// Numbering and the live feed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequencerConfig {
    /// How often changes made past the API are looked for.
    pub poll_interval: HumanDuration,
    /// How often the feed tells the head.
    pub tick_interval: HumanDuration,
    /// How often expiries that have come are looked for.
    pub expiry_interval: HumanDuration,
}

/// Answers to agents.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthorityConfig {
    /// Shortest time between rounds.
    pub round_spacing: HumanDuration,
    /// Longest time a round may take before this publisher falls silent (R14).
    pub round_patience: HumanDuration,
    /// Probes that may wait.
    pub probes_waiting_max: usize,
    /// Lookups at once.
    pub lookups_max: usize,
    /// Replays at once.
    pub replays_max: usize,
}

/// Receipts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptsConfig {
    /// The longest bound of any agent.
    pub bound: HumanDuration,
    /// Regions that should have agents.
    pub regions: Vec<String>,
}

impl Validate for PublisherConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        for (key, value) in [
            ("sequencer.poll_interval", self.sequencer.poll_interval),
            ("sequencer.tick_interval", self.sequencer.tick_interval),
            ("sequencer.expiry_interval", self.sequencer.expiry_interval),
            ("authority.round_spacing", self.authority.round_spacing),
            ("authority.round_patience", self.authority.round_patience),
            ("receipts.bound", self.receipts.bound),
        ] {
            if Duration::from(value).is_zero() {
                problems.push(format!("{key}: must be above zero"));
            }
        }
        for (key, value) in [
            ("authority.probes_waiting_max", self.authority.probes_waiting_max),
            ("authority.lookups_max", self.authority.lookups_max),
            ("authority.replays_max", self.authority.replays_max),
        ] {
            check_count(key, value, problems);
        }
        for region in &self.receipts.regions {
            if let Err(error) = check_name(region) {
                problems.push(format!("receipts.regions: {error}"));
            }
        }
        self.http.validate(problems);
        self.log.validate(problems);
        self.nats.validate(problems);
    }
}

#[cfg(test)]
mod tests;
