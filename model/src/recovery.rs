//! Recovery when faults stop: a schedule in which every message arrives, once and in order.
//!
//! A liveness property over all fair schedules is out of reach of the checker. This is weaker in that it tries
//! one schedule, and stronger in that it tries it from every reachable state, and bounds it.

use std::sync::Arc;

use evictd_core::lease::Mode;
use evictd_core::serving::EntryCache;

use crate::agent::ModelAgent;
use crate::state::{AgentAction, ReadSource, SmallAction, SmallState};
use crate::world::SmallWorld;

/// So many exchanges of queries and answers are enough.
const EXCHANGES: usize = 4;

/// Longer than any pause between two queries.
const PAUSE: u64 = 9;

/// Whether every agent becomes live at the head, and then answers both from a load and from its cache.
pub(crate) fn recovers(world: &SmallWorld, state: &SmallState) -> bool {
    if state.broken.is_some() {
        return true;
    }
    let mut state = state.clone();
    state.publishers.clear();
    let calm = SmallWorld { rounds: false, loads: u8::MAX, ..*world };
    (0..state.agents.len()).all(|index| {
        for _ in 0..EXCHANGES {
            state.now.0 += PAUSE;
            exchange(&calm, &mut state, index);
        }
        let agent = &state.agents[index];
        agent.mode(state.now) == Mode::Live
            && agent.core.applied() == state.store.head
            && serves(&calm, &mut state, index)
    })
}

/// One query of each kind that the agent has, and its answer.
fn exchange(world: &SmallWorld, state: &mut SmallState, index: usize) {
    take(world, state, index, AgentAction::Poll);
    let probes: Vec<u64> = state.agents[index].probes.iter().map(|(nonce, _)| *nonce).collect();
    for nonce in probes {
        take(world, state, index, AgentAction::ProbeIsAnswered(nonce));
        let proof = state.agents[index].proofs.iter().copied().rfind(|(of, _)| *of == nonce);
        if let Some((_, head)) = proof {
            take(world, state, index, AgentAction::ReceiveProof(nonce, head));
        }
    }
    take(world, state, index, AgentAction::Poll);
    let queries: Vec<u64> = state.agents[index].replay_queries.iter().map(|query| query.nonce).collect();
    for nonce in queries {
        take(world, state, index, AgentAction::ReplayIsAnswered(nonce));
        let place = state.agents[index].replays.iter().position(|(of, ..)| *of == nonce);
        if let Some(place) = place {
            take(world, state, index, AgentAction::ReceiveReplay(nonce, place));
        }
    }
}

fn take(world: &SmallWorld, state: &mut SmallState, index: usize, action: AgentAction) {
    if let Some(next) = world.step(state, SmallAction::Agent(index, action)) {
        *state = next;
    }
}

/// Whether a key is loaded and then answered from the cache. A load may have to make room for its own
/// floors, which costs a second one.
fn serves(world: &SmallWorld, state: &mut SmallState, index: usize) -> bool {
    // Loads under way are dropped.
    let mut agent = ModelAgent { load: None, loads_left: 2, ..ModelAgent::clone(&state.agents[index]) };
    agent.core.cache.clear();
    agent.settle(world, state.now, &[]);
    state.agents[index] = Arc::new(agent);
    (0..2).any(|_| {
        let read = AgentAction::LoadIsRead(ReadSource::Primary);
        for action in [AgentAction::Verify, read, AgentAction::ReceiveLoad] {
            take(world, state, index, action);
        }
        state.broken.is_none() && state.agents[index].core.hit(state.now.lease_time()).is_some()
    })
}
