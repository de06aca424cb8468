//! A world of two databases, one of them a copy of the other, and all states that it can get into.
//!
//! As in the other worlds, whatever needn't happen may not happen: so a message may be lost or late, a publisher may
//! stand still and an agent may be cut off without an action of its own. Where a world is `prompt`, a publisher doesn't
//! conclude that there is no answer while another publisher can give one.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use evictd_core::history::{Incarnation, LogToken, Past, Provenance, Voucher};
use evictd_core::protection::Protection;
use evictd_core::service::Standing;

use super::agent::{HistoryAgent, PendingProbeAnswer};
use super::publisher::{PeerAnswer, PublisherProcess};
use super::store::{DELETION, HistoryRow, HistoryStore, OTHER, forgeries, is_authentic};
use crate::script::ScriptChange;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DatabaseKind {
    /// One publisher each; each start begins an incarnation.
    Sqlite,
    /// Several publishers may share one; a physical copy has the same incarnation.
    Postgres,
}

/// A flaw around the core. Each is a negative control.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HistoryFlaw {
    /// A row says that the log reached the beginning of its incarnation, instead of its own position.
    RowsLagBehindTheirVouchers,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Budget {
    pub starts: u8,
    pub stalls: u8,
    pub copies: u8,
    pub words: u8,
    pub deletions: u8,
    pub others: u8,
    pub restarts: u8,
    pub cuts: u8,
}

impl Budget {
    /// Nothing happens.
    pub const NONE: Self =
        Self { starts: 0, stalls: 0, copies: 0, words: 0, deletions: 1, others: 0, restarts: 0, cuts: 0 };
    const ENOUGH: Self = Self {
        starts: u8::MAX,
        stalls: 0,
        copies: 0,
        words: u8::MAX,
        deletions: 0,
        others: 0,
        restarts: 0,
        cuts: 0,
    };
}

/// What can happen, and how often.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each says whether one kind of thing happens")]
pub struct HistoryWorld {
    pub name: &'static str,
    pub about: &'static str,
    pub database: DatabaseKind,
    pub publishers: &'static [usize],
    /// The databases in which the deletion may be recorded.
    pub deleting: &'static [usize],
    /// Those that never end or stand still.
    pub steady: &'static [usize],
    pub agents: usize,
    /// Agents may treat their own history as silent at any time.
    pub silence: bool,
    pub budget: Budget,
    /// Publishers ask each other. Otherwise none is ever answered in time: then all serve that may, which is the worst.
    pub talks: bool,
    /// Every publisher that can answer a query does, before its requester gives up.
    pub prompt: bool,
    /// The publishers can't reach each other at first.
    pub begins_cut: bool,
    /// Publishers wait for a bound, and call receipts final.
    pub receipts: bool,
    /// An agent's login claims vouchers that it never received.
    pub forges: bool,
    /// Whether recovery is tried from each state.
    pub heals: bool,
    /// States of publishers that must occur.
    pub standings: &'static [(&'static str, Standing)],
    pub missing: Option<Protection>,
    pub flaw: Option<HistoryFlaw>,
}

/// A message of the live feed that may still arrive anywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SentMessage {
    pub store: usize,
    /// How far the log reached.
    pub voucher: Voucher,
    /// The last row, if it was recorded in this incarnation.
    pub row: Option<HistoryRow>,
}

#[derive(Clone, PartialEq, Hash, Debug)]
pub struct HistoryState {
    pub stores: [HistoryStore; 2],
    pub publishers: Vec<Option<PublisherProcess>>,
    pub agents: Vec<Arc<HistoryAgent>>,
    /// Sent on the live feed, ever.
    pub sent: Vec<SentMessage>,
    /// The publishers can't reach each other.
    pub cut: bool,
    /// An operator declared a store that lacks the deletion.
    pub is_overruled: bool,
    left: Budget,
    incarnations: u64,
    tokens: u64,
}

