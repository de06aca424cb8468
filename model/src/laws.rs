//! The properties: what must hold in every state, by the ids of the rules, and what must be possible.

use std::collections::{BTreeMap, BTreeSet};

use evictd_core::lease::Mode;
use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;
use stateright::{Model, Property};

use crate::agent::{ModelAgent, ModelVerification};
use crate::check::{Checkable, RECOVERS};
use crate::defect::{Defect, under};
use crate::recovery;
use crate::script::{ChangeId, View};
use crate::state::{LostChange, SmallAction, SmallState};
use crate::store::ModelStore;
use crate::world::{SmallWorld, Tick};

impl Checkable for SmallWorld {
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
        under(self.defect, || self.step(last, action)).map(SmallState::sorted)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(Rule::G1.id(), |world: &SmallWorld, state: &SmallState| {
                state.broken != Some(Rule::G1)
                    && answers(world, state, |_, view| is_recent(world, state, view, state.now))
            }),
            Property::always(Rule::G2.id(), |world: &SmallWorld, state: &SmallState| {
                state.broken != Some(Rule::G2)
                    && answers(world, state, |agent, view| {
                        let owed = state.store.covered(agent.core.applied()).and(world.script.verified());
                        owed.without(view).is_empty() && !has_lost_change(state, agent.core.applied(), view)
                    })
            }),
            Property::always(Rule::G3.id(), |_, state: &SmallState| positions_are_given_once(state)),
            Property::always(Rule::G4.id(), |world: &SmallWorld, state: &SmallState| {
                state.broken != Some(Rule::G4) && {
                    let confirmed = state.confirmed_by_all(world).and(world.script.verified());
                    answers(world, state, |_, view| confirmed.without(view).is_empty())
                }
            }),
            Property::always(Rule::R1.id(), |_, state: &SmallState| positions_are_dense(&state.store)),
            Property::always(Rule::R2.id(), |_, state: &SmallState| state.epochs <= state.failovers),
        ];
        if self.failovers > 0 && !matches!(self.defect, Some(Defect::With(_))) {
            properties.push(Property::sometimes(
                "an agent is live in a later epoch",
                |_, state: &SmallState| {
                    let later = |agent: &ModelAgent| {
                        agent.core.applied().epoch() > 1 && is_live_at_head(state, agent)
                    };
                    state.agents.iter().any(|agent| later(agent))
                },
            ));
        }
        if self.tries_recovery {
            properties.push(Property::always(RECOVERS, |world: &SmallWorld, state: &SmallState| {
                under(world.defect, || recovery::recovers(world, state))
            }));
        }
        if self.ticks > 0 {
            properties.push(Property::sometimes(
                "an agent without proof keeps an entry",
                |_, state: &SmallState| {
                    let expired = |agent: &ModelAgent| agent.mode(state.now) == Mode::Expired;
                    state.agents.iter().any(|agent| expired(agent) && !agent.core.cache.place().is_none())
                },
            ));
        }
        if self.agents > 1 {
            properties.push(Property::sometimes(
                "a change is confirmed by all",
                |world: &SmallWorld, state: &SmallState| {
                    let rostered = state.agents.iter().filter(|agent| agent.rostered.is_some()).count();
                    rostered == world.agents && !state.confirmed_by_all(world).is_empty()
                },
            ));
        }
        if self.restarts > 0 {
            properties.push(Property::sometimes("a restarted agent is live", |_, state: &SmallState| {
                state.agents.iter().any(|agent| agent.process > 0 && is_live_at_head(state, agent))
            }));
        }
        properties
    }
}

/// Whether what any agent would answer now satisfies `law`.
fn answers(world: &SmallWorld, state: &SmallState, mut law: impl FnMut(&ModelAgent, View) -> bool) -> bool {
    let now = state.now.lease_time();
    let mut obeys = |agent: &ModelAgent| agent.core.hit(now).is_none_or(|hit| law(agent, hit.entry().view));
    under(world.defect, || state.agents.iter().all(|agent| obeys(agent)))
}

/// Judges an answer that a load gave, by what its verification could expect when it began.
pub(crate) fn judge_load(
    world: &SmallWorld,
    state: &SmallState,
    view: View,
    waiter: &ModelVerification,
) -> Option<Rule> {
    let lacks = |owed: View| !owed.and(state.store.view()).without(view).is_empty();
    if !is_recent(world, state, view, waiter.at) {
        Some(Rule::G1)
    } else if lacks(waiter.owed) || has_lost_change(state, waiter.reading.applied(), view) {
        Some(Rule::G2)
    } else {
        lacks(waiter.confirmed).then_some(Rule::G4)
    }
}

/// Whether an answer with `view`, to a verification that began at `began`, is as new as the trust demands
/// (G1). What a fail-over lost counts as a change at that moment.
fn is_recent(world: &SmallWorld, state: &SmallState, view: View, began: Tick) -> bool {
    let is_due = |at: Tick| at.0 + world.trust <= began.0;
    let due = state.store.rows.iter().filter(|row| is_due(row.at)).map(|row| row.change).collect::<View>();
    let gone = state.lost.iter().filter(|lost| is_due(lost.at)).map(|lost| lost.change).collect::<View>();
    due.and(world.script.verified()).without(view).is_empty() && gone.and(view).is_empty()
}

/// Whether `view` has a change that a fail-over lost before the epoch of `applied`.
fn has_lost_change(state: &SmallState, applied: LogPosition, view: View) -> bool {
    let is_void = |lost: &LostChange| lost.void_from.is_some_and(|at| at <= applied);
    state.lost.iter().any(|lost| is_void(lost) && view.includes(lost.change))
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
    agent.mode(state.now) == Mode::Live && agent.core.applied() == state.store.head
}
