//! What must hold in every state, by the ids of the rules, and what must be possible at all.

use std::collections::{BTreeMap, BTreeSet};

use evictd_core::lease::Mode;
use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;
use stateright::Property;

use crate::agent::{Agent, LoadResult};
use crate::heal;
use crate::script::{ChangeId, Key, View};
use crate::store::Store;
use crate::world::{Lost, State, Tick, World};

/// The properties of a world.
pub(crate) fn all(world: &World) -> Vec<Property<World>> {
    let mut properties = vec![
        Property::always(Rule::G1.id(), |world: &World, state: &State| {
            state.broken != Some(Rule::G1)
                && answers(world, state, |_, key, view| is_recent(world, state, key, view, state.now))
        }),
        Property::always(Rule::G2.id(), |world: &World, state: &State| {
            state.broken != Some(Rule::G2)
                && answers(world, state, |agent, key, view| {
                    let owed = covered(&state.store, agent.applied()).and(world.script.of(key));
                    owed.without(view).is_empty() && !knows_what_was_forgotten(state, agent.applied(), view)
                })
        }),
        Property::always(Rule::G3.id(), |_, state: &State| positions_are_given_once(state)),
        Property::always(Rule::G4.id(), |world: &World, state: &State| {
            state.broken != Some(Rule::G4) && {
                let confirmed = confirmed_by_all(world, state);
                answers(world, state, |_, key, view| {
                    confirmed.and(world.script.of(key)).without(view).is_empty()
                })
            }
        }),
        Property::always(Rule::R1.id(), |_, state: &State| positions_are_dense(&state.store)),
        Property::always(Rule::R2.id(), |_, state: &State| state.epochs <= state.failovers),
    ];
    if world.failovers > 0 && world.flaw.is_none() {
        properties.push(Property::sometimes("an agent is live in a later epoch", |_, state: &State| {
            let later = |agent: &Agent| agent.applied().epoch() > 1 && is_live_at_head(state, agent);
            state.agents.iter().any(|agent| later(agent))
        }));
    }
    if world.heals {
        properties.push(Property::always(HEALS, |world: &World, state: &State| {
            world.under(|| heal::heals(world, state))
        }));
    }
    if world.ticks > 0 {
        properties.push(Property::sometimes("an agent without proof keeps an entry", |_, state: &State| {
            let expired = |agent: &Agent| agent.mode(state.now) == Mode::Expired;
            state.agents.iter().any(|agent| expired(agent) && !agent.cache.is_empty())
        }));
    }
    if world.agents > 1 {
        properties.push(Property::sometimes(
            "a change is confirmed by all",
            |world: &World, state: &State| {
                let rostered = state.agents.iter().filter(|agent| agent.rostered.is_some()).count();
                rostered == world.agents && !confirmed_by_all(world, state).is_empty()
            },
        ));
    }
    if world.restarts > 0 {
        properties.push(Property::sometimes("a restarted agent is live", |_, state: &State| {
            state.agents.iter().any(|agent| agent.process > 0 && is_live_at_head(state, agent))
        }));
    }
    properties
}

/// The property that is no rule: once faults stop, every agent becomes live again.
pub const HEALS: &str = "heals";

/// Whether what any agent would answer now, to a verification of any key, satisfies `law`.
fn answers(world: &World, state: &State, mut law: impl FnMut(&Agent, Key, View) -> bool) -> bool {
    world.under(|| {
        state.agents.iter().all(|agent| {
            Key::ALL
                .into_iter()
                .all(|key| agent.hit(key, state.now).is_none_or(|hit| law(agent, key, hit.entry().view)))
        })
    })
}

/// Judges an answer that a load gave, by what its verification could expect when it began.
pub(crate) fn judge_load(world: &World, state: &State, key: Key, result: &LoadResult) -> Option<Rule> {
    let LoadResult { view, waiter } = *result;
    let lacks = |owed: View| !owed.and(state.store.view()).without(view).is_empty();
    if !is_recent(world, state, key, view, waiter.at) {
        Some(Rule::G1)
    } else if lacks(waiter.owed) || knows_what_was_forgotten(state, waiter.reading.applied(), view) {
        Some(Rule::G2)
    } else if lacks(waiter.confirmed) {
        Some(Rule::G4)
    } else {
        None
    }
}

/// Whether an answer with `view`, to a verification that began at `began`, is as new as the trust demands
/// (G1). What a fail-over lost counts as a change at that moment.
fn is_recent(world: &World, state: &State, key: Key, view: View, began: Tick) -> bool {
    let is_due = |at: Tick| at.0 + world.trust <= began.0;
    let due = state.store.rows.iter().filter(|row| is_due(row.at)).map(|row| row.change).collect::<View>();
    let gone = state.lost.iter().filter(|lost| is_due(lost.at)).map(|lost| lost.change).collect::<View>();
    due.and(world.script.of(key)).without(view).is_empty() && gone.and(view).is_empty()
}

/// The changes of `store` that whoever has applied `applied` has applied.
pub(crate) fn covered(store: &Store, applied: LogPosition) -> View {
    let covered = store.rows.iter().filter(|row| row.position.is_some_and(|position| position <= applied));
    covered.map(|row| row.change).collect()
}

/// Whether `view` has a change that never happened in the epoch that `applied` belongs to.
fn knows_what_was_forgotten(state: &State, applied: LogPosition, view: View) -> bool {
    let forgotten = |lost: &Lost| lost.forgotten_at.is_some_and(|at| at <= applied);
    state.lost.iter().any(|lost| forgotten(lost) && view.includes(lost.change))
}

/// The changes whose receipts may say that everybody confirmed: every process of the roster has applied
/// them, and announced it at once. A process that ended is remembered for a while.
pub(crate) fn confirmed_by_all(world: &World, state: &State) -> View {
    if world.agents < 2 || state.now < state.remembered_until {
        return View::default();
    }
    let rostered = state.agents.iter().filter(|agent| agent.rostered.is_some());
    let Some(least) = rostered.map(|agent| agent.applied()).min() else { return View::default() };
    covered(&state.store, least)
}

/// No position was ever given to two changes (G3).
fn positions_are_given_once(state: &State) -> bool {
    let mut given: BTreeMap<LogPosition, BTreeSet<ChangeId>> = BTreeMap::new();
    for (mark, changes) in &state.live {
        given.entry(mark.at).or_default().extend(changes);
    }
    given.values().all(|changes| changes.len() == 1)
}

/// The positions of what is committed are 1, 2, 3, ... up to the head (R1).
fn positions_are_dense(store: &Store) -> bool {
    let given: Vec<LogPosition> = store.rows.iter().filter_map(|row| row.position).collect();
    given.iter().map(|position| position.position()).eq(1..=store.head.position()) && given.is_sorted()
}

fn is_live_at_head(state: &State, agent: &Agent) -> bool {
    agent.mode(state.now) == Mode::Live && agent.applied() == state.store.head
}
