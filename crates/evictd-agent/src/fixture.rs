//! An agent without a bus, for tests: its home region is in memory, and what the follow task would do
//! with a message is done at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use evictd_core::follower::{Accepted, Effect, Follower, LoadSource};
use evictd_core::history::{Incarnation, LogToken, Milestone, Provenance, StoreId, Voucher};
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::serving::{LoadAnswer, LoadedEntry};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_ops::config::Layers;
use evictd_ops::metrics::Registry;
use evictd_ops::readiness::Readiness;
use evictd_wire::live::{Live, LiveEvent};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::cache::{Cache, Entry};
use crate::config::{self, AgentConfig};
use crate::knowledge::Knowledge;
use crate::loads::Loads;
use crate::metrics::{self, LoadOutcome, Metrics};
use crate::origin::LoadError;
use crate::origin::{Loaded, Origin};
use crate::policy::Policies;
use crate::verify::Verifier;

/// Where the log of every test's home region ends at first.
pub(crate) const BASE: u64 = 100;

pub(crate) fn at(position: u64) -> LogPosition {
    LogPosition::new(1, position).unwrap()
}

/// An active key in `api_1` of `ws_1`.
pub(crate) fn key(id: &str) -> KeyRecord {
    KeyRecord {
        key_id: KeyId::new(id),
        api_id: ApiId::new("api_1"),
        workspace_id: WorkspaceId::new("ws_1"),
        state: RecordState::Active,
        name: None,
        meta: None,
        external_id: None,
        permissions: Vec::new(),
        expires_at: None,
    }
}

/// An active root key of `ws_1` with these permissions.
pub(crate) fn root_key(permissions: &[&str]) -> RootKeyRecord {
    RootKeyRecord {
        root_key_id: KeyId::new("root_1"),
        workspace_id: WorkspaceId::new("ws_1"),
        state: RecordState::Active,
        permissions: permissions.iter().map(|permission| Box::from(*permission)).collect(),
        expires_at: None,
    }
}

/// The scope of one key of `api_1`.
pub(crate) fn key_scope(hash: KeyHash) -> Scope {
    Scope::Key { hash, key_id: None, api_id: Some(ApiId::new("api_1")) }
}

/// A row of the log.
pub(crate) fn row(position: LogPosition, scope: Scope) -> Invalidation {
    Invalidation { position, scope, cause: Cause::Deleted, committed_at: clock::wall_now() }
}

pub(crate) fn config(settings: &[(&str, &str)]) -> AgentConfig {
    let layers = Layers::new(config::DEFAULTS);
    let layers = settings.iter().fold(layers, |layers, (key, value)| layers.set(key, value));
    layers.load().unwrap().config
}

/// A home region in memory: records by hash, and the end of its log.
#[derive(Debug)]
pub(crate) struct MemoryHome {
    state: Mutex<HomeState>,
    asked: watch::Sender<usize>,
    answering: watch::Sender<bool>,
}

#[derive(Debug)]
struct HomeState {
    head: LogPosition,
    records: HashMap<KeyHash, Record>,
    fence_age: Duration,
    failure: Option<(LoadOutcome, LoadError)>,
}

impl MemoryHome {
    fn new() -> Self {
        let state =
            HomeState { head: at(BASE), records: HashMap::new(), fence_age: Duration::ZERO, failure: None };
        Self { state: Mutex::new(state), asked: watch::Sender::new(0), answering: watch::Sender::new(true) }
    }

    /// Stores a record. Nobody is told.
    pub(crate) fn put(&self, hash: KeyHash, record: Record) {
        self.state.lock().records.insert(hash, record);
    }

    /// Gives the next position.
    pub(crate) fn advance(&self) -> LogPosition {
        let mut state = self.state.lock();
        state.head = state.head.next().unwrap();
        state.head
    }

    /// From now on the last probe round was this long ago.
    pub(crate) fn set_fence_age(&self, age: Duration) {
        self.state.lock().fence_age = age;
    }

