//! The actions of a world, and what follows from each.
//!
//! Most faults need no action of their own, because nothing ever has to happen. A message that is never
//! delivered is lost; one that is delivered again was duplicated; a link is cut while nothing is delivered
//! over it; a publisher that crashes has only not sent the rest, since its state is in the store (its
//! probe rounds are modeled where `rounds` is set). So every schedule with these faults is among
//! those that are checked.

use std::sync::Arc;
use std::time::Duration;

use evictd_core::authority::Rounds;
use evictd_core::follower::ReplayOutcome;
use evictd_core::position::LogPosition;

use crate::agent::{LoadResult, ModelAgent, ModelVerification, PendingLoad};
use crate::judge::judge_load;
use crate::script::{ChangeId, ModelKey};
use crate::state::{ModelPublisher, ReadSource, SmallAction, SmallState};
use crate::store::{Mark, ModelReplay, ModelRow};
use crate::world::{SmallWorld, Tick, WorldFlaw};

impl SmallWorld {
    /// Adds every action that `state` permits.
    pub(crate) fn add_actions(&self, state: &SmallState, actions: &mut Vec<SmallAction>) {
        if state.broken.is_some() {
            return;
        }
        self.store_actions(state, actions);
        for (index, agent) in state.agents.iter().enumerate() {
            self.bus_actions(state, index, agent, actions);
            self.load_actions(state, index, agent, actions);
        }
        for (index, publisher) in state.publishers.iter().enumerate() {
            let asked = state.agents.iter().flat_map(|agent| &agent.asked).map(|(nonce, _)| *nonce);
            actions.extend(asked.map(|nonce| SmallAction::Arrive(index, nonce)));
            if publisher.running.is_some() {
                actions.push(SmallAction::EndRound(index));
            } else if publisher.rounds.start_at().is_some() {
                actions.push(SmallAction::BeginRound(index));
            }
            actions.push(SmallAction::Crash(index));
        }
    }

    fn store_actions(&self, state: &SmallState, actions: &mut Vec<SmallAction>) {
        if state.now.0 < self.ticks {
            actions.push(SmallAction::Pass);
        }
        if usize::from(state.committed) < self.script.len() {
            actions.push(SmallAction::Commit);
        }
        if !state.store.is_numbered() {
            actions.push(SmallAction::Number);
        }
        if self.has_standby() && !self.demoted && !state.is_stray && state.standby != state.store {
            actions.push(SmallAction::CatchUp);
        }
        if self.stray && !state.is_stray {
            actions.push(SmallAction::Stray);
        }
        if state.failovers < self.failovers {
            actions.push(SmallAction::FailOver);
        }
        if self.purges && !state.store.is_purged() {
            actions.push(SmallAction::Purge);
        }
    }

    fn bus_actions(
        &self,
        state: &SmallState,
        index: usize,
        agent: &ModelAgent,
        actions: &mut Vec<SmallAction>,
    ) {
        if agent.state.follower.lock().wake_at() <= state.now.lease_time() {
            actions.push(SmallAction::Poll(index));
        }
        if state.reconnects < self.reconnects {
            actions.push(SmallAction::Reconnect(index));
        }
        if state.restarts < self.restarts {
            actions.push(SmallAction::Restart(index));
        }
        for (mark, changes) in &state.live {
            actions.extend(changes.iter().map(|change| SmallAction::ReceiveLive(index, *mark, *change)));
        }
        actions.extend(state.heads.iter().map(|head| SmallAction::ReceiveTick(index, *head)));
        actions.extend(state.ended.iter().map(|ended| SmallAction::ReceiveEnd(index, *ended)));
        let asked = agent.asked.iter().map(|(nonce, _)| *nonce);
        actions.extend(
            asked
                .filter(unanswered(agent.proofs.iter().map(|(nonce, _)| *nonce)))
                .map(|nonce| SmallAction::Round(index, nonce)),
        );
        actions
            .extend(agent.proofs.iter().map(|(nonce, head)| SmallAction::ReceiveProof(index, *nonce, *head)));
        let wanted = agent.wanted.iter().map(|wanted| wanted.nonce);
        let replayed = agent.replays.iter().map(|(nonce, ..)| *nonce);
        actions.extend(wanted.filter(unanswered(replayed)).map(|nonce| SmallAction::Replay(index, nonce)));
        let replays = agent.replays.iter().enumerate();
        actions.extend(replays.map(|(place, (nonce, ..))| SmallAction::ReceiveReplay(index, *nonce, place)));
    }

