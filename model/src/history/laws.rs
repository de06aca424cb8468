//! What must hold in every state, by the ids of the rules, and what must be possible at all.

use std::sync::Arc;

use evictd_core::rules::Rule;
use evictd_core::service::Standing;
use stateright::Property;

use super::agent::Agent;
use super::publisher::Process;
use super::world::{self, Action, State, World};
use crate::HEALS;

/// So many exchanges are enough.
const EXCHANGES: usize = 4;

/// The properties of a world.
pub(super) fn all(world: &World) -> Vec<Property<World>> {
    let mut properties = vec![
        Property::always(Rule::G2.id(), |world: &World, state: &State| {
            world.under(|| {
                let answers = state.agents.iter().any(|agent| agent.told && agent.answers_valid());
                state.is_overruled || !answers
            })
        }),
        Property::always(Rule::R16.id(), |_, state: &State| {
            let processes = state.publishers.iter().flatten();
            let proved = processes.filter_map(Process::unknown_past);
            proved.into_iter().all(|seen| state.sent.iter().any(|sent| sent.voucher.milestone == *seen))
        }),
    ];
    if world.budget.deletions > 0 {
        properties.push(Property::sometimes("an agent is told", |_, state: &State| {
            state.agents.iter().any(|agent| agent.told)
        }));
    }
    if world.receipts {
        properties.push(Property::always(Rule::G4.id(), |world: &World, state: &State| {
            world.under(|| receipts_are_true(world, state))
        }));
        properties.push(Property::sometimes("a receipt is final", |_, state: &State| {
            state.publishers.iter().flatten().any(|process| process.is_final)
        }));
    }
    if world.heals {
        properties.push(Property::always(HEALS, |world: &World, state: &State| {
            world.under(|| (0..world.publishers.len()).all(|publisher| finds_back(world, state, publisher)))
        }));
    }
    if world.missing.is_none() && world.flaw.is_none() {
        for (name, standing) in world.standings {
            properties.push(Property::sometimes(
                name,
                match standing {
                    Standing::Yielding => |_, state: &State| has_one(state, Standing::Yielding),
                    Standing::Conflicting => |_, state: &State| has_one(state, Standing::Conflicting),
                    Standing::Behind => |_, state: &State| has_one(state, Standing::Behind),
                    Standing::Asking | Standing::Serving => {
                        |_, state: &State| has_one(state, Standing::Serving)
                    }
                },
            ));
        }
    }
    properties
}

fn has_one(state: &State, standing: Standing) -> bool {
    state.publishers.iter().flatten().any(|process| process.standing() == standing)
}

/// While a publisher that called the deletion's receipt final goes on serving, no agent answers VALID (G4). Two that
/// serve while they are cut off from each other can't know: that is the assumption.
fn receipts_are_true(world: &World, state: &State) -> bool {
    let judged = state.publishers.iter().enumerate().filter(|(publisher, process)| {
        let Some(process) = process else { return false };
        let knows = !world.is_ever_cut() || process.has_met || world.steady.contains(publisher);
        process.is_final && !process.frozen && knows
    });
    judged.count() == 0 || state.is_overruled || !state.agents.iter().any(|agent| agent.answers_valid())
}

/// Whether all agents follow `publisher`'s store once it is the only one that is left, and an operator said so if
/// agents have seen what it doesn't know.
fn finds_back(world: &World, state: &State, publisher: usize) -> bool {
    let calm = world::calm(world);
    let mut state = state.clone();
    state.allow_healing();
    let store = world.publishers[publisher];
    let knows_all = state.agents.iter().all(|agent| agent.is_known_to(&state.stores[store]));
    let others: Vec<usize> = (0..world.publishers.len()).filter(|other| *other != publisher).collect();
    for other in others {
        take(&calm, &mut state, Action::Crash(other));
    }
    let take = |state: &mut State, action| take(&calm, state, action);
    take(&mut state, Action::Heal);
    match &state.publishers[publisher] {
        None => take(&mut state, Action::Start(publisher)),
        Some(process) if process.frozen => take(&mut state, Action::Thaw(publisher)),
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
    // A second word may be needed: a publisher that is silent notes no later epoch.
    for _ in 0..2 {
        take(&mut state, Action::Declare(store));
        exchange(&calm, &mut state, publisher);
        if is_followed(&state, publisher, store) {
            break;
        }
    }
    is_followed(&state, publisher, store)
}

fn is_followed(state: &State, publisher: usize, store: usize) -> bool {
    let follows = |agent: &Arc<Agent>| {
        let agent = agent.loads(&state.stores[store]);
        agent.follows() == Some(state.stores[store].provenance())
            && agent.applied() == state.stores[store].voucher().milestone.at
            && agent.answers_valid() != state.stores[store].has(super::store::DELETION)
    };
    state.publishers[publisher].as_ref().is_some_and(Process::vouches) && state.agents.iter().all(follows)
}

/// A bound passes, in which everything arrives.
fn exchange(calm: &World, state: &mut State, publisher: usize) {
    for _ in 0..EXCHANGES {
        take(calm, state, Action::Wait(publisher));
        for index in 0..state.agents.len() {
            take(calm, state, Action::Silence(index));
            take(calm, state, Action::Probe(index));
            let newest = state.agents[index].probes.last().map(|probe| probe.nonce);
            let vouches = state.publishers[publisher].as_ref().is_some_and(Process::vouches);
            let Some(nonce) = newest.filter(|_| vouches) else { continue };
            take(calm, state, Action::AnswerProbe(publisher, index, nonce));
            let place = state.agents[index].answers.iter().position(|answer| answer.nonce == nonce);
            if let Some(place) = place {
                take(calm, state, Action::HearProof(index, place));
            }
            take(calm, state, Action::Repair(index, publisher));
        }
    }
}

fn take(world: &World, state: &mut State, action: Action) {
    if let Some(next) = world.step(state, action) {
        *state = next;
    }
}
