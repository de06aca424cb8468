//! Each state is truthful, whatever restarts, falls silent or is lost.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use evictd_core::exposure::{ApplyReport, Exposure};
use evictd_core::history::{Incarnation, Provenance, StoreId};
use evictd_core::ids::{AgentName, ApiId, Identity, InstanceId, KeyHash, KeyId, Region, WorkspaceId};
use evictd_core::invalidation::Cause;
use evictd_core::offset::DurationRange;
use evictd_core::position::LogPosition;
use evictd_core::receipts::Change;
use evictd_core::roster::{Instance, PartitionPolicy};
use evictd_core::service::{Peer, Standing};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_ops::metrics::Registry;
use evictd_store::change::{Actor, DeleteMode, NewApi, NewKey};
use evictd_store::log::RoundRequest;
use evictd_store::operator::{NewRootKey, Operator};
use evictd_store::sqlite::SqliteStore;
use evictd_store::{ChangeStore, LogStore, OperatorStore, RosterStore};
use evictd_wire::api::propagation::{Propagation, RegionPropagation};
use evictd_wire::applied::Applied;
use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::handle::WAITS_MAX;
use super::input::ReceiptInput;
use super::state::{Ahead, last_of_each_request};
use super::task::storage::ADOPT_EVERY;
use super::*;
use crate::bus::tests::unconnected;
use crate::config::ReceiptsConfig;
use crate::history::HomeHistory;
use crate::live_feed::LiveFeed;
use crate::log_output::LogOutput;
use crate::metrics;
use crate::shared::Shared;
use crate::vouching::Vouching;

/// Long enough for a test that must not reach it.
const LONG: Duration = Duration::from_secs(30);

/// Short enough for a test that waits for it.
const SHORT: Duration = Duration::from_millis(150);

fn agent(region: &str, name: &str, instance: u64) -> Instance {
    Instance {
        identity: Identity {
            region: Region::new(region),
            agent: AgentName::new(name),
            instance: InstanceId(instance),
        },
        policy: PartitionPolicy::Deny,
        bound: SHORT,
    }
}

fn workspace() -> WorkspaceId {
    WorkspaceId::new("ws_1")
}

/// A home store with an API.
struct StoreFixture {
    store: Arc<SqliteStore>,
    directory: tempfile::TempDir,
}

impl StoreFixture {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(&directory.path().join("home.db")).await.unwrap());
        let root_key = NewRootKey {
            id: KeyId::new("root_1"),
            workspace_id: workspace(),
            hash: KeyHash([255; 32]),
            start: "unkey_abcd".to_owned(),
            name: None,
            permissions: Vec::new(),
            expires_at: None,
        };
        store.create_root_key(&operator(), root_key).await.unwrap();
        let api = NewApi { id: ApiId::new("api_1"), name: "payments".to_owned() };
        store.create_api(&actor("req_api"), api).await.unwrap();
        Self { store, directory }
    }

    async fn publisher(&self, bound: Duration, regions: &[&str]) -> ReceiptsFixture {
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        let regions = regions.iter().map(ToString::to_string).collect();
        let config = ReceiptsConfig { bound: bound.into(), regions };
        let history = Arc::new(HomeHistory::read(self.store.clone()).await.unwrap());
        let shared = Shared::serving(history, &registry);
        let draining = CancellationToken::new();
        let (receipts, membership, task) =
            ReceiptsTask::new(&config, self.store.clone(), shared.clone(), &registry, draining.clone());
        tokio::spawn(task.run());
        let feed = LiveFeed { bus: unconnected(&shared.metrics).await, shared: shared.clone() };
        let output = LogOutput { feed, receipts: receipts.clone(), shared: shared.clone() };
        let home = ReceiptsFixture {
            store: self.store.clone(),
            output,
            receipts,
            membership,
            shared,
            registry,
            draining,
        };
        home.idle().await;
        home.read_nothing_unasked().await;
        home
    }

    /// Makes a change outside the API.
    async fn sql(&self, statement: &'static str) {
        let options = SqliteConnectOptions::new().filename(self.directory.path().join("home.db"));
        let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
        sqlx::query(statement).execute(&mut connection).await.unwrap();
    }
}

fn operator() -> Operator {
    Operator { name: "ops".to_owned(), request_id: "req_operator".to_owned() }
}

