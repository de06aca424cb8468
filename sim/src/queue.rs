//! The queue of scheduled events, in the order of their moments. Events of one moment keep the order of scheduling.

use std::collections::BTreeMap;

use crate::time::Moment;

/// ScheduledFault events.
#[derive(Debug)]
pub struct Queue<E> {
    events: BTreeMap<(Moment, u64), E>,
    scheduled: u64,
}

impl<E> Default for Queue<E> {
    fn default() -> Self {
        Self { events: BTreeMap::new(), scheduled: 0 }
    }
}

impl<E> Queue<E> {
    /// Schedules `event` at `at`, after the events that were scheduled there before.
    pub fn push(&mut self, at: Moment, event: E) {
        self.scheduled += 1;
        self.events.insert((at, self.scheduled), event);
    }

    /// Removes the next event.
    pub fn pop(&mut self) -> Option<(Moment, E)> {
        self.events.pop_first().map(|((at, _), event)| (at, event))
    }
}
