//! What is told to the publishers of each change that was applied here.
//!
//! Announcements may get lost, so each sighting goes with three of them: the one that first covers its change,
//! and the next two.

use std::collections::VecDeque;

use evictd_core::limits::SIGHTINGS_MAX;
use evictd_core::position::LogPosition;
use evictd_core::receipts::Sighting;

/// With how many announcements a sighting goes.
const TELLINGS: u8 = 3;

/// Sightings that wait. Of more, the oldest are given up: receipts then lack this agent's measurements.
const WAITING_MAX: usize = 16 * SIGHTINGS_MAX;

/// The sightings that are still to be told, in their turn.
#[derive(Debug, Default)]
pub(crate) struct Sightings(VecDeque<Waiting>);

#[derive(Debug)]
struct Waiting {
    sighting: Sighting,
    tellings: u8,
}

impl Sightings {
    pub(crate) fn push(&mut self, sighting: Sighting) {
        if self.0.len() == WAITING_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Waiting { sighting, tellings: 0 });
    }

    /// The sightings for an announcement of `applied`, at most as many as fit, those first that were told least.
    /// What isn't covered yet waits; what belongs to an older epoch is of no use to anybody.
    pub(crate) fn told_with(&mut self, applied: LogPosition) -> Vec<Sighting> {
        self.0.retain(|Waiting { sighting, tellings }| {
            *tellings < TELLINGS && sighting.position.epoch() >= applied.epoch()
        });
        self.0.make_contiguous().sort_by_key(|waiting| waiting.tellings);
        let is_covered = |sighting: &Sighting| {
            sighting.position <= applied && sighting.position.epoch() == applied.epoch()
        };
        let covered = self.0.iter_mut().filter(|waiting| is_covered(&waiting.sighting)).take(SIGHTINGS_MAX);
        covered
            .map(|waiting| {
                waiting.tellings += 1;
                waiting.sighting
            })
            .collect()
    }

    /// The announcement that these went with wasn't sent.
    pub(crate) fn unsent(&mut self, told: &[Sighting]) {
        for waiting in self.0.iter_mut().filter(|waiting| told.contains(&waiting.sighting)) {
            waiting.tellings = waiting.tellings.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use evictd_core::receipts::{Exposure, Span};

    use super::*;

    fn sighting(epoch: u32, position: u64) -> Sighting {
        let position = LogPosition::new(epoch, position).unwrap();
        Sighting { position, lag: Span::default(), exposure: Exposure::default() }
    }

    fn told(sightings: &mut Sightings, epoch: u32, applied: u64) -> Vec<u64> {
        let told = sightings.told_with(LogPosition::new(epoch, applied).unwrap());
        told.iter().map(|sighting| sighting.position.position()).collect()
    }

    #[test]
    fn a_sighting_goes_with_the_announcement_that_covers_it_and_two_more() {
        let mut sightings = Sightings::default();
        sightings.push(sighting(1, 5));
        sightings.push(sighting(1, 7));
        assert_eq!(told(&mut sightings, 1, 4), [0; 0]);
        assert_eq!(told(&mut sightings, 1, 5), [5]);
        assert_eq!(told(&mut sightings, 1, 7), [7, 5], "first what nobody was told yet");
        assert_eq!(told(&mut sightings, 1, 7), [7, 5]);
        assert_eq!(told(&mut sightings, 1, 7), [7]);
        assert_eq!(told(&mut sightings, 1, 7), [0; 0]);
    }

    #[test]
    fn what_was_not_sent_goes_with_later_ones() {
        let mut sightings = Sightings::default();
        sightings.push(sighting(1, 5));
        for _ in 0..5 {
            let told = sightings.told_with(LogPosition::new(1, 5).unwrap());
            assert_eq!(told.len(), 1);
            sightings.unsent(&told);
        }
        for _ in 0..TELLINGS {
            assert_eq!(told(&mut sightings, 1, 5), [5]);
        }
        assert_eq!(told(&mut sightings, 1, 5), [0; 0]);
    }

    #[test]
    fn of_many_all_get_their_turn_and_the_oldest_are_given_up() {
        let mut sightings = Sightings::default();
        let all = 2 * WAITING_MAX as u64;
        (1..=all).for_each(|position| sightings.push(sighting(1, position)));
        let mut seen = Vec::new();
        for _ in 0..usize::from(TELLINGS) * WAITING_MAX / SIGHTINGS_MAX {
            let now = told(&mut sightings, 1, all);
            assert_eq!(now.len(), SIGHTINGS_MAX);
            seen.extend(now);
        }
        assert_eq!(told(&mut sightings, 1, all), [0; 0]);
        seen.sort_unstable();
        let expected = (all - WAITING_MAX as u64 + 1..=all).flat_map(|position| [position; 3]);
        assert_eq!(seen, expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_belongs_to_an_older_epoch_is_dropped() {
        let mut sightings = Sightings::default();
        sightings.push(sighting(1, 5));
        sightings.push(sighting(2, 6));
        assert_eq!(told(&mut sightings, 2, 5), [0; 0]);
        assert_eq!(told(&mut sightings, 2, 6), [6]);
    }
}