    /// From now on, lookups end like this.
    pub(crate) fn fail(&self, failure: Option<(LoadOutcome, LoadError)>) {
        self.state.lock().failure = failure;
    }

    /// From now on, answers are held back. What they say was read when the question came.
    pub(crate) fn hold(&self) {
        self.answering.send_replace(false);
    }

    /// Sends what was held back.
    pub(crate) fn release(&self) {
        self.answering.send_replace(true);
    }

    /// Lookups so far.
    pub(crate) fn asked(&self) -> usize {
        *self.asked.borrow()
    }

    /// Waits for the lookup with this number, counted from 1.
    pub(crate) async fn is_asked(&self, number: usize) {
        self.asked.subscribe().wait_for(|asked| *asked >= number).await.unwrap();
    }
}

#[async_trait]
impl Origin for MemoryHome {
    async fn lookup(&self, hash: KeyHash) -> Result<Loaded, (LoadOutcome, LoadError)> {
        let read = {
            let state = self.state.lock();
            let record = state.records.get(&hash).cloned().unwrap_or(Record::Absent);
            let read_at = clock::lease_now().before(state.fence_age);
            let loaded = loaded(state.head, record, read_at);
            state.failure.map_or(Ok(loaded), Err)
        };
        self.asked.send_modify(|asked| *asked += 1);
        self.answering.subscribe().wait_for(|answering| *answering).await.unwrap();
        read
    }
}

/// An agent.
pub(crate) struct Agent {
    pub(crate) home: Arc<MemoryHome>,
    pub(crate) knowledge: Arc<Knowledge>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) loads: Loads,
    pub(crate) verifier: Verifier,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) policies: Arc<Policies>,
    pub(crate) readiness: Readiness,
    registry: Registry,
}

impl Agent {
    /// Just started: it has no proof yet, and no base position.
    pub(crate) fn starting(settings: &[(&str, &str)]) -> Self {
        let config = config(settings);
        let registry = Registry::new(metrics::SPECS, &[]).unwrap();
        let metrics = Arc::new(Metrics::new(&registry));
        let knowledge = Arc::new(Knowledge::new(Follower::new(config.follower(), 1), config.bound()));
        let cache = Arc::new(Cache::new(&config.cache));
        let home = Arc::new(MemoryHome::new());
        let loads =
            Loads::new(&config.loads, None, home.clone(), knowledge.clone(), cache.clone(), metrics.clone());
        let policies = Arc::new(Policies::new(&config.partition));
        let verifier =
            Verifier::new(knowledge.clone(), cache.clone(), loads.clone(), policies.clone(), metrics.clone());
        let readiness = Readiness::new();
        Self { home, knowledge, cache, loads, verifier, metrics, policies, readiness, registry }
    }

    /// Proven complete up to [`BASE`].
    pub(crate) fn live() -> Self {
        Self::live_with(&[])
    }

    pub(crate) fn live_with(settings: &[(&str, &str)]) -> Self {
        let agent = Self::starting(settings);
        agent.prove(at(BASE));
        agent
    }

    /// Proven complete up to [`BASE`] when the lease clock began: its lease has run out.
    pub(crate) fn expired_with(settings: &[(&str, &str)]) -> Self {
        let agent = Self::starting(settings);
        agent.prove_at(at(BASE), LeaseTime(1));
        agent
    }

    /// An authority answers a probe.
    pub(crate) fn prove(&self, head: LogPosition) {
        self.prove_at(head, clock::lease_now());
    }

    fn prove_at(&self, head: LogPosition, now: LeaseTime) {
        let mut effects = Vec::new();
        {
            let mut follower = self.knowledge.follower.lock();
            if let Some(followed) = follower.provenance()
                && followed != voucher(head).milestone.provenance
            {
                follower.on_end(followed, now);
            }
            follower.connected(now);
            follower.poll(now, &mut effects);
            let nonce = effects.iter().find_map(|effect| match effect {
                Effect::SendProbe { nonce, .. } => Some(*nonce),
                _ => None,
            });
            let accepted = follower.on_probe_answer(nonce.unwrap(), &voucher(head), true, now, &mut effects);
            assert_eq!(accepted, Accepted::Yes);
        }
        self.perform(effects);
    }

