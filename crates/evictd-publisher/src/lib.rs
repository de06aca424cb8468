//! The home region of evictd: records changes, gives them positions, sends them, and proves how far the log reaches.
//!
//! A deletion arrives at the [`control`] API, which has the store write it together with its log row. The [`sequencer`]
//! gives the row its position and passes it on: to the [`live_feed`], and to the [`receipts`] of requests. The
//! [`authority`] answers the agents' probes, [`queries`] their replays and lookups. Agents announce what they have applied,
//! and receipts become final.
//!
//! * [`config`]: the configuration and its documented defaults.
//! * [`metrics`]: every metric of the publisher; [`store_failures`]: how failures of the store are logged.
//! * [`control`], [`auth`], [`rate_limit`]: the control API, in Unkey's form.
//! * [`opening`]: waits for the home store at the start.
//! * [`history`]: the store's history (R15, R16); [`rivals`]: other publishers on the bus; [`vouching`]: whether this one
//!   may vouch for its store.
//! * [`log_head`]: the end of the log; [`log_output`]: what the log has gained, on its way to feed and receipts.
//! * [`rounds`], [`wake`]: how parts request probe rounds and wake the sequencer; [`shared`]: handles that all share.
//! * [`confirmations`]: what agents have applied, on its way to [`receipts`].
//! * [`expiry`], [`retention`]: keys that expire, and rows that are old enough to go.
//! * [`bus`]: what is received and where it may be answered (R13).
//! * [`status`]: what operators see; [`shutdown`]: the order and the time limit of the end.
//!
//! This file makes all of them and starts their tasks.

// These macros panic when their stream can't be written.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod auth;
mod authority;
mod bus;
mod change_trials;
pub mod config;
mod confirmations;
mod control;
mod expiry;
mod history;
mod live_feed;
mod log_head;
mod log_output;
pub mod metrics;
mod opening;
mod queries;
mod rate_limit;
mod receipts;
pub mod reload;
mod retention;
mod rivals;
mod rounds;
mod sequencer;
mod shared;
mod shutdown;
mod status;
mod store_failures;
mod vouching;
mod wake;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use evictd_ops::admin::{self, Admin};
use evictd_ops::answer_log::AnswerLog;
use evictd_ops::bus::BusError;
use evictd_ops::connection_url::UrlError;
use evictd_ops::host::host_name;
use evictd_ops::http::{BindError, bind, reserve, serve};
use evictd_ops::logging::with_causes;
use evictd_ops::metrics::{MetricsError, Registry};
use evictd_ops::readiness::Readiness;
use evictd_ops::shutdown::Shutdown;
use evictd_ops::tasks::{TaskFailed, Tasks};
use evictd_store::{HomeStore, StoreError};
use evictd_wire::subject::MessageKind;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::authority::Authority;
use crate::change_trials::ChangeTrials;
use crate::config::PublisherConfig;
use crate::control::{ControlApi, ControlServer, StoreTurns, TrustedProxies};
use crate::expiry::Expiry;
use crate::live_feed::LiveFeed;
use crate::log_output::LogOutput;
use crate::metrics::PublisherMetrics;
use crate::opening::{OpenStore, open_store};
use crate::queries::{Lookups, Replays};
use crate::rate_limit::RateLimits;
use crate::receipts::ReceiptsTask;
use crate::reload::PublisherReload;
use crate::retention::Retention;
use crate::rivals::Rivals;
use crate::sequencer::Sequencer;
use crate::shared::Shared;
pub use crate::shutdown::STOP_LIMIT;
use crate::shutdown::ShutdownPhases;
use crate::status::Status;
use crate::vouching::Vouching;
use crate::wake::Wake;

/// How long a publisher that starts keeps clients waiting for its store, before it answers them with 503.
const FIRST_ATTEMPT_LIMIT: Duration = Duration::from_secs(1);