fn actor(request: &str) -> Actor {
    Actor {
        root_key_id: KeyId::new("root_1"),
        workspace_id: workspace(),
        request_id: request.to_owned(),
        remote_ip: None,
        peer_ip: None,
        user_agent: None,
    }
}

/// A publisher's receipts.
struct ReceiptsFixture {
    store: Arc<SqliteStore>,
    output: LogOutput,
    receipts: Receipts,
    membership: Membership,
    shared: Shared,
    registry: Registry,
    draining: CancellationToken,
}

impl ReceiptsFixture {
    /// Looks at the task's state, or changes it.
    async fn inspect<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut ReceiptsTask) -> T + Send + 'static,
    ) -> T {
        let (reply, result) = oneshot::channel();
        let look = Box::new(move |task: &mut dyn Any| {
            reply.send(look(task.downcast_mut().unwrap())).ok();
        });
        self.receipts.queue.send(ReceiptInput::Inspect(look)).await.ok().unwrap();
        result.await.unwrap()
    }

    /// Waits until the task has finished what its inputs have caused.
    async fn idle(&self) {
        while !self.inspect(|task| task.is_idle()).await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// The roster and the open requests are read only when a test requests it.
    async fn read_nothing_unasked(&self) {
        let never = clock::lease_now().after(Duration::from_hours(1));
        self.inspect(move |task| (task.work.roster_due, task.work.adoption_due) = (never, never)).await;
    }

    async fn read_roster(&self) {
        self.inspect(|task| task.work.roster_due = LeaseTime::default()).await;
        self.idle().await;
        self.read_nothing_unasked().await;
    }

    async fn read_roster_changes(&self) {
        assert!(!self.membership.looked_up(&agent("none", "none", 0).identity).await);
    }

    async fn adopt_open_requests(&self) {
        self.inspect(|task| task.work.adoption_due = LeaseTime::default()).await;
        self.idle().await;
        self.read_nothing_unasked().await;
    }

    async fn adopt_awaited_requests(&self) {
        self.inspect(|task| (task.work.adoption, task.work.numbered_elsewhere) = (None, true)).await;
        self.idle().await;
        self.inspect(ReceiptsTask::pause_adoption).await;
    }

    async fn looks_after(&self, request: &str) -> bool {
        let request = request.to_owned();
        self.inspect(move |task| task.state.looks_after(&request)).await
    }

    fn head(&self) -> LogPosition {
        self.shared.head.current()
    }

    /// Agents probe, and a round writes them into the roster.
    async fn round(&self, instances: &[&Instance]) {
        let instances: Vec<Instance> = instances.iter().copied().cloned().collect();
        for instance in &instances {
            self.membership.admit(instance).await.unwrap();
        }
        let before = self.head();
        let touched = self.membership.take_seen().await;
        let request = RoundRequest { instances: &instances, touched: &touched, seen_epoch: 0 };
        let round = self.store.round(request).await.unwrap();
        self.output.numbered(before, &round.numbered).await;
        self.idle().await;
    }

    async fn number(&self) {
        let before = self.head();
        let numbered = self.store.number(1_000).await.unwrap();
        self.output.numbered(before, &numbered).await;
        self.idle().await;
    }

    /// Creates a key and deletes it by `request`; nothing of it is numbered yet.
    async fn delete(&self, request: &str) {
        let id = KeyId::new(format!("key_{request}"));
        let key = NewKey {
            id: id.clone(),
            api_id: ApiId::new("api_1"),
            hash: evictd_wire::api::ids::hash(request),
            start: "abcd".to_owned(),
            name: None,
            meta: None,
            external_id: None,
            permissions: Vec::new(),
            enabled: true,
            expires_at: None,
        };
        self.store.create_key(&actor(&format!("{request}_creation")), key).await.unwrap();
        let allowed = |_: &ApiId| true;
        self.store.delete_key(&actor(request), &id, DeleteMode::Soft, &allowed).await.unwrap();
    }

    /// Deletes a key as the control API does, and returns its answer.
    async fn delete_and_wait(&self, request: &str, limit: Duration) -> Propagation {
        let pending = self.receipts.begin(request, true).await;
        self.delete(request).await;
        self.number().await;
        pending.settled(&workspace(), limit).await
    }

    async fn announce(&self, agent: &Instance, applied: LogPosition) -> Result<(), Ahead> {
        let apply_report = ApplyReport {
            position: applied,
            lag: DurationRange { low: Duration::from_millis(1), high: Duration::from_millis(2) },
            exposure: Exposure { last_after: Duration::from_millis(1) },
        };
        let announcement = Applied {
            applied,
            apply_reports: vec![apply_report],
            leaving: false,
            ..self.leave_message(agent)
        };
        self.apply(agent, announcement).await
    }

    /// Returns the leave message of an agent that has applied nothing.
    fn leave_message(&self, agent: &Instance) -> Applied {
        Applied {
            instance: agent.identity.instance,
            provenance: self.shared.history.history().provenance(),
            applied: LogPosition::ZERO,
            apply_reports: Vec::new(),
            leaving: true,
        }
    }

    async fn apply(&self, agent: &Instance, announcement: Applied) -> Result<(), Ahead> {
        let identity = agent.identity.clone();
        let apply = move |task: &mut ReceiptsTask| {
            task.apply_announcement(&identity, &announcement, clock::lease_now())
        };
        self.inspect(apply).await
    }

    /// An agent has applied the whole log.
    async fn applies(&self, agent: &Instance) {
        self.announce(agent, self.head()).await.unwrap();
    }

    async fn view(&self, request: &str) -> Option<Propagation> {
        match self.receipts.view(&workspace(), request).await.unwrap()? {
            ReceiptView::Open(propagation) => Some(*propagation),
            ReceiptView::Stored(body) => Some(serde_json::from_str(body.get()).unwrap()),
        }
    }

    fn metric(&self, series: &str) -> u64 {
        let scrape = self.registry.render();
        let line = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{scrape}")).parse::<f64>().unwrap() as u64
    }

    async fn agents(&self, region: &str) -> [u64; 4] {
        self.inspect(|task| task.state.regions.count(&task.state.tracker, clock::lease_now())).await;
        ["live", "silent", "duplicate", "absent"].map(|state| {
            self.metric(&format!("evictd_publisher_agents{{region=\"{region}\",state=\"{state}\"}}"))
        })
    }
}

