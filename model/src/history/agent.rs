//! An agent: the core's follower, with the history that it follows inside, and one cached key.
//!
//! Leases never expire here, so that an agent answers whatever its floors don't forbid. Its clock stands still, so it may
//! conclude at any moment that its own history is silent, as after a leave message.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use evictd_core::entry::Validity;
use evictd_core::floors::FloorLimits;
use evictd_core::follower::{Effect, Follower, FollowerConfig, LoadSource, ReplayOutcome};
use evictd_core::history::{Past, Provenance, Voucher};
use evictd_core::ids::KeyHash;
use evictd_core::invalidation::Cause;
use evictd_core::lease::Bound;
use evictd_core::position::LogPosition;
use evictd_core::serving::{AgentState, CacheEntry, EntryCache, HitVerdict, LoadAnswer, LoadedEntry};
use evictd_core::time::LeaseTime;

use super::store::{DELETION, HistoryRow, HistoryStore};
use crate::script::{ChangeId, ModelKey, Script, View};

/// Long enough for no lease to run out.
const BOUND: Duration = Duration::from_secs(100);

/// What the clock shows.
const NOW: LeaseTime = LeaseTime(1_000_000_000);

/// So many probes under way differ enough.
const PROBES_MAX: usize = 2;

/// What may have happened to the key.
const SCRIPT: Script = Script(&[DELETION]);

const TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct HistoryEntry {
    deleted: bool,
    validity: Validity,
}

impl CacheEntry for HistoryEntry {
    fn validity(&self) -> &Validity {
        &self.validity
    }
}

#[derive(Debug, Default)]
struct OneKeyCache(Mutex<Option<Arc<HistoryEntry>>>);

impl OneKeyCache {
    fn place(&self) -> MutexGuard<'_, Option<Arc<HistoryEntry>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EntryCache for OneKeyCache {
    type Entry = HistoryEntry;

    fn get(&self, hash: &KeyHash) -> Option<Arc<HistoryEntry>> {
        self.place().clone().filter(|_| *hash == ModelKey::A.key_hash())
    }

    fn insert_hidden(&self, _: KeyHash, entry: Arc<HistoryEntry>) {
        *self.place() = Some(entry);
    }

    fn evict(&self, hash: &KeyHash) -> Option<Arc<HistoryEntry>> {
        self.place().take_if(|_| *hash == ModelKey::A.key_hash())
    }

    fn clear(&self) {
        *self.place() = None;
    }
}

/// The answer to a probe, under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PendingProbeAnswer {
    pub nonce: u64,
    /// How far the log reaches.
    pub head: Voucher,
    pub deleted: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PendingProbe {
    pub nonce: u64,
    /// What it proves.
    pub seen: Option<Voucher>,
}

#[derive(Debug)]
pub struct HistoryAgent {
    state: AgentState,
    cache: OneKeyCache,
    /// Where the deletion was applied, however many positions before it are missing.
    deleted_at: Option<LogPosition>,
    /// It has applied the deletion, and so may have confirmed it.
    pub has_applied: bool,
    /// Probes that answers are still accepted to.
    pub probes: Vec<PendingProbe>,
    pub answers: Vec<PendingProbeAnswer>,
    /// The replay that it asked for: number, first and last position.
    wanted: Option<(u64, u64, u64)>,
    print: u64,
}

impl PartialEq for HistoryAgent {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Hash for HistoryAgent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

fn bound() -> Bound {
    Bound::new(BOUND, BOUND / 10).unwrap_or_else(|error| unreachable!("a tenth is allowed: {error}"))
}

impl HistoryAgent {
    /// A process that follows no history yet. Its questions have numbers that no other process uses.
    pub fn start(process: u8) -> Self {
        let config = FollowerConfig {
            bound: bound(),
            probe_interval: TIMEOUT,
            request_timeout: TIMEOUT,
            gap_patience: Duration::ZERO,
            floors: FloorLimits { keys: 8, scopes: 8 },
            home_store: None,
        };
        let mut agent = Self {
            state: AgentState::new(Follower::new(config, 1 + 1000 * u64::from(process)), bound()),
            cache: OneKeyCache::default(),
            deleted_at: None,
            has_applied: false,
            probes: Vec::new(),
            answers: Vec::new(),
            wanted: None,
            print: 0,
        };
        agent.seal();
        agent
    }

