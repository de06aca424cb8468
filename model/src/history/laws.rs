//! The properties: what must hold in every state, by the ids of the rules, and what must be possible.

use std::sync::Arc;

use evictd_core::rules::Rule;
use evictd_core::service::Standing;
use stateright::{Model, Property};

use super::agent::HistoryAgent;
use super::publisher::PublisherProcess;
use super::world::{self, HistoryAction, HistoryState, HistoryWorld};
use crate::laws::HEALS;

/// So many exchanges are enough.
const EXCHANGES: usize = 4;

impl Model for HistoryWorld {
    type State = HistoryState;
    type Action = HistoryAction;

    fn init_states(&self) -> Vec<HistoryState> {
        vec![self.under(|| HistoryState::start(self))]
    }

    fn actions(&self, state: &HistoryState, actions: &mut Vec<HistoryAction>) {
        self.under(|| {
            self.fault_actions(state, actions);
            for publisher in 0..self.publishers.len() {
                self.publisher_actions(state, publisher, actions);
            }
            for index in 0..state.agents.len() {
                self.agent_actions(state, index, actions);
            }
        });
    }

    fn next_state(&self, last: &HistoryState, action: HistoryAction) -> Option<HistoryState> {
        self.step(last, action).filter(|next| next != last)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties(self)
    }
}

fn properties(world: &HistoryWorld) -> Vec<Property<HistoryWorld>> {
    let mut properties = vec![
        Property::always(Rule::G2.id(), |world: &HistoryWorld, state: &HistoryState| {
            world.under(|| {
                let answers = state.agents.iter().any(|agent| agent.has_applied && agent.answers_valid());
                state.is_overruled || !answers
            })
        }),
        Property::always(Rule::R16.id(), |_, state: &HistoryState| {
            let processes = state.publishers.iter().flatten();
            let proved = processes.filter_map(PublisherProcess::unknown_past);
            proved.into_iter().all(|seen| state.sent.iter().any(|sent| sent.voucher.milestone == *seen))
        }),
    ];
    if world.budget.deletions > 0 {
        properties.push(Property::sometimes("an agent applies the deletion", |_, state: &HistoryState| {
            state.agents.iter().any(|agent| agent.has_applied)
        }));
    }
    if world.receipts {
        properties.push(Property::always(Rule::G4.id(), |world: &HistoryWorld, state: &HistoryState| {
            world.under(|| receipts_are_true(world, state))
        }));
        properties.push(Property::sometimes("a receipt is final", |_, state: &HistoryState| {
            state.publishers.iter().flatten().any(|process| process.is_final)
        }));
    }
    if world.heals {
        properties.push(Property::always(HEALS, |world: &HistoryWorld, state: &HistoryState| {
            world.under(|| (0..world.publishers.len()).all(|publisher| finds_back(world, state, publisher)))
        }));
    }
    if world.missing.is_none() && world.flaw.is_none() {
        for (name, standing) in world.standings {
            properties.push(Property::sometimes(
                name,
                match standing {
                    Standing::Yielding => |_, state: &HistoryState| has_one(state, Standing::Yielding),
                    Standing::Conflicting => |_, state: &HistoryState| has_one(state, Standing::Conflicting),
                    Standing::Behind => |_, state: &HistoryState| has_one(state, Standing::Behind),
                    Standing::Asking | Standing::Serving => {
                        |_, state: &HistoryState| has_one(state, Standing::Serving)
                    }
                },
            ));
        }
    }
    properties
}

fn has_one(state: &HistoryState, standing: Standing) -> bool {
    state.publishers.iter().flatten().any(|process| process.standing() == standing)
}

/// While a publisher that called the deletion's receipt final goes on serving, no agent answers VALID (G4). Two that
/// serve while they are cut off from each other can't notice: that is the assumption.
fn receipts_are_true(world: &HistoryWorld, state: &HistoryState) -> bool {
    let judged = state.publishers.iter().enumerate().filter(|(publisher, process)| {
        let Some(process) = process else { return false };
        let knows = !world.is_ever_cut() || process.has_met || world.steady.contains(publisher);
        process.is_final && !process.frozen && knows
    });
    judged.count() == 0 || state.is_overruled || !state.agents.iter().any(|agent| agent.answers_valid())
}

/// Whether all agents follow `publisher`'s store once it is the only one that is left, and an operator said so if
/// agents have received what it doesn't have.
fn finds_back(world: &HistoryWorld, state: &HistoryState, publisher: usize) -> bool {
    let calm = world::calm(world);
    let mut state = state.clone();
    state.allow_healing();
    let store = world.publishers[publisher];
    let knows_all = state.agents.iter().all(|agent| agent.is_known_to(&state.stores[store]));
    let others: Vec<usize> = (0..world.publishers.len()).filter(|other| *other != publisher).collect();
    for other in others {
        take(&calm, &mut state, HistoryAction::Crash(other));
    }
    let take = |state: &mut HistoryState, action| take(&calm, state, action);
    take(&mut state, HistoryAction::Heal);
    match &state.publishers[publisher] {
        None => take(&mut state, HistoryAction::Start(publisher)),
        Some(process) if process.frozen => take(&mut state, HistoryAction::Thaw(publisher)),
        Some(_) => {}
    }
    let was_behind = has_one(&state, Standing::Behind);
    exchange(&calm, &mut state, publisher);
    if is_followed(&state, publisher, store) {
        return true;
    }
    if !has_one(&state, Standing::Behind) || knows_all && !was_behind {
        return false;
    }
    // A second declaration may be needed: a silent publisher notes no later epoch.
    for _ in 0..2 {
        take(&mut state, HistoryAction::Declare(store));
        exchange(&calm, &mut state, publisher);
        if is_followed(&state, publisher, store) {
            break;
        }
    }
    is_followed(&state, publisher, store)
}

fn is_followed(state: &HistoryState, publisher: usize, store: usize) -> bool {
    let follows = |agent: &Arc<HistoryAgent>| {
        let agent = agent.loads(&state.stores[store]);
        agent.follows() == Some(state.stores[store].provenance())
            && agent.applied() == state.stores[store].voucher().milestone.at
            && agent.answers_valid() != state.stores[store].has(super::store::DELETION)
    };
    state.publishers[publisher].as_ref().is_some_and(PublisherProcess::vouches)
        && state.agents.iter().all(follows)
}

/// A bound passes, in which everything arrives.
fn exchange(calm: &HistoryWorld, state: &mut HistoryState, publisher: usize) {
    for _ in 0..EXCHANGES {
        take(calm, state, HistoryAction::Wait(publisher));
        for index in 0..state.agents.len() {
            take(calm, state, HistoryAction::Silence(index));
            take(calm, state, HistoryAction::Probe(index));
            let newest = state.agents[index].probes.last().map(|probe| probe.nonce);
            let vouches = state.publishers[publisher].as_ref().is_some_and(PublisherProcess::vouches);
            let Some(nonce) = newest.filter(|_| vouches) else { continue };
            take(calm, state, HistoryAction::AnswerProbe(publisher, index, nonce));
            let place = state.agents[index].answers.iter().position(|answer| answer.nonce == nonce);
            if let Some(place) = place {
                take(calm, state, HistoryAction::ReceiveProof(index, place));
            }
            take(calm, state, HistoryAction::Repair(index, publisher));
        }
    }
}

fn take(world: &HistoryWorld, state: &mut HistoryState, action: HistoryAction) {
    if let Some(next) = world.step(state, action) {
        *state = next;
    }
}