/// What can happen. Publishers, agents and databases by their places in the state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HistoryAction {
    Start(usize),
    Crash(usize),
    Freeze(usize),
    Thaw(usize),
    Cut,
    Heal,
    Copy(usize),
    Declare(usize),
    Record(usize, ScriptChange),
    Wait(usize),
    ReceiveNoResponders(usize),
    Answer(usize, usize),
    Receive(usize, PeerAnswer),
    ReceiveForeign(usize),
    BoundPasses(usize),
    Silence(usize),
    Restart(usize),
    Probe(usize),
    AnswerProbe(usize, usize, u64),
    ProbeAt(usize, usize),
    ReceiveProof(usize, usize),
    ReceiveTick(usize, usize),
    ReceiveRow(usize, usize),
    Repair(usize, usize),
    Load(usize, usize),
    Forge(usize, Voucher),
}

impl fmt::Display for HistoryAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(p) => write!(f, "publisher {p} starts"),
            Self::Crash(p) => write!(f, "publisher {p} crashes"),
            Self::Freeze(p) => write!(f, "publisher {p} stands still"),
            Self::Thaw(p) => write!(f, "publisher {p} goes on"),
            Self::Cut => f.write_str("the publishers are cut off from each other"),
            Self::Heal => f.write_str("the publishers reach each other again"),
            Self::Copy(from) => write!(f, "store {} becomes a copy of store {from}", 1 - from),
            Self::Declare(store) => write!(f, "an operator declares store {store}"),
            Self::Record(p, change) => write!(f, "publisher {p} records {change:?}"),
            Self::Wait(p) => write!(f, "publisher {p} waits for a second"),
            Self::ReceiveNoResponders(p) => {
                write!(f, "publisher {p} receives that no other publisher is there")
            }
            Self::Answer(p, other) => write!(f, "publisher {p} answers publisher {other}'s question"),
            Self::Receive(p, answer) => {
                write!(
                    f,
                    "publisher {p} receives that publisher {} is {}",
                    answer.from,
                    answer.standing.label()
                )
            }
            Self::ReceiveForeign(p) => write!(f, "publisher {p} receives a tick of another history"),
            Self::BoundPasses(p) => write!(f, "publisher {p} calls the receipt final after a bound"),
            Self::Silence(a) => write!(f, "agent {a} receives nothing of its own history for a while"),
            Self::Restart(a) => write!(f, "agent {a} restarts"),
            Self::Probe(a) => write!(f, "agent {a} probes"),
            Self::AnswerProbe(p, a, _) => write!(f, "publisher {p} gets agent {a}'s probe"),
            Self::ProbeAt(p, a) => write!(f, "agent {a} probes publisher {p}, who answers at once if at all"),
            Self::ReceiveProof(a, _) => write!(f, "agent {a} receives the answer to its probe"),
            Self::ReceiveTick(a, _) => write!(f, "agent {a} receives a tick"),
            Self::ReceiveRow(a, _) => write!(f, "agent {a} receives a row"),
            Self::Repair(a, p) => write!(f, "agent {a} repairs its gap at publisher {p}"),
            Self::Load(a, p) => write!(f, "agent {a} loads the key from publisher {p}"),
            Self::Forge(p, seen) => write!(f, "publisher {p} gets a forged claim of {}", seen.milestone.at),
        }
    }
}

impl HistoryWorld {
    /// The publisher of the first store serves; that of its copy doesn't run yet.
    pub const fn plain(name: &'static str, about: &'static str, budget: Budget) -> Self {
        Self {
            name,
            about,
            database: DatabaseKind::Sqlite,
            publishers: &[0, 1],
            deleting: &[0, 1],
            steady: &[],
            agents: 1,
            silence: true,
            budget,
            talks: false,
            prompt: false,
            begins_cut: false,
            receipts: false,
            forges: false,
            heals: false,
            standings: &[],
            missing: None,
            flaw: None,
        }
    }

    /// Runs a part of the core as this world has it.
    pub fn under<T>(&self, run: impl FnOnce() -> T) -> T {
        match self.missing {
            #[cfg(evictd_negative_controls)]
            Some(missing) => missing.without(run),
            _ => run(),
        }
    }

    /// Whether publishers can't reach each other for a time.
    pub(super) fn is_ever_cut(&self) -> bool {
        self.begins_cut || self.budget.cuts > 0
    }

