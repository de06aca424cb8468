//! The home region of evictd: records changes, numbers them, emits them, and vouches for the log.
//!
//! A deletion comes in by [`control`], which has the store write it together with its log row; the
//! [`sequencer`] gives the row its position and sends it on the live feed; the [`authority`] answers
//! the agents' probes, replays and lookups; [`receipts`] hears how far each agent is, and tells what became
//! of each change.
//!
//! * [`config`]: the configuration and its documented defaults.
//! * [`metrics`]: every metric of the publisher.
//! * [`control`], [`auth`], [`rate_limit`]: the control API, in Unkey's form.
//! * [`live_feed`]: what goes out to every agent.
//! * [`sequencer`]: positions and ticks.
//! * [`authority`]: probe rounds; replays and lookups in [`questions`].
//! * [`receipts`]: who has applied what, and who waits for it.
//! * [`expiry`]: ends that come by themselves.
//! * [`retention`]: what has been kept long enough goes.
//! * [`bus`]: subjects in and out, and where answers may go (R13).
//! * [`status`]: what operators see.

mod auth;
mod authority;
mod bus;
pub mod config;
mod control;
mod expiry;
mod live_feed;
pub mod metrics;
mod questions;
mod rate_limit;
mod receipts;
mod retention;
mod sequencer;
mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use evictd_ops::admin::Admin;
use evictd_ops::bus::BusError;
use evictd_ops::config::PostgresUrlError;
use evictd_ops::http::{BindError, HttpLimits, bind, serve};
use evictd_ops::invariants::Invariants;
use evictd_ops::metrics::{MetricsError, Registry};
use evictd_ops::readiness::Readiness;
use evictd_ops::tasks::{TaskFailed, Tasks};
use evictd_store::{HomeStore, StoreError};
use evictd_wire::subject::Kind;
use tokio_util::sync::CancellationToken;