/// Why a publisher can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The connection's settings are unusable; an unreachable server is not an error.
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("cannot determine where the home store is")]
    Location(#[from] UrlError),
    #[error("cannot use the home store {place}")]
    Store {
        /// A path, or a URL without its password.
        place: String,
        #[source]
        source: StoreError,
    },
    #[error("the NATS client refused to subscribe")]
    Subscribe(#[from] async_nats::SubscribeError),
    #[error("the system gives no random numbers")]
    Random(#[from] getrandom::Error),
    /// The metric declarations contradict each other.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// A running publisher. To end it, cancel the token it was started with; dropping it ends it without a drain.
#[derive(Debug)]
pub struct RunningPublisher {
    /// The control API's address.
    pub http: SocketAddr,
    /// The address of the operator's port.
    pub admin: SocketAddr,
    /// Met once it can number rows and send them.
    pub readiness: Readiness,
    /// Whether any client can call the control API.
    pub has_root_keys: bool,
    tasks: Tasks,
    store: Arc<dyn HomeStore>,
    phases: ShutdownPhases,
    reload: PublisherReload,
}

impl RunningPublisher {
    /// Returns what changes its settings while it runs.
    pub fn reload(&self) -> PublisherReload {
        self.reload.clone()
    }

    /// Waits until all tasks have ended, requests in progress included, and closes the store; the admin port ends last.
    /// That takes at most 14 seconds from the end of the lame-duck time: ten for requests, three for the rest, and one for
    /// the admin port. An error names a task that ended unexpectedly.
    pub async fn ended(self) -> Result<(), TaskFailed> {
        let Self { tasks, store, phases, .. } = self;
        let close = async {
            if phases.in_time(store.close()).await.is_none() {
                tracing::warn!("shutdown timed out; home store closed without handover");
            }
        };
        tasks.ended_then(close).await
    }
}

/// Starts a publisher on the store that `open` opens; it runs until `shutdown` is cancelled, and closes the store at its
/// end. Addresses with port 0 get a free port.
///
/// Returns when the store is open. Until then, both ports answer: `/readyz` with what is missing, and the control API
/// with 503. Dropping the returned future ends them.
pub async fn start(
    open: impl AsyncFn() -> Result<Arc<dyn HomeStore>, StoreError>,
    config: PublisherConfig,
    shutdown: CancellationToken,
) -> Result<RunningPublisher, StartError> {
    let place = config.store.location()?.to_string();
    let registry = Registry::new(metrics::SPECS, &[])?;
    let readiness = Readiness::new();
    let metrics = &Arc::new(PublisherMetrics::new(&registry));
    let wake = Wake::default();
    let http = reserve(config.http.listen)?;
    let admin = bind(config.admin.listen).await?;
    let http_address = http.address;
    let admin_address = admin.local_addr().unwrap_or(config.admin.listen);

    // The connections to NATS, and what they receive.
    let connected = Arc::new(Notify::new());
    let on_connected = {
        let (wake, connected) = (wake.clone(), connected.clone());
        move || {
            connected.notify_one();
            wake.tick();
        }
    };
    let bus = bus::connect(&config.nats, metrics, &readiness, on_connected).await?;
    let lookup_bus = bus::connect_for_lookups(&config.nats, metrics, &readiness).await?;

    // What answers before the store is open.
    let (control, status) = (Arc::<OnceLock<ControlApi>>::default(), Arc::<OnceLock<Status>>::default());
    let (phases, shutdown) = (ShutdownPhases::new(), Shutdown::after(shutdown));
    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn("readiness", readiness.lame_duck(shutdown.clone(), config.shutdown.delay.into()));
    let server = ControlServer { api: control.clone(), metrics: metrics.clone() };
    let limits = config.http.limits(control::BODY_BYTES_MAX);
    let (end_of_api, end) = (phases.begin_at_drop(), shutdown.clone());
    let tried = CancellationToken::new();
    let first_attempt = tried.clone();
    let (listening, is_listening) = oneshot::channel();
    tasks.spawn("control API", async move {
        let _end_of_api = end_of_api;
        // As a rule the store opens at once. Until then connections are refused, so that clients try another publisher.
        let _ = timeout(FIRST_ATTEMPT_LIMIT, first_attempt.cancelled()).await;
        match http.listen() {
            Ok(listener) => {
                listening.send(()).ok();
                serve(listener, server, limits, end).await;
            }
            Err(error) => tracing::error!(error = with_causes(&error), "cannot serve the control API"),
        }
    });
    let admin_api = Admin {
        metrics: registry.clone(),
        readiness: readiness.clone(),
        status: {
            let status = status.clone();
            Arc::new(move || status.get().map_or_else(status::before_the_store_is_open, Status::to_json))
        },
    };
    tasks.spawn_last("admin", |end| serve(admin, admin_api, admin::limits(), end));

    let condition = readiness.condition("store", "the home store to open");
    let opened = open_store(open, &condition, metrics, &tried).await;
    let OpenStore { store, history, has_root_keys } =
        opened.map_err(|source| StartError::Store { place: place.clone(), source })?;

    let bound = Duration::from(config.receipts.bound);
    let (id, nonce) = (getrandom::u64()?.max(1), getrandom::u64()?.max(1));
    let vouching = Vouching::new(bound, !store.is_exclusive(), nonce);
    let shared = Shared::new(history, vouching, wake, metrics.clone(), &registry);
    let (serving, succeeding) = (watch::Sender::new(true), watch::Sender::new(true));
    let publishers = rivals::subscribe(&bus, id).await?;
    let probe_requests = bus.receive(MessageKind::Probe).await?;
    let replay_requests = bus.receive(MessageKind::Replay).await?;
    let announcements = bus.receive(MessageKind::Applied).await?;
    let lookup_requests = lookup_bus.receive(MessageKind::Lookup).await?;

    // The parts.
    let (receipts, membership, receipts_task) = ReceiptsTask::new(
        &config.receipts,
        store.clone(),
        shared.clone(),
        &registry,
        shutdown.closing.clone(),
    );
    let limits = Arc::new(RateLimits::new(&config.rate_limit));
    let reload = PublisherReload {
        limits: limits.clone(),
        receipts: receipts.downgrade(),
        buses: [bus.clone(), lookup_bus.clone()],
        metrics: metrics.clone(),
    };
    let feed = LiveFeed { bus: bus.clone(), shared: shared.clone() };
    let output = LogOutput { feed, receipts: receipts.clone(), shared: shared.clone() };
    let sequencer = Sequencer {
        config: config.sequencer.clone(),
        store: store.clone(),
        bus: bus.clone(),
        output: output.clone(),
        condition,
        triggers: readiness.condition("triggers", "the check of the home store's triggers"),
        files: readiness.warning("store_files"),
        shared: shared.clone(),
    };
    let authority = Authority {
        config: config.authority.clone(),
        store: store.clone(),
        bus: bus.clone(),
        output,
        membership: membership.clone(),
        serving: serving.clone(),
        succeeding: succeeding.clone(),
        condition: readiness.condition("rounds", "the first probe round; see the log if it fails"),
        shared: shared.clone(),
    };
    let replays = Arc::new(Replays {
        store: store.clone(),
        bus: bus.clone(),
        permits: Semaphore::new(config.authority.replays_max),
        waiting: Mutex::default(),
        shared: shared.clone(),
    });
    let lookups = Arc::new(Lookups {
        store: store.clone(),
        bus: lookup_bus,
        membership,
        permits: Arc::new(Semaphore::new(config.authority.lookups_max)),
        by_requester: Mutex::default(),
        per_requester_max: config.authority.lookups_max.div_ceil(2),
        shared: shared.clone(),
    });
    let rivals = Rivals {
        id,
        name: format!("{} ({})", host_name(), config.http.listen).into(),
        store: store.clone(),
        bus,
        condition: readiness.condition("history", "the answers of other publishers on this bus"),
        silent_rival: readiness.warning("rivals"),
        succeeding: succeeding.subscribe(),
        connected,
        shared: shared.clone(),
    };
    let expiry = Expiry {
        interval: config.sequencer.expiry_interval.into(),
        store: store.clone(),
        metrics: metrics.clone(),
        wake: shared.wake.clone(),
    };
    let retention = Retention { config: config.retention, store: store.clone(), metrics: metrics.clone() };
    let _ = status.set(Status { bound, receipts: receipts_task.snapshot(), shared: shared.clone() });
    let trials = ChangeTrials::new(readiness.condition("changes", "a change that succeeds"));
    let _ = control.set(ControlApi {
        store: store.clone(),
        receipts: receipts.clone(),
        limits,
        proxies: TrustedProxies::new(config.audit.trusted_proxies),
        turns: StoreTurns::new(store.concurrency()),
        trials: trials.clone(),
        wake: shared.wake.clone(),
        // As agents keep a margin.
        freshness: shared.freshness_guard(bound * 9 / 10),
        metrics: metrics.clone(),
        log: Arc::new(AnswerLog::new(config.http.access_log)),
    });
    tried.cancel();
    // An error shows that its task has ended, and with it the others.
    is_listening.await.ok();

    // The tasks. The control API ends first, and only then the tasks that number and send the changes that it has answered.
    let drained = || phases.drained();
    phases.spawn(&mut tasks, "rivals", rivals.run(publishers, drained()));
    phases.spawn(&mut tasks, "authority", authority.run(probe_requests, drained()));
    phases.spawn(&mut tasks, "replays", replays.run(replay_requests, serving.subscribe(), drained()));
    phases.spawn(&mut tasks, "lookups", lookups.run(lookup_requests, serving.subscribe(), drained()));
    phases.spawn(&mut tasks, "announcements", confirmations::receive(announcements, receipts, drained()));
    phases.spawn(&mut tasks, "receipts", receipts_task.run());
    phases.spawn(&mut tasks, "sequencer", sequencer.run(drained()));
    phases.spawn(&mut tasks, "changes", trials.run(store.clone(), drained()));
    phases.spawn(&mut tasks, "expiry", expiry.run(drained()));
    phases.spawn(&mut tasks, "retention", retention.run(drained()));
    let upkeep = drained();
    phases.spawn(&mut tasks, "metrics", async move { registry.run_upkeep(upkeep).await });

    tracing::info!(http = %http_address, admin = %admin_address, store = place, "publisher started");
    Ok(RunningPublisher {
        http: http_address,
        admin: admin_address,
        readiness,
        has_root_keys,
        tasks,
        store,
        phases,
        reload,
    })
}
