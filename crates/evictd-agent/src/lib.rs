//! One region of evictd: follows the live feed, keeps the lease, answers verifications.
//!
//! An invalidation comes in by [`bus`], [`follow`] hands it to the core and performs what the core
//! decides, in R9's order; a verification comes in by [`http`], [`verify`] answers it from the
//! [`cache`], and asks [`loads`] for what the cache doesn't have.
//!
//! * [`config`]: the configuration and its documented defaults.
//! * [`metrics`]: every metric of the agent.
//! * [`knowledge`]: what the follower knows, where the hot path can read it without a lock.
//! * [`cache`]: records by hash, in moka.
//! * [`verify`]: the hot path.
//! * [`loads`], [`origin`]: what the cache doesn't have, one question at a time.
//! * [`bus`]: subjects and payloads in and out, everything else counted and ignored.
//! * [`follow`]: the shell of [`evictd_core::follower`].
//! * [`http`], [`status`]: what clients and operators see.

mod bus;
mod cache;
pub mod config;
mod follow;
mod http;
mod knowledge;
mod loads;
pub mod metrics;
mod origin;
mod status;
mod verify;

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_core::follower::Follower;
use evictd_core::ids::{Identity, InstanceId};
use evictd_ops::admin::Admin;
use evictd_ops::bus::BusError;
use evictd_ops::http::{BindError, HttpLimits, bind, serve};
use evictd_ops::metrics::{MetricsError, Registry};
use evictd_ops::readiness::Readiness;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::config::AgentConfig;
use crate::knowledge::Knowledge;
use crate::loads::Loads;
use crate::metrics::Metrics;
use crate::origin::Origin;
use crate::verify::Verifier;

/// Why an agent can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address can't be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The connection's settings are unusable; an unreachable server is not an error.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The bus client gave up.
    #[error("the NATS client refused to {action}")]
    Subscribe {
        /// What was tried.
        action: &'static str,
        /// What the client said.
        #[source]
        source: async_nats::SubscribeError,
    },
    /// The metric declarations contradict each other.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The kernel gave no random numbers.
    #[error("no random numbers for the instance id")]
    Random(#[from] getrandom::Error),
}

/// A running agent. Dropping it stops nothing; cancel the token it was started with.
#[derive(Debug)]
pub struct Running {
    /// Where it verifies.
    pub http: SocketAddr,
    /// Where it is watched.
    pub admin: SocketAddr,
    /// This process.
    pub identity: Identity,
    /// Met once it is live.
    pub readiness: Readiness,
    tasks: JoinSet<()>,
}

impl Running {
    /// Waits until everything has ended, requests in flight included.
    pub async fn ended(mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task of the agent failed");
            }
        }
    }
}

/// Starts an agent; it runs until `shutdown` is cancelled. Addresses with port 0 get one.
pub async fn start(config: AgentConfig, shutdown: CancellationToken) -> Result<Running, StartError> {
    let identity = Identity {
        region: config.speaker().region,
        agent: config.speaker().agent,
        instance: InstanceId(getrandom::u64()?.max(1)),
    };
    let labels = [("region", config.region.clone()), ("agent", config.agent.clone())];
    let registry = Registry::new(metrics::SPECS, &labels)?;
    let metrics = Arc::new(Metrics::new(&registry));
    let readiness = Readiness::new();
    let http_listener = bind(config.http.listen).await?;
    let admin_listener = bind(config.admin.listen).await?;

    let follower = Follower::new(config.follower(), getrandom::u64()?);
    let knowledge = Arc::new(Knowledge::new(follower, config.bound()));
    let cache = Arc::new(Cache::new(&config.cache));
    let bus = bus::connect(&config, &identity, &metrics, &readiness).await?;
    let origin = Origin::new(bus.lookups(), config.loads.timeout.into());
    let loads = Loads::new(&config.loads, origin.clone(), knowledge.clone(), cache.clone(), metrics.clone());
    let verifier = Verifier::new(knowledge.clone(), cache.clone(), loads, metrics.clone());
    let recent = status::Recent::default();
    let follow = follow::Follow {
        identity: identity.clone(),
        bound: config.bound(),
        knowledge: knowledge.clone(),
        cache: cache.clone(),
        metrics: metrics.clone(),
        lease: readiness.condition("lease", "the first proof from a publisher that nothing was missed"),
        recent: recent.clone(),
    };

    let running_http = http_listener.local_addr().unwrap_or(config.http.listen);
    let running_admin = admin_listener.local_addr().unwrap_or(config.admin.listen);
    let limits = HttpLimits {
        connections_max: config.http.connections_max,
        body_bytes_max: http::BODY_BYTES_MAX,
        ..HttpLimits::default()
    };
    let admin = Admin {
        metrics: registry.clone(),
        readiness: readiness.clone(),
        status: status::status(&identity, &config, &knowledge, &cache, recent),
    };
    let mut tasks = JoinSet::new();
    let (feed, lookups) = bus.split();
    tasks.spawn(origin.run(lookups, metrics.clone(), shutdown.clone()));
    tasks.spawn(follow.run(feed, shutdown.clone()));
    tasks.spawn(serve(http_listener, http::Surface::new(verifier), limits, shutdown.clone()));
    tasks.spawn(serve(admin_listener, admin, HttpLimits::default(), shutdown.clone()));
    tasks.spawn(async move { registry.run_upkeep(shutdown).await });
    tracing::info!(
        region = %identity.region, agent = %identity.agent, instance = %identity.instance,
        http = %running_http, admin = %running_admin, "agent started"
    );
    Ok(Running { http: running_http, admin: running_admin, identity, readiness, tasks })
}
