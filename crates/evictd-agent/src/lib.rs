//! One region of evictd: follows the live feed, renews the lease, answers verifications.
//!
//! An invalidation arrives on the [`bus`]. [`follow`] passes it to the core and performs the core's effects in R9's
//! order. A verification arrives over [`http`]. [`verify`] answers it from the [`cache`], or through [`loads`].
//!
//! * [`config`]: the configuration and its documented defaults.
//! * [`metrics`]: every metric of the agent.
//! * [`serving`]: the follower's state, which the hot path reads without a lock.
//! * [`cache`]: records by hash, in moka.
//! * [`policy`]: the answer without a lease and without an authority.
//! * [`verify`]: the hot path.
//! * [`loads`]: one load per missing record; [`origin`] and [`database`]: the sources of records.
//! * [`bus`]: the two NATS connections.
//! * [`follow`]: the task around [`evictd_core::follower`]; [`apply_reports`]: its queue of measurements.
//! * [`http`], [`status`]: the endpoints for clients and operators.
//!
//! This file is the composition root: it creates every part and starts the tasks.

// These macros panic when their stream can't be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod apply_reports;
mod bus;
mod cache;
pub mod config;
pub mod database;
#[cfg(test)]
mod fixture;
mod follow;
mod http;
mod loads;
pub mod metrics;
mod origin;
mod policy;
pub mod reload;
mod serving;
mod status;
mod verify;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::follower::Follower;
use evictd_core::ids::{Identity, InstanceId};
use evictd_core::roster::PartitionPolicy;
use evictd_ops::admin::{self, Admin};
use evictd_ops::http::{BindError, DRAIN_LIMIT, bind, serve};
use evictd_ops::metrics::{MetricsError, Registry};
use evictd_ops::readiness::{Condition, Readiness};
use evictd_ops::shutdown::Shutdown;
use evictd_ops::tasks::{TaskFailed, Tasks};
use evictd_ops::vm_clock::{VmClock, VmClockError};
use tokio_util::sync::CancellationToken;

use crate::bus::{AgentBus, ConnectError};
use crate::cache::RecordCache;
use crate::config::AgentConfig;
use crate::database::{Database, DatabaseReader};
use crate::follow::FollowContext;
use crate::loads::Loads;
use crate::metrics::AgentMetrics;
use crate::origin::{BusOrigin, Origin};
use crate::policy::Policies;
use crate::reload::AgentReload;
use crate::serving::ServingState;
use crate::status::{RecentChanges, StatusSources};
use crate::verify::Verifier;

/// The longest time from the end of the lame-duck time to the end of the process.
pub const STOP_LIMIT: Duration =
    DRAIN_LIMIT.saturating_add(bus::LEAVE_LIMIT).saturating_add(admin::DRAIN_LIMIT);

