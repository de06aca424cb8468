//! The agent's configuration. `deploy/agent.toml` documents every key and holds every default.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use evictd_core::floors::FloorLimits;
use evictd_core::follower::FollowerConfig;
use evictd_core::history::StoreId;
use evictd_core::lease::Bound;
use evictd_core::limits::NAME_BYTES_MAX;
use evictd_core::roster::PartitionPolicy;
use evictd_ops::admin::AdminConfig;
use evictd_ops::bus::BusConfig;
use evictd_ops::config::{ByteSize, HumanDuration, Validate, check_count};
use evictd_ops::connection_url::{ConnectionUrl, UrlError};
use evictd_ops::host::host_name;
use evictd_ops::http::HttpConfig;
use evictd_ops::logging::LogConfig;
use evictd_ops::shutdown::ShutdownConfig;
use evictd_wire::api::secret::Secret;
use evictd_wire::subject::{Requester, check_name};
use serde::Deserialize;

/// The documented default file; the program's own defaults.
pub const DEFAULTS: &str = include_str!("../../../deploy/agent.toml");

/// As in the default file. An agent that keeps it was probably not configured.
const DEFAULT_REGION: &str = "local";

/// A host's name as one subject token: each other character is replaced by `-`, of which the dots of a full name are the
/// usual ones.
fn subject_token(host: &str) -> String {
    let fits = |character: char| character.is_ascii_alphanumeric() || character == '-' || character == '_';
    host.chars().map(|character| if fits(character) { character } else { '-' }).take(NAME_BYTES_MAX).collect()
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    pub region: String,
    /// The host's name if empty.
    agent: String,
    pub http: HttpConfig,
    pub admin: AdminConfig,
    pub nats: BusConfig,
    pub home: HomeConfig,
    pub lease: LeaseConfig,
    pub partition: PartitionConfig,
    pub cache: CacheConfig,
    pub loads: LoadsConfig,
    pub postgres: PostgresConfig,
    pub shutdown: ShutdownConfig,
    pub log: LogConfig,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HomeConfig {
    /// The store to follow, 16 hexadecimal digits; any if empty.
    pub store_id: String,
}

impl HomeConfig {
    /// Parses the id; `None` if any store may be followed.
    fn store(&self) -> Result<Option<StoreId>, String> {
        let text = self.store_id.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        match u64::from_str_radix(text, 16) {
            Ok(id) if text.len() == 16 && id > 0 => Ok(Some(StoreId(id))),
            _ => Err(format!(
                "home.store_id: `{text}` isn't a home store's id, 16 hexadecimal digits; a publisher's /status shows \
                 its own as `homeStore`"
            )),
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseConfig {
    pub bound: HumanDuration,
    /// Part of the bound, reserved for clock rates and scheduling.
    pub margin: HumanDuration,
    /// How often the lease is renewed.
    pub probe_interval: HumanDuration,
    /// The silence after which a query is repeated.
    pub request_timeout: HumanDuration,
    /// The time in which a gap may close by itself.
    pub gap_patience: HumanDuration,
    /// The device that shows whether the machine was stopped; none if empty.
    pub vm_clock: String,
}

/// The policy for records without a lease, when the authority doesn't answer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionConfig {
    pub policy: PolicyName,
    /// By API id.
    pub apis: BTreeMap<String, PolicyName>,
}

/// A configured [`PartitionPolicy`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyName {
    Deny,
    ServeStale,
}

impl From<PolicyName> for PartitionPolicy {
    fn from(name: PolicyName) -> Self {
        match name {
            PolicyName::Deny => Self::Deny,
            PolicyName::ServeStale => Self::ServeStale,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheConfig {
    pub size: ByteSize,
    /// The size of the cache of "not found".
    pub not_found_entries: u64,
    pub not_found_ttl: HumanDuration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OriginName {
    /// Over the bus.
    Authority,
    /// The home database or a replica of it. The authority if that lags or fails.
    Postgres,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    pub url: Secret,
    pub url_file: PathBuf,
    pub connections: u32,
    /// The silence after which the authority is queried instead.
    pub timeout: HumanDuration,
}

impl PostgresConfig {
    fn is_set(&self) -> bool {
        !(self.url.expose().is_empty() && self.url_file.as_os_str().is_empty())
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadsConfig {
    pub origin: OriginName,
    pub concurrent_max: usize,
    /// The silence after which a load is repeated.
    pub timeout: HumanDuration,
}

impl AgentConfig {
    /// Returns the agent's subjects. The names were validated.
    pub fn requester(&self) -> Requester {
        Requester::new(&self.region, &self.name())
            .expect("`validate` rejects names that are no subject tokens")
    }

    /// Returns the agent's name. Two agents of one region must differ in it, and so do their hosts: a pod's host name is
    /// its own name.
    fn name(&self) -> Cow<'_, str> {
        if self.agent.is_empty() { subject_token(&host_name()).into() } else { self.agent.as_str().into() }
    }

    /// Whether the region still has the default's name, which may be in use for another one.
    pub fn is_region_default(&self) -> bool {
        self.region == DEFAULT_REGION
    }

    /// Returns the URL of the database, if one is configured. Reads [`PostgresConfig::url_file`].
    pub fn database(&self) -> Result<Option<ConnectionUrl>, UrlError> {
        ConnectionUrl::configured_postgres(&self.postgres.url, &self.postgres.url_file)
    }

    /// Returns the bound. Its margin was validated.
    pub fn bound(&self) -> Bound {
        Bound::new(self.lease.bound.into(), self.lease.margin.into())
            .expect("`validate` rejects margins out of proportion")
    }

    /// Returns the device that shows whether the machine was stopped, if one is configured.
    pub fn vm_clock(&self) -> Option<&Path> {
        Some(&*self.lease.vm_clock).filter(|path| !path.is_empty()).map(Path::new)
    }

    pub fn follower(&self) -> FollowerConfig {
        FollowerConfig {
            bound: self.bound(),
            probe_interval: self.lease.probe_interval.into(),
            request_timeout: self.lease.request_timeout.into(),
            gap_patience: self.lease.gap_patience.into(),
            floors: FloorLimits::default(),
            home_store: self.home.store().ok().flatten(),
        }
    }
}

impl Validate for AgentConfig {
    fn validate(&self, problems: &mut Vec<String>) {
        for (key, name) in [("region", self.region.as_str()), ("agent", &self.name())] {
            problems.extend(check_name(name).err().map(|error| format!("{key}: {error}")));
        }
        problems.extend(self.home.store().err());
        let duration = |value: HumanDuration| Duration::from(value);
        let lease = &self.lease;
        if let Err(error) = Bound::new(lease.bound.into(), lease.margin.into()) {
            problems.push(format!("lease.margin: {error} (bound {}, margin {})", lease.bound, lease.margin));
        } else if duration(lease.probe_interval) * 2 + duration(lease.margin) > duration(lease.bound) {
            problems.push(format!(
                "lease.probe_interval: {} leaves no second try within the bound; use at most half of bound - margin",
                lease.probe_interval
            ));
        } else if duration(lease.request_timeout) > duration(lease.bound) {
            problems
                .push(format!("lease.request_timeout: {} is longer than the bound", lease.request_timeout));
        }
        for (key, value) in [
            ("lease.probe_interval", lease.probe_interval),
            ("lease.request_timeout", lease.request_timeout),
            ("loads.timeout", self.loads.timeout),
            ("postgres.timeout", self.postgres.timeout),
        ] {
            if duration(value) < Duration::from_millis(10) {
                problems.push(format!("{key}: must be at least 10ms"));
            }
        }
        if duration(self.cache.not_found_ttl) > duration(lease.bound) {
            problems.push("cache.not_found_ttl: must not exceed lease.bound".to_owned());
        }
        let database = &self.postgres;
        match self.loads.origin {
            OriginName::Postgres if !database.is_set() => {
                problems.push("loads.origin: `postgres` needs postgres.url or postgres.url_file".to_owned());
            }
            OriginName::Authority if database.is_set() => {
                problems.push("postgres.url: is of no use unless loads.origin is `postgres`".to_owned());
            }
            _ => {}
        }
        if let Err(error) = ConnectionUrl::configured_postgres(&database.url, Path::new("")) {
            problems.push(format!("postgres.url: {error}"));
        }
        if !database.url.expose().is_empty() && !database.url_file.as_os_str().is_empty() {
            problems.push("postgres.url: excludes postgres.url_file; set one of them".to_owned());
        }
        if database.connections == 0 {
            problems.push("postgres.connections: must be above zero".to_owned());
        }
        check_count("loads.concurrent_max", self.loads.concurrent_max, problems);
        self.http.validate(problems);
        self.log.validate(problems);
        self.nats.validate(problems);
    }
}

#[cfg(test)]
mod tests;
