//! Recovery when faults stop: a schedule in which every message arrives, once and in order.
//!
//! A liveness property over all fair schedules is out of reach of the checker. This is weaker in that it tries
//! one schedule, and stronger in that it tries it from every reachable state, and bounds it.

use evictd_core::lease::Mode;
use evictd_core::serving::EntryCache;

use crate::agent::ModelAgent;
use crate::script::ModelKey;
use crate::state::{ReadSource, SmallAction, SmallState};
use crate::world::SmallWorld;

/// So many exchanges of questions and answers are enough.
const EXCHANGES: usize = 4;

/// Longer than any pause between two questions.
const PAUSE: u64 = 9;

/// Whether every agent becomes live at the head, and then answers both from a load and from its cache.
pub(crate) fn heals(world: &SmallWorld, state: &SmallState) -> bool {
    if state.broken.is_some() {
        return true;
    }
    let mut state = state.clone();
    state.publishers.clear();
    let calm = SmallWorld { rounds: false, flaw: None, loads: u8::MAX, ..*world };
    (0..state.agents.len()).all(|index| {
        for _ in 0..EXCHANGES {
            state.now.0 += PAUSE;
            exchange(&calm, &mut state, index);
        }
        let agent = &state.agents[index];
        agent.mode(state.now) == Mode::Live
            && agent.applied() == state.store.head
            && calm.verifies(&mut state, index)
    })
}

/// One question of each kind that the agent has, and its answer.
fn exchange(world: &SmallWorld, state: &mut SmallState, index: usize) {
    world.take(state, SmallAction::Poll(index));
    let asked: Vec<u64> = state.agents[index].asked.iter().map(|(nonce, _)| *nonce).collect();
    for nonce in asked {
        world.take(state, SmallAction::Round(index, nonce));
        let proofs: Vec<_> =
            state.agents[index].proofs.iter().copied().filter(|(of, _)| *of == nonce).collect();
        if let Some((_, head)) = proofs.last() {
            world.take(state, SmallAction::ReceiveProof(index, nonce, *head));
        }
    }
    world.take(state, SmallAction::Poll(index));
    let wanted: Vec<u64> = state.agents[index].wanted.iter().map(|wanted| wanted.nonce).collect();
    for nonce in wanted {
        world.take(state, SmallAction::Replay(index, nonce));
        let place = state.agents[index].replays.iter().position(|(of, ..)| *of == nonce);
        if let Some(place) = place {
            world.take(state, SmallAction::ReceiveReplay(index, nonce, place));
        }
    }
}

impl SmallWorld {
    fn take(&self, state: &mut SmallState, action: SmallAction) {
        if let Some(next) = self.step(state, action) {
            *state = next;
        }
    }

    /// Whether a key is loaded and then answered from the cache. A load may have to make room for its own
    /// floors, which costs a second one.
    fn verifies(&self, state: &mut SmallState, index: usize) -> bool {
        let key = ModelKey::A;
        // What is in the air is given up.
        let calm = state.agents[index].after(self, state.now, |agent: &mut ModelAgent, _| {
            agent.loads = [None, None];
            agent.cache.clear();
            agent.loads_left = 2;
        });
        state.agents[index] = calm.into();
        (0..2).any(|_| {
            self.take(state, SmallAction::Verify(index, key));
            self.take(state, SmallAction::Read(index, key, ReadSource::Primary));
            self.take(state, SmallAction::CompleteLoad(index, key));
            state.broken.is_none() && state.agents[index].hit(key, state.now).is_some()
        })
    }
}
