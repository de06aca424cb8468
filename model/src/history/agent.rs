//! An agent: the core's, with the history that it follows inside, and one cached key.
//!
//! Leases never expire here, so that an agent answers whatever its floors don't forbid. Its clock is stopped, so it may
//! conclude at any moment that its own history is silent, as after a leave message.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use evictd_core::floors::FloorLimits;
use evictd_core::follower::{Effect, LoadSource, ReplayOutcome};
use evictd_core::history::{Past, Provenance, Voucher};
use evictd_core::invalidation::Cause;
use evictd_core::lease::Bound;
use evictd_core::position::LogPosition;
use evictd_core::serving::{EntryCache, LoadAnswer};
use evictd_core::time::LeaseTime;

use super::store::{DELETION, HistoryRow, HistoryStore};
use crate::core_agent::{CoreAgent, ModelEntry};
use crate::script::{ChangeId, ModelKey, Script, View};

/// Long enough for no lease to run out.
const BOUND: Duration = Duration::from_secs(100);

/// What the clock shows.
const NOW: LeaseTime = LeaseTime(1_000_000_000);

/// So many probes under way differ enough.
const PROBES_MAX: usize = 2;

/// What may have happened to the key.
const SCRIPT: Script = Script(&[DELETION]);

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

#[derive(Clone, Debug)]
pub struct HistoryAgent {
    core: CoreAgent,
    /// Where the deletion was applied, however many positions before it are missing.
    deleted_at: Option<LogPosition>,
    /// It has applied the deletion, and so may have confirmed it.
    pub has_applied: bool,
    /// Probes that answers are still accepted to.
    pub probes: Vec<PendingProbe>,
    pub answers: Vec<PendingProbeAnswer>,
    /// The query for missing rows: number, first and last position.
    replay_query: Option<(u64, u64, u64)>,
    /// Agents with the same digest behave alike.
    digest: u64,
}

impl PartialEq for HistoryAgent {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Hash for HistoryAgent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl HistoryAgent {
    /// A process that follows no history yet.
    pub fn start(process: u8) -> Self {
        let bound =
            Bound::new(BOUND, BOUND / 10).unwrap_or_else(|error| unreachable!("a tenth is allowed: {error}"));
        let mut agent = Self {
            core: CoreAgent::new(bound, FloorLimits { keys: 8, scopes: 8 }, process),
            deleted_at: None,
            has_applied: false,
            probes: Vec::new(),
            answers: Vec::new(),
            replay_query: None,
            digest: 0,
        };
        agent.settle(Vec::new());
        agent
    }

    pub fn follows(&self) -> Option<Provenance> {
        self.core.follower().provenance()
    }

    /// Whether `store` has what it has received.
    pub fn is_known_to(&self, store: &HistoryStore) -> bool {
        self.seen().is_none_or(|seen| store.judge(&seen.milestone) != Past::Unknown)
    }

    /// Whether it misses rows that a publisher of `provenance` may answer with.
    pub fn misses_rows_of(&self, provenance: Provenance) -> bool {
        self.core.follower().head() > self.applied() && self.follows() == Some(provenance)
    }

    pub fn applied(&self) -> LogPosition {
        self.core.applied()
    }

    /// Whether it answers VALID from its cache.
    pub fn answers_valid(&self) -> bool {
        self.core.hit(NOW).is_some_and(|hit| hit.entry().view.is_empty())
    }

    /// Whether another probe shows more: it proves more than the last one, or there is none under way.
    pub fn may_probe(&self) -> bool {
        let seen = self.probes.last().map(|probe| probe.seen);
        self.probes.len() < PROBES_MAX && seen != Some(self.seen())
    }

    fn seen(&self) -> Option<Voucher> {
        let mut effects = Vec::new();
        let (mut copy, _) = self.core.follower().fork();
        copy.connected(NOW);
        copy.poll(NOW, &mut effects);
        effects.into_iter().find_map(|effect| match effect {
            Effect::SendProbe { seen, .. } => seen,
            _ => None,
        })
    }

    /// Nothing arrives of its own history for some time.
    pub fn notice_silence(&mut self) {
        if let Some(own) = self.follows() {
            self.core.follower().on_end(own, NOW);
            self.settle(Vec::new());
        }
    }

    /// It probes, as after a reconnect.
    pub fn probe(&mut self) {
        self.core.follower().connected(NOW);
        self.follow(|agent, effects| agent.follower().poll(NOW, effects));
    }

    /// A tick or a row of the live feed arrives.
    pub fn receive(&mut self, voucher: &Voucher, row: Option<&HistoryRow>) {
        self.follow(|agent, effects| match row {
            Some(row) => agent.follower().on_live(voucher, vec![row.invalidation()], NOW, effects),
            None => agent.follower().on_tick(voucher, NOW, effects),
        });
    }

