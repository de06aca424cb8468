//! A world of two databases, one of them a copy of the other, and all states that it can get into.
//!
//! As in the other worlds, whatever needn't happen may not happen: so a message may be lost or late, a publisher may
//! freeze and an agent may be cut off without an action of its own. Where a world is `prompt`, a publisher doesn't
//! conclude that there is no answer while another publisher can give one.

use std::collections::BTreeSet;
use std::sync::Arc;

use evictd_core::history::{BeginCause, Incarnation, LogToken, Past, Provenance, Voucher};
use evictd_core::service::{Service, Standing};

use super::agent::{HistoryAgent, PendingProbeAnswer};
use super::publisher::{PeerAnswer, PublisherProcess};
use super::store::{DELETION, HistoryRow, HistoryStore, OTHER, forgeries, is_authentic};
use crate::defect::{Defect, Flaw, under};
use crate::script::ScriptChange;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DatabaseKind {
    /// One publisher each; each start begins an incarnation.
    Sqlite,
    /// Several publishers may share one; a physical copy has the same incarnation.
    Postgres,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Budget {
    pub starts: u8,
    pub stalls: u8,
    pub copies: u8,
    pub declarations: u8,
    pub deletions: u8,
    pub others: u8,
    pub restarts: u8,
}

impl Budget {
    /// Nothing happens.
    pub const NONE: Self =
        Self { starts: 0, stalls: 0, copies: 0, declarations: 0, deletions: 1, others: 0, restarts: 0 };
    /// What recovery takes.
    pub(super) const RECOVERY: Self =
        Self { starts: u8::MAX, declarations: u8::MAX, deletions: 0, ..Self::NONE };
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
    /// Those that never end or freeze.
    pub steady: &'static [usize],
    pub agents: usize,
    /// Agents may treat their own history as silent at any time.
    pub silence: bool,
    pub budget: Budget,
    /// Publishers query each other. Otherwise none is ever answered in time: then all serve that may, which is the worst.
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
    pub tries_recovery: bool,
    /// What must occur in some state.
    pub occurs: &'static [Occurrence],
    pub defect: Option<Defect>,
}

/// What may be so in a state, and how that is seen.
pub type Occurrence = (&'static str, fn(&HistoryWorld, &HistoryState) -> bool);

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
    /// All that was ever sent on the live feed.
    pub sent: Vec<SentMessage>,
    /// The publishers can't reach each other.
    pub cut: bool,
    /// An operator declared a store that lacks the deletion.
    pub is_overruled: bool,
    pub(super) left: Budget,
    incarnations: u64,
    tokens: u64,
}

/// What can happen. Publishers, agents and databases by their places in the state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HistoryAction {
    /// The publishers reach each other again.
    CutEnds,
    /// The other store becomes a copy of this one.
    Copy(usize),
    /// An operator declares a store.
    Declare(usize),
    Publisher(usize, HistoryPublisherAction),
    Agent(usize, HistoryAgentAction),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HistoryPublisherAction {
    Start,
    Crash,
    Freeze,
    Thaw,
    /// It records a change.
    Record(ScriptChange),
    /// It waits for as long as answers count.
    Wait,
    /// No other publisher is there.
    ReceiveNoResponders,
    /// Another publisher answers its query.
    QueryIsAnswered(usize),
    ReceiveAnswer(PeerAnswer),
    /// It receives a tick of another history.
    ReceiveForeign,
    /// It finalizes the receipt after a bound.
    Finalize,
    /// It receives a forged claim.
    ReceiveForgery(Voucher),
}

/// Publishers by their places, messages by their places among those under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HistoryAgentAction {
    /// It receives nothing of its own history for a while.
    NoticeSilence,
    Restart,
    Probe,
    /// A publisher receives the probe with this number.
    ProbeIsReceived(usize, u64),
    /// It probes a publisher, which answers at once if at all.
    ProbeAt(usize),
    ReceiveProof(usize),
    ReceiveTick(usize),
    ReceiveRow(usize),
    /// It repairs its gap at a publisher.
    Repair(usize),
    /// It loads the key from a publisher.
    Load(usize),
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
            tries_recovery: false,
            occurs: &[],
            defect: None,
        }
    }

    fn is_running(state: &HistoryState, publisher: usize) -> Option<&PublisherProcess> {
        state.publishers[publisher].as_ref().filter(|process| !process.frozen)
    }

    /// Whether a query of one arrives at the other, and is answered. Those of one store are never cut off.
    fn reaches(&self, state: &HistoryState, publisher: usize, other: usize) -> bool {
        let colleague = self.publishers[publisher] == self.publishers[other];
        publisher != other && (colleague || !state.cut) && Self::is_running(state, other).is_some()
    }

    fn others(&self, publisher: usize) -> impl Iterator<Item = usize> + Clone {
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
        let setup = HistoryWorld { defect: None, database: DatabaseKind::Sqlite, talks: true, ..*world };
        let home = world.publishers.iter().zip(&mut state.publishers).filter(|(store, _)| **store == 0);
        for (_, process) in home {
            let process = process.insert(PublisherProcess::start(world.database == DatabaseKind::Postgres));
            process.settle_in();
            process.update(Service::on_incarnation_begun);
        }
        state.send(&setup);
        for agent in 0..world.agents {
            let probe = HistoryAction::Agent(agent, HistoryAgentAction::ProbeAt(0));
            state = setup.step(&state, probe).unwrap_or_else(|| unreachable!("it is answered"));
        }
        state.left = world.budget;
        state
    }

    pub(super) fn has_one(&self, standing: Standing) -> bool {
        self.publishers.iter().flatten().any(|process| process.standing() == standing)
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
    /// Adds every action that `state` permits.
    pub(super) fn add_actions(&self, state: &HistoryState, actions: &mut Vec<HistoryAction>) {
        let left = &state.left;
        actions.extend(state.cut.then_some(HistoryAction::CutEnds));
        for store in 0..state.stores.len() {
            let target = 1 - store;
            let mut of_target = state.publishers.iter().zip(self.publishers).filter(|(_, of)| **of == target);
            let runs = of_target.any(|(process, _)| process.is_some());
            if left.copies > 0 && !runs && state.stores[store] != state.stores[target] {
                actions.push(HistoryAction::Copy(store));
            }
            if left.declarations > 0 {
                actions.push(HistoryAction::Declare(store));
            }
        }
        let agents = 0..state.agents.len();
        let restarts = agents.clone().filter(|_| left.restarts > 0);
        actions.extend(restarts.map(|index| HistoryAction::Agent(index, HistoryAgentAction::Restart)));
        for publisher in 0..self.publishers.len() {
            let mut own = Vec::new();
            self.publisher_actions(state, publisher, &mut own);
            actions.extend(own.into_iter().map(|action| HistoryAction::Publisher(publisher, action)));
        }
        for index in agents {
            let mut own = Vec::new();
            self.agent_actions(state, &state.agents[index], &mut own);
            actions.extend(own.into_iter().map(|action| HistoryAction::Agent(index, action)));
        }
    }

    fn publisher_actions(
        &self,
        state: &HistoryState,
        publisher: usize,
        actions: &mut Vec<HistoryPublisherAction>,
    ) {
        let left = &state.left;
        let Some(process) = &state.publishers[publisher] else {
            actions.extend((left.starts > 0).then_some(HistoryPublisherAction::Start));
            return;
        };
        if !self.steady.contains(&publisher) {
            // To end and to do nothing are the same where nothing can follow.
            if self.talks || left.starts > 0 || left.copies > 0 {
                actions.push(HistoryPublisherAction::Crash);
            }
            if left.stalls > 0 && !process.frozen {
                actions.push(HistoryPublisherAction::Freeze);
            }
        }
        if process.frozen {
            return actions.push(HistoryPublisherAction::Thaw);
        }
        let store = &state.stores[self.publishers[publisher]];
        let deletes = left.deletions > 0 && self.deleting.contains(&self.publishers[publisher]);
        if deletes && !store.has(DELETION) {
            actions.push(HistoryPublisherAction::Record(DELETION));
        }
        if left.others > 0 && !store.has(OTHER) {
            actions.push(HistoryPublisherAction::Record(OTHER));
        }
        if self.talks {
            self.talk_actions(state, publisher, process, actions);
        }
        if self.receipts && !process.is_final && store.has(DELETION) && process.may_finalize() {
            actions.push(HistoryPublisherAction::Finalize);
        }
        if self.forges && process.vouches() {
            actions
                .extend(forgeries(&store.voucher()).into_iter().map(HistoryPublisherAction::ReceiveForgery));
        }
    }

    fn talk_actions(
        &self,
        state: &HistoryState,
        publisher: usize,
        process: &PublisherProcess,
        actions: &mut Vec<HistoryPublisherAction>,
    ) {
        // Those that can answer with something that matters: a colleague's answer ends a newcomer's wait, no more.
        let can_answer = |other: &usize| {
            let is_rival = self.publishers[publisher] != self.publishers[*other];
            (is_rival || process.standing() == Standing::Asking) && self.reaches(state, publisher, *other)
        };
        let answering = self.others(publisher).filter(can_answer);
        if !self.prompt || answering.clone().all(|other| process.received.contains(&other)) {
            actions.push(HistoryPublisherAction::Wait);
        }
        if process.waits() {
            let is_unreachable = |other: usize| {
                state.publishers[other].is_none()
                    || state.cut && self.publishers[other] != self.publishers[publisher]
            };
            if self.others(publisher).all(is_unreachable) {
                actions.push(HistoryPublisherAction::ReceiveNoResponders);
            }
            actions.extend(answering.map(HistoryPublisherAction::QueryIsAnswered));
            actions
                .extend(process.answers.iter().map(|answer| HistoryPublisherAction::ReceiveAnswer(*answer)));
        }
        // Without a cut, rivals meet by their queries.
        let store = &state.stores[self.publishers[publisher]];
        if self.begins_cut && state.sent.iter().any(|sent| self.is_foreign(publisher, sent, store)) {
            actions.push(HistoryPublisherAction::ReceiveForeign);
        }
    }

    fn is_foreign(&self, publisher: usize, sent: &SentMessage, store: &HistoryStore) -> bool {
        // A colleague's round token is found in the store, a copy's isn't.
        sent.store != self.publishers[publisher]
            && (sent.voucher.milestone.provenance != store.provenance()
                || self.database == DatabaseKind::Postgres)
    }

    fn agent_actions(
        &self,
        state: &HistoryState,
        agent: &HistoryAgent,
        actions: &mut Vec<HistoryAgentAction>,
    ) {
        if self.silence && agent.follows().is_some() {
            actions.push(HistoryAgentAction::NoticeSilence);
        }
        if !self.talks && agent.may_probe() {
            actions.push(HistoryAgentAction::Probe);
        }
        for publisher in 0..self.publishers.len() {
            if Self::is_running(state, publisher).is_some_and(PublisherProcess::vouches) {
                if self.talks {
                    actions.push(HistoryAgentAction::ProbeAt(publisher));
                }
                let probes = agent.probes.iter();
                actions
                    .extend(probes.map(|probe| HistoryAgentAction::ProbeIsReceived(publisher, probe.nonce)));
                if agent.misses_rows_of(state.stores[self.publishers[publisher]].provenance()) {
                    actions.push(HistoryAgentAction::Repair(publisher));
                }
                actions.push(HistoryAgentAction::Load(publisher));
            }
        }
        actions.extend((0..agent.answers.len()).map(HistoryAgentAction::ReceiveProof));
        // A tick that arrives before its row only proves more than was applied.
        let receive = |(place, sent): (usize, &SentMessage)| match sent.row {
            Some(_) => HistoryAgentAction::ReceiveRow(place),
            None => HistoryAgentAction::ReceiveTick(place),
        };
        actions.extend(state.sent.iter().enumerate().map(receive));
    }

    /// What follows from `action`, if it does anything.
    pub(super) fn step(&self, last: &HistoryState, action: HistoryAction) -> Option<HistoryState> {
        under(self.defect, || {
            let mut state = last.clone();
            match action {
                HistoryAction::CutEnds => state.cut = false,
                HistoryAction::Copy(from) => {
                    state.left.copies -= 1;
                    state.stores[1 - from] = state.stores[from].clone();
                }
                HistoryAction::Declare(store) => self.declare(&mut state, store),
                HistoryAction::Publisher(publisher, action) => {
                    self.step_publisher(&mut state, publisher, action)?;
                }
                HistoryAction::Agent(index, action) => self.step_agent(&mut state, index, action)?,
            }
            self.do_at_once(&mut state);
            Some(state)
        })
    }

    fn declare(&self, state: &mut HistoryState, store: usize) {
        state.left.declarations -= 1;
        state.is_overruled |= !state.stores[store].has(DELETION);
        let incarnation = state.draw_incarnation();
        state.stores[store].declare(incarnation);
        let processes = state.publishers.iter_mut().zip(self.publishers).filter(|(_, of)| **of == store);
        processes.flat_map(|(process, _)| process).for_each(PublisherProcess::resolve_past);
    }

    /// Does what publishers do by themselves. Whatever comes between comes before or after.
    fn do_at_once(&self, state: &mut HistoryState) {
        let running = |process: &&mut PublisherProcess| !process.frozen;
        if !self.talks {
            state.publishers.iter_mut().flatten().filter(running).for_each(PublisherProcess::settle_in);
        }
        let is_so = |process: &Option<PublisherProcess>, what: fn(&Service) -> bool| {
            process.as_ref().is_some_and(|process| !process.frozen && what(process.service()))
        };
        for publisher in 0..self.publishers.len() {
            if is_so(&state.publishers[publisher], Service::wants_incarnation) {
                let incarnation = state.draw_incarnation();
                state.stores[self.publishers[publisher]].begin(incarnation, BeginCause::Opened);
                if let Some(process) = &mut state.publishers[publisher] {
                    process.update(Service::on_incarnation_begun);
                }
            }
        }
        // After a publisher has yielded for a bound, what its store began before replaces no past anymore.
        for publisher in 0..self.publishers.len() {
            let store = self.publishers[publisher];
            let has_yielded = is_so(&state.publishers[publisher], |service| service.yielded_to().is_some());
            if has_yielded && state.stores[store].history().supersedes() {
                let incarnation = state.draw_incarnation();
                state.stores[store].begin(incarnation, BeginCause::Yielded);
            }
        }
        state.send(self);
    }

    fn step_publisher(
        &self,
        state: &mut HistoryState,
        publisher: usize,
        action: HistoryPublisherAction,
    ) -> Option<()> {
        let place = self.publishers[publisher];
        match action {
            HistoryPublisherAction::Start => {
                state.left.starts -= 1;
                // On SQLite, each start begins an incarnation.
                let is_shared = self.database == DatabaseKind::Postgres;
                if !is_shared {
                    let incarnation = state.draw_incarnation();
                    state.stores[place].begin(incarnation, BeginCause::Opened);
                }
                state.publishers[publisher] = Some(PublisherProcess::start(is_shared));
            }
            HistoryPublisherAction::Crash => state.publishers[publisher] = None,
            HistoryPublisherAction::Freeze => {
                state.left.stalls -= 1;
                state.publishers[publisher].as_mut()?.frozen = true;
            }
            HistoryPublisherAction::Thaw => state.publishers[publisher].as_mut()?.thaw(),
            HistoryPublisherAction::Record(change) => {
                let left =
                    if change == DELETION { &mut state.left.deletions } else { &mut state.left.others };
                *left -= 1;
                state.tokens += 1;
                // On SQLite, incarnations distinguish copies.
                let token = if self.database == DatabaseKind::Sqlite { 0 } else { state.tokens };
                state.stores[place].record(change, LogToken(token));
            }
            HistoryPublisherAction::Wait => state.publishers[publisher].as_mut()?.wait(),
            HistoryPublisherAction::ReceiveNoResponders => {
                state.publishers[publisher].as_mut()?.receive_no_responders();
            }
            HistoryPublisherAction::QueryIsAnswered(other) => {
                let is_colleague = place == self.publishers[other];
                let provenance = state.stores[self.publishers[other]].provenance();
                let process = state.publishers[other].as_mut()?;
                let answer = process.answer(other, provenance, is_colleague);
                if !is_colleague {
                    process.receive_foreign();
                }
                state.publishers[publisher].as_mut()?.answers.insert(answer);
            }
            HistoryPublisherAction::ReceiveAnswer(answer) => {
                state.publishers[publisher].as_mut()?.receive(answer);
            }
            HistoryPublisherAction::ReceiveForeign => state.publishers[publisher].as_mut()?.receive_foreign(),
            HistoryPublisherAction::Finalize => {
                self.expire_leases(state, publisher);
                state.publishers[publisher].as_mut()?.is_final = true;
            }
            HistoryPublisherAction::ReceiveForgery(seen) => {
                self.vouches_for(state, publisher, &seen)?;
            }
        }
        Some(())
    }

    /// A bound has passed while it served: cached entries last only where another publisher renews their lease.
    fn expire_leases(&self, state: &mut HistoryState, publisher: usize) {
        let own = state.stores[self.publishers[publisher]].provenance();
        let vouched: BTreeSet<Provenance> = (0..self.publishers.len())
            .filter(|other| Self::is_running(state, *other).is_some_and(PublisherProcess::vouches))
            .map(|other| state.stores[self.publishers[other]].provenance())
            .filter(|provenance| *provenance != own)
            .collect();
        for agent in &mut state.agents {
            if !agent.follows().is_some_and(|followed| vouched.contains(&followed)) {
                let mut expired = HistoryAgent::clone(agent);
                expired.expire();
                *agent = Arc::new(expired);
            }
        }
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
            let process = state.publishers[publisher].as_mut()?;
            process.update(|service| service.on_unknown_past(seen.milestone));
        }
        Some(false)
    }

    fn step_agent(&self, state: &mut HistoryState, index: usize, action: HistoryAgentAction) -> Option<()> {
        let mut agent = HistoryAgent::clone(&state.agents[index]);
        match action {
            HistoryAgentAction::NoticeSilence => agent.notice_silence(),
            HistoryAgentAction::Restart => {
                state.left.restarts -= 1;
                agent = HistoryAgent::start(state.left.restarts + 1);
            }
            HistoryAgentAction::Probe => agent.probe(),
            HistoryAgentAction::ProbeIsReceived(publisher, nonce) => {
                self.answer_probe(state, publisher, &mut agent, nonce)?;
            }
            HistoryAgentAction::ProbeAt(publisher) => self.probe_at(state, publisher, &mut agent)?,
            HistoryAgentAction::ReceiveProof(place) => agent.receive_answer(*agent.answers.get(place)?),
            HistoryAgentAction::ReceiveTick(place) => agent.receive(&state.sent[place].voucher, None),
            HistoryAgentAction::ReceiveRow(place) => {
                let SentMessage { mut voucher, row, store } = state.sent[place];
                if self.defect == Some(Defect::With(Flaw::RowsLagBehindTheirVouchers)) {
                    let history = state.stores[store].history();
                    let incarnation = voucher.milestone.provenance.incarnation;
                    let begin = history.begins().iter().rfind(|begin| begin.incarnation == incarnation);
                    voucher.milestone.at = begin?.at;
                }
                agent.receive(&voucher, row.as_ref());
            }
            HistoryAgentAction::Repair(publisher) => agent.repair(&state.stores[self.publishers[publisher]]),
            HistoryAgentAction::Load(publisher) => agent.load(&state.stores[self.publishers[publisher]]),
        }
        state.agents[index] = Arc::new(agent);
        Some(())
    }

    /// Where publishers talk, other worlds have the late answers. A probe without effect is dropped.
    fn probe_at(&self, state: &mut HistoryState, publisher: usize, agent: &mut HistoryAgent) -> Option<()> {
        let before = agent.clone();
        agent.probe();
        let nonce = agent.probes.last()?.nonce;
        self.answer_probe(state, publisher, agent, nonce)?;
        let answer = agent.answers.iter().find(|answer| answer.nonce == nonce).copied();
        if let Some(answer) = answer {
            agent.receive_answer(answer);
        }
        if agent.probes.iter().any(|probe| probe.nonce == nonce) {
            *agent = before;
        }
        Some(())
    }

    fn answer_probe(
        &self,
        state: &mut HistoryState,
        publisher: usize,
        agent: &mut HistoryAgent,
        nonce: u64,
    ) -> Option<()> {
        let probe = *agent.probes.iter().find(|probe| probe.nonce == nonce)?;
        if probe.seen.map_or(Some(true), |seen| self.vouches_for(state, publisher, &seen))? {
            let store = &state.stores[self.publishers[publisher]];
            let (head, deleted) = (store.voucher(), store.has(DELETION));
            agent.send_answer(PendingProbeAnswer { nonce, head, deleted });
        }
        Some(())
    }
}