    fn load_actions(
        &self,
        state: &SmallState,
        index: usize,
        agent: &ModelAgent,
        actions: &mut Vec<SmallAction>,
    ) {
        for key in self.verified_keys() {
            actions.push(SmallAction::Verify(index, *key));
            match &agent.loads[key.index()] {
                Some(PendingLoad { read: None, .. }) => {
                    actions.push(SmallAction::Read(index, *key, ReadSource::Primary));
                    if self.replica {
                        actions.push(SmallAction::Read(index, *key, ReadSource::Replica));
                    }
                    if state.old_primary.is_some() {
                        actions.push(SmallAction::Read(index, *key, ReadSource::OldPrimary));
                    }
                }
                Some(PendingLoad { read: Some(_), .. }) => {
                    actions.push(SmallAction::CompleteLoad(index, *key));
                }
                None => {}
            }
        }
    }

    /// The state after `action`; `None` if that changes nothing.
    pub fn step(&self, last: &SmallState, action: SmallAction) -> Option<SmallState> {
        match action {
            SmallAction::Pass
            | SmallAction::Commit
            | SmallAction::Number
            | SmallAction::CatchUp
            | SmallAction::Stray
            | SmallAction::FailOver
            | SmallAction::Purge => Some(self.step_store(last, action)),
            SmallAction::Verify(index, key) => self.step_verification(last, index, key),
            SmallAction::CompleteLoad(index, key) => self.complete_load(last, index, key),
            SmallAction::Arrive(index, _)
            | SmallAction::BeginRound(index)
            | SmallAction::EndRound(index)
            | SmallAction::Crash(index) => self.step_publisher(last, index, action),
            SmallAction::Poll(index)
            | SmallAction::Reconnect(index)
            | SmallAction::Restart(index)
            | SmallAction::ReceiveLive(index, ..)
            | SmallAction::ReceiveTick(index, _)
            | SmallAction::ReceiveEnd(index, _)
            | SmallAction::Round(index, _)
            | SmallAction::ReceiveProof(index, ..)
            | SmallAction::Replay(index, _)
            | SmallAction::ReceiveReplay(index, ..)
            | SmallAction::Read(index, ..) => self.step_agent(last, index, action),
        }
    }

    fn step_store(&self, last: &SmallState, action: SmallAction) -> SmallState {
        let mut state = last.clone();
        match action {
            SmallAction::Pass => state.now.0 += 1,
            SmallAction::Commit => {
                let change = ChangeId(state.committed);
                state.store.rows.push(ModelRow { change, at: state.now, position: None });
                state.committed += 1;
            }
            SmallAction::Number => state.number(0),
            SmallAction::CatchUp => state.standby = state.store.clone(),
            SmallAction::Stray => {
                state.is_stray = true;
                state.standby.number(0, 2);
            }
            SmallAction::FailOver => state.fail_over(self),
            _ => state.store.purge(),
        }
        state
    }