    /// The home region changes what lies in `scope`, and the agent applies that.
    pub(crate) fn invalidate(&self, scope: Scope) -> LogPosition {
        let position = self.home.advance();
        self.apply(row(position, scope));
        position
    }

    /// A row arrives on the live feed.
    pub(crate) fn apply(&self, row: Invalidation) {
        let mut effects = Vec::new();
        let last = voucher(row.position);
        self.knowledge.follower.lock().on_live(&last, vec![row], clock::lease_now(), &mut effects);
        self.perform(effects);
    }

    /// What the follow task does to cache and knowledge.
    fn perform(&self, effects: Vec<Effect>) {
        for effect in effects {
            self.knowledge.perform(&effect, &*self.cache);
        }
    }

    /// It was complete then.
    pub(crate) fn was_proven(&self, at: LeaseTime) {
        self.perform(vec![Effect::Proven(at)]);
    }

    /// A record as of `as_of`, as if it had been read at `read_at`.
    pub(crate) fn loaded(
        &self,
        hash: KeyHash,
        record: Record,
        as_of: LogPosition,
        read_at: LeaseTime,
    ) -> LoadedEntry<Entry> {
        let answer =
            LoadAnswer { hash, source: LoadSource::Authority(PROVENANCE), as_of, read_at, sent_at: read_at };
        let new_entry = |record, validity| self.cache.new_entry(record, validity, read_at);
        LoadedEntry::new(&self.knowledge, answer, record, &mut Vec::new(), new_entry)
    }

    /// Caches such a record, if it meets its floors.
    pub(crate) fn cached(
        &self,
        hash: KeyHash,
        record: Record,
        as_of: LogPosition,
        read_at: LeaseTime,
    ) -> Arc<Entry> {
        let inserted = self.loaded(hash, record, as_of, read_at).insert(&*self.cache);
        inserted.settle(&self.knowledge, &*self.cache).entry().clone()
    }

    /// The value of a counter or gauge, `name{label="value"}`, that holds whole numbers.
    pub(crate) fn metric(&self, series: &str) -> u64 {
        let scrape = self.registry.render();
        let line = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{scrape}")).parse().unwrap()
    }
}

/// The history that they follow in the first epoch.
pub(crate) const PROVENANCE: Provenance = Provenance { store: StoreId(1), incarnation: Incarnation(1) };

pub(crate) fn voucher(at: LogPosition) -> Voucher {
    // Each epoch has one incarnation.
    let provenance = Provenance { incarnation: Incarnation(at.epoch().into()), ..PROVENANCE };
    let milestone = Milestone { provenance, at, token: LogToken(at.position()) };
    Voucher { milestone, mac: [0; 16] }
}

/// What a store says of a record at `as_of`.
pub(crate) fn lookup(as_of: LogPosition, record: Record) -> Lookup {
    let Milestone { provenance, at, token } = voucher(as_of).milestone;
    Lookup { as_of: at, provenance, token, record }
}

/// The same, as the authority's answer.
pub(crate) fn loaded(as_of: LogPosition, record: Record, read_at: LeaseTime) -> Loaded {
    Loaded { lookup: lookup(as_of, record), source: LoadSource::Authority(PROVENANCE), read_at }
}

/// Rows as they come on the live feed.
pub(crate) fn live(rows: &[Invalidation]) -> Bytes {
    let voucher = voucher(rows[rows.len() - 1].position);
    Live { voucher, event: LiveEvent::Invalidations(rows.to_vec()) }.encode()
}

/// The end of a key, `from_now` ahead on the wall clock.
pub(crate) fn ends_in(from_now: Duration) -> StoreTime {
    StoreTime(clock::wall_now().0 + i64::try_from(from_now.as_micros()).unwrap())
}
