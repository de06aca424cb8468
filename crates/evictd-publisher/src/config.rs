//! The publisher's configuration. `deploy/publisher.toml` documents every key and holds every default.
//!
//! * [`StoreConfig`], in `store`: which home store. [`TrustedNetwork`], in `network`: which proxies.

mod network;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use evictd_core::ids::Region;
use evictd_ops::admin::AdminConfig;
use evictd_ops::bus::BusConfig;
use evictd_ops::config::{HumanDuration, UnitError, Validate, check_count};
use evictd_ops::http::HttpConfig;
use evictd_ops::logging::LogConfig;
use evictd_ops::shutdown::ShutdownConfig;
use evictd_wire::subject::check_name;
use serde::Deserialize;

pub use self::network::{NetworkError, TrustedNetwork};
pub use self::store::{StoreConfig, StoreLocation};

/// The documented default file; the program's own defaults.
pub const DEFAULTS: &str = include_str!("../../../deploy/publisher.toml");

/// The log is kept for at least so long: an agent that misses a row and can't get it has to flush.
const LOG_RETENTION_MIN: Duration = Duration::from_hours(1);

/// The log is kept for at least so many bounds.
const LOG_RETENTION_BOUNDS_MIN: u32 = 10;

/// The whole configuration.
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
    /// How many requests a workspace may make.
    pub rate_limit: RateLimitConfig,
    /// What audit records contain.
    pub audit: AuditConfig,
    /// How long old rows are kept.
    pub retention: RetentionConfig,
    /// How it ends.
    pub shutdown: ShutdownConfig,
    /// Logging.
    pub log: LogConfig,
}

/// Numbering and the live feed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequencerConfig {
    /// How often changes made outside the API are looked for.
    pub poll_interval: HumanDuration,
    /// How often the end of the log is sent.
    pub tick_interval: HumanDuration,
    /// How often expired keys are looked for.
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
    /// The longest bound that an agent may keep.
    pub bound: HumanDuration,
    /// Regions that should have agents.
    pub regions: Vec<String>,
}

impl ReceiptsConfig {
    /// Returns the regions by their names.
    pub(crate) fn regions(&self) -> Vec<Region> {
        self.regions.iter().map(|name| Region::new(name.as_str())).collect()
    }
}

/// How many requests a workspace may make of the control API.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitConfig {
    /// The limit of each workspace.
    pub requests_per_minute: RequestLimit,
    /// The limits of single workspaces, by id.
    pub workspaces: BTreeMap<String, RequestLimit>,
}

/// What audit records contain.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditConfig {
    /// The proxies whose `X-Forwarded-For` counts.
    pub trusted_proxies: Vec<TrustedNetwork>,
}

/// Requests in a minute: `unlimited` or a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub enum RequestLimit {
    /// Any number.
    Unlimited,
    /// At most so many; none with 0.
    PerMinute(u32),
}

/// A text that isn't a limit.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` isn't a limit; write a whole number of requests in a minute, or `unlimited`")]
pub struct LimitError(String);

/// How long old rows are kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionConfig {
    /// Rows of the log.
    pub log: HumanDuration,
    /// Receipts.
    pub receipts: HumanDuration,
    /// Audit records.
    pub audit: Keep,
}

/// For how long something is kept: a time or `forever`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub enum Keep {
    /// Never deleted.
    Forever,
    /// Deleted after this time.
    For(HumanDuration),
}

impl FromStr for RequestLimit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        match text.trim() {
            "unlimited" => Ok(Self::Unlimited),
            number => number.parse().map(Self::PerMinute).map_err(|_| LimitError(text.to_owned())),
        }
    }
}

impl TryFrom<String> for RequestLimit {
    type Error = LimitError;

    fn try_from(text: String) -> Result<Self, LimitError> {
        text.parse()
    }
}

impl TryFrom<String> for Keep {
    type Error = UnitError;

    fn try_from(text: String) -> Result<Self, UnitError> {
        if text.trim() == "forever" { Ok(Self::Forever) } else { text.parse().map(Self::For) }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forever => f.write_str("forever"),
            Self::For(time) => time.fmt(f),
        }
    }
}

impl PublisherConfig {
    fn check_retention(&self, problems: &mut Vec<String>) {
        let RetentionConfig { log, receipts, audit } = self.retention;
        let least = LOG_RETENTION_MIN.max(Duration::from(self.receipts.bound) * LOG_RETENTION_BOUNDS_MIN);
        if Duration::from(log) < least {
            problems.push(format!(
                "retention.log: must be at least {} (an hour, and {LOG_RETENTION_BOUNDS_MIN} times \
                 receipts.bound), not {log}",
                HumanDuration::from(least)
            ));
        }
        // A row without its receipt would look like a change whose receipt is still open.
        if receipts < log {
            problems
                .push(format!("retention.receipts: must not be below retention.log ({log}), not {receipts}"));
        }
        if matches!(audit, Keep::For(time) if time < log) {
            problems.push(format!("retention.audit: must not be below retention.log ({log}), not {audit}"));
        }
    }
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
        let mut named = BTreeSet::new();
        for region in &self.receipts.regions {
            if let Err(error) = check_name(region) {
                problems.push(format!("receipts.regions: {error}"));
            }
            if !named.insert(region) {
                problems.push(format!("receipts.regions: `{region}` is listed more than once"));
            }
        }
        self.check_retention(problems);
        self.http.validate(problems);
        self.store.validate(problems);
        self.log.validate(problems);
        self.nats.validate(problems);
    }
}

#[cfg(test)]
mod tests;
