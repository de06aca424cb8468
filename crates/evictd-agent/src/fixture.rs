//! An agent without a bus, for tests. Its home region is in memory, and messages take effect at once.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use evictd_core::follower::{Accepted, Effect, LoadSource};
use evictd_core::history::{Incarnation, LogToken, Milestone, Provenance, StoreId, Voucher};
use evictd_core::ids::{ApiId, KeyHash, KeyId, WorkspaceId};
use evictd_core::invalidation::{Cause, Invalidation, Scope};
use evictd_core::position::LogPosition;
use evictd_core::record::{KeyRecord, Lookup, Record, RecordState, RootKeyRecord};
use evictd_core::serving::{LoadAnswer, LoadedEntry};
use evictd_core::time::{LeaseTime, StoreTime};
use evictd_ops::clock;
use evictd_ops::config::Layers;
use evictd_wire::live::{Live, LiveEvent};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::AgentParts;
use crate::cache::CachedRecord;
use crate::config::{self, AgentConfig};
use crate::loads::Loads;
use crate::metrics::LoadOutcome;
use crate::origin::{LoadError, LoadedRecord, Origin};
use crate::verify::Verifier;

/// The initial head of every test's home region.
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

pub(crate) fn row(position: LogPosition, scope: Scope) -> Invalidation {
    Invalidation { position, scope, cause: Cause::Deleted, committed_at: clock::wall_now() }
}

pub(crate) fn config(settings: &[(&str, &str)]) -> AgentConfig {
    let layers = Layers::new(config::DEFAULTS).set("agent", "agent-1").set("shutdown.delay", "0s");
    let layers = settings.iter().fold(layers, |layers, (key, value)| layers.set(key, value));
    layers.load().unwrap().config
}

/// A home region in memory: records by hash, and the head of its log.
#[derive(Debug)]
pub(crate) struct MemoryHome {
    state: Mutex<HomeState>,
    lookups: watch::Sender<usize>,
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
        Self { state: Mutex::new(state), lookups: watch::Sender::new(0), answering: watch::Sender::new(true) }
    }

    /// Stores a record without an invalidation.
    pub(crate) fn put(&self, hash: KeyHash, record: Record) {
        self.state.lock().records.insert(hash, record);
    }

    /// Assigns the next position.
    pub(crate) fn advance(&self) -> LogPosition {
        let mut state = self.state.lock();
        state.head = state.head.next().unwrap();
        state.head
    }

    /// Sets the age of the last probe round.
    pub(crate) fn set_fence_age(&self, age: Duration) {
        self.state.lock().fence_age = age;
    }

    /// Makes later lookups fail so.
    pub(crate) fn fail(&self, failure: Option<(LoadOutcome, LoadError)>) {
        self.state.lock().failure = failure;
    }

    /// Holds later answers back. Records are still read when the query arrives.
    pub(crate) fn hold(&self) {
        self.answering.send_replace(false);
    }

    /// Sends the answers that were held back.
    pub(crate) fn release(&self) {
        self.answering.send_replace(true);
    }

    /// Returns the number of lookups so far.
    pub(crate) fn lookups(&self) -> usize {
        *self.lookups.borrow()
    }

    /// Waits for the lookup with this number, counted from 1.
    pub(crate) async fn wait_for_lookup(&self, number: usize) {
        self.lookups.subscribe().wait_for(|lookups| *lookups >= number).await.unwrap();
    }
}

#[async_trait]
impl Origin for MemoryHome {
    async fn lookup(&self, hash: KeyHash) -> Result<LoadedRecord, (LoadOutcome, LoadError)> {
        let read = {
            let state = self.state.lock();
            let record = state.records.get(&hash).cloned().unwrap_or(Record::Absent);
            let read_at = clock::lease_now().before(state.fence_age);
            let loaded = loaded(state.head, record, read_at);
            state.failure.map_or(Ok(loaded), Err)
        };
        self.lookups.send_modify(|lookups| *lookups += 1);
        self.answering.subscribe().wait_for(|answering| *answering).await.unwrap();
        read
    }
}

/// An agent's parts, with a home region in memory.
pub(crate) struct TestAgent {
    pub(crate) parts: AgentParts,
    pub(crate) home: Arc<MemoryHome>,
    pub(crate) loads: Loads,
    pub(crate) verifier: Verifier,
}

