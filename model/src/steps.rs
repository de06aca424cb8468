//! The actions of a world, and what follows from each.
//!
//! Most faults need no action of their own, because nothing ever has to happen. A message that is never
//! delivered is lost; one that is delivered again was duplicated; a link is cut while nothing is delivered
//! over it; a publisher that crashes has only not sent the rest, since its state is in the store (its
//! probe rounds are modeled where `rounds` is set). So every schedule with these faults is among
//! those that are checked.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::follower::{Effect, ReplayOutcome};
use evictd_core::position::LogPosition;

use crate::agent::{ModelAgent, ModelVerification, PendingLoad};
use crate::defect::Flaw;
use crate::laws::judge_load;
use crate::script::ChangeId;
use crate::state::{
    AgentAction, ModelPublisher, PublisherAction, ReadSource, SmallAction, SmallState, StoreAction,
};
use crate::store::{Mark, ModelReplay, ModelRow};
use crate::world::{SmallWorld, Tick};

impl SmallWorld {
    /// Adds every action that `state` permits.
    pub(crate) fn add_actions(&self, state: &SmallState, actions: &mut Vec<SmallAction>) {
        if state.broken.is_some() {
            return;
        }
        let of_store = self.store_actions(state).into_iter().filter(|(is_possible, _)| *is_possible);
        actions.extend(of_store.map(|(_, action)| SmallAction::Store(action)));
        for (index, agent) in state.agents.iter().enumerate() {
            let mut of_agent = Vec::new();
            self.bus_actions(state, agent, &mut of_agent);
            self.load_actions(state, agent, &mut of_agent);
            actions.extend(of_agent.into_iter().map(|action| SmallAction::Agent(index, action)));
        }
        for (index, publisher) in state.publishers.iter().enumerate() {
            let probes = state.agents.iter().flat_map(|agent| &agent.probes);
            let received = probes.map(|(nonce, _)| PublisherAction::ReceiveProbe(*nonce));
            let round = if publisher.running.is_some() {
                Some(PublisherAction::EndRound)
            } else {
                publisher.rounds.start_at().map(|_| PublisherAction::BeginRound)
            };
            let of_publisher = received.chain(round).chain([PublisherAction::Crash]);
            actions.extend(of_publisher.map(|action| SmallAction::Publisher(index, action)));
        }
    }

    fn store_actions(&self, state: &SmallState) -> [(bool, StoreAction); 7] {
        let has_standby = self.replica || self.failovers > 0;
        let catches_up = has_standby && !self.demoted && !state.is_stray;
        [
            (state.now.0 < self.ticks, StoreAction::TickPasses),
            (usize::from(state.committed) < self.script.0.len(), StoreAction::NextChangeCommits),
            (!state.store.is_numbered(), StoreAction::SequencerNumbers),
            (catches_up && state.standby != state.store, StoreAction::StandbyCatchesUp),
            (self.stray && !state.is_stray, StoreAction::StandbyStrays),
            (state.failovers < self.failovers, StoreAction::FailOver),
            (self.purges && !state.store.is_purged(), StoreAction::LogIsPurged),
        ]
    }

    fn bus_actions(&self, state: &SmallState, agent: &ModelAgent, actions: &mut Vec<AgentAction>) {
        if agent.core.follower().wake_at() <= state.now.lease_time() {
            actions.push(AgentAction::Poll);
        }
        if state.restarts < self.restarts {
            actions.push(AgentAction::Restart);
        }
        for (mark, changes) in &state.live {
            actions.extend(changes.iter().map(|change| AgentAction::ReceiveRow(*mark, *change)));
        }
        actions.extend(state.heads.iter().map(|head| AgentAction::ReceiveTick(*head)));
        actions.extend(state.ended.iter().map(|ended| AgentAction::ReceiveEnd(*ended)));
        // Of several answers to one query only the first to arrive counts, and which one that is was decided when it
        // was sent: so a second one would only repeat what another schedule shows.
        let is_answered = |nonce: u64| agent.proofs.iter().any(|(answered, _)| *answered == nonce);
        let probes = agent.probes.iter().map(|(nonce, _)| *nonce).filter(|nonce| !is_answered(*nonce));
        actions.extend(probes.map(AgentAction::ProbeIsAnswered));
        actions.extend(agent.proofs.iter().map(|(nonce, head)| AgentAction::ReceiveProof(*nonce, *head)));
        let is_answered = |nonce: u64| agent.replays.iter().any(|(answered, ..)| *answered == nonce);
        let queries = agent.replay_queries.iter().map(|query| query.nonce);
        actions.extend(queries.filter(|nonce| !is_answered(*nonce)).map(AgentAction::ReplayIsAnswered));
        let replays = agent.replays.iter().enumerate();
        actions.extend(replays.map(|(place, (nonce, ..))| AgentAction::ReceiveReplay(*nonce, place)));
    }