    /// An answer is sent to one of its probes. One of its own history arrives at once: while the agent follows that, the
    /// answer proves no more later, and afterwards the probe's past is no longer the newest.
    pub fn send_answer(&mut self, answer: PendingProbeAnswer) {
        let head = answer.head.milestone;
        if self.follows() == Some(head.provenance) {
            let known = self.core.follower().head();
            if known < head.at || known == self.applied() {
                self.receive_answer(answer);
            }
        } else if !self.answers.contains(&answer) {
            self.answers.push(answer);
            self.settle(Vec::new());
        }
    }

    pub fn receive_answer(&mut self, answer: PendingProbeAnswer) {
        let mut effects = Vec::new();
        self.core.follower().on_probe_answer(answer.nonce, &answer.head, true, NOW, &mut effects);
        let flushes = effects.iter().any(|effect| matches!(effect, Effect::Flush(_)));
        // Its base covers what it never received.
        self.has_applied |= flushes && answer.deleted;
        self.settle(effects);
    }

    /// It queries missing rows, and a publisher of `store` answers at once.
    pub fn repair(&mut self, store: &HistoryStore) {
        self.follow(|agent, effects| agent.follower().poll(NOW, effects));
        let Some((nonce, from, to)) = self.replay_query else { return };
        let (from, to) = (from as usize - 1, (to as usize).min(store.rows.len()));
        if from < to {
            let rows = store.rows[from..to].iter().map(HistoryRow::invalidation).collect();
            self.follow(|agent, effects| {
                let answer = ReplayOutcome::Rows(rows);
                agent.follower().on_replay_answer(nonce, store.provenance(), answer, NOW, effects);
            });
        }
    }

    /// A load is answered from `store`, at once. What it may not be cached for it doesn't answer either.
    pub fn load(&mut self, store: &HistoryStore) {
        let view: View = store.has(DELETION).then_some(ChangeId(0)).into_iter().collect();
        let head = store.voucher().milestone;
        let (hash, source) = (ModelKey::A.key_hash(), LoadSource::Authority(head.provenance));
        let answer = LoadAnswer { hash, source, as_of: head.at, read_at: NOW, sent_at: NOW };
        self.follow(|agent, effects| {
            agent.load(answer, SCRIPT.record(view), view, effects);
        });
    }

    /// The lease of what it caches ran out.
    pub fn expire(&mut self) {
        self.core.cache.clear();
        self.settle(Vec::new());
    }

    fn follow(&mut self, step: impl FnOnce(&CoreAgent, &mut Vec<Effect>)) {
        let mut effects = Vec::new();
        step(&self.core, &mut effects);
        self.settle(effects);
    }

    /// Ends a step: performs its effects in their order, drops what can have no effect anymore, and takes the digest.
    fn settle(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.core.perform(&effect);
            match effect {
                Effect::Applied { invalidation, .. } if invalidation.cause == Cause::Deleted => {
                    self.deleted_at = Some(invalidation.position);
                }
                Effect::Progress { applied, .. } => {
                    let covers = |at: LogPosition| at <= applied && at.epoch() == applied.epoch();
                    self.has_applied |= self.deleted_at.is_some_and(covers);
                }
                Effect::SendProbe { nonce, seen, .. } => self.probes.push(PendingProbe { nonce, seen }),
                Effect::SendReplay { nonce, from, to, .. } => self.replay_query = Some((nonce, from, to)),
                _ => {}
            }
        }
        // Whether the floors of the key's API are kept, they are the same.
        self.core.follower().anchors(&SCRIPT.record(View::default()), &mut Vec::new());
        if !self.answers_valid() {
            self.core.cache.clear();
        }
        let follower = self.core.follower();
        self.probes.retain(|probe| follower.awaits(probe.nonce));
        self.answers.retain(|answer| follower.awaits(answer.nonce));
        let mut hasher = DefaultHasher::new();
        follower.digest(NOW, false, &mut hasher);
        (self.deleted_at, self.has_applied, self.core.state.proven_at(), self.applied()).hash(&mut hasher);
        let cached = |ModelEntry { validity, .. }: &ModelEntry| (validity.as_of(), validity.anchors.floor());
        self.core.cache.place().as_deref().map(cached).hash(&mut hasher);
        for probe in &self.probes {
            (0, follower.request_rank(probe.nonce), probe.seen).hash(&mut hasher);
        }
        let answers = self.answers.iter().map(|answer| {
            let head = answer.head.milestone;
            let rank = follower.request_rank(answer.nonce);
            (rank, head.provenance, head.at, head.token, answer.deleted)
        });
        answers.collect::<BTreeSet<_>>().hash(&mut hasher);
        drop(follower);
        self.digest = hasher.finish();
    }
}
