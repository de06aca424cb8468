//! The home region of evictd: records changes, numbers them, emits them, and vouches for the log.
//!
//! A deletion comes in by [`control`], which has the store write it together with its log row; the
//! [`sequencer`] gives the row its position and sends it on the live feed; the [`authority`] answers
//! the agents' probes, replays and lookups; [`confirmations`] hears how far each agent is.
//!
//! * [`config`]: the configuration and its documented defaults.
//! * [`metrics`]: every metric of the publisher.
//! * [`control`], [`auth`]: the control API, in Unkey's form.
//! * [`sequencer`]: positions, ticks, ends that come by themselves.
//! * [`authority`]: probe rounds; replays and lookups in [`questions`].
//! * [`confirmations`]: who has applied what.
//! * [`bus`]: subjects in and out, and where answers may go (R13).
//! * [`status`]: what operators see.

mod auth;
mod authority;
mod bus;
pub mod config;
mod confirmations;
mod control;
pub mod metrics;
mod questions;
mod sequencer;
mod status;

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_ops::admin::Admin;
use evictd_ops::bus::BusError;
use evictd_ops::http::{BindError, HttpLimits, bind, serve};
use evictd_ops::metrics::{MetricsError, Registry};
use evictd_ops::readiness::Readiness;
use evictd_store::sqlite::SqliteStore;
use evictd_store::{HomeStore, StoreError};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::PublisherConfig;
use crate::confirmations::Confirmations;
use crate::metrics::Metrics;
use crate::sequencer::{Sequencer, Wake};

/// Why a publisher can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address can't be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The connection's settings are unusable; an unreachable server is not an error.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The home store can't be used.
    #[error("can't use the home store {path}")]
    Store {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The bus client gave up.
    #[error("the NATS client refused to subscribe")]
    Subscribe(#[from] async_nats::SubscribeError),
    /// The metric declarations contradict each other.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// A running publisher. Dropping it stops nothing; cancel the token it was started with.
#[derive(Debug)]
pub struct Running {
    /// Where the control API is.
    pub http: SocketAddr,
    /// Where it is watched.
    pub admin: SocketAddr,
    /// Met once it can number and emit.
    pub readiness: Readiness,
    /// Whether anybody can call the control API.
    pub has_root_keys: bool,
    tasks: JoinSet<()>,
    store: Arc<SqliteStore>,
}

impl Running {
    /// Waits until everything has ended, requests in flight included, and closes the store.
    pub async fn ended(mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a task of the publisher failed");
            }
        }
        self.store.close().await;
    }
}

/// Starts a publisher; it runs until `shutdown` is cancelled. Addresses with port 0 get one.
pub async fn start(config: PublisherConfig, shutdown: CancellationToken) -> Result<Running, StartError> {
    let store_error = |source| StartError::Store { path: config.store.path.display().to_string(), source };
    let sqlite = Arc::new(SqliteStore::open(&config.store.path).await.map_err(store_error)?);
    let store: Arc<dyn HomeStore> = sqlite.clone();
    store.check_triggers().await.map_err(store_error)?;
    let has_root_keys = !store.root_keys().await.map_err(store_error)?.is_empty();

    let registry = Registry::new(metrics::SPECS, &[])?;
    let metrics = Arc::new(Metrics::new(&registry));
    let readiness = Readiness::new();
    let http_listener = bind(config.http.listen).await?;
    let admin_listener = bind(config.admin.listen).await?;
    let confirmations = Arc::new(Confirmations::new(config.receipts.bound.into(), registry.clone()));
    let wake = Wake::default();
    let bus = bus::connect(&config.nats, &metrics, &readiness, wake.clone()).await?;

    let sequencer = Sequencer {
        config: config.sequencer.clone(),
        store: store.clone(),
        feed: bus.live_feed(),
        confirmations: confirmations.clone(),
        metrics: metrics.clone(),
        wake: wake.clone(),
        condition: readiness.condition("store", "the home store to number what was committed"),
    };
    let fence = authority::Fence::default();
    let running_http = http_listener.local_addr().unwrap_or(config.http.listen);
    let running_admin = admin_listener.local_addr().unwrap_or(config.admin.listen);
    let limits = HttpLimits { connections_max: config.http.connections_max, ..HttpLimits::default() };
    let admin = Admin {
        metrics: registry.clone(),
        readiness: readiness.clone(),
        status: status::status(store.clone(), confirmations.clone(), fence.clone(), shutdown.clone()),
    };
    let surface = control::Surface::new(store.clone(), wake, metrics.clone());

    let mut tasks = JoinSet::new();
    let intakes = bus.intakes().await?;
    let authority = authority::Authority {
        config: config.authority.clone(),
        store: store.clone(),
        feed: bus.live_feed(),
        confirmations: confirmations.clone(),
        metrics: metrics.clone(),
        fence: fence.clone(),
    };
    let questions = questions::Questions::new(&config.authority, store, fence.clone(), bus, metrics.clone());
    tasks.spawn(authority.run(intakes.probes, intakes.probes_any, shutdown.clone()));
    tasks.spawn(questions.clone().serve_replays(intakes.replays, shutdown.clone()));
    tasks.spawn(questions.serve_lookups(intakes.lookups, shutdown.clone()));
    tasks.spawn(confirmations::hear(confirmations, intakes.applied, metrics, shutdown.clone()));
    tasks.spawn(sequencer.run(shutdown.clone()));
    tasks.spawn(serve(http_listener, surface, limits, shutdown.clone()));
    tasks.spawn(serve(admin_listener, admin, HttpLimits::default(), shutdown.clone()));
    tasks.spawn(async move { registry.run_upkeep(shutdown).await });
    tracing::info!(http = %running_http, admin = %running_admin, store = %config.store.path.display(), "publisher started");
    Ok(Running { http: running_http, admin: running_admin, readiness, has_root_keys, tasks, store: sqlite })
}
