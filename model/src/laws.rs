//! The properties: what must hold in every state, by the ids of the rules, and what must be possible.

use std::collections::{BTreeMap, BTreeSet};

use evictd_core::lease::Mode;
use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;
use stateright::{Model, Property};

use crate::agent::ModelAgent;
use crate::heal;
use crate::judge::{has_lost_change, is_recent};
use crate::script::{ChangeId, ModelKey, View};
use crate::state::{SmallAction, SmallState};
use crate::store::ModelStore;
use crate::world::SmallWorld;

impl Model for SmallWorld {
    type State = SmallState;
    type Action = SmallAction;

    fn init_states(&self) -> Vec<SmallState> {
        vec![SmallState::start(self)]
    }

    fn actions(&self, state: &SmallState, actions: &mut Vec<SmallAction>) {
        self.add_actions(state, actions);
    }

    fn next_state(&self, last: &SmallState, action: SmallAction) -> Option<SmallState> {
        self.under(|| self.step(last, action)).map(SmallState::sorted)
    }

    fn format_action(&self, action: &SmallAction) -> String {
        action.to_string()
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties(self)
    }
}

fn properties(world: &SmallWorld) -> Vec<Property<SmallWorld>> {
    let mut properties = vec![
        Property::always(Rule::G1.id(), |world: &SmallWorld, state: &SmallState| {
            state.broken != Some(Rule::G1)
                && answers(world, state, |_, key, view| is_recent(world, state, key, view, state.now))
        }),
        Property::always(Rule::G2.id(), |world: &SmallWorld, state: &SmallState| {
            state.broken != Some(Rule::G2)
                && answers(world, state, |agent, key, view| {
                    let owed = state.store.covered(agent.applied()).and(world.script.of(key));
                    owed.without(view).is_empty() && !has_lost_change(state, agent.applied(), view)
                })
        }),
        Property::always(Rule::G3.id(), |_, state: &SmallState| positions_are_given_once(state)),
        Property::always(Rule::G4.id(), |world: &SmallWorld, state: &SmallState| {
            state.broken != Some(Rule::G4) && {
                let confirmed = state.confirmed_by_all(world);
                answers(world, state, |_, key, view| {
                    confirmed.and(world.script.of(key)).without(view).is_empty()
                })
            }
        }),
        Property::always(Rule::R1.id(), |_, state: &SmallState| positions_are_dense(&state.store)),
        Property::always(Rule::R2.id(), |_, state: &SmallState| state.epochs <= state.failovers),
    ];
    if world.failovers > 0 && world.flaw.is_none() {
        properties.push(Property::sometimes("an agent is live in a later epoch", |_, state: &SmallState| {
            let later = |agent: &ModelAgent| agent.applied().epoch() > 1 && is_live_at_head(state, agent);
            state.agents.iter().any(|agent| later(agent))
        }));
    }
    if world.heals {
        properties.push(Property::always(HEALS, |world: &SmallWorld, state: &SmallState| {
            world.under(|| heal::heals(world, state))
        }));
    }
    if world.ticks > 0 {
        properties.push(Property::sometimes(
            "an agent without proof keeps an entry",
            |_, state: &SmallState| {
                let expired = |agent: &ModelAgent| agent.mode(state.now) == Mode::Expired;
                state.agents.iter().any(|agent| expired(agent) && !agent.cache.is_empty())
            },
        ));
    }
    if world.agents > 1 {
        properties.push(Property::sometimes(
            "a change is confirmed by all",
            |world: &SmallWorld, state: &SmallState| {
                let rostered = state.agents.iter().filter(|agent| agent.rostered.is_some()).count();
                rostered == world.agents && !state.confirmed_by_all(world).is_empty()
            },
        ));
    }
    if world.restarts > 0 {
        properties.push(Property::sometimes("a restarted agent is live", |_, state: &SmallState| {
            state.agents.iter().any(|agent| agent.process > 0 && is_live_at_head(state, agent))
        }));
    }
    properties
}

/// The property that is no rule: once faults stop, every agent becomes live again.
pub(crate) const HEALS: &str = "heals";

/// Whether what any agent would answer now, to a verification of any key, satisfies `law`.
fn answers(
    world: &SmallWorld,
    state: &SmallState,
    mut law: impl FnMut(&ModelAgent, ModelKey, View) -> bool,
) -> bool {
    world.under(|| {
        state.agents.iter().all(|agent| {
            ModelKey::ALL
                .into_iter()
                .all(|key| agent.hit(key, state.now).is_none_or(|hit| law(agent, key, hit.entry().view)))
        })
    })
}

/// No position was ever given to two changes (G3).
fn positions_are_given_once(state: &SmallState) -> bool {
    let mut given: BTreeMap<LogPosition, BTreeSet<ChangeId>> = BTreeMap::new();
    for (mark, changes) in &state.live {
        given.entry(mark.at).or_default().extend(changes);
    }
    given.values().all(|changes| changes.len() == 1)
}

/// The positions of what is committed are 1, 2, 3, ... up to the head (R1).
fn positions_are_dense(store: &ModelStore) -> bool {
    let given: Vec<LogPosition> = store.rows.iter().filter_map(|row| row.position).collect();
    given.iter().map(|position| position.position()).eq(1..=store.head.position()) && given.is_sorted()
}

fn is_live_at_head(state: &SmallState, agent: &ModelAgent) -> bool {
    agent.mode(state.now) == Mode::Live && agent.applied() == state.store.head
}
