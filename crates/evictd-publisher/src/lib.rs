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
//! * [`history`]: which store this is, and which pasts it knows (R15, R16).
//! * [`rivals`]: which other publishers are on the bus; [`vouching`]: whether this one may vouch.
//! * [`live_feed`]: what goes out to every agent.
//! * [`sequencer`]: positions and ticks.
//! * [`authority`], [`rounds`]: probe rounds; replays and lookups in [`questions`].
//! * [`receipts`]: who has applied what, and who waits for it.
//! * [`expiry`]: ends that come by themselves.
//! * [`retention`]: what has been kept long enough goes.
//! * [`bus`]: subjects in and out, and where answers may go (R13).
//! * [`store_failures`]: how often the home store fails, and what the log tells of it.
//! * [`status`]: what operators see.
//! * [`parts`]: how all of them are made; [`end`]: how they end, and how long that takes.

mod auth;
mod authority;
mod bus;
pub mod config;
mod control;
mod end;
mod expiry;
mod history;
mod live_feed;
pub mod metrics;
mod parts;
mod questions;
mod rate_limit;
mod receipts;
mod retention;
mod rivals;
mod rounds;
mod sequencer;
mod status;
mod store_failures;
mod vouching;

use std::net::SocketAddr;
use std::sync::Arc;

use evictd_ops::bus::BusError;
use evictd_ops::config::PostgresUrlError;
use evictd_ops::http::{BindError, HttpLimits, serve};
use evictd_ops::metrics::MetricsError;
use evictd_ops::readiness::Readiness;
use evictd_ops::tasks::{TaskFailed, Tasks};
use evictd_store::{HomeStore, StoreError};
use tokio_util::sync::CancellationToken;

use crate::config::PublisherConfig;
use crate::end::End;
use crate::history::HomeHistory;
use crate::parts::{Buses, Common, Intakes, Listeners};

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
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random(#[from] getrandom::Error),
    /// The metric declarations contradict each other.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
}

/// A running publisher. To end it, cancel the token it was started with; dropping it ends it without a drain.
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
    end: End,
}

impl Running {
    /// Waits until everything has ended, requests in flight included, and closes the store. That takes 13 seconds at
    /// most from the moment when the publisher is told to end: ten for requests, and three for all the rest. An error
    /// tells of a part that ended by itself, and took the others along.
    pub async fn ended(self) -> Result<(), TaskFailed> {
        let ended = self.tasks.ended().await;
        if self.end.in_time(self.store.close()).await.is_none() {
            tracing::warn!("the home store was let go of without a word, because the end took too long");
        }
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

    let history = HomeHistory::read(store.clone()).await.map_err(store_error)?;
    let common = Common::new(store.clone(), history, config, shutdown.clone())?;
    let listeners = Listeners::bind(&common.config).await?;
    common.receipts.begin().await.map_err(store_error)?;
    let buses = Buses::connect(&common).await?;
    let intakes = buses.intakes(&common).await?;

    let (http, admin) = (listeners.http_address, listeners.admin_address);
    let readiness = common.readiness.clone();
    let end = End::new();
    let tasks = spawn(&common, listeners, &buses, intakes, &end, shutdown);
    tracing::info!(%http, %admin, store = place, "publisher started");
    Ok(Running { http, admin, readiness, has_root_keys, tasks, store, end })
}

/// Starts the tasks. The API ends first, and only then what numbers and sends the changes that it still answers.
fn spawn(
    common: &Common,
    listeners: Listeners,
    buses: &Buses,
    intakes: Intakes,
    end: &End,
    shutdown: CancellationToken,
) -> Tasks {
    let sequencer = common.sequencer(buses);
    let authority = common.authority(buses);
    let questions = common.questions(buses);
    let Common { config, registry, readiness, receipts, .. } = common;
    let drained = || end.drained();

    let mut tasks = Tasks::new(shutdown.clone());
    tasks.spawn("readiness", readiness.unready_at(shutdown.clone()));
    let limits = config.http.limits(control::BODY_BYTES_MAX);
    let api = serve(listeners.http, common.surface(), limits, shutdown);
    let the_rest = end.begins_with();
    tasks.spawn("control API", async move {
        let _the_rest = the_rest;
        api.await;
    });

    let rivals = common.rivals(buses, &authority);
    end.spawn(&mut tasks, "rivals", rivals.run(intakes.publishers, drained()));
    let (replays, replaying) = (questions.clone(), authority.serving());
    let (lookups, looking_up) = (questions, authority.serving());
    end.spawn(&mut tasks, "authority", authority.run(intakes.probes, drained()));
    end.spawn(&mut tasks, "replays", replays.serve_replays(intakes.replays, replaying, drained()));
    end.spawn(&mut tasks, "lookups", lookups.serve_lookups(intakes.lookups, looking_up, drained()));
    end.spawn(&mut tasks, "announcements", receipts.clone().hear(intakes.announcements, drained()));
    end.spawn(&mut tasks, "bounds", receipts.clone().keep_time(drained()));
    end.spawn(&mut tasks, "receipts", receipts.clone().keep(drained()));
    end.spawn(&mut tasks, "sequencer", sequencer.run(drained()));
    end.spawn(&mut tasks, "expiry", common.expiry().run(drained()));
    end.spawn(&mut tasks, "retention", common.retention().run(drained()));
    let admin = serve(listeners.admin, common.admin(), HttpLimits::default(), drained());
    end.spawn(&mut tasks, "admin", admin);
    let (registry, drained) = (registry.clone(), drained());
    end.spawn(&mut tasks, "metrics", async move { registry.run_upkeep(drained).await });
    tasks
}