    fn load_actions(&self, state: &SmallState, agent: &ModelAgent, actions: &mut Vec<AgentAction>) {
        actions.push(AgentAction::Verify);
        let Some(load) = &agent.load else { return };
        if load.read.is_some() {
            return actions.push(AgentAction::ReceiveLoad);
        }
        let sources = [
            (true, ReadSource::Primary),
            (self.replica, ReadSource::Replica),
            (state.old_primary.is_some(), ReadSource::OldPrimary),
        ];
        let sources = sources.into_iter().filter(|(is_possible, _)| *is_possible);
        actions.extend(sources.map(|(_, source)| AgentAction::LoadIsRead(source)));
    }

    /// The state after `action`; `None` if that changes nothing.
    pub fn step(&self, last: &SmallState, action: SmallAction) -> Option<SmallState> {
        let mut state = last.clone();
        match action {
            SmallAction::Store(action) => self.step_store(&mut state, action),
            SmallAction::Agent(index, action) => {
                let mut agent = ModelAgent::clone(&last.agents[index]);
                let mut effects = Vec::new();
                self.step_agent(&mut state, &mut agent, &mut effects, action)?;
                agent.settle(self, last.now, &effects);
                // A round may change the store only.
                if agent == *last.agents[index] && !matches!(action, AgentAction::ProbeIsAnswered(_)) {
                    return None;
                }
                state.agents[index] = Arc::new(agent);
            }
            SmallAction::Publisher(index, action) => self.step_publisher(&mut state, index, action)?,
        }
        (state != *last).then_some(state)
    }

    fn step_store(&self, state: &mut SmallState, action: StoreAction) {
        match action {
            StoreAction::TickPasses => state.now.0 += 1,
            StoreAction::NextChangeCommits => {
                let change = ChangeId(state.committed);
                state.store.rows.push(ModelRow { change, at: state.now, position: None });
                state.committed += 1;
            }
            StoreAction::SequencerNumbers => state.number(0),
            StoreAction::StandbyCatchesUp => state.standby = state.store.clone(),
            StoreAction::StandbyStrays => {
                state.is_stray = true;
                state.standby.number(0, 2);
            }
            StoreAction::FailOver => state.fail_over(self),
            StoreAction::LogIsPurged => state.store.purge(),
        }
    }

    fn step_agent(
        &self,
        state: &mut SmallState,
        agent: &mut ModelAgent,
        effects: &mut Vec<Effect>,
        action: AgentAction,
    ) -> Option<()> {
        let now = state.now.lease_time();
        match action {
            AgentAction::Poll => agent.core.follower().poll(now, effects),
            AgentAction::Restart => {
                state.restarts += 1;
                if agent.rostered.is_some() {
                    state.rostered_until = Tick(state.now.0 + 2 * self.trust);
                }
                let next = ModelAgent::new(self, agent.process + 1);
                // Answers to the process that ended are still on the way.
                let (proofs, replays) = (agent.proofs.clone(), agent.replays.clone());
                *agent = ModelAgent { proofs, replays, ..next };
            }
            AgentAction::ReceiveRow(mark, change) => {
                let row = self.script.change(change).row(mark.at);
                agent.core.follower().on_live(&mark.voucher(), vec![row], now, effects);
            }
            AgentAction::ReceiveTick(head) => agent.core.follower().on_tick(&head.voucher(), now, effects),
            AgentAction::ReceiveEnd(incarnation) => {
                let ended = Mark { at: LogPosition::ZERO, incarnation }.provenance();
                agent.core.follower().on_end(ended, now);
            }
            AgentAction::ProbeIsAnswered(nonce) => {
                let (_, seen) = *agent.probes.iter().find(|(probe, _)| *probe == nonce)?;
                if !self.has(Flaw::RoundsDoNotNumber) {
                    state.number(seen.map_or(0, |seen| seen.at.epoch()));
                }
                if self.demoted {
                    state.fence = state.now;
                }
                if state.store.admits(seen) {
                    agent.proofs.insert((nonce, state.store.mark()));
                }
                agent.rostered = Some(state.now).filter(|_| self.agents > 1);
            }
            AgentAction::ReceiveProof(nonce, head) => {
                agent.core.follower().on_probe_answer(nonce, &head.voucher(), true, now, effects);
            }
            AgentAction::ReplayIsAnswered(nonce) => {
                let query = agent.replay_queries.iter().find(|query| query.nonce == nonce)?;
                let replay = state.store.replay(query.epoch, query.from, query.to);
                agent.replays.insert((nonce, state.store.mark(), replay));
            }
            AgentAction::ReceiveReplay(nonce, place) => {
                let (_, head, replay) = agent.replays.iter().nth(place)?.clone();
                let (provenance, answer) = (head.provenance(), self.replay_answer(replay));
                agent.core.follower().on_replay_answer(nonce, provenance, answer, now, effects);
            }
            AgentAction::Verify => self.verify(state, agent),
            AgentAction::LoadIsRead(source) => agent.load.as_mut()?.read = state.read(self, source),
            AgentAction::ReceiveLoad => {
                let read = agent.load.as_mut().and_then(|load| load.read.as_mut());
                if let Some(read) = read.filter(|_| self.has(Flaw::SnapshotsAreTorn)) {
                    read.as_of = state.store.mark();
                }
                let answered = agent.complete_load(self, state.now, effects);
                state.broken = answered.and_then(|(view, waiter)| judge_load(self, state, view, &waiter));
            }
        }
        Some(())
    }