use crate::authority::RoundWish;
use crate::config::PublisherConfig;
use crate::expiry::Expiry;
use crate::live_feed::LiveFeed;
use crate::metrics::Metrics;
use crate::rate_limit::RateLimits;
use crate::receipts::Receipts;
use crate::retention::Retention;
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
    /// The configuration doesn't say where the home store is.
    #[error("can't tell where the home store is")]
    Location(#[from] PostgresUrlError),
    /// The home store can't be used.
    #[error("can't use the home store {place}")]
    Store {
        /// Where it is, without its password.
        place: String,
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
    tasks: Tasks,
    store: Arc<dyn HomeStore>,
}

impl Running {
    /// Waits until everything has ended, requests in flight included, and closes the store. An error tells of a part that ended by itself, and took the others along.
    pub async fn ended(self) -> Result<(), TaskFailed> {
        let ended = self.tasks.ended().await;
        self.store.close().await;
        ended
    }
}

/// Starts a publisher on `store`; it runs until `shutdown` is cancelled, and closes the store at its end.
/// Addresses with port 0 get one.
pub async fn start(
    store: Arc<dyn HomeStore>,
    config: PublisherConfig,
    shutdown: CancellationToken,
) -> Result<Running, StartError> {
    let place = config.store.location()?.to_string();
    let store_error = |source| StartError::Store { place: place.clone(), source };
    store.check_triggers().await.map_err(store_error)?;
    let has_root_keys = store.has_root_keys().await.map_err(store_error)?;

    let registry = Registry::new(metrics::SPECS, &[])?;
    let metrics = Arc::new(Metrics::new(&registry));
    let readiness = Readiness::new();
    let http_listener = bind(config.http.listen).await?;
    let admin_listener = bind(config.admin.listen).await?;
    let rounds = RoundWish::default();
    let receipts = Arc::new(Receipts::new(
        &config.receipts,
        store.clone(),
        metrics.clone(),
        &registry,
        rounds.clone(),
        shutdown.clone(),
    ));
    receipts.begin().await.map_err(store_error)?;
    let wake = Wake::default();
    let bus = {
        let wake = wake.clone();
        // The head at once, without waiting for the second: agents may have missed something.
        bus::connect(&config.nats, &metrics, &readiness, move || wake.tick()).await?
    };
    let lookup_bus = bus::connect_for_lookups(&config.nats, &metrics, &readiness).await?;
    let feed = LiveFeed { bus: bus.clone(), receipts: receipts.clone(), metrics: metrics.clone() };

    let sequencer = Sequencer {
        config: config.sequencer.clone(),
        store: store.clone(),
        feed: feed.clone(),
        metrics: metrics.clone(),
        wake: wake.clone(),
        condition: readiness.condition("store", "the home store to number what was committed"),
        triggers: readiness.condition("triggers", "the check of the home store's triggers"),
        rounds: rounds.clone(),
        invariants: Invariants::new(&registry),
    };
    let expiry = Expiry {
        interval: config.sequencer.expiry_interval.into(),
        store: store.clone(),
        metrics: metrics.clone(),
        wake: wake.clone(),
    };
    let fence = authority::Fence::default();
    let running_http = http_listener.local_addr().unwrap_or(config.http.listen);
    let running_admin = admin_listener.local_addr().unwrap_or(config.admin.listen);
    let limits = config.http.limits(control::BODY_BYTES_MAX);
    let admin = Admin {
        metrics: registry.clone(),
        readiness: readiness.clone(),
        status: status::status(receipts.clone(), fence.clone()),
    };
    let limits_of_workspaces = RateLimits::new(&config.rate_limit);
    let vouched = authority::Vouched {
        fence: fence.clone(),
        rounds: rounds.clone(),
        // As agents keep a margin back.
        trust: Duration::from(config.receipts.bound) * 9 / 10,
    };
    let surface = control::Surface::new(
        store.clone(),
        receipts.clone(),
        limits_of_workspaces,
        wake,
        vouched,
        metrics.clone(),
    );
    let retention =
        Retention { config: config.retention.clone(), store: store.clone(), metrics: metrics.clone() };
    let authority = authority::Authority {
        config: config.authority.clone(),
        store: store.clone(),
        feed,
        metrics: metrics.clone(),
        fence: fence.clone(),
        rounds: rounds.clone(),
        serving: tokio::sync::watch::Sender::new(true),
        condition: readiness.condition("rounds", "the first look at probes"),
    };
    let questions = questions::Questions::new(
        &config.authority,
        store.clone(),
        receipts.clone(),
        fence,
        rounds,
        [bus.clone(), lookup_bus.clone()],
        metrics,
    );
    let probes = bus.intake(Kind::Probe).await?;
    let replays = bus.intake(Kind::Replay).await?;
    let announcements = bus.intake(Kind::Applied).await?;
    let lookups = lookup_bus.intake(Kind::Lookup).await?;

    // The API ends first, and only then what numbers and sends the changes that it still answers.
    let drained = CancellationToken::new();
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn("readiness", readiness.unready_at(shutdown.clone()));
    let api = serve(http_listener, surface, limits, shutdown);
    // However it ends, also by a panic.
    let the_rest = drained.clone().drop_guard();
    tasks.spawn("control API", async move {
        let _the_rest = the_rest;
        api.await;
    });
    let (replaying, looking_up) = (authority.serving(), authority.serving());
    tasks.spawn("authority", authority.run(probes, drained.clone()));
    tasks.spawn("replays", questions.clone().serve_replays(replays, replaying, drained.clone()));
    tasks.spawn("lookups", questions.serve_lookups(lookups, looking_up, drained.clone()));
    tasks.spawn("announcements", receipts.clone().hear(announcements, drained.clone()));
    tasks.spawn("bounds", receipts.clone().keep_time(drained.clone()));
    tasks.spawn("receipts", receipts.keep(drained.clone()));
    tasks.spawn("sequencer", sequencer.run(drained.clone()));
    tasks.spawn("expiry", expiry.run(drained.clone()));
    tasks.spawn("retention", retention.run(drained.clone()));
    tasks.spawn("admin", serve(admin_listener, admin, HttpLimits::default(), drained.clone()));
    tasks.spawn("metrics", async move { registry.run_upkeep(drained).await });
    tracing::info!(http = %running_http, admin = %running_admin, store = place, "publisher started");
    Ok(Running { http: running_http, admin: running_admin, readiness, has_root_keys, tasks, store })
}