    fn is_running(state: &HistoryState, publisher: usize) -> Option<&PublisherProcess> {
        state.publishers[publisher].as_ref().filter(|process| !process.frozen)
    }

    /// Whether a question of one arrives at the other, and is answered. Those of one store are never cut off.
    fn reaches(&self, state: &HistoryState, publisher: usize, other: usize) -> bool {
        let colleague = self.publishers[publisher] == self.publishers[other];
        publisher != other && (colleague || !state.cut) && Self::is_running(state, other).is_some()
    }

    fn others(&self, publisher: usize) -> impl Iterator<Item = usize> {
        (0..self.publishers.len()).filter(move |other| *other != publisher)
    }
}

impl HistoryState {
    pub(super) fn start(world: &HistoryWorld) -> Self {
        let store = HistoryStore::create(Incarnation(1));
        let mut state = Self {
            stores: [store.clone(), store],
            publishers: world.publishers.iter().map(|_| None).collect(),
            agents: (0..world.agents).map(|_| Arc::new(HistoryAgent::start(0))).collect(),
            sent: Vec::new(),
            cut: world.begins_cut,
            is_overruled: false,
            left: world.budget,
            incarnations: 1,
            tokens: 0,
        };
        let setup = HistoryWorld { missing: None, database: DatabaseKind::Sqlite, talks: true, ..*world };
        let calm = |state: &mut Self, action| {
            *state = setup.step(state, action).unwrap_or_else(|| unreachable!("{action}"));
        };
        let home = world.publishers.iter().zip(&mut state.publishers).filter(|(store, _)| **store == 0);
        for (_, process) in home {
            let process = process.insert(PublisherProcess::start(world.database == DatabaseKind::Postgres));
            process.settle_in();
            process.incarnation_begun();
        }
        state.send(&setup);
        for agent in 0..world.agents {
            calm(&mut state, HistoryAction::ProbeAt(0, agent));
        }
        state.left = world.budget;
        state
    }

    fn draw_incarnation(&mut self) -> Incarnation {
        self.incarnations += 1;
        Incarnation(self.incarnations)
    }

    /// Sends what serving publishers send on their own.
    fn send(&mut self, world: &HistoryWorld) {
        for (publisher, process) in self.publishers.iter().enumerate() {
            if process.as_ref().is_some_and(PublisherProcess::vouches) {
                let store = world.publishers[publisher];
                let row = self.stores[store].newest_row().copied();
                let sent = SentMessage { store, voucher: self.stores[store].voucher(), row };
                if !self.sent.contains(&sent) {
                    self.sent.push(sent);
                }
            }
        }
        self.sent.sort_by_key(|sent| {
            let at = sent.voucher.milestone;
            (sent.store, at.provenance, at.at, at.token)
        });
    }
}

impl HistoryWorld {
    pub(super) fn fault_actions(&self, state: &HistoryState, actions: &mut Vec<HistoryAction>) {
        let left = &state.left;
        if state.cut {
            actions.push(HistoryAction::Heal);
        } else if left.cuts > 0 {
            actions.push(HistoryAction::Cut);
        }
        for store in 0..state.stores.len() {
            let target = 1 - store;
            let runs = |of: usize| {
                (0..self.publishers.len()).any(|publisher| {
                    self.publishers[publisher] == of && state.publishers[publisher].is_some()
                })
            };
            if left.copies > 0 && !runs(target) && state.stores[store] != state.stores[target] {
                actions.push(HistoryAction::Copy(store));
            }
            if left.words > 0 {
                actions.push(HistoryAction::Declare(store));
            }
        }
        actions.extend((0..state.agents.len()).filter(|_| left.restarts > 0).map(HistoryAction::Restart));
    }

