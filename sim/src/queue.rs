//! The queue of scheduled events, in the order of their moments. Events of one moment keep the order of scheduling.

use std::collections::BTreeMap;

use crate::event::SimEvent;
use crate::time::Moment;

#[derive(Debug, Default)]
pub struct Queue {
    events: BTreeMap<(Moment, u64), SimEvent>,
    scheduled: u64,
}

impl Queue {
    /// Schedules `event` at `at`, after the events that were scheduled there before.
    pub fn push(&mut self, at: Moment, event: SimEvent) {
        self.scheduled += 1;
        self.events.insert((at, self.scheduled), event);
    }

    /// Removes the next event.
    pub fn pop(&mut self) -> Option<(Moment, SimEvent)> {
        self.events.pop_first().map(|((at, _), event)| (at, event))
    }
}
