//! Whether an answer is as new as the guarantees demand.

use evictd_core::position::LogPosition;
use evictd_core::rules::Rule;

use crate::agent::LoadResult;
use crate::script::{ModelKey, View};
use crate::state::{LostChange, SmallState};
use crate::world::{SmallWorld, Tick};

/// Judges an answer that a load gave, by what its verification could expect when it began.
pub(crate) fn judge_load(
    world: &SmallWorld,
    state: &SmallState,
    key: ModelKey,
    result: &LoadResult,
) -> Option<Rule> {
    let LoadResult { view, waiter } = *result;
    let lacks = |owed: View| !owed.and(state.store.view()).without(view).is_empty();
    if !is_recent(world, state, key, view, waiter.at) {
        Some(Rule::G1)
    } else if lacks(waiter.owed) || has_lost_change(state, waiter.reading.applied(), view) {
        Some(Rule::G2)
    } else if lacks(waiter.confirmed) {
        Some(Rule::G4)
    } else {
        None
    }
}

/// Whether an answer with `view`, to a verification that began at `began`, is as new as the trust demands
/// (G1). What a fail-over lost counts as a change at that moment.
pub(crate) fn is_recent(
    world: &SmallWorld,
    state: &SmallState,
    key: ModelKey,
    view: View,
    began: Tick,
) -> bool {
    let is_due = |at: Tick| at.0 + world.trust <= began.0;
    let due = state.store.rows.iter().filter(|row| is_due(row.at)).map(|row| row.change).collect::<View>();
    let gone = state.lost.iter().filter(|lost| is_due(lost.at)).map(|lost| lost.change).collect::<View>();
    due.and(world.script.of(key)).without(view).is_empty() && gone.and(view).is_empty()
}

/// Whether `view` has a change that a fail-over lost before the epoch of `applied`.
pub(crate) fn has_lost_change(state: &SmallState, applied: LogPosition, view: View) -> bool {
    let is_void = |lost: &LostChange| lost.void_from.is_some_and(|at| at <= applied);
    state.lost.iter().any(|lost| is_void(lost) && view.includes(lost.change))
}