    pub(super) fn publisher_actions(
        &self,
        state: &HistoryState,
        publisher: usize,
        actions: &mut Vec<HistoryAction>,
    ) {
        let left = &state.left;
        let Some(process) = &state.publishers[publisher] else {
            if left.starts > 0 {
                actions.push(HistoryAction::Start(publisher));
            }
            return;
        };
        if !self.steady.contains(&publisher) {
            // To end and to do nothing are the same where nothing can follow.
            if self.talks || left.starts > 0 || left.copies > 0 {
                actions.push(HistoryAction::Crash(publisher));
            }
            if left.stalls > 0 && !process.frozen {
                actions.push(HistoryAction::Freeze(publisher));
            }
        }
        if process.frozen {
            actions.push(HistoryAction::Thaw(publisher));
            return;
        }
        let store = &state.stores[self.publishers[publisher]];
        let deletes = left.deletions > 0 && self.deleting.contains(&self.publishers[publisher]);
        if deletes && !store.has(DELETION) {
            actions.push(HistoryAction::Record(publisher, DELETION));
        }
        if left.others > 0 && !store.has(OTHER) {
            actions.push(HistoryAction::Record(publisher, OTHER));
        }
        if self.talks {
            self.talk_actions(state, publisher, process, actions);
        }
        if self.receipts && !process.is_final && store.has(DELETION) && process.may_finalize() {
            actions.push(HistoryAction::BoundPasses(publisher));
        }
        if self.forges && process.vouches() {
            actions.extend(
                forgeries(&store.voucher()).into_iter().map(|seen| HistoryAction::Forge(publisher, seen)),
            );
        }
    }

    fn talk_actions(
        &self,
        state: &HistoryState,
        publisher: usize,
        process: &PublisherProcess,
        actions: &mut Vec<HistoryAction>,
    ) {
        let store = &state.stores[self.publishers[publisher]];
        if self.may_give_up(state, publisher, process) {
            actions.push(HistoryAction::Wait(publisher));
        }
        if process.waits() {
            if self.others(publisher).all(|other| {
                state.publishers[other].is_none()
                    || state.cut && self.publishers[other] != self.publishers[publisher]
            }) {
                actions.push(HistoryAction::ReceiveNoResponders(publisher));
            }
            let answering =
                self.others(publisher).filter(|other| self.answers(state, publisher, process, *other));
            actions.extend(answering.map(|other| HistoryAction::Answer(other, publisher)));
            actions.extend(process.answers.iter().map(|answer| HistoryAction::Receive(publisher, *answer)));
        }
        // Without a cut, rivals meet by their questions.
        if self.is_ever_cut() && state.sent.iter().any(|sent| self.is_foreign(publisher, sent, store)) {
            actions.push(HistoryAction::ReceiveForeign(publisher));
        }
    }

    fn is_foreign(&self, publisher: usize, sent: &SentMessage, store: &HistoryStore) -> bool {
        // A colleague's round token is found in the store, a copy's isn't.
        sent.store != self.publishers[publisher]
            && (sent.voucher.milestone.provenance != store.provenance()
                || self.database == DatabaseKind::Postgres)
    }

    /// Whether silence may be the answer to its query.
    fn may_give_up(&self, state: &HistoryState, publisher: usize, process: &PublisherProcess) -> bool {
        let mut answering =
            self.others(publisher).filter(|other| self.answers(state, publisher, process, *other));
        !self.prompt || answering.all(|other| process.has_received(other))
    }

    /// Whether `other` can answer, with something that matters: a colleague's answer ends a newcomer's wait, no more.
    fn answers(
        &self,
        state: &HistoryState,
        publisher: usize,
        process: &PublisherProcess,
        other: usize,
    ) -> bool {
        let is_rival = self.publishers[publisher] != self.publishers[other];
        (is_rival || process.standing() == Standing::Asking) && self.reaches(state, publisher, other)
    }