    pub fn follows(&self) -> Option<Provenance> {
        self.state.follower.lock().provenance()
    }

    /// Whether `store` has what it has received.
    pub fn is_known_to(&self, store: &HistoryStore) -> bool {
        self.seen().is_none_or(|seen| store.judge(&seen.milestone) != Past::Unknown)
    }

    /// Whether it misses rows that a publisher of `provenance` may answer with.
    pub fn misses_rows_of(&self, provenance: Provenance) -> bool {
        self.state.follower.lock().head() > self.applied() && self.follows() == Some(provenance)
    }

    pub fn applied(&self) -> LogPosition {
        self.state.applied()
    }

    /// Whether it answers VALID from its cache.
    pub fn answers_valid(&self) -> bool {
        let reading = self.state.begin(NOW);
        let found = reading.find(&self.state, &self.cache, &ModelKey::A.key_hash());
        let verdict = found.map(|candidate| candidate.judge(&self.state));
        matches!(verdict, Some(HitVerdict::Servable(hit)) if !hit.entry().deleted)
    }

    /// Nothing came from its own history for some time.
    #[must_use]
    pub fn waits(&self) -> Self {
        self.after(|agent, _| {
            if let Some(own) = agent.follows() {
                agent.state.follower.lock().on_end(own, NOW);
            }
        })
    }

    /// Whether another probe shows more: it proves more than the last one, or there is none under way.
    pub fn may_probe(&self) -> bool {
        let seen = self.probes.last().map(|probe| probe.seen);
        self.probes.len() < PROBES_MAX && seen != Some(self.seen())
    }

    fn seen(&self) -> Option<Voucher> {
        let (mut copy, _) = self.state.follower.lock().fork();
        let mut effects = Vec::new();
        copy.connected(NOW);
        copy.poll(NOW, &mut effects);
        effects.into_iter().find_map(|effect| match effect {
            Effect::SendProbe { seen, .. } => seen,
            _ => None,
        })
    }

    /// It probes, as after a reconnect.
    #[must_use]
    pub fn probes(&self) -> Self {
        self.after(|agent, effects| {
            agent.state.follower.lock().connected(NOW);
            agent.state.follower.lock().poll(NOW, effects);
        })
    }

    /// A tick or a row of the live feed arrives.
    #[must_use]
    pub fn receives(&self, voucher: &Voucher, row: Option<&HistoryRow>) -> Self {
        self.after(|agent, effects| match row {
            Some(row) => agent.state.follower.lock().on_live(voucher, vec![row.invalidation()], NOW, effects),
            None => agent.state.follower.lock().on_tick(voucher, NOW, effects),
        })
    }

    /// An answer is sent to one of its probes. One of its own history arrives at once: while the agent follows that, it
    /// says no more later, and afterwards the probe's past is no longer the newest.
    #[must_use]
    pub fn is_answered(&self, answer: PendingProbeAnswer) -> Self {
        let head = answer.head.milestone;
        if self.follows() == Some(head.provenance) {
            let follower = self.state.follower.lock();
            let adds = follower.head() < head.at || follower.head() == self.applied();
            drop(follower);
            return if adds { self.receives_answer(answer) } else { self.after(|_, _| {}) };
        }
        self.after(|agent, _| {
            if !agent.answers.contains(&answer) {
                agent.answers.push(answer);
            }
        })
    }

    #[must_use]
    pub fn receives_answer(&self, answer: PendingProbeAnswer) -> Self {
        self.after(|agent, effects| {
            agent.state.follower.lock().on_probe_answer(answer.nonce, &answer.head, true, NOW, effects);
            let flushes = effects.iter().any(|effect| matches!(effect, Effect::Flush(_)));
            // Its base covers what it never received.
            agent.has_applied |= flushes && answer.deleted;
        })
    }

    /// It queries missing rows, and a publisher of `store` answers at once.
    #[must_use]
    pub fn repairs(&self, store: &HistoryStore) -> Self {
        let asked = self.after(|agent, effects| agent.state.follower.lock().poll(NOW, effects));
        let Some((nonce, from, to)) = asked.wanted else { return asked };
        let (from, to) = (from as usize - 1, (to as usize).min(store.rows.len()));
        if from >= to {
            return asked;
        }
        let rows = store.rows[from..to].iter().map(HistoryRow::invalidation).collect();
        asked.after(|agent, effects| {
            let answer = ReplayOutcome::Rows(rows);
            agent.state.follower.lock().on_replay_answer(nonce, store.provenance(), answer, NOW, effects);
        })
    }