    fn replay_answer(&self, replay: ModelReplay) -> ReplayOutcome {
        let row = |(position, change)| self.script.change(change).row(position);
        match replay {
            Ok(rows) => ReplayOutcome::Rows(rows.into_iter().map(row).collect()),
            Err(head) => ReplayOutcome::Refused { head: head.voucher() },
        }
    }

    /// A hit advances its entry. Otherwise the verification sends a load, or shares the one under way.
    fn verify(&self, state: &SmallState, agent: &mut ModelAgent) {
        let began = state.verification(self, agent);
        let now = state.now.lease_time();
        if let Some(hit) = agent.core.hit(now) {
            hit.answer(&agent.core.state);
        } else if let Some(load) = &mut agent.load {
            // It begins after the load was sent, if only by a moment.
            let reading = agent.core.state.begin(now.after(Duration::from_micros(1)));
            if agent.core.state.may_share(load.sent_at.lease_time(), reading) {
                load.waiter = ModelVerification { reading, ..began };
            }
        } else if agent.loads_left > 0 {
            agent.loads_left -= 1;
            agent.load = Some(PendingLoad { sent_at: state.now, waiter: began, read: None });
        }
    }

    fn step_publisher(&self, state: &mut SmallState, index: usize, action: PublisherAction) -> Option<()> {
        let now = state.now.lease_time();
        let publisher = &mut state.publishers[index];
        match action {
            PublisherAction::ReceiveProbe(nonce) => {
                let mut probes = state.agents.iter().flat_map(|agent| &agent.probes);
                let probe = *probes.find(|(probe, _)| *probe == nonce)?;
                let ModelPublisher { rounds, running } = publisher;
                match running {
                    Some((answered, _)) if self.has(Flaw::RoundsAnswerLatecomers) => answered.push(probe),
                    _ if rounds.waiting().contains(&probe) => return None,
                    _ => rounds.add(probe, now).ok()?,
                }
            }
            PublisherAction::BeginRound => {
                let probes = publisher.rounds.start(now)?;
                let epochs = probes.iter().filter_map(|(_, seen)| seen.map(|seen| seen.at.epoch()));
                state.number(epochs.max().unwrap_or(0));
                state.publishers[index].running = Some((probes, state.store.mark()));
            }
            PublisherAction::EndRound => {
                let (probes, head) = publisher.running.take()?;
                publisher.rounds.finish(true);
                let admitted = probes.iter().filter(|(_, seen)| state.store.admits(*seen));
                let mut agent = ModelAgent::clone(&state.agents[0]);
                agent.proofs.extend(admitted.map(|(nonce, _)| (*nonce, head)));
                agent.settle(self, state.now, &[]);
                state.agents[0] = Arc::new(agent);
            }
            PublisherAction::Crash => *publisher = ModelPublisher::start(),
        }
        Some(())
    }
}
