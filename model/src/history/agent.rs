//! An agent: the core's follower, with the history that it follows inside, and one cached key.
//!
//! Leases never run out here, so that an agent answers whatever its floors don't forbid. Its clock stands still: that its
//! own history is silent it concludes at any moment, as after a goodbye.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use evictd_core::entry::{Reading, Stamp, Standing};
use evictd_core::floors::FloorLimits;
use evictd_core::follower::{Effect, Follower, FollowerConfig, ReplayAnswer, evicts_one};
use evictd_core::history::{Past, Provenance, Voucher};
use evictd_core::lease::Bound;
use evictd_core::position::LogPosition;
use evictd_core::time::LeaseTime;

use super::store::{DELETION, Row, Store};
use crate::script::{ChangeId, Key, Script, View};

/// Long enough for no lease to run out.
const BOUND: Duration = Duration::from_secs(100);

/// What the clock shows.
const NOW: LeaseTime = LeaseTime(1_000_000_000);

/// So many probes under way differ enough.
const PROBES_MAX: usize = 2;

/// What may have happened to the key.
const SCRIPT: Script = Script(&[DELETION]);

const TIMEOUT: Duration = Duration::from_secs(1);

/// The answer to a probe, under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ProbeAnswer {
    /// The probe's number.
    pub nonce: u64,
    /// How far the log reaches.
    pub head: Voucher,
    /// Whether the deletion is in it.
    pub deleted: bool,
}

/// A probe under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Probe {
    /// Its number.
    pub nonce: u64,
    /// What it proves.
    pub seen: Option<Voucher>,
}

/// An agent process.
#[derive(Debug)]
pub struct Agent {
    follower: Follower,
    /// The cached record of the key, which was valid when it was read.
    entry: Option<Stamp>,
    /// Where the deletion was applied, however many positions before it are missing.
    deleted_at: Option<LogPosition>,
    /// It has applied the deletion, and so may have confirmed it.
    pub told: bool,
    /// Probes that answers are still accepted to.
    pub probes: Vec<Probe>,
    /// Answers under way.
    pub answers: Vec<ProbeAnswer>,
    /// The replay that it asked for: number, first and last position.
    wanted: Option<(u64, u64, u64)>,
    proven_at: LeaseTime,
    applied: LogPosition,
    print: u64,
}