/// The reason that an agent can't start.
#[derive(Debug, thiserror::Error)]
pub enum AgentStartError {
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An unreachable server is not an error.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("cannot tell whether this machine is stopped (`lease.vm_clock`)")]
    VmClock(#[from] VmClockError),
    #[error("no random numbers for the instance id")]
    Random(#[from] getrandom::Error),
}

/// A running agent. To end it, cancel the token it was started with; dropping it ends it without a drain.
#[derive(Debug)]
pub struct RunningAgent {
    /// The address of the verify API.
    pub http: SocketAddr,
    /// The address of the admin server.
    pub admin: SocketAddr,
    pub identity: Identity,
    /// Ready once the agent is live.
    pub readiness: Readiness,
    tasks: Tasks,
    reload: AgentReload,
}

impl RunningAgent {
    /// Returns what changes its settings while it runs.
    pub fn reload(&self) -> AgentReload {
        self.reload.clone()
    }

    /// Waits until every task has ended, requests in flight included. Returns an error if a task exited by itself,
    /// which ends the others too.
    pub async fn ended(self) -> Result<(), TaskFailed> {
        self.tasks.ended().await
    }
}

/// Starts an agent, which runs until `shutdown` is cancelled. Port 0 in an address selects a free port. With
/// `database`, loads query that before the authority.
pub async fn start(
    config: AgentConfig,
    database: Option<Arc<dyn Database>>,
    shutdown: CancellationToken,
) -> Result<RunningAgent, AgentStartError> {
    let parts = AgentParts::new(config)?;
    let AgentParts { config, identity, registry, metrics, readiness, serving, cache, .. } = &parts;
    let vm_clock = config.vm_clock().map(VmClock::open).transpose()?.flatten();
    let http_listener = bind(config.http.listen).await?;
    let admin_listener = bind(config.admin.listen).await?;
    let http = http_listener.local_addr().unwrap_or(config.http.listen);
    let admin = admin_listener.local_addr().unwrap_or(config.admin.listen);

    let bus = bus::connect(config, identity, metrics, readiness).await?;
    let lease = parts.lease_condition();
    let reload = AgentReload {
        policies: parts.policies.clone(),
        lease: lease.clone(),
        clients: bus.clients(),
        metrics: metrics.clone(),
    };
    let AgentBus { feed, lookups, lookup_answers } = bus;
    let origin = BusOrigin::new(lookups, identity.instance, config.loads.timeout.into());
    let reader = database.map(|database| parts.reader(database));
    let verifier = parts.verifier(parts.loads(reader.clone(), Arc::new(origin.clone())));
    let status = parts.status_sources(vm_clock.is_some());
    let admin_pages = Admin {
        metrics: registry.clone(),
        readiness: readiness.clone(),
        status: Arc::new(move || status.report()),
    };
    let answered = readiness.condition_at_start("lookups", "a publisher's answer to a lookup");

    // Verifications end first. Until then the other tasks keep their answers up to date. The admin port ends last.
    let drained = CancellationToken::new();
    let shutdown = Shutdown::after(shutdown);
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn("readiness", readiness.lame_duck(shutdown.clone(), config.shutdown.delay.into()));
    let limits = config.http.limits(http::BODY_BYTES_MAX);
    let api = http::VerifyApi::new(verifier, config.http.access_log);
    let verify = serve(http_listener, api, limits, shutdown);
    // Ends the other tasks even if this one panics.
    let end_the_others = drained.clone().drop_guard();
    tasks.spawn("verify", async move {
        let _end_the_others = end_the_others;
        verify.await;
    });
    if let Some(vm_clock) = vm_clock {
        tasks.spawn("vm_clock", end_when_disrupted(vm_clock, serving.clone(), drained.clone()));
    }
    if let Some(reader) = reader {
        tasks.spawn("database", reader.retry_failures(drained.clone()));
    }
    tasks.spawn("first lookup", origin.clone().await_first_answer(answered, drained.clone()));
    tasks.spawn("lookups", origin.run(lookup_answers, metrics.clone(), drained.clone()));
    tasks.spawn("follow", parts.follow_context(lease).run(feed, drained.clone()));
    tasks.spawn("sweep", cache::evict_void_entries(cache.clone(), serving.clone(), drained.clone()));
    tasks.spawn("cache", cache::run_maintenance(cache.clone(), metrics.clone(), drained.clone()));
    tasks.spawn_last("admin", |end| serve(admin_listener, admin_pages, admin::limits(), end));
    let registry = registry.clone();
    tasks.spawn("metrics", async move { registry.run_upkeep(drained).await });

    tracing::info!(
        region = %identity.region, agent = %identity.agent, instance = %identity.instance, %http, %admin,
        "agent started"
    );
    Ok(RunningAgent { http, admin, identity: identity.clone(), readiness: readiness.clone(), tasks, reload })
}

/// The parts that several tasks share.
struct AgentParts {
    config: AgentConfig,
    identity: Identity,
    registry: Registry,
    metrics: Arc<AgentMetrics>,
    readiness: Readiness,
    serving: Arc<ServingState>,
    cache: Arc<RecordCache>,
    policies: Arc<Policies>,
    recent: RecentChanges,
}

impl AgentParts {
    /// A new instance with an empty cache (R11).
    fn new(config: AgentConfig) -> Result<Self, AgentStartError> {
        let requester = config.requester();
        let instance = InstanceId(getrandom::u64()?.max(1));
        let labels = [("region", config.region.clone()), ("agent", requester.agent.to_string())];
        let identity = Identity { region: requester.region, agent: requester.agent, instance };
        let registry = Registry::new(metrics::SPECS, &labels)?;
        let follower = Follower::new(config.follower(), getrandom::u64()?);
        Ok(Self {
            identity,
            metrics: Arc::new(AgentMetrics::new(&registry)),
            registry,
            readiness: Readiness::new(),
            serving: Arc::new(ServingState::new(follower, config.bound())),
            cache: Arc::new(RecordCache::new(&config.cache)),
            policies: Arc::new(Policies::new(&config.partition)),
            recent: RecentChanges::default(),
            config,
        })
    }

    fn reader(&self, database: Arc<dyn Database>) -> DatabaseReader {
        let warning = self.readiness.warning("database");
        DatabaseReader::new(database, self.config.postgres.timeout.into(), self.metrics.clone(), warning)
    }

    /// Loads query `reader` first, if there is one.
    fn loads(&self, reader: Option<DatabaseReader>, origin: Arc<dyn Origin>) -> Loads {
        let Self { config, serving, cache, metrics, .. } = self;
        Loads::new(&config.loads, reader, origin, serving.clone(), cache.clone(), metrics.clone())
    }

    fn verifier(&self, loads: Loads) -> Verifier {
        let Self { serving, cache, policies, metrics, .. } = self;
        Verifier::new(serving.clone(), cache.clone(), loads, policies.clone(), metrics.clone())
    }

    fn follow_context(&self, lease: Condition) -> FollowContext {
        FollowContext {
            identity: self.identity.clone(),
            bound: self.config.bound(),
            serving: self.serving.clone(),
            cache: self.cache.clone(),
            metrics: self.metrics.clone(),
            policies: self.policies.clone(),
            lease,
            feed: self.readiness.warning("feed"),
            history: self.readiness.warning("history"),
            recent: self.recent.clone(),
        }
    }

    fn status_sources(&self, vm_clock_watched: bool) -> StatusSources {
        StatusSources {
            identity: self.identity.clone(),
            bound: self.config.lease.bound,
            vm_clock_watched,
            serving: self.serving.clone(),
            cache: self.cache.clone(),
            policies: self.policies.clone(),
            recent: self.recent.clone(),
        }
    }

    /// Without a lease an agent denies, and must get no traffic. If policy lets it serve stale records, only the first
    /// proof is needed: from then on it has records to serve.
    fn lease_condition(&self) -> Condition {
        let (name, waiting_for) = ("lease", "the first proof from a publisher that nothing was missed");
        match self.policies.of_agent() {
            PartitionPolicy::Deny => self.readiness.condition(name, waiting_for),
            PartitionPolicy::ServeStale => self.readiness.condition_at_start(name, waiting_for),
        }
    }
}

/// Returns when the lease clock is disrupted, which ends the process with an error (R8). The cache becomes void first.
async fn end_when_disrupted(vm_clock: VmClock, serving: Arc<ServingState>, shutdown: CancellationToken) {
    if let Some(disruption) = shutdown.run_until_cancelled(vm_clock.disrupted()).await {
        serving.end();
        tracing::error!(%disruption, "lease clock disrupted; cache void, shutting down");
    }
}

#[cfg(test)]
mod tests;