    fn step_agent(&self, last: &SmallState, index: usize, action: SmallAction) -> Option<SmallState> {
        let mut state = last.clone();
        let now = state.now.lease_time();
        let agent = last.agents[index].clone();
        let next = match action {
            SmallAction::Poll(_) => {
                agent.after(self, last.now, |agent, effects| agent.state.follower.lock().poll(now, effects))
            }
            SmallAction::Reconnect(_) => {
                state.reconnects += 1;
                agent.after(self, last.now, |agent, _| agent.state.follower.lock().connected(now))
            }
            SmallAction::Restart(_) => {
                state.restarts += 1;
                if agent.rostered.is_some() {
                    state.rostered_until = Tick(state.now.0 + 2 * self.trust);
                }
                // Answers to the process that ended are still on the way.
                ModelAgent::new(self, agent.process + 1).after(self, last.now, |next, _| {
                    next.proofs.clone_from(&agent.proofs);
                    next.replays.clone_from(&agent.replays);
                })
            }
            SmallAction::ReceiveLive(_, mark, change) => {
                let row = self.script.change(change).row(mark.at);
                agent.after(self, last.now, |agent, effects| {
                    agent.state.follower.lock().on_live(&mark.voucher(), vec![row], now, effects);
                })
            }
            SmallAction::ReceiveTick(_, head) => agent.after(self, last.now, |agent, effects| {
                agent.state.follower.lock().on_tick(&head.voucher(), now, effects);
            }),
            SmallAction::ReceiveEnd(_, incarnation) => agent.after(self, last.now, |agent, _| {
                let ended = Mark { at: LogPosition::ZERO, incarnation }.provenance();
                agent.state.follower.lock().on_end(ended, now);
            }),
            SmallAction::Round(_, nonce) => {
                let (_, seen) = *agent.asked.iter().find(|(asked, _)| *asked == nonce)?;
                if self.flaw != Some(WorldFlaw::RoundsDoNotNumber) {
                    state.number(seen.map_or(0, |seen| seen.at.epoch()));
                }
                state.raise_fence(self);
                let (head, at) = (state.store.mark(), state.now);
                let is_admitted = state.store.admits(seen);
                let next = agent.after(self, last.now, |agent, _| {
                    if is_admitted {
                        agent.proofs.insert((nonce, head));
                    }
                    agent.rostered = Some(at).filter(|_| self.agents > 1);
                });
                // The round may have changed the store only.
                state.agents[index] = Arc::new(next);
                return (state != *last).then_some(state);
            }
            SmallAction::ReceiveProof(_, nonce, head) => agent.after(self, last.now, |agent, effects| {
                agent.state.follower.lock().on_probe_answer(nonce, &head.voucher(), true, now, effects);
            }),
            SmallAction::Replay(_, nonce) => {
                let wanted = *agent.wanted.iter().find(|wanted| wanted.nonce == nonce)?;
                let (epoch, from, to) = (wanted.epoch, wanted.from, wanted.to);
                let replay = state.store.replay(epoch, from, to);
                let head = state.store.mark();
                agent.after(self, last.now, |agent, _| {
                    agent.replays.insert((nonce, head, replay));
                })
            }
            SmallAction::ReceiveReplay(_, nonce, place) => {
                let (_, head, replay) = agent.replays.iter().nth(place)?.clone();
                let (provenance, answer) = (head.provenance(), self.replay_answer(replay));
                agent.after(self, last.now, |agent, effects| {
                    let mut follower = agent.state.follower.lock();
                    follower.on_replay_answer(nonce, provenance, answer, now, effects);
                })
            }
            SmallAction::Read(_, key, origin) => {
                let read = last.read(self, key, origin);
                agent.after(self, last.now, |agent, _| {
                    if let Some(load) = &mut agent.loads[key.index()] {
                        load.read = read;
                    }
                })
            }
            _ => return None,
        };
        state.with(index, next)
    }

    fn replay_answer(&self, replay: ModelReplay) -> ReplayOutcome {
        match replay {
            ModelReplay::Rows(rows) => ReplayOutcome::Rows(
                rows.into_iter().map(|(position, change)| self.script.change(change).row(position)).collect(),
            ),
            ModelReplay::Refused(head) => ReplayOutcome::Refused { head: head.voucher() },
        }
    }