    pub(super) fn agent_actions(&self, state: &HistoryState, index: usize, actions: &mut Vec<HistoryAction>) {
        let agent = &state.agents[index];
        if self.silence && agent.follows().is_some() {
            actions.push(HistoryAction::Silence(index));
        }
        if !self.talks && agent.may_probe() {
            actions.push(HistoryAction::Probe(index));
        }
        for publisher in 0..self.publishers.len() {
            if Self::is_running(state, publisher).is_some_and(PublisherProcess::vouches) {
                if self.talks {
                    actions.push(HistoryAction::ProbeAt(publisher, index));
                }
                let probes = agent.probes.iter();
                actions.extend(probes.map(|probe| HistoryAction::AnswerProbe(publisher, index, probe.nonce)));
                if agent.misses_rows_of(state.stores[self.publishers[publisher]].provenance()) {
                    actions.push(HistoryAction::Repair(index, publisher));
                }
                actions.push(HistoryAction::Load(index, publisher));
            }
        }
        actions.extend((0..agent.answers.len()).map(|place| HistoryAction::ReceiveProof(index, place)));
        for (place, sent) in state.sent.iter().enumerate() {
            // A tick that arrives before its row only proves more than was applied.
            let row = sent.row.is_some();
            actions.push(if row {
                HistoryAction::ReceiveRow(index, place)
            } else {
                HistoryAction::ReceiveTick(index, place)
            });
        }
    }

    /// What follows from `action`, if it does anything.
    pub(super) fn step(&self, last: &HistoryState, action: HistoryAction) -> Option<HistoryState> {
        self.under(|| {
            let mut state = last.clone();
            match action {
                HistoryAction::Start(_)
                | HistoryAction::Crash(_)
                | HistoryAction::Freeze(_)
                | HistoryAction::Thaw(_)
                | HistoryAction::Cut
                | HistoryAction::Heal
                | HistoryAction::Copy(_)
                | HistoryAction::Declare(_)
                | HistoryAction::Restart(_) => self.step_fault(&mut state, action),
                HistoryAction::Record(..)
                | HistoryAction::Wait(_)
                | HistoryAction::ReceiveNoResponders(_)
                | HistoryAction::Answer(..)
                | HistoryAction::Receive(..)
                | HistoryAction::ReceiveForeign(_)
                | HistoryAction::BoundPasses(_)
                | HistoryAction::Forge(..) => self.step_publisher(&mut state, action)?,
                _ => self.step_agent(&mut state, action)?,
            }
            if !self.talks {
                state
                    .publishers
                    .iter_mut()
                    .flatten()
                    .filter(|process| !process.frozen)
                    .for_each(PublisherProcess::settle_in);
            }
            self.begin_alone(&mut state);
            self.note_yielding(&mut state);
            state.send(self);
            Some(state)
        })
    }

    /// A publisher that wants an incarnation begins it at once: whatever comes between comes before or after.
    fn begin_alone(&self, state: &mut HistoryState) {
        for publisher in 0..self.publishers.len() {
            let wants = |process: &PublisherProcess| !process.frozen && process.wants_incarnation();
            if !state.publishers[publisher].as_ref().is_some_and(wants) {
                continue;
            }
            let incarnation = state.draw_incarnation();
            state.stores[self.publishers[publisher]].open(incarnation);
            if let Some(process) = &mut state.publishers[publisher] {
                process.incarnation_begun();
            }
        }
    }

    /// After a publisher has yielded for a bound, what its store began before replaces no past anymore.
    fn note_yielding(&self, state: &mut HistoryState) {
        for publisher in 0..self.publishers.len() {
            let store = self.publishers[publisher];
            let has_yielded = |process: &PublisherProcess| !process.frozen && process.has_yielded();
            if state.publishers[publisher].as_ref().is_some_and(has_yielded)
                && state.stores[store].history().supersedes()
            {
                let incarnation = state.draw_incarnation();
                state.stores[store].note_yielding(incarnation);
            }
        }
    }

