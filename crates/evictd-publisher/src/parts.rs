//! The parts of a publisher, before they run: what they share, and how each is made of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use evictd_ops::admin::Admin;
use evictd_ops::host::host_name;
use evictd_ops::http::{BindError, bind};
use evictd_ops::invariants::Invariants;
use evictd_ops::metrics::Registry;
use evictd_ops::readiness::Readiness;
use evictd_store::HomeStore;
use evictd_wire::subject::Kind;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::authority::{Authority, Complaints};
use crate::bus::{self, Bus, Intake, Publishers};
use crate::config::PublisherConfig;
use crate::control::Surface;
use crate::expiry::Expiry;
use crate::history::HomeHistory;
use crate::live_feed::LiveFeed;
use crate::metrics::{self, Metrics};
use crate::questions::Questions;
use crate::rate_limit::RateLimits;
use crate::receipts::Receipts;
use crate::retention::Retention;
use crate::rivals::{self, Rivals};
use crate::rounds::{Fence, RoundWish, Vouched};
use crate::sequencer::{Sequencer, Wake};
use crate::vouching::Vouching;
use crate::{StartError, status};

/// What the parts share.
pub(crate) struct Common {
    pub(crate) config: PublisherConfig,
    pub(crate) store: Arc<dyn HomeStore>,
    pub(crate) registry: Registry,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) readiness: Readiness,
    pub(crate) receipts: Arc<Receipts>,
    rounds: RoundWish,
    wake: Wake,
    fence: Fence,
    history: Arc<HomeHistory>,
    pub(crate) vouching: Vouching,
    /// This publisher among others.
    id: u64,
    /// Told at each connection to NATS.
    connected: Arc<Notify>,
}

impl Common {
    /// Who waits for a receipt is answered when `draining` is cancelled.
    pub(crate) fn new(
        store: Arc<dyn HomeStore>,
        history: HomeHistory,
        config: PublisherConfig,
        draining: CancellationToken,
    ) -> Result<Self, StartError> {
        let registry = Registry::new(metrics::SPECS, &[])?;
        let metrics = Arc::new(Metrics::new(&registry));
        let rounds = RoundWish::default();
        let history = Arc::new(history);
        let id = draw()?;
        let vouching = Vouching::new(config.receipts.bound.into(), !store.is_exclusive(), draw()?);
        let receipts = Arc::new(Receipts::new(
            &config.receipts,
            store.clone(),
            metrics.clone(),
            &registry,
            rounds.clone(),
            (history.clone(), vouching.clone()),
            draining,
        ));
        Ok(Self {
            config,
            store,
            registry,
            metrics,
            readiness: Readiness::new(),
            receipts,
            rounds,
            wake: Wake::default(),
            fence: Fence::default(),
            history,
            vouching,
            id,
            connected: Arc::default(),
        })
    }

    pub(crate) fn sequencer(&self, buses: &Buses) -> Sequencer {
        Sequencer {
            config: self.config.sequencer.clone(),
            store: self.store.clone(),
            feed: self.feed(buses),
            metrics: self.metrics.clone(),
            wake: self.wake.clone(),
            condition: self.readiness.condition("store", "the home store to number what was committed"),
            triggers: self.readiness.condition("triggers", "the check of the home store's triggers"),
            rounds: self.rounds.clone(),
            invariants: Invariants::new(&self.registry),
        }
    }

    pub(crate) fn authority(&self, buses: &Buses) -> Authority {
        Authority {
            config: self.config.authority.clone(),
            store: self.store.clone(),
            feed: self.feed(buses),
            metrics: self.metrics.clone(),
            fence: self.fence.clone(),
            rounds: self.rounds.clone(),
            wake: self.wake.clone(),
            serving: watch::Sender::new(true),
            succeeding: watch::Sender::new(true),
            complaints: Mutex::new(Complaints::default()),
            condition: self.readiness.condition("rounds", "the first probe round; see the log if it fails"),
        }
    }

    pub(crate) fn questions(&self, buses: &Buses) -> Questions {
        Questions::new(
            &self.config.authority,
            (self.store.clone(), self.store.clone()),
            self.receipts.clone(),
            (self.fence.clone(), self.rounds.clone()),
            (self.history.clone(), self.vouching.clone()),
            [buses.main.clone(), buses.lookups.clone()],
            self.metrics.clone(),
        )
    }