    /// A load is answered from `store`, at once. What it may not be cached for it doesn't answer either.
    #[must_use]
    pub fn loads(&self, store: &HistoryStore) -> Self {
        let changes = store.has(DELETION).then_some(ChangeId(0));
        let record = SCRIPT.record(ModelKey::A, changes.into_iter().collect());
        self.after(|agent, effects| {
            let head = store.voucher().milestone;
            let source = LoadSource::Authority(head.provenance);
            let hash = ModelKey::A.key_hash();
            let answer = LoadAnswer { hash, source, as_of: head.at, read_at: NOW, sent_at: NOW };
            let new_entry = |_, validity| HistoryEntry { deleted: store.has(DELETION), validity };
            LoadedEntry::new(&agent.state, answer, record, effects, new_entry)
                .insert(&agent.cache)
                .settle(&agent.state, &agent.cache);
        })
    }

    /// The lease of what it caches ran out.
    #[must_use]
    pub fn expires(&self) -> Self {
        self.after(|agent, _| agent.cache.clear())
    }

    fn after(&self, step: impl FnOnce(&mut Self, &mut Vec<Effect>)) -> Self {
        let mut agent = self.fork();
        let mut effects = Vec::new();
        step(&mut agent, &mut effects);
        for effect in effects {
            agent.perform(&effect);
        }
        agent.seal();
        agent
    }

    fn fork(&self) -> Self {
        let (state, mut fork_map) = self.state.fork();
        let copy = |entry: &Arc<HistoryEntry>| HistoryEntry {
            deleted: entry.deleted,
            validity: entry.validity.fork(&mut fork_map),
        };
        let cache = OneKeyCache(Mutex::new(self.cache.place().as_ref().map(copy).map(Arc::new)));
        Self { state, cache, probes: self.probes.clone(), answers: self.answers.clone(), ..*self }
    }

    fn perform(&mut self, effect: &Effect) {
        self.state.perform(effect, &self.cache);
        match *effect {
            Effect::Applied { ref invalidation, .. } if invalidation.cause == Cause::Deleted => {
                self.deleted_at = Some(invalidation.position);
            }
            Effect::Progress { applied, .. } => {
                let covers = |at: LogPosition| at <= applied && at.epoch() == applied.epoch();
                self.has_applied |= self.deleted_at.is_some_and(covers);
            }
            Effect::SendProbe { nonce, seen, .. } => self.probes.push(PendingProbe { nonce, seen }),
            Effect::SendReplay { nonce, from, to, .. } => self.wanted = Some((nonce, from, to)),
            _ => {}
        }
    }

    /// Drops what can have no effect any more, and takes the print.
    fn seal(&mut self) {
        // Whether the floors of the key's API are kept, they are the same.
        self.state.follower.lock().anchors(&SCRIPT.record(ModelKey::A, View::default()), &mut Vec::new());
        if !self.answers_valid() {
            self.cache.clear();
        }
        let follower = self.state.follower.lock();
        self.probes.retain(|probe| follower.awaits(probe.nonce));
        self.answers.retain(|answer| follower.awaits(answer.nonce));
        let mut hasher = DefaultHasher::new();
        follower.digest(NOW, false, &mut hasher);
        (self.deleted_at, self.has_applied, self.state.proven_at(), self.state.applied()).hash(&mut hasher);
        let place = self.cache.place();
        place
            .as_deref()
            .map(|HistoryEntry { validity, .. }| (validity.as_of(), validity.anchors.floor()))
            .hash(&mut hasher);
        for probe in &self.probes {
            (0, follower.request_rank(probe.nonce), probe.seen).hash(&mut hasher);
        }
        let answers: BTreeSet<_> = self
            .answers
            .iter()
            .map(|answer| {
                let Voucher { milestone, .. } = answer.head;
                (
                    follower.request_rank(answer.nonce),
                    milestone.provenance,
                    milestone.at,
                    milestone.token,
                    answer.deleted,
                )
            })
            .collect();
        answers.hash(&mut hasher);
        self.print = hasher.finish();
    }
}