    /// A hit advances its entry. Otherwise the verification sends a load, or shares the one under way.
    fn step_verification(&self, last: &SmallState, index: usize, key: ModelKey) -> Option<SmallState> {
        let agent = &last.agents[index];
        let began = last.verification(self, agent, key);
        let next = agent.after(self, last.now, |agent, _| {
            if let Some(hit) = agent.hit(key, last.now) {
                hit.answer(&agent.state);
            } else if let Some(load) = &mut agent.loads[key.index()] {
                // It begins after the load was sent, if only by a moment.
                let moment = Duration::from_micros(1);
                let reading = agent.state.begin(last.now.lease_time().after(moment));
                if agent.state.may_share(load.sent_at.lease_time(), reading) {
                    load.waiter = ModelVerification { reading, ..began };
                }
            } else if agent.loads_left > 0 {
                agent.loads_left -= 1;
                agent.loads[key.index()] = Some(PendingLoad { sent_at: last.now, waiter: began, read: None });
            }
        });
        last.clone().with(index, next)
    }

    fn complete_load(&self, last: &SmallState, index: usize, key: ModelKey) -> Option<SmallState> {
        let mut result = None;
        let next = last.agents[index].after(self, last.now, |agent, effects| {
            let read = agent.loads[key.index()].as_mut().and_then(|load| load.read.as_mut());
            if let Some(read) = read.filter(|_| self.flaw == Some(WorldFlaw::SnapshotsAreTorn)) {
                read.as_of = last.store.mark();
            }
            result = agent.complete_load(self, key, last.now, effects);
        });
        let mut state = last.clone();
        state.broken = result.and_then(|result: LoadResult| judge_load(self, last, key, &result));
        state.with(index, next)
    }

    fn step_publisher(&self, last: &SmallState, index: usize, action: SmallAction) -> Option<SmallState> {
        let mut state = last.clone();
        let now = state.now.lease_time();
        match action {
            SmallAction::Arrive(_, nonce) => {
                let asked = last.agents.iter().flat_map(|agent| &agent.asked);
                let probe = *asked.into_iter().find(|(asked, _)| *asked == nonce)?;
                let ModelPublisher { rounds, running } = &mut state.publishers[index];
                match running {
                    Some((answered, _)) if self.flaw == Some(WorldFlaw::RoundsAnswerLatecomers) => {
                        answered.push(probe);
                    }
                    _ if rounds.waiting().contains(&probe) => return None,
                    _ => rounds.add(probe, now).ok()?,
                }
            }
            SmallAction::BeginRound(_) => {
                let probes = state.publishers[index].rounds.start(now)?;
                let epochs = probes.iter().filter_map(|(_, seen)| seen.map(|seen| seen.at.epoch()));
                state.number(epochs.max().unwrap_or(0));
                state.publishers[index].running = Some((probes, state.store.mark()));
            }
            SmallAction::EndRound(_) => {
                let publisher = &mut state.publishers[index];
                let (probes, head) = publisher.running.take()?;
                publisher.rounds.finish(true);
                let admitted = probes.iter().filter(|(_, seen)| last.store.admits(*seen));
                let admitted: Vec<u64> = admitted.map(|(nonce, _)| *nonce).collect();
                let next = state.agents[0].after(self, last.now, |agent, _| {
                    agent.proofs.extend(admitted.into_iter().map(|nonce| (nonce, head)));
                });
                state.agents[0] = Arc::new(next);
            }
            _ => {
                state.publishers[index] =
                    ModelPublisher { rounds: Rounds::new(Duration::ZERO, 8), running: None }
            }
        }
        (state != *last).then_some(state)
    }
}

/// Of several answers to one question only the first to arrive counts, and which one that is was decided when
/// it was sent: so a second one would only repeat what another schedule shows.
fn unanswered(answers: impl Iterator<Item = u64> + Clone) -> impl Fn(&u64) -> bool {
    move |nonce| !answers.clone().any(|answered| answered == *nonce)
}
