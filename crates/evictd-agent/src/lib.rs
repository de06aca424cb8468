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
//! * [`policy`]: what is answered when neither the lease nor the authority vouches for an entry.
//! * [`verify`]: the hot path.
//! * [`loads`], [`origin`], [`database`]: what the cache doesn't have, one question at a time.
//! * [`bus`]: subjects and payloads in and out, everything else counted and ignored.
//! * [`follow`]: the shell of [`evictd_core::follower`]; [`apply_reports`]: what it tells of each change.
//! * [`http`], [`status`]: what clients and operators see.
//! * [`parts`]: how all of them are made.

mod apply_reports;
mod bus;
mod cache;
pub mod config;
pub mod database;
#[cfg(test)]
mod fixture;
mod follow;
mod http;
mod knowledge;
mod loads;
pub mod metrics;
mod origin;
mod parts;
mod policy;
mod status;
mod verify;

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_core::ids::Identity;
use evictd_ops::bus::BusError;
use evictd_ops::http::{BindError, HttpLimits, bind, serve};
use evictd_ops::metrics::MetricsError;
use evictd_ops::readiness::Readiness;
use evictd_ops::tasks::{TaskFailed, Tasks};
use evictd_ops::vm_clock::{VmClock, VmClockError};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::bus::Bus;
use crate::config::AgentConfig;
use crate::database::Database;
use crate::knowledge::Knowledge;
use crate::origin::Authority;
use crate::parts::Common;

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
    /// The machine's clock device can't be watched.
    #[error("can't tell whether this machine is stopped (`lease.vm_clock`)")]
    VmClock(#[from] VmClockError),
    /// The kernel gave no random numbers.
    #[error("no random numbers for the instance id")]
    Random(#[from] getrandom::Error),
}

/// A running agent. To end it, cancel the token it was started with; dropping it ends it without a drain.
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
    tasks: Tasks,
}

impl Running {
    /// Waits until everything has ended, requests in flight included. An error tells of a part that ended
    /// by itself, and took the others along.
    pub async fn ended(self) -> Result<(), TaskFailed> {
        self.tasks.ended().await
    }
}

/// Starts an agent; it runs until `shutdown` is cancelled. Addresses with port 0 get one. `database` is what
/// `loads.origin` asks for, if that isn't the authority.
pub async fn start(
    config: AgentConfig,
    database: Option<Arc<dyn Database>>,
    shutdown: CancellationToken,
) -> Result<Running, StartError> {
    let common = Common::new(config)?;
    let Common { config, identity, metrics, readiness, .. } = &common;
    let vm_clock = config.vm_clock().map(VmClock::open).transpose()?.flatten();
    let http_listener = bind(config.http.listen).await?;
    let admin_listener = bind(config.admin.listen).await?;
    let bus = bus::connect(config, identity, metrics, readiness).await?;
    let origin = Authority::new(bus.lookups(), identity.instance, config.loads.timeout.into());

    let http = http_listener.local_addr().unwrap_or(config.http.listen);
    let admin = admin_listener.local_addr().unwrap_or(config.admin.listen);
    let (identity, readiness) = (identity.clone(), readiness.clone());
    let parts = Parts { http_listener, admin_listener, vm_clock, bus, origin, database };
    let tasks = parts.spawn(common, shutdown);
    tracing::info!(
        region = %identity.region, agent = %identity.agent, instance = %identity.instance, %http, %admin,
        "agent started"
    );
    Ok(Running { http, admin, identity, readiness, tasks })
}

/// What connects an agent with the world.
struct Parts {
    http_listener: TcpListener,
    admin_listener: TcpListener,
    vm_clock: Option<VmClock>,
    bus: Bus,
    origin: Authority,
    database: Option<Arc<dyn Database>>,
}

impl Parts {
    /// Starts the tasks. Verifications end first: until then they are answered from what is still kept up to date.
    fn spawn(self, common: Common, shutdown: CancellationToken) -> Tasks {
        let Self { http_listener, admin_listener, vm_clock, bus, origin, database } = self;
        let replica = database.map(|database| common.replica(database));
        let verifier = common.verifier(replica.clone(), &origin);
        let follow = common.follow();
        let admin = common.admin(vm_clock.is_some());
        let answered = common.readiness.condition_at_start("lookups", "a publisher's answer to a lookup");
        let (feed, answers) = bus.split();
        let Common { config, registry, metrics, readiness, knowledge, cache, .. } = common;

        let drained = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("readiness", readiness.unready_at(shutdown.clone()));
        let limits = config.http.limits(http::BODY_BYTES_MAX);
        let verify = serve(http_listener, http::Surface::new(verifier), limits, shutdown);
        // However it ends, also by a panic.
        let the_rest = drained.clone().drop_guard();
        tasks.spawn("verify", async move {
            let _the_rest = the_rest;
            verify.await;
        });
        if let Some(vm_clock) = vm_clock {
            tasks.spawn("vm_clock", end_when_disrupted(vm_clock, knowledge, drained.clone()));
        }
        if let Some(replica) = replica {
            tasks.spawn("database", replica.keep_trying(drained.clone()));
        }
        tasks.spawn("first lookup", origin.clone().try_out(answered, drained.clone()));
        tasks.spawn("lookups", origin.run(answers, metrics.clone(), drained.clone()));
        tasks.spawn("follow", follow.run(feed, drained.clone()));
        tasks.spawn("cache", cache::keep_house(cache, metrics, drained.clone()));
        tasks.spawn("admin", serve(admin_listener, admin, HttpLimits::default(), drained.clone()));
        tasks.spawn("metrics", async move { registry.run_upkeep(drained).await });
        tasks
    }
}

/// Ends by itself, and so ends the process with an error, when the lease clock can't be trusted any more (R8).
/// First of all nothing that is known counts any longer.
async fn end_when_disrupted(vm_clock: VmClock, knowledge: Arc<Knowledge>, shutdown: CancellationToken) {
    if let Some(disruption) = shutdown.run_until_cancelled(vm_clock.disrupted()).await {
        knowledge.end();
        tracing::error!(
            "{disruption}: its clock doesn't tell how old the cache is, so everything cached is void and this process ends"
        );
    }
}

#[cfg(test)]
mod tests;