    fn step_fault(&self, state: &mut HistoryState, action: HistoryAction) {
        let left = &mut state.left;
        match action {
            HistoryAction::Start(publisher) => {
                left.starts -= 1;
                if self.database == DatabaseKind::Sqlite {
                    let incarnation = state.draw_incarnation();
                    state.stores[self.publishers[publisher]].open(incarnation);
                }
                state.publishers[publisher] =
                    Some(PublisherProcess::start(self.database == DatabaseKind::Postgres));
            }
            HistoryAction::Crash(publisher) => state.publishers[publisher] = None,
            HistoryAction::Freeze(publisher) => {
                left.stalls -= 1;
                if let Some(process) = &mut state.publishers[publisher] {
                    process.frozen = true;
                }
            }
            HistoryAction::Thaw(publisher) => {
                if let Some(process) = &mut state.publishers[publisher] {
                    process.thaw();
                }
            }
            HistoryAction::Cut => {
                left.cuts -= 1;
                state.cut = true;
            }
            HistoryAction::Heal => state.cut = false,
            HistoryAction::Copy(from) => {
                left.copies -= 1;
                state.stores[1 - from] = state.stores[from].clone();
            }
            HistoryAction::Declare(store) => {
                left.words -= 1;
                state.is_overruled |= !state.stores[store].has(DELETION);
                let incarnation = state.draw_incarnation();
                state.stores[store].declare(incarnation);
                for (publisher, process) in state.publishers.iter_mut().enumerate() {
                    if let Some(process) = process.as_mut().filter(|_| self.publishers[publisher] == store) {
                        process.past_is_settled();
                    }
                }
            }
            HistoryAction::Restart(index) => {
                left.restarts -= 1;
                let process = left.restarts + 1;
                state.agents[index] = Arc::new(HistoryAgent::start(process));
            }
            _ => {}
        }
    }

    fn step_publisher(&self, state: &mut HistoryState, action: HistoryAction) -> Option<()> {
        match action {
            HistoryAction::Record(publisher, change) => {
                let left =
                    if change == DELETION { &mut state.left.deletions } else { &mut state.left.others };
                *left -= 1;
                state.tokens += 1;
                let place = self.publishers[publisher];
                // On SQLite, incarnations distinguish copies.
                let token = if self.database == DatabaseKind::Sqlite { 0 } else { state.tokens };
                state.stores[place].record(change, LogToken(token));
            }
            HistoryAction::Wait(publisher) => state.publishers[publisher].as_mut()?.wait(),
            HistoryAction::ReceiveNoResponders(publisher) => {
                state.publishers[publisher].as_mut()?.receive_no_responders();
            }
            HistoryAction::Answer(publisher, requester) => {
                let place = self.publishers[publisher];
                let colleague = place == self.publishers[requester];
                let provenance = state.stores[place].provenance();
                let answer = state.publishers[publisher].as_ref()?.answer(publisher, provenance, colleague);
                state.publishers[requester].as_mut()?.answers.insert(answer);
                if !colleague {
                    state.publishers[publisher].as_mut()?.receive_foreign();
                }
            }
            HistoryAction::Receive(publisher, answer) => {
                state.publishers[publisher].as_mut()?.receive(answer);
            }
            HistoryAction::ReceiveForeign(publisher) => {
                state.publishers[publisher].as_mut()?.receive_foreign();
            }
            HistoryAction::BoundPasses(publisher) => self.finish_receipt(state, publisher)?,
            HistoryAction::Forge(publisher, seen) => {
                self.vouches_for(state, publisher, &seen)?;
            }
            _ => {}
        }
        Some(())
    }

    /// A bound has passed while it served: cached entries last only where another publisher renews their lease.
    fn finish_receipt(&self, state: &mut HistoryState, publisher: usize) -> Option<()> {
        let own = state.stores[self.publishers[publisher]].provenance();
        let vouched: BTreeSet<Provenance> = (0..self.publishers.len())
            .filter(|other| Self::is_running(state, *other).is_some_and(PublisherProcess::vouches))
            .map(|other| state.stores[self.publishers[other]].provenance())
            .filter(|provenance| *provenance != own)
            .collect();
        for agent in &mut state.agents {
            if !agent.follows().is_some_and(|followed| vouched.contains(&followed)) {
                *agent = Arc::new(agent.expires());
            }
        }
        state.publishers[publisher].as_mut()?.is_final = true;
        Some(())
    }

    /// Whether a publisher answers an agent that presents `seen`. A past that its store doesn't have silences it, if
    /// the store itself gave that out.
    fn vouches_for(&self, state: &mut HistoryState, publisher: usize, seen: &Voucher) -> Option<bool> {
        let store = &mut state.stores[self.publishers[publisher]];
        if store.judge(&seen.milestone) != Past::Unknown {
            return Some(true);
        }
        if is_authentic(seen) {
            store.note(&seen.milestone);
            state.publishers[publisher].as_mut()?.fall_behind(seen.milestone);
        }
        Some(false)
    }