impl PartialEq for Agent {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Hash for Agent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

fn bound() -> Bound {
    Bound::new(BOUND, BOUND / 10).unwrap_or_else(|error| unreachable!("a tenth is allowed: {error}"))
}

impl Agent {
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
            follower: Follower::new(config, 1 + 1000 * u64::from(process)),
            entry: None,
            deleted_at: None,
            told: false,
            probes: Vec::new(),
            answers: Vec::new(),
            wanted: None,
            proven_at: LeaseTime(0),
            applied: LogPosition::ZERO,
            print: 0,
        };
        agent.seal();
        agent
    }

    /// Whose history it follows.
    pub fn follows(&self) -> Option<Provenance> {
        self.follower.provenance()
    }

    /// Whether `store` knows what it has seen.
    pub fn is_known_to(&self, store: &Store) -> bool {
        self.seen().is_none_or(|seen| store.judge(&seen.milestone) != Past::Unknown)
    }

    /// Whether it misses rows that a publisher of `provenance` may answer with.
    pub fn misses_rows_of(&self, provenance: Provenance) -> bool {
        self.follower.head() > self.applied && self.follows() == Some(provenance)
    }

    /// What was applied.
    pub fn applied(&self) -> LogPosition {
        self.applied
    }

    /// Whether it answers VALID from its cache.
    pub fn answers_valid(&self) -> bool {
        let reading = Reading { now: NOW, proven_at: self.proven_at, applied: self.applied };
        self.entry.as_ref().is_some_and(|entry| {
            entry.standing(reading, self.follower.floors().horizon(), bound()) == Standing::Servable
        })
    }

    /// Nothing came from its own history for some time.
    #[must_use]
    pub fn waits(&self) -> Self {
        self.after(|agent, _| {
            if let Some(own) = agent.follows() {
                agent.follower.on_end(own, NOW);
            }
        })
    }

    /// Whether another probe shows more: it proves more than the last one, or there is none under way.
    pub fn may_probe(&self) -> bool {
        let seen = self.probes.last().map(|probe| probe.seen);
        self.probes.len() < PROBES_MAX && seen != Some(self.seen())
    }

    fn seen(&self) -> Option<Voucher> {
        let (mut copy, _) = self.follower.fork();
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
            agent.follower.connected(NOW);
            agent.follower.poll(NOW, effects);
        })
    }

    /// A tick or a row of the live feed arrives.
    #[must_use]
    pub fn receives(&self, voucher: &Voucher, row: Option<&Row>) -> Self {
        self.after(|agent, effects| match row {
            Some(row) => agent.follower.on_live(voucher, vec![row.invalidation()], NOW, effects),
            None => agent.follower.on_tick(voucher, NOW, effects),
        })
    }

    /// An answer is sent to one of its probes. One of its own history arrives at once: while the agent follows that, it
    /// says no more later, and afterwards the probe's past is no longer the newest.
    #[must_use]
    pub fn is_answered(&self, answer: ProbeAnswer) -> Self {
        let head = answer.head.milestone;
        if self.follows() == Some(head.provenance) {
            let adds = self.follower.head() < head.at || self.follower.head() == self.applied;
            return if adds { self.receives_answer(answer) } else { self.after(|_, _| {}) };
        }
        self.after(|agent, _| {
            if !agent.answers.contains(&answer) {
                agent.answers.push(answer);
            }
        })
    }

    /// That answer arrives.
    #[must_use]
    pub fn receives_answer(&self, answer: ProbeAnswer) -> Self {
        self.after(|agent, effects| {
            agent.follower.on_probe_answer(answer.nonce, &answer.head, NOW, effects);
            let flushes = effects.iter().any(|effect| matches!(effect, Effect::Flush(_)));
            // Its base covers what it never received.
            agent.told |= flushes && answer.deleted;
        })
    }

    /// It asks for what it misses, and a publisher of `store` answers at once.
    #[must_use]
    pub fn repairs(&self, store: &Store) -> Self {
        let asked = self.after(|agent, effects| agent.follower.poll(NOW, effects));
        let Some((nonce, from, to)) = asked.wanted else { return asked };
        let (from, to) = (from as usize - 1, (to as usize).min(store.rows.len()));
        if from >= to {
            return asked;
        }
        let rows = store.rows[from..to].iter().map(Row::invalidation).collect();
        asked.after(|agent, effects| {
            let answer = ReplayAnswer::Rows(rows);
            agent.follower.on_replay_answer(nonce, store.provenance(), answer, NOW, effects);
        })
    }

    /// A load is answered from `store`, at once. What it may not be cached for it doesn't answer either.
    #[must_use]
    pub fn loads(&self, store: &Store) -> Self {
        let changes = store.has(DELETION).then_some(ChangeId(0));
        let record = SCRIPT.record(Key::A, changes.into_iter().collect());
        self.after(|agent, effects| {
            let (head, hash) = (store.voucher().milestone, Key::A.key_hash());
            let anchors = agent.follower.anchors(&record, effects);
            if !agent.follower.admits(&hash, &anchors, head.provenance, head.at) {
                return;
            }
            let stamp = Stamp::new(head.at, NOW, anchors);
            stamp.show();
            agent.entry = Some(stamp).filter(|_| !store.has(DELETION));
        })
    }

    /// The lease of what it caches ran out.
    #[must_use]
    pub fn expires(&self) -> Self {
        self.after(|agent, _| agent.entry = None)
    }

    fn after(&self, step: impl FnOnce(&mut Self, &mut Vec<Effect>)) -> Self {
        let mut agent = self.fork();
        let mut effects = Vec::new();
        step(&mut agent, &mut effects);
        for effect in effects {
            agent.perform(effect);
        }
        agent.seal();
        agent
    }

    fn fork(&self) -> Self {
        let (follower, mut crossing) = self.follower.fork();
        let entry = self.entry.as_ref().map(|stamp| {
            let copy = Stamp::new(stamp.as_of(), stamp.read_at, crossing.anchors(&stamp.anchors));
            copy.show();
            copy
        });
        Self { follower, entry, probes: self.probes.clone(), answers: self.answers.clone(), ..*self }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Applied { invalidation, .. } => {
                if evicts_one(&invalidation.scope) == Some(&Key::A.key_hash()) {
                    self.entry = None;
                    self.deleted_at = Some(invalidation.position);
                }
            }
            Effect::Flush(_) => self.entry = None,
            Effect::Progress { applied, .. } => {
                self.applied = applied;
                let covers = |at: LogPosition| at <= applied && at.epoch() == applied.epoch();
                self.told |= self.deleted_at.is_some_and(covers);
            }
            Effect::Proven(at) => self.proven_at = self.proven_at.max(at),
            Effect::SendProbe { nonce, seen, .. } => self.probes.push(Probe { nonce, seen }),
            Effect::SendReplay { nonce, from, to, .. } => self.wanted = Some((nonce, from, to)),
            Effect::Widened(_) | Effect::Announce | Effect::Rival(_) => {}
        }
    }

    /// Drops what can have no effect any more, and takes the print.
    fn seal(&mut self) {
        // Whether the floors of the key's API are kept, they are the same.
        self.follower.anchors(&SCRIPT.record(Key::A, View::default()), &mut Vec::new());
        self.probes.retain(|probe| self.follower.awaits(probe.nonce));
        self.answers.retain(|answer| self.follower.awaits(answer.nonce));
        if !self.answers_valid() {
            self.entry = None;
        }
        let mut hasher = DefaultHasher::new();
        self.follower.digest(NOW, &mut hasher);
        (self.deleted_at, self.told, self.proven_at, self.applied).hash(&mut hasher);
        self.entry.as_ref().map(|stamp| (stamp.as_of(), stamp.anchors.floor())).hash(&mut hasher);
        let since = |nonce: u64| self.follower.questions_since(nonce);
        for probe in &self.probes {
            (0, since(probe.nonce), probe.seen).hash(&mut hasher);
        }
        let answers: BTreeSet<_> = self.answers.iter().map(|answer| {
            let Voucher { milestone, .. } = answer.head;
            (since(answer.nonce), milestone.provenance, milestone.at, milestone.token, answer.deleted)
        }).collect();
        answers.hash(&mut hasher);
        self.print = hasher.finish();
    }
}