impl Deref for TestAgent {
    type Target = AgentParts;

    fn deref(&self) -> &AgentParts {
        &self.parts
    }
}

impl TestAgent {
    /// Just started: without a proof and a base position.
    pub(crate) fn starting(settings: &[(&str, &str)]) -> Self {
        let parts = AgentParts::new(config(settings)).unwrap();
        let home = Arc::new(MemoryHome::new());
        let loads = parts.loads(None, home.clone());
        Self { home, verifier: parts.verifier(loads.clone()), loads, parts }
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

    /// Proven complete up to [`BASE`] at the start of the lease clock: its lease has expired.
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
            let mut follower = self.serving.follower.lock();
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

    /// The home region changes `scope`, and the agent applies that.
    pub(crate) fn invalidate(&self, scope: Scope) -> LogPosition {
        let position = self.home.advance();
        self.apply(row(position, scope));
        position
    }

    /// A row arrives on the live feed.
    pub(crate) fn apply(&self, row: Invalidation) {
        let mut effects = Vec::new();
        let last = voucher(row.position);
        self.serving.follower.lock().on_live(&last, vec![row], clock::lease_now(), &mut effects);
        self.perform(effects);
    }

    fn perform(&self, effects: Vec<Effect>) {
        for effect in effects {
            self.serving.perform(&effect, &*self.cache);
        }
    }

    /// Moves the last proof to `at`.
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
    ) -> LoadedEntry<CachedRecord> {
        let answer =
            LoadAnswer { hash, source: LoadSource::Authority(PROVENANCE), as_of, read_at, sent_at: read_at };
        let new_entry = |record, validity| self.cache.new_entry(record, validity, read_at);
        LoadedEntry::new(&self.serving, answer, record, &mut Vec::new(), new_entry)
    }

    /// Caches such a record, if it meets its floors.
    pub(crate) fn cached(
        &self,
        hash: KeyHash,
        record: Record,
        as_of: LogPosition,
        read_at: LeaseTime,
    ) -> Arc<CachedRecord> {
        let inserted = self.loaded(hash, record, as_of, read_at).insert(&*self.cache);
        inserted.settle(&self.serving, &*self.cache).entry().clone()
    }

    /// The value of a counter or gauge, `name{label="value"}`, that holds whole numbers.
    pub(crate) fn metric(&self, series: &str) -> u64 {
        // Every series has these labels.
        const OWN: &str = r#"region="local",agent="agent-1""#;
        let scrape = self.registry.render();
        let scrape = scrape.replace(&format!("{{{OWN}}}"), "").replace(&format!("{OWN},"), "");
        let line = scrape.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{scrape}")).parse().unwrap()
    }
}

/// The history that test agents follow in the first epoch.
pub(crate) const PROVENANCE: Provenance = Provenance { store: StoreId(1), incarnation: Incarnation(1) };

pub(crate) fn voucher(at: LogPosition) -> Voucher {
    // Each epoch has one incarnation.
    let provenance = Provenance { incarnation: Incarnation(at.epoch().into()), ..PROVENANCE };
    let milestone = Milestone { provenance, at, token: LogToken(at.position()) };
    Voucher { milestone, mac: [0; 16] }
}

/// A store's record at `as_of`.
pub(crate) fn lookup(as_of: LogPosition, record: Record) -> Lookup {
    let Milestone { provenance, at, token } = voucher(as_of).milestone;
    Lookup { as_of: at, provenance, token, record }
}

/// The authority's answer with that record.
pub(crate) fn loaded(as_of: LogPosition, record: Record, read_at: LeaseTime) -> LoadedRecord {
    LoadedRecord { lookup: lookup(as_of, record), source: LoadSource::Authority(PROVENANCE), read_at }
}

/// Rows as a message of the live feed.
pub(crate) fn live(rows: &[Invalidation]) -> Bytes {
    let voucher = voucher(rows[rows.len() - 1].position);
    Live { voucher, event: LiveEvent::Invalidations(rows.to_vec()) }.encode()
}

/// The expiry of a key, `from_now` ahead on the wall clock.
pub(crate) fn ends_in(from_now: Duration) -> StoreTime {
    StoreTime(clock::wall_now().0 + i64::try_from(from_now.as_micros()).unwrap())
}
