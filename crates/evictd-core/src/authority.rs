//! The publisher's side: when a probe round runs, what its reads answer for, and when a publisher must leave its queue
//! groups (R7, R8, R14).

use std::time::Duration;

use crate::protection::Protection;
use crate::time::LeaseTime;

/// Probes that wait for a round. Rounds start at most every `spacing`, one at a time; probes that
/// arrive meanwhile share the next one, so that the store's cost doesn't grow with the agents.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rounds<P> {
    spacing: Duration,
    waiting: Vec<P>,
    waiting_max: usize,
    running_since: Option<LeaseTime>,
    last_start: Option<LeaseTime>,
    oldest_waiting: Option<LeaseTime>,
    failing_since: Option<LeaseTime>,
}

impl<P> Rounds<P> {
    /// No probes. More than `waiting_max` at once are refused.
    pub fn new(spacing: Duration, waiting_max: usize) -> Self {
        Self {
            spacing,
            waiting: Vec::new(),
            waiting_max,
            running_since: None,
            last_start: None,
            oldest_waiting: None,
            failing_since: None,
        }
    }

    /// A probe arrived. `Err` gives it back when too many wait.
    pub fn add(&mut self, probe: P, now: LeaseTime) -> Result<(), P> {
        if self.waiting.len() >= self.waiting_max {
            return Err(probe);
        }
        self.waiting.push(probe);
        self.oldest_waiting.get_or_insert(now);
        Ok(())
    }

    /// Starts a round if one is due, and returns whom it will answer: exactly the probes that were
    /// seen before it began.
    pub fn start(&mut self, now: LeaseTime) -> Option<Vec<P>> {
        if self.start_at().is_none_or(|due| now < due) {
            return None;
        }
        self.running_since = Some(now);
        self.last_start = Some(now);
        self.oldest_waiting = None;
        Some(std::mem::take(&mut self.waiting))
    }

    /// The running round ended, well or badly.
    pub fn finish(&mut self, well: bool) {
        let since = self.running_since.take();
        self.failing_since = if well { None } else { self.failing_since.or(since) };
    }

    /// The probes that wait.
    pub fn waiting(&self) -> &[P] {
        &self.waiting
    }

    /// When [`Rounds::start`] would start a round; `None` while one runs or nobody waits.
    pub fn start_at(&self) -> Option<LeaseTime> {
        if self.running_since.is_some() || self.waiting.is_empty() {
            return None;
        }
        Some(self.last_start.map_or(LeaseTime(0), |last| last.after(self.spacing)))
    }

    /// Whether somebody has waited longer than `patience` for a round that succeeds: the publisher must
    /// leave the queue group, or it would swallow its neighbours' probes (R14). Probes that go to all still
    /// come in, and a round that succeeds ends it.
    pub fn stalled(&self, now: LeaseTime, patience: Duration) -> bool {
        let waits = [self.running_since, self.oldest_waiting, self.failing_since];
        Protection::StalledPublishersKeepSilent.holds()
            && waits.into_iter().flatten().any(|since| now.since(since) >= patience)
    }
}

/// How old the last round that began at `began` is: a read answers for no later moment, because the server that gave it
/// may have been demoted since (R8). Decades if there was no round yet.
pub fn fence_age(began: Option<LeaseTime>, now: LeaseTime) -> Duration {
    if Protection::LookupsCarryTheFenceAge.holds() {
        now.since(began.unwrap_or_default())
    } else {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACING: Duration = Duration::from_millis(250);

    fn ms(ms: u64) -> LeaseTime {
        LeaseTime(1_000_000 + ms * 1000)
    }

    #[test]
    fn ten_thousand_probes_share_one_round() {
        let mut rounds = Rounds::new(SPACING, 20_000);
        rounds.add(0, ms(0)).unwrap();
        assert_eq!(rounds.start(ms(0)), Some(vec![0]));
        for probe in 1..=10_000 {
            rounds.add(probe, ms(1)).unwrap();
        }
        assert_eq!(rounds.start(ms(2)), None, "a round is running");
        rounds.finish(true);
        assert_eq!(rounds.start(ms(249)), None, "rounds keep their distance");
        assert_eq!(rounds.start(ms(250)).map(|probes| probes.len()), Some(10_000));
        rounds.finish(true);
        assert_eq!(rounds.start(ms(900)), None, "nobody waits");
    }

    #[test]
    fn a_probe_that_arrives_during_a_round_waits_for_the_next() {
        let mut rounds = Rounds::new(SPACING, 10);
        rounds.add("early", ms(0)).unwrap();
        assert_eq!(rounds.start(ms(0)), Some(vec!["early"]));
        rounds.add("late", ms(1)).unwrap();
        rounds.finish(true);
        assert_eq!(rounds.start(ms(250)), Some(vec!["late"]));
    }

    #[test]
    fn too_many_probes_are_refused_not_kept() {
        let mut rounds = Rounds::new(SPACING, 1);
        rounds.add(1, ms(0)).unwrap();
        assert_eq!(rounds.add(2, ms(0)), Err(2));
    }

    #[test]
    fn a_round_that_does_not_finish_counts_as_stalled() {
        let patience = Duration::from_secs(2);
        let mut rounds = Rounds::new(SPACING, 10);
        assert!(!rounds.stalled(ms(60_000), patience), "nobody asked");
        rounds.add(1, ms(0)).unwrap();
        rounds.start(ms(0)).unwrap();
        assert!(!rounds.stalled(ms(1_999), patience));
        assert!(rounds.stalled(ms(2_000), patience));
        rounds.finish(true);
        assert!(!rounds.stalled(ms(2_000), patience));
    }

    #[test]
    fn rounds_that_fail_fast_count_as_stalled_until_one_succeeds() {
        let patience = Duration::from_secs(2);
        let mut rounds = Rounds::new(SPACING, 10);
        for at in [0, 1_000, 2_000] {
            rounds.add(1, ms(at)).unwrap();
            rounds.start(ms(at)).unwrap();
            rounds.finish(false);
        }
        assert!(rounds.stalled(ms(2_000), patience));
        rounds.add(1, ms(3_000)).unwrap();
        rounds.start(ms(3_000)).unwrap();
        rounds.finish(true);
        assert!(!rounds.stalled(ms(3_000), patience));
    }
}
