//! The properties: what must hold in every state, by the ids of the rules, and what must be possible.

use std::sync::Arc;

use evictd_core::rules::Rule;
use evictd_core::service::Standing;
use stateright::{Model, Property};

use super::agent::HistoryAgent;
use super::publisher::PublisherProcess;
use super::store::DELETION;
use super::world::{
    Budget, HistoryAction, HistoryAgentAction, HistoryPublisherAction, HistoryState, HistoryWorld,
};
use crate::check::{Checkable, RECOVERS};
use crate::defect::{Defect, under};

/// So many exchanges are enough.
const EXCHANGES: usize = 4;

impl Checkable for HistoryWorld {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn with(self, defect: Defect) -> Self {
        Self { defect: Some(defect), tries_recovery: false, ..self }
    }
}

impl Model for HistoryWorld {
    type State = HistoryState;
    type Action = HistoryAction;

    fn init_states(&self) -> Vec<HistoryState> {
        vec![under(self.defect, || HistoryState::start(self))]
    }

    fn actions(&self, state: &HistoryState, actions: &mut Vec<HistoryAction>) {
        under(self.defect, || self.add_actions(state, actions));
    }

    fn next_state(&self, last: &HistoryState, action: HistoryAction) -> Option<HistoryState> {
        self.step(last, action).filter(|next| next != last)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(Rule::G2.id(), |world: &HistoryWorld, state: &HistoryState| {
                under(world.defect, || {
                    let answers = state.agents.iter().any(|agent| agent.has_applied && agent.answers_valid());
                    state.is_overruled || !answers
                })
            }),
            Property::always(Rule::R16.id(), |_, state: &HistoryState| {
                let processes = state.publishers.iter().flatten();
                let proved = processes.filter_map(|process| process.service().unknown_past());
                proved.into_iter().all(|seen| state.sent.iter().any(|sent| sent.voucher.milestone == *seen))
            }),
        ];
        if self.budget.deletions > 0 {
            properties
                .push(Property::sometimes("an agent applies the deletion", |_, state: &HistoryState| {
                    state.agents.iter().any(|agent| agent.has_applied)
                }));
        }
        if self.receipts {
            properties.push(Property::always(Rule::G4.id(), |world: &HistoryWorld, state: &HistoryState| {
                under(world.defect, || receipts_are_true(world, state))
            }));
            properties.push(Property::sometimes("a receipt is final", |_, state: &HistoryState| {
                state.publishers.iter().flatten().any(|process| process.is_final)
            }));
        }
        if self.tries_recovery {
            properties.push(Property::always(RECOVERS, |world: &HistoryWorld, state: &HistoryState| {
                under(world.defect, || {
                    (0..world.publishers.len()).all(|publisher| recovers(world, state, publisher))
                })
            }));
        }
        if self.defect.is_none() {
            properties.extend(self.occurs.iter().map(|(name, is_so)| Property::sometimes(name, *is_so)));
        }
        properties
    }
}

/// While a publisher that finalized the deletion's receipt serves, no agent answers VALID (G4). Two that serve while
/// they are cut off from each other can't detect that: it is the assumption A4.
fn receipts_are_true(world: &HistoryWorld, state: &HistoryState) -> bool {
    let final_ones = state.publishers.iter().enumerate().filter(|(publisher, process)| {
        let Some(process) = process else { return false };
        let can_detect = !world.begins_cut || process.has_met || world.steady.contains(publisher);
        process.is_final && !process.frozen && can_detect
    });
    final_ones.count() == 0 || state.is_overruled || !state.agents.iter().any(|agent| agent.answers_valid())
}

/// Whether all agents follow `publisher`'s store once its publisher is the only one that is left. An operator declares
/// the store if agents have received what it doesn't have.
fn recovers(world: &HistoryWorld, state: &HistoryState, publisher: usize) -> bool {
    let calm = HistoryWorld { prompt: false, receipts: false, ..*world };
    let mut state = state.clone();
    state.left = Budget::RECOVERY;
    let store = world.publishers[publisher];
    let knows_all = state.agents.iter().all(|agent| agent.is_known_to(&state.stores[store]));
    for other in (0..world.publishers.len()).filter(|other| *other != publisher) {
        take(&calm, &mut state, HistoryAction::Publisher(other, HistoryPublisherAction::Crash));
    }
    take(&calm, &mut state, HistoryAction::CutEnds);
    let starts = match &state.publishers[publisher] {
        None => Some(HistoryPublisherAction::Start),
        Some(process) => process.frozen.then_some(HistoryPublisherAction::Thaw),
    };
    if let Some(starts) = starts {
        take(&calm, &mut state, HistoryAction::Publisher(publisher, starts));
    }
    let was_behind = state.has_one(Standing::Behind);
    exchange(&calm, &mut state, publisher);
    if is_followed(&state, publisher, store) {
        return true;
    }
    if !state.has_one(Standing::Behind) || knows_all && !was_behind {
        return false;
    }
    // A second declaration may be needed: a silent publisher notes no later epoch.
    (0..2).any(|_| {
        take(&calm, &mut state, HistoryAction::Declare(store));
        exchange(&calm, &mut state, publisher);
        is_followed(&state, publisher, store)
    })
}

fn is_followed(state: &HistoryState, publisher: usize, store: usize) -> bool {
    let store = &state.stores[store];
    let follows = |agent: &Arc<HistoryAgent>| {
        let mut agent = HistoryAgent::clone(agent);
        agent.load(store);
        agent.follows() == Some(store.provenance())
            && agent.applied() == store.voucher().milestone.at
            && agent.answers_valid() != store.has(DELETION)
    };
    state.publishers[publisher].as_ref().is_some_and(PublisherProcess::vouches)
        && state.agents.iter().all(follows)
}

/// A bound passes, in which everything arrives.
fn exchange(calm: &HistoryWorld, state: &mut HistoryState, publisher: usize) {
    for _ in 0..EXCHANGES {
        take(calm, state, HistoryAction::Publisher(publisher, HistoryPublisherAction::Wait));
        for index in 0..state.agents.len() {
            let take =
                |state: &mut HistoryState, action| take(calm, state, HistoryAction::Agent(index, action));
            take(state, HistoryAgentAction::NoticeSilence);
            take(state, HistoryAgentAction::Probe);
            let newest = state.agents[index].probes.last().map(|probe| probe.nonce);
            let vouches = state.publishers[publisher].as_ref().is_some_and(PublisherProcess::vouches);
            let Some(nonce) = newest.filter(|_| vouches) else { continue };
            take(state, HistoryAgentAction::ProbeIsReceived(publisher, nonce));
            let place = state.agents[index].answers.iter().position(|answer| answer.nonce == nonce);
            if let Some(place) = place {
                take(state, HistoryAgentAction::ReceiveProof(place));
            }
            take(state, HistoryAgentAction::Repair(publisher));
        }
    }
}

fn take(world: &HistoryWorld, state: &mut HistoryState, action: HistoryAction) {
    if let Some(next) = world.step(state, action) {
        *state = next;
    }
}