    pub(crate) fn surface(&self) -> Surface {
        let vouched = Vouched {
            fence: self.fence.clone(),
            rounds: self.rounds.clone(),
            vouching: self.vouching.clone(),
            // As agents keep a margin back.
            trust: Duration::from(self.config.receipts.bound) * 9 / 10,
        };
        Surface::new(
            self.store.clone(),
            self.receipts.clone(),
            RateLimits::new(&self.config.rate_limit),
            self.wake.clone(),
            vouched,
            self.metrics.clone(),
        )
    }

    pub(crate) fn rivals(&self, buses: &Buses, authority: &Authority) -> Rivals {
        Rivals {
            id: self.id,
            name: format!("{} ({})", host_name(), self.config.http.listen).into(),
            vouching: self.vouching.clone(),
            history: self.history.clone(),
            store: self.store.clone(),
            fence: self.fence.clone(),
            rounds: self.rounds.clone(),
            bus: buses.main.clone(),
            metrics: self.metrics.clone(),
            condition: self.readiness.condition("history", "an answer to who else publishes on this bus"),
            succeeding: authority.succeeding.subscribe(),
            connected: self.connected.clone(),
        }
    }

    pub(crate) fn expiry(&self) -> Expiry {
        Expiry {
            interval: self.config.sequencer.expiry_interval.into(),
            store: self.store.clone(),
            metrics: self.metrics.clone(),
            wake: self.wake.clone(),
        }
    }

    pub(crate) fn retention(&self) -> Retention {
        Retention {
            config: self.config.retention.clone(),
            store: self.store.clone(),
            metrics: self.metrics.clone(),
        }
    }

    pub(crate) fn admin(&self) -> Admin {
        Admin {
            metrics: self.registry.clone(),
            readiness: self.readiness.clone(),
            status: status::status(
                self.receipts.clone(),
                self.fence.clone(),
                self.history.clone(),
                self.vouching.clone(),
            ),
        }
    }

    fn feed(&self, buses: &Buses) -> LiveFeed {
        LiveFeed {
            bus: buses.main.clone(),
            receipts: self.receipts.clone(),
            history: self.history.clone(),
            vouching: self.vouching.clone(),
            metrics: self.metrics.clone(),
        }
    }
}

/// Where clients and operators come in.
pub(crate) struct Listeners {
    pub(crate) http: TcpListener,
    pub(crate) admin: TcpListener,
    /// What `http` got for port 0.
    pub(crate) http_address: SocketAddr,
    /// The same of `admin`.
    pub(crate) admin_address: SocketAddr,
}

impl Listeners {
    pub(crate) async fn bind(config: &PublisherConfig) -> Result<Self, BindError> {
        let http = bind(config.http.listen).await?;
        let admin = bind(config.admin.listen).await?;
        let http_address = http.local_addr().unwrap_or(config.http.listen);
        let admin_address = admin.local_addr().unwrap_or(config.admin.listen);
        Ok(Self { http, admin, http_address, admin_address })
    }
}

/// The connections to NATS. Lookups have one of their own: a flood of them holds up nothing else.
pub(crate) struct Buses {
    main: Bus,
    lookups: Bus,
}

impl Buses {
    pub(crate) async fn connect(common: &Common) -> Result<Self, StartError> {
        let Common { config, metrics, readiness, wake, connected, .. } = common;
        let (wake, connected) = (wake.clone(), connected.clone());
        let on_connected = move || {
            connected.notify_one();
            // The head at once, without waiting for the second: agents may have missed something.
            wake.tick();
        };
        let main = bus::connect(&config.nats, metrics, readiness, on_connected).await?;
        let lookups = bus::connect_for_lookups(&config.nats, metrics, readiness).await?;
        Ok(Self { main, lookups })
    }

    pub(crate) async fn intakes(&self, common: &Common) -> Result<Intakes, StartError> {
        Ok(Intakes {
            publishers: rivals::publishers(&self.main, common.id).await?,
            probes: self.main.intake(Kind::Probe).await?,
            replays: self.main.intake(Kind::Replay).await?,
            announcements: self.main.intake(Kind::Applied).await?,
            lookups: self.lookups.intake(Kind::Lookup).await?,
        })
    }
}

/// What comes in.
pub(crate) struct Intakes {
    pub(crate) probes: Intake,
    pub(crate) replays: Intake,
    pub(crate) announcements: Intake,
    pub(crate) lookups: Intake,
    /// What comes from other publishers.
    pub(crate) publishers: Publishers,
}

fn draw() -> Result<u64, StartError> {
    Ok(getrandom::u64()?.max(1))
}