    fn step_agent(&self, state: &mut HistoryState, action: HistoryAction) -> Option<()> {
        match action {
            HistoryAction::Silence(index) => {
                state.agents[index] = Arc::new(state.agents[index].waits());
            }
            HistoryAction::Probe(index) => state.agents[index] = Arc::new(state.agents[index].probes()),
            HistoryAction::AnswerProbe(publisher, index, nonce) => {
                return self.answer_probe(state, publisher, index, nonce);
            }
            HistoryAction::ProbeAt(publisher, index) => return self.probe_at(state, publisher, index),
            HistoryAction::ReceiveProof(index, place) => {
                let answer = *state.agents[index].answers.get(place)?;
                state.agents[index] = Arc::new(state.agents[index].receives_answer(answer));
            }
            HistoryAction::ReceiveTick(index, place) => {
                let voucher = state.sent[place].voucher;
                state.agents[index] = Arc::new(state.agents[index].receives(&voucher, None));
            }
            HistoryAction::ReceiveRow(index, place) => {
                let SentMessage { mut voucher, row, store } = state.sent[place];
                if self.flaw == Some(HistoryFlaw::RowsLagBehindTheirVouchers) {
                    let begins = state.stores[store].history();
                    let begins = begins.begins().iter().rev();
                    let mut begins =
                        begins.filter(|begin| begin.incarnation == voucher.milestone.provenance.incarnation);
                    voucher.milestone.at = begins.next()?.at;
                }
                state.agents[index] = Arc::new(state.agents[index].receives(&voucher, row.as_ref()));
            }
            HistoryAction::Repair(index, publisher) => {
                let store = &state.stores[self.publishers[publisher]];
                state.agents[index] = Arc::new(state.agents[index].repairs(store));
            }
            HistoryAction::Load(index, publisher) => {
                let store = &state.stores[self.publishers[publisher]];
                state.agents[index] = Arc::new(state.agents[index].loads(store));
            }
            _ => {}
        }
        Some(())
    }

    /// Where publishers talk, other worlds have the late answers. A probe without effect is dropped.
    fn probe_at(&self, state: &mut HistoryState, publisher: usize, index: usize) -> Option<()> {
        let before = state.agents[index].clone();
        let probing = Arc::new(before.probes());
        let nonce = probing.probes.last()?.nonce;
        state.agents[index] = probing;
        self.answer_probe(state, publisher, index, nonce)?;
        let agent = &state.agents[index];
        let answer = agent.answers.iter().find(|answer| answer.nonce == nonce).copied();
        let agent = answer.map_or_else(|| agent.clone(), |answer| Arc::new(agent.receives_answer(answer)));
        let is_open = agent.probes.iter().any(|probe| probe.nonce == nonce);
        state.agents[index] = if is_open { before } else { agent };
        Some(())
    }

    fn answer_probe(
        &self,
        state: &mut HistoryState,
        publisher: usize,
        index: usize,
        nonce: u64,
    ) -> Option<()> {
        let probe = *state.agents[index].probes.iter().find(|probe| probe.nonce == nonce)?;
        if let Some(seen) = &probe.seen
            && !self.vouches_for(state, publisher, seen)?
        {
            return Some(());
        }
        let store = &state.stores[self.publishers[publisher]];
        let answer = PendingProbeAnswer { nonce, head: store.voucher(), deleted: store.has(DELETION) };
        state.agents[index] = Arc::new(state.agents[index].is_answered(answer));
        Some(())
    }
}

/// The same where faults are over, and operators and clocks do what they must.
pub(super) fn calm(world: &HistoryWorld) -> HistoryWorld {
    HistoryWorld { prompt: false, receipts: false, ..*world }
}

impl HistoryState {
    /// Lets everything happen that heals.
    pub(super) fn allow_healing(&mut self) {
        self.left = Budget::ENOUGH;
    }
}