fn states(propagation: &Propagation) -> Vec<(&str, &str)> {
    propagation.regions.iter().map(|region| (&*region.region, &*region.state)).collect()
}

fn missing(region: &RegionPropagation) -> Vec<&str> {
    region.missing.iter().map(|missing| missing.agent.as_str()).collect()
}

#[tokio::test]
async fn a_wait_ends_as_soon_as_every_region_has_confirmed() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let (eu, us) = (agent("eu", "a", 1), agent("us", "a", 2));
    home.round(&[&eu, &us]).await;
    let pending = home.receipts.begin("req_1", true).await;
    home.delete("req_1").await;
    home.number().await;
    home.applies(&eu).await;
    let half_way = home.view("req_1").await.unwrap();
    assert_eq!(states(&half_way), [("eu", "confirmed"), ("us", "pending")]);
    assert_eq!((&*half_way.state, half_way.r#final), ("pending", false));
    home.applies(&us).await;
    let settled = pending.settled(&workspace(), LONG).await;
    assert_eq!((&*settled.state, settled.r#final), ("confirmed", true));
    assert_eq!(
        (settled.measured_from.as_deref(), settled.cause.as_deref()),
        (Some("request"), Some("deleted"))
    );
    assert_eq!((settled.epoch, settled.position), (Some(1), Some(home.head().position())));
    let exposure = settled.regions[0].exposure.unwrap();
    assert_eq!((exposure.last_answer_after_ms, settled.regions[0].lag_ms.unwrap().high), (1.0, 2.0));
    assert_eq!(home.metric("evictd_publisher_confirmed_seconds_count{region=\"eu\"}"), 1);
    assert_eq!(
        home.metric("evictd_publisher_receipts_total{state=\"confirmed\"}"),
        3,
        "with its creation and the root key's"
    );
}

#[tokio::test]
async fn a_wait_that_times_out_returns_the_state_reached() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    let reached = home.delete_and_wait("req_1", Duration::ZERO).await;
    assert_eq!((&*reached.state, reached.r#final), ("pending", false));
    home.applies(&eu).await;
    assert_eq!(home.view("req_1").await.unwrap().state, "confirmed");
}

#[tokio::test]
async fn a_wait_ends_when_the_publisher_shuts_down() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    home.round(&[&agent("eu", "a", 1)]).await;
    home.draining.cancel();
    assert_eq!(home.delete_and_wait("req_1", LONG).await.state, "pending");
}

#[tokio::test]
async fn receipt_elapses_at_the_bound_and_names_vanished_process() {
    let store = StoreFixture::new().await;
    let home = store.publisher(SHORT, &[]).await;
    let (here, gone) = (agent("eu", "here", 1), agent("eu", "gone", 2));
    home.round(&[&here, &gone]).await;
    let pending = home.receipts.begin("req_1", true).await;
    let began = std::time::Instant::now();
    home.delete("req_1").await;
    home.number().await;
    home.applies(&here).await;
    let settled = pending.settled(&workspace(), LONG).await;
    assert!(began.elapsed() >= SHORT, "{:?}", began.elapsed());
    assert_eq!(states(&settled), [("eu", "elapsed")]);
    assert_eq!((missing(&settled.regions[0]), settled.regions[0].missing_count), (vec!["gone"], 1));
    assert_eq!(home.metric("evictd_publisher_confirmed_seconds_count{region=\"eu\"}"), 0);
}

#[tokio::test]
async fn while_another_home_store_is_active_nothing_is_final() {
    let store = StoreFixture::new().await;
    let home = store.publisher(SHORT, &[]).await;
    let (here, gone) = (agent("eu", "here", 1), agent("eu", "gone", 2));
    home.round(&[&here, &gone]).await;
    let rival = Peer {
        publisher: "other".into(),
        provenance: Provenance { store: StoreId(1), incarnation: Incarnation(2) },
        since: StoreTime(0),
        standing: Standing::Serving,
    };
    // This publisher's first query: no other had answered it in time.
    home.shared.vouching.with(|service, now| service.on_rival(Vouching::FIRST_QUERY, rival, now));
    assert!(home.shared.vouching.refusal().is_some());
    let pending = home.receipts.begin("req_1", true).await;
    home.delete("req_1").await;
    home.number().await;
    // Of the other store, which gives the same positions if it is a physical copy.
    home.applies(&here).await;
    home.applies(&gone).await;
    let after_the_bound = pending.settled(&workspace(), 2 * SHORT).await;
    assert_eq!((&*after_the_bound.state, after_the_bound.r#final), ("pending", false));
    home.delete("req_2").await;
    home.number().await;
    for request in ["req_1", "req_2"] {
        let view = home.view(request).await.unwrap();
        assert_eq!((&*view.state, view.r#final), ("pending", false));
    }
}

#[tokio::test]
async fn an_agent_that_serves_stale_records_leaves_it_unproven() {
    let store = StoreFixture::new().await;
    let home = store.publisher(SHORT, &[]).await;
    let stale = Instance { policy: PartitionPolicy::ServeStale, ..agent("eu", "a", 1) };
    home.round(&[&stale]).await;
    let settled = home.delete_and_wait("req_1", LONG).await;
    assert_eq!((&*settled.state, settled.r#final), ("unproven", true));
}

#[tokio::test]
async fn two_processes_under_one_name_both_have_to_confirm() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let (one, other) = (agent("eu", "a", 1), agent("eu", "a", 2));
    home.round(&[&one, &other]).await;
    let pending = home.receipts.begin("req_1", true).await;
    home.delete("req_1").await;
    home.number().await;
    home.applies(&one).await;
    home.inspect(|task| task.state.tracker.poll(clock::lease_now())).await;
    let view = home.view("req_1").await.unwrap();
    assert_eq!(states(&view), [("eu", "pending")]);
    assert_eq!((missing(&view.regions[0]), view.regions[0].duplicate_names), (vec!["a"], true));
    home.applies(&other).await;
    assert_eq!(pending.settled(&workspace(), LONG).await.state, "confirmed");
    assert_eq!(home.agents("eu").await, [2, 0, 2, 0]);
}

#[tokio::test]
async fn a_configured_region_without_an_agent_is_absent() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &["ap", "eu"]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    let pending = home.receipts.begin("req_1", true).await;
    home.delete("req_1").await;
    home.number().await;
    home.applies(&eu).await;
    let settled = pending.settled(&workspace(), LONG).await;
    assert_eq!(states(&settled), [("ap", "absent"), ("eu", "confirmed")]);
    assert_eq!(settled.state, "confirmed");
    assert_eq!((home.agents("ap").await, home.agents("eu").await), ([0, 0, 0, 1], [1, 0, 0, 0]));
}

#[tokio::test]
async fn an_agent_that_another_publisher_registered_is_waited_for() {
    let store = StoreFixture::new().await;
    let (here, there) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    let (eu, us) = (agent("eu", "a", 1), agent("us", "a", 2));
    here.round(&[&eu]).await;
    there.round(&[&us]).await;
    let pending = here.receipts.begin("req_1", true).await;
    here.delete("req_1").await;
    here.number().await;
    here.applies(&eu).await;
    assert_eq!(states(&here.view("req_1").await.unwrap()), [("eu", "confirmed"), ("us", "pending")]);
    here.applies(&us).await;
    assert_eq!(pending.settled(&workspace(), LONG).await.state, "confirmed");
}

#[tokio::test]
async fn a_change_numbered_elsewhere_has_one_receipt_at_both() {
    let store = StoreFixture::new().await;
    let (here, there) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    let eu = agent("eu", "a", 1);
    here.round(&[&eu]).await;
    let pending = here.receipts.begin("req_1", true).await;
    here.delete("req_1").await;
    there.number().await;
    for publisher in [&here, &there] {
        publisher.shared.head.advance(there.head());
        publisher.read_roster_changes().await;
        publisher.applies(&eu).await;
    }
    let settled = pending.settled(&workspace(), LONG).await;
    assert_eq!(settled.state, "confirmed");
    // Both return the receipt that was stored first.
    assert_eq!(there.view("req_1").await.unwrap(), settled);
    assert_eq!(here.view("req_1").await.unwrap(), settled);
}

#[tokio::test]
async fn a_wait_ends_with_the_receipt_that_another_publisher_stored() {
    let store = StoreFixture::new().await;
    let (here, there) = (store.publisher(LONG, &[]).await, store.publisher(SHORT, &[]).await);
    let eu = agent("eu", "a", 1);
    here.round(&[&eu]).await;
    let pending = here.receipts.begin("req_1", true).await;
    here.delete("req_1").await;
    here.number().await;
    // There, the bound ends it first.
    there.shared.head.advance(here.head());
    there.adopt_open_requests().await;
    while !there.view("req_1").await.unwrap().r#final {
        tokio::task::yield_now().await;
    }
    here.applies(&eu).await;
    let settled = pending.settled(&workspace(), LONG).await;
    assert_eq!((&*settled.state, settled.r#final), ("elapsed", true));
    assert_eq!(here.view("req_1").await.unwrap(), settled);
}

/// Returns whether this publisher has noticed that others number, too.
async fn noticed(home: &ReceiptsFixture) -> bool {
    home.inspect(|task| std::mem::take(&mut task.work.numbered_elsewhere)).await
}

#[tokio::test]
async fn numbering_shows_that_another_publisher_was_faster() {
    let store = StoreFixture::new().await;
    let (here, there) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    let eu = agent("eu", "a", 1);
    here.inspect(ReceiptsTask::pause_adoption).await;
    here.round(&[&eu]).await;
    here.delete("req_own").await;
    here.number().await;
    assert!(!noticed(&here).await, "all rows were its own");

    for (request, between) in [("req_1", false), ("req_2", true)] {
        let pending = here.receipts.begin(request, true).await;
        here.delete(request).await;
        there.number().await;
        if between {
            here.delete("req_between").await;
        }
        here.number().await;
        assert!(!here.looks_after(request).await);
        assert!(noticed(&here).await);
        here.adopt_awaited_requests().await;
        assert!(here.looks_after(request).await);
        assert!(!here.looks_after(&format!("{request}_creation")).await, "no client waits for it");
        here.applies(&eu).await;
        let settled = pending.settled(&workspace(), LONG).await;
        assert_eq!((&*settled.state, settled.measured_from.as_deref()), ("confirmed", Some("request")));
    }
    here.delete("req_own_again").await;
    here.number().await;
    assert!(!noticed(&here).await, "the searched rows are accounted for");
}

#[tokio::test]
async fn a_change_numbered_elsewhere_is_adopted_at_once() {
    let store = StoreFixture::new().await;
    let (here, there) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    // Final receipts wait to be stored together, and must not hold it up.
    here.round(&[&agent("eu", "a", 1)]).await;
    let _pending = here.receipts.begin("req_1", true).await;
    here.delete("req_1").await;
    there.number().await;
    here.number().await;
    let taken_over = async {
        while !here.looks_after("req_1").await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(ADOPT_EVERY / 2, taken_over).await.unwrap();
}

#[tokio::test]
async fn after_a_restart_open_receipts_are_adopted_from_the_store() {
    let store = StoreFixture::new().await;
    let eu = agent("eu", "a", 1);
    {
        let before = store.publisher(LONG, &[]).await;
        before.round(&[&eu]).await;
        assert_eq!(before.delete_and_wait("req_1", Duration::ZERO).await.state, "pending");
    }
    let after = store.publisher(LONG, &[]).await;
    let open = after.view("req_1").await.unwrap();
    assert_eq!(
        (states(&open), open.measured_from.as_deref()),
        (vec![("eu", "pending")], Some("first_sight"))
    );
    after.applies(&eu).await;
    assert_eq!(after.view("req_1").await.unwrap().state, "confirmed");
}

#[tokio::test]
async fn a_final_receipt_survives_byte_for_byte() {
    let store = StoreFixture::new().await;
    let eu = agent("eu", "a", 1);
    let settled = {
        let before = store.publisher(LONG, &[]).await;
        before.round(&[&eu]).await;
        let pending = before.receipts.begin("req_1", true).await;
        before.delete("req_1").await;
        before.number().await;
        before.applies(&eu).await;
        let settled = pending.settled(&workspace(), LONG).await;
        while before.inspect(|task| task.state.unstored()).await > 0 {
            tokio::task::yield_now().await;
        }
        settled
    };
    let after = store.publisher(LONG, &[]).await;
    let Some(ReceiptView::Stored(body)) = after.receipts.view(&workspace(), "req_1").await.unwrap() else {
        panic!("it is in the store")
    };
    assert_eq!(body.get(), serde_json::to_string(&settled).unwrap());
    assert_eq!(after.inspect(|task| task.state.tracker.open()).await, 0);
}

#[tokio::test]
async fn a_receipt_is_visible_to_its_own_workspace_only() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    home.delete_and_wait("req_1", Duration::ZERO).await;
    assert!(home.view("req_1").await.is_some());
    assert!(home.receipts.view(&WorkspaceId::new("ws_2"), "req_1").await.unwrap().is_none());
    assert!(home.view("req_unknown").await.is_none());
    let nothing = home.view("req_api").await.unwrap();
    assert_eq!((&*nothing.state, nothing.r#final, nothing.position), ("confirmed", true, None));
}

#[tokio::test]
async fn a_change_that_a_restored_store_lost_is_never_confirmed() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    assert_eq!(home.delete_and_wait("req_lost", Duration::ZERO).await.state, "pending");
    assert_eq!(home.delete_and_wait("req_kept", Duration::ZERO).await.state, "pending");
    // As if the last backup had been made before.
    store.sql("DELETE FROM invalidations WHERE request_id = 'req_lost'").await;
    store.sql("DELETE FROM audit_log WHERE correlation_id = 'req_lost'").await;
    let restored = home.store.begin_epoch(&operator()).await.unwrap().at;
    assert_eq!(home.announce(&eu, restored).await, Err(Ahead), "before the publisher has read the new epoch");
    home.shared.history.reread().await.unwrap();
    home.shared.head.advance(restored);
    home.announce(&eu, restored).await.unwrap();
    home.adopt_open_requests().await;
    assert_eq!(home.view("req_lost").await, None);
    let kept = home.view("req_kept").await.unwrap();
    assert_eq!(
        (&*kept.regions[0].state, kept.r#final),
        ("confirmed", false),
        "the roster may lack a process"
    );
}

#[tokio::test]
async fn rows_of_a_store_that_went_back_open_no_receipt() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    let further = LogPosition::new(1, 100).unwrap();
    home.shared.head.advance(further);
    home.announce(&eu, further).await.unwrap();
    let reached = home.delete_and_wait("req_1", Duration::ZERO).await;
    assert_eq!(reached.state, "pending", "what the agent applied at that position was another change");
    home.shared.rounds.requested().await;
}

#[tokio::test]
async fn an_agent_ahead_of_the_log_confirms_nothing() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    home.delete_and_wait("req_1", Duration::ZERO).await;
    for ahead in [home.head().next().unwrap(), LogPosition::new(2, 0).unwrap()] {
        assert_eq!(home.announce(&eu, ahead).await, Err(Ahead));
    }
    assert_eq!(home.view("req_1").await.unwrap().state, "pending");
}

#[tokio::test]
async fn no_publisher_waits_for_a_process_that_left() {
    let store = StoreFixture::new().await;
    let (home, other) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    let (here, leaving) = (agent("eu", "here", 1), agent("eu", "leaving", 2));
    home.round(&[&here, &leaving]).await;
    home.read_roster().await;
    other.read_roster().await;
    home.apply(&leaving, home.leave_message(&leaving)).await.unwrap();
    // A probe that was on its way doesn't bring it back.
    home.read_roster_changes().await;
    assert!(!home.membership.looked_up(&leaving.identity).await);
    home.read_roster().await;
    home.read_roster().await;
    let left = leaving.identity.clone();
    let is_departed = home.inspect(move |task| task.state.roster.has_departed(&left)).await;
    assert!(!is_departed, "the roster shows it now");
    assert!(!home.membership.looked_up(&leaving.identity).await);
    // The other one missed it. It reads what is new in the roster whenever something is to be confirmed.
    assert!(other.membership.looked_up(&leaving.identity).await);
    home.delete("req_1").await;
    other.number().await;
    other.applies(&here).await;
    assert!(other.view("req_1").await.unwrap().r#final);
    other.read_roster().await;
    assert!(!other.membership.looked_up(&leaving.identity).await);
    assert!(
        !store.publisher(LONG, &[]).await.membership.looked_up(&leaving.identity).await,
        "nor after a restart"
    );
}

#[tokio::test]
async fn a_process_that_the_roster_lacks_gets_no_proof() {
    let store = StoreFixture::new().await;
    let (home, other) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    let eu = agent("eu", "a", 1);
    assert!(!home.membership.looked_up(&eu.identity).await);
    other.round(&[&eu]).await;
    assert!(home.membership.looked_up(&eu.identity).await);
}

#[tokio::test]
async fn a_deletion_outside_the_api_is_tracked_without_a_receipt() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    home.delete("req_1").await;
    home.number().await;
    home.applies(&eu).await;
    let before = home.metric("evictd_publisher_confirmed_seconds_count{region=\"eu\"}");
    store.sql("DELETE FROM keys").await;
    home.number().await;
    assert_eq!(home.inspect(|task| task.state.tracker.unconfirmed()).await, 1);
    home.applies(&eu).await;
    assert_eq!(home.inspect(|task| task.state.tracker.unconfirmed()).await, 0);
    assert_eq!(home.metric("evictd_publisher_confirmed_seconds_count{region=\"eu\"}"), before + 1);
}

#[tokio::test]
async fn a_wait_that_was_dropped_holds_no_resources() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    drop(home.receipts.begin("req_1", true).await);
    assert!(!home.inspect(|task| task.state.waiters.contains("req_1")).await);
    assert!(!home.inspect(|task| task.state.waiters.any_waits()).await);
    assert_eq!(home.receipts.waits.available_permits(), WAITS_MAX);
    let waits: Vec<String> = (0..=WAITS_MAX).map(|number| format!("req_{number}")).collect();
    let mut all = Vec::new();
    for request in &waits {
        all.push(home.receipts.begin(request, true).await);
    }
    assert_eq!(home.receipts.waits.available_permits(), 0);
    drop(all);
    assert_eq!(home.receipts.waits.available_permits(), WAITS_MAX);
}

/// Its row still exists, so the roster shows nothing new. The next comparison must not delete that row.
#[tokio::test]
async fn a_silent_process_that_probes_again_is_waited_for() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let (eu, us) = (agent("eu", "a", 1), agent("us", "b", 2));
    home.round(&[&eu, &us]).await;
    home.read_roster().await;
    let left = us.identity.clone();
    home.inspect(move |task| task.state.tracker.mark_departed(&left, clock::lease_now())).await;
    home.round(&[&eu, &us]).await;
    home.read_roster().await;
    assert_eq!(home.store.roster(0).await.unwrap().entries.len(), 2);
    home.delete("req_1").await;
    home.number().await;
    home.applies(&eu).await;
    assert!(!home.view("req_1").await.unwrap().r#final);
    home.applies(&us).await;
    assert_eq!(home.view("req_1").await.unwrap().state, "confirmed");
}

#[tokio::test]
async fn a_process_that_left_and_probes_again_is_waited_for() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let (eu, us) = (agent("eu", "a", 1), agent("us", "b", 2));
    home.round(&[&eu, &us]).await;
    home.apply(&us, home.leave_message(&us)).await.unwrap();
    home.round(&[&eu, &us]).await;
    home.delete("req_1").await;
    home.number().await;
    home.applies(&eu).await;
    assert!(!home.view("req_1").await.unwrap().r#final);
}

/// The store was put back, and has not begun its epoch yet: at these positions the agent applied other changes.
#[tokio::test]
async fn a_lost_history_does_not_confirm_what_took_its_place() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let eu = agent("eu", "a", 1);
    home.round(&[&eu]).await;
    home.read_roster().await;
    let further = LogPosition::new(1, 100).unwrap();
    home.shared.head.advance(further);
    home.announce(&eu, further).await.unwrap();
    assert_eq!(home.delete_and_wait("req_1", Duration::ZERO).await.state, "pending");
    // An operator declares that this store is the one to follow.
    let declared = home.store.begin_epoch(&operator()).await.unwrap();
    home.shared.history.note(&declared).await.unwrap();
    home.shared.head.advance(declared.at);
    home.adopt_open_requests().await;
    assert_eq!(states(&home.view("req_1").await.unwrap()), [("eu", "pending")]);
    assert_eq!(home.announce(&eu, further).await, Err(Ahead), "it has not flushed yet");
    assert_eq!(states(&home.view("req_1").await.unwrap()), [("eu", "pending")]);
    home.applies(&eu).await;
    assert_eq!(states(&home.view("req_1").await.unwrap()), [("eu", "confirmed")]);
}

/// The roster went back with the store: a process that it lacks may hold a lease for a bound.
#[tokio::test]
async fn a_new_epoch_delays_early_receipts_by_a_bound() {
    let store = StoreFixture::new().await;
    let (eu, us) = (agent("eu", "a", 1), agent("us", "b", 2));
    store.publisher(LONG, &[]).await.round(&[&eu, &us]).await;
    store.sql("DELETE FROM roster WHERE region = 'us'").await;
    store.store.begin_epoch(&operator()).await.unwrap();
    for request in ["req_1", "req_2"] {
        let home = store.publisher(LONG, &[]).await;
        home.delete(request).await;
        home.number().await;
        home.applies(&eu).await;
        assert!(!home.view(request).await.unwrap().r#final);
    }
    store.store.mark_roster_complete(2).await.unwrap();
    let home = store.publisher(LONG, &[]).await;
    home.delete("req_3").await;
    home.number().await;
    home.applies(&eu).await;
    assert!(home.view("req_3").await.unwrap().r#final);
}

#[tokio::test]
async fn a_process_that_left_before_it_was_read_is_not_waited_for() {
    let store = StoreFixture::new().await;
    let home = store.publisher(LONG, &[]).await;
    let (eu, us) = (agent("eu", "a", 1), agent("us", "b", 2));
    home.round(&[&eu, &us]).await;
    home.apply(&us, home.leave_message(&us)).await.unwrap();
    home.delete("req_1").await;
    home.number().await;
    home.applies(&eu).await;
    assert!(home.view("req_1").await.unwrap().r#final);
}

#[test]
fn of_the_rows_of_one_request_the_last_one_counts() {
    let change = |request: Option<&str>, position| Change {
        request: request.map(|request| (request.into(), workspace())),
        position: LogPosition::new(1, position).unwrap(),
        cause: Cause::Changed,
        committed_at: StoreTime(0),
    };
    let changes = [(Some("reroll"), 1), (Some("reroll"), 2), (None, 3), (Some("other"), 4), (None, 5)];
    let kept = last_of_each_request(changes.map(|(request, position)| change(request, position)).into());
    assert_eq!(kept.iter().map(|change| change.position.position()).collect::<Vec<_>>(), [2, 3, 4, 5]);
}

/// Failure: an agent confirms what another publisher has numbered, and counts only with its next announcement.
#[tokio::test]
async fn an_announcement_waits_for_a_read_of_a_further_head() {
    let store = StoreFixture::new().await;
    let (here, there) = (store.publisher(LONG, &[]).await, store.publisher(LONG, &[]).await);
    let eu = agent("eu", "a", 1);
    here.round(&[&eu]).await;
    there.number().await;
    here.delete("req_1").await;
    there.number().await;
    let further = there.head();
    assert!(further > here.head());
    let announcement = Applied { applied: further, leaving: false, ..here.leave_message(&eu) };
    here.receipts.announced(eu.identity.clone(), announcement).await;
    here.idle().await;
    assert_eq!(here.head(), further);
    let refused = "evictd_publisher_refused_messages_total{subject=\"applied\",reason=\"ahead\"}";
    assert_eq!(here.metric(refused), 0);
    here.adopt_open_requests().await;
    assert_eq!(here.view("req_1").await.unwrap().state, "confirmed");
}
